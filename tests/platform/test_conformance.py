"""Every registered environment conforms, bridged ones do, and a broken one is caught."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from mobula import registry
from mobula.envs.classic import CartPole
from mobula.errors import ConfigError, EnvironmentFault
from mobula.sampling.bridge import GymnasiumBridge, GymView
from mobula.sampling.conformance import check_env

NAMES = [entry.name for entry in registry.envs() if entry.source == "mobula"]


@pytest.mark.parametrize("name", NAMES)
def test_registered_environments_conform(name: str) -> None:
    check_env(functools.partial(registry.make_env, name), steps=600)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Blackjack-v1"])
def test_bridged_environments_conform(name: str) -> None:
    check_env(functools.partial(GymnasiumBridge, name), steps=250)


class NoFinal(CartPole):
    def step(self, actions: Any) -> Any:
        return (*super().step(actions)[:4], {})


class WrongShape(CartPole):
    def transition(self, state: Any, action: Any) -> Any:
        new, reward, terminated = super().transition(state, action)
        return new, reward.unsqueeze(1), terminated


class OutOfRange(CartPole):
    def transition(self, state: Any, action: Any) -> Any:
        new, reward, terminated = super().transition(state, action)
        return new, reward * 2, terminated


class Impure(CartPole):
    def transition(self, state: Any, action: Any) -> Any:
        new, reward, terminated = super().transition(state, action)
        return new, reward * float(self.state["state"][0, 0].abs() < 0.02), terminated


class Unseeded(CartPole):
    def initial(self, n: int) -> Any:
        return {"state": torch.rand(n, 4, dtype=torch.float64) * 0.1 - 0.05}


class InPlace(CartPole):
    def transition(self, state: Any, action: Any) -> Any:
        new, reward, terminated = super().transition(state, action)
        state["state"].copy_(new["state"])
        return state, reward, terminated


class Mislabelled(CartPole):
    continuing = True


class Forgetful(CartPole):
    def get_state(self) -> Any:
        return {**super().get_state(), "generator": torch.Generator().manual_seed(0).get_state()}


class SingleFloat(CartPole):
    def observe(self, state: Any) -> Any:
        return state["state"]


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (NoFinal, "final_obs"),
        (WrongShape, "rewards have shape"),
        (OutOfRange, "declared range"),
        (Impure, "depends on self.state"),
        (Unseeded, "same seed"),
        (InPlace, "changes the state"),
        (Mislabelled, "continuing"),
        (Forgetful, "restored state"),
        (SingleFloat, "float64"),
    ],
)
def test_broken_environments_are_caught(cls: Any, says: str) -> None:
    with pytest.raises(EnvironmentFault, match=says):
        check_env(cls, steps=200)


def test_the_bridge_gives_the_last_observation_of_an_episode() -> None:
    env = GymnasiumBridge("CartPole-v1", 2, max_episode_steps=7)
    peers = [gymnasium.make("CartPole-v1", max_episode_steps=7) for _ in range(2)]
    seeds = [int(word) for word in np.random.SeedSequence(3).generate_state(2)]
    obs, _ = env.reset(seed=3)
    for peer, seed, row in zip(peers, seeds, obs, strict=True):
        assert np.array_equal(peer.reset(seed=seed)[0], row.numpy())
    for step in range(7):
        wanted = [peer.step(1)[0] for peer in peers]
        obs, _, terminated, truncated, info = env.step(torch.ones(2, dtype=torch.long))
        assert np.allclose(info["final_obs"].numpy(), wanted)
        assert not terminated.any()
        assert truncated.tolist() == [step == 6] * 2
    assert not torch.equal(obs, info["final_obs"])


def test_the_bridge_flattens_dictionaries() -> None:
    gymnasium.register("DictObs-v0", entry_point=DictObs)
    env = GymnasiumBridge("DictObs-v0", 3)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (3, 5)


class DictObs(gymnasium.Env):
    observation_space = spaces.Dict({"a": spaces.Box(0, 1, (2,)), "b": spaces.Discrete(3)})
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return {"a": np.zeros(2, np.float32), "b": 1}, {}

    def step(self, action: Any) -> Any:
        return {"a": np.ones(2, np.float32), "b": 2}, 0.0, False, False, {}


@pytest.mark.parametrize(
    ("name", "says"),
    [("CartPol-v1", "Did you mean .*CartPole"), ("gymnasium:HalfCheeta-v5", "HalfCheetah")],
)
def test_unknown_environments_name_the_nearest(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        registry.make_env(name)


def test_unknown_settings_of_an_environment_are_refused() -> None:
    with pytest.raises(ConfigError, match="sizes"):
        registry.make_env("goal_grid", sizes=3)
    with pytest.raises(ConfigError, match="wings"):
        registry.make_env("gymnasium:CartPole-v1", wings=2)


def test_a_gymnasium_view_passes_gymnasium_s_own_check() -> None:
    from gymnasium.utils.env_checker import check_env as gymnasium_check

    gymnasium_check(GymView(CartPole(1)), skip_render_check=True)
