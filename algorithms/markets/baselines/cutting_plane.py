"""Cutting planes: the users' equilibrium as a variational inequality, of which only the cuts that matter are kept.

Link flows x are an equilibrium of design y iff u(x, y)' (x - v) <= 0 for all feasible flows v, and, what is the same, for the finitely
many all-or-nothing assignments v: those are the extreme points of the polytope X of feasible flows.  The leader solves

    min F(x, y)   over x in X, y in Y,   subject to   u(x, y)' (x - v_k) <= 0,  k = 1..n,

all users now serving it as far as the n cuts let them.  At the (x, y) that is found, shortest paths under u(x, y) give the v that is
violated most, the next cut; where it is violated by less than a tolerance, x is an equilibrium of y (Marcotte 1983, Transportation Science
17, for network design; Lawphongpanich and Hearn 2004, Mathematical Programming 101, for second-best tolls).

With few cuts the problem has more solutions than the true one: its *global* minimum is never above F*, and rises with every cut.  The
problem is not convex, though, and is solved here by a local method (SLSQP) from several starts: that gives no certificate, neither of
the bound nor of the design.  Paths are enumerated, so that X is the true polytope: small networks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx  # type: ignore[import-untyped]
import numpy as np
from scipy.optimize import minimize

from mobula.algorithms.markets.baselines.heuristics import mct
from mobula.algorithms.markets.baselines.sab import cost_slopes, value_and_slopes
from mobula.envs.markets import assignment
from mobula.envs.markets.assignment import Path, ShortestPaths, as_paths
from mobula.envs.markets.design import Problem, evaluate
from mobula.envs.markets.networks import Array, Network
from mobula.errors import ConfigError, DataError

MOST_PATHS = 500
"""Paths up to which a network is small."""


def simple_paths(network: Network, most: int = MOST_PATHS) -> list[list[Path]]:
    """All paths without a cycle of every OD pair.  Raises ConfigError where there are more than `most` in all."""
    closed = network.first_thru - 1
    graph: Any = networkx.MultiDiGraph()
    for a, (i, j) in enumerate(zip(network.tail.tolist(), network.head.tolist(), strict=True)):
        # A closed node is split, as for shortest paths: its links leave from a copy that none enters.
        graph.add_edge(i + network.nodes if i < closed else i, j, key=a)
    found: list[list[Path]] = []
    left = most
    for w in range(network.num_ods):
        o, d = int(network.origin[w]), int(network.destination[w])
        o = o + network.nodes if o < closed else o
        paths: list[Path] = []
        if o in graph and d in graph:
            for edges in networkx.all_simple_edge_paths(graph, o, d):
                paths.append(tuple(a for _, _, a in edges))
                if len(paths) > left:
                    raise ConfigError(
                        f"{network.name} has more than {most} paths: cutting planes need all of them, and are for small networks"
                    )
        if not paths:
            raise DataError(f"{network.name}: OD pair {network.od_name(w)} has no path")
        left -= len(paths)
        found.append(paths)
    return found


@dataclass
class Cuts:
    """The restricted problem: n cuts over path flows f [K] >= 0 with Lambda f = q, and designs y [m].

    paths    every path of every OD pair, all K of them
    corners  [n, A] link flows of the all-or-nothing assignments
    scale    cost of all trips without a design: cuts are in shares of it
    """

    problem: Problem
    paths: list[list[Path]]
    corners: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        network, flat = self.problem.network, [path for known in self.paths for path in known]
        self.delta = np.zeros((network.num_links, len(flat)))
        for k, path in enumerate(flat):
            self.delta[list(path), k] = 1.0
        od = np.repeat(np.arange(network.num_ods), [len(known) for known in self.paths])
        self.supply = (od == np.arange(network.num_ods)[:, None]).astype(np.float64)
        nothing = assignment.equilibrium(network, gap=1e-6)
        self.scale = float(nothing.x @ nothing.cost)
        self._router = ShortestPaths(network)

    @property
    def size(self) -> int:
        """K."""
        return self.delta.shape[1]

    def costs(self, x: Array, y: Array) -> Array:
        """u(x, y) [A]."""
        toll, add = self.problem.spread(y)
        return assignment.travel_time(self.problem.network, np.maximum(x, 0.0), add) + toll

    def excess(self, x: Array, y: Array) -> Array:
        """u(x, y)' (x - v_k) of every cut over the scale, [n]; 0 or less where it holds."""
        return (x - np.array(self.corners)) @ self.costs(x, y) / self.scale

    def slopes(self, x: Array, y: Array) -> Array:
        """Derivatives [n, A + m] of `excess` in x and y."""
        apart = x - np.array(self.corners)
        by_flow, by_design = cost_slopes(self.problem, np.maximum(x, 0.0), y)
        in_x = apart * by_flow + self.costs(x, y)
        return np.hstack([in_x, apart[:, self.problem.links] * by_design]) / self.scale

    def separate(self, x: Array, y: Array) -> tuple[Array, float]:
        """(v [A], relative gap): the all-or-nothing assignment at u(x, y), the cut that (x, y) violates most, and by how much."""
        u, q = self.costs(x, y), self.problem.network.demand
        pi, links = self._router(u)
        total = float(x @ u)
        gap = 1.0 - float(q @ pi) / total if total > 0 else 0.0
        corner = np.zeros(len(x))
        for amount, path in zip(q, as_paths(links), strict=True):
            corner[list(path)] += amount
        return corner, gap

    def add(self, corner: Array) -> bool:
        """Adds a cut; False if it is there already."""
        if any(np.array_equal(corner, known) for known in self.corners):
            return False
        self.corners.append(corner)
        return True

    def equilibrium(self, y: Array) -> tuple[Array, float]:
        """(f [K], F) at the users' equilibrium of y: it meets every cut there is."""
        found = evaluate(self.problem, y)
        f = np.zeros(self.size)
        place = {
            (w, path): k
            for k, (w, path) in enumerate((w, p) for w, known in enumerate(self.paths) for p in known)
        }
        for w, (known, flows) in enumerate(zip(found.assignment.paths, found.assignment.flows, strict=True)):
            for path, amount in zip(known, flows.tolist(), strict=True):
                f[place[w, path]] = amount
        return f, found.objective

    def solve(
        self, f: Array, y: Array, tolerance: float, iterations: int = 300
    ) -> tuple[Array, Array, float]:
        """(f, y, F) of a local minimum of the restricted problem by SLSQP, from a feasible (f, y), where it stays if nothing is better.

        Cuts hold to `tolerance`: without it they leave no interior, and a local method no way to move.
        """
        problem, K = self.problem, self.size
        q, unit = problem.network.demand, self.scale

        def value(z: Array) -> tuple[float, Array]:
            F, F_x, F_y = value_and_slopes(problem, np.maximum(self.delta @ z[:K], 0.0), z[K:])
            return F / unit, np.r_[F_x @ self.delta, F_y] / unit

        constraints: list[Any] = [
            {
                "type": "eq",
                "fun": lambda z: (self.supply @ z[:K] - q) / q,
                "jac": lambda z: np.hstack([self.supply / q[:, None], np.zeros((len(q), problem.size))]),
            }
        ]
        if self.corners:

            def derivative(z: Array) -> Array:
                both = self.slopes(self.delta @ z[:K], z[K:])
                A = problem.network.num_links
                return -np.hstack([both[:, :A] @ self.delta, both[:, A:]])

            constraints.append(
                {
                    "type": "ineq",
                    "fun": lambda z: tolerance - self.excess(self.delta @ z[:K], z[K:]),
                    "jac": derivative,
                }
            )
        found: Any = minimize(
            value,
            np.r_[f, y],
            jac=True,
            method="SLSQP",
            bounds=[(0.0, None)] * K + [(0.0, problem.upper)] * problem.size,
            constraints=constraints,
            options={"maxiter": iterations, "ftol": 1e-10},
        )
        new = np.maximum(found.x[:K], 0.0), np.clip(found.x[K:], 0.0, problem.upper)
        x = self.delta @ new[0]
        short = float(np.abs(self.supply @ new[0] / q - 1.0).max())
        over = float(self.excess(x, new[1]).max()) if self.corners else 0.0
        start = value(np.r_[f, y])[0] * unit
        after = value_and_slopes(problem, x, new[1])[0]
        if short > tolerance or over > 2 * tolerance or not after < start:
            return f, y, start
        return *new, after


