"""EMKF-Bandit: the parts against exact answers, the whole through RLlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from gymnasium import spaces

from mobula.algorithms.bandits.emkf_bandit import experiment
from mobula.algorithms.bandits.emkf_bandit.experiment import play
from mobula.algorithms.bandits.emkf_bandit.learner import Streams
from mobula.algorithms.bandits.emkf_bandit.math import (
    arm_estimates,
    arm_features,
    bic,
    choose,
    identified,
    noise_rows,
    padded,
    refit_times,
    regrets,
    shared_thompson_probabilities,
    thompson_probabilities,
    truncated,
    widths,
)
from mobula.algorithms.bandits.emkf_bandit.method import EMKFBandit, EMKFBanditConfig
from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace
from mobula.artifact import export_policy, load_policy
from mobula.envs.bandits import LinearBandit, draw_instances, draw_paths
from mobula.errors import ConfigError, DataError, EnvironmentFault, TrainingFault
from mobula.sampling.conformance import check_env
from mobula.serving.backend import LocalBackend
from mobula.serving.gateway import create_app


def test_estimates_are_ridge_regressions() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, dtype=torch.float64, generator=g)
    r = torch.randn(30, dtype=torch.float64, generator=g)
    context = torch.randn(3, dtype=torch.float64, generator=g)
    B = 0.5 * torch.eye(3, dtype=torch.float64) + x.T @ x
    mean, white = arm_estimates(B[None], (x.T @ r)[None], context[None])
    width = widths(white)
    inverse = torch.linalg.inv(B)
    assert float(mean) == pytest.approx(float(context @ inverse @ x.T @ r))
    assert float(width) == pytest.approx(float(context @ inverse @ context))


def test_thompson_probabilities() -> None:
    """Two arms in closed form, more by simulation; certain arms are certain."""
    mean, scale = torch.tensor([0.3, 0.1]).double(), torch.tensor([0.5, 0.2]).double()
    wanted = torch.special.ndtr((mean[0] - mean[1]) / scale.norm())
    assert float(thompson_probabilities(mean, scale)[0]) == pytest.approx(float(wanted), abs=1e-6)
    mean = torch.tensor([0.0, 0.2, -0.1, 0.15], dtype=torch.float64)
    scale = torch.tensor([0.3, 0.1, 0.5, 0.2], dtype=torch.float64)
    draws = mean + scale * torch.randn(
        400_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    share = torch.bincount(draws.argmax(-1), minlength=4) / len(draws)
    torch.testing.assert_close(thompson_probabilities(mean, scale).float(), share, atol=4e-3, rtol=0)
    torch.testing.assert_close(
        thompson_probabilities(mean, scale * 1e-6), torch.tensor([0.0, 1.0, 0.0, 0.0]).double()
    )


def test_choices() -> None:
    mean = torch.tensor([[0.0, 1.0, 0.5]]).double()
    white = torch.tensor([[[2.0], [0.0], [-1.0]]]).double()
    one = torch.ones(1, 1, dtype=torch.float64)
    noise = torch.tensor([[1.0, 0.0, 0.0, 5.0]]).double()
    assert choose("ts", mean, white, one, noise, 1).tolist() == [0]
    assert choose("ts", mean, white, 0.1 * one, noise, 1).tolist() == [1]
    assert choose("linucb", mean, white, one, noise, 1).tolist() == [0]
    assert choose("greedy", mean, white, one, noise, 1).tolist() == [0]
    assert choose("greedy", mean, white, one, noise, 10**9).tolist() == [1]
    # min(1, 5 K / t), K = 3: a probability of 0.15 at t = 100, and -1.0364 is the normal's quantile of it; of 1 up to t = 15.
    for quantile, step, arm in ((-1.04, 100, 0), (-1.03, 100, 1), (5.0, 15, 0), (5.0, 16, 1)):
        noise[0, -1] = quantile
        assert choose("greedy", mean, white, one, noise, step).tolist() == [arm]
    assert refit_times(1600, 500) == [50, 100, 200, 400, 500, 1000, 1500]
    assert refit_times(600, 250) == [50, 100, 200, 250, 500]


def played(seeds: list[int], rounds: int = 320, **options: Any) -> tuple[Streams, torch.Tensor, Any]:
    instance = draw_instances(seeds)
    paths = draw_paths(instance, seeds, rounds)
    streams = Streams(len(seeds), 2, 5, **{"em_iters": 10, **options})
    chosen, _ = play(streams, paths, seeds)
    return streams, chosen, (instance, paths)


def test_after_a_refit_the_statistics_are_those_of_the_filtered_history() -> None:
    """What an online bandit would hold had it always had the present model."""
    streams, chosen, (_, paths) = played([0, 1], ridge=2.0)
    states = kalman.kalman_filter(streams.model, paths.y).mean
    torch.testing.assert_close(streams.x[:, :320], states, atol=1e-8, rtol=1e-8)
    for n in range(2):
        for arm in range(5):
            rows = states[n][chosen[n] == arm]
            r = paths.rewards[n, chosen[n] == arm, arm]
            torch.testing.assert_close(
                streams.B[n, arm], 2.0 * torch.eye(4, dtype=torch.float64) + rows.T @ rows
            )
            torch.testing.assert_close(streams.f[n, arm], rows.T @ r)
    assert streams.refits == 3


def test_a_batch_acts_as_its_streams_alone() -> None:
    for options in ({}, {"inflate": True, "v": 1.0}):
        _, both, _ = played([4, 5], rounds=220, **options)
        _, first, _ = played([4], rounds=220, **options)
        assert torch.equal(both[:1], first)


def test_more_starts_never_fit_worse() -> None:
    one, _, _ = played([4, 5], rounds=100)
    many, _, _ = played([4, 5], rounds=100, restarts=3)
    fits = [kalman.kalman_filter(s.model, s.y[:, :99]).log_likelihood for s in (one, many)]
    assert bool((fits[1] >= fits[0] - 1e-9).all())


def test_spare_dimensions_change_nothing() -> None:
    instance = draw_instances([1, 2], season=3)
    model, paths = StateSpace(*instance.model), draw_paths(instance, [1, 2], 50)
    u = paths.u.expand(2, -1, -1)
    plain, wide = (kalman.kalman_filter(m, paths.y, u) for m in (model, padded(model, 6)))
    torch.testing.assert_close(wide.mean[..., :4], plain.mean)
    assert float(wide.mean[..., 4:].abs().max()) == 0.0
    torch.testing.assert_close(wide.log_likelihood, plain.log_likelihood)
    for back, part in zip(truncated(padded(model, 6), 4), model, strict=True):
        torch.testing.assert_close(back, part)


def test_the_order_is_chosen_by_bic() -> None:
    """One real pole and a rotation of the plane, both in noise: orders that a thousand observations tell apart."""
    assert float(bic(torch.tensor(-10.0), 2, 3, torch.tensor(100.0))) == pytest.approx(
        20 + 18 * math.log(100)
    )
    g = torch.Generator().manual_seed(0)
    T = 1000
    pole = torch.zeros(T, dtype=torch.float64)
    plane = torch.zeros(T, 2, dtype=torch.float64)
    c, s = 0.98 * math.cos(0.5), 0.98 * math.sin(0.5)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    for t in range(1, T):
        pole[t] = 0.95 * pole[t - 1] + 0.3 * torch.randn((), dtype=torch.float64, generator=g)
        plane[t] = turn @ plane[t - 1] + 0.3 * torch.randn(2, dtype=torch.float64, generator=g)
    noise = 0.3 * torch.randn(2, T, 2, dtype=torch.float64, generator=g)
    y = torch.stack([pole[:, None] * torch.tensor([1.0, 0.5]).double(), plane]) + noise
    streams = Streams(2, 2, 3, d="bic", em_iters=8)
    streams.t = T + 1
    streams.y = torch.cat([y, y[:, :1]], 1)
    fit, order = streams._select(y, y[..., :0])
    assert order.tolist() == [1, 2]
    assert fit.model.A.shape == (2, 6, 6) and float(fit.model.A[0, 1:].abs().max()) == 0.0
    with pytest.raises(ConfigError, match="known_C fixes the hidden dimension"):
        EMKFBanditConfig().training(d="bic", known_C=[[1.0], [0.0]]).validate()
    with pytest.raises(ConfigError, match="'bic'"):
        EMKFBanditConfig().training(d="aic")


@pytest.mark.parametrize(
    "options", [{"restarts": 2, "init": "random"}, {"pool": True, "restarts": 2, "init": "random"}]
)
def test_workers_change_nothing(ray_session: None, options: dict[str, Any]) -> None:
    """Streams and restarts of a refit on two tasks, of unlike sizes and lengths of EM: models, likelihoods and arms are those of one."""
    alone, chosen, _ = played([0, 1, 2], rounds=210, em_iters=8, **options)
    shared, again, _ = played([0, 1, 2], rounds=210, em_iters=8, workers=2, **options)
    assert shared.refits == alone.refits == 3
    assert torch.equal(again, chosen)
    # Sums of another batch differ in their last bits, and EM carries that on.
    for name, part in alone.model._asdict().items():
        torch.testing.assert_close(getattr(shared.model, name), part, rtol=1e-6, atol=1e-9)
    for one, two in zip(alone.traces, shared.traces, strict=True):
        length = min(len(one), len(two))
        torch.testing.assert_close(two[:length], one[:length], rtol=1e-9, atol=0, equal_nan=True)
    torch.testing.assert_close(shared.likelihood, alone.likelihood, rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", [{}, {"demean": True}, {"d": "bic", "em_iters": 3}])
def test_a_delayed_refit_is_the_same_fit_taken_up_later(options: dict[str, Any]) -> None:
    """Until it is due the old model acts; then the new one, on the whole history, as if it had always been there."""
    knobs = {"em_iters": 5, **options}
    instance = draw_instances([0, 1])
    paths = draw_paths(instance, [0, 1], 120)
    late, prompt = Streams(2, 2, 5, refit_delay=20, **knobs), Streams(2, 2, 5, **knobs)
    models, offsets = [], []
    for t in range(119):
        for streams in (late, prompt):
            streams.observe(paths.y[:, t])
            streams.act(torch.zeros(2, streams.draws + 1, dtype=torch.float64))
            # Both are paid for the same arms, so that what they have seen is the same.
            streams.a[:, t] = t % 5
            streams.reward(paths.rewards[:, t, t % 5])
        models.append((late.model, prompt.model))
        offsets.append((late.offset, prompt.offset))
    # Begun before round 50 (index 49), taken up before round 70.
    first = models[0][0]
    for t in (49, 68):
        for part, old in zip(models[t][0], first, strict=True):
            assert torch.equal(part, old)
        assert not torch.equal(models[t][1].A, first.A)
        assert torch.equal(offsets[t][0], offsets[0][0])
    for part, wanted in zip(models[69][0], models[49][1], strict=True):
        assert torch.equal(part, wanted)
    assert torch.equal(offsets[69][0], offsets[49][1])
    assert (late.refits, prompt.refits) == (1, 2) and late.pending is not None
    states = kalman.kalman_filter(late.model, paths.y[:, :119] - late.offset.unsqueeze(1)).mean
    torch.testing.assert_close(late.x[:, :119], states, atol=1e-8, rtol=1e-8)


def test_refits_in_the_background_change_nothing(ray_session: None) -> None:
    """With tasks and a delay: the arms of one process with that delay; a checkpoint in the midst waits for the fit."""
    options: dict[str, Any] = {"rounds": 215, "em_iters": 8, "refit_delay": 30}
    alone, chosen, _ = played([0, 1, 2], **options)
    shared, again, _ = played([0, 1, 2], workers=2, **options)
    assert torch.equal(again, chosen)
    assert shared.refits == alone.refits == 2 and shared.pending is not None
    state = shared.state_dict()
    resumed = Streams(3, 2, 5, em_iters=8, refit_delay=30)
    resumed.load_state_dict(state)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        y, r = (torch.randn(3, *k, dtype=torch.float64, generator=g) for k in ((2,), ()))
        for streams in (shared, alone, resumed):
            streams.observe(y)
            streams.act(torch.zeros(3, streams.draws + 1, dtype=torch.float64))
            streams.reward(r)
    for other in (alone, resumed):
        assert other.refits == shared.refits == 3 and other.pending is None
        assert torch.equal(other.a[:, :235], shared.a[:, :235])
        for one, two in zip(other.model, shared.model, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_a_failed_refit_in_the_background_is_raised_where_it_is_taken_up(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise TrainingFault("no fit")

    monkeypatch.setattr(kalman, "capped", broken)
    with pytest.raises(TrainingFault, match="no fit"):
        played([0], rounds=60, em_iters=2, refit_delay=5, workers=1)
    played([0], rounds=54, em_iters=2, refit_delay=5, workers=1)


def test_forgetting_weighs_the_past_alike_online_and_after_a_refit() -> None:
    streams, _, _ = played([0], rounds=260, forget=0.98)
    online = streams.B.clone(), streams.f.clone()
    streams.t += 1
    streams._rebuild()
    torch.testing.assert_close(streams.f, online[1])
    torch.testing.assert_close(streams.B, online[0])


@pytest.mark.parametrize("options", [{}, {"restarts": 2, "init": "random"}])
def test_pooled_streams_share_one_model_and_one_regression(options: dict[str, Any]) -> None:
    """Two customers of one law, each with a history of its own."""
    instance = draw_instances([0, 0])
    paths = draw_paths(instance, [0, 1], 205)
    streams = Streams(2, 2, 5, pool=True, em_iters=5, ridge=2.0, **options)
    chosen, _ = play(streams, paths, [0, 1])
    for part in streams.model:
        torch.testing.assert_close(part[0], part[1], atol=0, rtol=0)
    assert streams.refits == 3
    states = kalman.kalman_filter(streams.model, paths.y).mean
    for arm in range(5):
        rows, r = states[chosen == arm], paths.rewards[..., arm][chosen == arm]
        torch.testing.assert_close(streams.B[0, arm], 2.0 * torch.eye(4, dtype=torch.float64) + rows.T @ rows)
        torch.testing.assert_close(streams.f[0, arm], rows.T @ r)


def test_rewards_sharpen_the_filter() -> None:
    """With the true model, filtering rewards too lessens the error of the state on average (payoffs must be learned first)."""
    seeds = list(range(8))
    instance = draw_instances(seeds)
    paths = draw_paths(instance, seeds, 600)
    errors = []
    for use in (False, True):
        streams = Streams(8, 2, 5, model=StateSpace(*instance.model), use_rewards=use, sigma=0.1)
        play(streams, paths, seeds)
        errors.append((streams.x[:, 200:600] - paths.x[:, 200:]).norm(dim=-1).mean(1))
    assert float(errors[1].mean()) < float(errors[0].mean())


def rotated(model: StateSpace, seed: int) -> StateSpace:
    """The same law in turned coordinates of x."""
    d = model.A.shape[-1]
    S = torch.linalg.qr(normal(seed, len(model.A), d, d)).Q
    A, C, Q, R, m0, P0, D = model
    return StateSpace(S @ A @ S.mT, C @ S.mT, S @ Q @ S.mT, R, kalman.mv(S, m0), S @ P0 @ S.mT, S @ D)


@pytest.mark.parametrize("options", [{}, {"intercept": True, "forget": 0.98}])
def test_rewards_are_filtered_in_the_coordinates_of_the_model(options: dict[str, Any]) -> None:
    """A turn of the coordinates by a refit changes no payoff: the ridge sees none, and the old payoffs must not be taken for new ones."""
    streams, _, _ = played([0, 1], rounds=60, use_rewards=True, em_iters=2, **options)
    streams.t += 1
    seen = []
    for turn in range(3):
        if turn:
            streams.model = rotated(streams.model, turn)
        streams._rebuild()
        x = streams.mean
        x = torch.cat([x[:, :1] * 0 + 1, x], 1) if streams.intercept else x
        seen.append((*arm_estimates(streams.B, streams.f, arm_features(x, None, 5)), streams.cov))
    for mean, white, cov in seen[1:]:
        torch.testing.assert_close(mean, seen[0][0])
        torch.testing.assert_close(widths(white), widths(seen[0][1]))
        torch.testing.assert_close(
            torch.linalg.eigvalsh(cov), torch.linalg.eigvalsh(seen[0][2]), atol=1e-8, rtol=1e-6
        )


@pytest.mark.parametrize("sigma", [None, 0.3])
def test_a_reward_is_an_observation_with_the_noise_of_its_payoff(sigma: float | None) -> None:
    """r = b + theta . x + e with e of variance s^2 (known, or the mean square residual q) + q phi' B^{-1} phi: Gaussian conditioning."""
    streams, _, _ = played([0, 1], rounds=30, use_rewards=True, intercept=True, sigma=sigma)
    streams.t += 1
    mean, cov, r, a = streams.mean, streams.cov, torch.tensor([0.4, -1.0]).double(), torch.tensor([2, 4])
    found = streams._reward_update(mean, cov, a, r)
    for n in range(2):
        B, f = streams.B[n, a[n]], streams.f[n, a[n]]
        theta, phi = torch.linalg.solve(B, f), torch.cat([torch.ones(1).double(), mean[n]])
        residual = streams.squares[n] / 30
        noise = (residual if sigma is None else sigma**2) + residual * (phi @ torch.linalg.solve(B, phi))
        gain = cov[n] @ theta[1:] / (theta[1:] @ cov[n] @ theta[1:] + noise)
        torch.testing.assert_close(found[0][n], mean[n] + gain * (r[n] - theta @ phi))
        torch.testing.assert_close(found[1][n], cov[n] - torch.outer(gain, theta[1:] @ cov[n]))


