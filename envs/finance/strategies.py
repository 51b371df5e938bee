"""Six plain daily strategies and four observations of the market: the replay in which bandits choose a strategy a day.

Every weight and every observation of day t is made of prices up to the close of t; the payoff of day t is the return from the
close of t to that of t + 1.  The replay is exact: what every strategy would have earned is known afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.envs.finance.sources import load_daily
from mobula.errors import ConfigError, DataError

STRATEGIES = ("index", "cash", "momentum 20/60", "reversal 5", "low volatility", "high volatility")
LONGEST = 60


def moving_mean(x: Tensor, days: int) -> Tensor:
    """Mean over the last `days` rows, [T, ...]; NaN where there are fewer."""
    total = torch.cat([x.new_zeros(1, *x.shape[1:]), x.cumsum(0)])
    mean = (total[days:] - total[:-days]) / days
    return torch.cat([x.new_full((days - 1, *x.shape[1:]), torch.nan), mean])


def moving_std(x: Tensor, days: int) -> Tensor:
    """Population standard deviation over the last `days` rows, [T, ...]; NaN where there are fewer."""
    windows = x.unfold(0, days, 1).std(-1, correction=0)
    return torch.cat([x.new_full((days - 1, *x.shape[1:]), torch.nan), windows])


def weights(prices: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """What the strategies hold at each close: weights of the shares [T, 6, N] and of the index [T, 6].

    prices [T, N], index [T].  In the order of STRATEGIES: the index; nothing; the index where its 20-day mean price is above
    its 60-day mean; minus the 5-day return of each share beside their mean, at gross exposure 1; the quarter of the shares with
    the least, or the most, 60-day volatility, in equal parts.  NaN where history is too short.
    """
    T, N = prices.shape
    returns = torch.cat([prices.new_full((1, N), torch.nan), prices[1:] / prices[:-1] - 1])
    shares, held = prices.new_zeros(T, 6, N), prices.new_zeros(T, 6)
    held[:, 0] = 1.0
    slow = moving_mean(index, 60)
    held[:, 2] = torch.where(slow.isnan(), torch.nan, (moving_mean(index, 20) > slow).double())
    week = torch.cat([prices.new_full((5, N), torch.nan), prices[5:] / prices[:-5] - 1])
    against = week.mean(1, keepdim=True) - week
    shares[:, 3] = against / against.abs().sum(1, keepdim=True)
    volatility = torch.cat([returns[:1], moving_std(returns[1:], 60)])
    known = ~volatility.isnan().any(1, keepdim=True)
    size = max(N // 4, 1)
    for place, largest in ((4, False), (5, True)):
        best = torch.nan_to_num(volatility).topk(size, dim=1, largest=largest).indices
        equal = torch.zeros_like(prices).scatter(1, best, 1.0 / size)
        shares[:, place] = torch.where(known, equal, torch.nan)
    return shares, held


def observations(prices: Tensor, index: Tensor) -> Tensor:
    """[T, 4] at each close: return of the index, its 20-day volatility, dispersion of the shares' returns, its 21-day return."""
    returns = torch.cat([prices.new_full((1, prices.shape[1]), torch.nan), prices[1:] / prices[:-1] - 1])
    own = torch.cat([index.new_full((1,), torch.nan), index[1:] / index[:-1] - 1])
    month = torch.cat([index.new_full((21,), torch.nan), index[21:] / index[:-21] - 1])
    volatility = torch.cat([own[:1], moving_std(own[1:], 20)])
    return torch.stack([own, volatility, returns.std(1, correction=0), month], 1)


@dataclass(frozen=True)
class Replay:
    """y [T, 4] standardised observations; payoffs [T, 6] of every strategy over the next day, in units of the training
    volatility of the index (`scale`, a daily return); dates [T] of the decisions.
    """

    y: Tensor
    payoffs: Tensor
    dates: np.ndarray[Any, Any]
    scale: float


def strategy_replay(
    universe: str = "us20", start: str = "1990-01-01", train_end: str = "2000-01-01"
) -> Replay:
    """The days from `train_end` on; means, deviations and the scale come from [start, train_end) alone."""
    shares, market = load_daily(universe, start), load_daily("us_index", start)
    both = np.intersect1d(shares.dates, market.dates)
    prices = shares.prices[torch.from_numpy(np.isin(shares.dates, both))]
    index = market.prices[torch.from_numpy(np.isin(market.dates, both)), 0]
    if bool(prices.isnan().any()):
        raise DataError(f"{universe}: a share has no price on some day from {start} on: choose a later start")
    stock, held = weights(prices, index)
    later = prices[1:] / prices[:-1] - 1, index[1:] / index[:-1] - 1
    earned = torch.einsum("tkn,tn->tk", stock[:-1], later[0]) + held[:-1] * later[1][:, None]
    seen = observations(prices, index)[:-1]
    dates = both[:-1]
    # The last training day is one whose payoff is known before the first decision.
    train = torch.from_numpy(both[1:] < np.datetime64(train_end))
    train[:LONGEST] = False
    live = torch.from_numpy(dates >= np.datetime64(train_end))
    if int(train.sum()) < 252 or not bool(live.any()):
        raise ConfigError(f"train_end {train_end} leaves less than a year to train on, or nothing to play")
    scale = float(later[1][train].std())
    y = (seen - seen[train].mean(0)) / seen[train].std(0)
    return Replay(y[live], (earned / scale)[live], dates[live.numpy()], scale)
