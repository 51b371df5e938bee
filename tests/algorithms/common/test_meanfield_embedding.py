"""Mean embeddings of continuous populations: inner products by hand, gradients, recovery, the game on bins, files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from mobula.algorithms.common.meanfield import embedding, estimation, regression
from mobula.algorithms.common.meanfield.embedding import Delta, Gaussian, Ground, Polynomial
from mobula.algorithms.common.meanfield.estimation import Search, Settings, Shape
from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.continuous import (
    ContinuousLogs,
    LinearCrowd,
    bins,
    load_continuous_logs,
    save_continuous_logs,
    simulate_linear,
)
from mobula.envs.meanfield.logs import load_logs, save_logs, simulate
from mobula.errors import ConfigError, DataError

SBM = graphon.named("sbm")
CROWD = LinearCrowd(a=0.3, b=2.0, noise=0.05, track=0.0)


def crowd(
    N: int = 6, L: int = 4, H: int = 2, name: str = "sbm", seed: int = 0, **knobs: Any
) -> ContinuousLogs:
    return simulate_linear(LinearCrowd(**knobs), graphon.named(name), N, L, H, seed=seed)


def square(logs: ContinuousLogs, W: Tensor, k: Any) -> Tensor:
    """<omega, omega'> [n, n] of all rows, pair by pair and neighbour by neighbour, k on numbers (s, a, s^j)."""
    L, H, N, _ = logs.state.shape
    rows = [(e, h, i) for e in range(L) for h in range(H) for i in range(N)]
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for x, (e, h, i) in enumerate(rows):
        for y, (f, g, o) in enumerate(rows):
            one = (logs.state[e, h, i], logs.action[e, h, i])
            two = (logs.state[f, g, o], logs.action[f, g, o])
            total = 0.0
            for j in range(N):
                for m in range(N):
                    if j != i and m != o:
                        value = k(*one, logs.state[e, h, j], *two, logs.state[f, g, m])
                        total += float(W[i, j] * W[o, m]) * value
            out[x, y] = total / (N - 1) ** 2
    return out


def inner(table: embedding.Table, W: Tensor) -> tuple[Tensor, Tensor]:
    """(<omega, omega'> [n, m] of all rows to the inducing points, |omega|^2 [n]) by the module."""
    weights = table.weights(W)
    anchors = embedding.anchors_of(table, weights)
    found, _ = embedding.products(table.ground, table.own, table.state, weights, anchors, table.cross)
    norms, _ = embedding.norms(table.ground, table.own, table.state, weights)
    return found.flatten(0, 1), norms.flatten()


