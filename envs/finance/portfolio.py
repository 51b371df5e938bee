"""Portfolio allocation in weights, with the exact remainder factor of transaction costs.

Two forms of FinRL-Meta's task (Liu et al., arXiv 2112.06753): observations of stacked covariances and indicators, or a window of
prices; here both have a cash asset, costs by symbol and direction, and halts.  The remainder factor is that of Jiang, Xu and
Liang (arXiv 1706.10059), solved to 1e-12.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mobula.envs.finance import tensors
from mobula.envs.finance.market_env import MarketEnv, uniform
from mobula.envs.finance.tensors import MarketTensor
from mobula.errors import ConfigError
from mobula.sampling.tensor_env import State

FORMS = ("window", "covariance")


def rebalance(
    drifted: Tensor, target: Tensor, buy: Tensor, sell: Tensor, tradable: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """From drifted to target weights: what is left of the value after costs, mu.

    drifted, target  [..., N + 1] weights before and wanted, cash first, each summing to 1
    buy, sell        [N] proportional costs
    tradable         [..., N] bool; a symbol that cannot be traded keeps its position, and the others share what is left of
                     the value in the proportions of their targets

    mu = 1 - sum_i buy_i (mu w_i - w~_i)^+ + sell_i (w~_i - mu w_i)^+ over the symbols: the right-hand side moves by at most
    max(buy, sell) times a change of mu, so that its iteration reaches 1e-12 in a number of steps that is known beforehand.

    Returns (weights after the trade [..., N + 1], mu [...], turnover [...]: sum_i |mu w_i - w~_i|).
    """
    held, u = drifted[..., 1:], target[..., 1:]
    frozen = torch.zeros_like(drifted[..., 0])
    if tradable is not None and not bool(tradable.all()):
        u = u * tradable
        share = target[..., 0] + u.sum(-1)
        u = torch.where(share[..., None] > 0, u / share.clamp_min(1e-300)[..., None], 0.0)
        fixed = held * ~tradable
        frozen = fixed.sum(-1)
    else:
        fixed = None
    worst = float(torch.maximum(buy.max(), sell.max()))
    rounds = 1 if worst == 0 else math.ceil(math.log(1e-14) / math.log(min(worst, 0.99)))
    mu = torch.ones_like(frozen)
    for _ in range(rounds):
        gap = (mu - frozen)[..., None] * u - held
        if fixed is not None:
            gap = gap + fixed
        mu = 1 - (buy * gap.clamp_min(0.0) + sell * (-gap).clamp_min(0.0)).sum(-1)
    position = (mu - frozen)[..., None] * u
    if fixed is not None:
        position = position + fixed
    after = torch.cat([(mu - position.sum(-1))[..., None].clamp_min(0.0), position], -1) / mu[..., None]
    return after, mu, (position - held).abs().sum(-1)


def grow(weights: Tensor, growth: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [..., N + 1] after prices moved by `growth` [..., N], growth of the value [...])."""
    worth = torch.cat([weights[..., :1], weights[..., 1:] * growth], -1)
    total = worth.sum(-1)
    return worth / total[..., None], total


