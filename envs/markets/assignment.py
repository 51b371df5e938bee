"""Traffic assignment: user equilibria, system optima, stochastic equilibria.  NumPy float64, exact to the gap that is asked for.

`equilibrium` is the reference: column generation with path-based gradient projection (Jayakrishnan et al. 1994), Gauss-Seidel over
OD pairs.  Convergence is measured by the relative gap 1 - sum_w q_w pi_w / sum_a x_a u_a alone, pi_w the cost of a shortest path of the
whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

from mobula.envs.markets.networks import Array, Index, Network
from mobula.errors import DataError, TrainingFault

Path = tuple[int, ...]
"""Rows of the links of a path, in order of travel."""

LinkCost = Callable[[Array, Any], tuple[Array, Array]]
"""(flows of some links, their rows) -> (cost, its derivative)."""

TINY = 1e-12
"""Stands for links without a cost, which a sparse graph would lose."""


# Costs ----------------------------------------------------------------------------------------------------


def travel_time(network: Network, x: Array, capacity_add: Array | float = 0.0) -> Array:
    """t_a(x) [A] = t0 (1 + B (x / (c + y))^P)."""
    n = network
    ratio = x / np.maximum(n.capacity + capacity_add, TINY)
    return n.free_flow_time * (1.0 + n.b * ratio**n.power)


def travel_time_slope(network: Network, x: Array, capacity_add: Array | float = 0.0) -> Array:
    """dt_a / dx_a [A]."""
    n = network
    capacity = np.maximum(n.capacity + capacity_add, TINY)
    return n.free_flow_time * n.b * n.power * (x / capacity) ** (n.power - 1.0) / capacity


def beckmann(
    network: Network, x: Array, toll: Array | float = 0.0, capacity_add: Array | float = 0.0
) -> float:
    """Z(x) = sum_a of the integral of t_a + toll_a from 0 to x_a: a user equilibrium minimises it."""
    n = network
    ratio = x / np.maximum(n.capacity + capacity_add, TINY)
    return float(
        (n.free_flow_time * x * (1.0 + n.b / (n.power + 1.0) * ratio**n.power)).sum() + (toll * x).sum()
    )


def user_cost(
    network: Network, toll: Array | float = 0.0, capacity_add: Array | float = 0.0, *, marginal: bool = False
) -> LinkCost:
    """t + toll, or with `marginal` the marginal social cost t + x t' (whose equilibrium is the system optimum)."""
    n, A = network, network.num_links
    t0, power = n.free_flow_time, n.power
    capacity = np.broadcast_to(np.maximum(n.capacity + capacity_add, TINY), (A,))
    tolls = np.broadcast_to(np.asarray(toll, dtype=np.float64), (A,))
    slope = t0 * n.b / capacity
    # t + x t' = t0 (1 + (P + 1) B (x / c)^P).
    factor = power + 1.0 if marginal else np.ones(A)
    quartic = bool((power == 4.0).all())

    def cost(x: Array, rows: Any) -> tuple[Array, Array]:
        ratio = x / capacity[rows]
        if quartic:
            cube = ratio * ratio * ratio
        else:
            cube = ratio ** (power[rows] - 1.0)
        rise = slope[rows] * factor[rows] * cube
        return t0[rows] + tolls[rows] + rise * x, power[rows] * rise

    return cost


# Shortest paths -------------------------------------------------------------------------------------------


