"""The imitative logit dynamic (ILD) of route shares, in torch float64, differentiable and batched (Li et al., arXiv 2209.07618).

p_k^{t+1} is proportional to p_k^t exp(-r c_k(p^t, y)) within each OD pair: entropic mirror descent with step r on Beckmann's potential in
path flows.  Its state is the logits l (shares p = softmax of l within a pair), so the step is l <- l - r c: a constant within a pair
changes nothing, and a share that is far below 1e-300 is still there.

Every function takes a leading axis B (designs, starting points, demand scenarios); the path set is shared by all of B.

The OD pairs may be cut into parts that lie in several processes (`cut`, `Part`): paths and shares then stay where they are, link flows
are summed over the parts in every step, and the gradient of link costs in every step back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.envs.markets.assignment import Path
from mobula.envs.markets.networks import Network
from mobula.errors import ConfigError, DataError, TrainingFault

DENSE = 500_000
"""Entries of an incidence matrix up to which a dense product is the faster one."""


class _SparseProduct(torch.autograd.Function):
    """M @ x for a sparse M [m, n] given with its transpose, x [B, n] -> [B, m]; the gradient is M^T @ g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.matrices = matrix, transposed
        return (matrix @ x.mT.contiguous()).mT.contiguous()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        _, transposed = ctx.matrices
        return (transposed @ g.mT.contiguous()).mT.contiguous(), None, None


@dataclass(frozen=True)
class PathSet:
    """K paths of W OD pairs, in the order in which they were found.

    od [K] the pair of each path; link_rows, path_rows [nnz] the entries of the incidence Delta [A, K]
    """

    links: int
    pairs: int
    od: Tensor
    link_rows: Tensor
    path_rows: Tensor
    delta: Tensor
    transposed: Tensor

    @classmethod
    def of(cls, links: int, pairs: int, od: Tensor, link_rows: Tensor, path_rows: Tensor) -> PathSet:
        """The set with these entries of the incidence: dense where it is small, else sparse."""
        K = len(od)
        values = torch.ones(len(link_rows), dtype=torch.float64)
        # Rows and columns come from the network's own tables: nothing to check again.
        delta = torch.sparse_coo_tensor(
            torch.stack([link_rows, path_rows]), values, (links, K), check_invariants=False
        )
        if links * K <= DENSE:
            dense = delta.to_dense()
            return cls(links, pairs, od, link_rows, path_rows, dense, dense.mT.contiguous())
        flipped = torch.sparse_coo_tensor(
            torch.stack([path_rows, link_rows]), values, (K, links), check_invariants=False
        )
        with warnings.catch_warnings():
            # torch calls its CSR layout a beta.
            warnings.simplefilter("ignore")
            return cls(links, pairs, od, link_rows, path_rows, delta.to_sparse_csr(), flipped.to_sparse_csr())

    def to(self, device: Any) -> PathSet:
        """The same set on another device."""
        tensors = (self.od, self.link_rows, self.path_rows, self.delta, self.transposed)
        return PathSet(self.links, self.pairs, *(v.to(device) for v in tensors))

    @property
    def size(self) -> int:
        """K."""
        return len(self.od)

    def link_flows(self, f: Tensor) -> Tensor:
        """x = Delta f: [B, K] -> [B, A]."""
        if self.delta.layout == torch.strided:
            return f @ self.transposed
        return _SparseProduct.apply(f, self.delta, self.transposed)  # type: ignore[no-any-return]

    def path_costs(self, u: Tensor) -> Tensor:
        """c = Delta^T u: [B, A] -> [B, K]."""
        if self.delta.layout == torch.strided:
            return u @ self.delta
        return _SparseProduct.apply(u, self.transposed, self.delta)  # type: ignore[no-any-return]

    def shares(self, logits: Tensor) -> Tensor:
        """Softmax within each OD pair, [B, K]: segment maximum and sum."""
        index = self.od.expand_as(logits)
        top = logits.new_empty(len(logits), self.pairs)
        top = top.scatter_reduce(1, index, logits.detach(), "amax", include_self=False)
        weight = (logits - top[:, self.od]).exp()
        total = weight.new_zeros(len(weight), self.pairs).index_add(1, self.od, weight)
        return weight / total[:, self.od]

    def least(self, c: Tensor) -> Tensor:
        """Cost of the cheapest path of each OD pair, [B, K] -> [B, W]."""
        index = self.od.expand_as(c)
        return c.new_empty(len(c), self.pairs).scatter_reduce(1, index, c, "amin", include_self=False)


