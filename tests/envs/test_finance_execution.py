"""Optimal execution: Almgren and Chriss's formulas, a constrained least squares, backward induction, simulated paths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mobula.envs.finance.execution import Execution, Market
from mobula.errors import ConfigError

# Section 4 of Almgren and Chriss (2000): a million shares in five days, 30 % a year on a price of 50.
PAPER = {"shares": 1e6, "days": 5.0, "trades": 5, "volatility": 0.3}


def published(m: Market) -> tuple[float, float]:
    """(E, V) of the optimal schedule by the paper's equations (20), with hyperbolic functions as they stand."""
    kappa = math.acosh(0.5 * m.risk_aversion * m.sigma**2 / m.eta * m.tau**2 + 1) / m.tau
    T, X, tau, s = m.days, m.shares, m.tau, math.sinh
    mean = 0.5 * m.permanent * X**2 + m.spread * X
    mean += (
        m.eta * X**2 * math.tanh(kappa * tau / 2) * (tau * s(2 * kappa * T) + 2 * T * s(kappa * tau))
    ) / (2 * tau**2 * s(kappa * T) ** 2)
    variance = (
        0.5 * m.sigma**2 * X**2 * (tau * s(kappa * T) * math.cosh(kappa * (T - tau)) - T * s(kappa * tau))
    )
    return mean, variance / (s(kappa * T) ** 2 * s(kappa * tau))