class ShortestPaths:
    """Shortest paths of all OD pairs for given link costs; nodes below the first through node are never passed.

    ods: the pairs that are asked for (default: all), so that origins can be shared out.
    """

    def __init__(self, network: Network, ods: Index | None = None) -> None:
        n = self.network = network
        self.ods = np.arange(n.num_ods) if ods is None else np.asarray(ods)
        closed = n.first_thru - 1
        # A closed node is split: its links leave from a copy that none enters.
        self._size = n.nodes + closed
        start = np.where(n.tail < closed, n.tail + n.nodes, n.tail)
        origin = n.origin[self.ods]
        origin = np.where(origin < closed, origin + n.nodes, origin)
        self._origins, self._row = np.unique(origin, return_inverse=True)
        self._from, self._to = origin, n.destination[self.ods]
        key = start * self._size + n.head
        self._keys, self._group = np.unique(key, return_inverse=True)
        self._parallel = len(self._keys) < n.num_links
        # np.unique sorts by tail, then head: the order of a CSR matrix.
        self._indices = (self._keys % self._size).astype(np.int32)
        self._indptr = np.searchsorted(self._keys, np.arange(self._size + 1) * self._size).astype(np.int32)
        self._link = np.zeros(len(self._keys), dtype=np.int64)
        self._link[self._group] = np.arange(n.num_links)

    def __call__(self, cost: Array, *, paths: bool = True) -> tuple[Array, Index]:
        """(pi [W] cost of a shortest path, links [W, L] of one, from its end to its start, -1 beyond; L = 0 without `paths`).

        Raises DataError, naming the OD pair, where there is no path.
        """
        if not np.isfinite(cost).all() or float(cost.min()) < 0:
            raise DataError(
                f"{self.network.name}: a link cost is negative or not finite; shortest paths need costs of 0 or more"
            )
        cost = np.maximum(cost, TINY)
        link = self._link
        if self._parallel:
            order = np.lexsort((cost, self._group))
            link = order[np.searchsorted(self._group[order], np.arange(len(self._keys)))]
        graph: Any = csr_matrix((cost[link], self._indices, self._indptr), shape=(self._size, self._size))
        options: dict[str, Any] = {"indices": self._origins, "return_predecessors": paths}
        found: Any = dijkstra(graph, **options)
        distance = (found[0] if paths else found)[self._row, self._to]
        lost = ~np.isfinite(distance)
        if lost.any():
            w = int(self.ods[np.flatnonzero(lost)[0]])
            raise DataError(
                f"{self.network.name}: OD pair {self.network.od_name(w)} has no path (nodes below {self.network.first_thru}"
                " may not be passed)"
            )
        if not paths:
            return distance, np.empty((len(distance), 0), dtype=np.int64)
        before = found[1]
        at, steps = self._to.copy(), []
        walking = np.arange(len(at))
        while len(walking):
            previous = before[self._row[walking], at[walking]]
            step = np.full(len(at), -1, dtype=np.int64)
            step[walking] = link[np.searchsorted(self._keys, previous * self._size + at[walking])]
            steps.append(step)
            at[walking] = previous
            walking = walking[previous != self._from[walking]]
        return distance, np.stack(steps, axis=1)


def as_paths(links: Index) -> list[Path]:
    """Rows [W, L] of `ShortestPaths` as paths in order of travel."""
    return [tuple(row[row >= 0][::-1].tolist()) for row in links]


def link_flows(network: Network, links: Index, flow: Array) -> Array:
    """x [A] of `flow` [W] all of which goes along `links` [W, L]."""
    used = links >= 0
    amounts = np.broadcast_to(flow[:, None], links.shape)[used]
    flows: Array = np.bincount(links[used], weights=amounts, minlength=network.num_links).astype(np.float64)
    return flows


# Equilibria -----------------------------------------------------------------------------------------------


@dataclass
class Assignment:
    """Flows and what is known of them.

    x [A] link flows; cost [A] what users minimise at x; gap relative gap; paths and flows [k] of each OD pair;
    sweeps: passes over the OD pairs
    """

    x: Array
    cost: Array
    gap: float
    paths: list[list[Path]] = field(default_factory=list)
    flows: list[Array] = field(default_factory=list)
    sweeps: int = 0


def relative_gap(network: Network, x: Array, cost: Array, demand: Array | None = None) -> float:
    """1 - sum_w q_w pi_w / sum_a x_a u_a of feasible link flows x."""
    pi, _ = ShortestPaths(network)(cost, paths=False)
    return _gap(pi, network.demand if demand is None else demand, x, cost)


def _gap(pi: Array, demand: Array, x: Array, cost: Array) -> float:
    total = float(x @ cost)
    return 0.0 if total <= 0 else 1.0 - float(demand @ pi) / total


