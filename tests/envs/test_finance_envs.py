"""Market environments: the ledger to the last cent, no look-ahead, the remainder factor, and what users of the peers asked for."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from mobula.envs.finance import tensors
from mobula.envs.finance.market_env import LookaheadGuard, MarketEnv
from mobula.envs.finance.portfolio import PortfolioAllocation, grow, rebalance
from mobula.envs.finance.sources import MarketData
from mobula.envs.finance.synthetic import regime_garch
from mobula.envs.finance.tensors import MarketTensor
from mobula.envs.finance.trading import StockTrading
from mobula.errors import ConfigError, DataError, EnvironmentFault
from mobula.sampling.bridge import GymView
from mobula.sampling.conformance import check_env

ALL = {"start": None, "end": None, "turbulence_q": None}


def market(
    close: Any, *, opens: Any = None, volume: Any = None, tradable: Any = None, session: Any = None
) -> MarketTensor:
    """Tensors of prices [T, N] given by hand."""
    p = np.asarray(close, float)
    T, N = p.shape
    unknown = np.full((T, N), np.nan)
    columns = {
        "close": p,
        "adj_close": p,
        "open": unknown if opens is None else np.asarray(opens, float),
        "volume": unknown if volume is None else np.broadcast_to(np.asarray(volume, float), (T, N)).copy(),
    }
    time = np.datetime64("2020-01-01T21:00", "ns") + np.arange(T) * np.timedelta64(1, "D")
    data = MarketData(
        tuple("ABCDEFGHIJ"[:N]),
        time,
        columns,
        np.ones((T, N), bool) if tradable is None else np.asarray(tradable, bool),
        np.zeros((T, N), bool),
        {"survivorship": "made up"},
    )
    made = tensors.market_of(data, ())
    return made if session is None else dataclasses.replace(made, session=torch.tensor(session))


def walk(T: int = 60, N: int = 4, seed: int = 0) -> MarketTensor:
    m = regime_garch(T, N, seed=seed)
    return market(m["close"], opens=m["open"], volume=m["volume"] / 500)


def still(env: MarketEnv) -> dict[str, torch.Tensor]:
    env.reset(seed=0)
    return env.state


FRICTIONS: dict[str, Any] = {
    "buy_cost_bps": [5.0, 10.0, 30.0, 0.0],
    "sell_cost_bps": {"A": 25.0, "C": 1.0},
    "half_spread_bps": 3.0,
    "per_share_fee": 0.01,
    "min_fee": 2.0,
}


# The ledger -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["next_open", "next_close", "same_close"])
@pytest.mark.parametrize("frictions", [{}, FRICTIONS, {"impact": "sqrt", "impact_permanent": 0.0}])
def test_value_changes_by_what_is_held_and_what_is_paid(fill: str, frictions: dict[str, Any]) -> None:
    m = walk()
    env = StockTrading(64, market=m, fill=fill, cash=2e4, episode_length=30, **ALL, **frictions)
    env.reset(seed=1)
    g = torch.Generator().manual_seed(0)
    for _ in range(29):
        old = env.state
        env.step(2 * torch.rand(64, 4, generator=g) - 1)
        new = env.state
        p0, p1 = m.close[old["t"]], m.close[new["t"]]
        assert m.open is not None
        at = {"next_open": m.open[new["t"]], "next_close": p1, "same_close": p0}[fill]
        gain = (old["shares"] * (at - p0) + new["shares"] * (p1 - at)).sum(-1)
        change = gain - (new["paid"] - old["paid"])
        np.testing.assert_allclose(new["value"] - old["value"], change, rtol=0, atol=1e-9 * 2e4)
        np.testing.assert_allclose(new["value"], new["cash"] + (new["shares"] * p1).sum(-1), rtol=1e-12)
        assert bool((new["paid"] >= old["paid"] - 1e-9).all())
    assert float(new["paid"].min()) > 0


@pytest.mark.parametrize("frictions", [{"half_spread_bps": [3.0, 0.0, 8.0, 1.0]}, FRICTIONS])
def test_costs_are_those_of_every_trade_by_itself(frictions: dict[str, Any]) -> None:
    """Shares that changed hands, priced trade by trade: spread, commission by direction, fee a share, smallest fee."""
    settings = {"buy_cost_bps": [5.0, 10.0, 30.0, 0.0], "sell_cost_bps": [25.0, 0.0, 1.0, 0.0]} | frictions
    m = walk()
    env = StockTrading(
        32, market=m, cash=2e4, episode_length=30, min_rate=0.0, max_shares=40, **ALL, **settings
    )
    env.reset(seed=1)
    g = torch.Generator().manual_seed(0)
    spread = torch.tensor(settings["half_spread_bps"], dtype=torch.float64).expand(4) / 1e4
    buy = torch.tensor([5.0, 10.0, 30.0, 0.0]).double() / 1e4
    sell = torch.tensor([25.0, 0.0, 1.0, 0.0]).double() / 1e4
    smallest, seen = frictions.get("min_fee", 0.0), [0, 0]
    for _ in range(29):
        old = env.state
        env.step(2 * torch.rand(32, 4, generator=g) - 1)
        new = env.state
        assert m.open is not None
        price, net = m.open[new["t"]], new["shares"] - old["shares"]
        rate = torch.where(net > 0, buy, sell)
        fee = net.abs() * (price * rate + frictions.get("per_share_fee", 0.0))
        small = (fee < smallest) & (net != 0)
        seen = [seen[0] + int(small.sum()), seen[1] + int((~small & (net != 0)).sum())]
        fee = torch.where(net != 0, fee.clamp_min(smallest), 0.0)
        paid = (fee + net.abs() * price * spread).sum(-1)
        torch.testing.assert_close(new["paid"] - old["paid"], paid, rtol=1e-9, atol=1e-8)
        torch.testing.assert_close(new["traded"] - old["traded"], (net.abs() * price).sum(-1))
    # Both sides of the smallest fee have been met.
    assert seen[1] > 100 and (seen[0] > 100 or not smallest)


@pytest.mark.parametrize(
    "options",
    [
        {},
        FRICTIONS,
        {**FRICTIONS, "sequential_buys": True},
        {**FRICTIONS, "lot": 0.0, "impact": "linear", "impact_coef": 0.5},
        {**FRICTIONS, "lot": 10.0, "impact": "almgren_chriss", "t_plus_one": True},
        {"cost_bps": 500.0, "lot": 0.0, "sequential_buys": True},
        {"impact": "sqrt", "impact_coef": 3.0, "participation": 1.0, "min_fee": 50.0},
    ],
)
def test_cash_and_shares_are_never_negative(options: dict[str, Any]) -> None:
    env = StockTrading(
        300, market=walk(), cash=3e3, max_shares=60, min_rate=0.0, episode_length=40, **ALL, **options
    )
    env.reset(seed=4)
    g = torch.Generator().manual_seed(1)
    least = 3e3
    for step in range(39):
        # Long stretches of buying everything, then of selling everything, then at random.
        action = 2 * torch.rand(300, 4, generator=g) - 1
        action[:100] = 1.0 if step % 8 < 5 else -1.0
        env.step(action)
        assert float(env.state["cash"].min()) >= 0.0
        assert float(env.state["shares"].min()) >= 0.0
        least = min(least, float(env.state["cash"].min()))
    # The cash was used to the last share.
    assert least < 60.0


def test_a_million_trades_leave_no_error_in_the_ledger() -> None:
    m = walk(260, 4)
    env = StockTrading(1000, market=m, cash=1e6, episode_length=259, min_rate=0.0, **ALL, **FRICTIONS)
    env.reset(seed=0)
    state = env.state
    g = torch.Generator().manual_seed(0)
    start, gains, trades = state["value"].clone(), torch.zeros(1000, dtype=torch.float64), 0
    for _ in range(258):
        new, _, _ = env.transition(state, 2 * torch.rand(1000, 4, generator=g) - 1)
        gap, held = m.close[new["t"]] - m.close[state["t"]], state["shares"]
        assert m.open is not None
        opening = m.open[new["t"]]
        gains += (held * (opening - m.close[state["t"]]) + new["shares"] * (m.close[new["t"]] - opening)).sum(
            -1
        )
        trades += int((new["shares"] != held).sum())
        assert gap.shape == held.shape
        state = new
    error = (state["value"] - (start + gains - state["paid"])).abs() / state["value"]
    assert trades > 900_000
    assert float(error.max()) < 1e-9


def test_without_action_and_cost_the_value_is_buy_and_hold() -> None:
    m = walk()
    env = StockTrading(1, market=m, training=False, holdings={"B": 30.0, "D": 7.0}, cost_bps=0.0, **ALL)
    state = still(env)
    for t in range(1, 60):
        state, _, _ = env.transition(state, torch.zeros(1, 4))
        assert float(state["value"]) == pytest.approx(
            1e6 + 30 * float(m.close[t, 1]) + 7 * float(m.close[t, 3]), rel=1e-12
        )
    weights = [0.1, 0.2, 0.3, 0.0, 0.4]
    fund = PortfolioAllocation(1, market=m, training=False, initial_weights=weights, **ALL)
    state = still(fund)
    for t in range(1, 60):
        state, _, _ = fund.move(state, state["weights"], torch.tensor([False]))
        wanted = 0.1 + (torch.tensor(weights[1:], dtype=torch.float64) * m.close[t] / m.close[0]).sum()
        assert float(state["value"]) == pytest.approx(1e6 * float(wanted), rel=1e-12)


def test_symbols_may_come_in_any_order() -> None:
    """Scaled buys, tight cash: permuted prices, costs and actions give permuted shares and the same cash."""
    m, order = walk(), [2, 0, 3, 1]
    assert m.open is not None and m.volume is not None
    other = market(m.close[:, order], opens=m.open[:, order], volume=m.volume[:, order])
    costs = torch.tensor(FRICTIONS["buy_cost_bps"])
    envs = [
        StockTrading(50, market=w, cash=3e3, training=False, buy_cost_bps=c.tolist(), min_fee=1.0, **ALL)
        for w, c in ((m, costs), (other, costs[order]))
    ]
    states, g = [still(e) for e in envs], torch.Generator().manual_seed(0)
    for _ in range(40):
        a = 2 * torch.rand(50, 4, generator=g) - 1
        states = [e.transition(s, x)[0] for e, s, x in zip(envs, states, (a, a[:, order]), strict=True)]
        torch.testing.assert_close(states[0]["shares"][:, order], states[1]["shares"], rtol=0, atol=0)
        torch.testing.assert_close(states[0]["cash"], states[1]["cash"])
    sequential = StockTrading(1, market=m, cash=3e3, training=False, sequential_buys=True, **ALL)
    state, _, _ = sequential.transition(still(sequential), torch.ones(1, 4))
    assert state["shares"][0, 0] > 0 and state["shares"][0, 3] == 0


def test_one_environment_is_the_first_of_many() -> None:
    m = walk(200)
    for cls in (StockTrading, PortfolioAllocation):
        one, many = (cls(n, market=m, episode_length=20, **ALL) for n in (1, 2000))
        g = torch.Generator().manual_seed(0)
        a, b = one.reset(seed=3)[0], many.reset(seed=3)[0]
        for _ in range(50):
            torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
            action = 2 * torch.rand(2000, *many.single_action_space.shape, generator=g) - 1  # type: ignore[misc]
            (a, ra, *_), (b, rb, *_) = one.step(action[:1]), many.step(action)
            assert float(ra) == float(rb[0])
        starts = many.reset(seed=9)[0]
        assert len(torch.unique(many.state["t"])) > 100
        assert not torch.equal(starts[0], starts[1])


def test_the_unit_of_prices_has_no_part_in_weights() -> None:
    m = walk()
    assert m.open is not None
    envs = [
        PortfolioAllocation(1, market=w, training=False, cash=c, **ALL)
        for w, c in ((m, 1e6), (market(m.close * 137.0, opens=m.open * 137.0), 1.37e8))
    ]
    states, g = [still(e) for e in envs], torch.Generator().manual_seed(0)
    for _ in range(40):
        a = 2 * torch.rand(1, 5, generator=g) - 1
        (s0, r0, _), (s1, r1, _) = (e.transition(s, a) for e, s in zip(envs, states, strict=True))
        assert float(r0) == pytest.approx(float(r1), rel=1e-9, abs=1e-12)
        states = [s0, s1]
    torch.testing.assert_close(envs[0].observe(s0), envs[1].observe(s1), rtol=1e-5, atol=1e-5)


# Nothing looks ahead ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (StockTrading, {}),
        (StockTrading, {"obs": "reference"}),
        (PortfolioAllocation, {}),
        (PortfolioAllocation, {"form": "covariance"}),
    ],
)
def test_the_guard_finds_nothing(cls: Any, options: dict[str, Any]) -> None:
    env = cls(3, start="2015-01-01", end="2016-06-01", fit_end="2015-06-01", **options)
    env.reset(seed=0)
    guard, g = LookaheadGuard(env), torch.Generator().manual_seed(0)
    for _ in range(4):
        action = 2 * torch.rand(3, *env.single_action_space.shape, generator=g) - 1
        guard.check(action)
        env.step(action)


class Prophet(StockTrading):
    """Observes tomorrow's row."""

    def observe(self, state: Any) -> Any:
        return super().observe({**state, "t": (state["t"] + 1).clamp(max=self.T - 1)})