def test_the_width_follows_the_noise() -> None:
    """Known noise: s^2 + theta_a' P theta_a; else the mean square of what the payoffs missed in the rounds before, 1 in the first."""
    instance = draw_instances([0, 1])
    paths = draw_paths(instance, [0, 1], 40)
    streams = Streams(2, 2, 5, inflate=True, v=0.5)
    missed = []
    for t in range(40):
        streams.observe(paths.y[:, t])
        mean, _, scale = streams.estimates()
        wanted = torch.stack(missed).square().mean(0).sqrt() if missed else torch.ones(2).double()
        torch.testing.assert_close(scale[:, 0], 0.5 * wanted)
        arms = streams.act(normal(t, 2, 6))
        r = paths.rewards[torch.arange(2), t, arms]
        missed.append(r - mean[torch.arange(2), arms])
        streams.reward(r)
    streams.intercept, streams.sigma = False, 0.3
    theta = torch.linalg.solve(streams.B, streams.f.unsqueeze(-1)).squeeze(-1)
    for n in range(2):
        for arm in range(5):
            spread = 0.09 + theta[n, arm] @ streams.cov[n] @ theta[n, arm]
            torch.testing.assert_close(streams.estimates()[2][n, arm], 0.5 * spread.sqrt())


def test_contexts_of_the_baselines() -> None:
    y = normal(0, 6, 1, 2)
    obs, lags, none = (Streams(1, 2, 3, context=kind) for kind in ("obs", "lags", "none"))
    for t in range(6):
        torch.testing.assert_close(obs.observe(y[t]), y[t])
        past = [y[t - k] if t >= k else torch.zeros(1, 2).double() for k in range(4)]
        torch.testing.assert_close(lags.observe(y[t]), torch.cat(past, 1))
        assert none.observe(y[t]).tolist() == [[1.0]]


