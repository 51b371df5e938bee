"""All that a search remembers, and how it moves on: designs, users, paths (algorithms DolMD and SilMD, arXiv 2209.07618)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from mobula.algorithms.markets.stackelberg_congestion.math import (
    ENTRY,
    FLOOR,
    anticipate,
    generates,
    leader_step,
    shortest,
    step_size,
)
from mobula.envs.markets.assignment import Assignment, Path, ShortestPaths, as_paths, equilibrium
from mobula.envs.markets.design import Problem
from mobula.envs.markets.dynamics import (
    Followers,
    Paths,
    Roads,
    auto_rate,
    grown,
    safe_rate,
)
from mobula.envs.markets.networks import Network
from mobula.errors import DataError, TrainingFault
from mobula.metrics import gather, spread


@dataclass(frozen=True)
class Settings:
    """What steers a search (see the config for the meaning)."""

    algorithm: str = "silmd"
    T: int = 10
    advance: str = "T"
    r: Any = "auto"
    alpha: float | None = None
    beta: float = 10.0
    eps: float = 1e-5
    xi: float = 1e-3
    path_schedule: str = "release"
    k_shortest: int = 5
    mirror: str = "euclidean"
    gap_freq: int = 10
    truncate: bool = False


class Search:
    """The state of a search: I designs under S demand scenarios, the users of each, the paths that are known.

    `ask()` says what to differentiate, `tell(gradient, ...)` moves leader and users on.  Whoever holds it decides where the
    gradient is computed: in this process, or on several learners.
    """

    def __init__(
        self, problem: Problem, settings: Settings, demand: Tensor, starts: Tensor, *, workers: int = 0
    ) -> None:
        """demand [S, I, W]; starts [I, m] feasible designs."""
        self.problem, self.settings, self.demand = problem, settings, demand
        self.S, self.I = demand.shape[:2]
        self.y = starts.clone()
        if settings.mirror == "entropic":
            self.y = self.y.clamp_min(FLOOR)
        self.n, self.ild_steps = 0, 0
        self.accuracy = 10.0 if settings.algorithm == "dolmd" else 1.0
        self.done = torch.zeros(self.I, dtype=torch.bool)
        self.change = torch.full((self.I,), torch.inf, dtype=torch.float64)
        self.gap = torch.full((self.S, self.I), torch.inf, dtype=torch.float64)
        self.worse = torch.zeros(self.S, self.I, dtype=torch.int64)
        self.alpha = torch.full(
            (self.I,), torch.nan if settings.alpha is None else settings.alpha, dtype=torch.float64
        )
        self._pool = _Pool(problem.network, workers)
        self._begin()

    def _begin(self) -> None:
        """Paths and shares of a rough equilibrium (gap 1e-3) under each starting design."""
        s, network = self.settings, self.problem.network
        toll, add = self.problem.spread(self.y.numpy())
        jobs = [
            (network, toll[i], add[i], self.demand[j, i].numpy())
            for j in range(self.S)
            for i in range(self.I)
        ]
        found: list[Assignment] = spread(_rough, jobs, self._pool.workers, "starts")
        self.paths = Paths(network)
        if s.path_schedule == "static_k_shortest":
            for w, known in enumerate(k_shortest_paths(network, s.k_shortest)):
                for path in known:
                    self.paths.add(w, path)
        else:
            for one in found:
                for w, known in enumerate(one.paths):
                    for path in known:
                        self.paths.add(w, path)
        place = {entry: k for k, entry in enumerate(self.paths.listed())}
        shares = torch.zeros(len(found), len(place), dtype=torch.float64)
        for b, one in enumerate(found):
            for w, (known, flow) in enumerate(zip(one.paths, one.flows, strict=True)):
                for path, f in zip(known, flow.tolist(), strict=True):
                    if (w, path) in place:
                        shares[b, place[w, path]] = f
        od = self.paths.flat().od
        q = self.demand.flatten(0, 1)[:, od].clamp_min(1e-300)
        shares = torch.maximum(shares / q, (ENTRY / q).clamp_max(0.01))
        self.logits = shares.log().unflatten(0, (self.S, self.I))
        self.r = self._rates()

    def followers(self) -> Followers:
        """The users at the present designs, [S * I, ...]."""
        toll, add = self.problem.spread(self.y.expand(self.S, *self.y.shape).flatten(0, 1))
        return Followers(
            Roads.of(self.problem.network), self.paths.flat(), self.demand.flatten(0, 1), toll, add
        )

    def _rates(self) -> Tensor:
        r = self.settings.r
        if r in ("auto", "safe"):
            rule = auto_rate if r == "auto" else safe_rate
            return rule(self.followers(), self.logits.flatten(0, 1)).unflatten(0, (self.S, self.I))
        return torch.full((self.S, self.I), float(r), dtype=torch.float64)

    @property
    def converged(self) -> bool:
        """Whether every start has come to rest."""
        return bool(self.done.all())

    def ask(self) -> dict[str, Tensor]:
        """{demand [S, I, W], y [S, I, m], logits [S, I, K], r [S, I]}: cut along the scenarios, it is the work of several."""
        y = self.y.expand(self.S, *self.y.shape).contiguous()
        return {"demand": self.demand, "y": y, "logits": self.logits, "r": self.r}

    def options(self) -> dict[str, Any]:
        """The other arguments of `anticipate`."""
        s = self.settings
        return {
            "algorithm": s.algorithm,
            "T": s.T,
            "eps": s.eps * self.accuracy,
            "every": s.gap_freq,
            "truncate": s.truncate,
        }

    def steps(self, gradient: Tensor) -> Tensor:
        """Step sizes [I] of this iteration (0 where a start is at rest).

        Without an alpha, the first step moves the largest coordinate by a tenth of the candidates' mean capacity (or mean free-flow
        time, for tolls).
        """
        if bool(self.alpha.isnan().any()):
            n = self.problem.network
            column = n.capacity if self.problem.kind == "capacity" else n.free_flow_time
            scale = 0.1 * float(column[self.problem.links].mean())
            self.alpha = scale / gradient.abs().amax(1).clamp_min(1e-12)
        return step_size(self.alpha, self.settings.beta, self.n) * ~self.done

    def tell(self, y: Tensor, found: Mapping[str, Tensor]) -> None:
        """Takes the next designs y [I, m] and what `anticipate` found, [S, I, ...]; moves users, adds paths, looks whether to stop."""
        logits, one, before, after, steps = (found[k] for k in ("logits", "one", "before", "after", "steps"))
        s = self.settings
        self.ild_steps += int(steps.sum())
        self.change = torch.where(self.done, self.change, (y - self.y).abs().amax(1))
        self.y = y
        if s.algorithm == "silmd":
            self._watch(found["rose"], after)
            if s.advance == "one":
                self.logits = one
            else:
                self.logits = torch.where((before > s.eps)[..., None], logits, self.logits)
        else:
            self.logits = logits
        quiet = self.change < s.xi
        full = self.accuracy == 1.0
        if s.path_schedule != "static_k_shortest" and (
            generates(self.n, s.path_schedule, self.problem.kind, s.algorithm)
            or bool((quiet & ~self.done).any() and full)
        ):
            self.gap = self.add_paths()
        elif s.path_schedule == "static_k_shortest":
            self.gap = after
        if full:
            allowed = s.eps if s.algorithm == "silmd" else 10 * s.eps
            self.done |= quiet & (self.gap.amax(0) < allowed)
        elif float(self.change.max()) < 2 * s.xi:
            self.accuracy = 1.0
        elif float(self.change.max()) < 10 * s.xi:
            self.accuracy = min(self.accuracy, 5.0)
        self.n += 1

    def _watch(self, rose: Tensor, after: Tensor) -> None:
        """Raises TrainingFault where looking ahead leads away from the equilibrium five times in a row."""
        self.worse = torch.where(rose & ~(after < 0.01 * self.settings.eps), self.worse + 1, 0)
        if bool((self.worse >= 5).any()) or not bool(after.isfinite().all()):
            j, i = (((self.worse >= 5) | ~after.isfinite()).nonzero()[0]).tolist()
            advice = auto_rate(self.followers(), torch.zeros_like(self.logits.flatten(0, 1)))
            raise TrainingFault(
                f"{self.problem.network.name}: the relative gap grows along the dynamic five times in a row, to"
                f" {float(after[j, i]):.2e}: reduce r (it is {float(self.r[j, i]):.3g}; r=auto gives"
                f" {float(advice.unflatten(0, (self.S, self.I))[j, i]):.3g})"
            )

    def add_paths(self) -> Tensor:
        """Adds the shortest paths under the present costs; returns the true relative gap [S, I]."""
        users = self.followers()
        flat, logits = self.paths.flat(), self.logits.flatten(0, 1)
        with torch.no_grad():
            x = users.flows(logits)
            u = users.costs(x)
        pi, found = self._pool(u.numpy())
        for known in found:
            for w, path in enumerate(known):
                self.paths.add(w, path)
        if len(self.paths) > flat.size:
            self.logits = grown(self.paths, logits, flat, ENTRY, users.demand).unflatten(0, (self.S, self.I))
            if self.settings.r == "safe":
                self.r = self._rates()
        gap = 1.0 - (users.demand * torch.from_numpy(pi)).sum(1) / (x * u).sum(1)
        return gap.unflatten(0, (self.S, self.I))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        names = ("y", "n", "ild_steps", "accuracy", "done", "change", "gap", "worse", "alpha", "logits", "r")
        return {**{name: getattr(self, name) for name in names}, "paths": self.paths.listed()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave."""
        for name, value in state.items():
            if name != "paths":
                setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
        self.paths = Paths(self.problem.network)
        for w, path in state["paths"]:
            self.paths.add(w, tuple(path))


