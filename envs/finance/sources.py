"""Where prices come from, and `load_daily`, the one call that gives aligned daily data as arrays.

The packaged sets need no download.  Each set of shares holds companies that survived to its end, so it is biased upwards:
results on it compare strategies with each other, on the same set, and say nothing about what one would have earned.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

from mobula.envs.finance import processors, schema
from mobula.errors import ConfigError, DataError, nearest


class DataSource:
    """Base of all sources; what one can do is written in its class attributes and checked before anything is fetched."""

    name: str
    licence: str = "unknown"
    frequencies: tuple[str, ...] = ("1d",)
    has_ohlc: bool = False
    has_volume: bool = False
    calendar: str = "XNYS"
    needs_credentials: bool = False
    survivorship: str = "unknown"
    symbols: tuple[str, ...] = ()

    def check(
        self, symbols: Sequence[str] | None, freq: str, *, ohlc: bool = False, volume: bool = False
    ) -> None:
        """Raises ConfigError where the source has no such frequency, symbol or column."""
        if freq not in self.frequencies:
            raise ConfigError(f"{self.name} has no bars of {freq!r}; it has {', '.join(self.frequencies)}")
        for symbol in symbols or ():
            if symbol not in self.symbols:
                raise ConfigError(f"{self.name} has no symbol {symbol!r}.{nearest(symbol, self.symbols)}")
        if symbols is not None and len(set(symbols)) != len(symbols):
            raise ConfigError(f"{self.name}: a symbol is named twice in {list(symbols)}")
        if ohlc and not self.has_ohlc:
            raise ConfigError(f"{self.name} has closing prices only: open, high and low are not known")
        if volume and not self.has_volume:
            raise ConfigError(f"{self.name} has no volume")

    def fetch(
        self, symbols: Sequence[str] | None = None, start: Any = None, end: Any = None, freq: str = "1d"
    ) -> pa.Table:
        """Rows of the schema with start <= time < end (dates or instants; None: all there is)."""
        chosen = tuple(symbols) if symbols is not None else self.symbols
        self.check(chosen, freq)
        table = self.load(chosen)
        begin, stop = bounds(start, end)
        times = table["time"].to_numpy()
        return table.filter(pa.array((times >= begin) & (times < stop)))

    def load(self, symbols: tuple[str, ...]) -> pa.Table:
        """All bars of `symbols`."""
        raise NotImplementedError


def bounds(start: Any, end: Any) -> tuple[np.datetime64, np.datetime64]:
    """[start, end) as UTC instants.  Raises ConfigError for words that are no dates and for an empty range."""
    found = []
    for value, default in ((start, "1900-01-01"), (end, "2200-01-01")):
        try:
            stamp = pd.Timestamp(default if value is None else str(value))
        except ValueError as error:
            raise ConfigError(f"{value!r} is no date: write it as 2015-01-01") from error
        stamp = stamp.tz_convert("UTC").tz_localize(None) if stamp.tzinfo is not None else stamp
        found.append(stamp.as_unit("ns").to_datetime64())
    if found[0] >= found[1]:
        raise ConfigError(f"the range from {start} to {end} is empty: start must come before end")
    return found[0], found[1]


def _daily(frame: pd.DataFrame, calendar: str, fields: dict[str, pd.DataFrame]) -> pa.Table:
    """Long rows from wide frames (index: dates): bars end at the close of their session."""
    times = processors.session_closes(frame.index, calendar)
    symbols = [str(name) for name in frame.columns]
    T, N = frame.shape
    columns: dict[str, Any] = {
        "time": np.repeat(times, N),
        "symbol": np.tile(np.asarray(symbols, dtype=object), T),
        "close": frame.to_numpy(float).ravel(),
    }
    columns |= {name: wide[frame.columns].to_numpy(float).ravel() for name, wide in fields.items()}
    return schema.table_of(columns)


class SkfolioPrices(DataSource):
    """Adjusted closes packaged with skfolio: 20 US shares and the S&P 500 from 1990, or 5 factor funds from 2014."""

    licence = "skfolio's packaged data (BSD-3-Clause package)"

    def __init__(self, loader: str, name: str, survivorship: str) -> None:
        self.loader, self.name = loader, name
        self.survivorship = survivorship
        self.symbols = tuple(str(column) for column in self._frame().columns)

    def _frame(self) -> pd.DataFrame:
        return getattr(_package("skfolio.datasets"), self.loader)()  # type: ignore[no-any-return]

    def load(self, symbols: tuple[str, ...]) -> pa.Table:
        return _daily(self._frame()[list(symbols)], self.calendar, {})


class ArchIndices(DataSource):
    """S&P 500 and NASDAQ composite with open, high, low, close and volume, 1999 to 2018, packaged with arch."""

    name = "arch_indices"
    licence = "arch's packaged data (NCSA package)"
    has_ohlc = has_volume = True
    survivorship = "indices: none"
    symbols = ("SP500", "NASDAQ")

    def load(self, symbols: tuple[str, ...]) -> pa.Table:
        frames = {name: _package(f"arch.data.{name.lower()}").load() for name in symbols}

        def wide(column: str) -> pd.DataFrame:
            return pd.DataFrame({name: frame[column] for name, frame in frames.items()})

        fields = {name.lower(): wide(name) for name in ("Open", "High", "Low", "Volume")}
        return _daily(wide("Close"), self.calendar, {**fields, "adj_close": wide("Adj Close")})


class ParquetFolder(DataSource):
    """A folder written by `schema.write_market`; its files are held against the manifest."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = schema.read_manifest(folder)
        self.name = str(self.folder)
        self.licence = self.manifest["licence"]
        self.calendar = self.manifest["calendar"]
        self.frequencies = (self.manifest["freq"],)
        self.survivorship = self.manifest["survivorship"]
        self.symbols = tuple(self.manifest["symbols"])

    def load(self, symbols: tuple[str, ...]) -> pa.Table:
        return schema.read_market(self.folder, freq=self.frequencies[0], symbols=symbols)