def test_a_window_is_the_latest_rounds() -> None:
    streams, _, (_, paths) = played([0, 1], rounds=202, window=120, em_iters=2)
    assert streams.refits == 3
    late = kalman.kalman_filter(streams.model, paths.y[:, 79:199]).log_likelihood
    torch.testing.assert_close(streams.likelihood, late)
    assert streams.due(500) and not streams.due(300)


def test_the_mean_is_that_of_the_rounds_before() -> None:
    streams, _, (_, paths) = played([0, 1], rounds=103, demean=True, em_iters=5)
    torch.testing.assert_close(streams.offset, paths.y[:, :99].mean(1))
    states = kalman.kalman_filter(streams.model, paths.y - streams.offset[:, None]).mean
    torch.testing.assert_close(streams.x[:, :103], states, atol=1e-8, rtol=1e-8)


def test_numbers_of_the_experiment_by_hand() -> None:
    means = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    assert regrets(means, torch.tensor([0, 0])).tolist() == [2.0, 0.0]
    # The largest fall of any step, the first refit (with its ridge) apart; what has stopped counts no more.
    traces = [
        torch.tensor([[-9.0, -9.0], [-99.0, -99.0]]),
        torch.tensor([[-10.0, -20.0], [-5.0, -22.0], [-4.0, math.nan]]).double(),
    ]
    found = experiment.likelihood_steps(traces)
    assert found is not None and found.tolist() == pytest.approx([0.2, -0.1])
    # In the second half: no gap up to a linear map; else the part that no map explains.
    best, x = normal(0, 1, 40, 2), normal(1, 1, 40, 3)
    x[:, 20:, :2] = best[:, 20:] @ normal(2, 2, 2)
    assert float(experiment.filter_gap(x, best)) < 1e-12
    shift = torch.tensor([3.0, 4.0]).double()
    alternating = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)[None, :, None] * shift
    assert float(experiment.filter_gap(torch.ones(1, 40, 1).double(), alternating)) == pytest.approx(5.0)