class Paths:
    """A growing set of paths; `flat()` is its tensors."""

    def __init__(self, network: Network, paths: Sequence[Sequence[Path]] = ()) -> None:
        self.network = network
        self._od: list[int] = []
        self._links: list[Path] = []
        self._known: set[tuple[int, Path]] = set()
        self._flat: PathSet | None = None
        for w, known in enumerate(paths):
            for path in known:
                self.add(w, path)

    def __len__(self) -> int:
        return len(self._od)

    def add(self, w: int, path: Path) -> bool:
        """Adds a path of OD pair w at the end; False if it is there already."""
        if (w, path) in self._known:
            return False
        self._known.add((w, path))
        self._od.append(w)
        self._links.append(path)
        self._flat = None
        return True

    def listed(self) -> list[tuple[int, Path]]:
        """(pair, links) of every path, in order."""
        return list(zip(self._od, self._links, strict=True))

    def flat(self) -> PathSet:
        """The tensors of the present set.  Raises DataError where an OD pair has no path."""
        if self._flat is None:
            A, W, K = self.network.num_links, self.network.num_ods, len(self)
            od = torch.tensor(self._od, dtype=torch.int64)
            empty = torch.bincount(od, minlength=W) == 0
            if bool(empty.any()):
                raise DataError(
                    f"{self.network.name}: OD pair {self.network.od_name(int(empty.nonzero()[0]))} has no path"
                )
            lengths = torch.tensor([len(path) for path in self._links])
            rows = torch.from_numpy(
                np.concatenate([np.asarray(path) for path in self._links]).astype(np.int64)
            )
            columns = torch.arange(K).repeat_interleave(lengths)
            self._flat = PathSet.of(A, W, od, rows, columns)
        return self._flat


# OD pairs in several processes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The paths of the OD pairs first, first + 1, ..: as a set of its own, and their columns [K'] in the whole set."""

    first: int
    columns: Tensor
    paths: PathSet


def cut(paths: PathSet, count: int) -> list[Share]:
    """`paths` in `count` shares of neighbouring OD pairs with about as many entries of the incidence each.

    Raises ConfigError where there are fewer OD pairs than shares.
    """
    if count > paths.pairs:
        raise ConfigError(f"{paths.pairs} OD pairs cannot be cut into {count} shares")
    if count == 1:
        return [Share(0, torch.arange(paths.size), paths)]
    entries = torch.bincount(paths.od[paths.path_rows], minlength=paths.pairs).cumsum(0)
    ends = [0]
    for i in range(1, count):
        near = int(torch.searchsorted(entries, entries[-1] * i / count)) + 1
        # At least one pair in this share and in each of those that follow.
        ends.append(min(max(near, ends[-1] + 1), paths.pairs - count + i))
    shares = []
    for first, end in pairwise([*ends, paths.pairs]):
        columns = ((paths.od >= first) & (paths.od < end)).nonzero()[:, 0]
        place = torch.full((paths.size,), -1)
        place[columns] = torch.arange(len(columns))
        at = place[paths.path_rows]
        inside = at >= 0
        own = PathSet.of(
            paths.links, end - first, paths.od[columns] - first, paths.link_rows[inside], at[inside]
        )
        shares.append(Share(first, columns, own))
    return shares


@dataclass(frozen=True)
class Part:
    """Where a process that holds some of the OD pairs stands.

    first: its first OD pair; pairs: how many there are in all; count: processes
    total(v) sums v over them; its result must be the same to the last bit in each of them
    """

    first: int
    pairs: int
    count: int
    total: Callable[[Tensor], Tensor]