@pytest.mark.parametrize("kept", [True, False])
def test_inner_products_are_double_sums(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gaussian k on all of (s, a, s^j), summed by hand."""
    if not kept:
        monkeypatch.setattr(embedding, "KEPT", 0)
    logs = crowd(N=4, L=2, H=2)
    W = graphon.matrix(graphon.named("exp:3"), graphon.cells(4))
    ground = Ground(Gaussian((0.7, 1.5)), Gaussian((0.4,)))
    table = embedding.tabulate(logs, torch.arange(4), inducing=100, ground=ground)
    assert (table.cross is not None) is kept

    def k(s: Tensor, a: Tensor, j: Tensor, t: Tensor, b: Tensor, m: Tensor) -> float:
        return math.exp(-0.5 * float(((s - t) / 0.7) ** 2 + ((a - b) / 1.5) ** 2 + ((j - m) / 0.4) ** 2))

    wanted = square(logs, W, k)
    found, norms = inner(table, W)
    rows = table.at * 4 + table.who
    torch.testing.assert_close(found, wanted[:, rows])
    torch.testing.assert_close(norms, torch.diagonal(wanted))
    # Distances and the kernel of the second level between the inducing points.
    anchors = embedding.anchors_of(table, table.weights(W))
    torch.testing.assert_close(anchors.square, torch.diagonal(wanted)[rows])
    width = torch.tensor(0.3, dtype=torch.float64)
    apart = torch.diagonal(wanted)[rows, None] + torch.diagonal(wanted)[rows] - 2 * wanted[rows][:, rows]
    K = (-apart / (2 * 0.3**2)).exp() + regression.JITTER * torch.eye(len(rows), dtype=torch.float64)
    torch.testing.assert_close(embedding._among(table, table.weights(W), anchors, width), K)


def test_inner_products_are_those_of_features() -> None:
    """A polynomial k has finitely many features: omega as an explicit vector over monomials of (s, a) times monomials of s^j."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    N, L, H = 5, 3, 2
    logs = ContinuousLogs(
        draw(L, H, N, 2), draw(L, H, N, 1), draw(L, H, N), draw(L, H, N, 2), graphon.cells(N)
    )
    W = graphon.matrix(SBM, graphon.cells(N))
    ground = Ground(Polynomial(1, 0.5), Polynomial(2, 1.0))
    table = embedding.tabulate(logs, torch.arange(N), inducing=12, ground=ground)
    found, norms = inner(table, W)
    own = torch.cat([logs.state, logs.action], -1)
    own = torch.cat([own, torch.full_like(own[..., :1], 0.5**0.5)], -1)
    x, y = logs.state.unbind(-1)
    root = 2**0.5
    monomials = torch.stack([torch.ones_like(x), root * x, root * y, x * x, y * y, root * x * y], -1)
    off = W - torch.diag(torch.diagonal(W))
    seen = off @ monomials / (N - 1)
    omega = (own.unsqueeze(-1) * seen.unsqueeze(-2)).flatten(-2).flatten(0, 2)
    rows = table.at * N + table.who
    torch.testing.assert_close(found, omega @ omega[rows].T)
    torch.testing.assert_close(norms, omega.square().sum(-1))


@pytest.mark.parametrize("merged", [False, True])
def test_with_delta_kernels_it_is_the_finite_closed_form(merged: bool) -> None:
    """Finite states and actions: inner products 1{s = s', a = a'} z . z', and the loss of the finite embedding kernel."""
    finite = simulate(graphon.sis(graphon.matrix(SBM, graphon.cells(4)), 2), SBM, 6, 4)
    logs = ContinuousLogs(
        finite.state.double().unsqueeze(-1),
        finite.action.double().unsqueeze(-1),
        finite.reward,
        torch.nn.functional.one_hot(finite.next_state, 2).double(),
        finite.labels,
    )
    x = graphon.cells(6)
    W = graphon.matrix(SBM, x)
    blocks = torch.bucketize(x, torch.tensor([0.7], dtype=torch.float64), right=True)
    units = blocks if merged else torch.arange(6)
    given = torch.tensor([[0.9, 0.3], [0.3, 0.1]], dtype=torch.float64) if merged else W
    table = embedding.tabulate(logs, units, inducing=10_000, ground=Ground(Delta(), Delta()))
    found, norms = inner(table, given)
    plain = regression.tabulate(finite, units, inducing=10_000, kernel="embedding")
    z = torch.zeros(4, 2, 6, 2, dtype=torch.float64)
    off = W - torch.diag(torch.diagonal(W))
    z = (off @ torch.nn.functional.one_hot(finite.state, 2).double() / 5).flatten(0, 2)
    same = (finite.state.flatten()[:, None] == finite.state.flatten()) & (
        finite.action.flatten()[:, None] == finite.action.flatten()
    )
    rows = table.at * 6 + table.who
    torch.testing.assert_close(found, (same.double() * (z @ z.T))[:, rows])
    torch.testing.assert_close(norms, z.square().sum(-1))
    # The same regression, once both have one width: with all rows inducing points the objective is that of the full kernel.
    value, fit = embedding.solve(table, given, gamma=0.01, sigma=1.0)
    sigma = float(fit.width) / float(
        regression.solve(plain, given, gamma=0.01, sigma=1.0, kernel="embedding")[1].width
    )
    other, _ = regression.solve(plain, given, gamma=0.01, sigma=sigma, kernel="embedding")
    assert float(value) == pytest.approx(float(other), rel=1e-5)


def test_the_objective_is_that_of_kernel_ridge_regression() -> None:
    """With every row an inducing point, against the linear system with an offset; its prediction, its noise, and held-out rows."""
    logs = crowd(N=4, L=3, H=2)
    W = graphon.matrix(SBM, graphon.cells(4))
    table = embedding.tabulate(logs, torch.arange(4), inducing=1000)
    gamma = 1e-3
    value, fit = embedding.solve(table, W, gamma=gamma, sigma=1.0)
    found, norms = inner(table, W)
    order = (table.at * 4 + table.who).argsort()
    gram = found[:, order]
    apart = (norms[:, None] + norms - 2 * gram).clamp_min(0.0)
    K = (-apart / (2 * float(fit.width) ** 2)).exp()
    n = len(K)
    Y = torch.cat([logs.next_state, logs.reward.unsqueeze(-1)], -1).flatten(0, 2)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n] = K + n * gamma * torch.eye(n, dtype=torch.float64)
    system[:n, n] = system[n, :n] = 1.0
    solution = torch.linalg.solve(system, torch.cat([Y, torch.zeros(1, 2, dtype=torch.float64)]))
    c, b = solution[:n], solution[n]
    rest = Y - K @ c - b
    wanted = (rest.square().sum() + n * gamma * (c * (K @ c)).sum()) / n
    assert float(value) == pytest.approx(float(wanted), rel=1e-6)
    assert float(fit.noise) == pytest.approx(float(rest[:, 0].square().mean()), rel=1e-5)
    off = table.weights(W)
    for t, i in ((0, 1), (4, 3)):
        mean, r = fit.predict(table.own[t, i : i + 1], table.state[t], off[i])
        torch.testing.assert_close(torch.cat([mean[0], r]), (K @ c + b)[4 * t + i], rtol=1e-5, atol=1e-6)
    assert float(embedding.loss_on(table, W, fit)) == pytest.approx(
        float(rest.square().sum(1).mean()), rel=1e-5
    )
    errors = embedding.own_errors(table, W, fit, 4)
    torch.testing.assert_close(errors, rest.square().sum(1).view(-1, 4).sum(0), rtol=1e-5, atol=1e-9)
    # A batch of graphons is scored as each alone.
    both, _ = embedding.solve(table, torch.stack([W, W**2]), gamma=gamma, sigma=1.0)
    alone, _ = embedding.solve(table, W**2, gamma=gamma, sigma=1.0)
    torch.testing.assert_close(both, torch.stack([value, alone]))