def _package(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"this market data needs the extra: pip install 'mobula[finance]' ({error.name} is missing)"
        ) from error


US5 = ("AAPL", "JNJ", "JPM", "KO", "XOM")
SURVIVORS = "biased: these companies survived to the end of the data"
UNIVERSES: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "us5": ("us20", US5),
    "us20": ("us20", None),
    "us_index": ("us_index", None),
    "factors5": ("factors5", None),
    "indices": ("indices", None),
    "synthetic": ("synthetic", None),
}
"""Name of a universe -> (source, symbols); anything else is the path of a folder of Parquet files."""


@lru_cache(maxsize=16)
def source(universe: str) -> DataSource:
    """The source of a universe.  Raises ConfigError for an unknown name."""
    if universe not in UNIVERSES:
        if Path(universe).is_dir():
            return ParquetFolder(universe)
        raise ConfigError(
            f"unknown universe {universe!r}.{nearest(universe, UNIVERSES)} Known: {', '.join(UNIVERSES)}, or a folder"
        )
    kind = UNIVERSES[universe][0]
    if kind == "us20":
        return SkfolioPrices("load_sp500_dataset", "skfolio_sp500", SURVIVORS)
    if kind == "us_index":
        return SkfolioPrices("load_sp500_index", "skfolio_index", "index: none")
    if kind == "factors5":
        return SkfolioPrices("load_factors_dataset", "skfolio_factors", "funds: none")
    if kind == "indices":
        return ArchIndices()
    from mobula.envs.finance.synthetic import SyntheticMarket

    return SyntheticMarket()


@dataclass(frozen=True)
class MarketData:
    """Aligned bars of N symbols: arrays [T, N] of float64 by name, NaN where a source has none.

    symbols   names, in the order of the columns
    time      [T] datetime64[ns], the end of each bar in UTC
    columns   open, high, low, close, adj_close, volume, and indicators where they were computed
    tradable  [T, N] False before the first real bar, after the last, and after five filled ones in a row
    filled    [T, N] the bar was made by alignment
    about     source, licence, calendar, survivorship
    """

    symbols: tuple[str, ...]
    time: np.ndarray[Any, Any]
    columns: dict[str, np.ndarray[Any, Any]]
    tradable: np.ndarray[Any, Any]
    filled: np.ndarray[Any, Any]
    about: dict[str, str]

    @property
    def dates(self) -> np.ndarray[Any, Any]:
        """[T] datetime64[D] of the bars."""
        return self.time.astype("datetime64[D]")

    @property
    def prices(self) -> Tensor:
        """[T, N] float64 adjusted closes; NaN before a symbol's first bar."""
        return torch.from_numpy(self.columns["adj_close"].copy())

    def log_returns(self) -> Tensor:
        """[T - 1, N] float64: row t is log p[t + 1] - log p[t], and belongs to `dates[t + 1]`."""
        return self.prices.log().diff(dim=0)