class _Summed(torch.autograd.Function):
    """The sum over all parts.  What follows is computed from it alike in every part, so the gradient comes back as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part) -> Tensor:
        return part.total(x.clone())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g, None


class _Handed(torch.autograd.Function):
    """A tensor that every part holds alike, handed to what each does of its own: the gradient is the sum over all parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part) -> Tensor:
        ctx.part = part
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.part.total(g.clone()), None


# Followers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roads:
    """The cost curves of a network as tensors [A]."""

    free_flow_time: Tensor
    capacity: Tensor
    b: Tensor
    power: Tensor
    quartic: bool = False

    @classmethod
    def of(cls, network: Network, device: Any = None) -> Roads:
        """The curves of `network`."""
        names = ("free_flow_time", "capacity", "b", "power")
        t0, capacity, b, power = (
            torch.from_numpy(np.array(getattr(network, name), dtype=np.float64)).to(device) for name in names
        )
        return cls(t0, capacity, b, power, bool((network.power == 4.0).all()))

    def times(self, x: Tensor, capacity_add: Tensor | float = 0.0) -> Tensor:
        """t_a(x_a) [..., A]."""
        ratio = x / (self.capacity + capacity_add).clamp_min(1e-12)
        if self.quartic:
            # Products, and their derivatives, are many times faster than powers.
            squared = ratio * ratio
            raised = squared * squared
        else:
            raised = ratio**self.power
        return self.free_flow_time * (1.0 + self.b * raised)

    def slopes(self, x: Tensor, capacity_add: Tensor | float = 0.0) -> Tensor:
        """t_a'(x_a) [..., A]."""
        capacity = (self.capacity + capacity_add).clamp_min(1e-12)
        ratio = x / capacity
        raised = ratio * ratio * ratio if self.quartic else ratio ** (self.power - 1)
        return self.free_flow_time * self.b * self.power * raised / capacity


@dataclass(frozen=True)
class Followers:
    """A population on a path set under a design: what one step of the dynamic needs.

    demand [B, W]; toll, capacity_add [B, A] (of a design; gradients go through both)
    part: None where all OD pairs are here; else W and K are those of this part, and all that is said of links, gaps and potentials
    is of the whole
    """

    roads: Roads
    paths: PathSet
    demand: Tensor
    toll: Tensor
    capacity_add: Tensor
    part: Part | None = None

    def path_flows(self, logits: Tensor) -> Tensor:
        """f [B, K]."""
        return self.demand[:, self.paths.od] * self.paths.shares(logits)

    def flows(self, logits: Tensor) -> Tensor:
        """x [B, A]."""
        x = self.paths.link_flows(self.path_flows(logits))
        return x if self.part is None else _Summed.apply(x, self.part)  # type: ignore[no-any-return]

    def costs(self, x: Tensor) -> Tensor:
        """u [B, A] = t + toll."""
        return self.roads.times(x, self.capacity_add) + self.toll

    def step(self, logits: Tensor, r: Tensor) -> Tensor:
        """One step of the dynamic, [B, K]; r [B, 1] (0 leaves an element as it is)."""
        u = self.costs(self.flows(logits))
        u = u if self.part is None else _Handed.apply(u, self.part)
        return logits - r * self.paths.path_costs(u)

    def gap(self, logits: Tensor) -> Tensor:
        """Relative gap [B] over the paths of the set (a lower bound of that over all paths of the network)."""
        x = self.flows(logits)
        u = self.costs(x)
        least = (self.demand * self.paths.least(self.paths.path_costs(u))).sum(1)
        return self._agreed(1.0 - self.total(least) / (x * u).sum(1))

    def potential(self, logits: Tensor) -> Tensor:
        """Beckmann's Z [B], tolls included."""
        return self._agreed(beckmann(self.roads, self.flows(logits), self.toll, self.capacity_add))

    def total(self, value: Tensor) -> Tensor:
        """The sum over all parts, without a gradient of its own; may be written in place."""
        return value if self.part is None else self.part.total(value)

    def _agreed(self, value: Tensor) -> Tensor:
        """What all parts computed, to the last bit the same: on unlike processors they would else decide differently."""
        return value if self.part is None else self.total(value) / self.part.count

    def every_pair(self, value: Tensor) -> Tensor:
        """A value of each OD pair, [B, W]: those of all parts."""
        if self.part is None:
            return value
        whole = value.new_zeros(len(value), self.part.pairs)
        whole[:, self.part.first : self.part.first + value.shape[1]] = value
        return self.part.total(whole)

    def detached(self) -> Followers:
        """The same, out of reach of gradients."""
        demand, toll, add = (v.detach() for v in (self.demand, self.toll, self.capacity_add))
        return Followers(self.roads, self.paths, demand, toll, add, self.part)