def played(env: Any, fractions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(undiscounted rewards [N, B], last state) of one episode."""
    env.reset(seed=0)
    rewards = []
    for fraction in fractions:
        action = fraction.float().expand(env.num_envs)[:, None]
        env.state, reward, ended = env.transition(env.state, action)
        rewards.append(reward)
    assert bool(ended.all())
    return torch.stack(rewards), env.state


def fractions_of(sold: Tensor) -> Tensor:
    return sold / sold.flip(0).cumsum(0).flip(0)


@pytest.mark.parametrize("given", [{}, PAPER, {"risk_aversion": 1e-5}, {"days": 30.0, "trades": 90}])
def test_the_schedule_is_the_optimum(given: dict[str, Any]) -> None:
    m = Market(**given)
    sold = m.schedule()
    assert float(sold.sum()) == pytest.approx(m.shares, rel=1e-12)
    mean, variance = m.cost(sold)
    assert (float(mean), float(variance)) == pytest.approx(published(m), rel=1e-9)
    # The same by the quadratic program min n' H n with 1' n = X: H n is a multiple of 1.
    N = m.trades
    # With the constraint, x_k = sum_{j > k} n_j.
    after = torch.triu(torch.ones(N, N, dtype=torch.float64), 1)[:-1]
    H = m.eta / m.tau * torch.eye(N).double() + m.risk_aversion * m.sigma**2 * m.tau * after.T @ after
    direction = torch.cholesky_solve(torch.ones(N, 1).double(), torch.linalg.cholesky(H))[:, 0]
    torch.testing.assert_close(sold, m.shares * direction / direction.sum(), rtol=1e-9, atol=1e-6)
    # And by backward induction.
    c, f = m.continuation()
    torch.testing.assert_close(fractions_of(sold), f[1:].flip(0), rtol=1e-9, atol=1e-9)
    whole = float(m.utility(torch.tensor(m.shares).double(), c[-1]))
    assert whole == pytest.approx(float(mean + m.risk_aversion * variance), rel=1e-12)


def test_limits() -> None:
    assert Market(**PAPER).sigma == pytest.approx(0.95, abs=2e-3)
    even = Market(risk_aversion=0.0).schedule()
    torch.testing.assert_close(even, torch.full_like(even, 5e5 / 60))
    # Small risk aversion tends to it, without cancellation.
    torch.testing.assert_close(Market(risk_aversion=1e-16).schedule(), even, rtol=1e-6, atol=0)
    # A great one sells at once; kappa T is beyond the range of sinh.
    haste = Market(risk_aversion=1e3).schedule()
    assert bool(haste.isfinite().all())
    assert float(haste[0]) == pytest.approx(5e5, rel=1e-6)
    assert float(Market(trades=1, days=1.0).schedule()) == pytest.approx(5e5)
    # The specification's preset: an even schedule costs more than twice the optimum.
    m = Market()
    mean, variance = m.cost(even)
    optimum = float(m.utility(torch.tensor(m.shares).double(), m.continuation()[0][-1]))
    assert float(mean + m.risk_aversion * variance) > 2 * optimum


@pytest.mark.parametrize("given", [{}, PAPER])
def test_rewards_add_up_to_the_cost_of_the_schedule(given: dict[str, Any]) -> None:
    env = Execution(3, **given)
    m, N = env.market, env.market.trades
    fixed = 0.5 * m.permanent * m.shares**2 + m.spread * m.shares
    g = torch.Generator().manual_seed(0)
    for fractions in (m.continuation()[1][1:].flip(0), torch.rand(N, generator=g, dtype=torch.float64)):
        rewards, state = played(env, fractions)
        assert bool((state["shares"] == 0).all())
        used = fractions.float().double()
        used[-1] = 1.0
        before = torch.cat([torch.ones(1).double(), (1 - used).cumprod(0)[:-1]])
        mean, variance = m.cost(m.shares * before * used)
        wanted = -(mean + m.risk_aversion * variance - fixed) / env.optimum
        torch.testing.assert_close(rewards.sum(0), wanted.expand(3), rtol=1e-9, atol=0)
    best, _ = played(env, m.continuation()[1][1:].flip(0))
    c = m.continuation()[0][-1]
    assert float(best.sum(0)[0]) == pytest.approx(-float(c) * m.shares**2 / env.optimum, rel=1e-6)


def test_shortfall_has_the_mean_and_variance_of_the_formulas() -> None:
    env = Execution(20_000)
    m = env.market
    _, state = played(env, fractions_of(m.schedule()))
    mean, variance = m.cost(m.schedule())
    found = state["shortfall"]
    assert float((found.mean() - mean) / (variance / 20_000).sqrt()) == pytest.approx(0.0, abs=3.0)
    # The variance of a Gaussian's sample variance is 2 V^2 / n.
    assert float(found.var() / variance) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 20_000))


def test_prices_without_noise() -> None:
    env = Execution(1, trades=3, days=6.0, volatility=0.0)
    _, state = played(env, torch.tensor([0.5, 0.25, 0.0]).double())
    sold = 5e5 * torch.tensor([0.5, 0.125, 0.375]).double()
    prices = 50.0 - 2.5e-7 * torch.tensor([0.0, sold[0], sold[0] + sold[1]]).double()
    paid = prices - 1 / 16 - 2.5e-6 / 2.0 * sold
    torch.testing.assert_close(state["shortfall"][0], 5e5 * 50.0 - (sold * paid).sum(), rtol=1e-9, atol=0)
    assert float(state["price"][0]) == pytest.approx(50.0 - 2.5e-7 * 5e5)


@pytest.mark.parametrize("remaining", [False, True])
def test_the_reference_s_reward(remaining: bool) -> None:
    env = Execution(1, trades=4, days=4.0, reward="reference", remaining_time=remaining)
    m = env.market
    c = m.continuation()[0]
    rewards, _ = played(env, torch.tensor([0.5, 0.5, 0.0, 0.3]).double())
    held = 5e5 * torch.tensor([1.0, 0.5, 0.25, 0.25, 0.0]).double()
    over = torch.tensor([4, 3, 2, 1, 0]) if remaining else torch.full((5,), 4)
    u = m.utility(held, c[over])
    torch.testing.assert_close(rewards[:, 0], 1 - u[1:] / u[:-1], rtol=1e-9, atol=1e-12)
    # Sold out, nothing falls any more.
    rewards, _ = played(env, torch.ones(4).double())
    torch.testing.assert_close(rewards[:, 0], torch.tensor([1.0, 0.0, 0.0, 0.0]).double())


def test_what_is_seen() -> None:
    env = Execution(2, trades=3, days=3.0)
    obs, _ = env.reset(seed=1)
    torch.testing.assert_close(obs, torch.tensor([0, 0, 0, 0, 0, 0, 1.0, 1.0]).expand(2, 8))
    before = env.state["price"].clone()
    obs, *_ = env.step(torch.full((2, 1), 0.25))
    unit = env.market.sigma / env.market.price
    torch.testing.assert_close(obs[:, 5], ((env.state["price"] / before).log() / unit).float())
    torch.testing.assert_close(obs[:, 6:], torch.tensor([2 / 3, 0.75]).expand(2, 2))
    assert bool((obs[:, :5] == 0).all())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"reward": "cash"}, "reward is 'cash'"),
        ({"shares": 0.0}, "above 0"),
        ({"spread": -1.0}, "at least 0"),
        ({"permanent": 1e-4}, "trades of any size pay"),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Execution(1, **wrong)
