"""Statistics over seeds: point estimates with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 9999
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds it with `confidence`; low = high = value where there is nothing to estimate."""

    value: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def exact(value: float, n: int = 1) -> Estimate:
    """A number that is known, not estimated (a count, an exact check)."""
    return Estimate(float(value), float(value), float(value), n, 1.0)


def _values(data: ArrayLike) -> Array:
    array = np.asarray(data, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"a statistic needs a list of numbers, one a seed; it got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("a statistic over a NaN or an infinity has no meaning")
    return array


def bootstrap(
    samples: Sequence[ArrayLike],
    statistic: Callable[..., Any],
    *,
    confidence: float = 0.95,
    paired: bool = False,
    seed: int = 0,
) -> Estimate:
    """`statistic(*samples, axis=-1)` with its bias-corrected and accelerated bootstrap interval (scipy.stats.bootstrap).

    Where BCa is undefined (all values equal, fewer than three) the interval is the percentile one.
    """
    arrays = [_values(sample) for sample in samples]
    value = float(statistic(*arrays, axis=-1))
    n = len(arrays[0])
    if all(np.ptp(array) == 0 for array in arrays):
        return Estimate(value, value, value, n, confidence)
    for method in ("BCa", "percentile") if n >= 3 else ("percentile",):
        with np.errstate(all="ignore"):
            interval = stats.bootstrap(
                arrays,
                statistic,
                n_resamples=RESAMPLES,
                confidence_level=confidence,
                method=method,
                paired=paired,
                vectorized=True,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite([interval.low, interval.high]).all():
            return Estimate(value, float(interval.low), float(interval.high), n, confidence)
    return Estimate(value, value, value, n, confidence)


def mean(data: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean over seeds."""
    return bootstrap([data], np.mean, confidence=confidence, seed=seed)


def _iqm(data: Array, axis: int = -1) -> Any:
    return stats.trim_mean(data, 0.25, axis=axis)


def iqm(data: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Interquartile mean: the mean of the middle half (Agarwal et al., NeurIPS 2021, arXiv 2108.13264)."""
    return bootstrap([data], _iqm, confidence=confidence, seed=seed)


def paired_difference(
    first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of first - second, the entries of one seed taken together."""
    a, b = _values(first), _values(second)
    if len(a) != len(b):
        raise ValueError(f"paired data must have equal lengths, not {len(a)} and {len(b)}")
    return mean(a - b, confidence=confidence, seed=seed)


def ratio_of_means(
    first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """mean(first) / mean(second), the entries of one seed taken together."""

    def ratio(a: Array, b: Array, axis: int = -1) -> Any:
        return np.mean(a, axis=axis) / np.mean(b, axis=axis)

    return bootstrap([first, second], ratio, confidence=confidence, paired=True, seed=seed)


def difference(first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Difference of the means of two independent samples."""

    def gap(a: Array, b: Array, axis: int = -1) -> Any:
        return np.mean(a, axis=axis) - np.mean(b, axis=axis)

    return bootstrap([first, second], gap, confidence=confidence, seed=seed)


def stratified(
    tasks: Mapping[str, ArrayLike],
    statistic: Callable[..., Any] = _iqm,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """`statistic` over the runs of all tasks, seeds resampled within each task (Agarwal et al. 2021, section 4.1)."""
    arrays = [_values(values) for values in tasks.values()]
    rng = np.random.default_rng(seed)
    drawn = [array[rng.integers(len(array), size=(resamples, len(array)))] for array in arrays]
    replicates = statistic(np.concatenate(drawn, axis=1), axis=-1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    pooled = np.concatenate(arrays)
    return Estimate(float(statistic(pooled, axis=-1)), float(low), float(high), len(pooled), confidence)


def probability_of_improvement(
    first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """P(first > second) + P(equal) / 2 for a random pair of seeds (Mann-Whitney)."""

    def probability(a: Array, b: Array, axis: int = -1) -> Any:
        gap = np.moveaxis(a, axis, -1)[..., :, None] - np.moveaxis(b, axis, -1)[..., None, :]
        return (np.sign(gap) * 0.5 + 0.5).mean(axis=(-2, -1))

    a, b = _values(first), _values(second)
    value = float(probability(a, b))
    rng = np.random.default_rng(seed)
    first_drawn, second_drawn = (array[rng.integers(len(array), size=(2000, len(array)))] for array in (a, b))
    tail = (1 - confidence) / 2
    low, high = np.quantile(probability(first_drawn, second_drawn), [tail, 1 - tail])
    return Estimate(value, float(low), float(high), len(a), confidence)


def regret_slope(
    steps: ArrayLike, regrets: ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean over seeds of the slope of log regret against log steps; 0.5 is the square-root law.

    steps [T], regrets [seeds, T] of cumulative regret, both above 0.
    """
    x, y = np.log(np.asarray(steps, dtype=np.float64)), np.log(np.asarray(regrets, dtype=np.float64))
    centred = x - x.mean()
    slopes = (y * centred).sum(-1) / (centred**2).sum()
    return mean(slopes, confidence=confidence, seed=seed)


def fraction(successes: Sequence[bool]) -> Estimate:
    """Share of successes, taken as the count that it is; the Clopper-Pearson interval is for information."""
    count, n = int(sum(successes)), len(successes)
    interval = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
    return Estimate(count / n, float(interval.low), float(interval.high), n)
