"""Assignment and the users' dynamic: published equilibria, optimality conditions, gradients against differences."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobula.envs.markets import assignment, dynamics, networks
from mobula.envs.markets.assignment import (
    ShortestPaths,
    as_paths,
    beckmann,
    equilibrium,
    marginal_cost_tolls,
    system_optimum,
    total_travel_time,
)
from mobula.envs.markets.design import make_problem
from mobula.envs.markets.dynamics import (
    Followers,
    Part,
    Paths,
    PathSet,
    Roads,
    Share,
    adjoint,
    cut,
    settle,
    unroll,
)
from mobula.errors import ConfigError, DataError, TrainingFault

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "siouxfalls"
FOLDER = Path(os.environ.get("MOBULA_SIOUXFALLS", SHARED))


@pytest.fixture(scope="module")
def siouxfalls() -> networks.Network:
    if not (FOLDER / "SiouxFalls_net.tntp").is_file():
        pytest.skip(f"no SiouxFalls_net.tntp in {FOLDER}: set MOBULA_SIOUXFALLS to its folder")
    return networks.load_tntp(FOLDER)


# The reference values --------------------------------------------------------------------------------------


def test_pigou() -> None:
    n = networks.pigou()
    ue, so = equilibrium(n, gap=1e-12), system_optimum(n, gap=1e-12)
    np.testing.assert_allclose(ue.x, [1, 0], atol=1e-6)
    assert total_travel_time(n, ue.x) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(so.x, [0.5, 0.5], atol=1e-6)
    assert total_travel_time(n, so.x) == pytest.approx(0.75, rel=1e-5)
    np.testing.assert_allclose(marginal_cost_tolls(n, so.x), [0.5, 0], atol=1e-6)


def test_braess() -> None:
    n = networks.braess()
    ue = equilibrium(n, gap=1e-12)
    assert total_travel_time(n, ue.x) == pytest.approx(552, rel=1e-5)
    assert ShortestPaths(n)(ue.cost, paths=False)[0][0] == pytest.approx(92, rel=1e-5)
    without = networks.braess(bridge=False)
    ue = equilibrium(without, gap=1e-12)
    assert total_travel_time(without, ue.x) == pytest.approx(498, rel=1e-5)
    assert ShortestPaths(without)(ue.cost, paths=False)[0][0] == pytest.approx(83, rel=1e-5)


def test_braess5() -> None:
    n = networks.braess5()
    ue, so = equilibrium(n, gap=1e-12), system_optimum(n, gap=1e-12)
    flows = dict(zip(ue.paths[0], ue.flows[0].tolist(), strict=True))
    assert flows == pytest.approx({(0, 2): 2.46395, (0, 3, 4): 1.07210, (1, 4): 2.46395}, rel=1e-5)
    assert total_travel_time(n, ue.x) == pytest.approx(33.182950, rel=1e-5)
    assert total_travel_time(n, so.x) == pytest.approx(29.410547, rel=1e-5)
    flows = dict(zip(so.paths[0], so.flows[0].tolist(), strict=True))
    assert flows.get((0, 3, 4), 0.0) == pytest.approx(0, abs=1e-5)
    assert flows[0, 2] == pytest.approx(3, rel=1e-5)


def test_hearn9() -> None:
    n = networks.hearn9()
    ue, so = equilibrium(n, gap=1e-12), system_optimum(n, gap=1e-12)
    assert total_travel_time(n, ue.x) == pytest.approx(2455.869888, rel=1e-5)
    assert total_travel_time(n, so.x) == pytest.approx(2253.917938, rel=1e-5)
    tolled = equilibrium(n, toll=marginal_cost_tolls(n, so.x), gap=1e-12)
    np.testing.assert_allclose(tolled.x, so.x, atol=1e-4)


def test_sioux_falls(siouxfalls: networks.Network) -> None:
    ue = equilibrium(siouxfalls, gap=1e-9)
    assert ue.gap < 1e-9
    assert beckmann(siouxfalls, ue.x) == pytest.approx(4_231_335.287107, rel=1e-10)
    assert total_travel_time(siouxfalls, ue.x) == pytest.approx(7_480_225.35, rel=1e-7)
    so = system_optimum(siouxfalls, gap=1e-7)
    assert total_travel_time(siouxfalls, so.x) == pytest.approx(7_194_256.05, rel=1e-6)
    published = np.loadtxt(FOLDER / "SiouxFalls_flow.tntp", skiprows=1)
    np.testing.assert_allclose(ue.x, published[:, 2], rtol=1e-3)


def test_sioux_falls_in_other_units(siouxfalls: networks.Network) -> None:
    design = make_problem(siouxfalls, "cndp").network
    assert design.demand.sum() == pytest.approx(396.66)
    assert total_travel_time(design, equilibrium(design).x) == pytest.approx(99.94127, rel=1e-5)
    tolls = make_problem(siouxfalls, "sctp").network
    assert total_travel_time(tolls, equilibrium(tolls).x) == pytest.approx(74.802252, rel=1e-5)


# Properties -------------------------------------------------------------------------------------------------


def test_an_equilibrium_minimises_beckmanns_potential() -> None:
    n = networks.grid_network(4, seed=3)
    toll = np.linspace(0, 1, n.num_links)
    ue = equilibrium(n, toll=toll, gap=1e-10)
    assert ue.x @ ue.cost > 0 and ue.gap < 1e-10
    assert assignment.relative_gap(n, ue.x, ue.cost) == pytest.approx(ue.gap, abs=1e-12)
    others = [assignment.frank_wolfe(n, toll=toll, gap=g).x for g in (1e-1, 1e-2, 1e-3)]
    values = [beckmann(n, x, toll) for x in others]
    assert values == sorted(values, reverse=True)
    assert beckmann(n, ue.x, toll) < values[-1]
    # Demand is served, and no flow is lost at a node.
    inflow = np.bincount(n.head, ue.x, n.nodes) - np.bincount(n.tail, ue.x, n.nodes)
    served = np.bincount(n.destination, n.demand, n.nodes) - np.bincount(n.origin, n.demand, n.nodes)
    np.testing.assert_allclose(inflow, served, atol=1e-9)


def test_a_warm_start_gives_the_same_flows() -> None:
    n = networks.hearn9()
    first = equilibrium(n, gap=1e-10)
    tolled = equilibrium(n, toll=0.5 * np.arange(18), gap=1e-10, start=first, demand=1.1)
    cold = equilibrium(n, toll=0.5 * np.arange(18), gap=1e-10, demand=1.1)
    np.testing.assert_allclose(tolled.x, cold.x, atol=1e-4)
    assert sum(float(f.sum()) for f in tolled.flows) == pytest.approx(110)


def test_closed_nodes_are_not_passed() -> None:
    """The short way from 1 to 3 leads over node 2, which may only start or end trips."""
    links = [(1, 2), (2, 3), (1, 4), (4, 3)]
    demand = {(1, 3): 1.0, (1, 2): 1.0, (2, 3): 1.0}
    kwargs = {"free_flow_time": [1.0, 1.0, 5.0, 5.0], "capacity": 10.0, "demand": demand}
    free = networks.network("open", 4, links, **kwargs)
    closed = networks.network("closed", 4, links, first_thru=4, **kwargs)
    cost = free.free_flow_time
    assert as_paths(ShortestPaths(free)(cost)[1])[0] == (0, 1)
    pi, found = ShortestPaths(closed)(cost)
    assert as_paths(found) == [(2, 3), (0,), (1,)]
    assert pi.tolist() == [10, 1, 1]


def test_no_path_is_named() -> None:
    n = networks.network(
        "cut", 3, [(1, 2)], free_flow_time=1.0, capacity=1.0, demand={(1, 2): 1.0, (2, 3): 1.0}
    )
    with pytest.raises(DataError, match="OD pair 2-3 has no path"):
        equilibrium(n)
    with pytest.raises(DataError, match="negative or not finite"):
        equilibrium(networks.pigou(), toll=-2.0)
    with pytest.raises(DataError, match="demands must be 1 numbers"):
        equilibrium(networks.pigou(), demand=np.ones(3))
    with pytest.raises(TrainingFault, match="no equilibrium: relative gap"):
        equilibrium(networks.hearn9(), gap=1e-12, max_sweeps=4)


def test_shares_of_origins_give_the_same_paths() -> None:
    n = networks.grid_network(4, seed=0)
    whole, paths = ShortestPaths(n)(n.free_flow_time)
    half = np.flatnonzero(n.origin % 2 == 0)
    part, some = ShortestPaths(n, half)(n.free_flow_time)
    np.testing.assert_array_equal(part, whole[half])
    assert as_paths(some) == [as_paths(paths)[w] for w in half]


# Stochastic equilibria --------------------------------------------------------------------------------------


def test_logit_equilibrium_is_a_fixed_point_and_approaches_wardrops() -> None:
    n = networks.hearn9()
    ue = equilibrium(n, gap=1e-12)
    delta, od = assignment._incidence(n, ue.paths)
    distances = []
    for theta in (0.1, 1.0, 10.0, 30.0):
        x, f = assignment.stochastic_equilibrium(n, ue.paths, theta)
        c = delta.T @ assignment.travel_time(n, x)
        weight = np.exp(-theta * (c - c.min()))
        share = weight / np.bincount(od, weight)[od]
        # Close to the minimum rounding hides the way down, the earlier the larger theta.
        np.testing.assert_allclose(f, n.demand[od] * share, atol=1e-6, rtol=1e-6)
        distances.append(float(np.abs(x - ue.x).max()))
    # Costs of used paths differ by log-shares over theta: the distance falls like 1 / theta.
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < distances[1] / 8 and distances[3] < distances[2] / 2.5


def test_dial_is_logit_over_efficient_paths() -> None:
    """On braess5 all three paths are efficient: STOCH must agree with the logit over the listed paths."""
    n = networks.braess5()
    cost, theta = np.array([1.0, 3.0, 3.2, 0.5, 1.0]), 0.7
    paths = [(0, 2), (0, 3, 4), (1, 4)]
    c = np.array([cost[list(path)].sum() for path in paths])
    f = 6 * np.exp(-theta * c) / np.exp(-theta * c).sum()
    wanted = np.zeros(5)
    for path, amount in zip(paths, f, strict=True):
        wanted[list(path)] += amount
    np.testing.assert_allclose(assignment.dial(n, cost, theta), wanted, rtol=1e-12)
    steep = assignment.dial(n, cost, 200.0)
    np.testing.assert_allclose(steep, [6, 0, 0, 6, 6], atol=1e-6)


# The dynamic ------------------------------------------------------------------------------------------------


def users(
    name: str = "hearn9", batch: int = 1, dense: bool = True, monkeypatch: pytest.MonkeyPatch | None = None
) -> tuple[networks.Network, Followers]:
    n = networks.by_name(name)
    if not dense:
        assert monkeypatch is not None
        monkeypatch.setattr(dynamics, "DENSE", 0)
    found = [equilibrium(n, toll=t * np.arange(n.num_links) % 3, gap=1e-8).paths for t in (0.0, 0.7, 1.3)]
    paths = Paths(n)
    for known in found:
        for w, each in enumerate(known):
            for path in each:
                paths.add(w, path)
    g = torch.Generator().manual_seed(0)
    toll = torch.rand(batch, n.num_links, dtype=torch.float64, generator=g)
    add = torch.rand(batch, n.num_links, dtype=torch.float64, generator=g)
    demand = torch.from_numpy(n.demand).expand(batch, -1)
    return n, Followers(Roads.of(n), paths.flat(), demand, toll, add)


@pytest.mark.parametrize("dense", [True, False])
def test_reverse_mode_is_that_of_the_single_steps(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written-out backward pass against autograd through `step`, and both against central differences."""
    n, u = users(batch=2, dense=dense, monkeypatch=monkeypatch)
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, u.paths.size, dtype=torch.float64, generator=g).requires_grad_()
    weight = torch.randn(2, n.num_links, dtype=torch.float64, generator=g)
    r = torch.tensor([[0.02], [0.05]], dtype=torch.float64)
    toll, add = u.toll.clone().requires_grad_(), u.capacity_add.clone().requires_grad_()
    free = Followers(u.roads, u.paths, u.demand, toll, add)

    def end(followers: Followers, start: torch.Tensor, fast: bool) -> torch.Tensor:
        if fast:
            return unroll(followers, start, r, 7)
        for _ in range(7):
            start = followers.step(start, r)
        return start

    found = []
    for fast in (True, False):
        value = (free.flows(end(free, logits, fast)) * weight).sum()
        found.append(torch.autograd.grad(value, [logits, toll, add]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for leaf, gradient in zip((logits, toll, add), found[0], strict=True):
        for index in ((0, 1), (1, 3), (1, 5)):
            h, values = 1e-5, []
            for sign in (1, -1):
                with torch.no_grad():
                    parts = [v.clone() for v in (logits, toll, add)]
                    parts[[logits is leaf, toll is leaf, add is leaf].index(True)][index] += sign * h
                    moved = Followers(u.roads, u.paths, u.demand, parts[1], parts[2])
                    values.append(float((moved.flows(end(moved, parts[0], True)) * weight).sum()))
            assert float(gradient[index]) == pytest.approx(
                (values[0] - values[1]) / (2 * h), rel=1e-5, abs=1e-6
            )


def in_parts(paths: PathSet, count: int, job: Any) -> list[Any]:
    """[job(share, part)], one thread each; a sum waits until all threads have brought theirs."""
    shares = cut(paths, count)
    barrier, slots = threading.Barrier(count, timeout=60), [torch.empty(0)] * count

    def run(i: int) -> Any:
        def total(value: torch.Tensor) -> torch.Tensor:
            slots[i] = value
            barrier.wait()
            summed = torch.stack(slots).sum(0)
            barrier.wait()
            return summed

        try:
            return job(shares[i], Part(shares[i].first, paths.pairs, count, total))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def share_of(u: Followers, share: Share, part: Part) -> Followers:
    own = slice(share.first, share.first + share.paths.pairs)
    return Followers(u.roads, share.paths, u.demand[:, own], u.toll, u.capacity_add, part)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_have_every_path_once_and_about_as_much_of_the_incidence(count: int) -> None:
    n, u = users("grid3")
    shares = cut(u.paths, count)
    delta = torch.zeros(n.num_links, u.paths.size, dtype=torch.float64)
    firsts = []
    for share in shares:
        delta[:, share.columns] += share.paths.delta.to_dense()
        torch.testing.assert_close(share.paths.od + share.first, u.paths.od[share.columns])
        assert bool((torch.bincount(share.paths.od, minlength=share.paths.pairs) > 0).all())
        firsts += [share.first, share.first + share.paths.pairs]
    torch.testing.assert_close(delta, u.paths.delta.to_dense())
    assert firsts[0] == 0 and firsts[-1] == n.num_ods and firsts[1:-1:2] == firsts[2::2]
    entries = [len(share.paths.link_rows) for share in shares]
    largest = int(torch.bincount(u.paths.od[u.paths.path_rows]).max())
    assert max(entries) - min(entries) <= 2 * largest


def test_as_many_shares_as_pairs_and_no_more() -> None:
    _, u = users("grid3")
    assert [share.paths.pairs for share in cut(u.paths, u.paths.pairs)] == [1] * u.paths.pairs
    with pytest.raises(ConfigError, match=f"{u.paths.pairs} OD pairs cannot be cut"):
        cut(u.paths, u.paths.pairs + 1)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dense", [True, False])
def test_parts_find_the_flows_and_gradients_of_the_whole(
    count: int, fast: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part: link flows, gap, potential, rates, and the derivative in the design; of the logits its own columns."""
    n, u = users("grid3", batch=2, dense=dense, monkeypatch=monkeypatch)
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, u.paths.size, dtype=torch.float64, generator=g)
    weight = torch.randn(2, n.num_links, dtype=torch.float64, generator=g)
    r = torch.tensor([[0.02], [0.05]], dtype=torch.float64)

    def measured(users: Followers, start: torch.Tensor) -> Any:
        toll, add = (v.clone().requires_grad_() for v in (users.toll, users.capacity_add))
        start = start.clone().requires_grad_()
        free = Followers(users.roads, users.paths, users.demand, toll, add, users.part)
        end = start
        if fast:
            end = unroll(free, start, r, 7)
        else:
            for _ in range(7):
                end = free.step(end, r)
        x = free.flows(end)
        value = (x * weight).sum() + (add * toll).sum()
        found = torch.autograd.grad(value, [toll, add, start])
        with torch.no_grad():
            same = [
                x.detach(),
                users.gap(start),
                users.potential(start),
                dynamics.safe_rate(users, start),
                dynamics.auto_rate(users, start),
                *found[:2],
            ]
        return same, end.detach(), found[2]

    same, end, gradient = measured(u, logits)
    shares = cut(u.paths, count)
    each = in_parts(u.paths, count, lambda s, p: measured(share_of(u, s, p), logits[:, s.columns]))
    for share, (alike, own, slope) in zip(shares, each, strict=True):
        for a, b in zip(alike, same, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(own, end[:, share.columns], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(slope, gradient[:, share.columns], rtol=1e-9, atol=1e-11)


def test_parts_settle_together() -> None:
    _, u = users("grid3", batch=2)
    r = torch.full((2, 1), 0.03, dtype=torch.float64)
    start = torch.zeros(2, u.paths.size, dtype=torch.float64)
    logits, steps, _ = settle(u, start, r, gap=1e-6)
    each = in_parts(u.paths, 3, lambda s, p: settle(share_of(u, s, p), start[:, s.columns], r, gap=1e-6)[:2])
    for share, (own, count) in zip(cut(u.paths, 3), each, strict=True):
        assert torch.equal(count, steps)
        torch.testing.assert_close(own, logits[:, share.columns], rtol=1e-8, atol=1e-8)


def test_parts_give_up_together_and_advise_the_rate_of_the_whole() -> None:
    _, u = users("grid3")
    start, r = torch.zeros(1, u.paths.size, dtype=torch.float64), torch.full((1, 1), 0.1).double()
    with pytest.raises(TrainingFault, match="after 30 steps") as whole:
        settle(u, start, r, gap=1e-6, limit=30)

    def fails(share: Any, part: Part) -> str:
        with pytest.raises(TrainingFault) as fault:
            settle(share_of(u, share, part), start[:, share.columns], r, gap=1e-6, limit=30)
        return str(fault.value)

    assert set(in_parts(u.paths, 3, fails)) == {str(whole.value)}


def test_below_the_safe_rate_the_potential_never_rises() -> None:
    n, u = users(batch=3)
    logits = torch.zeros(3, u.paths.size, dtype=torch.float64)
    r = 0.5 * dynamics.safe_rate(u, logits)[:, None]
    values = []
    for _ in range(200):
        values.append(dynamics.beckmann(u.roads, u.flows(logits), u.toll, u.capacity_add))
        logits = u.step(logits, r)
    steps = torch.stack(values).diff(dim=0)
    assert bool((steps <= 1e-9).all())
    wanted = beckmann(n, u.flows(logits)[0].numpy(), u.toll[0].numpy(), u.capacity_add[0].numpy())
    assert float(dynamics.beckmann(u.roads, u.flows(logits), u.toll, u.capacity_add)[0]) == pytest.approx(
        wanted
    )


def test_the_safe_rate_of_braess() -> None:
    """1 / (2 * 0.6 (3.536 / 2)^4 + 0.3 * 1.072^4) = 0.0825 at the equilibrium without investment: the path over the bridge."""
    n = networks.braess5()
    ue = equilibrium(n, gap=1e-12)
    paths = Paths(n, ue.paths)
    none = torch.zeros(1, 5, dtype=torch.float64)
    u = Followers(Roads.of(n), paths.flat(), torch.from_numpy(n.demand)[None], none, none)
    logits = torch.from_numpy(ue.flows[0]).log()[None]
    assert float(dynamics.safe_rate(u, logits)) == pytest.approx(0.0825, abs=5e-5)
    # At equilibrium nothing moves.
    torch.testing.assert_close(u.paths.shares(u.step(logits, torch.ones(1, 1))), u.paths.shares(logits))


def test_the_automatic_rate() -> None:
    """0.5 over the 95 % quantile over pairs of q_w max_k sum of t': pair by pair, path by path."""
    n, u = users(batch=2)
    logits = torch.zeros(2, u.paths.size, dtype=torch.float64)
    x = u.flows(logits).numpy()
    for b, rate in enumerate(dynamics.auto_rate(u, logits).tolist()):
        slope = assignment.travel_time_slope(n, x[b], u.capacity_add[b].numpy())
        steep = np.zeros(n.num_ods)
        for k, w in enumerate(u.paths.od.tolist()):
            links = u.paths.link_rows[u.paths.path_rows == k].numpy()
            steep[w] = max(steep[w], float(slope[links].sum()))
        assert rate == pytest.approx(0.5 / float(np.quantile(n.demand * steep, 0.95)))


def test_the_dynamic_settles_at_the_reference_equilibrium() -> None:
    n, u = users(batch=2)
    r = torch.full((2, 1), 0.03, dtype=torch.float64)
    logits, steps, trail = settle(
        u, torch.zeros(2, u.paths.size, dtype=torch.float64), r, gap=1e-7, keep=True
    )
    assert bool((u.gap(logits) < 1e-7).all())
    assert len(trail) * 10 == int(steps.max())
    # Who is there stands still while others walk on.
    mixed = torch.stack([logits[0], torch.zeros_like(logits[1])])
    again, steps, _ = settle(u, mixed, r, gap=1e-7)
    assert int(steps[0]) == 0 < int(steps[1])
    torch.testing.assert_close(u.paths.shares(again)[0], u.paths.shares(logits)[0], rtol=1e-12, atol=0)
    for b in range(2):
        wanted = equilibrium(n, toll=u.toll[b].numpy(), capacity_add=u.capacity_add[b].numpy(), gap=1e-9)
        np.testing.assert_allclose(u.flows(logits)[b].numpy(), wanted.x, atol=0.05)


def test_stretches_give_the_gradient_of_the_whole() -> None:
    _, u = users()
    toll = u.toll.clone().requires_grad_()
    free = Followers(u.roads, u.paths, u.demand, toll, u.capacity_add)
    r = torch.full((1, 1), 0.02, dtype=torch.float64)
    start = torch.zeros(1, u.paths.size, dtype=torch.float64)
    _, steps, trail = settle(free, start, r, gap=1e-3, every=5, keep=True)
    weight = torch.arange(u.paths.size, dtype=torch.float64)[None]
    (found,) = adjoint(free, trail, 5, weight, [toll])
    # Logits are kept up to a constant of each pair: compare what does not depend on it.
    centre = (
        weight
        - (torch.zeros(1, 4).double().index_add(1, u.paths.od, weight) / torch.bincount(u.paths.od))[
            :, u.paths.od
        ]
    )
    (found,) = adjoint(free, trail, 5, centre, [toll])
    (wanted,) = torch.autograd.grad((unroll(free, start, r, int(steps[0])) * centre).sum(), toll)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_rate_that_is_too_large_is_named() -> None:
    _, u = users()
    r = torch.full((1, 1), 5.0, dtype=torch.float64)
    with pytest.raises(TrainingFault, match=r"reduce r \(it is 5; r=auto gives|change r \(it is 5"):
        settle(u, torch.zeros(1, u.paths.size, dtype=torch.float64), r, gap=1e-8, limit=500)


def test_new_paths_enter_with_little_flow() -> None:
    n = networks.hearn9()
    paths = Paths(n, as_one(n))
    before = paths.flat()
    logits = torch.zeros(1, before.size, dtype=torch.float64)
    assert paths.add(0, (0, 6, 16, 10))
    assert not paths.add(0, (0, 6, 16, 10))
    demand = torch.from_numpy(n.demand)[None]
    grown = dynamics.grown(paths, logits, before, 1e-6, demand)
    flows = demand[:, paths.flat().od] * paths.flat().shares(grown)
    assert float(flows[0, -1]) == pytest.approx(1e-6, rel=1e-5)
    assert float(flows.sum()) == pytest.approx(100)
    centred = dynamics.centred(paths.flat(), grown + 5.0 * paths.flat().od)
    assert float(dynamics.Paths(n, as_one(n)).flat().least(-centred[:, :4]).abs().max()) == 0
    torch.testing.assert_close(paths.flat().shares(centred), paths.flat().shares(grown))
    # Beside several paths too, and at most a hundredth of a small demand.
    before = paths.flat()
    assert paths.add(0, (1, 8, 10)) and paths.add(1, (1, 8, 11))
    logits = torch.zeros(2, before.size, dtype=torch.float64)
    demand = torch.stack([demand[0], torch.tensor([10.0, 1e-5, 30.0, 40.0]).double()])
    grown = dynamics.grown(paths, logits, before, 1e-6, demand)
    flows = demand[:, paths.flat().od] * paths.flat().shares(grown)
    np.testing.assert_allclose(flows[:, -2], 1e-6, rtol=1e-5)
    np.testing.assert_allclose(flows[:, -1], [1e-6, 1e-5 * 0.01 / 1.01], rtol=1e-5)


def as_one(n: networks.Network) -> list[list[assignment.Path]]:
    return [[path] for path in as_paths(ShortestPaths(n)(n.free_flow_time)[1])]


def test_a_pair_without_a_path_is_named() -> None:
    paths = Paths(networks.hearn9())
    paths.add(0, (0, 5, 10))
    with pytest.raises(DataError, match="OD pair 1-4 has no path"):
        paths.flat()
