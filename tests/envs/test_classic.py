"""Every step of an episode equals gymnasium's own."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from mobula.envs.classic import Acrobot, CartPole, Pendulum
from mobula.sampling.tensor_env import TensorEnv

CASES = [(CartPole, "CartPole-v1"), (Pendulum, "Pendulum-v1"), (Acrobot, "Acrobot-v1")]


def start(env: TensorEnv, peer: gymnasium.Env, seed: int) -> np.ndarray:
    """Puts the tensor environment where gymnasium's has just been reset to."""
    obs, _ = peer.reset(seed=seed)
    peer.action_space.seed(seed)
    env.reset(seed=0)
    follow(env, peer)
    env.elapsed.zero_()
    return obs


def follow(env: TensorEnv, peer: gymnasium.Env) -> None:
    state = np.asarray(peer.unwrapped.state, dtype=np.float64)
    env.state = {"state": torch.from_numpy(state.copy()).unsqueeze(0)}


@pytest.mark.parametrize(("cls", "name"), CASES)
def test_trajectories_equal_gymnasium_s(cls: type[TensorEnv], name: str) -> None:
    peer, env = gymnasium.make(name), cls(1)
    rng = np.random.default_rng(0)
    ends = 0
    for seed in range(4):
        obs = start(env, peer, seed)
        assert torch.equal(env.observe(env.state)[0], torch.from_numpy(obs))
        for _ in range(600):
            # Acrobot is chaotic: the last bits of a sine, which differ from one processor to another, grow within an episode.
            follow(env, peer)
            action = peer.action_space.sample() if seed else rng.integers(2)
            action = np.asarray(action, dtype=peer.action_space.dtype).reshape(peer.action_space.shape)
            wanted, reward, terminated, truncated, _ = peer.step(action if action.ndim else int(action))
            _, r, term, trunc, info = env.step(torch.as_tensor(action).unsqueeze(0))
            np.testing.assert_allclose(info["final_obs"][0].numpy(), wanted, rtol=0, atol=1e-6)
            assert float(r) == pytest.approx(float(reward), abs=1e-6)
            assert (bool(term), bool(trunc)) == (terminated, truncated)
            if terminated or truncated:
                ends += 1
                break
    assert ends == 4


@pytest.mark.parametrize(("cls", "name"), CASES)
def test_spaces_and_limits_are_gymnasium_s(cls: type[TensorEnv], name: str) -> None:
    peer, env = gymnasium.make(name), cls(3)
    assert env.single_observation_space == peer.observation_space
    assert env.single_action_space == peer.action_space
    assert env.max_episode_steps == peer.spec.max_episode_steps


def test_cartpole_draws_itself() -> None:
    env = CartPole(2, render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (400, 600, 3)
    env.state["state"][0, 0] = 1.5
    assert (env.render() != frame).any()
