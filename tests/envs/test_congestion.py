"""The congestion game as an environment: conformance, its equilibrium, its rewards."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from mobula.envs.markets.congestion import CongestionGame
from mobula.envs.markets.design import evaluate
from mobula.errors import ConfigError
from mobula.sampling.conformance import check_env


@pytest.mark.parametrize(
    "settings", [{}, {"network": "hearn9"}, {"network": "hearn9", "objective": "revenue"}]
)
def test_conformance(settings: dict[str, str]) -> None:
    check_env(functools.partial(CongestionGame, **settings), steps=40, num_envs=3)


def test_users_end_at_the_equilibrium_of_a_design_that_stays() -> None:
    env = CongestionGame(2, network="braess5", spread=0.0, days=300)
    env.reset(seed=0)
    y = np.array([[0.9309, 0.0162, 0.0162, 0.0, 0.9309], [0.5, 0.1, 0.0, 1.0, 0.2]])
    for _ in range(3):
        obs, reward, *_ = env.step(torch.as_tensor(y))
    for i in range(2):
        wanted = evaluate(env.problem, y[i])
        np.testing.assert_allclose(
            obs[i].numpy(), wanted.x / (env.problem.network.capacity + y[i]), atol=2e-3
        )
        gain = (env.bounds.objective - wanted.objective) / env.bounds.objective
        assert float(reward[i]) == pytest.approx(gain, abs=1e-3)


def test_nothing_set_nothing_gained() -> None:
    env = CongestionGame(1, spread=0.0)
    env.reset(seed=0)
    _, reward, *_ = env.step(torch.zeros(1, 5))
    assert abs(float(reward)) < 1e-3
    best = torch.tensor([[0.9309, 0.0162, 0.0162, 0.0, 0.9309]])
    for _ in range(40):
        _, reward, *_ = env.step(best)
    assert float(reward) == pytest.approx((33.182950 - 28.919781) / 33.182950, abs=1e-3)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="days >= 1"):
        CongestionGame(days=0)
