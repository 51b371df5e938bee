"""Exported policies: they act as in training, load without Ray, and are refused when anything about them is off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from mobula import registry
from mobula.algorithms.policy_gradient.baselines.ppo import PPOConfig
from mobula.algorithms.policy_gradient.mac import MACConfig
from mobula.artifact import export_policy, load_policy, space_from_json, space_to_json
from mobula.errors import ArtifactError, DataError
from mobula.evaluation import evaluate_policy


@pytest.fixture(scope="module")
def trained(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A PPO on pendulum (continuous actions, statistics of observations) and its exported policy."""
    config = PPOConfig().environment("pendulum").debugging(seed=0, log_level="ERROR")
    config.training(normalize_observations=True, normalize_rewards=True, gamma=0.9)
    algorithm = config.evaluation(evaluation_duration=200).build_algo()
    for _ in range(10):
        algorithm.train()
    path = export_policy(algorithm, tmp_path_factory.mktemp("policy") / "policy")
    yield algorithm, path
    algorithm.stop()


def test_a_loaded_policy_computes_what_the_module_computes(trained: Any) -> None:
    algorithm, path = trained
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    with torch.no_grad():
        mean = algorithm.get_module()._forward_inference({"obs": torch.as_tensor(obs)})["action_dist_inputs"][
            :, :1
        ]
    wanted = 2 * mean.clamp(-1, 1).numpy()
    policy = load_policy(path)
    np.testing.assert_allclose(policy.act(obs), wanted, atol=1e-6)
    assert policy.act(obs[0]).shape == (1,)
    assert policy.act(obs.reshape(5, 10, 3)).shape == (5, 10, 1)


def test_its_mean_return_is_that_of_evaluate(trained: Any) -> None:
    algorithm, path = trained
    wanted = algorithm.evaluate()["env_runners"]
    assert wanted["num_episodes"] == 200
    found = np.array(evaluate_policy(load_policy(path), "pendulum", episodes=200, seed=1)["returns"])
    error = np.hypot(found.std(), found.std()) / 200**0.5
    assert abs(found.mean() - wanted["episode_return_mean"]) < 4 * error
    # The statistics of observations matter: without them the policy is another one.
    broken = load_policy(path)
    broken.module.encoder.mean.add_(1.0)
    worse = np.mean(evaluate_policy(broken, "pendulum", episodes=50, seed=1)["returns"])
    assert worse < found.mean() - 4 * error


def test_sampled_actions_have_the_training_distribution(trained: Any) -> None:
    _, path = trained
    policy = load_policy(path)
    policy.seed(3)
    obs = np.zeros((4000, 3), np.float32)
    answer = policy.answer(obs, explore=True)
    with torch.no_grad():
        inputs = policy.module._forward_exploration({"obs": torch.zeros(1, 3)})["action_dist_inputs"]
    mean, std = float(inputs[0, 0]), float(inputs[0, 1].exp())
    wanted = 2 * np.clip(mean + std * np.random.default_rng(0).normal(size=200_000), -1, 1)
    assert float(answer["action"].mean()) == pytest.approx(wanted.mean(), abs=0.08)
    policy.seed(3)
    assert np.array_equal(policy.answer(obs, explore=True)["action"], answer["action"])