def from_table(table: pa.Table, about: dict[str, str]) -> MarketData:
    """Arrays from an aligned table (every bar holds every symbol)."""
    frame = table.to_pandas()
    symbols = tuple(str(s) for s in frame["symbol"].iloc[: frame["symbol"].nunique()])
    N = len(symbols)
    if (
        len(frame) % N
        or not (frame["symbol"].astype(str).to_numpy().reshape(-1, N) == np.asarray(symbols)).all()
    ):
        raise DataError("the table is not aligned: run processors.align first")
    skip = ("time", "symbol", "available_at", "is_filled", "tradable")
    return MarketData(
        symbols,
        frame["time"].dt.tz_localize(None).to_numpy().astype("datetime64[ns]")[::N].copy(),
        {n: np.array(frame[n], float).reshape(-1, N) for n in frame.columns if n not in skip},
        np.array(frame["tradable"], bool).reshape(-1, N),
        np.array(frame["is_filled"], bool).reshape(-1, N),
        about,
    )


def load_daily(
    universe: str = "us20", start: Any = None, end: Any = None, *, symbols: Sequence[str] | None = None
) -> MarketData:
    """Daily bars of a universe with start <= date < end, validated and aligned on the exchange's calendar.

    universe  us5, us20 (adjusted closes of US shares, 1990 to 2022), us_index (S&P 500, same dates), factors5 (funds from
              2014), indices (S&P 500 and NASDAQ with open, high, low, volume, 1999 to 2018), synthetic, or a folder of ours
    symbols   which of its symbols, in the order wanted (default: all of them)

    `load_daily("us20", "2000-01-01", "2010-01-01").log_returns()` is a [T - 1, 20] float64 tensor, its dates are
    `.dates[1:]`.  Raises ConfigError for an unknown universe or symbol, DataError for data that cannot be used.
    """
    found = source(universe)
    chosen = (
        tuple(symbols) if symbols is not None else UNIVERSES.get(universe, ("", None))[1] or found.symbols
    )
    table = found.fetch(chosen, start, end)
    if table.num_rows == 0:
        raise DataError(f"{universe} has no bars from {start} to {end}")
    table = processors.align(processors.normalise(table), found.calendar)
    return order(from_table(table, about(found)), chosen)


def about(found: DataSource) -> dict[str, str]:
    """What every result on a source says about it."""
    return {
        "source": found.name,
        "licence": found.licence,
        "calendar": found.calendar,
        "survivorship": found.survivorship,
    }


def order(data: MarketData, symbols: tuple[str, ...]) -> MarketData:
    """The same data with its columns in the order of `symbols`.  Raises DataError for one that never trades."""
    for symbol in symbols:
        if symbol not in data.symbols:
            raise DataError(f"{symbol} never trades in the range")
    index = [data.symbols.index(symbol) for symbol in symbols]
    return MarketData(
        symbols,
        data.time,
        {name: values[:, index] for name, values in data.columns.items()},
        data.tradable[:, index],
        data.filled[:, index],
        data.about,
    )


# Series of the whole market ------------------------------------------------------------------------------------------


def market_series(name: str) -> pd.DataFrame:
    """`vix` or `wti` as rows (available_at, value): known an hour after the close of New York, so used from the next bar on."""
    if name not in ("vix", "wti"):
        raise ConfigError(f"unknown market series {name!r}: vix or wti")
    frame = _package(f"arch.data.{name}").load().dropna()
    known = frame.index.tz_localize("America/New_York") + pd.Timedelta(hours=17)
    return pd.DataFrame({"available_at": known.tz_convert("UTC"), name: frame.iloc[:, 0].to_numpy(float)})
