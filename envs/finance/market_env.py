"""What the market environments share: a range of bars, random starts, costs, halts, the turbulence stop.

Index t is the close of bar t.  A step observes bars up to t, takes an order, fills it by the rule `fill`, and values the
account at the close of t + 1.  Fills: `next_open` (default where opens are known), `next_close` (default for closing
prices), `same_close`, which trades at a price that the decision has already seen and is marked optimistic.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from mobula.envs.finance import processors, tensors
from mobula.envs.finance.tensors import MarketTensor
from mobula.errors import ConfigError, DataError, EnvironmentFault, nearest
from mobula.sampling.spaces import Indexed, Places, expand
from mobula.sampling.tensor_env import State, TensorEnv

FILLS = ("auto", "next_open", "next_close", "same_close")


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (Steele et al. 2014): a counter becomes a random word."""

    def xor_shift(x: Tensor, bits: int) -> Tensor:
        return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))

    x = xor_shift(x + -7046029254386353131, 30) * -4658895280553007687
    return xor_shift(xor_shift(x, 27) * -7723592293110705685, 31)


def uniform(stream: Tensor, draw: int) -> Tensor:
    """float64 in [0, 1), the `draw`-th of each stream."""
    word = mix(mix(stream) + draw + 1)
    return ((word >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def per_symbol(value: Any, symbols: Sequence[str], what: str, default: float = 0.0) -> Tensor:
    """[N] float64 from a number, a list in the order of the symbols, or {symbol: number}.  Raises ConfigError otherwise."""
    if isinstance(value, Mapping):
        for name in value:
            if name not in symbols:
                raise ConfigError(
                    f"{what} names {name!r}, which is not traded here.{nearest(str(name), symbols)}"
                )
        value = [value.get(symbol, default) for symbol in symbols]
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) != len(symbols):
        raise ConfigError(f"{what} has {len(value)} entries; there are {len(symbols)} symbols")
    try:
        found = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} is {value!r}; it is a number, a list, or numbers by symbol") from error
    if not bool(found.isfinite().all()) or bool((found < 0).any()):
        raise ConfigError(f"{what} is {value!r}; finite numbers of at least 0 are needed")
    return found.expand(len(symbols)).clone()