def test_the_guard_catches_a_prophet_and_a_flag_from_tomorrow() -> None:
    for cls, options in ((Prophet, {}), (StockTrading, {"turbulence_lag": 0})):
        env: Any = cls(2, start="2015-01-01", end="2016-06-01", **options)
        env.reset(seed=0)
        with pytest.raises(EnvironmentFault, match=r"looks ahead|depends on what comes after"):
            LookaheadGuard(env).check(torch.ones(2, 5))
    assert env.optimistic


def test_scales_come_from_the_training_range() -> None:
    settings: dict[str, Any] = {
        "start": "2016-01-01",
        "end": "2017-01-01",
        "fit_start": "2010-01-01",
        "fit_end": "2015-01-01",
    }
    env = StockTrading(1, **settings)
    a, b = env.whole.index("2010-01-01", "2015-01-01")
    wanted = tensors.relative(env.whole)[a:b].reshape(-1, env.scale.mean.numel())
    torch.testing.assert_close(env.scale.mean, wanted.mean(0))
    assert env.threshold == pytest.approx(float(env.whole.turbulence[a:b].quantile(0.99)))


# Rules of the market ------------------------------------------------------------------------------------------------------------


def plain_step(env: StockTrading, state: dict[str, Any], action: Any) -> tuple[float, Any, float]:
    """(cash, shares, value) after one bar: orders in a loop over symbols, as one would write it for a single account."""
    t = int(state["t"])
    cash, shares = float(state["cash"]), state["shares"][0].numpy().copy()
    price = env.price[t + 1].numpy()
    order = np.trunc(np.asarray(action, float)[0] * env.max_shares)
    order[np.abs(order) <= env.min_rate * env.max_shares] = 0
    if env.alarm[t] > 0:
        order = -shares
    for i in np.flatnonzero(order < 0):
        q = min(-order[i], shares[i])
        shares[i] -= q
        cash += q * price[i] * (1 - float(env.cost_sell[i]))
    for i in np.flatnonzero(order > 0):
        q = min(order[i], cash // (price[i] * (1 + float(env.cost_buy[i]))))
        shares[i] += q
        cash -= q * price[i] * (1 + float(env.cost_buy[i]))
    return cash, shares, cash + float(shares @ price)


def test_sequential_steps_are_those_of_a_plain_loop() -> None:
    m = dataclasses.replace(walk(), open=None, volume=None)
    tau = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    m = dataclasses.replace(m, turbulence=tau)
    options = {**ALL, "turbulence_threshold": 0.85}
    env = StockTrading(
        1,
        market=m,
        training=False,
        cash=4e3,
        sequential_buys=True,
        buy_cost_bps=[10, 20, 5, 40],
        cost_bps=30,
        **options,
    )
    state, g, stops = still(env), torch.Generator().manual_seed(2), 0
    for _ in range(58):
        action = 2 * torch.rand(1, 4, generator=g) - 1
        cash, shares, value = plain_step(env, state, action.double())
        stops += int(env.alarm[state["t"]] > 0)
        state, _, _ = env.transition(state, action.double())
        assert float(state["cash"]) == pytest.approx(cash, rel=1e-12)
        np.testing.assert_array_equal(state["shares"][0], shares)
        assert float(state["value"]) == pytest.approx(value, rel=1e-12)
    assert stops > 3


def test_turbulence_sells_everything_and_blocks_buying_a_bar_later() -> None:
    m = market(np.full((8, 2), 10.0))
    m = dataclasses.replace(m, turbulence=torch.tensor([0.0, 0, 9, 0, 0, 0, 0, 0], dtype=torch.float64))
    base: dict[str, Any] = {
        **ALL,
        "market": m,
        "training": False,
        "turbulence_threshold": 5.0,
        "cost_bps": 0.0,
    }
    for lag, sold_at in ((1, 3), (0, 2), (2, 4)):
        env = StockTrading(1, turbulence_lag=lag, **base)
        state = still(env)
        for t in range(1, 7):
            state, _, _ = env.transition(state, torch.ones(1, 2))
            assert (float(state["shares"].sum()) == 0) == (t == sold_at), (lag, t)
    # Nothing was held; the wait of every symbol begins anew all the same, as in the reference.
    idle, state = StockTrading(1, **base), still(env)
    waits = []
    for _ in range(5):
        state, _, _ = idle.transition(state, torch.zeros(1, 2))
        waits.append(state["cooldown"][0].tolist())
    assert waits == [[1, 1], [2, 2], [0, 0], [1, 1], [2, 2]]
    fund = PortfolioAllocation(1, **base)
    state = still(fund)
    for t in range(1, 7):
        state, _, _ = fund.transition(state, torch.tensor([[-1.0, 1.0, 1.0]]))
        assert (float(state["weights"][0, 0]) == 1.0) == (t == 3)
    calm = StockTrading(1, **{**base, "turbulence_stop": False})
    state = still(calm)
    for _ in range(5):
        state, _, _ = calm.transition(state, torch.ones(1, 2))
    assert float(state["shares"].sum()) == 1000


def test_halted_symbols_keep_their_position() -> None:
    tradable = np.ones((6, 2), bool)
    tradable[2:4, 0] = False
    m = market(np.full((6, 2), 10.0), tradable=tradable)
    env = StockTrading(
        1, market=m, training=False, holdings=[50.0, 50.0], halts=[["B", "2020-01-05", "2020-01-06"]], **ALL
    )
    state, seen = still(env), []
    for action in (1.0, -1.0, 1.0, 1.0):
        before = state["shares"][0].clone()
        state, _, _ = env.transition(state, torch.full((1, 2), action))
        seen.append((state["shares"][0] - before).tolist())
    # Fills at bars 1 to 4: A is halted at 2 and 3 by the data, B at 4 by the setting.
    assert seen == [[100.0, 100.0], [0.0, -100.0], [0.0, 100.0], [100.0, 0.0]]
    fund = PortfolioAllocation(1, market=m, training=False, initial_weights=[0.2, 0.5, 0.3], **ALL)
    state = still(fund)
    state["t"] += 1
    after, _, _ = fund.move(state, torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64))
    # A cannot be sold: what is left goes into cash, less the cost of selling B.
    assert float(after["weights"][0, 1] * after["value"]) == pytest.approx(0.5e6)
    assert float(after["weights"][0, 2]) == 0
    assert float(after["value"]) == pytest.approx(1e6 - 0.3e6 * 1e-3)
    with pytest.raises(ConfigError, match="halts names 'Z'"):
        StockTrading(1, market=m, halts=[["Z", "2020-01-02", "2020-01-03"]], **ALL)