def centred(paths: PathSet, logits: Tensor) -> Tensor:
    """Logits with the largest of each pair at 0: the same shares, no drift over many steps."""
    index = paths.od.expand_as(logits)
    top = logits.new_empty(len(logits), paths.pairs).scatter_reduce(
        1, index, logits, "amax", include_self=False
    )
    return logits - top[:, paths.od]


class _Unroll(torch.autograd.Function):
    """Steps of the dynamic with reverse mode written out: shares and link flows of each step are kept, nothing else.

    With g the derivative of what follows in the logits after a step, costs c = Delta^T u and flows f = q p:
        du = -r Delta g,   dtoll += du,   dadd -= du t' x / (c + y),   dp = q Delta^T (t' du),
        dl = g + p (dp - <p, dp> of the pair).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, toll: Tensor, add: Tensor, followers: Followers, r: Tensor, steps: int
    ) -> Tensor:
        paths = followers.paths
        q = followers.demand[:, paths.od]
        kept = []
        for _ in range(steps):
            p = paths.shares(logits)
            x = followers.total(paths.link_flows(q * p))
            kept.append((p, x))
            logits = logits - r * paths.path_costs(followers.roads.times(x, add) + toll)
        ctx.kept, ctx.followers, ctx.r, ctx.add, ctx.q = kept, followers, r, add, q
        return logits

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        followers, r, q = ctx.followers, ctx.r, ctx.q
        paths, roads = followers.paths, followers.roads
        capacity = (roads.capacity + ctx.add).clamp_min(1e-12)
        toll = torch.zeros_like(ctx.add)
        add = torch.zeros_like(ctx.add)
        for p, x in reversed(ctx.kept):
            du = followers.total(-paths.link_flows(r * g))
            steep = du * roads.slopes(x, ctx.add)
            toll += du
            add -= steep * x
            dp = p * q * paths.path_costs(steep)
            total = dp.new_zeros(len(dp), paths.pairs).index_add(1, paths.od, dp)
            g = g + dp - p * total[:, paths.od]
        return g, toll, add / capacity, None, None, None


def unroll(followers: Followers, logits: Tensor, r: Tensor, steps: int) -> Tensor:
    """`steps` steps of the dynamic, differentiable in the logits and the design."""
    if steps == 0:
        return logits
    return _Unroll.apply(logits, followers.toll, followers.capacity_add, followers.detached(), r, steps)  # type: ignore[no-any-return]


def beckmann(
    roads: Roads, x: Tensor, toll: Tensor | float = 0.0, capacity_add: Tensor | float = 0.0
) -> Tensor:
    """Z(x) [...] of x [..., A]."""
    ratio = x / (roads.capacity + capacity_add)
    parts = roads.free_flow_time * x * (1.0 + roads.b / (roads.power + 1.0) * ratio**roads.power) + toll * x
    return parts.sum(-1)


def safe_rate(followers: Followers, logits: Tensor) -> Tensor:
    """1 / max_k sum_{a in k} x_a t_a'(x_a), [B]: with rates below it over all flows visited, Z never rises."""
    x = followers.flows(logits)
    weight = x * followers.roads.slopes(x, followers.capacity_add)
    worst = -followers.paths.least(-followers.paths.path_costs(weight))
    return 1.0 / followers.every_pair(worst).amax(1).clamp_min(1e-12)


