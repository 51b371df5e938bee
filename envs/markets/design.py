"""The leader's problem: which links, what is set on them, what for; and its instances (Li et al., arXiv 2209.07618).

A design y >= 0 [m] on m candidate links is either capacity added (`cndp`: min sum x t + eta sum d y^2) or a toll in time units
(`sctp`: min total travel time sum x t, tolls being transfers; `revenue`: max sum toll x).  A design is judged at the users' equilibrium,
by the reference solver, never at what a learner unrolled.

`OBJECTIVES["name"] = Objective("toll", function)` adds an objective of one's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mobula.envs.markets import assignment
from mobula.envs.markets.assignment import Assignment
from mobula.envs.markets.networks import Array, Index, Network, by_name
from mobula.errors import ConfigError, DataError, nearest

SIOUXFALLS = "MOBULA_SIOUXFALLS"
"""Environment variable: the folder with SiouxFalls_net.tntp and its companions."""

Kind = Literal["capacity", "toll"]


@dataclass(frozen=True)
class Terms:
    """What an objective may be made of, [B, ...]: flows x [B, A], times t [B, A], design y [B, m], its links [m], costs d [m], eta."""

    x: Tensor
    t: Tensor
    y: Tensor
    links: Tensor
    d: Tensor
    eta: float


@dataclass(frozen=True)
class Objective:
    """kind: what y is; function: Terms -> F [B], differentiable, to be minimised."""

    kind: Kind
    function: Callable[[Terms], Tensor]


def total_time(terms: Terms) -> Tensor:
    """sum_a x_a t_a, [B]."""
    return (terms.x * terms.t).sum(-1)


OBJECTIVES: dict[str, Objective] = {
    "cndp": Objective("capacity", lambda v: total_time(v) + v.eta * (v.d * v.y.square()).sum(-1)),
    "sctp": Objective("toll", total_time),
    "revenue": Objective("toll", lambda v: -(v.y * v.x[..., v.links]).sum(-1)),
}


@dataclass(frozen=True)
class Problem:
    """A network and what the leader may do with it.

    links [m] rows of the candidates; cost [m] investment cost d (zeros for tolls); upper: largest value of a design, or None
    steps: settings of the algorithms that go with the instance (r, alpha, beta, T, advance, eps, xi; "dolmd": {..} overrides)
    """

    network: Network
    objective: str
    links: Index
    cost: Array
    eta: float = 1.0
    upper: float | None = None
    steps: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective {self.objective!r} is not known: {', '.join(OBJECTIVES)}.{nearest(self.objective, OBJECTIVES)}"
            )
        if not len(self.links):
            raise ConfigError(f"{self.network.name}: a design needs one candidate link or more")
        if len(self.cost) != len(self.links):
            raise ConfigError(
                f"cost has {len(self.cost)} numbers for {len(self.links)} candidate links: one each is needed"
            )
        if not (np.isfinite(self.cost) & (self.cost >= 0)).all():
            a = int(np.flatnonzero(~(np.isfinite(self.cost) & (self.cost >= 0)))[0])
            raise ConfigError(
                f"the investment cost of link {self.network.link_names[self.links[a]]} is {self.cost[a]:g}: 0 or more is needed"
            )
        if not (np.isfinite(self.eta) and self.eta >= 0):
            raise ConfigError(f"eta is {self.eta:g}: 0 or more is needed")
        if self.upper is not None and not self.upper > 0:
            raise ConfigError(f"upper is {self.upper:g}: above 0 is needed")

    @property
    def kind(self) -> Kind:
        """capacity or toll."""
        return OBJECTIVES[self.objective].kind

    @property
    def size(self) -> int:
        """m."""
        return len(self.links)

    @cached_property
    def link_names(self) -> list[str]:
        """ "tail-head" of the candidates."""
        return [self.network.link_names[a] for a in self.links]

    def spread(self, y: Any) -> tuple[Any, Any]:
        """(toll, capacity_add), both over all links [..., A], of a design [..., m] (NumPy or torch)."""
        full: Any
        none: Any
        if isinstance(y, Tensor):
            full = y.new_zeros(*y.shape[:-1], self.network.num_links)
            full = full.index_copy(-1, torch.from_numpy(self.links).to(y.device), y)
            none = torch.zeros_like(full)
        else:
            full = np.zeros((*np.shape(y)[:-1], self.network.num_links))
            full[..., self.links] = y
            none = np.zeros_like(full)
        return (full, none) if self.kind == "toll" else (none, full)

    def value(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """F [B] of flows x [B, A], times t [B, A], design y [B, m]."""
        links, cost = (torch.from_numpy(v).to(y.device) for v in (self.links, self.cost))
        terms = Terms(x, t, y, links, cost, self.eta)
        return OBJECTIVES[self.objective].function(terms)

    def project(self, y: Tensor) -> Tensor:
        """The nearest feasible design."""
        return y.clamp_min(0.0) if self.upper is None else y.clamp(0.0, self.upper)

    def feasible(self, y: Any, where: str) -> Array:
        """`y` as an array [m].  Raises ConfigError where it is no feasible design, naming the link."""
        try:
            design = np.asarray(y, dtype=np.float64)
        except (TypeError, ValueError):
            raise ConfigError(f"{where}: {y!r} is no list of numbers") from None
        if design.shape != (self.size,):
            raise ConfigError(
                f"{where}: a design has {self.size} numbers, one for each of {', '.join(self.link_names)}; not {design.shape}"
            )
        top = np.inf if self.upper is None else self.upper
        bad = ~((design >= 0) & (design <= top) & np.isfinite(design))
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise ConfigError(
                f"{where}: {design[i]:g} on link {self.link_names[i]} is not feasible: it is 0 or more"
                + ("" if self.upper is None else f", at most {self.upper:g}")
            )
        return design

    def with_demand(self, factor: float) -> Problem:
        """The same problem with every demand multiplied."""
        return replace(self, network=self.network.scaled(demand=factor))


# Judgement ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """A design at its users' equilibrium: objective F, total travel time, flows and times [A], gap reached."""

    objective: float
    travel_time: float
    x: Array
    times: Array
    gap: float
    assignment: Assignment