def test_shares_bought_today_are_sold_tomorrow() -> None:
    m = market(np.full((7, 1), 10.0), session=[0, 0, 0, 1, 1, 2, 2])
    env = StockTrading(1, market=m, training=False, holdings=20.0, t_plus_one=True, **ALL)
    state = still(env)
    state, _, _ = env.transition(state, torch.tensor([[0.5]]))
    assert float(state["shares"]) == 70
    state, _, _ = env.transition(state, torch.tensor([[-1.0]]))
    # Bar 2 is of the same session: only the first 20 can go.
    assert float(state["shares"]) == 50
    state, _, _ = env.transition(state, torch.tensor([[-1.0]]))
    assert float(state["shares"]) == 0


def test_lots_participation_and_impact() -> None:
    m = market(np.full((5, 1), 10.0), volume=2000.0)
    env = StockTrading(1, market=m, training=False, max_shares=1000, lot=30, cost_bps=0, **ALL)
    state, _, _ = env.transition(still(env), torch.ones(1, 1))
    # A tenth of the volume is 200, in lots of 30 that is 180.
    assert float(state["shares"]) == 180
    sigma = 0.02
    m = dataclasses.replace(m, sigma=torch.full_like(m.close, sigma))
    x = 200 / 2000
    wanted = {
        "linear": (0.1 * x, 0.25 * 0.1 * x),
        "sqrt": (2 / 3 * 0.6 * sigma * math.sqrt(x), 0.25 * 0.6 * sigma * math.sqrt(x)),
        "almgren_chriss": ((0.125 + 0.6) * sigma * x, 0.25 * sigma * x),
    }
    for impact, (cost, shift) in wanted.items():
        env = StockTrading(
            1, market=m, training=False, max_shares=1000, impact=impact, half_spread_bps=2, cost_bps=0, **ALL
        )
        state, _, _ = env.transition(still(env), torch.ones(1, 1))
        assert float(state["shares"]) == 200
        assert float(state["paid"]) == pytest.approx(200 * 10 * (cost + 2e-4))
        assert float(state["shift"]) == pytest.approx(shift)
        assert float(state["value"]) == pytest.approx(1e6 - 2000 * (1 + cost + 2e-4) + 2000 * math.exp(shift))
    with pytest.raises(ConfigError, match="set assumed_volume"):
        StockTrading(1, market=market(np.full((5, 1), 10.0)), impact="sqrt", **ALL)


