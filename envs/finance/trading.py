"""Stock trading in shares: orders of up to `max_shares` a symbol and bar, long only, costs, lots, halts, impact.

The dynamics are those of FinRL-Meta's stock environment (Liu et al., arXiv 2112.06753, arXiv 2304.13174), with what its users
missed: cash that stays at or above 0 after commission, costs by symbol and direction, first holdings, halts, and a
turbulence stop that acts on what was known when the order was given.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from mobula.envs.finance import tensors
from mobula.envs.finance.market_env import MarketEnv, per_symbol, uniform
from mobula.envs.finance.tensors import MarketTensor
from mobula.errors import ConfigError
from mobula.sampling.tensor_env import State


def dot(a: Tensor, b: Tensor) -> Tensor:
    """[B] sums over symbols of a [B, N] times b [B, N]."""
    return torch.linalg.vecdot(a, b)


IMPACTS = ("none", "linear", "sqrt", "almgren_chriss")


class StockTrading(MarketEnv):
    """Buy and sell shares of N stocks bar by bar, with costs, lots, halts and a turbulence stop (FinRL-Meta's task, mended).

    Action [-1, 1]^N: trunc(a * max_shares) shares, orders of at most `min_rate` of the maximum are ignored.  Sells come first;
    buys that the cash cannot pay with their costs are all scaled down alike, so that the order of symbols has no influence.

    Observation, float32.  obs="standardised", 3 + 3N + N(F + 2): cash over value, turbulence over its threshold, its flag, weights,
    bars since the last trade c / (c + 20), tradable, relative features.  obs="reference", 3 + 3N + NF:
    cash 2^-12, squashed turbulence 2^-5, flag, prices 2^-6, shares 2^-6, bars since the last trade, indicators 2^-7.
    """

    account_fields = ("cash", "shares", "cooldown", "value", "locked", "shift", "paid", "traded")

    def __init__(
        self,
        num_envs: int = 1,
        *,
        obs: str = "standardised",
        reward: str = "value",
        reward_scale: float | None = None,
        max_shares: float = 100.0,
        min_rate: float = 0.1,
        lot: float = 1.0,
        holdings: Any = 0.0,
        t_plus_one: bool = False,
        sequential_buys: bool = False,
        per_share_fee: float = 0.0,
        min_fee: float = 0.0,
        half_spread_bps: Any = 0.0,
        impact: str = "none",
        impact_coef: float | None = None,
        impact_permanent: float = 0.25,
        participation: float = 0.1,
        assumed_volume: float | None = None,
        terminal_bonus: bool = False,
        gamma: float = 0.99,
        **kwargs: Any,
    ) -> None:
        """Besides the settings of `MarketEnv`:

        obs, reward        standardised or reference; value ((V' - V) * reward_scale, default 2^-11 for a million) or log
        max_shares, min_rate, lot  largest order, share of it below which nothing is traded, shares in a lot (0: fractional)
        holdings           first shares: a number, a list, or numbers by symbol (in training 0 to 63 random lots are added)
        t_plus_one         shares are not sold in the session in which they were bought
        sequential_buys    buys are paid in the order of the symbols, as in the reference, in place of scaled down alike
        per_share_fee, min_fee, half_spread_bps   fee a share, smallest fee of a trade, half of the spread
        impact             none, linear (coef x), sqrt (2/3 coef sigma sqrt x), almgren_chriss ((perm / 2 + coef) sigma x) with x the share of
                           the bar's volume; `impact_permanent` of it stays in the price
        participation      largest share of a bar's volume, where the volume is known
        assumed_volume     volume in shares for data without one
        terminal_bonus     the last reward is replaced by the discounted sum sum_k gamma^(T-k) r_k (reference; not Markov)
        """
        if obs not in ("standardised", "reference"):
            raise ConfigError(f"stock_trading: obs is {obs!r}; it is 'standardised' or 'reference'")
        if reward not in ("value", "log"):
            raise ConfigError(f"stock_trading: reward is {reward!r}; it is 'value' or 'log'")
        if impact not in IMPACTS:
            raise ConfigError(f"stock_trading: impact is {impact!r}; it is one of {', '.join(IMPACTS)}")
        if max_shares < 1 or not 0 <= min_rate < 1 or lot < 0 or not 0 < participation <= 1:
            raise ConfigError(
                "stock_trading: max_shares >= 1, 0 <= min_rate < 1, lot >= 0, 0 < participation <= 1"
            )
        self.obs_kind, self.reward_kind = obs, reward
        self.max_shares, self.min_rate, self.lot = float(max_shares), float(min_rate), float(lot)
        self.t_plus_one, self.sequential = t_plus_one, sequential_buys
        self.per_share, self.min_fee = float(per_share_fee), float(min_fee)
        self.impact, self.permanent = impact, float(impact_permanent)
        self.coef = (
            {"linear": 0.1, "sqrt": 0.6, "almgren_chriss": 0.6}.get(impact, 0.0)
            if impact_coef is None
            else float(impact_coef)
        )
        self.participation, self.assumed = float(participation), assumed_volume
        self.bonus, self.gamma = terminal_bonus, float(gamma)
        self._given = (holdings, half_spread_bps)
        super().__init__(num_envs, width=type(self)._spaces, **kwargs)
        self.reward_scale = (
            (2.0**-11 * 1e6 / self.first_value if reward == "value" else 100.0)
            if reward_scale is None
            else float(reward_scale)
        )
        if impact != "none" and self.volume is None:
            raise ConfigError(
                f"stock_trading: impact={impact} needs the volume, and this data has none: set assumed_volume"
            )

    def _spaces(self) -> dict[str, Any]:
        N, F = self.N, len(self.whole.names)
        self.holdings = per_symbol(self._given[0], self.symbols, "holdings").to(self.device)
        size = 3 + 3 * N + N * F if self.obs_kind == "reference" else 3 + 3 * N + N * (F + 2)
        return {
            "observation_space": spaces.Box(-np.inf, np.inf, (size,), np.float32),
            "action_space": spaces.Box(-1.0, 1.0, (N,), np.float32),
        }

    def tables(self, market: MarketTensor) -> None:
        here = slice(self.first, self.stop)
        self.half_spread = per_symbol(self._given[1], self.symbols, "half_spread_bps").to(self.device) / 1e4
        tau, bar = self.turbulence, self.threshold
        flag = self.alarm
        if self.assumed is not None and self.volume is None:
            self.volume = torch.full_like(self.price, float(self.assumed))
        self.always_open = bool(self.tradable.all())
        # Costs in proportion to the price are a matrix-vector product.
        self.plain = self.impact == "none" and not self.min_fee and not self.per_share
        self.receipt = 1 - self.cost_sell - self.half_spread
        self.expense = 1 + self.cost_buy + self.half_spread
        self.ones = torch.ones_like(self.receipt)
        N, seen = self.N, market.feat[here].nan_to_num(0.0).flatten(1).to(self.device)
        hole = torch.zeros(self.T, N, device=self.device)
        if self.obs_kind == "reference":
            squashed = tau if math.isinf(bar) else bar * (torch.sigmoid(math.e * tau / bar) - 0.5)
            lead, middle = squashed * 2.0**-5, [self.price * 2.0**-6, hole, hole, seen * 2.0**-7]
        else:
            # Without a threshold: the mean of Gaussian turbulence is N.
            lead = (tau / (N + tau) if math.isinf(bar) else tau / bar).clamp(max=3.0)
            seen = self.scale(tensors.relative(market)[here]).flatten(1).to(self.device)
            middle = [hole, hole, self.tradable, seen]
        self.rows = torch.cat(
            [part.float() for part in (hole[:, :1], lead[:, None], flag[:, None], *middle)], -1
        ).contiguous()
        reference = self.obs_kind == "reference"
        # In the reference's observation the prices belong to the market, unless the account moves them.
        self.places = ((0, 1), (3 + N * (reference and self.impact == "none"), 3 + N * (2 + reference)))

    def fresh(self, stream: Tensor) -> State:
        n, N = len(stream), self.N
        t = self.start_of(stream)
        price = self.price[t]
        shares = self.holdings.expand(n, N).clone()
        value = torch.full((n,), self.first_value, dtype=torch.float64, device=self.device)
        value = value + (shares * price).sum(-1)
        if self.training:
            each = torch.stack([uniform(stream, 2 + i) for i in range(N)], -1)
            extra = (each * 64).floor() * (self.lot or 1.0) * self.tradable[t]
            # Never more than 90 % of the account, however dear a share is.
            room = (0.9 * self.first_value / (extra * price).sum(-1).clamp_min(1e-9)).clamp(max=1.0)
            extra = self._lots(extra * room[:, None])
            value = value + self.first_value * (0.1 * uniform(stream, 1) - 0.05)
            shares = shares + extra
        else:
            extra = torch.zeros_like(shares)
        cash = value - (shares * price).sum(-1)
        zero = torch.zeros_like(shares)
        return {
            "t": t,
            "stream": stream,
            "left": torch.full_like(t, self.length),
            "cash": cash,
            "shares": shares,
            # Counts are exact in float32, at half the traffic.
            "cooldown": zero.float(),
            "locked": zero.clone(),
            "shift": zero.clone(),
            "value": value,
            "gain": torch.zeros_like(value),
            "paid": torch.zeros_like(value),
            "traded": torch.zeros_like(value),
        }

    def _lots(self, shares: Tensor) -> Tensor:
        if not self.lot:
            return shares
        return shares.floor() if self.lot == 1.0 else (shares / self.lot).floor() * self.lot

    def orders(self, state: State, action: Tensor) -> Tensor:
        """[B, N] shares to buy (or, negative, to sell), decided from what is known at t."""
        return self._orders(state, action, self._stopped(state["t"]))

    def _stopped(self, t: Tensor) -> Tensor | None:
        """Rows in which the turbulence stop acts, None where there are none."""
        flag = self.stop_flag(t)
        rows = None if flag is None else flag.nonzero()[:, 0]
        return rows if rows is not None and len(rows) else None

    def _orders(self, state: State, action: Tensor, stopped: Tensor | None) -> Tensor:
        # Rounding by division, and a shrinkage for the mask: `trunc`, `masked_fill`, `where` and comparisons that make booleans
        # take 4 to 20 times as long as arithmetic on a CPU.
        order = (action * self.max_shares).div_(1.0, rounding_mode="trunc")
        order = nn.functional.hardshrink(order, self.min_rate * self.max_shares).double()
        return order if stopped is None else order.index_copy_(0, stopped, -state["shares"][stopped])

    def transition(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        t = state["t"]
        after = (t + 1).clamp(max=self.T - 1)
        fill = t if self.fill == "same_close" else after
        stopped = self._stopped(t)
        order = self._orders(state, action, stopped)
        price = self.exec_price.index_select(0, fill)
        mark = price if self.fill == "next_close" else self.price.index_select(0, after)
        if self.impact != "none":
            price = price * state["shift"].exp()
        if not self.always_open:
            order = order * self.tradable[fill]
        locked = state["locked"]
        if self.t_plus_one:
            locked = locked * (self.session[fill] == self.session[t])[:, None]
        sold, gave, got = self._sell(state, order, price, fill, locked)
        bought, took, paid = self._buy(order.clamp_min_(0.0), state["cash"] + got, price, fill)
        cash = state["cash"] + got - paid
        # Memory that is read no more is written again: fresh pages cost more than the arithmetic.
        net = torch.sub(bought, sold, out=sold)
        shares = state["shares"] + net
        shift = state["shift"]
        if self.impact != "none":
            shift = shift + self._moved(net, fill)
            mark = self.price[after] * shift.exp()
        idle = net.float().eq_(0.0)
        if stopped is not None:
            idle.index_fill_(0, stopped, 0.0)
        value = cash + mark.mul_(shares).sum(-1)
        reward = value - state["value"] if self.reward_kind == "value" else (value / state["value"]).log()
        reward = reward * self.reward_scale
        left = state["left"] - 1
        terminated = value <= self.ruin * self.first_value
        gain = state["gain"]
        if self.bonus:
            gain = self.gamma * gain + reward
            reward = torch.where(terminated | (left == 0), gain, reward)
        new = {
            "t": after,
            "stream": state["stream"],
            "left": left,
            "cash": cash,
            "shares": shares,
            "cooldown": (state["cooldown"] + 1).mul_(idle),
            "locked": locked + bought if self.t_plus_one else locked,
            "shift": shift,
            "value": value,
            "gain": gain,
            # What left the account beyond the price of the shares.
            "paid": state["paid"] + ((paid - took) + (gave - got)),
            "traded": state["traded"] + (took + gave),
        }
        return new, reward, terminated

    # Fills --------------------------------------------------------------------------------------------------------------

    def _sell(
        self, state: State, order: Tensor, price: Tensor, fill: Tensor, locked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(shares sold [B, N], what they are worth [B], what they bring [B])."""
        held = state["shares"]
        free = held - locked if self.t_plus_one else held
        wanted = (-order).clamp_min_(0.0)
        # Who sells all may sell an odd lot.
        sold = (
            torch.minimum(wanted, free, out=wanted)
            if self.lot == 1.0
            else torch.where(wanted >= free, free, self._lots(wanted))
        )
        sold = self._capped(sold, fill)
        worth = sold * price
        if self.plain:
            return sold, worth.mv(self.ones), worth.mv(self.receipt)
        got = worth * (1 - self._friction(sold, fill)) - self._fee(sold, price, self.cost_sell)
        if self.min_fee:
            # A sale that costs more than it brings is not made.
            sold = sold * (got > 0)
            got = got.clamp_min(0.0)
        return sold, dot(sold, price), got.sum(-1)

    def _buy(
        self, wanted: Tensor, cash: Tensor, price: Tensor, fill: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(shares bought [B, N], what they are worth [B], what they cost [B]), never more than `cash`."""
        if self.lot != 1.0 or self.volume is not None:
            # Orders are whole numbers.
            wanted = self._lots(self._capped(wanted, fill))
        worth, need = self._outlay(wanted, price, fill)
        # The margin holds what the sum over symbols may round up where they are paid one after the other.
        most = cash * (1 - 1e-12) - self.min_fee * self.N if self.sequential else cash
        rows = (need > most).nonzero()[:, 0]
        if not len(rows):
            return wanted, worth, need
        afforded = self._in_order if self.sequential else self._scaled
        part = price[rows], fill[rows]
        some = afforded(wanted[rows], cash[rows], need[rows], *part)
        value, cost = self._outlay(some, *part)
        return (
            wanted.index_copy(0, rows, some),
            worth.index_copy_(0, rows, value),
            need.index_copy_(0, rows, cost),
        )

    def _scaled(self, wanted: Tensor, cash: Tensor, need: Tensor, price: Tensor, fill: Tensor) -> Tensor:
        """All buys of a row scaled down alike, to what its cash pays."""
        # The proportional part is scaled, fixed fees are put aside; impact is less for the smaller order.
        fixed = self.min_fee * (wanted > 0).sum(-1)
        unit = need if self.plain else dot(wanted, self._unit_cost(wanted, price, fill))
        share = ((cash - fixed) / unit.clamp_min(1e-300)).clamp(0.0, 1.0) * (1 - 1e-12)
        return self._lots(wanted * share[:, None])

    def _in_order(self, wanted: Tensor, cash: Tensor, need: Tensor, price: Tensor, fill: Tensor) -> Tensor:
        """Each symbol takes what the ones before it left: a chain through the floors, so this option loops over symbols."""
        left = cash * (1 - 1e-12) - self.min_fee
        # One row a symbol, so that the loop reads and writes without strides.
        unit, most = self._unit_cost(wanted, price, fill).T.contiguous(), wanted.T.contiguous()
        bought = torch.empty_like(most)
        for i in range(self.N):
            torch.minimum(self._lots(left.clamp_min(0.0) / unit[i]), most[i], out=bought[i])
            left = left - bought[i] * unit[i]
            if self.min_fee:
                left = left - self.min_fee * (bought[i] > 0)
        return bought.T.contiguous()

    def _capped(self, shares: Tensor, fill: Tensor) -> Tensor:
        if self.volume is None:
            return shares
        return torch.minimum(shares, self._lots(self.participation * self.volume[fill]))

    def _friction(self, shares: Tensor, fill: Tensor) -> Tensor:
        """Half spread and temporary impact as a fraction of the price, [B, N] or [N]."""
        if self.impact == "none":
            return self.half_spread
        x = self._participation(shares, fill)
        sigma = self.sigma[fill]
        if self.impact == "linear":
            return self.half_spread + self.coef * x
        if self.impact == "sqrt":
            return self.half_spread + 2 / 3 * self.coef * sigma * x.sqrt()
        return self.half_spread + (0.5 * self.permanent + self.coef) * sigma * x

    def _moved(self, shares: Tensor, fill: Tensor) -> Tensor:
        """Lasting move of the log price by signed trades."""
        x, sign = self._participation(shares.abs(), fill), shares.sign()
        if self.impact == "linear":
            return sign * self.permanent * self.coef * x
        if self.impact == "sqrt":
            return sign * self.permanent * self.coef * self.sigma[fill] * x.sqrt()
        return sign * self.permanent * self.sigma[fill] * x

    def _participation(self, shares: Tensor, fill: Tensor) -> Tensor:
        assert self.volume is not None
        return torch.where(shares > 0, shares / self.volume[fill].clamp_min(1e-12), 0.0)

    def _fee(self, shares: Tensor, price: Tensor, rate: Tensor) -> Tensor:
        fee = shares * (price * rate + self.per_share)
        return torch.where(shares > 0, fee.clamp_min(self.min_fee), 0.0) if self.min_fee else fee

    def _outlay(self, shares: Tensor, price: Tensor, fill: Tensor) -> tuple[Tensor, Tensor]:
        """([B] what `shares` are worth, [B] what buying them costs)."""
        worth = shares * price
        if self.plain:
            return worth.mv(self.ones), worth.mv(self.expense)
        cost = worth * (1 + self._friction(shares, fill)) + self._fee(shares, price, self.cost_buy)
        return worth.mv(self.ones), cost.sum(-1)

    def _unit_cost(self, shares: Tensor, price: Tensor, fill: Tensor) -> Tensor:
        """[B, N] cost of a share, without the smallest fee."""
        if self.plain:
            return price * self.expense
        return price * (1 + self._friction(shares, fill) + self.cost_buy) + self.per_share

    # Observations -------------------------------------------------------------------------------------------------------

    def own(self, state: State) -> Tensor:
        t, N = state["t"], self.N
        price = self.price.index_select(0, t)
        if self.impact != "none":
            price = price * state["shift"].exp()
        reference = self.obs_kind == "reference"
        prices = reference and self.impact != "none"
        out = torch.empty(len(t), 2 + N * (2 + prices), device=self.device)
        out[:, 0] = t
        cooldown = state["cooldown"]
        if reference:
            out[:, 1] = state["cash"] * 2.0**-12
            if prices:
                out[:, 2 : 2 + N] = price * 2.0**-6
            out[:, -2 * N : -N] = state["shares"] * 2.0**-6
            out[:, -N:] = cooldown
        else:
            share = state["value"].clamp_min(1e-12).reciprocal()
            out[:, 1] = state["cash"] * share
            out[:, 2 : 2 + N] = price.mul_(state["shares"]).mul_(share[:, None])
            torch.div(cooldown, cooldown + 20, out=out[:, -N:])
        return out

    def held(self, cash: float, shares: Tensor, waited: Tensor) -> State:
        state = self.fresh(torch.zeros(1, dtype=torch.int64))
        last, money = (
            torch.full((1,), self.T - 1, dtype=torch.int64),
            torch.tensor([cash], dtype=torch.float64),
        )
        value = money + dot(shares[None], self.price[-1:])
        own = {
            "t": last,
            "cash": money,
            "shares": shares[None],
            "cooldown": waited[None].float(),
            "value": value,
        }
        return state | own

    def shares(self, state: State) -> Tensor:
        return state["shares"]

    def weights(self, state: State) -> Tensor:
        worth = state["shares"] * self.price[state["t"]] * state["shift"].exp()
        return torch.cat([state["cash"][:, None], worth], -1) / state["value"][:, None]