def test_other_rows_are_judged_by_the_kernel_of_the_fit() -> None:
    """Held-out logs of another spread, whose own widths would differ: their loss is that of the fit's predictions, row by row."""
    logs, other = crowd(N=4, L=4, H=2), crowd(N=4, L=3, H=2, seed=9)
    other = replace(other, state=2.5 * other.state)
    W, units = graphon.matrix(SBM, graphon.cells(4)), torch.arange(4)
    _, fit = embedding.solve(embedding.tabulate(logs, units, inducing=20), W, gamma=1e-3, sigma=1.0)
    table = embedding.tabulate(other, units, inducing=20)
    off, errors = table.weights(W), torch.zeros(6, 4, dtype=torch.float64)
    for t in range(6):
        for i in range(4):
            mean, r = fit.predict(table.own[t, i : i + 1], table.state[t], off[i])
            errors[t, i] = (torch.cat([mean[0], r]) - table.target[t, i]).square().sum()
    assert float(embedding.loss_on(table, W, fit)) == pytest.approx(float(errors.mean()))
    torch.testing.assert_close(embedding.own_errors(table, W, fit, 4), errors.sum(0))


def test_the_width_of_the_kernel_is_a_setting() -> None:
    """In standard deviations of each coordinate; another kernel takes its place."""
    logs = crowd(N=4, L=3, H=2)
    given = {
        width: Search(logs, Settings(kernel="embedding", ground_width=width)).rows(torch.arange(4)).ground
        for width in (2.0, 6.0)
    }
    spread = logs.state.std(correction=0)
    for width, ground in given.items():
        assert ground.other.widths[0] == pytest.approx(width * float(spread))
        assert ground.own.widths[1] == pytest.approx(width * float(logs.action.std(correction=0)))


