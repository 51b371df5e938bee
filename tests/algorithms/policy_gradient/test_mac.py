"""MAC and its baselines through RLlib: they learn, in parallel too, and refuse what they cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobula.algorithms.policy_gradient.baselines.average_reward import ACFixedConfig, ReinforceAvgConfig
from mobula.algorithms.policy_gradient.baselines.ppgae import PPGAEConfig
from mobula.algorithms.policy_gradient.mac import MAC, MACConfig, exact_probe, mlmc, weighted_rows
from mobula.artifact import export_policy, load_policy
from mobula.errors import ConfigError, EnvironmentFault, TrainingFault
from mobula.evaluation import evaluate_policy
from mobula.sampling.rollout import Rollout

pytestmark = pytest.mark.usefixtures("ray_session")


def grid(config: Any, size: int = 3, seed: int = 0, **knobs: Any) -> Any:
    made = config.environment("goal_grid", env_config={"size": size}).training(**knobs)
    return made.debugging(seed=seed, log_level="ERROR")


def train(algorithm: Any, steps: int) -> Any:
    while True:
        result = algorithm.train()
        if result["env_runners"]["num_env_steps_sampled_lifetime"] >= steps:
            return result


def gain(algorithm: Any) -> float:
    return exact_probe(algorithm)["exact_gain"]


def test_the_whole_way(tmp_path: Path) -> None:
    """Train, evaluate, save, restore, export, load, act; J* = 1/4."""
    algorithm = grid(MACConfig()).build_algo()
    before = gain(algorithm)
    result = train(algorithm, 6000)
    assert gain(algorithm) > 0.9 * 0.25 > before
    assert result["learners"]["default_policy"]["eta"] == pytest.approx(gain(algorithm), abs=0.1)
    found = algorithm.evaluate()["env_runners"]
    assert found["reward_sum"] / found["num_env_steps_sampled"] == pytest.approx(gain(algorithm), abs=0.02)
    restored = MAC.from_checkpoint(algorithm.save_to_path(str(tmp_path / "checkpoint")))
    assert gain(restored) == gain(algorithm)
    policy = load_policy(export_policy(restored, tmp_path / "policy"))
    reached = evaluate_policy(policy, "goal_grid", steps=20_000, num_envs=16, seed=0, env_config={"size": 3})
    assert reached["reward_per_step"] == pytest.approx(gain(algorithm), abs=0.01)
    algorithm.stop()
    restored.stop()


def test_two_runners_of_two_chains_learn_as_well() -> None:
    config = grid(MACConfig()).env_runners(
        num_env_runners=2,
        num_envs_per_env_runner=2,
        num_cpus_per_env_runner=0.5,
        create_env_on_local_worker=True,
    )
    algorithm = config.build_algo()
    train(algorithm, 24_000)
    assert gain(algorithm) > 0.9 * 0.25
    algorithm.stop()


def test_two_learners_update_as_one() -> None:
    """Each holds half of the rows; the sums are joined before the norm is taken, so the updates are the same."""
    found = []
    for learners in (0, 2):
        config = grid(MACConfig(), report_every=200).env_runners(num_envs_per_env_runner=2)
        algorithm = config.learners(num_learners=learners, num_cpus_per_learner=0.5).build_algo()
        algorithm.train()
        found.append(algorithm.learner_group.get_weights()["default_policy"])
        algorithm.stop()
    for name in ("theta", "omega", "eta"):
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-9)
    assert np.abs(found[0]["theta"]).max() > 0


def test_rows_of_several_runners_give_the_mean_of_their_estimates() -> None:
    g = torch.Generator().manual_seed(0)
    rollouts, wanted = [], []
    for length, chains in ((8, 2), (1, 2), (2, 2)):
        q = torch.rand(length, chains, generator=g)
        names = ("obs", "actions", "new_obs")
        rollouts.append(
            Rollout({"rewards": q, **{name: torch.zeros(length, chains).long() for name in names}})
        )
        level = {8: 3, 2: 1, 1: 9}[length]
        wanted += [mlmc(q[:, chain, None].double(), level, 4) for chain in range(chains)]
    rows = weighted_rows(rollouts, 4)
    assert float((rows["weight"] * rows["rewards"]).sum()) == pytest.approx(float(torch.stack(wanted).mean()))


@pytest.mark.parametrize(
    ("config", "steps", "share"),
    [
        (ACFixedConfig(), 8000, 0.8),
        (PPGAEConfig().training(epoch_length=200, window=4, lr=10.0), 20_000, 0.5),
    ],
)
def test_baselines_learn(config: Any, steps: int, share: float) -> None:
    algorithm = grid(config).build_algo()
    before = gain(algorithm)
    train(algorithm, steps)
    assert gain(algorithm) > max(share * 0.25, 1.5 * before)
    algorithm.stop()


def test_networks_learn_on_boxes() -> None:
    """CartPole as a continuing task: reward 1 at every step, so the gain says nothing; the critic's signal does."""
    config = MACConfig().environment("acrobot").training(hidden=[16, 16], report_every=200)
    algorithm = config.debugging(seed=0, log_level="ERROR").build_algo()
    before = [p.detach().clone() for p in algorithm.rl_module.actor_parameters()]
    result = algorithm.train()
    assert -1.0 <= result["learners"]["default_policy"]["eta"] <= 0.0
    moved = [
        float((p.detach() - q).abs().max())
        for p, q in zip(algorithm.rl_module.actor_parameters(), before, strict=True)
    ]
    # Adagrad's first step is the learning rate in every coordinate that has a gradient.
    assert max(moved) > 0.005
    algorithm.stop()