def test_a_sale_that_costs_more_than_it_brings_is_not_made() -> None:
    m = market(np.full((5, 2), [10.0, 100.0]), opens=np.full((5, 2), [10.0, 100.0]))
    env = StockTrading(
        1, market=m, training=False, max_shares=3, min_rate=0.0, min_fee=40.0, cost_bps=0, holdings=5, **ALL
    )
    state, _, _ = env.transition(still(env), -torch.ones(1, 2))
    # Three shares at 10 bring less than the fee of 40; three at 100 do not.
    assert state["shares"].tolist() == [[5.0, 2.0]]
    assert float(state["cash"]) == pytest.approx(1e6 + 300 - 40)
    assert float(state["paid"]) == pytest.approx(40.0)


def test_the_terminal_bonus_replaces_the_last_reward() -> None:
    m = walk(30)
    options: dict[str, Any] = {**ALL, "market": m, "training": False, "holdings": 40.0, "gamma": 0.9}
    plain, bonus = StockTrading(1, **options), StockTrading(1, terminal_bonus=True, **options)
    plain.reset(seed=0)
    bonus.reset(seed=0)
    first, second = [], []
    for _ in range(29):
        first.append(float(plain.step(torch.zeros(1, 4))[1]))
        second.append(float(bonus.step(torch.zeros(1, 4))[1]))
    assert second[:-1] == first[:-1]
    gain = 0.0
    for reward in first:
        gain = 0.9 * gain + reward
    assert second[-1] == pytest.approx(gain)