def _rough(network: Network, toll: Any, capacity_add: Any, demand: Any) -> Assignment:
    return equilibrium(network, toll=toll, capacity_add=capacity_add, demand=demand, gap=1e-3)


class _Pool:
    """Shortest paths of all OD pairs, in this process or with the origins shared out over Ray tasks."""

    def __init__(self, network: Network, workers: int) -> None:
        self.network, self.workers = network, workers
        origins = np.unique(network.origin)
        self.shares = [
            np.flatnonzero(np.isin(network.origin, part))
            for part in np.array_split(origins, max(min(workers, len(origins)), 1))
        ]
        self._router = ShortestPaths(network) if workers == 0 else None
        self._stored: Any = None

    def __call__(self, costs: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], list[list[Path]]]:
        if self._router is not None:
            each = [self._router(row) for row in costs]
            return np.stack([pi for pi, _ in each]), [as_paths(links) for _, links in each]
        if self._stored is None:
            self._stored = ray.put(self.network)
        task = ray.remote(num_cpus=1)(shortest)
        parts = gather((task.remote(self._stored, share, costs) for share in self.shares), "workers")
        pi = np.empty((len(costs), self.network.num_ods))
        paths: list[list[Path]] = [[() for _ in range(self.network.num_ods)] for _ in costs]
        for share, (values, found) in zip(self.shares, parts, strict=True):
            pi[:, share] = values
            for b, known in enumerate(found):
                for w, path in zip(share.tolist(), known, strict=True):
                    paths[b][w] = path
        return pi, paths


