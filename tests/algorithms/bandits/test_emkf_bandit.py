"""EMKF-Bandit: the parts against exact answers, the whole through RLlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobula.algorithms.bandits.emkf_bandit import (
    EMKFBandit,
    EMKFBanditConfig,
    Streams,
    arm_estimates,
    choose,
    noise_rows,
    refit_times,
    thompson_probabilities,
)
from mobula.algorithms.bandits.emkf_experiment import play
from mobula.algorithms.common.linear import kalman
from mobula.algorithms.common.linear.kalman import StateSpace
from mobula.artifact import export_policy, load_policy
from mobula.envs.bandits import draw_instances, draw_paths
from mobula.errors import ConfigError, DataError, EnvironmentFault


def test_estimates_are_ridge_regressions() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, dtype=torch.float64, generator=g)
    r = torch.randn(30, dtype=torch.float64, generator=g)
    context = torch.randn(3, dtype=torch.float64, generator=g)
    B = 0.5 * torch.eye(3, dtype=torch.float64) + x.T @ x
    mean, width = arm_estimates(B[None], (x.T @ r)[None], context)
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
    width = torch.tensor([[4.0, 0.0, 1.0]]).double()
    one = torch.ones(1, 1, dtype=torch.float64)
    noise = torch.tensor([[1.0, 0.0, 0.0, 5.0]]).double()
    assert choose("ts", mean, width, one, noise, 1).tolist() == [0]
    assert choose("ts", mean, width, 0.1 * one, noise, 1).tolist() == [1]
    assert choose("linucb", mean, width, one, noise, 1).tolist() == [0]
    assert choose("greedy", mean, width, one, noise, 1).tolist() == [0]
    assert choose("greedy", mean, width, one, noise, 10**9).tolist() == [1]
    assert refit_times(1600, 500) == [50, 100, 200, 400, 500, 1000, 1500]
    assert refit_times(600, 250) == [50, 100, 200, 250, 500]


def played(seeds: list[int], rounds: int = 320, **options: Any) -> tuple[Streams, torch.Tensor, Any]:
    instance = draw_instances(seeds)
    paths = draw_paths(instance, seeds, rounds)
    streams = Streams(len(seeds), 2, 5, **options)
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


def test_forgetting_weighs_the_past_alike_online_and_after_a_refit() -> None:
    streams, _, _ = played([0], rounds=260, forget=0.98)
    online = streams.B.clone(), streams.f.clone()
    streams.t += 1
    streams._rebuild()
    torch.testing.assert_close(streams.f, online[1])
    torch.testing.assert_close(streams.B, online[0])


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


# Through RLlib --------------------------------------------------------------------------------------------------


def config(**knobs: Any) -> Any:
    made = EMKFBanditConfig().environment("linear_bandit").training(**knobs)
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
    mean, _ = arm_estimates(bandit.B[0], bandit.f[0], wanted[-1])
    assert int(answer["action"]) == int(mean.argmax())
    assert answer["p_best"].sum() == pytest.approx(1.0)
    # A missing observation is a prediction.
    gone = policy.answer([math.nan, math.nan], state=state)
    np.testing.assert_allclose(gone["x_hat"], (bandit.model.A[0] @ wanted[-1]).numpy(), atol=1e-9)
    assert gone["P_trace"] > answer["P_trace"]
    with pytest.raises(DataError, match="shape"):
        policy.act([0.0, 1.0, 2.0])
    for each in (algorithm, restored):
        each.stop()


def test_what_is_refused(ray_session: None) -> None:
    with pytest.raises(ConfigError, match="one batch in one process"):
        config().env_runners(num_env_runners=2).validate()
    with pytest.raises(ConfigError, match=r"known_C is \(1, 2\)"):
        config(known_C=[[1.0, 0.0]]).build_algo()
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