def evaluate(
    problem: Problem, y: Any, *, demand: float = 1.0, gap: float = 1e-8, start: Assignment | None = None
) -> Evaluation:
    """The design y [m] at the equilibrium that the reference solver finds; demand: a factor."""
    y = np.asarray(y, dtype=np.float64)
    toll, add = problem.spread(y)
    found = assignment.equilibrium(
        problem.network, toll=toll, capacity_add=add, demand=demand, gap=gap, start=start
    )
    times = assignment.travel_time(problem.network, found.x, add)
    F = problem.value(*(torch.from_numpy(np.asarray(v))[None] for v in (found.x, times, y)))
    return Evaluation(float(F), float(found.x @ times), found.x, times, found.gap, found)


@dataclass(frozen=True)
class Bounds:
    """Without a design: total travel time at the equilibrium and at the system optimum, and the objective."""

    equilibrium: float
    optimum: float
    objective: float

    def normalised(self, travel_time: float) -> float:
        """(TT - TT_SO) / (TT_UE - TT_SO): 0 the system optimum, 1 no design."""
        return (travel_time - self.optimum) / (self.equilibrium - self.optimum)


def bounds(problem: Problem, *, demand: float = 1.0, gap: float = 1e-8) -> Bounds:
    """Both references of a problem."""
    nothing = evaluate(problem, np.zeros(problem.size), demand=demand, gap=gap)
    best = assignment.system_optimum(problem.network, demand=demand, gap=gap)
    return Bounds(
        nothing.travel_time, assignment.total_travel_time(problem.network, best.x), nothing.objective
    )


# Instances ------------------------------------------------------------------------------------------------


# Candidate rows, costs, units and step sizes are those of the authors' code (github.com/jiayangli-nu/Differentiable-Bilevel-Programming).
def _rows(text: str) -> list[int]:
    return [int(row) for row in text.split()]


_SIOUXFALLS_UNITS = {"capacity": 1e-3, "time": 1e-2}
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("braess5", "cndp"): {
        "cost": "free_flow_time",
        "steps": {"r": 0.1, "alpha": 0.005, "beta": 0.0, "xi": 1e-5, "eps": 1e-4, "T": 5, "advance": "one"},
    },
    ("hearn9", "sctp"): {
        "links": [1, 10, 11],
        "steps": {"r": 0.05, "alpha": 0.1, "beta": 20.0, "xi": 1e-4, "eps": 1e-6, "T": 10},
    },
    ("SiouxFalls", "cndp"): {
        "links": [15, 18, 16, 19, 24, 25, 28, 47, 38, 73],
        "cost": [26, 26, 40, 40, 25, 25, 48, 48, 34, 34],
        "eta": 1e-3,
        "units": {"demand": 1.1e-3, **_SIOUXFALLS_UNITS},
        "steps": {
            "r": 5.0,
            "alpha": 2.5,
            "beta": 20.0,
            "xi": 1e-3,
            "eps": 1e-5,
            "T": 10,
            "dolmd": {"alpha": 2.0, "beta": 10.0},
        },
    },
    ("SiouxFalls", "sctp"): {
        "links": [11, 14, 21, 32, 35, 38, 41, 45, 46, 48, 51, 52, 57, 64, 66, 68, 70, 73],
        "units": {"demand": 1e-3, **_SIOUXFALLS_UNITS},
        "steps": {"r": 10.0, "alpha": 0.01, "beta": 10.0, "xi": 1e-4, "eps": 1e-6, "T": 40},
    },
    ("Barcelona", "cndp"): {
        "links": _rows(
            "1416 2143 1120 2484 2298 415 1418 2269 410 616 2006 2118 1897 1456 540 1514 2165 2281 "
            "2033 537 2208 1106 1459 1917 1661 2517 2433 630 2508 1548 2287 1457 2276 2151 1460 2274 "
            "463 2009 1316 1635 2109 1448 1331 704 677 2482 1888 1652 1531 471"
        ),
        "cost": "length",
        "units": {"demand": 2e-3, "capacity": 1e-3, "time": 1 / 60},
        "steps": {"r": 2.0, "alpha": 0.1, "beta": 10.0, "xi": 1e-3, "eps": 1e-5, "T": 10},
    },
    ("ChicagoSketch", "cndp"): {
        "links": _rows(
            "964 2949 1214 2126 944 594 2170 433 519 954 2138 2778 462 946 528 1798 961 1314 "
            "2380 925 2925 760 530 1086 1734 2927 2173 447 575 750 1688 424 2193 522 804 806 "
            "448 2192 587 445 443 736 1227 1402 1031 2119 955 1311 2109 2180"
        ),
        "cost": "length",
        "units": {"demand": 2e-3, "capacity": 1e-3, "time": 1 / 60},
        "steps": {"r": 2.0, "alpha": 0.05, "beta": 10.0, "xi": 1e-3, "eps": 1e-4, "T": 10},
    },
}