def equilibrium(
    network: Network,
    *,
    toll: Array | float = 0.0,
    capacity_add: Array | float = 0.0,
    demand: Array | float = 1.0,
    gap: float = 1e-8,
    cost: LinkCost | None = None,
    start: Assignment | None = None,
    max_sweeps: int = 5000,
) -> Assignment:
    """User equilibrium by column generation and gradient projection (the reference solver, "GP").

    demand   a factor on the network's demand, or trips [W]
    cost     other link costs than t + toll (marginal ones give the system optimum)
    start    an assignment to begin from (its shares are kept where the demand differs)
    Raises TrainingFault where the gap is not reached in `max_sweeps` passes.

    From each path of a pair to its cheapest one moves min(f_k, s (c_k - c_min) / sum of t' over the links that differ); link
    flows follow at once.  The step s is 1, and halves where a pass makes no progress (a rise of the gap over 20 passes).
    """
    q = network.demand * demand if np.ndim(demand) == 0 else np.asarray(demand, dtype=np.float64)
    if len(q) != network.num_ods or not (np.isfinite(q) & (q >= 0)).all():
        raise DataError(f"{network.name}: demands must be {network.num_ods} numbers of 0 or more")
    price = user_cost(network, toll, capacity_add) if cost is None else cost
    everything = slice(None)
    router = ShortestPaths(network)
    paths: list[list[Path]]
    flows: list[Array]
    if start is None or not start.paths:
        free, _ = price(np.zeros(network.num_links), everything)
        paths = [[path] for path in as_paths(router(free)[1])]
        flows = [np.array([amount]) for amount in q]
    else:
        paths = [list(known) for known in start.paths]
        flows = [
            f * (amount / f.sum()) if f.sum() > 0 else np.r_[amount, np.zeros(len(f) - 1)]
            for f, amount in zip(start.flows, q, strict=True)
        ]
    blocks: list[_Block | None] = [None] * len(q)
    x = _loaded(network, paths, flows)
    best, since, step, found = np.inf, 0, 1.0, np.inf
    sweeps = 0
    while True:
        u, _ = price(x, everything)
        pi, links = router(u)
        found = _gap(pi, q, x, u)
        if found < gap:
            break
        if sweeps >= max_sweeps or not np.isfinite(found):
            raise TrainingFault(
                f"{network.name}: no equilibrium: relative gap {found:.1e} after {sweeps} passes, {gap:.0e} was asked for"
            )
        if found < 0.99 * best:
            best, since = found, 0
        else:
            since += 1
            if since >= 5:
                step, since = 0.5 * step, 0
        for w, path in enumerate(as_paths(links)):
            if path not in paths[w]:
                paths[w].append(path)
                flows[w] = np.append(flows[w], 0.0)
                blocks[w] = None
        for _ in range(4):
            sweeps += 1
            moved = 0.0
            for w, known in enumerate(paths):
                if len(known) == 1 or q[w] == 0:
                    continue
                block = blocks[w]
                if block is None:
                    block = blocks[w] = _Block(known)
                moved = max(moved, block.move(x, flows[w], price, step))
                if len(known) > 2 and bool((flows[w] == 0).any()):
                    kept = flows[w] > 0
                    if kept.sum() < len(known) - 1:
                        paths[w] = [path for path, keep in zip(known, kept, strict=True) if keep]
                        flows[w] = flows[w][kept]
                        blocks[w] = None
            if moved == 0:
                break
        x = _loaded(network, paths, flows)
    return Assignment(x, u, found, paths, flows, sweeps)


def _loaded(network: Network, paths: list[list[Path]], flows: list[Array]) -> Array:
    """Link flows from path flows, free of what rounding adds up over many moves."""
    each = [path for known in paths for path in known]
    lengths = [len(path) for path in each]
    rows = np.fromiter((a for path in each for a in path), dtype=np.int64, count=sum(lengths))
    weights = np.repeat(np.concatenate(flows), lengths)
    return np.bincount(rows, weights=weights, minlength=network.num_links).astype(np.float64)