def test_the_reference_observation() -> None:
    m = walk(40, 2)
    m = dataclasses.replace(
        m,
        names=("macd", "rsi_30"),
        feat=torch.arange(160, dtype=torch.float32).reshape(40, 2, 2),
        turbulence=torch.full((40,), 30.0, dtype=torch.float64),
    )
    options = {**ALL, "turbulence_threshold": 99.0}
    env = StockTrading(1, market=m, obs="reference", training=False, cash=5e4, holdings=[64, 32], **options)
    obs, _ = env.reset(seed=0)
    squashed = 99 * (1 / (1 + math.exp(-math.e * 30 / 99)) - 0.5)
    wanted = [
        5e4 / 4096,
        squashed / 32,
        0.0,
        *(m.close[0] / 64).tolist(),
        1.0,
        0.5,
        0.0,
        0.0,
        *(np.arange(4) / 128),
    ]
    np.testing.assert_allclose(obs[0], wanted, rtol=1e-6)
    obs, reward, *_ = env.step(torch.tensor([[0.0, -0.2]]))
    assert obs[0, 7:9].tolist() == [1.0, 0.0]
    assert float(reward) == pytest.approx(
        float(env.state["value"] - 5e4 - (m.close[0] * torch.tensor([64, 32])).sum()) / 2048 * 20, rel=1e-9
    )


def test_episodes_are_cut_at_the_end_and_end_in_ruin() -> None:
    m = market(np.array([[100.0], [100.0], [1.0], [1.0], [1.0]]))
    env = StockTrading(1, market=m, training=False, cash=1e2, holdings=1.0, ruin=0.6, **ALL)
    env.reset(seed=0)
    assert [bool(env.step(torch.zeros(1, 1))[2]) for _ in range(2)] == [False, False]
    env = StockTrading(1, market=m, training=False, cash=1.0, holdings=1.0, ruin=5.0, **ALL)
    env.reset(seed=0)
    flags = [env.step(torch.zeros(1, 1))[2:4] for _ in range(2)]
    assert [bool(flag[0]) for flag in flags] == [False, True]
    whole = StockTrading(1, market=m, training=False, **ALL)
    whole.reset(seed=0)
    flags = [whole.step(torch.zeros(1, 1))[2:4] for _ in range(4)]
    assert [bool(flag[1]) for flag in flags] == [False, False, False, True]
    assert not any(bool(flag[0]) for flag in flags)


def test_training_starts_have_the_value_that_they_should() -> None:
    env = StockTrading(4000, market=walk(200), cash=1e5, episode_length=50, **ALL)
    state = still(env)
    assert float(state["cash"].min()) >= 0
    assert float(state["value"].min()) >= 0.95e5 - 1e-6
    assert float(state["value"].max()) <= 1.05e5 + 1e-6
    assert state["shares"].max() == 63 and state["shares"].min() == 0
    assert bool((state["shares"] == state["shares"].floor()).all())
    assert int(state["t"].max()) == 149


# The remainder factor -------------------------------------------------------------------------------------------------------------


