"""A trained design as a mechanism of the service: a design and a demand in, the users' equilibrium and what they pay out."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, Field, create_model

from mobula.algorithms.markets.stackelberg_congestion.module import answer_request, design_report
from mobula.serving.services import Settlement

WORDS = {"toll": "tolls", "capacity": "capacity_add"}


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
        self.trained: dict[str, float] = design_report(policy)[self.word]
        self.reports = _reports(self.links, self.word, self.trained)

    def run(self, reports: Any, seed: int | None) -> Settlement:
        """outcome: flows, times, objective; payments: what the users of each candidate link pay together (tolls alone); nothing is drawn.

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
        return Settlement(found, paid, {"design": {self.word: design}, "relative_gap": gap})