class _Block:
    """The links that the paths of one OD pair do not all share, and their incidence [k, L]."""

    def __init__(self, paths: Sequence[Path]) -> None:
        shared = set(paths[0]).intersection(*paths[1:])
        self.rows = np.array(sorted(set().union(*paths) - shared), dtype=np.int64)
        place = {a: i for i, a in enumerate(self.rows.tolist())}
        self.incidence = np.zeros((len(paths), len(self.rows)))
        for k, path in enumerate(paths):
            self.incidence[k, [place[a] for a in path if a in place]] = 1.0

    def move(self, x: Array, flow: Array, price: LinkCost, step: float) -> float:
        """Moves flow towards the cheapest path, in place; returns how much."""
        u, slope = price(x[self.rows], self.rows)
        c = self.incidence @ u
        least = int(c.argmin())
        excess = c - c[least]
        if not (excess * flow).any():
            return 0.0
        apart = np.abs(self.incidence - self.incidence[least]) @ slope
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = np.where(excess > 0, step * excess / apart, 0.0)
        shift = np.minimum(flow, shift)
        total = float(shift.sum())
        flow -= shift
        flow[least] += total
        change = total * self.incidence[least] - shift @ self.incidence
        # Flows that cancel leave dust below zero.
        x[self.rows] = np.maximum(x[self.rows] + change, 0.0)
        return total


def system_optimum(
    network: Network,
    *,
    capacity_add: Array | float = 0.0,
    demand: Array | float = 1.0,
    gap: float = 1e-8,
    start: Assignment | None = None,
) -> Assignment:
    """The flows of least total travel time: the equilibrium of the marginal costs t + x t'."""
    marginal = user_cost(network, 0.0, capacity_add, marginal=True)
    return equilibrium(network, demand=demand, gap=gap, cost=marginal, start=start)


def marginal_cost_tolls(network: Network, x: Array, capacity_add: Array | float = 0.0) -> Array:
    """x t'(x) [A]; at the system optimum's flows these tolls on all links make it an equilibrium."""
    return x * travel_time_slope(network, x, capacity_add)


def total_travel_time(network: Network, x: Array, capacity_add: Array | float = 0.0) -> float:
    """TT = sum_a x_a t_a(x_a)."""
    return float(x @ travel_time(network, x, capacity_add))


def frank_wolfe(
    network: Network,
    *,
    toll: Array | float = 0.0,
    capacity_add: Array | float = 0.0,
    demand: Array | float = 1.0,
    gap: float = 1e-3,
    iterations: int = 1000,
) -> Assignment:
    """Frank-Wolfe with an exact line search: link flows only, for rough starts (it slows down near 1e-4)."""
    q = network.demand * demand if np.ndim(demand) == 0 else np.asarray(demand, dtype=np.float64)
    price, router, everything = user_cost(network, toll, capacity_add), ShortestPaths(network), slice(None)
    x = link_flows(network, router(price(np.zeros(network.num_links), everything)[0])[1], q)
    found = np.inf
    for done in range(iterations + 1):
        u, _ = price(x, everything)
        pi, links = router(u)
        found = _gap(pi, q, x, u)
        if found < gap or done == iterations:
            break
        direction = link_flows(network, links, q) - x

        def slope(s: float, x: Array = x, d: Array = direction) -> float:
            return float(d @ price(x + s * d, everything)[0])

        x = x + (1.0 if slope(1.0) <= 0 else float(brentq(slope, 0.0, 1.0))) * direction  # type: ignore[arg-type]
    return Assignment(x, u, found, sweeps=done)


# Stochastic equilibria ------------------------------------------------------------------------------------


def _incidence(network: Network, paths: list[list[Path]]) -> tuple[Any, NDArray[np.int64]]:
    each = [path for known in paths for path in known]
    od = np.repeat(np.arange(len(paths)), [len(known) for known in paths])
    lengths = [len(path) for path in each]
    rows = np.fromiter((a for path in each for a in path), dtype=np.int64, count=sum(lengths))
    columns = np.repeat(np.arange(len(each)), lengths)
    matrix = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(network.num_links, len(each)))
    return matrix, od


