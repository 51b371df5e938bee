"""What a path of returns was worth: metrics, intervals by the stationary bootstrap, the luck of selection.

Simple returns a bar, P bars a year (252 for shares).  No Sharpe ratio is reported without its number of bars and interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mobula.errors import DataError

Array = NDArray[np.float64]


def _returns(x: ArrayLike) -> Array:
    array = np.asarray(x, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise DataError(f"metrics need a list of at least 2 finite returns; got shape {array.shape}")
    return array


def sharpe(x: ArrayLike, *, periods: float = 252, risk_free: ArrayLike = 0.0) -> float:
    """sqrt(P) mean(x - rf) / sd(x - rf), ddof 1; 0 for returns that do not vary."""
    excess = _returns(x) - np.asarray(risk_free, dtype=np.float64)
    deviation = excess.std(ddof=1)
    return float(math.sqrt(periods) * excess.mean() / deviation) if deviation > 1e-15 else 0.0


def max_drawdown(x: ArrayLike) -> float:
    """min_t V_t / max_{s <= t} V_s - 1, the first value included."""
    value = np.concatenate([[1.0], np.cumprod(1 + _returns(x))])
    return float((value / np.maximum.accumulate(value) - 1).min())


def summary(
    x: ArrayLike,
    *,
    periods: float = 252,
    risk_free: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    costs: float | None = None,
) -> dict[str, float]:
    """Cumulative and annual return, volatility, Sharpe, Sortino, largest drawdown, Calmar, hit rate, 95 % value at risk, bars.

    weights  [T, K] after each trade and before the next: adds turnover, the mean of sum |dw| / 2 between rows
    costs    total paid over the first value: adds cost_share
    """
    r = _returns(x)
    excess = r - np.asarray(risk_free, dtype=np.float64)
    growth = float(np.prod(1 + r))
    annual = growth ** (periods / len(r)) - 1 if growth > 0 else -1.0
    downside = math.sqrt(float(np.mean(np.minimum(excess, 0) ** 2)))
    drawdown = max_drawdown(r)
    found = {
        "cumulative_return": growth - 1,
        "annual_return": annual,
        "volatility": float(r.std(ddof=1) * math.sqrt(periods)),
        "sharpe": sharpe(r, periods=periods, risk_free=risk_free),
        "sortino": float(math.sqrt(periods) * np.mean(excess) / downside) if downside > 1e-15 else 0.0,
        "max_drawdown": drawdown,
        "calmar": annual / abs(drawdown) if drawdown < 0 else 0.0,
        "hit_rate": float(np.mean(r > 0)),
        "value_at_risk_95": float(-np.quantile(r, 0.05)),
        "bars": float(len(r)),
    }
    if weights is not None:
        w = np.asarray(weights, dtype=np.float64)
        found["turnover"] = float(np.abs(np.diff(w, axis=0)).sum(-1).mean() / 2)
    if costs is not None:
        found["cost_share"] = float(costs)
    return found


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds it with 95 %, and the number of bars behind it."""

    value: float
    low: float
    high: float
    bars: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], {self.bars} bars"


def block_length(x: ArrayLike) -> float:
    """Mean block of the stationary bootstrap (Politis and White 2004, corrected 2009, in arch), at least 1."""
    from arch.bootstrap import optimal_block_length

    array = np.atleast_2d(np.asarray(x, float).T).T
    spread = array.std(axis=0) > 1e-15
    if not spread.any():
        return 1.0
    found = optimal_block_length(array[:, spread])["stationary"].to_numpy()
    return float(np.clip(np.nanmax(found), 1.0, len(array) / 2))


def _drawn(T: int, block: float, resamples: int, seed: int) -> NDArray[np.int64]:
    from arch.bootstrap import StationaryBootstrap

    bootstrap: Any = StationaryBootstrap(
        block,  # type: ignore[arg-type]
        np.arange(T),
        seed=np.random.default_rng(seed),
    )
    return np.stack([data[0][0] for data in bootstrap.bootstrap(resamples)])


def _sharpes(x: Array, periods: float) -> Array:
    deviation = x.std(axis=-1, ddof=1)
    return np.where(
        deviation > 1e-15, math.sqrt(periods) * x.mean(-1) / np.where(deviation > 1e-15, deviation, 1.0), 0.0
    )


def sharpe_interval(x: ArrayLike, *, periods: float = 252, resamples: int = 2000, seed: int = 0) -> Interval:
    """The Sharpe ratio with its percentile interval by the stationary bootstrap."""
    r = _returns(x)
    index = _drawn(len(r), block_length(r), resamples, seed)
    low, high = np.quantile(_sharpes(r[index], periods), [0.025, 0.975])
    return Interval(sharpe(r, periods=periods), float(low), float(high), len(r))