@dataclass(frozen=True)
class Found:
    """What the search ends with.

    y          [m] the best of all designs met, each judged at its users' equilibrium; objective: F there
    values     F of each restricted problem as it was solved: lower bounds of F* if those solutions are global, which nobody has shown
    gaps       relative gap of each solution: how far it is from an equilibrium
    cuts       how many there were in the end; converged: whether the last gap was below the tolerance
    """

    y: Array
    objective: float
    values: list[float]
    gaps: list[float]
    cuts: int
    converged: bool


def cutting_plane(
    problem: Problem,
    starts: Sequence[Any] = (),
    *,
    tolerance: float = 1e-6,
    random: int = 4,
    seed: int = 0,
    rounds: int = 60,
) -> Found:
    """Cutting planes from designs `starts` (default: none, and marginal-cost tolls for tolls) and `random` more, drawn once.

    Every restricted problem is solved from the equilibria of the starts, and from that of its last solution, which all meet every cut;
    the smallest value counts.  tolerance: relative gap at which flows are an equilibrium.
    """
    cuts = Cuts(problem, simple_paths(problem.network))
    rules = [np.zeros(problem.size)]
    if problem.kind == "toll":
        rules.append(mct(problem))
        top = float(rules[1].max())
    else:
        top = float(problem.network.capacity[problem.links].max())
    top = top if problem.upper is None else problem.upper
    designs = [np.asarray(y, dtype=np.float64) for y in starts] or rules
    rng = np.random.default_rng(seed)
    designs += [rng.uniform(0.0, top, problem.size) for _ in range(random)]
    begin = [(*cuts.equilibrium(y), y) for y in designs]
    best, y = min(((F, y) for _, F, y in begin), key=lambda pair: pair[0])
    values: list[float] = []
    gaps: list[float] = []
    for _ in range(rounds):
        tried = [cuts.solve(f, start, 0.5 * tolerance) for f, _, start in begin]
        f, now, value = min(tried, key=lambda one: one[2])
        corner, gap = cuts.separate(cuts.delta @ f, now)
        values.append(value)
        gaps.append(gap)
        at, judged = cuts.equilibrium(now)
        if judged < best:
            best, y = judged, now
        if gap < tolerance or not cuts.add(corner):
            break
        begin = [*begin[: len(designs)], (at, judged, now)]
    return Found(y, best, values, gaps, len(cuts.corners), gaps[-1] < tolerance)
