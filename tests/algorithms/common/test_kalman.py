"""Filter, smoother and EM against the joint Gaussian, statsmodels, and each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace
from mobula.envs.bandits import draw_instances, draw_paths
from mobula.errors import DataError


def models(count: int = 3, d: int = 3, m: int = 2, seed: int = 0) -> StateSpace:
    """Random stable models, no two parts of them alike."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def covariance(size: int) -> Tensor:
        root = normal(count, size, size)
        return root @ root.mT + 0.3 * torch.eye(size, dtype=torch.float64)

    A = normal(count, d, d)
    A = 0.9 * A / kalman.spectral_radius(A)[:, None, None]
    return StateSpace(A, normal(count, m, d), covariance(d), covariance(m), normal(count, d), covariance(d))


def sample(model: StateSpace, steps: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    N, d, m = len(model.A), model.A.shape[-1], model.C.shape[-2]
    roots = [torch.linalg.cholesky(c) for c in (model.P0, model.Q, model.R)]
    x = model.m0 + kalman.mv(roots[0], torch.randn(N, d, dtype=torch.float64, generator=g))
    rows = []
    for _ in range(steps):
        noise = torch.randn(N, m, dtype=torch.float64, generator=g)
        rows.append(kalman.mv(model.C, x) + kalman.mv(roots[2], noise))
        x = kalman.mv(model.A, x) + kalman.mv(roots[1], torch.randn(N, d, dtype=torch.float64, generator=g))
    return torch.stack(rows, 1)


def joint(model: StateSpace, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(E x, Cov x, E y, Cov(x, y), Cov y) of all steps stacked, for one model, straight from the definition."""
    A, C, Q, R, m0, P0 = (part[0] for part in model)
    d = len(A)
    powers = [torch.linalg.matrix_power(A, k) for k in range(steps)]
    means = torch.cat([power @ m0 for power in powers])
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


@pytest.mark.parametrize("missing", [(), (2,), (0, 3, 4)])
def test_filter_and_smoother_are_the_conditional_gaussian(missing: tuple[int, ...]) -> None:
    model, T = models(1), 6
    y = sample(model, T)
    y[:, list(missing)] = math.nan
    mean_x, cov_x, mean_y, cross, cov_y = joint(model, T)
    m, d = 2, 3
    filtered = kalman.kalman_filter(model, y)
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


def test_frozen_gains_change_nothing() -> None:
    model = models(4)
    y = sample(model, 400)
    y[1, 50] = math.nan
    fast, slow = kalman.kalman_filter(model, y), kalman.kalman_filter(model, y, tol=0.0)
    assert 50 < fast.steady < 200 < slow.steady
    torch.testing.assert_close(fast.mean, slow.mean, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(fast.log_likelihood, slow.log_likelihood)
    one, other = kalman.smoother(model, fast), kalman.smoother(model, slow, tol=0.0)
    for name in ("mean", "cov", "lag_one"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-8, rtol=1e-8)


def test_the_filter_agrees_with_statsmodels() -> None:
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    model = models(1)
    y = sample(model, 120)
    y[0, 30] = math.nan
    peer = KalmanSmoother(k_endog=2, k_states=3)
    peer["design"], peer["transition"] = model.C[0].numpy(), model.A[0].numpy()
    peer["selection"] = torch.eye(3, dtype=torch.float64).numpy()
    peer["state_cov"], peer["obs_cov"] = model.Q[0].numpy(), model.R[0].numpy()
    peer.initialize_known(model.m0[0].numpy(), model.P0[0].numpy())
    peer.bind(y[0].numpy().copy())
    wanted = peer.smooth()
    filtered = kalman.kalman_filter(model, y)
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
    """E[log p(x, y)] under the smoothed law; the M-step is its maximiser."""
    x, P, lag = smoothed.mean, smoothed.cov, smoothed.lag_one
    seen = ~y.isnan().any(-1)

    def term(cov: Tensor, second: Tensor, count: Tensor | float) -> Tensor:
        return -0.5 * (
            count * torch.logdet(2 * math.pi * cov) + (torch.linalg.inv(cov) * second).sum((-1, -2))
        )

    A, C = model.A, model.C
    first = x[:, 0] - model.m0
    total = term(model.P0, first[..., :, None] * first[..., None, :] + P[:, 0], 1.0)
    move = x[:, 1:] - x[:, :-1] @ A.mT
    cross = lag @ A.mT[:, None]
    second = P[:, 1:] - cross - cross.mT + A[:, None] @ P[:, :-1] @ A.mT[:, None]
    total = total + term(model.Q, (move[..., :, None] * move[..., None, :] + second).sum(1), y.shape[1] - 1.0)
    error = torch.where(seen[..., None], y - x @ C.mT, 0.0)
    second = (C[:, None] @ P @ C.mT[:, None]) * seen[..., None, None]
    return total + term(
        model.R, (error[..., :, None] * error[..., None, :] + second).sum(1), seen.sum(1).double()
    )


def test_the_m_step_is_stationary() -> None:
    model = models(2)
    y = sample(model, 150)
    y[0, 10] = math.nan
    smoothed = kalman.smoother(model, kalman.kalman_filter(model, y))
    found, floored = kalman.m_step(y, smoothed, None, ridge=False, pool=False)
    assert not floored.any()
    free = [part.clone().requires_grad_() for part in found]
    expected_log_likelihood(StateSpace(*free), y, smoothed).sum().backward()
    for name, part in zip(StateSpace._fields, free, strict=True):
        assert part.grad is not None
        assert float(part.grad.abs().max()) < 1e-7, name


def test_em_climbs_and_finds_the_law() -> None:
    """Likelihood never falls, reaches that of the truth, and the spectrum of A (no gauge changes it) is found."""
    instance = draw_instances([0, 1], radius=0.95, q=0.09, r=0.09)
    paths = draw_paths(instance, [0, 1], 3000)
    start, _ = kalman.subspace(paths.y, 4)
    fit = kalman.em(start, paths.y, iterations=60)
    steps = fit.trace.diff(dim=0).nan_to_num(nan=0.0)
    assert float(steps.min()) > -1e-5
    truth = kalman.kalman_filter(StateSpace(*instance.model), paths.y).log_likelihood
    # The maximum likelihood estimate is above the truth, by about half the number of free parameters.
    assert bool(((fit.log_likelihood > truth - 10) & (fit.log_likelihood < truth + 40)).all())
    for i in range(2):
        found, wanted = torch.linalg.eigvals(fit.model.A[i]), torch.linalg.eigvals(instance.A[i])
        gaps = (found[:, None] - wanted[None]).abs()
        assert float(gaps.amin(0).max()) < 0.06


def test_subspace_recovers_the_spectrum_from_exact_long_data() -> None:
    instance = draw_instances([3], radius=0.95, q=0.09, r=0.09)
    y = draw_paths(instance, [3], 60_000).y
    found, values = kalman.subspace(y, 4)
    gaps = (torch.linalg.eigvals(found.A)[0][:, None] - torch.linalg.eigvals(instance.A)[0][None]).abs()
    assert float(gaps.amin(0).max()) < 0.05
    assert float(values[0, 4] / values[0, 3]) < 0.3
    known, _ = kalman.subspace(y, 4, known_C=instance.C)
    torch.testing.assert_close(known.C, instance.C)
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
    model = models(2)
    y = sample(model, 60)
    unit = kalman.unit_gauge(model)
    eye = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    torch.testing.assert_close(kalman.stationary_covariance(unit.A, unit.Q), eye)
    torch.testing.assert_close(
        kalman.kalman_filter(unit, y).log_likelihood, kalman.kalman_filter(model, y).log_likelihood
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