def test_a_run_reports_its_regret() -> None:
    """Half-time, curve and end are points of one sum: the true model's filter against the arm it would have picked."""
    task = experiment.Task(env_config={"rounds": 60, "radius": 0.95, "q": 0.09, "r": 0.09})
    (numbers,) = experiment.run(EMKFBanditConfig(), task, [3], oracle=True)
    instance = draw_instances([3], radius=0.95, q=0.09, r=0.09)
    paths = draw_paths(instance, [3], 60)
    truth = StateSpace(*instance.model)
    chosen, _ = play(Streams(1, 2, 5, model=truth), paths, [3])
    best = kalman.kalman_filter(truth, paths.y).mean[0] @ instance.theta[0].T
    lost = best.amax(1) - best[torch.arange(60), chosen[0]]
    assert numbers["regret"] == pytest.approx(float(lost.sum()))
    assert numbers["regret_half"] == pytest.approx(float(lost[:30].sum()))
    assert numbers["curve_values"][-1] == pytest.approx(numbers["regret"])
    hidden = paths.x[0] @ instance.theta[0].T
    full = hidden.amax(1) - hidden[torch.arange(60), chosen[0]]
    assert numbers["full_information_regret"] == pytest.approx(float(full.sum()))
    assert numbers["reward"] == pytest.approx(float(paths.rewards[0, torch.arange(60), chosen[0]].sum()))


