"""Metrics against numbers by hand and by peers; walk-forward splits against skfolio's; baselines on the common ledger."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mobula.envs.finance import baselines, metrics
from mobula.envs.finance.portfolio import PortfolioAllocation
from mobula.envs.finance.walkforward import Window, windows
from mobula.errors import ConfigError, DataError


def test_metrics_by_hand() -> None:
    x = [0.10, -0.05, 0.02, -0.10, 0.08]
    m = metrics.summary(x, periods=5, costs=0.01, weights=[[1, 0], [0, 1], [0, 1], [0.5, 0.5]])
    growth = 1.10 * 0.95 * 1.02 * 0.90 * 1.08
    assert m["cumulative_return"] == pytest.approx(growth - 1)
    assert m["annual_return"] == pytest.approx(growth - 1)
    mean, sd = 0.01, np.std(x, ddof=1)
    assert m["volatility"] == pytest.approx(sd * math.sqrt(5))
    assert m["sharpe"] == pytest.approx(math.sqrt(5) * mean / sd)
    assert m["sortino"] == pytest.approx(math.sqrt(5) * mean / math.sqrt((0.05**2 + 0.10**2) / 5))
    # From the first peak, 1.1, to the bottom after the fourth bar.
    assert m["max_drawdown"] == pytest.approx(0.95 * 1.02 * 0.90 - 1)
    assert m["calmar"] == pytest.approx((growth - 1) / (1 - 0.95 * 1.02 * 0.90))
    assert m["hit_rate"] == 0.6
    assert m["value_at_risk_95"] == pytest.approx(0.09)
    assert m["turnover"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert (m["cost_share"], m["bars"]) == (0.01, 5.0)
    assert metrics.max_drawdown([-0.5, 0.1]) == pytest.approx(-0.5)
    assert metrics.sharpe([0.01, 0.01]) == 0.0
    with pytest.raises(DataError, match="at least 2 finite returns"):
        metrics.sharpe([0.1, math.nan])


def test_metrics_agree_with_skfolio() -> None:
    from skfolio.measures import get_drawdowns, max_drawdown, semi_deviation, standard_deviation

    x = np.random.default_rng(0).normal(5e-4, 0.01, 700)
    m = metrics.summary(x)
    assert m["volatility"] == pytest.approx(standard_deviation(x) * math.sqrt(252))
    assert m["sharpe"] == pytest.approx(x.mean() / standard_deviation(x) * math.sqrt(252))
    assert m["annual_return"] == pytest.approx(float(np.prod(1 + x)) ** (252 / 700) - 1)
    # Theirs divides by n - 1.
    below = semi_deviation(x, min_acceptable_return=0.0) * math.sqrt(699 / 700)
    assert m["sortino"] == pytest.approx(x.mean() / below * math.sqrt(252))
    # Theirs measures from the value after the first bar.
    shifted = np.concatenate([[0.0], x])
    assert m["max_drawdown"] == pytest.approx(-max_drawdown(get_drawdowns(shifted, compounded=True)))


def test_intervals_hold_what_they_should() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(30):
        x = rng.normal(5e-4, 0.01, 500)
        interval = metrics.sharpe_interval(x, resamples=400, seed=seed)
        assert interval.low < interval.value < interval.high
        inside += interval.low < 5e-4 / 0.01 * math.sqrt(252) < interval.high
    # The standard error of a Sharpe ratio of n independent bars is near sqrt(252 / n).
    assert inside >= 26
    assert (interval.high - interval.low) / 3.92 == pytest.approx(math.sqrt(252 / 500), rel=0.25)
    # Paired: two strategies with the same noise differ by little, and the interval knows it.
    market = rng.normal(3e-4, 0.01, 1500)
    gap = metrics.sharpe_difference(market + 2e-4, market, resamples=500)
    assert gap.low > 0
    assert gap.value == pytest.approx(2e-4 / market.std(ddof=1) * math.sqrt(252))
    assert gap.high - gap.low < 0.1 * (metrics.sharpe_interval(market, resamples=500).high - gap.low)
    assert metrics.block_length(rng.normal(size=500)) < 12
    slow = np.convolve(rng.normal(size=560), np.ones(60), "valid")[:500]
    assert metrics.block_length(slow) > 20


def test_the_deflated_sharpe_knows_luck() -> None:
    x = np.random.default_rng(2).normal(1e-3, 0.01, 1000)
    one = metrics.deflated_sharpe(x, 1, 0.05)
    ratio = x.mean() / x.std(ddof=1)
    variance = 1 - stats.skew(x) * ratio + (stats.kurtosis(x, fisher=False) - 1) / 4 * ratio**2
    assert one == pytest.approx(stats.norm.cdf(ratio * math.sqrt(999 / variance)))
    # The benchmark of 100 tries is the mean of the largest of 100 standard normals, 2.5076, which the closed form meets to a hundredth.
    z = np.linspace(-8, 8, 20_001)
    largest = float(np.trapezoid(z * 100 * stats.norm.pdf(z) * stats.norm.cdf(z) ** 99, z))
    found_luck = ratio - stats.norm.ppf(metrics.deflated_sharpe(x, 100, 0.01)) * math.sqrt(variance / 999)
    assert found_luck / 0.01 == pytest.approx(largest, rel=0.01)
    assert metrics.deflated_sharpe(x, 100, 0.05) < one
    # The best of many strategies without skill: the benchmark is about its Sharpe ratio, so the probability is near a half.
    rng = np.random.default_rng(3)
    found = []
    for _ in range(40):
        tries = rng.normal(0, 0.01, (50, 400))
        sharpes = tries.mean(1) / tries.std(1, ddof=1)
        found.append(metrics.deflated_sharpe(tries[sharpes.argmax()], 50, float(sharpes.std())))
    assert 0.3 < np.median(found) < 0.7


def test_windows_roll() -> None:
    found = windows(100, first=40, block=10, validation=15, embargo=3)
    assert len(found) == 4
    assert found[0] == Window((0, 37), (40, 55), (55, 65))
    assert found[-1] == Window((0, 67), (70, 85), (85, 95))
    assert all(a.trade[1] == b.trade[0] for a, b in pairwise(found))
    slide = windows(100, first=40, block=10, validation=15, sliding=20)
    assert slide[2].train == (40, 60)
    from skfolio.model_selection import WalkForward

    theirs = WalkForward(test_size=10, train_size=40, expand_train=True).split(np.zeros((100, 1)))
    ours = windows(115, first=40, block=10, validation=15)
    for window, (train, test) in zip(ours, theirs, strict=False):
        assert window.train == (train[0], train[-1] + 1)
        assert window.trade == (test[0] + 15, test[-1] + 16)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"bars": 100, "first": 40, "block": 50, "validation": 20}, "more than the 100"),
        ({"bars": 100, "first": 40, "block": 0}, "block is 0"),
        ({"bars": 100, "first": 40, "block": 5, "validation": 5, "embargo": 40}, "empty range"),
        ({"bars": 100, "first": 40, "block": 5, "validation": 5, "embargo": -1}, "embargo is at least 0"),
    ],
)
def test_windows_that_cannot_be(arguments: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        windows(**arguments)  # type: ignore[arg-type]


def test_overlapping_ranges_are_refused() -> None:
    for parts in (((0, 10), (9, 15), (15, 20)), ((0, 10), (10, 15), (14, 20)), ((10, 20), (0, 5), (20, 30))):
        with pytest.raises(ConfigError, match="overlap or are out of order"):
            Window(*parts)


def test_baselines_trade_on_one_ledger(tmp_path: Path) -> None:
    env = PortfolioAllocation(
        1, start="2016-01-01", end="2016-08-01", training=False, fill="same_close", cost_bps=0
    )
    own = {"all_in_ko": np.array([0, 0, 0, 1.0, 0])}
    names = (
        "buy_and_hold",
        "equal_weight",
        "min_variance",
        "inverse_volatility",
        "momentum",
        "cash",
        "random",
        "all_in_ko",
    )
    found = baselines.backtest(env, names, weights=own)
    price = env.price
    growth = price[-1] / price[0]
    value = dict(zip(found.names, (found.value[-1] / 1e6).tolist(), strict=True))
    assert value["cash"] == 1.0
    assert value["buy_and_hold"] == pytest.approx(float(growth.mean()))
    assert value["all_in_ko"] == pytest.approx(float(growth[3]))
    # Equal weights, every 21 bars, without cost: the product of the means over the stretches.
    edges = [*range(0, env.T - 1, 21), env.T - 1]
    product = math.prod(float((price[b] / price[a]).mean()) for a, b in pairwise(edges))
    assert value["equal_weight"] == pytest.approx(product)
    past = env.whole.returns[env.first - 251 : env.first + 1].numpy()
    first = found.weights[1, found.names.index("inverse_volatility"), 1:].numpy()
    drift = price[1].numpy() / price[0].numpy() / past.std(0)
    np.testing.assert_allclose(first, drift / drift.sum(), rtol=1e-6)
    # Momentum leaves the last month out: what rose until then is held, what rose in it alone is not.
    early, late = np.zeros((252, 6)), np.r_[np.zeros((231, 6)), np.full((21, 6), 0.05)]
    early[:231, [1, 4]], early[231:, [1, 4]] = 0.001, -0.03
    late[:, [1, 4]] = 0.0
    assert baselines.momentum(early + late).tolist() == [0.0, 0.5, 0.0, 0.0, 0.5, 0.0]
    low = found.weights[1, found.names.index("min_variance"), 1:].numpy()
    assert low @ np.cov(past.T) @ low < 0.9 * np.full(5, 0.2) @ np.cov(past.T) @ np.full(5, 0.2)
    metrics.backtest_figure(
        found.dates,
        {n: found.value[:, i].numpy() for i, n in enumerate(found.names)},
        tmp_path / "figure.png",
        weights=found.weights[:, 0].numpy(),
        names=env.symbols,
        turbulence=env.turbulence,
        threshold=env.threshold,
    )
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match=r"unknown baseline 'equal'. Did you mean 'equal_weight'"):
        baselines.backtest(env, ("equal",))