class PortfolioAllocation(MarketEnv):
    """Choose the weights of cash and N assets at every bar; costs by the exact remainder factor (FinRL-Meta's task, mended).

    Action [-1, 1]^(N + 1), cash first: weights softmax(concentration * a).  Reward: 100 log(V'/V) (or `value`, or `simple`).

    Observation, float32: weights of cash and symbols, the turbulence flag, then, with form="window" (N L), the closes of the last L =
    `lookback` bars as log-ratios to the last one in percent; with form="covariance" (N N + N (F + 2)), the covariance of the last
    `window` returns times 1e4 and the relative features.
    """

    account_fields = ("weights", "value", "paid", "traded")

    def __init__(
        self,
        num_envs: int = 1,
        *,
        form: str = "window",
        lookback: int = 20,
        window: int = 252,
        reward: str = "log",
        concentration: float = 3.0,
        initial_weights: Any = None,
        with_cash: bool = True,
        **kwargs: Any,
    ) -> None:
        """Besides the settings of `MarketEnv`:

        form             window or covariance (what is observed)
        lookback, window bars of the price window; returns behind each covariance
        reward           log (100 log V'/V), simple (100 (V'/V - 1)) or value (V' over the first value: what the reference
                         uses; it does not settle)
        concentration    scale of the action inside the softmax
        initial_weights  first weights, cash first (default: all cash)
        with_cash        False: weights of the symbols alone (the action keeps its first entry, without effect)
        """
        if form not in FORMS:
            raise ConfigError(f"portfolio: form is {form!r}; it is one of {', '.join(FORMS)}")
        if reward not in ("log", "simple", "value"):
            raise ConfigError(f"portfolio: reward is {reward!r}; it is 'log', 'simple' or 'value'")
        if lookback < 1 or window < 2 or not concentration > 0:
            raise ConfigError("portfolio: lookback >= 1, window >= 2 and concentration > 0 are needed")
        self.form, self.lookback, self.window, self.reward_kind = form, lookback, window, reward
        self.concentration, self.with_cash = float(concentration), with_cash
        self._given = initial_weights
        super().__init__(num_envs, width=type(self)._spaces, **kwargs)

    def _spaces(self) -> dict[str, Any]:
        given, N = self._given, self.N
        if given is None:
            given = [1.0] + [0.0] * N if self.with_cash else [0.0] + [1.0 / N] * N
        self.start_weights = torch.as_tensor(given, dtype=torch.float64, device=self.device)
        if self.start_weights.shape != (N + 1,) or bool((self.start_weights < 0).any()):
            raise ConfigError(f"portfolio: initial_weights needs {N + 1} weights of at least 0, cash first")
        if abs(float(self.start_weights.sum()) - 1) > 1e-9:
            raise ConfigError("portfolio: initial_weights must sum to 1")
        return {
            "observation_space": spaces.Box(-np.inf, np.inf, (self.rows.shape[1],), np.float32),
            "action_space": spaces.Box(-1.0, 1.0, (N + 1,), np.float32),
        }

    def tables(self, market: MarketTensor) -> None:
        first, stop = self.first, self.stop
        if self.form == "window":
            # Every row relative to the last close that is known at t, in percent; rows before the first bar repeat it.
            logs = market.close.log()
            padded = torch.cat([logs[:1].expand(self.lookback, -1), logs])[first + 1 : stop + self.lookback]
            windows = padded.unfold(0, self.lookback, 1)[: stop - first]
            pattern = 100 * (windows - logs[first:stop, :, None]).flatten(1)
        else:
            begin = first - self.window
            if begin < 0:
                raise ConfigError(
                    f"portfolio: the covariance of the first bar needs {self.window} bars before it and there are {first}:"
                    " begin later, or lower window"
                )
            past = market.returns[begin + 1 : stop].unfold(0, self.window, 1)[: stop - first]
            centred = past - past.mean(-1, keepdim=True)
            covariance = centred @ centred.mT / (self.window - 1)
            features = self.scale(tensors.relative(market)[first:stop])
            # Daily covariances of shares are some 1e-4.
            pattern = torch.cat([1e4 * covariance.flatten(1), features.flatten(1)], -1)
        hole = torch.zeros(self.T, self.N + 1)
        self.rows = torch.cat([hole, self.alarm[:, None].cpu(), pattern.cpu()], -1).float().to(self.device)
        self.places = ((0, self.N + 1),)

    def fresh(self, stream: Tensor) -> State:
        n, N = len(stream), self.N
        t = self.start_of(stream)
        weights = self.start_weights.expand(n, N + 1).clone()
        value = torch.full((n,), self.first_value, dtype=torch.float64, device=self.device)
        if self.training:
            # Flat on the simplex.
            race = -torch.stack([uniform(stream, 2 + i) for i in range(N + 1)], -1).clamp_min(1e-16).log()
            race[:, 1:] *= self.tradable[t]
            if not self.with_cash:
                race[:, 0] = 1e-12
            weights = race / race.sum(-1, keepdim=True)
            value = value * (0.95 + 0.1 * uniform(stream, 1))
        zero = torch.zeros_like(value)
        return {
            "t": t,
            "stream": stream,
            "weights": weights,
            "value": value,
            "paid": zero,
            "traded": zero.clone(),
        }

    def orders(self, state: State, action: Tensor) -> Tensor:
        """[B, N + 1] wanted weights, decided from what is known at t: all cash while the turbulence stop acts."""
        score = self.concentration * action.double()
        if not self.with_cash:
            score = torch.cat([torch.full_like(score[:, :1], -torch.inf), score[:, 1:]], -1)
        wanted = score.softmax(-1)
        stop = self.stop_flag(state["t"])
        if stop is None:
            return wanted
        cash = torch.zeros_like(wanted)
        cash[:, 0] = 1.0
        return torch.where(stop[:, None], cash, wanted)

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        return self.move(state, self.orders(state, action))

    def move(self, state: State, target: Tensor, trade: Tensor | None = None) -> tuple[State, Tensor, Tensor]:
        """The step for wanted weights [B, N + 1]; where `trade` [B] is False nothing is traded (a buy-and-hold bar)."""
        t = state["t"]
        after = (t + 1).clamp(max=self.T - 1)
        fill = t if self.fill == "same_close" else after
        last, price, mark = self.price[t], self.exec_price[fill], self.price[after]
        drifted, before = grow(state["weights"], price / last)
        tradable = self.tradable[fill]
        weights, mu, turnover = rebalance(drifted, target, self.cost_buy, self.cost_sell, tradable)
        if trade is not None:
            weights = torch.where(trade[:, None], weights, drifted)
            mu = torch.where(trade, mu, 1.0)
            turnover = turnover * trade
        weights, later = grow(weights, mark / price)
        middle = state["value"] * before
        value = middle * mu * later
        ratio = value / state["value"]
        if self.reward_kind == "log":
            reward = 100 * ratio.log()
        elif self.reward_kind == "simple":
            reward = 100 * (ratio - 1)
        else:
            reward = value / self.first_value
        new = {
            "t": after,
            "stream": state["stream"],
            "weights": weights,
            "value": value,
            "paid": state["paid"] + middle * (1 - mu),
            "traded": state["traded"] + middle * turnover,
        }
        return new, reward, value <= self.ruin * self.first_value

    def own(self, state: State) -> Tensor:
        return torch.cat([state["t"][:, None].float(), state["weights"].float()], -1)

    def held(self, cash: float, shares: Tensor, waited: Tensor) -> State:
        last = torch.full((1,), self.T - 1, dtype=torch.int64)
        worth = torch.cat([torch.tensor([cash], dtype=torch.float64), shares * self.price[-1]])
        zero = torch.zeros(1, dtype=torch.float64)
        return {
            "t": last,
            "stream": torch.zeros_like(last),
            "weights": (worth / worth.sum())[None],
            "value": worth.sum()[None],
            "paid": zero,
            "traded": zero.clone(),
        }

    def weights(self, state: State) -> Tensor:
        return state["weights"]

    def shares(self, state: State) -> Tensor:
        return state["weights"][:, 1:] * state["value"][:, None] / self.price[state["t"]]
