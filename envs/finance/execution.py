"""Optimal execution: selling a large position bar by bar against its own impact, with the optimum of Almgren and Chriss (2000).

The one-agent form of FinRL-Meta's liquidation task (Liu et al., arXiv 2112.06753).  Prices are arithmetic, so that the optimum is a
schedule known beforehand, and everything that is learnt can be held against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mobula.errors import ConfigError
from mobula.sampling.tensor_env import State, TensorEnv

LAGS = 6


@dataclass(frozen=True)
class Market:
    """Almgren and Chriss's market for N = `trades` trades in T = `days` days, tau = T / N apart.

    price, volatility  S_0, and the standard deviation of a day's price change over S_0 times the root of 250 (a year's, as a fraction)
    spread             eps: half of the spread, paid on every share
    temporary          eta: price concession a share a day of the speed of trading
    permanent          gamma: lasting fall of the price a share sold
    risk_aversion      lambda of E + lambda V

    Defaults: the published example.  Raises ConfigError for what is no market, and where waiting pays: eta <= gamma tau / 2.
    """

    shares: float = 5e5
    days: float = 60.0
    trades: int = 60
    price: float = 50.0
    volatility: float = 0.12
    spread: float = 1 / 16
    temporary: float = 2.5e-6
    permanent: float = 2.5e-7
    risk_aversion: float = 1e-6

    def __post_init__(self) -> None:
        if self.trades < 1 or not min(self.shares, self.days, self.price, self.temporary) > 0:
            raise ConfigError(
                "execution: shares, days, price and temporary are above 0, and there is a trade"
            )
        if min(self.volatility, self.spread, self.permanent, self.risk_aversion) < 0:
            raise ConfigError("execution: volatility, spread, permanent and risk_aversion are at least 0")
        if not self.eta > 0:
            raise ConfigError(
                f"execution: temporary is {self.temporary}; it must be above permanent * days / trades / 2 ="
                f" {self.permanent * self.tau / 2:g}, or trades of any size pay"
            )

    @property
    def tau(self) -> float:
        """Days between trades."""
        return self.days / self.trades

    @property
    def sigma(self) -> float:
        """Standard deviation of a day's price change, in currency."""
        return self.price * self.volatility / math.sqrt(250)

    @property
    def eta(self) -> float:
        """eta - gamma tau / 2: what is left of the temporary impact when the lasting one is written as gamma X^2 / 2."""
        return self.temporary - 0.5 * self.permanent * self.tau

    def cost(self, sold: Tensor) -> tuple[Tensor, Tensor]:
        """(E [...], V [...]): mean and variance of the shortfall X S_0 - revenue of a schedule [..., N] of sales that sum to X.

        E = gamma X^2 / 2 + eps X + eta~ / tau sum n_k^2;  V = sigma^2 tau sum x_k^2 with x_k the shares left after trade k.
        """
        left = sold.sum(-1, keepdim=True) - sold.cumsum(-1)
        whole = sold.sum(-1)
        mean = (
            0.5 * self.permanent * whole**2
            + self.spread * whole
            + self.eta / self.tau * sold.square().sum(-1)
        )
        return mean, self.sigma**2 * self.tau * left[..., :-1].square().sum(-1)

    def schedule(self) -> Tensor:
        """[N] the shares n_j that minimise E + lambda V, in Almgren and Chriss's closed form:

            n_j = 2 sinh(kappa tau / 2) / sinh(kappa T) cosh(kappa (T - (j - 1/2) tau)) X,  sinh(kappa tau / 2) = kappa~ tau / 2

        with kappa~^2 = lambda sigma^2 / eta~: what 2 (cosh(kappa tau) - 1) = kappa~^2 tau^2 says without its cancellation.
        """
        half = math.asinh(0.5 * self.tau * math.sqrt(self.risk_aversion * self.sigma**2 / self.eta))
        j = torch.arange(1, self.trades + 1, dtype=torch.float64)
        if half == 0:
            return torch.full_like(j, self.shares / self.trades)
        whole = 2 * half * self.trades
        # cosh(b) / sinh(a) by exponentials of negative numbers only: kappa T may be in the hundreds.
        b = 2 * half * (self.trades - j + 0.5)
        ratio = (b - whole).exp() * (1 + (-2 * b).exp()) / -math.expm1(-2 * whole)
        return 2 * math.sinh(half) * ratio * self.shares

    def continuation(self) -> tuple[Tensor, Tensor]:
        """(c [N + 1], f [N + 1]): with j trades left, the least of eta~ / tau sum n^2 + lambda sigma^2 tau sum x^2 is c_j x^2, and the
        first of them sells the share f_j of what is held.  By backward induction; c_0 = 0, f_0 = 1.
        """
        impact, risk = self.eta / self.tau, self.risk_aversion * self.sigma**2 * self.tau
        c, f = [0.0, impact], [1.0, 1.0]
        for _ in range(self.trades - 1):
            held = risk + c[-1]
            f.append(held / (impact + held))
            c.append(impact * held / (impact + held))
        return torch.tensor(c, dtype=torch.float64), torch.tensor(f, dtype=torch.float64)

    def utility(self, shares: Tensor, c: Tensor) -> Tensor:
        """E + lambda V of selling `shares` at continuation cost `c`: gamma x^2 / 2 + eps x + c x^2."""
        return 0.5 * self.permanent * shares**2 + self.spread * shares + c * shares**2


