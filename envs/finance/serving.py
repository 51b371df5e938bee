"""A trained trading agent as a service: account and bars in, orders out.

The artefact holds the policy and the settings, as numbers, of the environment that it was trained in: symbols, indicators, scale of
the features, threshold of turbulence, costs.  Features come from the same functions as in training, applied to the bars of the
request; the training market is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from mobula import registry
from mobula.artifact import MANIFEST, WEIGHTS, load_policy, policy_folder
from mobula.envs.finance import processors, schema, sources, tensors
from mobula.envs.finance.market_env import MarketEnv
from mobula.errors import ArtifactError, ConfigError, DataError, nearest
from mobula.policy import Policy
from mobula.serving.services import Settlement, save_service

STALE = 2
"""Sessions that may have ended between the last bar and the time of the decision."""

Price = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _instant(value: Any) -> Any:
    """The text of an instant as one in UTC: requests are checked strictly, and JSON has no type for it."""
    if not isinstance(value, str):
        return value
    found = datetime.fromisoformat(value)
    return found if found.tzinfo is None else found.astimezone(UTC)


Instant = Annotated[AwareDatetime, BeforeValidator(_instant)]
_STRICT = ConfigDict(extra="forbid", strict=True)


class Bar(BaseModel):
    """A complete bar of one symbol, in prices adjusted to the last bar."""

    model_config = _STRICT

    time: Instant = Field(description="end of the bar, which is the close of a session")
    symbol: str
    close: Price
    open: Price | None = None
    high: Price | None = None
    low: Price | None = None
    volume: Amount | None = Field(default=None, description="units traded")


class Account(BaseModel):
    """What is held when the decision is taken."""

    model_config = _STRICT

    cash: Amount
    shares: dict[str, Amount] = Field(default={}, description="by symbol; 0 where left out")
    bars_since_trade: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default={}, description="by symbol; 0 where left out"
    )


class Request(BaseModel):
    """An account and the bars up to a time."""

    model_config = _STRICT

    time: Instant = Field(description="of the decision; no bar may end after it")
    account: Account
    bars: list[Bar] = Field(
        min_length=1, description="by time; every symbol needs as many as the features look back"
    )


# What the features need --------------------------------------------------------------------------------------------


def bars_needed(settings: Mapping[str, Any]) -> int:
    """Bars of each symbol from which every feature, and the turbulence, is known: the longest look-back, and 252 returns."""
    periods = [int(n) for name in settings["indicators"] for n in re.findall(r"\d+", name)]
    window = settings.get("window", tensors.MARKET_WINDOW)
    return max(tensors.MARKET_WINDOW + 1, window + 1, settings.get("lookback", 1), *periods, 1)


def columns_needed(env: MarketEnv) -> list[str]:
    """Columns of bars beside the close that features or fills of `env` read."""
    ranged = any(name.split("_")[0] in processors.NEEDS_HIGH_LOW for name in env.whole.names)
    return [
        *(("open", "high", "low") if ranged else ()),
        *(("volume",) if env.whole.volume is not None else ()),
    ]


def market_from(
    bars: Sequence[Bar], settings: Mapping[str, Any], columns: Sequence[str], calendar: str
) -> tensors.MarketTensor:
    """The tensors of the bars of a request, by the functions that make those of training.

    columns: what is read beside the close; a volume that training did not know would cap fills that it did not.
    """
    found: dict[str, Any] = {
        "time": pd.to_datetime([bar.time for bar in bars], utc=True),
        "symbol": [bar.symbol for bar in bars],
    }
    for name in ("close", *columns):
        found[name] = np.asarray([getattr(bar, name) for bar in bars], float)
    table = processors.align(processors.normalise(schema.table_of(found)), calendar)
    names = list(settings["indicators"])
    data = sources.from_table(processors.indicators(table, names), {"calendar": calendar})
    return tensors.market_of(sources.order(data, tuple(settings["symbols"])), names)


# The artefact ------------------------------------------------------------------------------------------------------


def export_agent(run: str | Path, folder: str | Path, description: str = "") -> Path:
    """Writes the service artefact of the policy in `run` (a run's folder, or an exported policy) to `folder`.

    The environment is made once more from the settings that the policy names, so the training market is needed here, and not
    afterwards.  A module may say by `env_settings()` which settings its agents were trained by in place of the run's (a walk-forward:
    those of its last window), and by `acting` what to call the agent.  Raises ConfigError where the policy was not trained in
    `stock_trading` or `portfolio`, or its environment looks ahead.
    """
    source = policy_folder(run)
    policy = load_policy(source)
    name = policy.manifest["env"]
    given = {key: value for key, value in policy.manifest["env_config"].items() if key != "compact_obs"}
    own = getattr(policy.module, "env_settings", None)
    env = None if name is None else registry.make_env(name, 1, **(given | (own() if own is not None else {})))
    if not isinstance(env, MarketEnv):
        raise ConfigError(
            f"{run}: the policy was trained in {name}; stock_trading or portfolio can be served with bars"
        )
    settings = {
        "env": name,
        "settings": env.frozen(),
        "agent": getattr(policy.module, "acting", policy.manifest["method"]),
        "calendar": env.whole.about.get("calendar", "XNYS"),
        "columns": columns_needed(env),
        "data": env.whole.about.get("fingerprint", ""),
    }
    files = {f"agent/{file}": source / file for file in (MANIFEST, WEIGHTS)}
    return save_service(
        folder, "trading_agent", settings, files, description or f"trades {', '.join(env.symbols)}"
    )


class TradingAgent:
    """Orders of a trained agent for an account, from the bars of a request."""

    kind: ClassVar[Any] = "mechanism"

    def __init__(self, policy: Policy, settings: Mapping[str, Any]) -> None:
        """settings: as `export_agent` writes them.  Raises ArtifactError where the policy does not see what they describe."""
        self.policy = policy
        self.env_name, self.settings = str(settings["env"]), dict(settings["settings"])
        self.agent, self.calendar = str(settings["agent"]), str(settings["calendar"])
        self.columns, self.data = list(settings["columns"]), str(settings["data"])
        self.symbols = [str(symbol) for symbol in self.settings["symbols"]]
        self.needed = bars_needed(self.settings)
        example = self._example()

        class TradingReports(Request):
            model_config = ConfigDict(json_schema_extra={"examples": [example]})

        self.reports: type[BaseModel] = TradingReports
        seen = self._environment(Request.model_validate(example).bars).single_observation_space
        if seen != policy.observation_space:
            raise ArtifactError(
                f"the policy reads {policy.observation_space} and its settings describe {seen}"
            )

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any], device: str) -> TradingAgent:
        return cls(load_policy(folder / "agent", device), settings)

    @staticmethod
    def export(run: str | Path, folder: str | Path) -> Path:
        """`export_agent`, for `mobula export --service trading_agent`."""
        return export_agent(run, folder)

    def run(self, reports: Any, seed: int | None) -> Settlement:
        """outcome: orders, target_weights, agent, risk, as_of; payments: what the orders are expected to cost in fees, spread and impact.

        Orders are sized at the last close, which is all that is known of the price they will meet.  Raises DataError that begins with
        a field's name for bars and accounts that make no sense.
        """
        self.check(reports)
        env = self._environment(reports.bars)
        shares = self._by_symbol(reports.account.shares)
        waited = self._by_symbol(reports.account.bars_since_trade)
        state = env.held(reports.account.cash, shares, waited)
        if not float(state["value"]) > 0:
            raise DataError("reports.account.cash: the account holds neither cash nor shares")
        obs = env.observe(state)[0]
        action = torch.as_tensor(self.policy.answer(obs.numpy(), seed=seed)["action"])
        new, _, _ = env.transition(state, action[None])
        price, value = env.price[-1], float(state["value"])
        after = env.shares(new)[0]
        orders = [
            {"symbol": symbol, "side": "buy" if q > 0 else "sell", "qty": abs(q), "reference_price": p}
            for symbol, q, p in zip(self.symbols, (after - shares).tolist(), price.tolist(), strict=True)
            # Weights are turned into shares and back: what rounding leaves is no order.
            if abs(q) * p > 1e-9 * value
        ]
        stop = env.stop_flag(state["t"])
        bar = env.threshold
        outcome = {
            "orders": orders,
            "target_weights": dict(zip(["cash", *self.symbols], env.weights(new)[0].tolist(), strict=True)),
            "agent": self.agent,
            "risk": {
                "turbulence": float(env.turbulence[-1]),
                "threshold": None if math.isinf(bar) or bar >= 1e300 else bar,
                "stop": stop is not None and bool(stop[0]),
            },
            "as_of": _written(env.whole.time[-1]),
        }
        audit = {
            "value": value,
            "action": action.tolist(),
            "bars": len(env.whole),
            "not_tradable": [
                s for s, open_ in zip(self.symbols, env.tradable[-1].tolist(), strict=True) if not open_
            ],
            "features_from": self.data,
        }
        return Settlement(outcome, {"costs": float(new["paid"] - state["paid"])}, audit)

    def check(self, request: Any) -> None:
        """Raises DataError, beginning with a field's name, for what the schema cannot see."""
        for field in ("shares", "bars_since_trade"):
            for symbol in getattr(request.account, field):
                self._known(symbol, f"reports.account.{field}")
        counts = dict.fromkeys(self.symbols, 0)
        last: dict[str, datetime] = {}
        before = request.bars[0].time
        for i, bar in enumerate(request.bars):
            self._known(bar.symbol, f"reports.bars.{i}.symbol")
            if bar.time < before:
                raise DataError(
                    f"reports.bars.{i}.time: {bar.time:%Y-%m-%dT%H:%MZ} is before the bar ahead of it: sort the bars by time"
                )
            if last.get(bar.symbol) == bar.time:
                raise DataError(
                    f"reports.bars.{i}: a second bar of {bar.symbol} at {bar.time:%Y-%m-%dT%H:%MZ}"
                )
            if bar.time > request.time:
                raise DataError(
                    f"reports.bars.{i}.time: {bar.time:%Y-%m-%dT%H:%MZ} is after time: a bar that is not complete yet cannot be decided on"
                )
            for name in self.columns:
                if getattr(bar, name) is None:
                    raise DataError(
                        f"reports.bars.{i}.{name}: missing; the features or fills of this agent read it"
                    )
            before = last[bar.symbol] = bar.time
            counts[bar.symbol] += 1
        for symbol, count in counts.items():
            if count < self.needed:
                raise DataError(
                    f"reports.bars: {count} of {symbol}; its features need the last {self.needed} at the least"
                )
        self._check_sessions(request)

    def _check_sessions(self, request: Any) -> None:
        """Bars end with sessions, as those of training do, and the last one is not stale."""
        times = (
            pd.DatetimeIndex(sorted({bar.time for bar in request.bars})).tz_convert("UTC").tz_localize(None)
        )
        times = times.as_unit("ns")
        first, now = times[0], pd.Timestamp(request.time).tz_convert("UTC").tz_localize(None)
        # Whole years, so that the requests of one year share a calendar.
        found = processors.calendar_of(self.calendar, f"{first.year}-01-01", f"{now.year}-12-31")
        closes = pd.DatetimeIndex(found.closes.dropna()).tz_localize(None).as_unit("ns")
        wrong = ~times.isin(closes)
        if wrong.any():
            usual = processors.session_closes(times[wrong], self.calendar)
            bad = times[wrong] != usual
            if bad.any():
                at, end = times[wrong][bad][0], pd.Timestamp(usual[bad][0])
                i = next(
                    i for i, bar in enumerate(request.bars) if pd.Timestamp(bar.time) == at.tz_localize("UTC")
                )
                raise DataError(
                    f"reports.bars.{i}.time: {at:%Y-%m-%dT%H:%MZ} is not the end of a session of {self.calendar}; that day's is"
                    f" {end:%Y-%m-%dT%H:%MZ}"
                )
        missed = int(((closes > times[-1]) & (closes <= now)).sum())
        if missed > STALE:
            raise DataError(
                f"reports.time: {missed} sessions have ended since the last bar; at most {STALE} are taken"
            )

    def _known(self, symbol: str, field: str) -> None:
        if symbol not in self.symbols:
            raise DataError(f"{field}: this agent does not trade {symbol!r}.{nearest(symbol, self.symbols)}")

    def _by_symbol(self, values: Mapping[str, float]) -> torch.Tensor:
        return torch.tensor([float(values.get(symbol, 0)) for symbol in self.symbols], dtype=torch.float64)

    def _environment(self, bars: Sequence[Bar]) -> Any:
        """The environment that the agent was trained in, on these bars alone."""
        market = market_from(bars, self.settings, self.columns, self.calendar)
        # The last bars are enough: those before them are what the features look back on.
        first = max(len(market) - 1 - int(self.settings.get("turbulence_lag", 1)), 0)
        settings = {**self.settings, "start": str(market.time[first])}
        return registry.make_env(self.env_name, 1, market=market, **settings)

    def _example(self) -> dict[str, Any]:
        """A request that works: as many sessions as are needed up to a day in 2022, with made-up prices."""
        found = processors.calendar_of(self.calendar, "2018-01-01", "2023-12-31")
        closes = pd.DatetimeIndex(found.closes.dropna())
        if self.needed > len(closes[closes <= "2022-06-02"]):
            raise ConfigError(f"the features look back on {self.needed} bars: more than an example can hold")
        times = closes[closes <= "2022-06-02"][-self.needed :]
        draws = np.random.default_rng(0).normal(size=(self.needed, len(self.symbols)))
        prices = np.round(100 * np.exp(np.cumsum(0.01 * draws, 0)), 2)
        bars = []
        for t, row in zip(times, prices.tolist(), strict=True):
            for symbol, p in zip(self.symbols, row, strict=True):
                bar: dict[str, Any] = {"time": f"{t:%Y-%m-%dT%H:%M:%SZ}", "symbol": symbol, "close": p}
                extra = {"open": p, "high": round(p * 1.01, 2), "low": round(p * 0.99, 2), "volume": 1e6}
                bars.append(bar | {name: extra[name] for name in self.columns})
        account = {"cash": 1e6, "shares": {self.symbols[0]: 10.0}, "bars_since_trade": {self.symbols[0]: 3}}
        return {"time": bars[-1]["time"], "account": account, "bars": bars}


def _written(time: Any) -> str:
    return pd.Timestamp(time).tz_localize("UTC").astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