def test_the_bandit_pays_and_moves_as_its_instance_says() -> None:
    """Moments over many copies: rewards around theta_a . x, contexts around A x, observations around C x, starts in the stationary law."""
    n, env = 40_000, LinearBandit(40_000, instance=4)
    law = draw_instances([4])
    env.reset(seed=0)
    x = env.state["x"]
    error = 5 / n**0.5
    torch.testing.assert_close(torch.cov(x.T), law.P0[0], atol=float(law.P0.max()) * 2**0.5 * error, rtol=0)
    torch.testing.assert_close(law.P0[0], (law.A @ law.P0 @ law.A.mT + law.Q)[0])
    arms = torch.arange(n) % 5
    new, reward, _ = env.transition(env.state, arms)
    missed = reward.double() - (law.theta[0][arms] * x).sum(1)
    assert abs(float(missed.mean())) < 0.1 * error and float(missed.std()) == pytest.approx(0.1, rel=0.02)
    moved = new["x"] - x @ law.A[0].T
    torch.testing.assert_close(torch.cov(moved.T), law.Q[0], atol=0.04 * 2**0.5 * error, rtol=0)
    noise = new["y"] - new["x"] @ law.C[0].T
    torch.testing.assert_close(torch.cov(noise.T), law.R[0], atol=2**0.5 * error, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"pool": True},
        {"demean": True, "intercept": True},
        {"window": 150},
        {"normalise_gauge": True},
        {"init": "random"},
        {"use_rewards": True},
        {"known_C": torch.eye(2, 4, dtype=torch.float64)},
        {"policy": "linucb"},
        {"policy": "greedy"},
        {"context": "lags"},
    ],
)
def test_every_option_earns_more_than_an_arm_at_random(options: dict[str, Any]) -> None:
    seeds = [0, 0] if options.get("pool") else [0, 1]
    _, chosen, (_, paths) = played(seeds, rounds=320, **options)
    earned = paths.rewards.gather(2, chosen.unsqueeze(-1)).sum((1, 2))
    # An arm at random earns 0 on average, with a standard deviation of about 10 over 320 rounds.
    assert float(earned.mean()) > 40


# One parameter for all arms -----------------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blocks(arms: int, p: int) -> torch.Tensor:
    """M_a that put the context into block a of an otherwise empty vector: the shared parameter is then all arms' own, stacked."""
    return torch.eye(arms * p, dtype=torch.float64).view(arms, p, arms * p).mT


def test_shared_estimates_are_one_ridge_regression() -> None:
    maps, x, r, context = normal(0, 3, 4, 2), normal(1, 40, 2), normal(2, 40), normal(3, 2)
    arms = torch.arange(40) % 3
    phi = torch.stack([maps[a] @ x[t] for t, a in enumerate(arms)])
    B = 0.5 * torch.eye(4, dtype=torch.float64) + phi.T @ phi
    mean, white = arm_estimates(B[None], (phi.T @ r)[None], arm_features(context, maps, 3))
    # Ridge regression is least squares with rows sqrt(lambda) I, 0 added.
    rows = torch.cat([phi, 0.5**0.5 * torch.eye(4, dtype=torch.float64)])
    theta = torch.linalg.lstsq(rows, torch.cat([r, torch.zeros(4).double()])[:, None]).solution.squeeze(1)
    torch.testing.assert_close(mean, torch.stack([theta @ m @ context for m in maps]))
    features = torch.stack([m @ context for m in maps])
    torch.testing.assert_close(white @ white.T, features @ torch.linalg.inv(B) @ features.T)


def test_shared_thompson_draws_one_parameter() -> None:
    """Choices, and the probabilities that are served, against draws of theta itself from N(B^{-1} f, v^2 B^{-1})."""
    phi, root, f = normal(0, 4, 3), normal(1, 3, 3), normal(2, 3)
    B, v, draws = root @ root.T + torch.eye(3, dtype=torch.float64), 0.7, 200_000
    mean, white = arm_estimates(B[None], f[None], phi)
    noise = normal(3, draws, 5)
    expand = (draws, -1, -1)
    arms = choose(
        "ts",
        mean.expand(draws, -1),
        white.expand(expand),
        torch.full((draws, 1), v).double(),
        noise,
        1,
        shared=True,
    )
    cov = v**2 * torch.linalg.inv(B)
    theta = torch.linalg.solve(B, f) + normal(4, draws, 3) @ torch.linalg.cholesky(cov).T
    wanted = torch.bincount((theta @ phi.T).argmax(1), minlength=4) / draws
    assert float(wanted.min()) > 0.03
    share = torch.bincount(arms, minlength=4) / draws
    torch.testing.assert_close(share, wanted, atol=6e-3, rtol=0)
    served = shared_thompson_probabilities(mean, v * white)
    torch.testing.assert_close(served.float(), wanted, atol=5e-3, rtol=0)
    # Draws arm by arm, as if each had its own theta, are another law.
    apart = thompson_probabilities(mean, v * widths(white).sqrt())
    assert float((apart.float() - wanted).abs().max()) > 0.03


def test_shared_thompson_probabilities_in_closed_form() -> None:
    # Two arms: the difference of two correlated Gaussians.
    mean, spread = torch.tensor([0.3, 0.1]).double(), normal(0, 2, 3)
    gap = (mean[0] - mean[1]) / (spread[0] - spread[1]).norm()
    torch.testing.assert_close(shared_thompson_probabilities(mean, spread)[0], torch.special.ndtr(gap))
    # Three arms of equal mean: arm a wins with probability 1/4 + arcsin(rho) / (2 pi), rho the correlation of its two leads.
    spread = normal(1, 2, 3, 2)
    found = shared_thompson_probabilities(torch.zeros(2, 3).double(), spread)
    for n in range(2):
        for a in range(3):
            one, other = (spread[n, a] - spread[n, b] for b in range(3) if b != a)
            rho = float(one @ other / (one.norm() * other.norm()))
            assert float(found[n, a]) == pytest.approx(0.25 + math.asin(rho) / (2 * math.pi), abs=1e-3)
    # Independent arms.
    mean, scale = normal(2, 4), normal(3, 4).abs()
    torch.testing.assert_close(
        shared_thompson_probabilities(mean, torch.diag(scale)),
        thompson_probabilities(mean, scale),
        atol=1e-3,
        rtol=0,
    )
    # Nothing to draw: the best arm, and of equal ones the first.
    certain = shared_thompson_probabilities(
        torch.tensor([0.0, 1.0, 1.0]).double(), torch.zeros(3, 2).double()
    )
    assert certain.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"forget": 0.98, "intercept": True},
        {"use_rewards": True, "intercept": True},
        {"use_rewards": True, "sigma": 0.1, "pool": True},
    ],
)
def test_stacked_parameters_are_the_arms_own(options: dict[str, Any]) -> None:
    """theta = (theta_1, ..., theta_K) with phi_a = e_a (x) x is the bandit with a parameter an arm: same choices, same statistics."""
    seeds, p = [0, 0] if options.get("pool") else [0, 1], 4 + options.get("intercept", False)
    options = {"policy": "linucb", "em_iters": 5, **options}
    own, arms, _ = played(seeds, rounds=110, **options)
    shared, chosen, _ = played(seeds, rounds=110, arm_features=blocks(5, p), **options)
    assert torch.equal(arms, chosen)
    torch.testing.assert_close(shared.f.view(-1, 5, p), own.f)
    torch.testing.assert_close(shared.B[:, 0], torch.stack([torch.block_diag(*B) for B in own.B]))
    torch.testing.assert_close(shared.mean, own.mean)
    for bandit in (own, shared):
        bandit.inflate, bandit.sigma = True, 0.1
    torch.testing.assert_close(shared.estimates()[2], own.estimates()[2])


