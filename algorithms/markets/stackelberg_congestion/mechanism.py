"""A trained design as a mechanism of the service: a design and a demand in, the users' equilibrium and what they pay out."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, Field, create_model

from mobula.algorithms.markets.stackelberg_congestion.module import WORDS, answer_request, design_report
from mobula.serving.services import Settlement


def _reports(links: list[str], word: str, example: dict[str, float]) -> Any:
    """Schema of the reports for a problem with these candidate links."""
    # The names of links are no identifiers, so they are aliases of numbered fields.
    fields: dict[str, Any] = {
        f"link_{i}": (float, Field(default=0.0, alias=link, ge=0, allow_inf_nan=False))
        for i, link in enumerate(links)
    }
    strict = ConfigDict(extra="forbid", strict=True)
    values = create_model("Links", __config__=strict, **fields)
    design: Any = create_model("Design", __config__=strict, **{word: (values, ...)})  # type: ignore[call-overload]
    examples: list[Any] = [{"design": {word: example}, "demand_scale": 1.0}]
    return create_model(
        "CongestionReports",
        __config__=ConfigDict(
            extra="forbid",
            strict=True,
            json_schema_extra={"examples": examples},
        ),
        design=(design | None, Field(default=None, description="left out: the trained design")),
        demand_scale=(
            float,
            Field(default=1.0, gt=0, le=100, allow_inf_nan=False, description="factor on every demand"),
        ),
    )


class CongestionMechanism:
    """The leader's decision: the design in force, and the equilibrium that the users of the network answer it with."""

    kind: ClassVar[Any] = "mechanism"

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        problem = policy.module.problem()
        self.word, self.links = WORDS[problem.kind], problem.link_names
        self.report = design_report(policy)
        self.trained: dict[str, float] = self.report[self.word]
        self.reports = _reports(self.links, self.word, self.trained)

    def run(self, reports: Any, seed: int | None) -> Settlement:
        """outcome: flows, times, objective; payments: what the users of each candidate link pay together (tolls alone); audit: the
        design in force and the relative gap, and of the trained one the objective of no design and which start won.  Nothing is drawn.

        Raises DataError where the design is not feasible.
        """
        given = reports.model_dump(by_alias=True)
        design = self.trained if given["design"] is None else given["design"][self.word]
        found = answer_request(
            self.policy, {"design": {self.word: design}, "demand_scale": given["demand_scale"]}
        )
        gap = found.pop("relative_gap")
        paid = {}
        if self.word == "tolls":
            paid = {link: design[link] * found["link_flows"][link] for link in self.links}
        audit = {"design": {self.word: design}, "relative_gap": gap}
        if given["design"] is None:
            # What the search says of its own design.
            audit |= {name: self.report[name] for name in ("baseline", "note", "objectives_of_starts")}
        return Settlement(found, paid, audit)
