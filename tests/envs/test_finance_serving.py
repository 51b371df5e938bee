"""Served trading agents: what they see and do is what the environment shows and does, nothing later is read, bad input is named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

from mobula import registry
from mobula.artifact import export_policy, load_policy
from mobula.envs.finance import tensors
from mobula.envs.finance.portfolio import PortfolioAllocation
from mobula.envs.finance.serving import TradingAgent, bars_needed, export_agent
from mobula.envs.finance.trading import StockTrading
from mobula.errors import ArtifactError, ConfigError, DataError
from mobula.serving.backend import LocalBackend, run_mechanism
from mobula.serving.gateway import create_app
from mobula.serving.services import load_service, read_service

SPAN: dict[str, Any] = {"universe": "us5", "start": "1992-01-01", "end": "1993-12-01"}
# Threshold and scale come from the first part of the range alone.
FITTED: dict[str, Any] = {**SPAN, "fit_end": "1993-01-01"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "shares": ("stock_trading", {**FITTED, "compact_obs": True, "buy_cost_bps": {"KO": 30.0}}),
    "reference": ("stock_trading", {**FITTED, "obs": "reference"}),
    "weights": ("portfolio", {**FITTED, "turbulence_q": 0.9}),
    "covariance": ("portfolio", {**FITTED, "form": "covariance", "window": 100, "with_cash": False}),
    "range": (
        "stock_trading",
        {"universe": "synthetic", "symbols": ["S0", "S3"], "start": "2001-06-01", "end": "2003-01-01"},
    ),
}


@pytest.fixture(scope="module")
def policies(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Policies with decided opinions: large last layers, so that actions differ from 0 and from one another."""
    folder = tmp_path_factory.mktemp("policies")
    found = {}
    for name, (env, settings) in KINDS.items():
        config: Any = registry.config_class("PPO")()
        config.environment(env, env_config=settings).env_runners(num_envs_per_env_runner=2)
        algorithm = config.debugging(seed=3, log_level="ERROR").build_algo()
        with torch.no_grad():
            algorithm.get_module().pi[-1].weight.mul_(60.0)
        found[name] = export_policy(algorithm, folder / name)
        algorithm.stop()
    return found