@pytest.mark.parametrize("rounds", [90, 120])
def test_shared_statistics_are_those_of_the_filtered_history(rounds: int) -> None:
    """Online after the refit at 50, and rebuilt by the one at 100."""
    maps = normal(5, 5, 3, 4)
    streams, chosen, (_, paths) = played(
        [0, 1], rounds=rounds, ridge=2.0, forget=0.97, arm_features=maps, em_iters=5
    )
    states = kalman.kalman_filter(streams.model, paths.y).mean
    for n in range(2):
        phi = torch.stack([maps[a] @ states[n, t] for t, a in enumerate(chosen[n])])
        weight = 0.97 ** torch.arange(rounds - 1, -1, -1).double()
        r = paths.rewards[n, torch.arange(rounds), chosen[n]]
        torch.testing.assert_close(
            streams.B[n, 0], 2.0 * torch.eye(3, dtype=torch.float64) + phi.T @ (weight[:, None] * phi)
        )
        torch.testing.assert_close(streams.f[n, 0], phi.T @ (weight * r))
    assert streams.refits == (rounds >= 50) + (rounds >= 100)


def test_features_must_be_of_what_known_C_fixes() -> None:
    """M x is the same in all coordinates that keep C, or it is not; both by a change of coordinates along the null space of C."""
    C = normal(0, 2, 4)
    null = torch.linalg.svd(C).Vh[2:].T
    S = torch.eye(4, dtype=torch.float64) + null @ normal(1, 2, 4)
    torch.testing.assert_close(C @ S, C)
    fixed, loose = normal(2, 5, 3, 2) @ C, normal(3, 5, 3, 4)
    assert identified(fixed, C) and not identified(loose, C)
    torch.testing.assert_close(fixed @ S, fixed)
    assert float((loose @ S - loose).abs().max()) > 0.1


# Inputs -------------------------------------------------------------------------------------------------------


def seasonal(seeds: list[int], rounds: int, **options: Any) -> tuple[Streams, torch.Tensor, Any]:
    instance = draw_instances(seeds, season=7, radius=0.9)
    paths = draw_paths(instance, seeds, rounds)
    streams = Streams(len(seeds), 2, 5, **{"em_iters": 10, **options})
    chosen, _ = play(streams, paths, seeds)
    return streams, chosen, (instance, paths)


@pytest.mark.parametrize("options", [{}, {"use_rewards": True, "sigma": 1e6}, {"d": "bic"}])
def test_inputs_reach_the_filter_one_round_later(options: dict[str, Any]) -> None:
    """Online and rebuilt states are those of the model in one pass, here written out (rewards as noisy as here tell it nothing)."""
    streams, _, (_, paths) = seasonal([0, 1], 130, inputs=7, em_iters=5, **options)
    model = streams.model
    assert streams.refits == 2 and float(model.D.abs().max()) > 0.1
    for n in range(2):
        A, C, Q, R, x, P, D = (part[n] for part in model)
        for t in range(130):
            if t > 0:
                x, P = A @ x + D[:, (t - 1) % 7], A @ P @ A.T + Q
            gain = P @ C.T @ torch.linalg.inv(C @ P @ C.T + R)
            x, P = x + gain @ (paths.y[n, t] - C @ x), P - gain @ C @ P
            torch.testing.assert_close(streams.x[n, t], x, atol=1e-6, rtol=1e-6)


def test_a_known_cycle_is_fitted() -> None:
    """By more than the 14 numbers of the cycle that y shows would add by chance (7, a half of each)."""
    with_it, without = (seasonal([0, 1], 201, em_iters=10, **options)[0] for options in ({"inputs": 7}, {}))
    assert with_it.refits == without.refits == 3
    assert bool((with_it.likelihood > without.likelihood + 20).all())


def test_the_cycle_of_the_environment() -> None:
    """Without noise, y_t = C sum_s A^s D u_{t-1-s}, in the environment and in the paths of an experiment alike."""
    quiet = {"q": 1e-20, "r": 1e-20, "radius": 0.9, "season": 3}
    check_env(lambda num_envs=1, **more: LinearBandit(num_envs, season=3, **more), steps=100)
    env = LinearBandit(2, instance=4, **quiet)
    law = draw_instances([4], **quiet)
    paths = draw_paths(law, [4], 8)
    obs, _ = env.reset(seed=0)
    A, C, D = law.A[0], law.C[0], law.D[0]
    torch.testing.assert_close(D.mean(1), torch.zeros(4).double())
    for t in range(8):
        past = range(t)
        wanted = sum((C @ torch.linalg.matrix_power(A, t - 1 - s) @ D[:, s % 3] for s in past), 0 * C[:, 0])
        torch.testing.assert_close(obs[:, :2].double(), wanted.expand(2, 2), atol=1e-5, rtol=1e-5)
        assert obs[:, 2:].argmax(1).tolist() == [t % 3] * 2 and float(obs[:, 2:].sum()) == 2
        torch.testing.assert_close(paths.y[0, t], wanted, atol=1e-8, rtol=0)
        assert paths.u[t].tolist() == obs[0, 2:].tolist()
        obs = env.step(torch.zeros(2, dtype=torch.int64))[0]