class MarketEnv(TensorEnv):
    """Base of `StockTrading` and `PortfolioAllocation`.

    Subclasses define `tables`, which sets `rows` [T, K] float32 and `places`: an observation is the row of its bar with what
    belongs to the account in its places; `own`, the observation in its compact form; `held`; and the protocol's functions on a
    state that holds `t`, `stream` and the account.
    """

    rows: Tensor
    places: Places
    _settings: dict[str, Any]

    def __new__(cls, num_envs: int = 1, **settings: Any) -> Self:
        made = super().__new__(cls)
        made._settings = settings
        return made

    def __init__(
        self,
        num_envs: int = 1,
        *,
        width: Any,
        universe: str = "us5",
        symbols: Sequence[str] | None = None,
        indicators: Sequence[str] | None = None,
        series: Sequence[str] = (),
        market: Any = None,
        start: Any = "2010-01-01",
        end: Any = "2018-01-01",
        fit_start: Any = None,
        fit_end: Any = None,
        scale: Mapping[str, Sequence[float]] | None = None,
        training: bool = True,
        episode_length: int = 252,
        compact_obs: bool = False,
        cash: float = 1e6,
        cost_bps: Any = 10.0,
        buy_cost_bps: Any = None,
        sell_cost_bps: Any = None,
        fill: str = "auto",
        halts: Sequence[Sequence[Any]] = (),
        turbulence_q: float | None = 0.99,
        turbulence_threshold: float | None = None,
        turbulence_stop: bool = True,
        turbulence_lag: int = 1,
        ruin: float = 0.05,
        **kwargs: Any,
    ) -> None:
        """Settings that all market environments take:

        universe, symbols, indicators, series  what is traded and seen (see `sources.load_daily`, `tensors.market_tensor`)
        market             tensors, or a shared reference to them, in place of a universe
        start, end         range of the bars, end excluded
        fit_start, fit_end range that scales and thresholds are estimated on (default: start, end)
        scale              {"mean": [...], "deviation": [...]} of the relative features, in place of estimating them
        training           random start, cash and holdings in episodes of `episode_length` bars; otherwise one deterministic
                           episode over the whole range
        compact_obs        observations are the index of the bar and what belongs to the account; a module's encoder gathers the rest
                           from the rows of the market (`sampling.spaces.Indexed`), and sees the same
        cash               first value of the account
        cost_bps           proportional cost of a trade in basis points; `buy_cost_bps`, `sell_cost_bps` for one direction; each a
                           number, a list, or numbers by symbol
        fill               auto, next_open, next_close, same_close
        halts              [[symbol, start, end], ...] during which a symbol cannot be traded
        turbulence_q       quantile of turbulence in the fitting range above which the stop acts (None: never)
        turbulence_threshold  the threshold itself
        turbulence_stop    False: the flag is observed but forces nothing
        turbulence_lag     bars between flag and fill; 0 uses a flag that is not known yet and is marked as look-ahead
        ruin               share of the first value at which an episode terminates
        """
        found = tensors.resolve(market, universe, symbols=symbols, indicators=indicators, series=series)
        device = torch.device(kwargs.get("device", "cpu"))
        self.whole = found
        self.symbols, self.N = found.symbols, len(found.symbols)
        self.first, self.stop = found.index(start, end)
        self.T = self.stop - self.first
        if self.T < 2:
            raise DataError(f"the range from {start} to {end} has {self.T} bar; two are needed for a step")
        if fill not in FILLS:
            raise ConfigError(f"fill is {fill!r}; it is one of {', '.join(FILLS)}")
        if fill == "next_open" and found.open is None:
            raise ConfigError("fill=next_open needs opening prices, and this data has closing prices only")
        self.fill = ("next_close" if found.open is None else "next_open") if fill == "auto" else fill
        self.optimistic = self.fill == "same_close" or turbulence_lag == 0
        if turbulence_lag < 0:
            raise ConfigError(f"turbulence_lag is {turbulence_lag}; it is at least 0")
        if not cash > 0:
            raise ConfigError(f"cash is {cash}; it must be above 0")
        self.training, self.first_value, self.ruin = training, float(cash), float(ruin)
        if episode_length < 1:
            raise ConfigError(f"episode_length is {episode_length}; at least 1 is needed")
        self.length = min(episode_length, self.T - 1) if training else self.T - 1
        self.lag, self.stopping = turbulence_lag, turbulence_stop
        buys = cost_bps if buy_cost_bps is None else buy_cost_bps
        sells = cost_bps if sell_cost_bps is None else sell_cost_bps
        self.cost_buy = per_symbol(buys, self.symbols, "buy_cost_bps").to(device) / 1e4
        self.cost_sell = per_symbol(sells, self.symbols, "sell_cost_bps").to(device) / 1e4
        if bool((self.cost_sell >= 1).any()) or bool((self.cost_buy >= 1).any()):
            raise ConfigError("a cost of 10,000 basis points or more takes everything: lower cost_bps")
        self.halted = torch.zeros(len(found), self.N, dtype=torch.bool)
        for name, begin, until in halts:
            if name not in self.symbols:
                raise ConfigError(
                    f"halts names {name!r}, which is not traded here.{nearest(str(name), self.symbols)}"
                )
            a, b = found.index(begin, until)
            self.halted[a:b, self.symbols.index(name)] = True
        a, b = found.index(start if fit_start is None else fit_start, end if fit_end is None else fit_end)
        features = tensors.relative(found)
        self.scale = (
            processors.Scale.fit(features[a:b])
            if scale is None
            else processors.Scale.given(scale, features.shape[-1])
        )
        self.threshold = self._threshold(turbulence_q, turbulence_threshold, found.turbulence[a:b])
        self.device = device
        self._bind(found)
        kwargs.setdefault("max_episode_steps", self.length)
        spaces = width(self)
        self.compact = compact_obs
        if compact_obs:
            recipe = {name: value for name, value in self._settings.items() if name != "device"}
            spaces["observation_space"] = Indexed(
                self.rows, self.places, partial(_space_of, type(self), recipe)
            )
        super().__init__(num_envs, **spaces, **kwargs)
        if self.max_episode_steps is None or self.max_episode_steps > self.length:
            raise ConfigError(
                f"max_episode_steps is {self.max_episode_steps}; the range allows {self.length}"
            )

    def _threshold(self, q: float | None, given: float | None, fitted: Tensor) -> float:
        if given is not None:
            return float(given)
        if q is None:
            return float("inf")
        if not 0 < q <= 1:
            raise ConfigError(f"turbulence_q is {q}; it is a quantile in (0, 1], or none")
        known = fitted[fitted > 0]
        if not len(known):
            raise DataError(
                f"turbulence needs {tensors.MARKET_WINDOW} bars before it is known, and the range that it is fitted on has none:"
                " begin later, or set turbulence_q=null"
            )
        return float(known.quantile(q))

    def _bind(self, market: MarketTensor) -> None:
        """Reads everything that steps and observations need out of `market`, by the scale and threshold of this environment."""
        here = slice(self.first, self.stop)
        to = self.device
        self.price = market.close[here].to(to)
        if self.fill == "next_open":
            assert market.open is not None
            self.exec_price = market.open[here].to(to)
        else:
            self.exec_price = self.price
        self.tradable = (market.tradable & ~self.halted)[here].to(to)
        self.volume = None if market.volume is None else market.volume[here].to(to)
        self.sigma = market.sigma[here].to(to)
        self.session = market.session[here].to(to)
        self.turbulence = market.turbulence[here].to(to)
        # NaN where the turbulence is hidden, so that a decision that looks ahead shows it.
        self.alarm = torch.where(
            self.turbulence.isnan(), torch.nan, (self.turbulence > self.threshold).double()
        )
        self.ever_alarmed = bool((self.alarm != 0).any())
        self.tables(market)

    def tables(self, market: MarketTensor) -> None:
        """Builds the tables that `observe` gathers from, rows `first` to `stop` of `market`."""
        raise NotImplementedError

    def own(self, state: State) -> Tensor:
        """[B, 1 + P] float32: the bar, and what belongs to the account, in the order of `places`."""
        raise NotImplementedError

    def observe(self, state: State) -> Tensor:
        own = self.own(state)
        return own if self.compact else expand(own, self.rows, self.places)

    def held(self, cash: float, shares: Tensor, waited: Tensor) -> State:
        """[1, ...] state at the last bar of the range of an account that holds `cash` and `shares` [N], `waited` [N] bars after the
        last trade of each symbol.
        """
        raise NotImplementedError

    def weights(self, state: State) -> Tensor:
        """[B, N + 1] cash and symbols as shares of the value."""
        raise NotImplementedError

    def shares(self, state: State) -> Tensor:
        """[B, N] shares held."""
        raise NotImplementedError

    def frozen(self) -> dict[str, Any]:
        """Settings, as plain data, of an environment on other bars of the same symbols that sees, stops and pays as this one does.

        Scale and threshold are numbers there, nothing is random, and an order fills at the close that it was decided on.  Raises
        ConfigError where this environment looks ahead.
        """
        if self.lag == 0:
            raise ConfigError("turbulence_lag is 0: the flag of the next bar is not known to anybody")
        own = {name: value for name, value in self._settings.items() if name not in _OF_THE_RANGE}
        return {
            **own,
            "symbols": list(self.symbols),
            "indicators": list(self.whole.names),
            "scale": {"mean": self.scale.mean.tolist(), "deviation": self.scale.deviation.tolist()},
            "turbulence_q": None,
            "turbulence_threshold": None if math.isinf(self.threshold) else self.threshold,
            "fill": "same_close",
            "start": None,
            "end": None,
            "training": False,
        }

    def blind(self, t: int) -> MarketEnv:
        """A copy that knows nothing after bar t of the range."""
        other = copy.copy(self)
        other._bind(self.whole.blind(self.first + t))
        return other

    @property
    def dates(self) -> Any:
        """[T] datetime64[D] of the bars of the range."""
        return self.whole.dates[self.first : self.stop]

    # Random starts: every environment has a stream of its own, whatever the size of the batch ----------------------

    def initial(self, n: int) -> State:
        word = torch.randint(2**62, (1,), generator=self.generator, device=self.device)
        return self.fresh(mix(word + torch.arange(n, device=self.device)))

    def fresh(self, stream: Tensor) -> State:
        """States of episodes that begin, drawn from `stream` [n]."""
        raise NotImplementedError

    def _with_fresh_rows(self, state: State, rows: Tensor) -> State:
        fresh = self.fresh(mix(state["stream"][rows]))
        self.elapsed[rows] = 0
        return {name: value.index_copy(0, rows, fresh[name].to(value.dtype)) for name, value in state.items()}

    def orders(self, state: State, action: Tensor) -> Tensor:
        """What is wanted, decided from what is known at t: the part of a step that must not look ahead."""
        raise NotImplementedError

    def start_of(self, stream: Tensor) -> Tensor:
        """[n] int64: first bars."""
        room = self.T - self.length
        if not self.training or room <= 1:
            return torch.zeros_like(stream)
        return (uniform(stream, 0) * room).long()

    def stop_flag(self, t: Tensor) -> Tensor | None:
        """[B] bool: the turbulence stop acts on the order decided at t; None where it never does."""
        if not self.stopping or not self.ever_alarmed:
            return None
        flag = self.alarm[(t + 1 - self.lag).clamp(0, self.T - 1)]
        if self.lag == 0 and bool(flag.isnan().any()):
            raise EnvironmentFault("the turbulence stop looks ahead: turbulence_lag is 0")
        return flag > 0

    # The account, for carrying it on ----------------------------------------------------------------------------------

    account_fields: tuple[str, ...] = ()

    def account(self) -> dict[str, Tensor]:
        """What is held: the part of the state that goes on when the range, the scale or the agent changes."""
        return {name: self.state[name].clone() for name in self.account_fields}

    def carry_on(self, account: Mapping[str, Tensor]) -> Tensor:
        """Starts with what `account` holds, at the first bar of the range; returns the observation [B, ...]."""
        self.reset(seed=0)
        for name in self.account_fields:
            self.state[name] = account[name].clone()
        return self.observe(self.state)