def test_the_remainder_factor_solves_its_equation() -> None:
    g = torch.Generator().manual_seed(0)
    race = -torch.rand(500, 2, 7, generator=g, dtype=torch.float64).log()
    drifted, target = (race / race.sum(-1, keepdim=True)).unbind(1)
    for worst in (1e-3, 1e-2, 0.2):
        buy = torch.rand(6, generator=g, dtype=torch.float64) * worst
        sell = torch.rand(6, generator=g, dtype=torch.float64) * worst
        after, mu, turnover = rebalance(drifted, target, buy, sell)

        def gap(x: Any, w: Any, old: Any, buy: Any = buy, sell: Any = sell) -> Any:
            move = x * w[1:] - old[1:]
            return 1 - (buy * move.clamp_min(0) + sell * (-move).clamp_min(0)).sum() - x

        for i in range(0, 500, 50):
            assert abs(float(gap(mu[i], target[i], drifted[i]))) < 1e-12
            exact = brentq(lambda x, i=i: float(gap(x, target[i], drifted[i])), 0.1, 1.0, xtol=1e-14)
            assert float(mu[i]) == pytest.approx(exact, abs=1e-12)
        torch.testing.assert_close(after, target)
        torch.testing.assert_close(turnover, (mu[:, None] * target - drifted)[:, 1:].abs().sum(-1))
    # With one symbol it is linear: selling all leaves 1 - c.
    one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    cost = torch.tensor([0.01], dtype=torch.float64)
    assert float(rebalance(one, one.flip(0), cost, cost)[1]) == pytest.approx(0.99)
    assert float(rebalance(one.flip(0), one, cost, cost)[1]) == pytest.approx(1 / 1.01)


def test_a_frozen_symbol_keeps_its_worth() -> None:
    g = torch.Generator().manual_seed(1)
    race = -torch.rand(200, 2, 5, generator=g, dtype=torch.float64).log()
    drifted, target = (race / race.sum(-1, keepdim=True)).unbind(1)
    tradable = torch.rand(200, 4, generator=g) > 0.4
    buy, sell = torch.full((4,), 2e-3).double(), torch.full((4,), 5e-3).double()
    after, mu, _ = rebalance(drifted, target, buy, sell, tradable)
    held = after * mu[:, None]
    torch.testing.assert_close(held[:, 1:][~tradable], drifted[:, 1:][~tradable])
    move = held - drifted
    paid = (buy * move[:, 1:].clamp_min(0) + sell * (-move[:, 1:]).clamp_min(0)).sum(-1)
    torch.testing.assert_close(1 - mu, paid, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.sum(-1), torch.ones(200).double())
    # What can be traded is held in the proportions of the target.
    free = torch.cat([torch.ones(200, 1).bool(), tradable], -1)
    ratio = torch.where(free, held / target, torch.nan)
    assert float((ratio - ratio.nanmean(-1, keepdim=True))[free].abs().max()) < 1e-10


def test_portfolio_fills_and_rewards() -> None:
    close, opens = [[10.0], [12.0], [12.0]], [[10.0], [11.0], [12.0]]
    target = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    for fill, wanted in (("same_close", 1.2), ("next_open", 12 / 11), ("next_close", 1.0)):
        env = PortfolioAllocation(
            1, market=market(close, opens=opens), training=False, fill=fill, cost_bps=0, **ALL
        )
        state, reward, _ = env.move(still(env), target)
        assert float(state["value"]) == pytest.approx(wanted * 1e6)
        assert float(reward) == pytest.approx(100 * math.log(wanted))
    weights, total = grow(torch.tensor([0.5, 0.5]), torch.tensor([3.0]))
    assert float(total) == 2.0 and weights.tolist() == [0.25, 0.75]


def test_portfolio_costs_in_money() -> None:
    """Positions in currency at the prices of the fill, before and after the trade: what it cost, and how much changed hands."""
    m = walk(40, 3)
    buy, sell = torch.tensor([30.0, 5.0, 60.0]).double() / 1e4, torch.tensor([10.0, 80.0, 0.0]).double() / 1e4
    env = PortfolioAllocation(
        16,
        market=m,
        fill="next_open",
        buy_cost_bps=(buy * 1e4).tolist(),
        sell_cost_bps=(sell * 1e4).tolist(),
        episode_length=20,
        reward="simple",
        **ALL,
    )
    env.reset(seed=3)
    g = torch.Generator().manual_seed(0)
    for _ in range(19):
        old, action = env.state, 2 * torch.rand(16, 4, generator=g) - 1
        _, reward, *_ = env.step(action)
        new = env.state
        before, after = env.price[old["t"]], env.price[new["t"]]
        assert m.open is not None
        fill = m.open[new["t"]]
        held = old["value"][:, None] * old["weights"][:, 1:] * fill / before
        then = new["value"][:, None] * new["weights"][:, 1:] * fill / after
        trade = then - held
        cost = (buy * trade.clamp_min(0) + sell * (-trade).clamp_min(0)).sum(-1)
        torch.testing.assert_close(new["paid"] - old["paid"], cost, rtol=1e-8, atol=1e-4)
        torch.testing.assert_close(new["traded"] - old["traded"], trade.abs().sum(-1), rtol=1e-8, atol=1e-4)
        torch.testing.assert_close(
            reward.double(), 100 * (new["value"] / old["value"] - 1), rtol=1e-4, atol=1e-6
        )
        # What was wanted is what is held right after the trade.
        wanted = (3.0 * action.double()).softmax(-1)
        whole = then.sum(-1) + new["value"] * new["weights"][:, 0]
        torch.testing.assert_close(then / whole[:, None], wanted[:, 1:], rtol=1e-6, atol=1e-9)