def test_means_of_inputs_go_with_means_of_observations() -> None:
    """With `demean`, constants added to y and to u change no filtered state."""
    states = []
    for shift in (0.0, 3.0):
        instance = draw_instances([0, 1], season=3, radius=0.9)
        paths = draw_paths(instance, [0, 1], 130)
        u = normal(6, 130, 3) + shift
        streams = Streams(2, 2, 5, inputs=3, demean=True, em_iters=5)
        for t in range(130):
            streams.observe(paths.y[:, t] + shift, u[t])
            streams.act(torch.zeros(2, 6, dtype=torch.float64))
            streams.reward(torch.zeros(2, dtype=torch.float64))
        states.append(streams.x[:, 100:130])
    torch.testing.assert_close(states[0], states[1], atol=1e-6, rtol=1e-6)


def test_bic_counts_what_inputs_add() -> None:
    plain, driven = (bic(torch.tensor(-10.0), 2, 3, torch.tensor(100.0), k) for k in (0, 5))
    assert float(driven - plain) == pytest.approx(10 * math.log(100), rel=1e-5)


# Through RLlib --------------------------------------------------------------------------------------------------


def config(**knobs: Any) -> Any:
    made = EMKFBanditConfig().environment("linear_bandit").training(**{"em_iters": 10, **knobs})
    return made.debugging(seed=0, log_level="ERROR")


def test_the_whole_way(ray_session: None, tmp_path: Path) -> None:
    algorithm = config().build_algo()
    for _ in range(6):
        result = algorithm.train()
    assert result["env_runners"]["num_env_steps_sampled_lifetime"] == 600
    assert result["env_runners"]["reward_sum"] / 100 > 0.5
    found = algorithm.evaluate()["env_runners"]
    assert found["reward_sum"] / found["num_env_steps_sampled"] > 0.5
    # A restored run goes on exactly.
    restored = EMKFBandit.from_checkpoint(algorithm.save_to_path(str(tmp_path / "checkpoint")))
    assert algorithm.train()["env_runners"]["reward_sum"] == restored.train()["env_runners"]["reward_sum"]
    torch.testing.assert_close(algorithm.streams.B, restored.streams.B)
    assert algorithm.streams.t == 700
    # The exported policy filters as the learner does.
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    bandit = algorithm.streams
    y = bandit.y[0, :30]
    wanted = kalman.kalman_filter(bandit.model, y.float().double().unsqueeze(0)).mean[0]
    state = None
    for t in range(30):
        answer = policy.answer(y[t].numpy(), state=state)
        state = answer["state"]
        np.testing.assert_allclose(answer["x_hat"], wanted[t].numpy(), atol=1e-9)
    mean, _ = arm_estimates(bandit.B[0], bandit.f[0], arm_features(wanted[-1], None, 5))
    assert int(answer["action"]) == int(mean.argmax())
    assert answer["p_best"].sum() == pytest.approx(1.0)
    # A missing observation is a prediction.
    gone = policy.answer([math.nan, math.nan], state=state)
    np.testing.assert_allclose(gone["x_hat"], (bandit.model.A[0] @ wanted[-1]).numpy(), atol=1e-9)
    assert gone["P_trace"] > answer["P_trace"]
    with pytest.raises(DataError, match="shape"):
        policy.act([0.0, 1.0, 2.0])
    # Over HTTP, in this process: the filter's state goes to and fro, a missing observation is null.
    client = TestClient(create_app(LocalBackend({"bandit": str(tmp_path / "policy")}), None))
    (card,) = client.get("/v1/models").json()["data"]
    assert client.post("/v1/policies/bandit/act", json=card["example"]["request"]).status_code == 200
    served: dict[str, Any] = {"state": None}
    for t in range(3):
        request = {"obs": y[t].tolist(), "state": served["state"]}
        served = client.post("/v1/policies/bandit/act", json=request).json()
        np.testing.assert_allclose(served["x_hat"], wanted[t].numpy(), atol=1e-6)
    gone = client.post("/v1/policies/bandit/act", json={"obs": [None, None], "state": served["state"]}).json()
    np.testing.assert_allclose(gone["x_hat"], (bandit.model.A[0] @ wanted[2]).numpy(), atol=1e-6)
    refused = client.post("/v1/policies/bandit/act", json={"obs": [0.0, 1.0, 2.0]})
    assert refused.status_code == 422 and "obs" in refused.json()["error"]["message"]
    for each in (algorithm, restored):
        each.stop()


@pytest.mark.parametrize("policy", ["ts", "linucb", "greedy"])
def test_what_the_module_acts_and_serves(policy: str) -> None:
    """First observation of a stream: the prior, an offset and inputs; payoffs of [1; x]; each policy's choice, all by hand."""
    made = EMKFBanditConfig().training(d=2, inputs=1, intercept=True, policy=policy)
    spec = made.get_default_rl_module_spec()
    spec.observation_space, spec.action_space = spaces.Box(-9, 9, (3,)), spaces.Discrete(4)
    module: Any = spec.build()
    for i, (name, value) in enumerate(module.state_dict().items()):
        value.copy_(normal(10 + i, *value.shape))
        if name in ("Q", "R", "P0", "B"):
            value.copy_(value @ value.mT + 0.1 * torch.eye(value.shape[-1]).double())
    module.scale.copy_(torch.tensor([0.4, 0.1, 0.9, 0.3]))
    y, u = normal(1, 2), normal(2, 1)
    gain = module.P0 @ module.C.T @ torch.linalg.inv(module.C @ module.P0 @ module.C.T + module.R)
    x = module.m0 + gain @ (y - module.offset - module.C @ module.m0)
    cov = module.P0 - gain @ module.C @ module.P0
    phi = torch.cat([torch.ones(1).double(), x])
    inverse = torch.linalg.inv(module.B)
    mean = torch.einsum("kij,kj,i->k", inverse, module.f, phi)
    width = torch.einsum("kij,i,j->k", inverse, phi, phi).sqrt()
    obs = torch.cat([y, u])[None]
    initial = {k: v[None] for k, v in module.get_initial_state().items()}
    found = module._forward({"obs": obs[None], "state_in": initial})
    best = (mean + width if policy == "linucb" else mean).argmax()
    assert int(found["action_dist_inputs"][0, 0].argmax()) == int(best)
    torch.testing.assert_close(found["state_out"]["input"][0], u - module.input_offset)
    probabilities = thompson_probabilities(mean, module.scale * width)
    explored = module._forward_exploration({"obs": obs[None], "state_in": initial})["action_dist_inputs"]
    if policy == "ts":
        torch.testing.assert_close(explored[0, 0].softmax(-1).double(), probabilities, atol=1e-6, rtol=0)
    served = module.served({"obs": obs})
    torch.testing.assert_close(served["x_hat"][0], x)
    torch.testing.assert_close(served["P_trace"][0], cov.trace())
    torch.testing.assert_close(served["p_best"][0], probabilities)