def k_shortest_paths(network: Network, k: int) -> list[list[Path]]:
    """The k shortest loopless paths of every OD pair at free flow (Yen 1971): a path set that does not grow."""
    from itertools import islice, pairwise

    import networkx  # type: ignore[import-untyped]

    closed = network.first_thru - 1
    graph: Any = networkx.DiGraph()
    for a in np.argsort(-network.free_flow_time, kind="stable").tolist():
        i, j = int(network.tail[a]), int(network.head[a])
        # Sorted by falling time: of links between the same nodes the fastest stays.
        graph.add_edge(
            i + network.nodes if i < closed else i, j, time=float(network.free_flow_time[a]), row=a
        )
    found = []
    for w in range(network.num_ods):
        o, d = int(network.origin[w]), int(network.destination[w])
        o = o + network.nodes if o < closed else o
        try:
            nodes = list(islice(networkx.shortest_simple_paths(graph, o, d, weight="time"), k))
        except (networkx.NetworkXNoPath, networkx.NodeNotFound):
            raise DataError(f"{network.name}: OD pair {network.od_name(w)} has no path") from None
        found.append([tuple(graph[i][j]["row"] for i, j in pairwise(p)) for p in nodes])
    return found


FOUND = ("F", "logits", "one", "before", "after", "steps", "rose")
"""What a learner hands back of an `Anticipation`, beside the gradient."""


def iterate(search: Search) -> tuple[Tensor, Tensor]:
    """One iteration of the leader in this process; returns (F [S, I], mean gradient [I, m])."""
    work, s = search.ask(), search.settings
    flat = {name: value.flatten(0, 1) for name, value in work.items()}
    found = anticipate(
        search.problem,
        search.paths.flat(),
        flat["demand"],
        flat["y"],
        flat["logits"],
        flat["r"][:, None],
        **search.options(),
    )
    shape = (search.S, search.I)
    gradient = found.gradient.unflatten(0, shape).mean(0)
    y = leader_step(search.problem, search.y, gradient, search.steps(gradient), s.mirror)
    search.tell(y, {name: getattr(found, name).unflatten(0, shape) for name in FOUND})
    return found.F.unflatten(0, shape), gradient
