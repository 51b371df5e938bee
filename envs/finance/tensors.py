"""`MarketTensor`: everything an environment reads of a market, as tensors; made once, shared, sliced as views."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from mobula.envs.finance import processors, schema, sources
from mobula.envs.finance.sources import MarketData
from mobula.errors import ConfigError, DataError

MARKET_WINDOW = 252


@dataclass(frozen=True)
class MarketTensor:
    """T bars of N symbols; float64 but for the features.

    symbols, names    of the columns, and of the F features
    time              [T] datetime64[ns], end of the bars
    session           [T] int64, the trading day of each bar
    close, open       [T, N] adjusted prices; open is None for close-only data; 1 before a symbol's first bar
    feat              [T, N, F] float32 indicators as they are; NaN where they are not known yet
    returns           [T, N] simple returns, 0 in the first row and before a symbol's first bar
    turbulence        [T]
    market            [T, G] other series (vix, wti), NaN before they begin
    volume            [T, N], or None where it is not known
    sigma             [T, N] 20-day volatility of the returns
    tradable          [T, N] bool
    about             source, licence, survivorship
    """

    symbols: tuple[str, ...]
    names: tuple[str, ...]
    time: np.ndarray[Any, Any]
    session: Tensor
    close: Tensor
    open: Tensor | None
    feat: Tensor
    returns: Tensor
    turbulence: Tensor
    market: Tensor
    volume: Tensor | None
    sigma: Tensor
    tradable: Tensor
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.time)

    @property
    def dates(self) -> np.ndarray[Any, Any]:
        """[T] datetime64[D]."""
        return self.time.astype("datetime64[D]")

    def index(self, start: Any, end: Any) -> tuple[int, int]:
        """(first, stop): the bars with start <= time < end.  Raises DataError where there are none."""
        begin, stop = sources.bounds(start, end)
        first, last = int(np.searchsorted(self.time, begin)), int(np.searchsorted(self.time, stop))
        if last - first < 1:
            raise DataError(
                f"the market has no bars from {start} to {end}; it has {self.dates[0]} to {self.dates[-1]}"
            )
        return first, last

    def _map(self, change: Any) -> MarketTensor:
        new = {
            f.name: change(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor | np.ndarray)
        }
        return replace(self, **new)

    def slice(self, first: int, stop: int) -> MarketTensor:
        """Bars first to stop - 1, as views."""
        return self._map(lambda value: value[first:stop])

    def to(self, device: torch.device | str) -> MarketTensor:
        """The same on a device."""
        if torch.device(device).type == "cpu":
            return self
        return self._map(lambda value: value.to(device) if isinstance(value, Tensor) else value)

    def blind(self, t: int) -> MarketTensor:
        """The same with everything after bar t unknown (NaN, not tradable): for tests of causality."""

        def hide(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.clone()
            value[t + 1 :] = torch.nan if value.is_floating_point() else 0
            return value

        return replace(self._map(hide), session=self.session)

    def share(self) -> ray.ObjectRef:
        """Puts the tensors into Ray's object store: one copy a node, read in place by every runner (`market=` of an environment)."""
        return ray.put(self)


def market_of(
    data: MarketData,
    names: Sequence[str],
    *,
    series: Sequence[str] = (),
    window: int = MARKET_WINDOW,
    fingerprint: str = "",
) -> MarketTensor:
    """Tensors of aligned data with indicators.  Raises DataError for a symbol without a tradable bar."""
    prices = torch.from_numpy(data.columns["adj_close"].copy())
    for i, symbol in enumerate(data.symbols):
        if not data.tradable[:, i].any():
            raise DataError(f"{symbol} never trades in the range")
    known = prices.isfinite()
    returns = torch.zeros_like(prices)
    both = known[1:] & known[:-1]
    returns[1:] = torch.where(both, prices[1:] / prices[:-1] - 1, 0.0)
    factor = prices / torch.from_numpy(data.columns["close"])
    opens = torch.from_numpy(data.columns["open"]) * factor
    volume = torch.from_numpy(data.columns["volume"].copy())
    turbulence = (
        processors.turbulence(returns, window)
        if len(returns) > window
        else torch.zeros(len(returns), dtype=torch.float64)
    )
    extra = [torch.from_numpy(processors.join_market(data.time, sources.market_series(n))) for n in series]
    sessions = (data.time.astype("datetime64[D]") - np.datetime64("1970-01-01")).astype(np.int64)
    feat = (
        torch.from_numpy(np.stack([data.columns[name] for name in names], -1)).float()
        if names
        else torch.zeros(*prices.shape, 0)
    )
    return MarketTensor(
        symbols=data.symbols,
        names=tuple(names),
        time=data.time,
        session=torch.from_numpy(sessions),
        close=torch.where(known, prices, 1.0),
        open=torch.where(known, opens, 1.0) if bool(opens[known].isfinite().all()) else None,
        feat=feat,
        returns=returns,
        turbulence=turbulence,
        market=torch.cat(extra, -1) if extra else torch.zeros(len(prices), 0, dtype=torch.float64),
        volume=volume if bool(volume[known].isfinite().all()) else None,
        sigma=processors.volatility(returns),
        tradable=torch.from_numpy(data.tradable.copy()),
        about={**data.about, "fingerprint": fingerprint},
    )