def test_inputs_through_rllib(ray_session: None, tmp_path: Path) -> None:
    made = config(inputs=7).environment("linear_bandit", env_config={"season": 7, "radius": 0.9})
    algorithm = made.build_algo()
    for _ in range(2):
        algorithm.train()
    restored = EMKFBandit.from_checkpoint(algorithm.save_to_path(str(tmp_path / "checkpoint")))
    assert algorithm.train()["env_runners"]["reward_sum"] == restored.train()["env_runners"]["reward_sum"]
    bandit = algorithm.streams
    assert bandit.m == 2 and float(bandit.model.D.abs().max()) > 0.1
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    y, u = bandit.y[:1, :20].float().double(), torch.eye(7, dtype=torch.float64).repeat(3, 1)[:20]
    y[0, 11] = math.nan
    wanted = kalman.kalman_filter(StateSpace(*(part[:1] for part in bandit.model)), y, u.unsqueeze(0)).mean[0]
    state = None
    for t in range(20):
        answer = policy.answer(torch.cat([y[0, t], u[t]]).numpy(), state=state)
        state = answer["state"]
        np.testing.assert_allclose(answer["x_hat"], wanted[t].numpy(), atol=1e-9)
    with pytest.raises(DataError, match="last 7 numbers are inputs"):
        policy.answer([0.0, 0.0, math.nan, *[0.0] * 6], state=state)
    algorithm.obs[0, 3] = math.nan
    with pytest.raises(EnvironmentFault, match="environment 0 gave an input that is no number in round 301"):
        algorithm.training_step()
    with pytest.raises(ConfigError, match="inputs is 9, and the observations"):
        made.copy(copy_frozen=False).training(inputs=9).build_algo()
    for each in (algorithm, restored):
        each.stop()


def test_a_shared_parameter_through_rllib(ray_session: None, tmp_path: Path) -> None:
    """Stacked parameters earn what the arms' own do; what is served is the law of one draw."""
    eye = torch.eye(2).tolist()
    algorithms = []
    for knobs in ({}, {"arm_features": blocks(5, 2).tolist()}):
        made = config(d=2, known_C=eye, policy="linucb", **knobs).environment(
            "linear_bandit", env_config={"d": 2}
        )
        algorithms.append(made.build_algo())
    own, shared = algorithms
    for _ in range(2):
        assert own.train()["env_runners"]["reward_sum"] == shared.train()["env_runners"]["reward_sum"]
    answers = [
        load_policy(export_policy(algorithm, tmp_path / str(i))).answer([0.5, -0.2])
        for i, algorithm in enumerate(algorithms)
    ]
    np.testing.assert_allclose(answers[0]["x_hat"], answers[1]["x_hat"], atol=1e-9)
    assert answers[0]["action"] == answers[1]["action"]
    np.testing.assert_allclose(answers[0]["p_best"], answers[1]["p_best"], atol=2e-3)
    for algorithm in algorithms:
        algorithm.stop()


def test_what_is_refused(ray_session: None) -> None:
    with pytest.raises(ConfigError, match="one batch in one process"):
        config().env_runners(num_env_runners=2).validate()
    with pytest.raises(ConfigError, match=r"known_C is \(1, 2\)"):
        config(known_C=[[1.0, 0.0]]).build_algo()
    with pytest.raises(ConfigError, match="known_C is no array of numbers"):
        config(known_C=[[1.0, 0.0], [1.0]]).validate()
    with pytest.raises(ConfigError, match="leave normalise_gauge off"):
        config(known_C=np.eye(2, 4).tolist(), normalise_gauge=True).validate()
    with pytest.raises(ConfigError, match="arm_features need known_C"):
        config(arm_features=[[[1.0, 0.0, 0.0, 0.0]]] * 5).validate()
    with pytest.raises(ConfigError, match="a row of arm_features is no combination"):
        config(known_C=np.eye(2, 4).tolist(), arm_features=[[[1.0, 0.0, 0.1, 0.0]]] * 5).validate()
    with pytest.raises(ConfigError, match=r"arm_features is \(4, 1, 4\)"):
        config(known_C=np.eye(2, 4).tolist(), arm_features=[[[1.0, 0.0, 0.0, 0.0]]] * 4).build_algo()
    with pytest.raises(ConfigError, match="observations that are vectors"):
        config().environment("goal_grid").build_algo()
    with pytest.raises(ConfigError, match="has episodes"):
        config().environment("cartpole").build_algo()
    algorithm = config().build_algo()
    algorithm.obs = algorithm.obs.fill_(math.inf)
    with pytest.raises(EnvironmentFault, match="environment 0 gave an infinite observation in round 1"):
        algorithm.training_step()
    algorithm.stop()


def test_noise_is_each_stream_s_own() -> None:
    both = noise_rows([torch.Generator().manual_seed(i) for i in (3, 4)], 5)
    alone = noise_rows([torch.Generator().manual_seed(4)], 5)
    assert torch.equal(both[1:], alone)
