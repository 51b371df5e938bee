"""Filter, smoother and EM against the joint Gaussian, statsmodels, and each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace
from mobula.envs.bandits import draw_instances, draw_paths
from mobula.errors import DataError, TrainingFault


def models(count: int = 3, d: int = 3, m: int = 2, seed: int = 0, k: int = 0) -> StateSpace:
    """Random stable models, no two parts of them alike."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def covariance(size: int) -> Tensor:
        root = normal(count, size, size)
        return root @ root.mT + 0.3 * torch.eye(size, dtype=torch.float64)

    A = normal(count, d, d)
    A = 0.9 * A / kalman.spectral_radius(A)[:, None, None]
    parts = A, normal(count, m, d), covariance(d), covariance(m), normal(count, d), covariance(d)
    return StateSpace(*parts, normal(count, d, k) if k else None)


def inputs(model: StateSpace, steps: int, seed: int = 5) -> Tensor:
    """Random inputs [N, T, k], no two of them alike."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(model.A), steps, model.D.shape[-1], dtype=torch.float64, generator=g)


def sample(model: StateSpace, steps: int, seed: int = 1) -> Tensor:
    """y [N, T, m], driven by `inputs(model, steps)`."""
    u = inputs(model, steps)
    g = torch.Generator().manual_seed(seed)
    N, d, m = len(model.A), model.A.shape[-1], model.C.shape[-2]
    roots = [torch.linalg.cholesky(c) for c in (model.P0, model.Q, model.R)]
    x = model.m0 + kalman.mv(roots[0], torch.randn(N, d, dtype=torch.float64, generator=g))
    rows = []
    for t in range(steps):
        noise = torch.randn(N, m, dtype=torch.float64, generator=g)
        rows.append(kalman.mv(model.C, x) + kalman.mv(roots[2], noise))
        x = kalman.mv(model.A, x) + kalman.mv(roots[1], torch.randn(N, d, dtype=torch.float64, generator=g))
        x = x + kalman.mv(model.D, u[:, t])
    return torch.stack(rows, 1)


def joint(model: StateSpace, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(E x, Cov x, E y, Cov(x, y), Cov y) of all steps stacked, for one model, straight from the definition."""
    A, C, Q, R, m0, P0, D = (part[0] for part in model)
    u = inputs(model, steps)[0]
    d = len(A)
    powers = [torch.linalg.matrix_power(A, k) for k in range(steps)]
    # x_t = A^t m0 + sum_{s < t} A^{t-1-s} D u_s, both counted from 0.
    means = torch.cat(
        [powers[t] @ m0 + sum(powers[t - 1 - s] @ D @ u[s] for s in range(t)) for t in range(steps)]
    )
    marginal = [P0]
    for _ in range(steps - 1):
        marginal.append(A @ marginal[-1] @ A.T + Q)
    cov = torch.zeros(steps * d, steps * d, dtype=torch.float64)
    for s in range(steps):
        for t in range(s, steps):
            block = powers[t - s] @ marginal[s]
            cov[t * d : (t + 1) * d, s * d : (s + 1) * d] = block
            cov[s * d : (s + 1) * d, t * d : (t + 1) * d] = block.T
    big_C = torch.block_diag(*[C] * steps)
    cov_y = big_C @ cov @ big_C.T + torch.block_diag(*[R] * steps)
    return means, cov, big_C @ means, cov @ big_C.T, cov_y


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("missing", [(), (2,), (0, 3, 4)])
def test_filter_and_smoother_are_the_conditional_gaussian(missing: tuple[int, ...], k: int) -> None:
    model, T = models(1, k=k), 6
    y = sample(model, T)
    y[:, list(missing)] = math.nan
    mean_x, cov_x, mean_y, cross, cov_y = joint(model, T)
    m, d = 2, 3
    filtered = kalman.kalman_filter(model, y, inputs(model, T))
    smoothed = kalman.smoother(model, filtered)
    seen = [i for t in range(T) if t not in missing for i in range(t * m, (t + 1) * m)]

    def condition(rows: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(rows, dtype=torch.int64)
        gain = torch.linalg.solve(cov_y[index][:, index], cross[:, index].T).T
        error = y.flatten()[index] - mean_y[index]
        return mean_x + gain @ error, cov_x - gain @ cross[:, index].T

    for t in range(T):
        mean, cov = condition([i for i in seen if i < (t + 1) * m])
        block = slice(t * d, (t + 1) * d)
        torch.testing.assert_close(filtered.mean[0, t], mean[block])
        torch.testing.assert_close(filtered.cov[0, t], cov[block, block])
    mean, cov = condition(seen)
    torch.testing.assert_close(smoothed.mean[0].flatten(), mean)
    for t in range(T):
        block = slice(t * d, (t + 1) * d)
        torch.testing.assert_close(smoothed.cov[0, t], cov[block, block])
        if t + 1 < T:
            after = slice((t + 1) * d, (t + 2) * d)
            torch.testing.assert_close(smoothed.lag_one[0, t], cov[after, block])
    index = torch.tensor(seen)
    law = torch.distributions.MultivariateNormal(mean_y[index], cov_y[index][:, index])
    torch.testing.assert_close(filtered.log_likelihood[0], law.log_prob(y.flatten()[index]))


@pytest.mark.parametrize("k", [0, 2])
def test_frozen_gains_change_nothing(k: int) -> None:
    model = models(4, k=k)
    y, u = sample(model, 400), inputs(model, 400)
    y[1, 50] = math.nan
    fast, slow = kalman.kalman_filter(model, y, u), kalman.kalman_filter(model, y, u, tol=0.0)
    assert 50 < fast.steady < 200 < slow.steady
    torch.testing.assert_close(fast.mean, slow.mean, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(fast.log_likelihood, slow.log_likelihood)
    one, other = kalman.smoother(model, fast), kalman.smoother(model, slow, tol=0.0)
    for name in ("mean", "cov", "lag_one"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("k", [0, 2])
def test_the_filter_agrees_with_statsmodels(k: int) -> None:
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    model = models(1, k=k)
    y, u = sample(model, 120), inputs(model, 120)
    y[0, 30] = math.nan
    peer = KalmanSmoother(k_endog=2, k_states=3)
    peer["design"], peer["transition"] = model.C[0].numpy(), model.A[0].numpy()
    peer["selection"] = torch.eye(3, dtype=torch.float64).numpy()
    peer["state_cov"], peer["obs_cov"] = model.Q[0].numpy(), model.R[0].numpy()
    peer.initialize_known(model.m0[0].numpy(), model.P0[0].numpy())
    peer.bind(y[0].numpy().copy())
    if k:
        peer["state_intercept"] = (model.D[0] @ u[0].T).numpy().copy()
    wanted = peer.smooth()
    filtered = kalman.kalman_filter(model, y, u)
    smoothed = kalman.smoother(model, filtered)
    torch.testing.assert_close(filtered.mean[0], torch.tensor(wanted.filtered_state.T.copy()))
    torch.testing.assert_close(smoothed.mean[0], torch.tensor(wanted.smoothed_state.T.copy()))
    assert float(filtered.log_likelihood) == pytest.approx(float(wanted.llf_obs.sum()))


def test_scan_is_the_recursion() -> None:
    g = torch.Generator().manual_seed(0)
    F = 0.4 * torch.randn(2, 3, 3, dtype=torch.float64, generator=g)
    b = torch.randn(2, 37, 3, dtype=torch.float64, generator=g)
    x = torch.randn(2, 3, dtype=torch.float64, generator=g)
    found = kalman.scan(F, b, x)
    for t in range(37):
        x = kalman.mv(F, x) + b[:, t]
        torch.testing.assert_close(found[:, t], x)


def expected_log_likelihood(model: StateSpace, y: Tensor, smoothed: kalman.Smoothed) -> Tensor:
    """E[log p(x, y)] under the smoothed law, with `inputs(model, T)`; the M-step is its maximiser."""
    x, P, lag = smoothed.mean, smoothed.cov, smoothed.lag_one
    seen = ~y.isnan().any(-1)

    def term(cov: Tensor, second: Tensor, count: Tensor | float) -> Tensor:
        return -0.5 * (
            count * torch.logdet(2 * math.pi * cov) + (torch.linalg.inv(cov) * second).sum((-1, -2))
        )

    A, C = model.A, model.C
    first = x[:, 0] - model.m0
    total = term(model.P0, first[..., :, None] * first[..., None, :] + P[:, 0], 1.0)
    move = x[:, 1:] - x[:, :-1] @ A.mT - inputs(model, y.shape[1])[:, :-1] @ model.D.mT
    cross = lag @ A.mT[:, None]
    second = P[:, 1:] - cross - cross.mT + A[:, None] @ P[:, :-1] @ A.mT[:, None]
    total = total + term(model.Q, (move[..., :, None] * move[..., None, :] + second).sum(1), y.shape[1] - 1.0)
    error = torch.where(seen[..., None], y - x @ C.mT, 0.0)
    second = (C[:, None] @ P @ C.mT[:, None]) * seen[..., None, None]
    return total + term(
        model.R, (error[..., :, None] * error[..., None, :] + second).sum(1), seen.sum(1).double()
    )


@pytest.mark.parametrize("k", [0, 2])
def test_the_m_step_is_stationary(k: int) -> None:
    model = models(2, k=k)
    y, u = sample(model, 150), inputs(model, 150)
    y[0, 10] = math.nan
    smoothed = kalman.smoother(model, kalman.kalman_filter(model, y, u))
    found, floored = kalman.m_step(y, smoothed, None, u, ridge=False, pool=False)
    assert not floored.any()
    free = [part.clone().requires_grad_() for part in found]
    expected_log_likelihood(StateSpace(*free), y, smoothed).sum().backward()
    for name, part in zip(StateSpace._fields, free, strict=True):
        assert part.grad is not None
        assert bool((part.grad.abs() < 1e-7).all()), name


def test_the_score_is_that_of_the_likelihood() -> None:
    """Fisher's identity: at the parameters of the E-step, E[log p(x, y)] rises as log p(y) does; by finite differences in A and D."""
    model = models(1, k=2)
    y, u = sample(model, 40), inputs(model, 40)
    smoothed = kalman.smoother(model, kalman.kalman_filter(model, y, u))
    for name in ("A", "D"):
        part = getattr(model, name)
        free = part.clone().requires_grad_()
        expected_log_likelihood(model._replace(**{name: free}), y, smoothed).sum().backward()
        for i in range(part.shape[1]):
            for j in range(part.shape[2]):
                step = torch.zeros_like(part)
                step[0, i, j] = 1e-5
                up, down = (
                    float(
                        kalman.kalman_filter(model._replace(**{name: part + s * step}), y, u).log_likelihood
                    )
                    for s in (1, -1)
                )
                assert free.grad is not None
                assert float(free.grad[0, i, j]) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-6)


def test_with_the_state_seen_the_m_step_is_least_squares() -> None:
    """x_t on [x_{t-1}; u_{t-1}]; an input that never was anything but 0, or that repeats another, leaves the fit as it is."""
    model = models(2, k=2)
    x = sample(model._replace(C=torch.eye(3, dtype=torch.float64).expand(2, 3, 3), R=model.Q), 60)
    u = inputs(model, 60)
    none = torch.zeros(2, 60, 3, 3, dtype=torch.float64)
    state = kalman.Smoothed(x, none, none[:, 1:])
    found, _ = kalman.m_step(x, state, None, u, ridge=False, pool=False)
    dull = torch.cat([u[..., :1], torch.zeros_like(u[..., :1]), u[..., 1:], 2 * u[..., 1:]], -1)
    same, _ = kalman.m_step(x, state, None, dull, ridge=False, pool=False)
    joined, _ = kalman.m_step(x, state, None, u, ridge=False, pool=True)
    designs = [torch.cat([x[n, :-1], u[n, :-1]], 1) for n in range(2)]
    for n, design in enumerate(designs):
        wanted = torch.linalg.lstsq(design, x[n, 1:]).solution.T
        torch.testing.assert_close(torch.cat([found.A[n], found.D[n]], 1), wanted)
        rest = x[n, 1:] - design @ wanted.T
        torch.testing.assert_close(found.Q[n], rest.T @ rest / 59)
        torch.testing.assert_close(same.A[n], wanted[:, :3])
        torch.testing.assert_close(dull[n] @ same.D[n].T, u[n] @ wanted[:, 3:].T)
        assert float(same.D[n, :, 1].abs().max()) < 1e-12
        torch.testing.assert_close(same.Q[n], found.Q[n])
    wanted = torch.linalg.lstsq(torch.cat(designs), x[:, 1:].flatten(0, 1)).solution.T
    torch.testing.assert_close(torch.cat([joined.A[1], joined.D[1]], 1), wanted)
    # The first states of all series are one sample of N(m0, P0); its rank is 1, and the floor lifts the rest by 1e-8 of the trace.
    apart = x[:, 0] - x[:, 0].mean(0)
    torch.testing.assert_close(joined.m0[1], x[:, 0].mean(0))
    lifted = 2e-8 * float(apart.square().sum())
    torch.testing.assert_close(joined.P0[1], apart.T @ apart / 2, atol=lifted, rtol=0)
    # The ridge of short data is on A alone.
    short, _ = kalman.m_step(x, state, None, u, ridge=True, pool=False)
    penalty = 1e-2 * designs[0][:, :3].square().sum() / 3
    gram = designs[0].T @ designs[0] + torch.diag(torch.tensor([1.0, 1, 1, 0, 0]).double() * penalty)
    wanted = torch.linalg.solve(gram, designs[0].T @ x[0, 1:]).T
    torch.testing.assert_close(torch.cat([short.A[0], short.D[0]], 1), wanted)
    # Q is then the mean square of what the shrunken A leaves.
    rest = x[0, 1:] - designs[0] @ wanted.T
    torch.testing.assert_close(short.Q[0], rest.T @ rest / 59)


def test_inputs_are_superposed() -> None:
    """Given A and C, data without noise return D; a linear system's filter is that of what the inputs do not explain."""
    model = models(2, k=2)
    u = inputs(model, 50)
    x = torch.zeros(2, 50, 3, dtype=torch.float64)
    for t in range(1, 50):
        x[:, t] = kalman.mv(model.A, x[:, t - 1]) + kalman.mv(model.D, u[:, t - 1])
    y = x @ model.C.mT
    y[0, 7] = math.nan
    torch.testing.assert_close(kalman.input_matrix(model.A, model.C, y, u), model.D)
    noisy = sample(model, 50)
    whole = kalman.kalman_filter(model, noisy, u)
    rest = kalman.kalman_filter(model._replace(D=model.D[..., :0]), noisy - x @ model.C.mT)
    torch.testing.assert_close(whole.mean, rest.mean + x)
    torch.testing.assert_close(whole.log_likelihood, rest.log_likelihood)


def test_em_finds_what_inputs_do() -> None:
    """A cycle of seven dummies: the subspace start tells it from the state's own memory, and EM finds C A^k D."""
    instance = draw_instances([0, 1], radius=0.9, q=0.09, r=0.09, season=7)
    paths = draw_paths(instance, [0, 1], 3000)
    u = paths.u.expand(2, -1, -1)
    start, _ = kalman.subspace(paths.y, 4, u)
    fit = kalman.em(start, paths.y, u, iterations=60)
    assert float(fit.trace.diff(dim=0).nan_to_num(nan=0.0).min()) > -1e-5
    truth = kalman.kalman_filter(StateSpace(*instance.model), paths.y, u).log_likelihood
    # D adds 2 * 4 * 7 / 2 parameters or fewer to the ones of `test_em_climbs_and_finds_the_law`.
    assert bool(((fit.log_likelihood > truth - 10) & (fit.log_likelihood < truth + 60)).all())
    blind, _ = kalman.subspace(paths.y, 4)
    for i in range(2):
        wanted = torch.linalg.eigvals(instance.A[i])

        def gap(A: Tensor, wanted: Tensor = wanted) -> float:
            return float((torch.linalg.eigvals(A)[:, None] - wanted[None]).abs().amin(0).max())

        assert gap(start.A[i]) < 0.15 < gap(blind.A[i])
        assert gap(fit.model.A[i]) < 0.08
    # A cycle that never breaks tells of D only the cycle that it leaves in y: C (I - A^7)^{-1} sum_s A^s D u_{t-1-s}.
    cycle = torch.eye(7, dtype=torch.float64)
    found, wanted = (
        m.C
        @ torch.linalg.solve(
            torch.eye(4).double() - torch.linalg.matrix_power(m.A, 7),
            sum(torch.linalg.matrix_power(m.A, s) @ m.D @ cycle.roll(s, 1) for s in range(7)),
        )
        for m in (fit.model, StateSpace(*instance.model))
    )
    assert (
        float((found - found.mean(-1, keepdim=True) - wanted).abs().max()) < 0.1 < float(wanted.abs().max())
    )


def test_em_finds_the_response_to_inputs() -> None:
    """Inputs that are all different determine C A^k D, which no change of coordinates moves; from no response at all."""
    model = models(2, k=2)
    model = model._replace(D=5 * model.D)
    y, u = sample(model, 1000), inputs(model, 1000)
    fit = kalman.em(kalman.unit_gauge(model)._replace(D=0 * model.D), y, u, iterations=30)
    for lag in range(4):
        found, wanted = (m.C @ torch.linalg.matrix_power(m.A, lag) @ m.D for m in (fit.model, model))
        # y has a standard deviation of up to 10 around what the inputs do: standard errors of up to 0.3, on entries of up to 10.
        torch.testing.assert_close(found, wanted, atol=1.0, rtol=0)
        assert float(wanted.abs().max()) > 3


def test_a_fall_of_the_likelihood_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = models(2), kalman.m_step

    def spoiled(*args: Any, **options: Any) -> tuple[StateSpace, Tensor]:
        found, low = step(*args, **options)
        return found._replace(R=found.R * torch.tensor([1.0, 9.0]).double()[:, None, None]), low

    monkeypatch.setattr(kalman, "m_step", spoiled)
    with pytest.raises(TrainingFault, match="EM lost likelihood in series 1: relative change -"):
        kalman.em(model, sample(model, 100), iterations=3)
    # While the ridge is on, no maximum is reached and nothing is asserted.
    kalman.em(model, sample(model, 50), iterations=3)


def test_what_inputs_explain_is_taken_out() -> None:
    """A constant and three lags of two inputs in two outputs leave nothing, one lag fewer leaves the last; gaps stay 0."""
    g = torch.Generator().manual_seed(0)
    u = torch.randn(1, 80, 2, dtype=torch.float64, generator=g)
    B = torch.randn(3, 2, 2, dtype=torch.float64, generator=g)
    seen = torch.ones(1, 80, 1, dtype=torch.float64)
    seen[0, 20] = 0.0
    z = 0.7 + sum(torch.nn.functional.pad(u, (0, 0, lag, -lag)) @ B[lag - 1] for lag in (1, 2, 3))
    z = z * seen
    assert float(kalman._without_inputs(z, u, seen, 3).abs().max()) < 1e-12
    rest = kalman._without_inputs(z, u, seen, 2)
    assert float(rest[0, 20].abs().max()) == 0.0 and float(rest.abs().max()) > 0.1


def test_the_projection_is_exact_without_noise() -> None:
    """What inputs leave behind shows the whole memory of the state, beyond the lags that are regressed out, and around gaps."""
    model = models(2, k=2)
    model = model._replace(A=model.A / 0.9 * 0.97)
    u = inputs(model, 300)
    x = kalman.scan(model.A, torch.nn.functional.pad(u @ model.D.mT, (0, 0, 1, -1)), 0 * model.m0)
    y = x @ model.C.mT
    y[1, 100] = math.nan
    found, values = kalman.subspace(y, 3, u, projected=True)
    blunt, _ = kalman.subspace(y, 3, u)
    for i in range(2):
        wanted, exact, other = (torch.linalg.eigvals(A[i])[:, None] for A in (model.A, found.A, blunt.A))
        assert float((wanted - exact.mT).abs().amin(1).max()) < 1e-6
        assert float((wanted - other.mT).abs().amin(1).max()) > 1e-3
    assert float((values[:, 3] / values[:, 0]).max()) < 1e-6
    known, _ = kalman.subspace(y, 3, u, projected=True, known_C=model.C)
    torch.testing.assert_close(known.C, model.C)


def test_the_projection_keeps_what_the_past_tells() -> None:
    """Without memory (A = 0), x_t = D u_{t-1} + w: the past tells of y_t what the last input did, C D D' C', and of no later output."""
    model, T = models(1, k=2), 4000
    model = model._replace(D=5 * model.D)
    u = inputs(model, T)
    g = torch.Generator().manual_seed(2)
    w, v = (torch.randn(1, T, n, dtype=torch.float64, generator=g) for n in (3, 2))
    x = torch.nn.functional.pad(u @ model.D.mT, (0, 0, 1, -1)) + w @ torch.linalg.cholesky(model.Q).mT
    y = x @ model.C.mT + v @ torch.linalg.cholesky(model.R).mT
    M = kalman._predictable(y, u, torch.ones(1, T, 1, dtype=torch.float64), 6)
    wanted = torch.zeros(1, 12, 12, dtype=torch.float64)
    wanted[:, :2, :2] = model.C @ model.D @ model.D.mT @ model.C.mT
    # Five standard errors of a mean square.
    error = 5 / T**0.5 * float(y.square().mean(1).max())
    assert float(wanted.max()) > 3 * error
    torch.testing.assert_close(M @ M.mT, wanted, atol=error, rtol=0)


def test_em_starts_nearer_where_inputs_outweigh_the_noise() -> None:
    """The gap to the likelihood of the true law after as many steps of EM in all, a quarter of that from the plain start or less."""
    instance = draw_instances([0, 1], radius=0.95, q=0.09, r=0.09)
    paths = draw_paths(instance, [0, 1], 600)
    truth = StateSpace(*instance.model)
    truth = truth._replace(D=20 * models(2, d=4, k=2, seed=3).D)
    u = inputs(truth, 600)
    drive = torch.nn.functional.pad(u @ truth.D.mT, (0, 0, 1, -1))
    y = paths.y + kalman.scan(truth.A, drive, 0 * truth.m0) @ truth.C.mT
    wanted = kalman.kalman_filter(truth, y, u).log_likelihood
    plain, _ = kalman.subspace(y, 4, u)
    before = kalman.em(plain, y, u, iterations=15).log_likelihood
    after = kalman.em(kalman.start(y, 4, u), y, u, iterations=10).log_likelihood
    assert bool((wanted - before > 100).all())
    assert bool((wanted - after < 0.25 * (wanted - before)).all())
    # Without inputs there is one start.
    for part, same in zip(kalman.start(y, 4), kalman.subspace(y, 4)[0], strict=True):
        assert torch.equal(part, same)
    assert torch.equal(kalman.start(y, 4, u, known_C=truth.C).C, truth.C)


def test_subspace_recovers_the_spectrum_from_exact_long_data() -> None:
    instance = draw_instances([3], radius=0.95, q=0.09, r=0.09)
    y = draw_paths(instance, [3], 60_000).y
    found, values = kalman.subspace(y, 4)
    gaps = (torch.linalg.eigvals(found.A)[0][:, None] - torch.linalg.eigvals(instance.A)[0][None]).abs()
    assert float(gaps.amin(0).max()) < 0.05
    assert float(values[0, 4] / values[0, 3]) < 0.3
    # C and A belong together: C A^k spans what the true ones do (the process run backwards has the same spectrum).
    seen, true = (
        torch.cat([m.C[0] @ torch.linalg.matrix_power(m.A[0], k) for k in range(6)])
        for m in (found, instance)
    )
    rest = true - seen @ torch.linalg.lstsq(seen, true).solution
    assert float(rest.norm() / true.norm()) < 0.05
    # Two days of seven are missing: some lags are then seen in fewer pairs than others.
    weekdays = y.clone()
    weekdays[:, torch.arange(60_000) % 7 > 4] = math.nan
    thinned, _ = kalman.subspace(weekdays, 4)
    gaps = (torch.linalg.eigvals(thinned.A)[0][:, None] - torch.linalg.eigvals(instance.A)[0][None]).abs()
    assert float(gaps.amin(0).max()) < 0.05
    known, _ = kalman.subspace(y, 4, known_C=instance.C)
    torch.testing.assert_close(known.C, instance.C)
    # The same law in another gauge.
    for k in range(1, 5):
        one, same = (m.C @ torch.linalg.matrix_power(m.A, k) @ m.Q @ m.C.mT for m in (found, known))
        torch.testing.assert_close(same, one)
    torch.testing.assert_close(
        torch.linalg.eigvals(known.A).abs().sort().values, torch.linalg.eigvals(found.A).abs().sort().values
    )


def test_a_known_C_is_kept_and_pooling_joins_series() -> None:
    model = models(1)
    y = sample(StateSpace(*(part.expand(3, *part.shape[1:]) for part in model)), 200)
    start, _ = kalman.subspace(y, 3, known_C=model.C.expand(3, -1, -1))
    fit = kalman.em(start, y, iterations=5, known_C=start.C)
    torch.testing.assert_close(fit.model.C, model.C.expand(3, -1, -1))
    one = StateSpace(*(part[:1].expand_as(part) for part in start))
    pooled = kalman.em(one, y, iterations=5, pool=True)
    for part in pooled.model:
        torch.testing.assert_close(part, part[:1].expand_as(part))
    assert bool((pooled.trace.sum(1).diff() > 0).all())


def test_gauges_and_caps() -> None:
    model = models(2, k=2)
    y, u = sample(model, 60), inputs(model, 60)
    unit = kalman.unit_gauge(model)
    eye = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    torch.testing.assert_close(kalman.stationary_covariance(unit.A, unit.Q), eye)
    torch.testing.assert_close(
        kalman.kalman_filter(unit, y, u).log_likelihood, kalman.kalman_filter(model, y, u).log_likelihood
    )
    wild = model._replace(A=model.A * 1.5)
    tame, over = kalman.capped(wild)
    assert bool(over.all())
    torch.testing.assert_close(kalman.spectral_radius(tame.A), torch.full((2,), 0.999, dtype=torch.float64))


def test_data_that_cannot_be_fitted() -> None:
    y = sample(models(1), 120)
    with pytest.raises(DataError, match="lower d"):
        kalman.subspace(y, 13)
    y[..., 1] = 2.0
    with pytest.raises(DataError, match="column 1 of series 0 is constant"):
        kalman.subspace(y, 3)