def stochastic_equilibrium(
    network: Network,
    paths: list[list[Path]],
    theta: float,
    *,
    toll: Array | float = 0.0,
    capacity_add: Array | float = 0.0,
    demand: Array | float = 1.0,
    tolerance: float = 1e-8,
    iterations: int = 5000,
) -> tuple[Array, Array]:
    """Logit user equilibrium on given path sets (Fisk 1980): shares of a pair proportional to exp(-theta c_k).

    Returns (x [A], f [K]).  It minimises Z(f) + (1 / theta) sum_k f_k log f_k, by exact line search from f towards its logit response.
    `tolerance`: largest difference of a share from its response.
    """
    if not theta > 0:
        raise DataError(f"stochastic_equilibrium: theta is {theta:g}; it must be above 0")
    q = network.demand * demand if np.ndim(demand) == 0 else np.asarray(demand, dtype=np.float64)
    delta, od = _incidence(network, paths)
    price, everything = user_cost(network, toll, capacity_add), slice(None)

    def costs(p: Array) -> Array:
        return delta.T @ price(delta @ (q[od] * p), everything)[0]

    p = _logit(costs(np.zeros(len(od))), od, theta)
    for _ in range(iterations):
        wanted = _logit(costs(p), od, theta)
        way = wanted - p
        if float(np.abs(way).max()) < tolerance:
            return delta @ (q[od] * p), q[od] * p

        # The way sums to zero over a pair only up to rounding: marginal costs are taken from the pair's most used path.
        most = np.lexsort((-p, od))[np.r_[True, np.diff(np.sort(od)) > 0]]

        def slope(s: float, p: Array = p, way: Array = way, most: Index = most) -> float:
            at = p + s * way
            g = costs(at) + np.log(np.maximum(at, 1e-300)) / theta
            return float((q[od] * way) @ (g - g[most][od]))

        if slope(1.0) <= 0:
            p = wanted
        elif slope(0.0) < 0:
            p = p + float(brentq(slope, 0.0, 1.0, xtol=1e-14)) * way  # type: ignore[arg-type]
        else:
            # Rounding hides the way down: this is as close as it gets.
            return delta @ (q[od] * p), q[od] * p
    raise TrainingFault(
        f"{network.name}: no stochastic equilibrium in {iterations} steps at theta={theta:g}: a smaller theta is easier"
    )


def _logit(c: Array, od: Index, theta: float) -> Array:
    least = np.full(int(od.max()) + 1, np.inf)
    np.minimum.at(least, od, c)
    weight = np.exp(-theta * (c - least[od]))
    return weight / np.bincount(od, weights=weight)[od]


def dial(network: Network, cost: Array, theta: float, *, demand: Array | float = 1.0) -> Array:
    """Link flows x [A] of Dial's STOCH (1971): logit over all efficient paths at fixed link costs, none of them listed.

    A link is efficient if it leads away from the origin: r(i) < r(j), r the shortest cost from there.  Weights go forward in order
    of r, flows backward; all OD pairs of an origin share a pass.
    """
    q = network.demand * demand if np.ndim(demand) == 0 else np.asarray(demand, dtype=np.float64)
    closed = network.first_thru - 1
    x = np.zeros(network.num_links)
    start = np.where(network.tail < closed, network.tail + network.nodes, network.tail)
    size = network.nodes + closed
    best: dict[tuple[int, int], float] = {}
    for i, j, c in zip(start.tolist(), network.head.tolist(), np.maximum(cost, TINY).tolist(), strict=True):
        best[i, j] = min(c, best.get((i, j), np.inf))
    ends = np.array(list(best), dtype=np.int64)
    graph: Any = csr_matrix((list(best.values()), (ends[:, 0], ends[:, 1])), shape=(size, size))
    for origin in np.unique(network.origin):
        source: Any = int(origin + network.nodes) if origin < closed else int(origin)
        r: Any = dijkstra(graph, indices=source)
        gain = r[network.head] - r[start]
        efficient = np.isfinite(gain) & (gain > 0)
        likelihood = np.zeros(network.num_links)
        likelihood[efficient] = np.exp(theta * (gain[efficient] - cost[efficient]))
        reached = np.zeros(size)
        reached[source] = 1.0
        weight = np.zeros(network.num_links)
        links = np.flatnonzero(efficient)
        for a in links[np.argsort(r[start[links]], kind="stable")]:
            weight[a] = likelihood[a] * reached[start[a]]
            reached[network.head[a]] += weight[a]
        arriving = np.zeros(size)
        mine = network.origin == origin
        np.add.at(arriving, network.destination[mine], q[mine])
        if (reached[network.destination[mine]] <= 0).any():
            w = int(np.flatnonzero(mine)[np.argmin(reached[network.destination[mine]])])
            raise DataError(f"{network.name}: OD pair {network.od_name(w)} has no efficient path")
        for a in links[np.argsort(-r[network.head[links]], kind="stable")]:
            flow = arriving[network.head[a]] * weight[a] / max(reached[network.head[a]], 1e-300)
            x[a] += flow
            arriving[start[a]] += flow
    return x