@pytest.fixture(scope="module")
def agents(policies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("agents")
    return {name: export_agent(policy, folder / name) for name, policy in policies.items()}


def agent(folder: Path) -> TradingAgent:
    service, card = load_service(folder)
    assert card.kind == "mechanism"
    return service  # type: ignore[no-any-return]


def example(served: TradingAgent) -> dict[str, Any]:
    """A copy of the request in the schema."""
    extra: Any = served.reports.model_config["json_schema_extra"]
    return copy.deepcopy(extra["examples"][0])  # type: ignore[no-any-return]


def history(
    env: Any, t: int, *, bars: int | None = None, columns: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Bars of the data behind `env`, from their first one (or the last `bars`) to bar t of its range, as a client would send them."""
    stop = env.first + t + 1
    begin = 0 if bars is None else stop - bars
    whole = env.whole
    given = {"close": whole.close, "volume": whole.volume, "open": whole.open}
    if columns:
        from mobula.envs.finance.sources import load_daily

        data = load_daily(KINDS["range"][1]["universe"], symbols=list(env.symbols))
        given |= {n: torch.from_numpy(data.columns[n]) for n in ("high", "low")}
    return [
        {"time": f"{pd.Timestamp(whole.time[k]):%Y-%m-%dT%H:%M:%SZ}", "symbol": symbol}
        | {name: float(given[name][k, i]) for name in ("close", *columns)}  # type: ignore[index]
        for k in range(begin, stop)
        for i, symbol in enumerate(env.symbols)
    ]


def played(env: Any, t: int) -> torch.Tensor:
    """Plays `env` to bar t with random actions; returns the observation there."""
    g = torch.Generator().manual_seed(t)
    obs, _ = env.reset(seed=0)
    for _ in range(t):
        obs, *_ = env.step(2 * torch.rand(1, *env.single_action_space.shape, generator=g) - 1)
    assert int(env.state["t"]) == t
    return obs


def request_of(env: Any, t: int, **kwargs: Any) -> dict[str, Any]:
    """The request of a client whose account is that of `env`."""
    state = env.state
    if isinstance(env, StockTrading):
        cash, shares, waited = state["cash"], state["shares"], state["cooldown"]
        since = {s: int(w) for s, w in zip(env.symbols, waited[0].tolist(), strict=True)}
    else:
        cash, since = state["weights"][:, 0] * state["value"], {}
        shares = state["weights"][:, 1:] * state["value"][:, None] / env.price[t]
    bars = history(env, t, **kwargs)
    account = {"cash": float(cash), "shares": dict(zip(env.symbols, shares[0].tolist(), strict=True))}
    return {"time": bars[-1]["time"], "account": account | {"bars_since_trade": since}, "bars": bars}


@pytest.mark.parametrize("name", list(KINDS))
def test_a_served_agent_sees_and_does_what_the_environment_shows(
    name: str, policies: dict[str, Path], agents: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    env_name, settings = KINDS[name]
    # As in evaluation: whole observations, from the start of the range.
    env: Any = registry.make_env(env_name, 1, **{**settings, "training": False, "compact_obs": False})
    policy = load_policy(policies[name])
    columns = ("open", "high", "low", "volume") if name == "range" else ()
    asked = {
        t: (
            played(env, t),
            env.orders(env.state, torch.as_tensor(policy.act(env.observe(env.state).numpy()))),
            request_of(env, t, columns=columns),
            env.state,
        )
        for t in (3, 40, 130)
    }

    # The training market is not there any more.
    def gone(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the training market was read")

    monkeypatch.setattr(tensors, "market_tensor", gone)
    monkeypatch.setattr(tensors, "_load", gone)
    served = agent(agents[name])
    seen: list[Any] = []
    answer, traded = served.policy.answer, 0
    monkeypatch.setattr(served.policy, "answer", lambda obs, **k: seen.append(obs) or answer(obs, **k))
    for t, (obs, wanted, request, state) in asked.items():
        found = run_mechanism(served, request, None)
        np.testing.assert_allclose(seen[-1], obs[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.audit["action"], policy.act(obs[0].numpy()), rtol=1e-5, atol=1e-5)
        assert found.outcome["as_of"] == request["time"]
        assert found.outcome["agent"] == "PPO"
        assert found.outcome["risk"]["turbulence"] == pytest.approx(float(env.turbulence[t]), rel=1e-9)
        assert found.outcome["risk"]["stop"] == bool(env.alarm[t] > 0)
        orders = {o["symbol"]: o["qty"] * (1 if o["side"] == "buy" else -1) for o in found.outcome["orders"]}
        if env_name == "stock_trading":
            # Cash is ample, so that an order is what was wanted, but for shares that are not there.
            net = torch.maximum(wanted, -state["shares"])[0]
            limits = (
                env.participation * env.volume[t]
                if env.volume is not None
                else torch.full_like(net, torch.inf)
            )
            net = torch.minimum(net.abs(), limits.floor()) * net.sign()
            assert orders == {s: q for s, q in zip(env.symbols, net.tolist(), strict=True) if q}
            traded += len(orders)
        else:
            weights = list(found.outcome["target_weights"].values())
            np.testing.assert_allclose(weights, wanted[0], atol=1e-12)
            # The orders lead to the weights, and their cost is what is missing afterwards.
            price = env.price[t]
            before = torch.tensor([request["account"]["shares"][s] for s in env.symbols], dtype=torch.float64)
            move = torch.tensor([orders.get(s, 0.0) for s in env.symbols], dtype=torch.float64)
            cost = float((move.abs() * price).sum()) * 1e-3
            assert found.payments["costs"] == pytest.approx(cost, rel=1e-9)
            left = float(state["value"]) - cost
            np.testing.assert_allclose((before + move) * price / left, wanted[0, 1:], atol=1e-12)
    assert traded > 2 or env_name == "portfolio"


def test_costs_and_orders_leave_an_account_that_is_whole(agents: dict[str, Path]) -> None:
    env: Any = StockTrading(1, **{**KINDS["shares"][1], "training": False, "compact_obs": False})
    played(env, 60)
    request = request_of(env, 60)
    # Too little for all that is wanted: what is bought is paid with its costs.
    request["account"]["cash"] = 1500.0
    found = run_mechanism(agent(agents["shares"]), request, None)
    flow, cost = 0.0, 0.0
    shares = dict(request["account"]["shares"])
    for order in found.outcome["orders"]:
        p = float(env.price[60][env.symbols.index(order["symbol"])])
        assert order["reference_price"] == p
        # Numbers by symbol: those that are not named buy for nothing.
        rate = 10e-4 if order["side"] == "sell" else 30e-4 * (order["symbol"] == "KO")
        flow += order["qty"] * p * (1 if order["side"] == "buy" else -1)
        cost += order["qty"] * p * rate
        shares[order["symbol"]] += order["qty"] * (1 if order["side"] == "buy" else -1)
    assert found.payments["costs"] == pytest.approx(cost)
    cash = 1500.0 - flow - cost
    assert cash >= 0
    value = cash + sum(n * float(env.price[60][env.symbols.index(s)]) for s, n in shares.items())
    assert found.outcome["target_weights"]["cash"] == pytest.approx(cash / value)
    assert found.audit["value"] == pytest.approx(value + cost)


def test_the_stop_sells_everything(agents: dict[str, Path]) -> None:
    served = agent(agents["shares"])
    request = example(served)
    request["account"]["shares"] = {"AAPL": 7.0, "XOM": 3.0}
    calm = run_mechanism(served, request, None)
    assert calm.outcome["risk"]["stop"] is False
    assert calm.outcome["risk"]["turbulence"] < calm.outcome["risk"]["threshold"]
    for bar in request["bars"][-5:]:
        bar["close"] *= 0.8
    crash = run_mechanism(served, request, None)
    assert crash.outcome["risk"]["stop"] is True
    assert {(o["symbol"], o["side"], o["qty"]) for o in crash.outcome["orders"]} == {
        ("AAPL", "sell", 7.0),
        ("XOM", "sell", 3.0),
    }
    assert crash.outcome["target_weights"]["cash"] == 1.0


def test_less_history_changes_little(agents: dict[str, Path]) -> None:
    """Averages with a long memory begin at the first bar that is given."""
    served = agent(agents["shares"])
    assert served.needed == 253
    env: Any = StockTrading(1, **{**KINDS["shares"][1], "training": False, "compact_obs": False})
    obs = played(env, 130)[0]
    short = request_of(env, 130, bars=served.needed)
    checked: Any = served.reports.model_validate(short)
    own = served._environment(checked.bars)
    state = own.held(float(env.state["cash"]), env.state["shares"][0], env.state["cooldown"][0])
    gap = (own.observe(state)[0] - obs).abs()
    # In units of the features' deviations; the relative strength index forgets with (29/30)^252 = 2e-4.
    assert float(gap.max()) < 2e-3


def test_a_symbol_without_a_last_bar_is_not_traded(agents: dict[str, Path]) -> None:
    served = agent(agents["weights"])
    env: Any = PortfolioAllocation(1, **{**KINDS["weights"][1], "training": False})
    played(env, 100)
    request = request_of(env, 100, bars=300)
    whole = run_mechanism(served, request, None)
    assert "XOM" in {order["symbol"] for order in whole.outcome["orders"]}
    assert request["bars"].pop()["symbol"] == "XOM"
    found = run_mechanism(served, request, None)
    assert found.audit["not_tradable"] == ["XOM"] and found.outcome["as_of"] == request["time"]
    assert {o["symbol"] for o in found.outcome["orders"]} == {"AAPL", "JNJ", "JPM", "KO"}


def test_what_the_features_look_back_on() -> None:
    base: dict[str, Any] = {"indicators": ["macd", "close_30_sma"]}
    assert bars_needed(base) == 253
    assert bars_needed({"indicators": ["close_300_sma", "rsi_30"]}) == 300
    assert bars_needed({**base, "window": 400}) == 401
    assert bars_needed({**base, "window": 100}) == 253
    assert bars_needed({**base, "lookback": 270}) == 270


# What is refused ----------------------------------------------------------------------------------------------------------


def bar(request: dict[str, Any], i: int, **change: Any) -> None:
    request["bars"][i].update(change)


def drop_last_symbol(request: dict[str, Any]) -> None:
    request["bars"] = [b for b in request["bars"] if b["symbol"] != "XOM"]


def shift(request: dict[str, Any]) -> None:
    request["bars"] = request["bars"][5:]


def swap(request: dict[str, Any]) -> None:
    b = request["bars"]
    b[10], b[15] = b[15], b[10]


WRONG: dict[str, tuple[Any, str]] = {
    "unknown symbol": (lambda r: bar(r, 3, symbol="KOO"), r"^reports\.bars\.3\.symbol: this agent does not trade 'KOO'\. Did you mean 'KO'"),
    "unknown share": (lambda r: r["account"]["shares"].update(IBM=1.0), r"^reports\.account\.shares: this agent does not trade 'IBM'"),
    "unknown wait": (lambda r: r["account"]["bars_since_trade"].update(IBM=1), r"^reports\.account\.bars_since_trade: .*'IBM'"),
    "too few": (shift, r"^reports\.bars: 252 of AAPL; its features need the last 253"),
    "none of one": (drop_last_symbol, r"^reports\.bars: 0 of XOM"),
    "no bars": (lambda r: r.update(bars=[]), r"^reports\.bars: List should have at least 1 item"),
    "price of 0": (lambda r: bar(r, 4, close=0.0), r"^reports\.bars\.4\.close: Input should be greater than 0"),
    "negative price": (lambda r: bar(r, 4, close=-1.0), r"^reports\.bars\.4\.close: "),
    "NaN price": (lambda r: bar(r, 4, close=float("nan")), r"^reports\.bars\.4\.close: Input should be "),
    "infinite price": (lambda r: bar(r, 4, close=float("inf")), r"^reports\.bars\.4\.close: Input should be a finite number"),
    "no price": (lambda r: bar(r, 4, close=None), r"^reports\.bars\.4\.close: Input should be a valid number"),
    "negative cash": (lambda r: r["account"].update(cash=-1.0), r"^reports\.account\.cash: Input should be greater than or equal to 0"),
    "NaN cash": (lambda r: r["account"].update(cash=float("nan")), r"^reports\.account\.cash: "),
    "nothing held": (lambda r: r.update(account={"cash": 0.0}), r"^reports\.account\.cash: the account holds neither"),
    "short": (lambda r: r["account"]["shares"].update(KO=-1.0), r"^reports\.account\.shares\.KO: Input should be greater"),
    "unsorted": (swap, r"^reports\.bars\.11\.time: .* is before the bar ahead of it: sort"),
    "duplicate": (lambda r: bar(r, 1, symbol="AAPL"), r"^reports\.bars\.1: a second bar of AAPL at 2021-06-02T20:00Z"),
    "from the future": (lambda r: r.update(time="2022-06-01T19:59:59Z"), r"^reports\.bars\.1260\.time: 2022-06-01T20:00Z is after time: a bar that is not complete"),
    "stale": (lambda r: r.update(time="2022-06-06T20:00:00Z"), r"^reports\.time: 3 sessions have ended since the last bar; at most 2"),
    "no session": (lambda r: [bar(r, i, time="2022-06-01T00:00:00Z") for i in range(-5, 0)], r"^reports\.bars\.1260\.time: 2022-06-01T00:00Z is not the end of a session of XNYS; that day's is 2022-06-01T20:00Z"),
    "no zone": (lambda r: r.update(time="2022-06-01T20:00:00"), r"^reports\.time: Input should have timezone info"),
    "no time": (lambda r: r.update(time="today"), r"^reports\.time: "),
    "extra": (lambda r: r.update(bar=1), r"^reports\.bar: Extra inputs"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(WRONG))
def test_what_is_refused(what: str, agents: dict[str, Path]) -> None:
    served = agent(agents["shares"])
    request = example(served)
    change, says = WRONG[what]
    change(request)
    with pytest.raises(DataError, match=says) as caught:
        run_mechanism(served, request, None)
    assert "\n" not in str(caught.value)


def test_a_decision_waits_for_two_sessions_at_most(agents: dict[str, Path]) -> None:
    served = agent(agents["shares"])
    request = example(served)
    first = run_mechanism(served, request, None)
    # Thursday's and Friday's sessions have ended; the weekend has none.
    request["time"] = "2022-06-05T23:00:00+02:00"
    assert run_mechanism(served, request, None) == first


def test_columns_that_features_read_are_asked_for(agents: dict[str, Path]) -> None:
    served = agent(agents["range"])
    assert served.columns == ["open", "high", "low", "volume"]
    request = example(served)
    run_mechanism(served, request, None)
    del request["bars"][7]["high"]
    with pytest.raises(DataError, match=r"^reports\.bars\.7\.high: missing"):
        run_mechanism(served, request, None)


def test_only_market_policies_become_agents(
    ray_session: None, tmp_path: Path, policies: dict[str, Path]
) -> None:
    config: Any = registry.config_class("PPO")()
    algorithm = config.environment("cartpole").debugging(log_level="ERROR").build_algo()
    other = export_policy(algorithm, tmp_path / "cart")
    algorithm.stop()
    with pytest.raises(ConfigError, match="trained in cartpole; stock_trading or portfolio can be served"):
        export_agent(other, tmp_path / "agent")
    assert not (tmp_path / "agent").exists()
    env = PortfolioAllocation(1, turbulence_lag=0)
    with pytest.raises(ConfigError, match="turbulence_lag is 0"):
        env.frozen()


# Over HTTP and from the command line --------------------------------------------------------------------------------------


def test_over_http(agents: dict[str, Path]) -> None:
    backend = LocalBackend({"trader": str(agents["weights"])})
    client = TestClient(create_app(backend, None, max_body_bytes=2**24), raise_server_exceptions=False)
    document = client.get("/openapi.json").json()
    assert "/v1/mechanisms/trader/run" in document["paths"]
    example = client.get("/v1/models/trader").json()["example"]
    answer = client.post("/v1/mechanisms/trader/run", json=example["request"])
    assert answer.status_code == 200
    assert answer.json() == example["answer"]
    Draft202012Validator(backend.schemas["trader"]["reports"]).validate(example["request"]["reports"])
    bad = copy.deepcopy(example["request"])
    bad["reports"]["bars"][2]["close"] = -5
    refused = client.post("/v1/mechanisms/trader/run", json=bad)
    assert refused.status_code == 422
    assert "reports.bars.2.close" in refused.text


def test_from_the_command_line(policies: dict[str, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mobula.cli import app

    done = CliRunner().invoke(
        app, ["export", str(policies["shares"]), "--service", "trading_agent", "--out", str(tmp_path / "a")]
    )
    assert done.exit_code == 0, done.output
    assert agent(tmp_path / "a").symbols == ["AAPL", "JNJ", "JPM", "KO", "XOM"]
    for arguments, says in (
        (["--service", "trading_agent"], "go together"),
        (["--service", "causal_lm", "--out", str(tmp_path / "b")], "is not made of a policy"),
        (["--service", "trading_agnt", "--out", str(tmp_path / "b")], "Did you mean 'trading_agent'"),
    ):
        with pytest.raises(ConfigError, match=says):
            CliRunner().invoke(app, ["export", str(policies["shares"]), *arguments], catch_exceptions=False)
    assert not (tmp_path / "b").exists()


def test_a_policy_of_another_shape_is_refused(policies: dict[str, Path], agents: dict[str, Path]) -> None:
    settings = read_service(agents["shares"])["settings"]
    with pytest.raises(ArtifactError, match="the policy reads Box"):
        TradingAgent(load_policy(policies["reference"]), settings)
