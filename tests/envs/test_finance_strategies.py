"""The replay of daily strategies: nothing looks ahead, payoffs are those of a ledger kept by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mobula.envs.finance import strategies
from mobula.envs.finance.sources import load_daily
from mobula.envs.finance.strategies import observations, strategy_replay, weights
from mobula.errors import ConfigError


def walk(T: int = 150, N: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    steps = 0.01 * torch.randn(T, N + 1, dtype=torch.float64, generator=g) * torch.linspace(0.5, 2, N + 1)
    prices = 100 * steps.cumsum(0).exp()
    return prices[:, :N], prices[:, N]


def test_nothing_looks_ahead() -> None:
    """Weights and observations of day t stay what they are when all later prices are gone."""
    prices, index = walk()
    shares, held = weights(prices, index)
    seen = observations(prices, index)
    for t in (70, 100, 149):
        short = weights(prices[: t + 1], index[: t + 1])
        torch.testing.assert_close(short[0][-1], shares[t])
        torch.testing.assert_close(short[1][-1], held[t])
        torch.testing.assert_close(observations(prices[: t + 1], index[: t + 1])[-1], seen[t])


def test_what_the_strategies_hold() -> None:
    prices, index = walk()
    shares, held = weights(prices, index)
    t = 120
    assert held[t, 0] == 1 and held[t, 1] == 0 and float(shares[t, :3].abs().sum()) == 0
    assert held[t, 2] == float(index[t - 19 : t + 1].mean() > index[t - 59 : t + 1].mean())
    week = prices[t] / prices[t - 5] - 1
    assert float(shares[t, 3].abs().sum()) == pytest.approx(1.0)
    assert float(shares[t, 3].sum()) == pytest.approx(0.0, abs=1e-12)
    assert int(shares[t, 3].argmax()) == int(week.argmin())
    daily = prices[1:] / prices[:-1] - 1
    volatility = daily[t - 60 : t].std(0, correction=0)
    assert set(shares[t, 4].nonzero().flatten().tolist()) == set(volatility.argsort()[:2].tolist())
    assert set(shares[t, 5].nonzero().flatten().tolist()) == set(volatility.argsort()[-2:].tolist())
    assert bool(shares[40, 4:].isnan().all()) and bool(held[40, 2].isnan())
    own = index[1:] / index[:-1] - 1
    wanted = [own[t - 1], own[t - 20 : t].std(correction=0), daily[t - 1].std(correction=0)]
    torch.testing.assert_close(
        observations(prices, index)[t],
        torch.stack([*wanted, index[t] / index[t - 21] - 1]),
    )


def test_the_packaged_replay() -> None:
    replay = strategy_replay()
    assert replay.y.shape[1] == 4 and replay.payoffs.shape == (len(replay.dates), len(strategies.STRATEGIES))
    assert len(replay.dates) > 5500 and str(replay.dates[0]) == "2000-01-03"
    assert bool(replay.y.isfinite().all()) and bool(replay.payoffs.isfinite().all())
    assert float(replay.payoffs[:, 1].abs().max()) == 0.0
    market = load_daily("us_index", "1990-01-01")
    day = int((market.dates == replay.dates[10]).nonzero()[0][0])
    price = market.prices[:, 0]
    wanted = (price[day + 1] / price[day] - 1) / replay.scale
    torch.testing.assert_close(replay.payoffs[10, 0], wanted)
    # What was held at the close of the day earns the return to the next.
    stocks = load_daily("us20", "1990-01-01")
    at = int((stocks.dates == replay.dates[10]).nonzero()[0][0])
    held, _ = weights(stocks.prices[: at + 1], price[: day + 1])
    earned = held[-1] @ (stocks.prices[at + 1] / stocks.prices[at] - 1) / replay.scale
    torch.testing.assert_close(replay.payoffs[10, 3:], earned[3:])
    # Standardised on the training block, not on what is played.
    assert abs(float(replay.y[:, 1].mean())) > 0.05
    with pytest.raises(ConfigError, match="less than a year"):
        strategy_replay(train_end="1990-06-01")
    assert np.all(np.diff(replay.dates) > np.timedelta64(0, "D"))