def siouxfalls_folder() -> str:
    """The folder that MOBULA_SIOUXFALLS names.  Raises DataError where it is not set."""
    folder = os.environ.get(SIOUXFALLS, "")
    if not folder:
        raise DataError(
            f"network 'siouxfalls': set {SIOUXFALLS} to the folder with SiouxFalls_net.tntp, SiouxFalls_trips.tntp and"
            " SiouxFalls_node.tntp, or give that folder as the network; the public repository TransportationNetworks has them,"
            " for academic use"
        )
    return folder


def make_problem(
    network: str | Network,
    objective: str | None = None,
    *,
    links: Sequence[Any] | None = None,
    cost: Sequence[float] | str | None = None,
    eta: float | None = None,
    upper: float | None = None,
    demand_scale: float | None = None,
    capacity_scale: float | None = None,
    time_scale: float | None = None,
    candidates: int = 10,
) -> Problem:
    """The problem of that name; what is given takes the place of the instance's own.

    network  pigou, braess, braess5, hearn9, gridN[-sSEED][-zZONES], siouxfalls (see SIOUXFALLS), a folder of TNTP files, or a Network
    links    candidates by name ("1-6") or row; default: the instance's, else the `candidates` links of the largest x^2 t' at the
             equilibrium (where the flow costs the others most)
    cost     investment costs d, or "length" or "free_flow_time"
    """
    if isinstance(network, str):
        network = by_name(siouxfalls_folder() if network.lower() == "siouxfalls" else network)
    kinds = [o for name, o in PRESETS if name == network.name]
    objective = objective or (
        kinds[0] if kinds else "sctp" if network.name in ("pigou", "braess") else "cndp"
    )
    if objective not in OBJECTIVES:
        raise ConfigError(
            f"objective {objective!r} is not known: {', '.join(OBJECTIVES)}.{nearest(objective, OBJECTIVES)}"
        )
    found = PRESETS.get((network.name, objective)) or PRESETS.get((network.name, "sctp"), {})
    if OBJECTIVES[objective].kind == "capacity" and (network.name, objective) not in PRESETS:
        found = {}
    units = dict(found.get("units", {}))
    given = {"demand": demand_scale, "capacity": capacity_scale, "time": time_scale}
    network = network.scaled(**{**units, **{k: v for k, v in given.items() if v is not None}})
    chosen: Any = links if links is not None else found.get("links")
    if chosen is not None:
        rows = network.links(chosen, "links")
    elif found or network.num_links <= candidates:
        rows = np.arange(network.num_links)
    else:
        x = assignment.equilibrium(network, gap=1e-4).x
        hurt = x * x * assignment.travel_time_slope(network, x)
        rows = np.sort(np.argsort(-hurt, kind="stable")[:candidates])
    if OBJECTIVES[objective].kind == "toll":
        costs = np.zeros(len(rows))
    else:
        wanted = cost if cost is not None else found.get("cost", "free_flow_time")
        if links is not None and cost is None and not isinstance(wanted, str):
            wanted = "free_flow_time"
        if isinstance(wanted, str):
            if wanted not in ("length", "free_flow_time"):
                raise ConfigError(
                    f"cost is {wanted!r}: it is length, free_flow_time, or a number for each link"
                )
            costs = getattr(network, wanted)[rows]
        else:
            costs = np.asarray(wanted, dtype=np.float64)
    return Problem(
        network=network,
        objective=objective,
        links=rows,
        cost=costs,
        eta=float(eta if eta is not None else found.get("eta", 1.0)),
        upper=upper,
        steps=found.get("steps", {}),
    )