def test_features_without_the_unit_of_a_price() -> None:
    """Indicators in prices over the close, averages as log-ratios, others as they are; the 60-day mean and the volatility."""
    m = walk(90, 2)
    names = ("macd", "boll_ub", "rsi_30", "close_30_sma")
    g = torch.Generator().manual_seed(0)
    feat = torch.rand(90, 2, 4, generator=g) * 40 + 10
    found = tensors.relative(dataclasses.replace(m, names=names, feat=feat))
    close = m.close
    mean = torch.stack([close[max(0, t - 59) : t + 1].mean(0) for t in range(90)])
    macd, bound, rsi, average = feat.double().unbind(-1)
    wanted = [macd / close, bound / close - 1, rsi, (average / close).log(), (close / mean).log(), m.sigma]
    torch.testing.assert_close(found, torch.stack(wanted, -1))


def test_portfolio_observations() -> None:
    m = walk(400, 3)
    env = PortfolioAllocation(1, market=m, training=False, lookback=5, **{**ALL, "start": "2020-12-01"})
    obs, _ = env.reset(seed=0)
    k = env.first
    logs = 100 * (m.close[k - 4 : k + 1].log() - m.close[k].log())
    np.testing.assert_allclose(obs[0, 5:], logs.T.flatten(), atol=1e-4)
    env = PortfolioAllocation(
        1, market=m, training=False, form="covariance", window=100, **{**ALL, "start": "2020-12-01"}
    )
    obs, _ = env.reset(seed=0)
    wanted = np.cov(m.returns[k - 99 : k + 1].T.numpy()) * 1e4
    np.testing.assert_allclose(obs[0, 5:14], wanted.ravel(), rtol=1e-4)
    with pytest.raises(ConfigError, match="needs 252 bars before it"):
        PortfolioAllocation(1, market=m, form="covariance", **ALL)


def test_accounts_are_carried_over() -> None:
    m = walk(60)
    for cls in (StockTrading, PortfolioAllocation):
        shape = (1, 4 if cls is StockTrading else 5)
        actions = 2 * torch.rand(59, *shape, generator=torch.Generator().manual_seed(0)) - 1
        whole = cls(1, market=m, training=False, **ALL)
        state = still(whole)
        for action in actions:
            state, _, _ = whole.transition(state, action)
        dates = whole.dates
        account = None
        for a, b in ((0, 21), (20, 45), (44, 60)):
            end = str(dates[b]) if b < 60 else None
            env = cls(1, market=m, training=False, **{**ALL, "start": str(dates[a]), "end": end})
            if account is None:
                env.reset(seed=0)
            else:
                env.carry_on(account)
            for action in actions[a : b - 1]:
                env.state, _, _ = env.transition(env.state, action)
            account = env.account()
        assert account is not None
        for name in cls.account_fields:
            torch.testing.assert_close(account[name], state[name])


# Compact observations --------------------------------------------------------------------------------------------------------


COMPACT: list[tuple[Any, dict[str, Any], int]] = [
    (StockTrading, {}, 2 + 2 * 4),
    (StockTrading, {"obs": "reference"}, 2 + 2 * 4),
    (StockTrading, {"obs": "reference", "impact": "sqrt"}, 2 + 3 * 4),
    (StockTrading, {"impact": "linear"}, 2 + 2 * 4),
    (PortfolioAllocation, {}, 1 + 5),
    (PortfolioAllocation, {"form": "covariance", "window": 20, "start": "2020-02-01"}, 1 + 5),
]


@pytest.mark.parametrize(("cls", "options", "size"), COMPACT)
def test_compact_observations_stand_for_the_whole_ones(cls: Any, options: dict[str, Any], size: int) -> None:
    m = dataclasses.replace(
        walk(80),
        feat=torch.rand(80, 4, 2, generator=torch.Generator().manual_seed(0)),
        names=("rsi_30", "cci_30"),
    )
    settings = {**ALL, "market": m, "cash": 2e4, "episode_length": 20, **options}
    whole, compact = cls(64, **settings), cls(64, compact_obs=True, **settings)
    space = compact.single_observation_space
    assert space.shape == (size,) and space.full == whole.single_observation_space
    g = torch.Generator().manual_seed(3)
    seen, short = whole.reset(seed=5)[0], compact.reset(seed=5)[0]
    for step in range(30):
        assert short.shape == (64, size) and torch.equal(short[:, 0], compact.state["t"].float())
        assert torch.equal(space.expand(short), seen), step
        # Rows may be of any shape.
        assert torch.equal(space.expand(short[:6].view(2, 3, size)), seen[:6].view(2, 3, -1))
        action = 2 * torch.rand(64, *whole.single_action_space.shape, generator=g) - 1
        seen, r0, *_, i0 = whole.step(action)
        short, r1, *_, i1 = compact.step(action)
        assert torch.equal(r0, r1) and torch.equal(space.expand(i1["final_obs"]), i0["final_obs"])
    assert len(seen.unique(dim=0)) == 64
    check_env(lambda n, **k: cls(n, compact_obs=True, **settings, **k))
    # Peers that know nothing of it, and a copy in another process, get the same.
    view = compact.numpy()
    assert view.single_observation_space == space.full and view.observation_space.shape == (
        64,
        *space.full.shape,
    )
    np.testing.assert_array_equal(view.reset(seed=5)[0], whole.reset(seed=5)[0])
    single = GymView(cls(1, compact_obs=True, **settings))
    assert single.observation_space == space.full and single.reset(seed=1)[0].shape == space.full.shape
    copied = pickle.loads(pickle.dumps(space))
    assert torch.equal(copied.table, space.table) and copied.places == space.places and copied == space


def test_a_compact_space_is_pickled_as_a_recipe() -> None:
    space = StockTrading(1, compact_obs=True).single_observation_space
    assert space.table.numel() * 4 > 400_000
    assert len(pickle.dumps(space)) < 1000


