"""The trained designs as a policy, and the named request and answer that they are served with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from torch import Tensor

from mobula.envs.markets import design as designs
from mobula.envs.markets.design import Problem
from mobula.envs.markets.networks import Network
from mobula.errors import ConfigError, DataError
from mobula.learning.modules import TensorModule

NETWORK = {
    "tail": "links",
    "head": "links",
    "free_flow_time": "links",
    "capacity": "links",
    "b": "links",
    "power": "links",
    "length": "links",
    "origin": "pairs",
    "destination": "pairs",
    "demand": "pairs",
}
_WHOLE = ("tail", "head", "origin", "destination")


class StackelbergCongestionModule(TensorModule):
    """The designs of all starts, and the network that they are for: a served design is judged by a new equilibrium.

    Observation [design (m), demand factor], NaN standing for the trained design and for 1; the action is the design in force.
    Buffers: y [I, m]; value [I] objectives at equilibrium (mean over scenarios); baseline, without a design.
    """

    takes_missing = True
    y: Tensor
    value: Tensor
    baseline: Tensor

    def setup(self) -> None:
        c = dict(self.model_config)
        starts, m = len(c["starts"]), c["m"]
        self.register_buffer("y", torch.zeros(starts, m, dtype=torch.float64))
        self.register_buffer("value", torch.full((starts,), torch.nan, dtype=torch.float64))
        self.register_buffer("baseline", torch.full((), torch.nan, dtype=torch.float64))
        self.register_buffer("candidates", torch.zeros(m, dtype=torch.int64))
        self.register_buffer("investment", torch.zeros(m, dtype=torch.float64))
        for name, axis in NETWORK.items():
            kind = torch.int64 if name in _WHOLE else torch.float64
            self.register_buffer(name, torch.zeros(c[axis], dtype=kind))

    def hold(self, problem: Problem) -> None:
        """Takes the network and the candidates into the buffers."""
        for name in NETWORK:
            getattr(self, name).copy_(torch.from_numpy(np.array(getattr(problem.network, name))))
        self.candidates.copy_(torch.from_numpy(problem.links))
        self.investment.copy_(torch.from_numpy(np.array(problem.cost)))

    def problem(self) -> Problem:
        """The problem that the buffers describe."""
        c = dict(self.model_config)
        columns = {name: getattr(self, name).cpu().numpy().copy() for name in NETWORK}
        network = Network(c["network"], c["nodes"], **columns, first_thru=c["first_thru"])
        return Problem(
            network,
            c["objective"],
            self.candidates.cpu().numpy().copy(),
            self.investment.cpu().numpy().copy(),
            c["eta"],
            c["upper"],
        )

    def mechanism(self, policy: Any) -> Any:
        """What the service offers under /v1/mechanisms."""
        from mobula.algorithms.markets.stackelberg_congestion.mechanism import CongestionMechanism

        return CongestionMechanism(policy)

    @property
    def best(self) -> int:
        """The start whose design is the best so far."""
        return int(self.value.nan_to_num(nan=torch.inf).argmin())

    def _read(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        obs = obs.double()
        design, factor = obs[..., :-1], obs[..., -1]
        trained = self.y[self.best].expand_as(design)
        return torch.where(design.isnan(), trained, design), torch.where(factor.isnan(), 1.0, factor)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: self._read(batch[Columns.OBS])[0]}

    def served(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """link_flows, link_times [B, A]; total_travel_time, relative_gap, objective [B] at the equilibrium of each row."""
        problem = self.problem()
        rows = []
        for y, factor in zip(*self._read(batch[Columns.OBS]), strict=True):
            if not float(factor) > 0:
                raise DataError(f"demand_scale is {float(factor):g}: a number above 0 is needed")
            try:
                design = problem.feasible(y.numpy(), "design")
            except ConfigError as error:
                raise DataError(str(error)) from None
            rows.append(designs.evaluate(problem, design, demand=float(factor)))
        numbers = {
            "total_travel_time": [row.travel_time for row in rows],
            "relative_gap": [row.gap for row in rows],
            "objective": [row.objective for row in rows],
        }
        return {
            "link_flows": torch.from_numpy(np.stack([row.x for row in rows])),
            "link_times": torch.from_numpy(np.stack([row.times for row in rows])),
            **{name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()},
        }


EXAMPLE: dict[str, Any] = {"design": {"tolls": {"1-6": 4.0}}, "demand_scale": 1.0}
"""A request; for capacities, {"design": {"capacity_add": {...}}}.  Without `design` the trained one is used."""

WORDS = {"toll": "tolls", "capacity": "capacity_add"}
"""What a design is called in requests and answers."""


def answer_request(policy: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a named request: flows and times by link, total travel time, gap, objective at the users' equilibrium.

    Candidates that a design does not name get 0.  Raises DataError for what does not fit, naming it.
    """
    module: StackelbergCongestionModule = policy.module
    problem = module.problem()
    if not isinstance(request, Mapping):
        raise DataError(f"a request is an object such as {EXAMPLE}")
    extra = set(request) - {"design", "demand_scale"}
    if extra:
        raise DataError(f"request: {sorted(extra)[0]!r} is unknown: it may hold design and demand_scale")
    obs = np.full(problem.size + 1, np.nan)
    scale = request.get("demand_scale")
    if scale is not None:
        obs[-1] = _number(scale, "demand_scale")
    design = request.get("design")
    if design is not None:
        obs[:-1] = _design(problem, design)
    answer = policy.answer(obs)
    names = problem.network.link_names
    return {
        "link_flows": dict(zip(names, answer["link_flows"].tolist(), strict=True)),
        "link_times": dict(zip(names, answer["link_times"].tolist(), strict=True)),
        **{name: float(answer[name]) for name in ("total_travel_time", "relative_gap", "objective")},
    }


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise DataError(f"{where} is {value!r}: a number is needed")
    return float(value)


def _design(problem: Problem, design: Any) -> np.ndarray[Any, Any]:
    word = WORDS[problem.kind]
    if not isinstance(design, Mapping):
        raise DataError(f'design is {design!r}: it is an object, {{"{word}": {{"link": number}}}}')
    y = np.zeros(problem.size)
    for kind, values in design.items():
        if kind not in WORDS.values():
            raise DataError(f"design: {kind!r} is unknown: it may hold {word}")
        if kind != word and values:
            raise DataError(f"design: this problem sets {word}, not {kind}")
        if not isinstance(values or {}, Mapping):
            raise DataError(f"design.{kind} is {values!r}: an object of links and numbers is needed")
        for link, value in (values or {}).items():
            if link not in problem.link_names:
                raise DataError(
                    f"design.{kind}: {link!r} is no candidate link; those are {', '.join(problem.link_names)}"
                )
            y[problem.link_names.index(link)] = _number(value, f"design.{kind}.{link}")
    return y


def design_report(policy: Any) -> dict[str, Any]:
    """The trained design by link, its objective (and that of no design), and which start it came from."""
    module: StackelbergCongestionModule = policy.module
    problem, best = module.problem(), module.best
    names = dict(module.model_config)["starts"]
    values = {name: float(v) for name, v in zip(names, module.value, strict=True)}
    return {
        WORDS[problem.kind]: dict(zip(problem.link_names, module.y[best].tolist(), strict=True)),
        "objective": float(module.value[best]),
        "baseline": float(module.baseline),
        "note": f"a local optimum: the best of {len(names)} start(s), from {names[best]!r}",
        "objectives_of_starts": values,
    }