REWARDS = ("mean_variance", "reference")


class Execution(TensorEnv):
    """Sell a large position in N trades against its own impact (Almgren and Chriss 2000); the optimal schedule is known.

    Action [0, 1]: share of what is left to sell in this trade; the last trade sells everything.  Observation, float32 [8]: the last six
    log-returns of the price over the deviation of one, the share of the time that is left, the share of the position that is left.

    The price of trade k is S_k - eps - eta n_k / tau with S_1 = S_0, S_k = S_{k-1} - gamma n_{k-1} + sigma sqrt(tau) xi_k.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        reward: str = "mean_variance",
        remaining_time: bool = False,
        shares: float = 5e5,
        days: float = 60.0,
        trades: int = 60,
        price: float = 50.0,
        volatility: float = 0.12,
        spread: float = 1 / 16,
        temporary: float = 2.5e-6,
        permanent: float = 2.5e-7,
        risk_aversion: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        """reward: mean_variance, -(eta~ n^2 / tau + lambda sigma^2 tau x^2) / U(X), whose sum is what the schedule adds to gamma X^2 / 2 +
        eps X, over the optimal U(X); or reference, (U(x) - U(x')) / U(x): the relative fall of the optimal cost of what is left,
        over the whole time whenever it is asked (as the reference does) or, with `remaining_time`, over the time that is left.
        The others: see `Market`.
        """
        if reward not in REWARDS:
            raise ConfigError(f"execution: reward is {reward!r}; it is one of {', '.join(REWARDS)}")
        market = Market(shares, days, trades, price, volatility, spread, temporary, permanent, risk_aversion)
        self.market, self.reward_kind, self.remaining = market, reward, remaining_time
        kwargs.setdefault("max_episode_steps", market.trades)
        super().__init__(
            num_envs,
            observation_space=spaces.Box(-np.inf, np.inf, (LAGS + 2,), np.float32),
            action_space=spaces.Box(0.0, 1.0, (1,), np.float32),
            **kwargs,
        )
        self.c = market.continuation()[0].to(self.device)
        self.optimum = float(market.utility(torch.tensor(market.shares).double(), self.c[-1]))

    def initial(self, n: int) -> State:
        full = torch.full((n,), self.market.price, dtype=torch.float64, device=self.device)
        zero = torch.zeros_like(full)
        return {
            "k": torch.zeros(n, dtype=torch.int64, device=self.device),
            "price": full,
            "shares": zero + self.market.shares,
            "returns": torch.zeros(n, LAGS, dtype=torch.float64, device=self.device),
            "shortfall": zero,
        }

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        m, k, x, price = self.market, state["k"], state["shares"], state["price"]
        last = k == m.trades - 1
        sold = torch.where(last, x, x * action[:, 0].double().clamp(0.0, 1.0))
        left = x - sold
        paid = price - m.spread - m.temporary / m.tau * sold
        noise = torch.randn(len(k), generator=self.generator, dtype=torch.float64, device=self.device)
        after = price - m.permanent * sold + m.sigma * math.sqrt(m.tau) * noise
        if self.reward_kind == "mean_variance":
            reward = (
                -(m.eta / m.tau * sold**2 + m.risk_aversion * m.sigma**2 * m.tau * left**2) / self.optimum
            )
        else:
            rest = m.trades - k if self.remaining else torch.full_like(k, m.trades)
            then = (rest - 1).clamp_min(0) if self.remaining else rest
            before = m.utility(x, self.c[rest])
            reward = torch.where(x > 0, 1 - m.utility(left, self.c[then]) / before.clamp_min(1e-300), 0.0)
        # An arithmetic price may fall to nothing; its log-return is then not told.
        change = torch.where((after > 0) & (price > 0), after / price, 1.0).log()
        new = {
            "k": k + 1,
            "price": after,
            "shares": left,
            "returns": torch.cat([state["returns"][:, 1:], change[:, None]], -1),
            "shortfall": state["shortfall"] + sold * (m.price - paid),
        }
        return new, reward, last

    def observe(self, state: State) -> Tensor:
        m = self.market
        unit = max(m.sigma * math.sqrt(m.tau) / m.price, 1e-12)
        time = 1 - state["k"].double() / m.trades
        own = torch.stack([time, state["shares"] / m.shares], -1)
        return torch.cat([state["returns"] / unit, own], -1).float()