@pytest.mark.parametrize(
    "shape", [Shape("sbm", (0.65,), (0.3, -0.4, 0.9)), Shape("exp", (), (0.4,))], ids=["sbm", "exp"]
)
def test_the_gradient_of_the_projected_loss(shape: Shape) -> None:
    """The envelope theorem, through blocks that are computed twice, against central differences of the whole minimum."""
    logs = crowd(N=8, L=6, H=3, seed=1)
    search = Search(logs, Settings(inducing=15, gamma=1e-3, kernel="embedding"))
    x = graphon.cells(8)
    u = torch.tensor(shape.values, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(search.solve(shape, x, u)[0], u)
    for k in range(len(u)):
        step = torch.zeros_like(u)
        step[k] = 1e-5
        with torch.no_grad():
            up, down = (float(search.solve(shape, x, u.detach() + s * step)[0]) for s in (1, -1))
        assert float(found[k]) == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-8)


def test_memory_does_not_grow_with_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel matrices that are made at once stay below the limit, forwards and backwards, and blocks change nothing."""
    largest, kept, held = [0], {}, []

    def count(x: Tensor) -> Tensor:
        # The same tensor may be asked for by every block: it is there once.
        kept[x.data_ptr()] = x.numel()
        return x

    class Watched(Gaussian):
        def __call__(self, x: Tensor, y: Tensor) -> Tensor:
            K = super().__call__(x, y)
            largest[0] = max(largest[0], K.numel())
            return K

    monkeypatch.setattr(embedding, "KEPT", 0)
    shape, values = Shape("sbm", (0.65,), (0.3, -0.4, 0.9)), []
    for L, block in ((4, 2**22), (4, 3000), (16, 3000)):
        monkeypatch.setattr(embedding, "BLOCK", block)
        logs = crowd(N=6, L=L, H=5)
        ground = Ground(Gaussian((1.0, 1.0)), Watched((1.0,)))
        search = Search(logs, Settings(inducing=10, kernel="embedding", ground=ground))
        u = torch.tensor(shape.values, dtype=torch.float64, requires_grad=True)
        largest[0] = 0
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            value, _ = search.solve(shape, graphon.cells(6), u)
        held.append(sum(kept.values()))
        (gradient,) = torch.autograd.grad(value, u)
        values.append((value.detach(), gradient, largest[0]))
    torch.testing.assert_close(values[0][:2], values[1][:2])
    assert values[0][2] > 3000 >= values[1][2] == values[2][2]
    # What is held for the backward pass: for 60 more times their indices, and none of their 60 kernel values each.
    assert held[2] <= held[1] + 60


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blocks_are_recovered(seed: int) -> None:
    """Planted block values (0.9, 0.3, 0.1), of which the data tell the ratios: to 0.03, the border to the agent, noise to 30 % (what the fit leaves is in it)."""
    logs = simulate_linear(CROWD, SBM, 12, 40, 3, seed=seed)
    settings = Settings(
        kernel="embedding", inducing=60, bandwidth=False, gamma=1e-9, seed=seed, ground_width=6.0
    )
    found = estimation.learn(logs, "sbm(2)", settings)
    # Agents 1..8 of 12 are below 0.7.
    assert int((graphon.cells(12) < found.shape.borders[0]).sum()) == 8
    values = estimation.block_values(torch.tensor(found.shape.values))
    assert float(values[0, 1] / values[0, 0]) == pytest.approx(1 / 3, abs=0.03)
    assert float(values[1, 1] / values[0, 0]) == pytest.approx(1 / 9, abs=0.03)
    assert float(found.fits[0].noise) == pytest.approx(0.05**2, rel=0.3)
    flat = estimation.learn(logs, "const", settings)
    assert found.held_out["sbm(2)"] < 0.1 * flat.held_out["const"]


def test_theta_is_recovered_roughly() -> None:
    """Planted 3: between 2 and 5.  Embeddings of small mass look alike, which biases the exponential graphon upwards."""
    logs = simulate_linear(CROWD, graphon.named("exp:3"), 12, 40, 3, seed=1)
    settings = Settings(
        kernel="embedding", inducing=150, bandwidth=False, gamma=1e-9, restarts=1, ground_width=6.0
    )
    found = estimation.learn(logs, "exp", settings)
    assert 2.0 < math.exp(found.shape.values[0]) < 5.0


def test_positions_are_found() -> None:
    """All permutations of six agents: the best is never worse than the true one; blocks of hidden agents are found by moves."""
    logs = simulate_linear(CROWD, SBM, 5, 12, 2, seed=3).hidden()
    search = Search(logs, Settings(kernel="embedding", inducing=15, gamma=1e-6))
    grid, shape = graphon.cells(5), Shape("exp", (), (1.0,))
    value, positions = search.best_permutation(shape, grid)
    assert sorted(positions.tolist()) == grid.tolist()
    assert value <= search.value(shape, grid) + 1e-12
    logs = simulate_linear(CROWD, SBM, 12, 20, 2, seed=4).hidden()
    settings = Settings(kernel="embedding", inducing=40, gamma=1e-7, ground_width=6.0)
    _, shape, labels = estimation.attempt(logs, settings, "sbm(2)", 0, ())
    blocks = estimation.units_of(shape, labels)
    agreement = float((blocks == (graphon.cells(12) >= 0.7).long()).double().mean())
    assert max(agreement, 1 - agreement) > 0.8


def test_the_game_on_bins() -> None:
    """Against the true crowd cut into the same bins: transitions, rewards, and the flow of the uniform policy."""
    model = LinearCrowd(a=0.5, b=0.5, c=0.5, noise=0.3, track=0.2)
    logs = simulate_linear(model, SBM, 12, 40, 3, seed=0)
    settings = Settings(
        kernel="embedding",
        inducing=100,
        gamma=1e-8,
        bandwidth=False,
        ground_width=6.0,
    )
    learned = estimation.learn(logs, "sbm(2)", settings)
    cut, labels = bins(logs, 25), graphon.cells(10)
    game = estimation.plug_in_bins(learned, cut, 3, labels)
    assert (game.states, game.actions, game.horizon, game.labels) == (25, 3, 3, 10)
    assert cut.actions.flatten().tolist() == [-1.0, 0.0, 1.0]
    centres = cut.centres.flatten()
    states = logs.state[:, 0].flatten()
    middle = (centres - states.mean()).abs() < states.std()
    truth = graphon.matrix(SBM, labels)
    law = cut.law.expand(10, -1)
    P, r = game.model(0, graphon.aggregate(game, law))
    torch.testing.assert_close(P.sum(-1), torch.ones(10, 25, 3, dtype=torch.float64))
    z = (truth @ law / 10 @ centres).view(10, 1, 1)
    mean = 0.5 * centres[:, None] + 0.5 * z + 0.5 * cut.actions.flatten()
    edges = cut.edges.numpy().copy()
    edges[0], edges[-1] = -np.inf, np.inf
    wanted = np.diff(norm.cdf((edges - mean.numpy()[..., None]) / 0.3), axis=-1)
    error = np.abs(P.numpy() - wanted).sum(-1)[:, middle.numpy()]
    assert error.mean() < 0.25
    reward = -0.2 * (centres[:, None] - z).square() - 0.1 * cut.actions.flatten().square()
    assert float((r - reward)[:, middle].abs().mean()) < 0.05
    assert float(graphon.exploitability(game, graphon.uniform_policy(game), 0.1).mean()) > 0


def test_bins() -> None:
    logs = crowd(N=6, L=5, H=3)
    cut = bins(logs, 8)
    states = torch.cat([logs.state.flatten(), logs.next_state.flatten()])
    of = cut.of(states)
    assert int(of.min()) == 0 and int(of.max()) == 7
    inside = (cut.edges[of] <= states + 1e-12) & (states <= cut.edges[of + 1] + 1e-12)
    assert bool(inside.all())
    wanted = torch.bincount(cut.of(logs.state[:, 0].flatten()), minlength=8) / 30
    torch.testing.assert_close(cut.law, wanted.double())
    wide = ContinuousLogs(
        *(
            torch.cat([t, t], -1) if t.ndim == 4 else t
            for t in (logs.state, logs.action, logs.reward, logs.next_state)
        )
    )
    with pytest.raises(
        ConfigError,
        match=r"one dimension; these have 2; such logs can be estimated .*networks over continuous",
    ):
        bins(wide, 8)
    many = replace(logs, action=torch.randn(logs.action.shape, dtype=torch.float64))
    with pytest.raises(ConfigError, match="at most 20 different actions; these logs have 90"):
        bins(many, 8)
    with pytest.raises(DataError, match="all states of the logs are the same"):
        bins(replace(logs, state=0 * logs.state, next_state=0 * logs.state), 8)


def test_the_crowd_follows_its_law() -> None:
    """s' - a s - b z - c u is noise of the given deviation, z by hand without self; rewards exact; episodes have streams of their own."""
    model = LinearCrowd(a=0.4, b=0.7, c=0.2, noise=0.2, track=0.5, effort=0.3)
    logs = simulate_linear(model, SBM, 30, 20, 4, seed=2)
    W = graphon.matrix(SBM, graphon.cells(30))
    s, u = logs.state.squeeze(-1), logs.action.squeeze(-1)
    z = (s @ W - s * torch.diagonal(W)) / 29
    rest = logs.next_state.squeeze(-1) - 0.4 * s - 0.7 * z - 0.2 * u
    assert float(rest.std()) == pytest.approx(0.2, rel=0.05)
    assert abs(float(rest.mean())) < 4 * 0.2 / rest.numel() ** 0.5
    torch.testing.assert_close(logs.reward, -0.5 * (s - z).square() - 0.3 * u.square())
    torch.testing.assert_close(logs.state[:, 1:], logs.next_state[:, :-1])
    more = simulate_linear(model, SBM, 30, 25, 4, seed=2)
    assert torch.equal(more.state[:20], logs.state)


