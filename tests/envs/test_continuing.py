"""The goal grid and the queue: their tables, their steps, their optima; resets as transitions."""

from __future__ import annotations

import pytest
import torch

from mobula.algorithms.common import average_reward as exact
from mobula.envs.classic import CartPole
from mobula.envs.continuing import GoalGrid, Queue, TabularEnv
from mobula.errors import ConfigError
from mobula.sampling.continuing import ContinuingWrapper


@pytest.mark.parametrize("size", [3, 5, 7])
def test_the_optimal_gain_of_the_grid_is_one_over_twice_its_side(size: int) -> None:
    P, R = GoalGrid(1, size=size).model()
    assert P.shape == (size**2 - 1, 5, size**2 - 1)
    gain, _ = exact.relative_value_iteration(P, R)
    assert gain == pytest.approx(1 / (2 * (size - 1)), abs=1e-9)


def test_moves_of_the_grid() -> None:
    env = GoalGrid(5, size=4)
    env.reset(seed=0)
    # From cell (1, 1) = 5: stay, up, down, left, right.
    env.state = {"state": torch.full((5,), 5)}
    obs, reward, *_ = env.step(torch.arange(5))
    assert obs.tolist() == [5, 1, 9, 4, 6]
    assert reward.tolist() == [0.0] * 5
    # The move into the far corner pays 1 and leads to the start; walls hold.
    env.state = {"state": torch.tensor([14, 11, 0, 3, 12])}
    obs, reward, terminated, truncated, _ = env.step(torch.tensor([4, 2, 1, 4, 3]))
    assert obs.tolist() == [0, 0, 0, 3, 12]
    assert reward.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert not (terminated | truncated).any()


def test_walls_block() -> None:
    env = GoalGrid(1, size=5, walls=(2, 7, 17, 22))
    P, R = env.model()
    assert P[1, 4, 1] == 1.0
    assert P[11, 4, 12] == 1.0
    gain, _ = exact.relative_value_iteration(P, R)
    # Row 2 is the one way through: down 2, right 4, down 2 is no longer than without walls.
    assert gain == pytest.approx(1 / 8, abs=1e-9)


@pytest.mark.parametrize("env", [GoalGrid(20_000, size=3), Queue(20_000, cap=4)])
def test_sampled_steps_follow_the_tables(env: TabularEnv) -> None:
    env.reset(seed=1)
    P, R = env.model()
    for state in range(P.shape[0]):
        for action in range(P.shape[1]):
            env.state = {"state": torch.full((20_000,), state)}
            obs, reward, *_ = env.step(torch.full((20_000,), action))
            frequency = torch.bincount(obs, minlength=P.shape[0]) / 20_000
            assert torch.allclose(frequency.double(), P[state, action], atol=0.02)
            assert float(reward.double().mean()) == pytest.approx(float(R[state, action]), abs=0.02)


def test_the_queue_s_tables() -> None:
    rho, cap = 0.5, 3
    P, R = Queue(1, rho=rho, cap=cap, c=0.6).model()
    arrival = rho / (1 + rho)
    assert P.sum(-1) == pytest.approx(torch.ones(cap + 1, 2).double())
    assert float(P[1, 1, 2]) == pytest.approx(arrival)
    assert float(P[1, 0, 1]) == pytest.approx(arrival)
    assert float(P[0, 0, 0]) == pytest.approx(1.0)
    assert float(P[cap, 1, cap]) == pytest.approx(arrival)
    assert float(R[1, 1]) == pytest.approx(0.5 * (1 + arrival - 0.6 / 3))
    assert float(R[cap, 1]) == pytest.approx(0.5 * (1 - 0.6))


def test_the_optimal_queue_is_a_threshold_and_always_accepting_mixes_slowly() -> None:
    P, R = Queue(1).model()
    _, policy = exact.relative_value_iteration(P, R, tolerance=1e-10)
    accepts = policy[:-1].tolist()
    assert accepts == sorted(accepts, reverse=True)
    always = torch.zeros(31, 2, dtype=torch.float64)
    always[:, 1] = 1.0
    assert exact.mixing_time(exact.chain(P, R, always)[0]) > 100


@pytest.mark.parametrize("settings", [{"size": 1}, {"size": 4, "walls": (0,)}, {"size": 4, "walls": (15,)}])
def test_impossible_grids_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match="goal_grid"):
        GoalGrid(1, **settings)


def test_a_reset_becomes_a_transition() -> None:
    inner, plain = CartPole(3, max_episode_steps=20), CartPole(3, max_episode_steps=20)
    env = ContinuingWrapper(inner)
    assert env.continuing
    obs, _ = env.reset(seed=5)
    wanted, _ = plain.reset(seed=5)
    assert torch.equal(obs, wanted)
    ends = 0
    for _ in range(60):
        action = torch.ones(3, dtype=torch.long)
        obs, reward, terminated, truncated, info = env.step(action)
        wanted, r, term, trunc, _ = plain.step(action)
        ends += int((term | trunc).sum())
        assert torch.equal(obs, wanted)
        assert torch.equal(reward, r)
        assert not terminated.any()
        assert not truncated.any()
        assert "final_obs" not in info
    assert ends > 3


def test_the_wrapper_needs_same_step_resets() -> None:
    with pytest.raises(ConfigError, match="same-step"):
        ContinuingWrapper(CartPole(2, autoreset_mode="NextStep"))
