"""Market data: schema and its errors, folders and manifests, processors that do not look ahead, series, synthetic markets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from mobula.envs.finance import processors, schema, sources, synthetic, tensors
from mobula.envs.finance.sources import load_daily
from mobula.errors import ConfigError, DataError


def closes(rows: dict[str, list[float | None]], start: str = "2020-01-02") -> pa.Table:
    """Daily closes by symbol from a business day on; None where there is no bar."""
    days = pd.bdate_range(start, periods=max(len(v) for v in rows.values()))
    out: dict[str, list[Any]] = {"time": [], "symbol": [], "close": []}
    for symbol, values in rows.items():
        for day, value in zip(days, values, strict=False):
            if value is not None:
                out["time"].append(day + pd.Timedelta(hours=21))
                out["symbol"].append(symbol)
                out["close"].append(value)
    return schema.table_of(out)


def made(days: int = 400, symbols: int = 3, seed: int = 1) -> pa.Table:
    names = tuple(f"S{i}" for i in range(symbols))
    return synthetic.SyntheticMarket(days, symbols, seed).fetch(names)


# Schema and folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("close", 0.0, "close must be above 0"),
        ("close", -3.0, "close must be above 0"),
        ("high", 1e-3, "high is below"),
        ("low", 1e6, "low is above"),
        ("volume", -1.0, "volume is negative"),
        ("available_at", pd.Timestamp("1999-01-01", tz="UTC"), "available_at is before"),
    ],
)
def test_impossible_rows_are_refused_by_name(column: str, value: Any, says: str) -> None:
    frame = made().to_pandas()
    frame.loc[7, column] = value
    with pytest.raises(DataError, match=says) as error:
        schema.validate(schema.conform(pa.Table.from_pandas(frame, preserve_index=False)))
    assert str(frame.loc[7, "symbol"]) in str(error.value)


def test_a_jump_is_remarked_and_not_clipped() -> None:
    remarks = schema.validate(closes({"A": [10.0, 10.1, 20.0, 20.1]}))
    assert len(remarks) == 1
    assert "A moved by +0.68" in remarks[0]


def test_twins_are_refused_and_exact_duplicates_dropped() -> None:
    table = closes({"A": [1.0, 2.0], "B": [3.0, 4.0]})
    assert processors.normalise(pa.concat_tables([table, table])).num_rows == 4
    other = closes({"A": [1.0, 2.5]})
    with pytest.raises(
        DataError, match=r"1 \(time, symbol\) keys have two different rows: \(2020-01-03 21:00, A\)"
    ):
        processors.normalise(pa.concat_tables([table, other]))


def test_naive_instants_are_read_in_their_zone() -> None:
    frame = pd.DataFrame({"time": [pd.Timestamp("2020-07-01 16:00")], "symbol": ["A"], "close": [1.0]})
    table = pa.Table.from_pandas(frame, preserve_index=False)
    utc = processors.normalise(table, "America/New_York")["time"][0].as_py()
    assert utc.hour == 20
    with pytest.raises(DataError, match="unknown time zone"):
        processors.normalise(table, "America/Gotham")


def test_a_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    table = made()
    manifest = schema.write_market(table, tmp_path / "m", source="test", processors=[{"name": "normalise"}])
    assert manifest["survivorship"] == "unknown"
    assert sorted(p.name for p in (tmp_path / "m" / "freq=1d").iterdir()) == ["year=2000", "year=2001"]
    back = schema.read_market(tmp_path / "m")
    assert back.equals(schema.ordered(schema.conform(table)))
    some = schema.read_market(tmp_path / "m", symbols=["S1"], start="2000-12-01", end="2001-02-01")
    days = some["time"].to_numpy().astype("datetime64[D]")
    assert set(some["symbol"].to_pylist()) == {"S1"}
    assert np.datetime64("2000-12-01") <= days.min() < np.datetime64("2000-12-05")
    assert np.datetime64("2001-01-29") <= days.max() < np.datetime64("2001-02-01")
    # The same rows, in another order, make the same manifest; and the tensors of equal manifests are equal bit for bit.
    again = schema.write_market(
        table.take(list(range(table.num_rows))[::-1]),
        tmp_path / "n",
        source="test",
        processors=[{"name": "normalise"}],
    )
    assert schema.manifest_hash(again) == schema.manifest_hash(manifest)
    first, second = (tensors.market_tensor(str(tmp_path / name)) for name in "mn")
    for name in ("close", "open", "feat", "turbulence", "sigma", "returns"):
        assert getattr(first, name).numpy().tobytes() == getattr(second, name).numpy().tobytes()


def test_a_changed_file_and_a_missing_manifest_are_refused(tmp_path: Path) -> None:
    schema.write_market(made(), tmp_path / "m", source="test")
    part = next((tmp_path / "m").rglob("part-0.parquet"))
    part.write_bytes(part.read_bytes() + b" ")
    with pytest.raises(DataError, match="is not the file that the manifest describes"):
        schema.read_manifest(tmp_path / "m")
    (tmp_path / "m" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        schema.read_manifest(tmp_path / "m")
    with pytest.raises(DataError, match=r"manifest.json is missing"):
        schema.read_manifest(tmp_path)


def test_membership_is_stated_where_it_is_given(tmp_path: Path) -> None:
    rows = pa.table({"symbol": ["S0"], "from": [None], "to": [None]}).cast(schema.UNIVERSE)
    manifest = schema.write_market(made(), tmp_path / "m", source="test", universe=rows)
    assert "universe.parquet" in manifest["survivorship"]
    assert "universe.parquet" in manifest["files"]


# Alignment ------------------------------------------------------------------------------------------------------------------


def test_alignment_fills_forward_and_never_back() -> None:
    gap: list[float | None] = [None] * 7
    table = closes({"A": [1.0, 2.0, *gap, 3.0, 4.0], "B": [None, None, *[5.0] * 6, None, None, None]})
    data = sources.from_table(processors.align(table), {})
    a, b = (data.columns["adj_close"][:, i] for i in range(2))
    bars = len(data.time)
    assert np.isnan(b[:2]).all()
    assert not data.tradable[:2, 1].any()
    # B ends; nothing of it can be traded after its last bar, although its price is still there.
    last = int(np.flatnonzero(~data.filled[:, 1])[-1])
    assert not data.tradable[last + 1 :, 1].any()
    assert (b[last:] == 5.0).all()
    filled = data.filled[:, 0]
    assert (a[filled] == 2.0).all()
    assert filled.sum() >= 7
    run = np.flatnonzero(filled)
    assert data.tradable[run[:5], 0].all()
    assert not data.tradable[run[5:], 0].any()
    assert data.tradable[-1, 0]
    # The calendar's sessions are all there, also those on which nobody has a bar.
    assert bars == len(processors.calendar_of("XNYS", "2020-01-02", "2020-01-30").closes[:bars])
    # A later bar changes nothing of what was there before.
    cut = processors.align(table.filter(pa.array(table["time"].to_numpy() < np.datetime64("2020-01-08"))))
    early = sources.from_table(cut, {})
    n = len(early.time)
    np.testing.assert_array_equal(early.columns["close"], data.columns["close"][:n])


def test_a_filled_bar_has_no_volume_and_no_range() -> None:
    table = made(40, 2)
    keep = np.ones(table.num_rows, bool)
    keep[21] = False
    data = sources.from_table(processors.align(table.filter(pa.array(keep))), {})
    t, n = divmod(21, 2)
    assert data.filled[t, n]
    assert data.columns["volume"][t, n] == 0
    for name in ("open", "high", "low", "close"):
        assert data.columns[name][t, n] == data.columns["close"][t - 1, n]


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="unknown calendar"):
        processors.calendar_of("XNIS", "2020-01-02", "2020-02-02")
    with pytest.raises(ConfigError, match=r"unknown universe 'us50'. Did you mean 'us5'"):
        load_daily("us50")
    with pytest.raises(ConfigError, match=r"no symbol 'APPL'. Did you mean 'AAPL'"):
        load_daily("us20", symbols=["APPL"])
    with pytest.raises(ConfigError, match="is no date"):
        load_daily("us5", "soon")
    with pytest.raises(ConfigError, match="is empty"):
        load_daily("us5", "2015-01-01", "2014-01-01")
    with pytest.raises(DataError, match="no bars"):
        load_daily("us5", "2024-01-01")
    with pytest.raises(ConfigError, match="no bars of '1min'"):
        sources.source("us20").check(None, "1min")
    with pytest.raises(ConfigError, match="closing prices only"):
        sources.source("us20").check(None, "1d", ohlc=True)


# Real data ------------------------------------------------------------------------------------------------------------------


def test_packaged_prices() -> None:
    data = load_daily("us20", "2000-01-01", "2001-01-01", symbols=["XOM", "AAPL"])
    assert data.symbols == ("XOM", "AAPL")
    assert len(data.dates) == 252
    assert str(data.dates[0]) == "2000-01-03"
    # New York closes at 21:00 UTC in winter, 20:00 in summer, and at 18:00 on the day after Thanksgiving.
    hours = dict(
        zip(
            data.dates.astype(str), (data.time - data.dates).astype("timedelta64[h]").astype(int), strict=True
        )
    )
    assert (hours["2000-01-03"], hours["2000-07-03"], hours["2000-07-05"], hours["2000-11-24"]) == (
        21,
        17,
        20,
        18,
    )
    logs = data.log_returns()
    from skfolio.datasets import load_sp500_dataset

    frame = load_sp500_dataset().loc["2000-01-03":"2000-12-29", ["XOM", "AAPL"]]
    np.testing.assert_allclose(logs.numpy(), np.diff(np.log(frame.to_numpy()), axis=0), rtol=0, atol=1e-12)
    assert logs.dtype == torch.float64
    assert "survived" in data.about["survivorship"]


def test_index_bars_hold_together() -> None:
    data = load_daily("indices", "2008-01-01", "2009-01-01")
    c = data.columns
    assert (c["low"] <= np.minimum(c["open"], c["close"])).all()
    assert (c["high"] >= np.maximum(c["open"], c["close"])).all()
    assert (c["volume"] > 0).all()


# Processors -----------------------------------------------------------------------------------------------------------------


def test_shrinkage_is_scikit_learn_s() -> None:
    x = torch.randn(4, 60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor(
        [1, 2, 3, 4, 5]
    )
    cov, s = processors.ledoit_wolf(x)
    for i in range(4):
        wanted, shrinkage = ledoit_wolf(x[i].numpy())
        np.testing.assert_allclose(cov[i], wanted, rtol=1e-10)
        assert float(s[i]) == pytest.approx(shrinkage, rel=1e-10)


def test_turbulence_is_a_mahalanobis_distance_from_the_past_alone() -> None:
    g = torch.Generator().manual_seed(3)
    r = torch.randn(330, 4, generator=g, dtype=torch.float64) * 0.01
    tau = processors.turbulence(r, 252)
    plain = processors.turbulence(r, 252, pinv=True)
    assert (tau[:252] == 0).all()
    for t in (252, 300, 329):
        past = r[t - 252 : t].numpy()
        gap = r[t].numpy() - past.mean(0)
        assert float(tau[t]) == pytest.approx(gap @ np.linalg.solve(ledoit_wolf(past)[0], gap), rel=1e-8)
        assert float(plain[t]) == pytest.approx(gap @ np.linalg.inv(np.cov(past.T)) @ gap, rel=1e-8)
    # Under Gaussian returns its mean is about N.
    long = processors.turbulence(torch.randn(5000, 4, generator=g, dtype=torch.float64), 252)[252:]
    assert float(long.mean()) == pytest.approx(4.0, rel=0.05)
    with pytest.raises(DataError, match="more than 252 returns"):
        processors.turbulence(r[:252])


def test_every_feature_is_the_same_on_data_that_end_earlier() -> None:
    names = ["macd", "boll_ub", "boll_lb", "rsi_30", "cci_30", "dx_30", "close_30_sma", "close_60_sma"]
    table = processors.align(made(420, 2))

    def features(rows: pa.Table) -> tensors.MarketTensor:
        data = sources.from_table(processors.indicators(rows, names), {})
        return tensors.market_of(data, names)

    whole = features(table)
    rng = np.random.default_rng(0)
    for t in [int(t) for t in rng.integers(260, 419, size=4)]:
        part = features(table.slice(0, 2 * (t + 1)))
        assert len(part) == t + 1
        for name in ("feat", "turbulence", "sigma", "returns", "close"):
            np.testing.assert_array_equal(getattr(part, name)[t], getattr(whole, name)[t], err_msg=name)
        np.testing.assert_allclose(tensors.relative(part)[t], tensors.relative(whole)[t], rtol=1e-12)


def test_indicators_against_pandas() -> None:
    data = sources.from_table(processors.indicators(processors.align(made(120, 1))), {})
    close = pd.Series(data.columns["adj_close"][:, 0])
    np.testing.assert_allclose(
        data.columns["close_30_sma"][40:, 0], close.rolling(30).mean()[40:], rtol=1e-10
    )
    width = close.rolling(20)
    np.testing.assert_allclose(
        data.columns["boll_ub"][40:, 0], (width.mean() + 2 * width.std())[40:], rtol=1e-9
    )
    fast, slow = close.ewm(span=12).mean(), close.ewm(span=26).mean()
    np.testing.assert_allclose(data.columns["macd"][60:, 0], (fast - slow)[60:], atol=1e-9)


def test_indicators_that_need_high_and_low() -> None:
    table = processors.align(closes({"A": [float(i) for i in range(1, 40)]}))
    with pytest.raises(ConfigError, match="'cci_30' needs high and low"):
        processors.indicators(table, ["cci_30"])
    with pytest.raises(ConfigError, match="no indicator 'mcad'"):
        processors.indicators(table, ["mcad"])
    with pytest.raises(ConfigError, match="'dx_30' needs high and low"):
        tensors.market_tensor("us5", indicators=["dx_30"])


def test_a_join_takes_what_was_available() -> None:
    time = np.array(["2014-01-03T21:00", "2014-01-06T21:00", "2014-01-07T21:00"], dtype="datetime64[ns]")
    joined = processors.join_market(time, sources.market_series("vix"))[:, 0]
    # The index of a day is known an hour after its close: the bar sees the one before.
    assert np.isnan(joined[0])
    np.testing.assert_allclose(joined[1:], [13.76, 13.55])


def test_volatility_and_scale() -> None:
    r = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = processors.volatility(r)
    np.testing.assert_allclose(sigma[30], r[11:31].std(0), rtol=1e-10)
    np.testing.assert_allclose(sigma[5], r[:6].std(0), rtol=1e-10)
    features = torch.randn(100, 3, 2, dtype=torch.float64) * 5 + 2
    features[0, 0, 0] = torch.nan
    scale = processors.Scale.fit(features[:50])
    flat = scale(features[:50]).reshape(-1, 2)
    np.testing.assert_allclose(flat.std(0, correction=0), 1.0, rtol=0.02)
    assert float(scale(features)[0, 0, 0]) == 0.0


# Synthetic ------------------------------------------------------------------------------------------------------------------


def test_a_synthetic_market_has_what_it_says() -> None:
    m = synthetic.regime_garch(6000, 6, seed=2, ic=0.2)
    assert (m["low"] <= np.minimum(m["open"], m["close"])).all()
    assert (m["high"] >= np.maximum(m["open"], m["close"])).all()
    np.testing.assert_allclose(np.log(m["close"][1:] / m["close"][:-1]), m["returns"][1:], atol=1e-12)
    rough = m["regime"].mean()
    assert rough == pytest.approx(0.01 / (0.01 + 0.05), abs=0.05)
    x = np.abs(m["returns"])
    size = (x / (x.std(0) + np.sqrt(m["variance"])[:, None])).ravel()
    assert np.corrcoef(size, np.log(m["volume"]).ravel())[0, 1] > 0.45
    # The signal predicts the part of the next return that the factor does not explain.
    r, f = m["returns"], m["returns"].mean(1, keepdims=True)
    residual = r - f * (r * f).mean(0) / (f**2).mean()
    ic = np.mean([np.corrcoef(m["signal"][:-1, i], residual[1:, i])[0, 1] for i in range(6)])
    assert 0.12 < ic < 0.24
    # Of the next day's part: with that of its own day it has 0.9 of it, through its own memory alone.
    today = np.mean([np.corrcoef(m["signal"][:, i], residual[:, i])[0, 1] for i in range(6)])
    assert today < ic
    h, f = m["variance"], m["factor"]
    omega = 0.02e-4 * np.where(m["regime"] == 1, 4, 1)
    np.testing.assert_allclose(h[1:], (omega + 0.08 * f**2 + 0.90 * h)[:-1], rtol=1e-9)
    shocks = (f - 3e-4) / np.sqrt(h)
    assert shocks.std() == pytest.approx(1.0, abs=0.05)
    squares = m["returns"][:, 0] ** 2
    assert np.corrcoef(squares[1:], squares[:-1])[0, 1] > 0.05


def test_the_planted_signal_has_its_optimum() -> None:
    s = synthetic.signal_paths(6000, 64, 1)
    assert float(s.var()) == pytest.approx(1.0, rel=0.02)
    assert float((s[1:] * s[:-1]).mean()) == pytest.approx(0.9, rel=0.02)
    sign = synthetic.score(lambda now, before: now.sign(), s, beta=1e-3, cost=0.0)
    assert float(sign.mean()) == pytest.approx(synthetic.sign_optimum(), rel=0.02)
    assert synthetic.sign_optimum() == pytest.approx(7.979e-4, rel=1e-4)
    net = synthetic.score(lambda now, before: now.sign(), s, beta=1e-3, cost=5e-4)
    assert synthetic.sign_net(1e-3, 5e-4) == pytest.approx(6.54e-4, rel=1e-3)
    assert float(net.mean()) == pytest.approx(synthetic.sign_net(1e-3, 5e-4), rel=0.03)
    policy, gain = synthetic.optimal_policy()
    assert gain == pytest.approx(7.10e-4, rel=2e-3)
    best = float(synthetic.score(policy, s, beta=1e-3, cost=5e-4).mean())
    assert best == pytest.approx(7.03e-4, rel=0.015)
    assert best > float(net.mean())


def test_the_planted_environment_pays_what_the_score_says() -> None:
    env = synthetic.PlantedSignal(4000, cost=5e-4)
    env.reset(seed=0)
    rewards, paths = [], [env.state["s"]]
    for _ in range(60):
        _, reward, _, _, _ = env.step(env.state["s"].sign()[:, None].float())
        rewards.append(reward)
        paths.append(env.state["s"])
    s = torch.stack(paths)
    assert float(s.var()) == pytest.approx(1.0, rel=0.03)
    assert float((s[1:] * s[:-1]).mean()) == pytest.approx(0.9, rel=0.03)
    wanted = synthetic.score(lambda now, before: now.sign(), torch.stack(paths[:-1]), beta=1e-3, cost=5e-4)
    # In percent, with noise of 0.01 a step.
    assert float(torch.stack(rewards).mean()) / 100 == pytest.approx(
        float(wanted.mean()), abs=4 * 0.01 / (60 * 4000) ** 0.5
    )


def test_a_manifest_is_plain_json(tmp_path: Path) -> None:
    schema.write_market(made(30, 1), tmp_path / "m", source="test")
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["symbols"]["S0"]["first"].startswith("2000-01-03T21:00")