def auto_rate(followers: Followers, logits: Tensor) -> Tensor:
    """0.5 over the 95 % quantile over OD pairs of q_w max_k sum_{a in k} t_a', [B]."""
    x = followers.flows(logits)
    steep = followers.paths.path_costs(followers.roads.slopes(x, followers.capacity_add))
    worst = -followers.paths.least(-steep)
    scale = followers.every_pair(followers.demand * worst)
    return 0.5 / scale.quantile(0.95, dim=1).clamp_min(1e-12)


def settle(
    followers: Followers,
    logits: Tensor,
    r: Tensor,
    *,
    gap: float,
    every: int = 10,
    limit: int = 20_000,
    keep: bool = False,
    where: str = "the dynamic",
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Runs the dynamic without gradient until the gap of every element is below `gap`; an element that is there stands still.

    Returns (logits [B, K], steps of each element [B], and, with `keep`, what `adjoint` needs: the logits before every `every`
    steps, and the rates that were used).  Raises TrainingFault where a gap grows five tests in a row and Beckmann's potential with it
    (on a good way the gap may rise for a while, the potential never does), or `limit` is reached.
    """
    still = followers.detached()
    trail: list[tuple[Tensor, Tensor]] = []
    steps = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    with torch.no_grad():
        before, height = still.gap(logits), still.potential(logits)
        worse = torch.zeros_like(steps)
        active = before >= gap
        while bool(active.any()):
            rate = r * active[:, None]
            if keep:
                trail.append((logits, rate))
            logits = centred(followers.paths, unroll(still, logits, rate, every))
            steps += every * active
            now, level = still.gap(logits), still.potential(logits)
            # Below 1e-12 rounding decides.
            rising = (now > before) & (now > 1e-12) & (level > height + 1e-12 * height.abs())
            worse = torch.where(rising, worse + 1, 0)
            bad = active & ((worse >= 5) | ~now.isfinite())
            if bool(bad.any()) or int(steps.max()) >= limit:
                i = int(bad.nonzero()[0]) if bool(bad.any()) else int(now.argmax())
                advice = float(auto_rate(still, torch.zeros_like(logits))[i])
                raise TrainingFault(
                    f"{where}: "
                    + (
                        f"the relative gap grows five times in a row, to {float(now[i]):.2e}: reduce r"
                        f" (it is {float(r.expand(len(logits), 1)[i]):.3g};"
                        if bool(bad.any())
                        else f"relative gap {float(now[i]):.2e} after {limit} steps, {gap:.0e} was asked for: change r"
                        f" (it is {float(r.expand(len(logits), 1)[i]):.3g};"
                    )
                    + f" r=auto gives {advice:.3g})"
                )
            before, height, active = now, level, now >= gap
    return logits, steps, trail


def adjoint(
    followers: Followers,
    trail: Sequence[tuple[Tensor, Tensor]],
    every: int,
    gradient: Tensor,
    inputs: Sequence[Tensor],
) -> list[Tensor]:
    """Reverse mode through a recorded run: d/d`inputs` of <gradient, final logits>, `inputs` the leaves that the design comes from.

    Each stretch of `every` steps is run again with its graph, then left: memory of one stretch, twice the forward work
    (activation checkpointing, for runs whose length nobody knows beforehand).
    """
    total = [torch.zeros_like(leaf) for leaf in inputs]
    for logits, rate in reversed(trail):
        start = logits.detach().requires_grad_()
        with torch.enable_grad():
            end = unroll(followers, start, rate, every)
        gradient, *more = torch.autograd.grad(
            end, [start, *inputs], gradient, retain_graph=True, allow_unused=True
        )
        total = [t if g is None else t + g for t, g in zip(total, more, strict=True)]
    return total


def grown(paths: Paths, logits: Tensor, before: PathSet, flow: float, demand: Tensor) -> Tensor:
    """Logits [B, K'] of the grown set: what is new enters with `flow` trips (at most 1 % of its pair), the rest as it was."""
    after = paths.flat()
    new = after.size - before.size
    if new == 0:
        return logits
    logits = centred(before, logits)
    total = logits.new_zeros(len(logits), before.pairs).index_add(1, before.od, logits.exp())
    share = (flow / demand).clamp_max(0.01)
    fresh = (share * total).log()[:, after.od[before.size :]]
    return torch.cat([logits, fresh], dim=1)
