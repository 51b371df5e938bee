"""Methods of both kinds: declared knobs, training, saving and restoring, Tune, several learners."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from ray import tune
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from mobula import registry
from mobula.algorithms.policy_gradient.baselines.ppo import PPOConfig
from mobula.algorithms.policy_gradient.mac import MAC, MACConfig
from mobula.errors import ArtifactError, ConfigError, TrainingFault
from mobula.learning.advantages import gae
from mobula.learning.learners import EstimatorLearner
from mobula.learning.modules import Encoder, TensorModule
from mobula.method import Method, MethodConfig, checkpoint_class, hyperparameter

# A closed-form method: ridge regression ---------------------------------------------------------------------


class RidgeModule(TensorModule):
    gram: Tensor
    moment: Tensor
    weights: Tensor

    def setup(self) -> None:
        size = int(self.observation_space.shape[0])
        self.register_buffer("gram", torch.eye(size, dtype=torch.float64) * self.model_config["ridge"])
        self.register_buffer("moment", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("weights", torch.zeros(size, dtype=torch.float64))

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {"actions": (batch["obs"].double() @ self.weights).unsqueeze(-1).float()}


class RidgeConfig(MethodConfig):
    """Ridge regression of an action on an observation (a closed form for the tests)."""

    needs_env = False
    ridge = hyperparameter(1.0, tune.loguniform(1e-3, 1e3), "weight of the penalty", low=0.0)
    rows = hyperparameter(40, None, "rows of an iteration", low=1)

    def get_default_learner_class(self) -> Any:
        return RidgeLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(module_class=RidgeModule, model_config={"ridge": self.ridge})

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}


class RidgeLearner(EstimatorLearner):
    def estimate(self, state: dict[str, Tensor], batch: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        x, y = batch["x"], batch["y"]
        if x.shape[1] != 3:
            return {"weights": x.new_zeros(x.shape[1])}, {}
        gram = state["gram"] + self.all_reduce(x.T @ x, mean=False)
        moment = state["moment"] + self.all_reduce(x.T @ y, mean=False)
        weights = torch.cholesky_solve(moment[:, None], torch.linalg.cholesky(gram)).squeeze(1)
        return {"gram": gram, "moment": moment, "weights": weights}, {"norm": float(weights.norm())}


def ridge_data(rows: int, iteration: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(iteration)
    x = torch.randn(rows, 3, dtype=torch.float64, generator=g)
    return {"x": x, "y": x @ torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)}


class Ridge(Method, config=RidgeConfig):
    """Ridge regression."""

    def training_step(self) -> None:
        self.learn(ridge_data(self.config.rows, self.iteration))


def ridge_config(**knobs: Any) -> Any:
    box = spaces.Box(-1, 1, (3,), np.float32)
    config = RidgeConfig().environment(
        observation_space=box, action_space=spaces.Box(-9, 9, (1,), np.float32)
    )
    return config.training(**knobs).debugging(seed=0, log_level="ERROR")


def exact_ridge(iterations: int, rows: int = 40, ridge: float = 1.0) -> Tensor:
    data = [ridge_data(rows, i) for i in range(iterations)]
    x, y = torch.cat([d["x"] for d in data]), torch.cat([d["y"] for d in data])
    return torch.linalg.solve(x.T @ x + ridge * torch.eye(3, dtype=torch.float64), x.T @ y)


@pytest.mark.parametrize("learners", [0, 2])
def test_a_closed_form_is_exact_with_one_and_with_two_learners(ray_session: None, learners: int) -> None:
    algorithm = ridge_config().learners(num_learners=learners, num_cpus_per_learner=0.5).build_algo()
    for _ in range(3):
        result = algorithm.train()
    state = algorithm.learner_group.get_state()["learner"]["rl_module"]["default_policy"]
    assert torch.allclose(torch.tensor(state["weights"]), exact_ridge(3))
    assert result["learners"]["default_policy"]["norm"] == pytest.approx(float(exact_ridge(3).norm()))
    # The module that is exported, in double precision too.
    torch.testing.assert_close(algorithm.get_module().weights, exact_ridge(3), rtol=1e-12, atol=1e-12)
    algorithm.stop()


def test_a_closed_form_saves_restores_and_goes_on(ray_session: None, tmp_path: Path) -> None:
    algorithm = ridge_config().build_algo()
    algorithm.train()
    path = algorithm.save_to_path(str(tmp_path / "checkpoint"))
    assert checkpoint_class(path) == f"{__name__}:Ridge"
    for restored in (Ridge.from_checkpoint(path), ridge_config().build_algo()):
        if restored.training_iteration == 0:
            restored.restore_from_path(path)
        restored.train()
        assert torch.allclose(restored.rl_module.weights, exact_ridge(2))
        restored.stop()
    algorithm.stop()


def test_a_closed_form_runs_under_tune(ray_session: None, tmp_path: Path) -> None:
    space = {**ridge_config().to_dict(), "ridge": tune.grid_search([0.5, 50.0])}
    results = tune.Tuner(
        Ridge,
        param_space=space,
        run_config=tune.RunConfig(storage_path=str(tmp_path), stop={"training_iteration": 2}, verbose=0),
    ).fit()
    assert not results.errors
    for result in results:
        norm = result.metrics["learners"]["default_policy"]["norm"]
        assert norm == pytest.approx(float(exact_ridge(2, ridge=result.config["ridge"]).norm()))


def test_an_estimate_that_does_not_fit_the_module_is_refused(ray_session: None) -> None:
    algorithm = ridge_config().build_algo()
    bad = {"x": torch.zeros(2, 4, dtype=torch.float64), "y": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(TrainingFault, match="weights"):
        algorithm.learn(bad)
    bad = {
        "x": torch.full((2, 3), float("inf"), dtype=torch.float64),
        "y": torch.zeros(2, dtype=torch.float64),
    }
    with pytest.raises((TrainingFault, torch.linalg.LinAlgError)):
        algorithm.learn(bad)
    algorithm.stop()


# Knobs ------------------------------------------------------------------------------------------------------


def test_knobs_are_values_on_a_config_and_declarations_on_its_class() -> None:
    assert MACConfig().t_max == 16
    assert MACConfig.t_max.default == 16
    assert MACConfig().training(t_max=8).t_max == 8
    assert MACConfig().t_max == 16
    assert set(MACConfig.search_space()) <= set(MACConfig.hyperparameters())
    assert "c_actor" in MACConfig.search_space()


def test_lists_are_not_shared_between_configs() -> None:
    first = MACConfig()
    first.hidden.append(3)
    assert MACConfig().hidden == [200, 200]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tmax": 8}, "Did you mean 't_max'"),
        ({"t_max": 1}, "at least 2"),
        ({"t_max": 2.5}, "whole number"),
        ({"t_max": "many"}, "a number is needed"),
        ({"t_max": None}, "None"),
        ({"c_actor": float("nan")}, "out of range"),
        ({"c_actor": -1}, "at least 0"),
        ({"kappa_actor": 2}, "0 to 1"),
        ({"features": "tables"}, "one of 'auto'"),
        ({"resample": 1}, "true or false"),
        ({"hidden": 64}, "a list"),
        ({"gamma": 0.9}, "no discount"),
    ],
)
def test_bad_settings_end_in_one_line(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        MACConfig().training(**settings)
    assert "\n" not in str(caught.value)


def test_settings_that_come_around_training_are_checked_too() -> None:
    config = MACConfig().environment("goal_grid")
    config.c_actor = -3.0
    with pytest.raises(ConfigError, match="at least 0"):
        config.validate()
    with pytest.raises(ConfigError, match="Did you mean 'c_actor'"):
        MACConfig().update_from_dict({"c_acto": 1.0})
    config = MACConfig().environment("goal_grid")
    config.gamma = 0.5
    with pytest.raises(ConfigError, match="no discount"):
        config.validate()
    with pytest.raises(ConfigError, match="no environment is set"):
        PPOConfig().validate()


def test_t_max_is_rounded_down_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = MACConfig().environment("goal_grid").training(t_max=20)
    config.validate()
    assert (config.t_max, config.j_max) == (16, 4)
    assert "no power of two" in caplog.text


def test_rllib_s_names() -> None:
    from ray.rllib.algorithms.registry import ALGORITHMS

    assert set(registry.RLLIB_ALGORITHMS) == set(ALGORITHMS)
    for name in registry.RLLIB_ALGORITHMS:
        assert registry.config_class(registry.RLLIB + name)().algo_class is ALGORITHMS[name]()[0]
    assert registry.config_class("ppo") is PPOConfig
    assert registry.name_of(registry.config_class("SAC")()) == "SAC"
    assert registry.name_of(registry.config_class("rllib:PPO")()) == "rllib:PPO"
    with pytest.raises(ConfigError, match=r"Did you mean .*'mac'"):
        registry.config_class("macc")


# Advantages and statistics ----------------------------------------------------------------------------------


def test_gae_against_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    T, B, gamma, lambda_ = 9, 3, 0.9, 0.7
    rewards, values, following = (torch.randn(T, B, generator=g, dtype=torch.float64) for _ in range(3))
    terminated = torch.rand(T, B, generator=g) < 0.2
    done = terminated | (torch.rand(T, B, generator=g) < 0.2)
    found = gae(rewards, values, following, terminated, done, gamma, lambda_)
    for b in range(B):
        for t in range(T):
            total, factor = 0.0, 1.0
            for u in range(t, T):
                bootstrap = 0.0 if terminated[u, b] else gamma * following[u, b]
                total += factor * (rewards[u, b] + bootstrap - values[u, b])
                if done[u, b]:
                    break
                factor *= gamma * lambda_
            assert float(found[t, b]) == pytest.approx(float(total))


def test_running_statistics_are_those_of_all_rows() -> None:
    encoder = Encoder(spaces.Box(-np.inf, np.inf, (3,), np.float32), normalize=True)
    rows = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 7
    for part in rows.split([10, 500, 490]):
        count = torch.tensor(float(len(part)), dtype=torch.float64)
        encoder.update_statistics(count, part.sum(0), part.square().sum(0))
    assert torch.allclose(encoder.mean, rows.mean(0))
    assert torch.allclose(encoder.square, rows.var(0, unbiased=False))
    normal = encoder(rows.float())
    assert torch.allclose(normal.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(normal.std(0), torch.ones(3), atol=1e-2)


# PPO and MAC through RLlib ----------------------------------------------------------------------------------


def ppo(runners: int = 0, seed: int = 3) -> Any:
    config = PPOConfig().environment("cartpole").debugging(seed=seed, log_level="ERROR")
    return config.env_runners(
        num_env_runners=runners, num_cpus_per_env_runner=0.5, num_envs_per_env_runner=16
    )


def train_until(algorithm: Any, target: float, iterations: int) -> float:
    for _ in range(iterations):
        result = algorithm.train()["env_runners"]
        if result.get("episode_return_mean", 0.0) >= target:
            break
    return float(result["episode_return_mean"])


@pytest.mark.parametrize("runners", [0, 2])
def test_ppo_solves_cartpole(ray_session: None, runners: int) -> None:
    algorithm = ppo(runners).build_algo()
    assert train_until(algorithm, 475, 80) >= 475
    evaluation = algorithm.evaluate()["env_runners"]
    assert evaluation["num_episodes"] == 10
    assert evaluation["episode_return_mean"] > 450
    algorithm.stop()


@pytest.mark.parametrize("runners", [0, 2])
def test_the_same_seed_gives_the_same_numbers(ray_session: None, runners: int) -> None:
    runs = []
    for _ in range(2):
        algorithm = ppo(runners).build_algo()
        results = [algorithm.train() for _ in range(3)]
        runs.append(
            [(r["env_runners"]["reward_sum"], r["learners"]["default_policy"]["entropy"]) for r in results]
        )
        weights = algorithm.learner_group.get_weights()["default_policy"]
        runs[-1].append({name: value.sum() for name, value in weights.items()})
        algorithm.stop()
    assert runs[0] == runs[1]


def test_two_learners_take_the_same_first_step_as_one(ray_session: None) -> None:
    """One full-batch step: gradients are averaged over equal shards, so the step is that of the whole batch."""
    weights = []
    for learners in (0, 2):
        config = ppo().training(num_epochs=1, minibatch_size=10**6)
        algorithm = config.learners(num_learners=learners, num_cpus_per_learner=0.5).build_algo()
        algorithm.train()
        weights.append(algorithm.learner_group.get_weights()["default_policy"])
        algorithm.stop()
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], atol=2e-5, err_msg=name)


def test_with_remote_runners_and_a_remote_learner_the_module_is_the_one_that_was_trained(
    ray_session: None,
) -> None:
    algorithm = ppo(1).learners(num_learners=1, num_cpus_per_learner=0.5).build_algo()
    for _ in range(2):
        algorithm.train()
    trained = algorithm.learner_group.get_weights()["default_policy"]
    own = algorithm.get_module().state_dict()
    assert set(trained) <= set(own)
    for name, value in trained.items():
        np.testing.assert_array_equal(own[name].numpy(), value, err_msg=name)
    algorithm.stop()


def test_training_goes_on_after_an_env_runner_dies(ray_session: None) -> None:
    import ray

    algorithm = ppo(2).build_algo()
    algorithm.train()
    manager = algorithm.env_runner_group._worker_manager
    ray.kill(manager.actors()[1], no_restart=False)
    # The lost runner is left out of some iterations (a busy machine starts a process slowly), and then samples again.
    steps: list[int] = []
    while len(steps) < 8 or (steps[-1] < 2 * 16 * 128 and len(steps) < 500):
        steps.append(algorithm.train()["env_runners"]["num_env_steps_sampled"])
    assert min(steps) >= 16 * 128
    assert steps[-1] == 2 * 16 * 128
    assert algorithm.env_runner_group.num_healthy_remote_workers() == 2
    algorithm.stop()


def test_faults_of_remote_environments_reach_the_user(ray_session: None) -> None:
    from mobula.errors import EnvironmentFault

    config = PPOConfig().environment("cartpole", env_config={"gravity": float("nan")})
    algorithm = (
        config.env_runners(num_env_runners=1, num_cpus_per_env_runner=0.5).debugging(seed=0).build_algo()
    )
    with pytest.raises(EnvironmentFault, match="env runner 1"):
        algorithm.train()
    algorithm.stop()


def test_a_checkpoint_of_another_method_is_refused(ray_session: None, tmp_path: Path) -> None:
    algorithm = ppo().build_algo()
    path = algorithm.save_to_path(str(tmp_path / "checkpoint"))
    mac = MACConfig().environment("goal_grid").debugging(log_level="ERROR").build_algo()
    with pytest.raises(ArtifactError, match="checkpoint of PPO, not of MAC"):
        mac.restore_from_path(path)
    algorithm.stop()
    mac.stop()


def test_mac_goes_on_from_a_checkpoint(ray_session: None, tmp_path: Path) -> None:
    config = MACConfig().environment("goal_grid").debugging(seed=1, log_level="ERROR")
    algorithm = config.build_algo()
    algorithm.train()
    path = algorithm.save_to_path(str(tmp_path / "checkpoint"))
    learner = algorithm.learner_group._learner
    restored = MAC.from_checkpoint(path)
    other = restored.learner_group._learner
    assert (other.t, restored.training_iteration) == (learner.t, 1)
    assert torch.equal(other.accumulators, learner.accumulators)
    assert torch.equal(restored.rl_module.theta, algorithm.rl_module.theta)
    assert restored.levels.get_state().equal(algorithm.levels.get_state())
    restored.train()
    algorithm.stop()
    restored.stop()


def test_mac_by_name_under_tune(ray_session: None, tmp_path: Path) -> None:
    config = MACConfig().environment("goal_grid").debugging(seed=0, log_level="ERROR")
    results = tune.Tuner(
        "MAC",
        param_space={**config.to_dict(), "c_actor": tune.grid_search([1.0, 10.0])},
        run_config=tune.RunConfig(storage_path=str(tmp_path), stop={"training_iteration": 1}, verbose=0),
    ).fit()
    assert not results.errors
    assert sorted(result.config["c_actor"] for result in results) == [1.0, 10.0]


def test_a_ray_that_is_started_again_knows_the_names() -> None:
    """Tune forgets with the Ray that it was told in; notebooks shut one down and start another."""
    script = """
import ray
from ray.tune.registry import get_trainable_cls
from mobula.algorithms.policy_gradient.mac import MAC, MACConfig
for _ in range(2):
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    MACConfig()
    assert get_trainable_cls("MAC").__name__ == MAC.__name__
    ray.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