@lru_cache(maxsize=8)
def _load(
    universe: str,
    symbols: tuple[str, ...] | None,
    names: tuple[str, ...] | None,
    series: tuple[str, ...],
    window: int,
) -> MarketTensor:
    found = sources.source(universe)
    chosen = symbols or sources.UNIVERSES.get(universe, ("", None))[1] or found.symbols
    processors.check_indicators(
        names or (), has_range=found.has_ohlc or isinstance(found, sources.ParquetFolder)
    )
    table = processors.align(processors.normalise(found.fetch(chosen)), found.calendar)
    raw = set(table.column_names)
    table = processors.indicators(table, names)
    wanted = tuple(name for name in table.column_names if name not in raw)
    data = sources.order(sources.from_table(table, sources.about(found)), chosen)
    steps = [universe, list(chosen), list(wanted), list(series), window, found.name]
    manifest = getattr(found, "manifest", {})
    fingerprint = schema.manifest_hash({"steps": json.dumps(steps), "manifest": manifest})
    return market_of(data, wanted, series=series, window=window, fingerprint=fingerprint)


def market_tensor(
    universe: str = "us5",
    *,
    symbols: Sequence[str] | None = None,
    indicators: Sequence[str] | None = None,
    series: Sequence[str] = (),
    window: int = MARKET_WINDOW,
) -> MarketTensor:
    """All history of a universe (see `sources.load_daily`), with indicators and turbulence; kept for the next call.

    indicators  stockstats' names (default: those that the data allow)
    series      series of the whole market to join: vix, wti
    window      bars behind each turbulence value
    """
    return _load(
        universe,
        tuple(symbols) if symbols is not None else None,
        tuple(indicators) if indicators is not None else None,
        tuple(series),
        window,
    )


def resolve(market: Any, universe: str, **settings: Any) -> MarketTensor:
    """The market that an environment was given: tensors, a reference into Ray's object store, or the name of a universe."""
    if isinstance(market, ray.ObjectRef):
        market = ray.get(market)
    if market is None:
        return market_tensor(universe, **settings)
    if not isinstance(market, MarketTensor):
        raise ConfigError(
            f"market is {type(market).__name__}; it is a MarketTensor or what its share() returns"
        )
    return market


def relative(market: MarketTensor) -> Tensor:
    """[T, N, F + 2] features without the unit of a price: indicators in prices over the close, moving averages as log-ratios, and
    two more, the log-ratio of the price to its 60-day mean and the 20-day volatility.
    """
    close = market.close
    columns = []
    for f, name in enumerate(market.names):
        value = market.feat[..., f].double()
        if name.endswith(("_sma", "_ema")):
            value = (value / close).log()
        elif name == "boll" or name.startswith("boll_"):
            value = value / close - 1
        elif name in processors.IN_PRICE_UNITS:
            value = value / close
        columns.append(value)
    mean = rolling_mean(close, 60)
    return torch.stack([*columns, (close / mean).log(), market.sigma], -1)


def rolling_mean(values: Tensor, window: int) -> Tensor:
    """[T, N] mean of the last `window` rows, of all there are before that."""
    padded = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
    end = torch.arange(1, len(values) + 1)
    begin = (end - window).clamp_min(0)
    return (padded[end] - padded[begin]) / (end - begin)[:, None]