def test_continuous_logs_as_parquet(tmp_path: Path) -> None:
    logs = crowd(N=4, L=3, H=2)
    twice = ContinuousLogs(
        *(
            torch.cat([t, 2 * t], -1) if t.ndim == 4 else t
            for t in (logs.state, logs.action, logs.reward, logs.next_state)
        ),
        logs.labels,
    )
    for one in (logs, twice, logs.hidden()):
        read = load_continuous_logs(save_continuous_logs(one, tmp_path / "logs.parquet"))
        for name, value in vars(one).items():
            assert (value is None and getattr(read, name) is None) or torch.equal(
                value, getattr(read, name)
            ), name
    with pytest.raises(DataError, match="does not exist"):
        load_continuous_logs(tmp_path / "no.parquet")
    (tmp_path / "text.parquet").write_text("x")
    with pytest.raises(DataError, match="no Parquet file"):
        load_continuous_logs(tmp_path / "text.parquet")
    file = save_continuous_logs(logs, tmp_path / "logs.parquet")
    with pytest.raises(
        DataError, match=r"state must hold whole numbers from 0; for continuous states set game=logs"
    ):
        load_logs(file)
    finite = simulate(graphon.sis(graphon.matrix(SBM, graphon.cells(4)), 2), SBM, 4, 2)
    read = load_continuous_logs(save_logs(finite, tmp_path / "finite.parquet"))
    torch.testing.assert_close(read.state.squeeze(-1), finite.state.double())


def test_what_is_refused() -> None:
    logs = crowd()
    still = replace(logs, state=0 * logs.state, next_state=0 * logs.state)
    with pytest.raises(DataError, match="graphon not identifiable from these logs"):
        estimation.learn(still, "exp", Settings(kernel="embedding"))
    with pytest.raises(ConfigError, match="continuous ones need 'embedding'"):
        estimation.learn(logs, "exp")