def test_the_guard_reads_the_rows_of_a_compact_observation() -> None:
    settings: dict[str, Any] = {"start": "2015-01-01", "end": "2016-06-01", "compact_obs": True}
    env = StockTrading(2, **settings)
    env.reset(seed=0)
    LookaheadGuard(env).check(torch.ones(2, 5))
    # A row that tells of its next bar.
    env.tables = lambda market: (  # type: ignore[method-assign]
        StockTrading.tables(env, market),
        setattr(env, "rows", env.rows.roll(-1, 0)),
    )
    env._bind(env.whole)
    with pytest.raises(EnvironmentFault, match="depends on what comes after"):
        LookaheadGuard(env).check(torch.ones(2, 5))


def test_the_standardised_observation() -> None:
    m = walk(40, 2)
    m = dataclasses.replace(
        m,
        names=("rsi_30",),
        feat=torch.arange(80, dtype=torch.float32).reshape(40, 2, 1),
        turbulence=torch.full((40,), 30.0, dtype=torch.float64),
    )
    options = {**ALL, "turbulence_threshold": 20.0, "turbulence_stop": False}
    env = StockTrading(1, market=m, training=False, cash=1e4, holdings=[64, 32], cost_bps=0, **options)
    env.reset(seed=0)
    obs, *_ = env.step(torch.tensor([[0.0, -0.2]]))
    worth = torch.tensor([64.0, 12.0], dtype=torch.float64) * m.close[1]
    assert m.open is not None
    cash = 1e4 + 20 * float(m.open[1, 1])
    value = cash + float(worth.sum())
    given = {"rsi_30": m.feat[..., 0].double(), "mean": None, "sigma": m.sigma}
    # Two bars so far: the 60-day mean is that of both.
    given["mean"] = torch.stack(
        [(m.close[k] / m.close[max(0, k - 59) : k + 1].mean(0)).log() for k in range(40)]
    )
    rows = [((v - v.mean()) / v.std(correction=0))[1] for v in given.values() if v is not None]
    ordered = [
        ((given[n] - given[n].mean()) / given[n].std(correction=0))[1] for n in ("rsi_30", "mean", "sigma")
    ]
    assert len(rows) == 3
    wanted = [cash / value, 1.5, 1.0, *(worth / value).tolist(), 1 / 21, 0.0, 1.0, 1.0]
    wanted += torch.stack(ordered, -1).flatten().tolist()
    np.testing.assert_allclose(obs[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_scale_that_is_given() -> None:
    env = StockTrading(1, start="2016-01-01", end="2017-01-01")
    numbers = {"mean": env.scale.mean.tolist(), "deviation": env.scale.deviation.tolist()}
    other = StockTrading(1, start="2017-01-01", end="2018-01-01", scale=numbers)
    again = StockTrading(
        1, start="2017-01-01", end="2018-01-01", fit_start="2016-01-01", fit_end="2017-01-01"
    )
    assert torch.equal(other.rows[:, 18:], again.rows[:, 18:])
    for wrong, says in (
        ({"mean": [0.0], "deviation": [1.0]}, "mean needs 7 numbers"),
        ({"mean": numbers["mean"]}, "deviation needs 7 numbers"),
        ({**numbers, "deviation": [0.0] * 7}, "deviations above 0"),
    ):
        with pytest.raises(ConfigError, match=says):
            StockTrading(1, scale=wrong)


# What is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "settings", "error", "says"),
    [
        (StockTrading, {"cost_bps": [1, 2]}, ConfigError, "has 2 entries; there are 5 symbols"),
        (
            StockTrading,
            {"cost_bps": {"APPL": 3}},
            ConfigError,
            "'APPL', which is not traded here. Did you mean 'AAPL'",
        ),
        (StockTrading, {"cost_bps": -1}, ConfigError, "at least 0"),
        (StockTrading, {"fill": "next_open"}, ConfigError, "closing prices only"),
        (StockTrading, {"fill": "now"}, ConfigError, "fill is 'now'"),
        (StockTrading, {"obs": "raw"}, ConfigError, "obs is 'raw'"),
        (StockTrading, {"impact": "cubic"}, ConfigError, "impact is 'cubic'"),
        (StockTrading, {"indicators": ["cci_30"]}, ConfigError, "needs high and low"),
        (StockTrading, {"start": "1990-01-02", "end": "1990-06-01"}, DataError, "turbulence needs 252 bars"),
        (StockTrading, {"start": "2022-12-28", "end": None}, DataError, "two are needed for a step"),
        (PortfolioAllocation, {"initial_weights": [0.5, 0.5]}, ConfigError, "needs 6 weights"),
        (PortfolioAllocation, {"initial_weights": [0.5, 0, 0, 0, 0, 0]}, ConfigError, "sum to 1"),
        (PortfolioAllocation, {"form": "round"}, ConfigError, "form is 'round'"),
        (PortfolioAllocation, {"market": 3}, ConfigError, "market is int"),
        (PortfolioAllocation, {"turbulence_q": 2.0}, ConfigError, "turbulence_q is 2.0"),
    ],
)
def test_bad_settings(cls: Any, settings: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        cls(1, **settings)


def test_a_symbol_that_never_trades_is_named() -> None:
    with pytest.raises(DataError, match="B never trades"):
        market(np.ones((4, 2)), tradable=np.array([[True, False]] * 4))


def test_a_shared_market(ray_session: None) -> None:
    m = walk(80)
    env = StockTrading(2, market=m.share(), **ALL)
    torch.testing.assert_close(env.price, m.close)