def test_it_loads_and_acts_in_a_process_without_ray_running(trained: Any) -> None:
    _, path = trained
    code = (
        "import sys, numpy, mobula, ray\n"
        "import pickle; pickle.load = pickle.loads = None\n"
        "policy = mobula.load_policy(sys.argv[1])\n"
        "print(policy.act(numpy.zeros(3)).shape, ray.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("(1,) False")


def test_mac_serves_the_fields_of_its_description(ray_session: None, tmp_path: Path) -> None:
    config = MACConfig().environment("goal_grid", env_config={"size": 3}).debugging(seed=0, log_level="ERROR")
    algorithm = config.build_algo()
    algorithm.train()
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    answer = policy.answer([0, 5])
    assert set(answer) == {
        "action",
        "log_probability",
        "probabilities",
        "differential_value",
        "avg_reward_estimate",
    }
    pi = algorithm.rl_module.theta.detach().softmax(-1).numpy()
    np.testing.assert_array_equal(answer["probabilities"], pi[[0, 5]])
    assert answer["avg_reward_estimate"].tolist() == [float(algorithm.rl_module.eta)] * 2
    example = policy.example()
    assert json.loads(json.dumps(example)) == example
    for obs in (8, -1, 2.5, [[0.5]], "zero"):
        with pytest.raises(DataError, match=r"^obs "):
            policy.act(obs)
    algorithm.stop()


def test_an_rllib_algorithm_can_be_exported(ray_session: None, tmp_path: Path) -> None:
    config = (
        registry.config_class("rllib:PPO")().environment("CartPole-v1").debugging(seed=0, log_level="ERROR")
    )
    algorithm = config.training(
        train_batch_size_per_learner=200, minibatch_size=100, num_epochs=1
    ).build_algo()
    algorithm.train()
    policy = load_policy(export_policy(algorithm, tmp_path / "policy"))
    obs = np.random.default_rng(1).normal(size=(20, 4)).astype(np.float32)
    with torch.no_grad():
        wanted = algorithm.get_module().forward_inference({"obs": torch.as_tensor(obs)})["action_dist_inputs"]
    np.testing.assert_array_equal(policy.act(obs, explore=False), wanted.argmax(-1).numpy())
    algorithm.stop()


def test_connectors_that_a_policy_cannot_hold_are_named(ray_session: None, tmp_path: Path) -> None:
    from ray.rllib.connectors.env_to_module import MeanStdFilter

    config = (
        registry.config_class("rllib:PPO")().environment("CartPole-v1").debugging(seed=0, log_level="ERROR")
    )
    config.env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
    algorithm = config.build_algo()
    with pytest.raises(ArtifactError, match="MeanStdFilter"):
        export_policy(algorithm, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
    algorithm.stop()


def copy(path: Path, to: Path) -> Path:
    to.mkdir()
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_truncated_or_tampered_artefacts_are_refused(trained: Any, tmp_path: Path) -> None:
    _, path = trained
    for index, (name, change, says) in enumerate(
        [
            ("weights.safetensors", lambda data: data[:-5], "truncated or has been changed"),
            (
                "weights.safetensors",
                lambda data: data[:-1] + bytes([data[-1] ^ 1]),
                "truncated or has been changed",
            ),
            ("policy.json", lambda data: data[: len(data) // 2], "truncated or damaged"),
            ("policy.json", lambda data: data.replace(b'"unsquash"', b'"none"'), "has been changed"),
            (
                "policy.json",
                lambda data: data.replace(b'"method": "PPO"', b'"method": "mac"'),
                "has been changed",
            ),
            ("policy.json", lambda data: b'{"format": "else"}', "does not describe"),
            ("policy.json", lambda data: b"[]", "does not describe"),
        ]
    ):
        broken = copy(path, tmp_path / str(index))
        (broken / name).write_bytes(change((broken / name).read_bytes()))
        with pytest.raises(ArtifactError, match=says) as caught:
            load_policy(broken)
        assert "\n" not in str(caught.value)
    (copy(path, tmp_path / "short") / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"weights.safetensors is missing"):
        load_policy(tmp_path / "short")


def test_bad_observations_are_named(trained: Any) -> None:
    policy = load_policy(trained[1])
    with pytest.raises(DataError, match=r"shape \(4,\); \(3,\) is expected"):
        policy.act(np.zeros(4))
    with pytest.raises(DataError, match="NaN"):
        policy.act(np.array([0.0, np.nan, 0.0]))
    with pytest.raises(DataError, match="no array of numbers"):
        policy.act(["a", "b", "c"])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (3,), np.float32),
        spaces.Box(np.array([-1, -np.inf], np.float32), np.array([2, 5], np.float32), dtype=np.float32),
        spaces.Box(0, 255, (4, 4, 3), np.uint8),
        spaces.Discrete(7, start=2),
        spaces.MultiDiscrete([3, 4]),
        spaces.MultiBinary(5),
    ],
)
def test_spaces_survive_json(space: Any) -> None:
    assert space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False))) == space


def test_onnx_models_equal_torch(trained: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra mobula[onnx]")
    policy = load_policy(trained[1])
    assert policy.export_onnx(tmp_path / "policy.onnx") < 1e-4
    session = onnxruntime.InferenceSession((tmp_path / "policy.onnx").read_bytes())
    obs = np.random.default_rng(0).normal(size=(33, 3)).astype(np.float32)
    _, action = session.run(None, {"obs": obs})
    np.testing.assert_allclose(action, policy.act(obs, explore=False), atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.onnx"]