def sharpe_difference(
    x: ArrayLike, y: ArrayLike, *, periods: float = 252, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Sharpe ratio of x minus that of y, the same days of both drawn together."""
    a, b = _returns(x), _returns(y)
    if len(a) != len(b):
        raise DataError(f"paired returns must cover the same bars, not {len(a)} and {len(b)}")
    index = _drawn(len(a), block_length(np.stack([a, b], -1)), resamples, seed)
    gaps = _sharpes(a[index], periods) - _sharpes(b[index], periods)
    low, high = np.quantile(gaps, [0.025, 0.975])
    value = sharpe(a, periods=periods) - sharpe(b, periods=periods)
    return Interval(value, float(low), float(high), len(a))


def deflated_sharpe(x: ArrayLike, trials: int, spread: float) -> float:
    """Probability that the Sharpe ratio of x is above what the best of `trials` tries without skill would show.

    Bailey and Lopez de Prado (2014): the probabilistic Sharpe ratio against spread times the expected largest of `trials` standard
    normals.  `spread`: standard deviation of the tried Sharpe ratios, a bar (not annualised).
    """
    r = _returns(x)
    if r.std(ddof=1) < 1e-15:
        return 0.0
    observed = float(r.mean() / r.std(ddof=1))
    euler = 0.5772156649015329
    luck = 0.0
    if trials > 1:
        luck = (1 - euler) * stats.norm.ppf(1 - 1 / trials) + euler * stats.norm.ppf(
            1 - 1 / (trials * math.e)
        )
    skew, kurtosis = float(stats.skew(r)), float(stats.kurtosis(r, fisher=False))
    variance = 1 - skew * observed + (kurtosis - 1) / 4 * observed**2
    return float(
        stats.norm.cdf((observed - spread * luck) * math.sqrt(len(r) - 1) / math.sqrt(max(variance, 1e-12)))
    )


# Figure -------------------------------------------------------------------------------------------------------------


def backtest_figure(
    dates: Any,
    curves: dict[str, ArrayLike],
    path: Any,
    *,
    weights: ArrayLike | None = None,
    names: tuple[str, ...] = (),
    turbulence: ArrayLike | None = None,
    threshold: float | None = None,
    title: str = "",
) -> None:
    """Values and drawdowns of every curve, weights of the first over time, turbulence with its threshold.

    dates [T]; curves {name: values [T]}; weights [T, N + 1], cash first, with `names` of the N symbols.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from mobula.experiment.figures import COLOURS
    from mobula.files import storage

    rows = 2 + (weights is not None) + (turbulence is not None)
    heights = [2.6, 1.3, 1.5, 1.1][:rows]
    figure, panels = plt.subplots(
        rows,
        1,
        figsize=(8.6, 1.6 * sum(heights) / 1.3),
        sharex=True,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for i, (name, values) in enumerate(curves.items()):
        value = np.asarray(values, float)
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linewidth": 2.2 if i == 0 else 1.2}
        if i >= len(COLOURS):
            style["linestyle"] = "--"
        panels[0].plot(dates, value / value[0], label=name, **style)
        panels[1].plot(dates, 100 * (value / np.maximum.accumulate(value) - 1), **style)
    panels[0].set_ylabel("value over the first")
    panels[0].set_title(title, fontsize=10)
    panels[0].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[1].set_ylabel("drawdown, %")
    row = 2
    if weights is not None:
        w = np.asarray(weights, float)
        shades = ["0.85", *COLOURS, "#999933", "#882255", "#44aa99", "#117733"]
        panels[row].stackplot(
            dates,
            w.T,
            step="post",
            labels=["cash", *names],
            colors=[shades[i % len(shades)] for i in range(w.shape[1])],
            linewidth=0,
        )
        panels[row].set_ylim(0, 1)
        panels[row].set_ylabel(f"weights of {next(iter(curves))}", fontsize=8)
        panels[row].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        row += 1
    if turbulence is not None:
        panels[row].plot(dates, np.maximum(np.asarray(turbulence, float), 0.1), color="0.3", linewidth=0.8)
        if threshold is not None and math.isfinite(threshold):
            panels[row].axhline(threshold, color=COLOURS[1], linestyle="--", linewidth=1)
        panels[row].set_ylabel("turbulence")
        panels[row].set_yscale("log")
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with storage(path):
        figure.savefig(path, dpi=140)
    plt.close(figure)