def test_rewards_outside_the_declared_range_are_refused() -> None:
    algorithm = grid(ReinforceAvgConfig(), r_min=0.0, r_max=0.5).build_algo()
    with pytest.raises(EnvironmentFault, match=r"outside \[r_min, r_max\] = \[0.0, 0.5\]"):
        train(algorithm, 20_000)
    algorithm.stop()


def test_an_estimate_that_is_not_finite_reports_level_length_and_norm() -> None:
    algorithm = grid(MACConfig()).build_algo()
    rows = {name: torch.zeros(4, dtype=torch.int64) for name in ("obs", "actions", "new_obs")}
    rows |= {"rewards": torch.full((4,), float("nan")), "weight": torch.ones(4, dtype=torch.float64)}
    with pytest.raises(TrainingFault, match="J=2, N=4, norms"):
        algorithm.learn(rows, reward_range=(0.0, 1.0), level=2, length=4)
    algorithm.stop()


def test_a_collapsed_policy_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    algorithm = grid(MACConfig(), c_actor=0.0, report_every=50).build_algo()
    with torch.no_grad():
        algorithm.rl_module.theta[:, 0] = 100.0
    algorithm._weights = None
    algorithm.train()
    assert "the policy has collapsed" in caplog.text
    algorithm.stop()


@pytest.mark.parametrize(
    ("config", "env", "says"),
    [
        (MACConfig().training(continuing_wrapper=False), "cartpole", "wrap resets as transitions"),
        (MACConfig().training(features="tabular"), "cartpole", "features='tabular'"),
        (MACConfig().training(features="mlp"), "goal_grid", "features='mlp'"),
        (MACConfig(), "pendulum", "discrete actions"),
        (PPGAEConfig(), "cartpole", "visits states by index"),
    ],
)
def test_spaces_that_a_method_cannot_take(config: Any, env: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.environment(env).debugging(log_level="ERROR").build_algo()


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="longer than epoch_length"):
        grid(PPGAEConfig(), epoch_length=4, window=8).validate()
    with pytest.raises(ConfigError, match="below r_max"):
        grid(MACConfig(), r_min=1.0, r_max=0.0).validate()