_OF_THE_RANGE = frozenset(
    {
        *(
            "universe",
            "market",
            "series",
            "start",
            "end",
            "fit_start",
            "fit_end",
            "halts",
            "training",
            "episode_length",
        ),
        *(
            "cash",
            "holdings",
            "initial_weights",
            "compact_obs",
            "device",
            "max_episode_steps",
            "autoreset_mode",
        ),
        "render_mode",
    }
)
"""Settings that say where and how episodes run, not how the market is seen and traded in."""


def _space_of(cls: type[MarketEnv], settings: dict[str, Any]) -> Any:
    """The observation space of an environment with these settings."""
    return cls(1, **settings).single_observation_space


class LookaheadGuard:
    """Holds an environment against a copy that knows nothing after the current bar.

    `check(action)` before each step: raises EnvironmentFault where the observation or the order decided from it differs, or is
    not finite, when everything after bar t is unknown.
    """

    def __init__(self, env: MarketEnv) -> None:
        self.env = env

    def check(self, action: Tensor) -> None:
        env = self.env
        for t in env.state["t"].unique().tolist():
            rows = env.state["t"] == t
            state = {name: value[rows] for name, value in env.state.items()}
            blind = env.blind(t)
            for what, known, hidden in (
                ("observation", _whole(env, state), _whole(blind, state)),
                ("order", env.orders(state, action[rows]), blind.orders(state, action[rows])),
            ):
                if not bool(hidden.isfinite().all()) or not torch.equal(known, hidden):
                    raise EnvironmentFault(f"the {what} at bar {t} depends on what comes after it")


def _whole(env: MarketEnv, state: State) -> Tensor:
    obs = env.observe(state)
    return expand(obs, env.rows, env.places) if env.compact else obs
