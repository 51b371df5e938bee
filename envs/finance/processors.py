"""From raw rows to features: pure functions of a table, in a fixed order, none of which looks ahead.

    normalise -> validate -> align -> indicators -> (turbulence, join_market on the aligned arrays) -> scale

Recomputed on data that end at t, every value at t is the same: prices are filled forward only, indicators start at the
first bar, turbulence at t uses the returns before t and its own, joins take what was available, and the scale comes from
the training range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

from mobula.envs.finance import schema
from mobula.errors import ConfigError, DataError, nearest

CLOSE_ONLY = ("macd", "boll_ub", "boll_lb", "rsi_30", "close_30_sma")
WITH_RANGE = ("macd", "boll_ub", "boll_lb", "rsi_30", "cci_30", "dx_30", "close_30_sma", "close_60_sma")
NEEDS_HIGH_LOW = ("cci", "dx", "atr", "kdj", "adx", "pdi", "ndi", "wr", "tr")
IN_PRICE_UNITS = ("macd", "macds", "macdh", "boll", "boll_ub", "boll_lb", "atr")
"""Indicators with the unit of a price; divided by the close they compare across symbols and years."""


def normalise(table: pa.Table, time_zone: str = "UTC") -> pa.Table:
    """Columns of the schema, instants in UTC (naive ones are read in `time_zone`), exact duplicates dropped.

    Raises DataError for an unknown time zone, and for two different rows with one key, naming the first five.
    """
    if "time" in table.column_names and getattr(table.schema.field("time").type, "tz", "") is None:
        frame = table.to_pandas()
        try:
            frame["time"] = frame["time"].dt.tz_localize(time_zone).dt.tz_convert("UTC")
        except (KeyError, ValueError) as error:
            raise DataError(
                f"unknown time zone {time_zone!r}: write it as America/New_York ({error})"
            ) from error
        table = pa.Table.from_pandas(frame, preserve_index=False)
    frame = schema.conform(table).to_pandas().drop_duplicates().sort_values(["time", "symbol"])
    plain = pa.Table.from_pandas(frame, preserve_index=False)
    schema._refuse_twins(plain)
    return schema.conform(plain)


@lru_cache(maxsize=8)
def calendar_of(name: str, first: str, last: str) -> Any:
    """The exchange calendar between two dates.  Raises ConfigError for an unknown name."""
    try:
        import exchange_calendars  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("calendars need the extra: pip install 'mobula[finance]'") from error
    try:
        return exchange_calendars.get_calendar(name, start=first, end=last)
    except exchange_calendars.errors.InvalidCalendarName as error:
        known = exchange_calendars.get_calendar_names()
        raise ConfigError(
            f"unknown calendar {name!r}.{nearest(name, known)} XNYS and 24/7 are two"
        ) from error


def session_closes(dates: Any, calendar: str) -> np.ndarray[Any, Any]:
    """[T] datetime64[ns] in UTC: when the session of each date ended.  A date without a session is taken to end at 16:00 local."""
    days = pd.DatetimeIndex(dates).tz_localize(None).normalize()
    found = calendar_of(calendar, str(days[0].date()), str((days[-1] + pd.Timedelta(days=10)).date()))
    closes = found.closes.reindex(days)
    missing = closes.isna().to_numpy()
    plain = (days + pd.Timedelta(hours=16)).tz_localize(found.tz).tz_convert("UTC")
    values = np.where(missing, plain.tz_localize(None).to_numpy(), closes.dt.tz_localize(None).to_numpy())
    return values.astype("datetime64[ns]")  # type: ignore[no-any-return]


def align(table: pa.Table, calendar: str = "XNYS", *, max_fill: int = 5) -> pa.Table:
    """Every symbol at every bar: the union of the calendar's sessions between first and last bar and of the bars themselves.

    A missing bar repeats the last prices, has volume 0 and `is_filled`.  Nothing is filled backwards.  A column `tradable` is
    added: False before a symbol's first real bar, after its last, and from the `max_fill + 1`-th filled bar of a row on.
    Raises DataError where `validate` does, and for a symbol without any bar.
    """
    schema.validate(table)
    frame = table.to_pandas()
    frame["symbol"] = frame["symbol"].astype(str)
    bars = pd.DatetimeIndex(frame["time"].unique())
    found = calendar_of(
        calendar,
        str(bars.min().date()),
        str((bars.max() + pd.Timedelta(days=10)).date()),
    )
    sessions = found.closes[(found.closes >= bars.min()) & (found.closes <= bars.max())]
    daily = len(bars) == len(pd.DatetimeIndex(bars).normalize().unique())
    axis = bars.union(pd.DatetimeIndex(sessions)) if daily else bars
    axis = axis.sort_values().as_unit("ns")
    wide = frame.set_index(["time", "symbol"]).unstack("symbol").reindex(axis)
    symbols = list(wide["close"].columns)
    real = wide["close"].notna().to_numpy()
    count = np.arange(len(axis))[:, None]
    last_real = np.maximum.accumulate(np.where(real, count, -1), axis=0)
    ends = np.where(real, count, -1).max(axis=0)
    tradable = (last_real >= 0) & (count <= ends) & (count - last_real <= max_fill)
    out: dict[str, Any] = {
        "time": np.repeat(axis.tz_localize(None).to_numpy(), len(symbols)),
        "symbol": np.tile(np.asarray(symbols, dtype=object), len(axis)),
    }
    for name in schema.PRICES:
        out[name] = wide[name].ffill().to_numpy(float).ravel()
    # A filled bar's open, high and low are the last close: no trade took place.
    stale = ~real & (last_real >= 0)
    for name in ("open", "high", "low"):
        values = out[name].reshape(real.shape)
        out[name] = np.where(stale & ~np.isnan(values), out["close"].reshape(real.shape), values).ravel()
    volume = wide["volume"].to_numpy(float)
    known = ~np.isnan(volume).all(axis=0)
    out["volume"] = np.where(stale & known, 0.0, volume).ravel()
    available = wide["available_at"].ffill().to_numpy()
    times = axis.tz_localize(None).to_numpy()[:, None]
    late = pd.DatetimeIndex(np.asarray(pd.DataFrame(available).stack(future_stack=True)))
    late = late.tz_localize(None) if late.tz is not None else late
    since = late.to_numpy().astype("datetime64[ns]").reshape(real.shape)
    out["available_at"] = np.where(real & ~np.isnat(since), np.maximum(since, times), times).ravel()
    out["is_filled"] = (~real).ravel()
    out["tradable"] = tradable.ravel()
    full = pd.DataFrame(out)
    for name in ("time", "available_at"):
        full[name] = pd.to_datetime(full[name], utc=True)
    return pa.Table.from_pandas(full, preserve_index=False)


def check_indicators(names: Sequence[str], *, has_range: bool) -> None:
    """Raises ConfigError for an indicator that needs high and low where only closes are known."""
    for name in names:
        if not has_range and name.split("_")[0] in NEEDS_HIGH_LOW:
            raise ConfigError(
                f"the indicator {name!r} needs high and low prices and this data has closing prices only:"
                f" use {', '.join(CLOSE_ONLY)}"
            )


def indicators(table: pa.Table, names: Sequence[str] | None = None) -> pa.Table:
    """Adds a column an indicator (stockstats' names), computed from each symbol's first bar on adjusted prices.

    names  default: macd, boll_ub, boll_lb, rsi_30, close_30_sma; with high and low also cci_30, dx_30, close_60_sma

    Raises ConfigError for an unknown indicator, and for one that needs high and low where they are not known.
    """
    try:
        from stockstats import StockDataFrame  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("indicators need the extra: pip install 'mobula[finance]'") from error
    frame = table.to_pandas()
    has_range = bool(frame["high"].notna().any() and frame["low"].notna().any())
    chosen = tuple(names) if names is not None else (WITH_RANGE if has_range else CLOSE_ONLY)
    check_indicators(chosen, has_range=has_range)
    out = {name: np.full(len(frame), np.nan) for name in chosen}
    factor = frame["adj_close"] / frame["close"]
    for _, rows in frame[frame["adj_close"].notna()].groupby("symbol", observed=True):
        scale = factor.loc[rows.index]
        given = {"close": rows["adj_close"].to_numpy()}
        if has_range:
            given |= {n: (rows[n] * scale).to_numpy() for n in ("open", "high", "low")}
            given["volume"] = rows["volume"].fillna(0.0).to_numpy()
        stock = StockDataFrame.retype(pd.DataFrame(given, index=pd.DatetimeIndex(rows["time"])))
        for name in chosen:
            try:
                out[name][rows.index] = np.asarray(stock[name], float)
            except (KeyError, UserWarning, ValueError, IndexError, AttributeError) as error:
                raise ConfigError(f"stockstats has no indicator {name!r} ({error})") from error
    for name, values in out.items():
        table = table.append_column(name, pa.array(values))
    return table


# On aligned arrays ---------------------------------------------------------------------------------------------------


def ledoit_wolf(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Shrunk covariance of each window (Ledoit and Wolf 2004, as scikit-learn computes it).

    windows: [C, w, N].  Returns (covariance [C, N, N], shrinkage [C]): (1 - s) S + s tr(S) / N I.
    """
    w, N = windows.shape[-2:]
    x = windows - windows.mean(-2, keepdim=True)
    S = x.mT @ x / w
    level = S.diagonal(dim1=-2, dim2=-1).sum(-1) / N
    # Mean squared distance of the window's outer products from S, and of S from its target.
    fourth = x.square().sum(-1).square().sum(-1) / w
    norm = S.square().sum((-2, -1))
    noise = (fourth - norm) / w
    distance = norm - N * level**2
    s = torch.where(distance > 0, torch.minimum(noise, distance) / distance.clamp_min(1e-300), 0.0)
    if N == 1:
        s = torch.zeros_like(s)
    eye = torch.eye(N, dtype=windows.dtype, device=windows.device)
    return (1 - s)[:, None, None] * S + (s * level)[:, None, None] * eye, s


def turbulence(returns: Tensor, window: int = 252, *, pinv: bool = False, chunk: int = 512) -> Tensor:
    """tau_t = (r_t - mu_t)' Sigma_t^{-1} (r_t - mu_t), mu and Sigma from the `window` returns before t (Kritzman and Li 2010).

    returns: [T, N].  Returns [T], zero for the first `window` entries.  Shrunk covariance and a Cholesky solve; `pinv`: the sample
    covariance and its pseudo-inverse.  Raises DataError where there are fewer returns than `window` + 1.
    """
    T, N = returns.shape
    if window + 1 > T:
        raise DataError(f"turbulence needs more than {window} returns and the data has {T}")
    out = torch.zeros(T, dtype=torch.float64)
    past = returns.double().unfold(0, window, 1)[:-1].mT
    for start in range(0, len(past), chunk):
        windows = past[start : start + chunk]
        gap = returns[window + start : window + start + len(windows)].double() - windows.mean(-2)
        if pinv:
            x = windows - windows.mean(-2, keepdim=True)
            solved = (torch.linalg.pinv(x.mT @ x / (window - 1), hermitian=True) @ gap[..., None])[..., 0]
        else:
            cov, _ = ledoit_wolf(windows)
            # A tiny multiple of the identity keeps symbols that have not moved at all.
            jitter = 1e-12 * cov.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
            cov = cov + jitter[:, None, None] * torch.eye(N, dtype=cov.dtype)
            solved = torch.cholesky_solve(gap[..., None], torch.linalg.cholesky(cov))[..., 0]
        out[window + start : window + start + len(windows)] = (gap * solved).sum(-1)
    return out


def volatility(returns: Tensor, window: int = 20) -> Tensor:
    """[T, N] standard deviation (ddof 1) of the last `window` returns up to and with t; of all there are before that, 0 at first."""
    zero = torch.zeros(1, returns.shape[1], dtype=torch.float64)
    # Sums relative to the first return keep the subtraction harmless.
    x = returns.double() - returns[:1].double()
    first, second = (torch.cat([zero, p.cumsum(0)]) for p in (x, x.square()))
    end = torch.arange(1, len(returns) + 1)
    begin = (end - window).clamp_min(0)
    n = (end - begin)[:, None].double()
    total, squares = first[end] - first[begin], second[end] - second[begin]
    return ((squares - total.square() / n) / (n - 1).clamp_min(1)).clamp_min(0).sqrt()


def join_market(time: np.ndarray[Any, Any], rows: pd.DataFrame) -> np.ndarray[Any, Any]:
    """[T, G] latest values with `available_at` <= time; NaN before the first.

    rows: a column `available_at` (UTC) and G columns of values.
    """
    left = pd.DataFrame({"time": pd.to_datetime(time, utc=True).as_unit("ns")})
    right = rows.sort_values("available_at").copy()
    right["available_at"] = pd.to_datetime(right["available_at"], utc=True).dt.as_unit("ns")
    joined = pd.merge_asof(left, right, left_on="time", right_on="available_at", direction="backward")
    names = [name for name in rows.columns if name != "available_at"]
    return joined[names].to_numpy(float)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Scale:
    """Means and deviations of features [F], from the training range."""

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def fit(features: Tensor) -> Scale:
        """features: [..., F] of the training range; NaN is left out."""
        flat = features.reshape(-1, features.shape[-1]).double()
        known = flat.isfinite()
        n = known.sum(0).clamp_min(1)
        mean = torch.where(known, flat, 0.0).sum(0) / n
        square = torch.where(known, flat - mean, 0.0).square().sum(0) / n
        return Scale(mean, square.sqrt().clamp_min(1e-12))

    @staticmethod
    def given(numbers: Mapping[str, Sequence[float]], features: int) -> Scale:
        """From {"mean": [F], "deviation": [F]}.  Raises ConfigError where they do not fit F features."""
        found = []
        for name in ("mean", "deviation"):
            values = numbers.get(name)
            if values is None or len(values) != features:
                raise ConfigError(f"scale: {name} needs {features} numbers, one a feature")
            found.append(torch.tensor(list(values), dtype=torch.float64))
        if not bool(torch.stack(found).isfinite().all()) or not bool((found[1] > 0).all()):
            raise ConfigError("scale: finite numbers are needed, deviations above 0")
        return Scale(*found)

    def __call__(self, features: Tensor, clip: float = 10.0) -> Tensor:
        """Standardised and clipped; 0 where a feature is not known."""
        return ((features - self.mean) / self.deviation).clamp(-clip, clip).nan_to_num(0.0)
