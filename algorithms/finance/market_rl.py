"""Trading agents chosen and judged walk-forward: train, validate, select, trade, roll on.

The rolling ensemble of FinRL-Meta (Liu et al., NeurIPS 2021 workshop, arXiv 2112.06753; Machine Learning 2024, arXiv
2304.13174) as one algorithm.  An iteration is one window:

    1. the turbulence threshold, from the initial training range (or the published adaptive rule)
    2. every family of agents is trained on the bars so far
    3. each is scored by the Sharpe ratio of its account on the validation bars
    4. the best of them
    5. trades the next block from the account that the last block left, and the choice is logged

With `workers`, the agents of a window are trained as Ray tasks, and without warm starts, where windows do not depend on each other,
those of the next windows beside them.

Families: `ppo`; `a2c`, which is PPO with one epoch, one minibatch, no clipping and lambda = 1; `sac`, RLlib's own on the NumPy
view of the environment.  All scales, thresholds and choices come from bars before the block that is traded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from mobula import registry
from mobula.algorithms.finance.agents import (
    FAMILIES,
    MarketRLLearner,
    MarketRLModule,
    play,
    stop_at,
    train_agent,
)
from mobula.envs.finance import metrics
from mobula.envs.finance.market_env import MarketEnv
from mobula.envs.finance.walkforward import Window, windows
from mobula.errors import ConfigError
from mobula.method import Method, MethodConfig, hyperparameter
from mobula.metrics import spread
from mobula.sampling.tensor_env import TensorEnv

# What is chosen, as functions -------------------------------------------------------------------------------------


def best(scores: dict[str, float]) -> str:
    """The family with the highest validation Sharpe; the first of those that tie."""
    return max(scores, key=lambda name: scores[name])


def threshold(
    turbulence: Tensor, initial: int, validation_start: int, *, q: float, rule: str, window: int = 63
) -> float:
    """The turbulence above which accounts leave the market; infinite for q = 0.

    turbulence  [T] of the whole range, of which the first `initial` bars are the initial training range
    rule        "quantile": its q-quantile there.  "adaptive": where the mean of the `window` bars up to the start of validation is above
                the in-sample 0.90 quantile, that quantile, else the in-sample maximum
    """
    if q == 0:
        return float("inf")
    inside = turbulence[:initial]
    inside = inside[inside > 0]
    if not len(inside):
        return float("inf")
    if rule == "quantile":
        return float(inside.quantile(q))
    high = float(inside.quantile(0.90))
    recent = float(turbulence[max(0, validation_start - window) : validation_start].mean())
    return high if recent > high else float(inside.max())


# The algorithm -------------------------------------------------------------------------------------------------------


class MarketRLConfig(MethodConfig):
    """Trading agents by rolling train, validate, select, trade on market data (FinRL-Meta: Liu et al. 2021, arXiv 2112.06753)."""

    citation = """@article{liu2024dynamic,
  title   = {Dynamic Datasets and Market Environments for Financial Reinforcement Learning},
  author  = {Liu, Xiao-Yang and Xia, Ziyi and Yang, Hongyang and Gao, Jiechao and Zha, Daochen and Zhu, Ming and Wang, Christina Dan and Wang, Zhaoran and Guo, Jian},
  journal = {Machine Learning},
  year    = {2024}
}"""
    when = (
        "Use it to train trading agents on daily bars and to learn what they would have done on bars that nothing was fitted on: every"
        " window's scale, threshold and choice comes from before the block that is traded, and positions are carried through. Give it"
        " your own Parquet folder, and read its Sharpe ratio with the interval and against equal weights. It does not find an edge that"
        " the data do not hold: validation over 63 days has a standard error near 2 in annual Sharpe, so the choice between agents is"
        " mostly luck. Where a single agent on one range is wanted, train `PPO` or `SAC` on `portfolio` or `stock_trading`."
    )
    effort = (
        "A window costs the training of its agents, families times seeds, and one pass of their accounts over validation and block: 2.8 s"
        " of one core for one PPO agent with 20,000 steps on five shares. Validation and trading are one batch of accounts. With `workers` agents are trained side by side."
    )
    default_env = "portfolio"
    default_stop = {"progress": 1.0}
    headline = ("wealth", "value of the traded account over its first")
    rejected = {
        "num_epochs": "it belongs to the families: ppo 4 epochs, a2c one",
        "train_batch_size": "it belongs to the families",
    }

    algo_families = hyperparameter(["ppo"], None, "agents that compete in each window: ppo, a2c, sac")
    rebalance = hyperparameter(63, tune.choice([21, 63, 126]), "bars that a choice trades", low=1)
    validation = hyperparameter(63, tune.choice([21, 63, 126]), "bars that agents are scored on", low=2)
    embargo = hyperparameter(0, None, "bars left out between training and validation", low=0)
    train_share = hyperparameter(
        0.6, None, "share of the range that is the initial training range", low=0.05, high=0.95
    )
    sliding = hyperparameter(None, None, "bars of a sliding training range (default: it expands)", low=10)
    steps = hyperparameter(
        20_000, tune.choice([20_000, 100_000]), "environment steps of ppo and a2c in each window", low=1
    )
    sac_steps = hyperparameter(4000, None, "environment steps of sac in each window", low=100)
    n_seeds = hyperparameter(1, tune.choice([1, 3]), "agents of each family, whose mean acts", low=1)
    warm_start = hyperparameter(False, tune.choice([False, True]), "begin from the last window's weights")
    num_envs = hyperparameter(
        32, tune.choice([32, 64, 1024]), "environments that an agent trains in, side by side", low=1
    )
    lr = hyperparameter(3e-4, tune.loguniform(1e-5, 1e-3), "step size of ppo and a2c", low=0.0)
    gamma = hyperparameter(0.99, tune.choice([0.9, 0.99, 0.999]), "discount", low=0.0, high=1.0)
    entropy = hyperparameter(
        0.01, tune.loguniform(1e-4, 0.1), "weight of the entropy bonus of ppo and a2c", low=0.0
    )
    hidden = hyperparameter([64, 64], tune.choice([[64, 64], [256, 256]]), "hidden layers")
    turbulence_q = hyperparameter(
        0.99,
        tune.choice([0.0, 0.9, 0.99]),
        "quantile of turbulence above which accounts leave the market (0: never)",
        low=0.0,
        high=1.0,
    )
    turbulence_rule = hyperparameter(
        "quantile",
        tune.choice(["quantile", "adaptive"]),
        "the initial range's quantile, or the published adaptive rule",
        choices=["quantile", "adaptive"],
    )

    workers = hyperparameter(
        0,
        None,
        "Ray tasks that train agents side by side, of the next windows too unless they start warm",
        low=0,
    )

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        self.environment(env_config={"start": "2012-01-01", "end": "2023-01-01"})

    def validate(self) -> None:
        super().validate()
        for family in self.algo_families:
            if family not in FAMILIES:
                raise ConfigError(
                    f"MarketRLConfig: unknown family {family!r} in algo_families: {', '.join(FAMILIES)}"
                )
        if not self.algo_families or len(set(self.algo_families)) != len(self.algo_families):
            raise ConfigError("MarketRLConfig: algo_families names each family once, and at least one")

    def adapt_env(self, env: TensorEnv) -> TensorEnv:
        if not isinstance(env, MarketEnv):
            raise ConfigError(f"market_rl trades in stock_trading or portfolio, not in {self.env}")
        if env.compact:
            raise ConfigError(
                "market_rl: leave compact_obs out: the agents use it from 1,024 environments on"
            )
        return env

    def get_default_learner_class(self) -> Any:
        return MarketRLLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(
            module_class=MarketRLModule,
            model_config={
                "families": list(self.algo_families),
                "n_seeds": self.n_seeds,
                "hidden": list(self.hidden),
            },
        )

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}


class MarketRL(Method, config=MarketRLConfig):
    """Rolling selection among trained agents, one window an iteration."""

    config: MarketRLConfig

    def setup(self, config: Any) -> None:
        super().setup(config)
        c = self.config
        self.seed = torch.seed() % 2**31 if c.seed is None else int(c.seed)
        if not isinstance(c.env, str):
            raise ConfigError("market_rl: name the environment: portfolio or stock_trading")
        span: Any = registry.make_env(c.env, 1, **{**c.env_config, "training": False})
        self.span: Any = span
        self.initial = int(c.train_share * span.T)
        self.windows = windows(
            span.T,
            first=self.initial,
            block=c.rebalance,
            validation=c.validation,
            embargo=c.embargo,
            sliding=None if c.sliding is None else int(c.sliding),
        )
        self.accounts = ("ensemble", *c.algo_families, "random")
        self.roll = 0
        self.held: dict[str, Any] = {}
        self.paths: dict[str, list[float]] = {name: [] for name in self.accounts}
        self.weights: list[Any] = []
        self.costs = {name: 0.0 for name in self.accounts}
        self.log: list[dict[str, Any]] = []
        self.warm: dict[str, Any] = {}
        # Agents of windows that are still to be traded, where tasks trained them beside those of an earlier one.
        self.ready: dict[int, list[Any]] = {}

    # One window ---------------------------------------------------------------------------------------------------

    def training_step(self) -> None:
        if self.roll < len(self.windows):
            window = self.windows[self.roll]
            limit = self.threshold_at(window)
            steps = self.train_agents()
            scores = self.validate_agents(window, limit)
            choice = best(scores)
            families = self.config.algo_families
            self.learn(
                {
                    "selected": torch.tensor(families.index(choice)),
                    "threshold": torch.tensor(limit, dtype=torch.float64),
                    "fitted": self._instants(window),
                }
            )
            self.trade(window, limit, choice)
            self.log.append(self.entry(window, limit, scores, choice))
            self.roll += 1
            self.metrics.log_value("agent_steps", steps, reduce="lifetime_sum")
            self.metrics.log_value("selected", families.index(choice), window=1)
            for name, value in scores.items():
                self.metrics.log_value(f"validation_sharpe_{name}", value, window=1)
        for name, value in self.numbers().items():
            self.metrics.log_value(name, value, window=1)

    def threshold_at(self, window: Window) -> float:
        c = self.config
        return threshold(
            self.span.turbulence,
            self.initial,
            window.validation[0],
            q=c.turbulence_q,
            rule=c.turbulence_rule,
        )

    def settings(
        self, bars: tuple[int, int], window: Window, limit: float, *, training: bool
    ) -> dict[str, Any]:
        """Settings of an environment on `bars` of the range, by the scale of the window's training range."""

        def edge(index: int) -> str:
            return str(self._edge(index))

        return {
            **self.config.env_config,
            "start": edge(bars[0]),
            "end": edge(bars[1]),
            "fit_start": edge(window.train[0]),
            "fit_end": edge(window.train[1]),
            "training": training,
            **stop_at(limit),
            "turbulence_stop": not training,
        }

    def _edge(self, index: int) -> Any:
        """datetime64[ns] at which bar `index` of the range ends; just after the last one for what lies behind it."""
        time, at = self.span.whole.time, self.span.first + index
        return time[at] if at < len(time) else time[-1] + np.timedelta64(1, "s")

    def _instants(self, window: Window) -> Tensor:
        return torch.tensor([int(self._edge(index).astype("int64")) for index in window.train])

    def train_agents(self) -> int:
        """Trains every agent of this window on its training range and puts them into the module; returns the steps taken."""
        c, taken = self.config, 0
        agents = [(family, k) for family in c.algo_families for k in range(c.n_seeds)]
        if self.roll not in self.ready:
            windows = 1 if c.warm_start else max(1, math.ceil(c.workers / len(agents)))
            rolls = range(self.roll, min(self.roll + windows, len(self.windows)))
            jobs = [self._job(roll, family, k) for roll in rolls for family, k in agents]
            found = spread(train_agent, jobs, c.workers, "agents")
            for i, roll in enumerate(rolls):
                self.ready[roll] = found[i * len(agents) : (i + 1) * len(agents)]
        state: dict[str, Any] = {}
        for (family, k), (actor, weights, steps) in zip(agents, self.ready.pop(self.roll), strict=True):
            state |= {f"actors.{family}.{k}.{name}": value for name, value in actor.items()}
            if c.warm_start:
                self.warm[f"{family}.{k}"] = weights
            taken += steps
        self.learn(state, report=False)
        return taken

    def _job(self, roll: int, family: str, k: int) -> tuple[Any, ...]:
        """Arguments of `train_agent` for the k-th agent of a family in a window."""
        c, window = self.config, self.windows[roll]
        settings = self.settings(window.train, window, self.threshold_at(window), training=True)
        length = window.train[1] - window.train[0]
        settings["episode_length"] = min(int(settings.get("episode_length", 252)), length - 1)
        path = [self.seed, roll, c.algo_families.index(family), k]
        word = int(np.random.SeedSequence(path).generate_state(1)[0]) >> 1
        return family, str(c.env), settings, c, word, self.warm.get(f"{family}.{k}")

    def validate_agents(self, window: Window, limit: float) -> dict[str, float]:
        """Sharpe ratio of every family on the validation bars, from fresh accounts."""
        families = self.config.algo_families
        # The first decision falls on the last bar before them.
        bars = (window.validation[0] - 1, window.validation[1])
        value = play(self._world(bars, window, limit, len(families)), self._acts(families))["value"]
        returns = value[1:] / value[:-1] - 1
        return {family: metrics.sharpe(returns[:, b]) for b, family in enumerate(families)}

    def trade(self, window: Window, limit: float, choice: str) -> None:
        """The chosen family trades the block, and beside it every family and random actions, each in its own account."""
        env = self._world((window.trade[0] - 1, window.trade[1]), window, limit, len(self.accounts))
        seed = self.seed + 1_000_003 * self.roll
        acts = self._acts([choice if name == "ensemble" else name for name in self.accounts], seed)
        found = play(env, acts, self.held or None)
        self.held = found["account"]
        for b, name in enumerate(self.accounts):
            self.paths[name].extend(found["value"][bool(self.paths[name]) :, b].tolist())
            self.costs[name] += float(found["paid"][b])
        ensemble = self.accounts.index("ensemble")
        self.weights.extend(found["weights"][bool(self.weights) :, ensemble])

    def _world(self, bars: tuple[int, int], window: Window, limit: float, accounts: int = 1) -> Any:
        return registry.make_env(
            str(self.config.env), accounts, **self.settings(bars, window, limit, training=False)
        )

    def _acts(self, names: Sequence[str], seed: int = 0) -> Callable[[Tensor], Tensor]:
        """Actions [B, A] for observations of B accounts, each of a family or, where it is named so, random."""
        module: Any = self.rl_module
        g = torch.Generator().manual_seed(seed)
        shape = self.span.single_action_space.shape
        rows: dict[str, list[int]] = {}
        for b, name in enumerate(names):
            rows.setdefault(name, []).append(b)

        def act(obs: Tensor) -> Tensor:
            out = torch.empty(len(names), *shape)
            for name, at in rows.items():
                random = name == "random"
                out[at] = (
                    2 * torch.rand(len(at), *shape, generator=g) - 1
                    if random
                    else module.act_as(name, obs[at])
                )
            return out

        return act

    def entry(self, window: Window, limit: float, scores: dict[str, float], choice: str) -> dict[str, Any]:
        """A line of the selection log."""
        dates = self.span.dates
        spans = {name: getattr(window, name) for name in ("train", "validation", "trade")}
        return {
            "window": self.roll,
            **{name: [str(dates[a]), str(dates[b - 1])] for name, (a, b) in spans.items()},
            "threshold": limit if np.isfinite(limit) else None,
            "validation_sharpe": scores,
            "selected": choice,
        }

    # What came of it ------------------------------------------------------------------------------------------------

    def returns(self, name: str = "ensemble") -> Any:
        """[T] simple returns of an account over all blocks that were traded."""
        value = np.asarray(self.paths[name])
        return value[1:] / value[:-1] - 1

    def traded_dates(self) -> Any:
        """[T + 1] dates of the values of the paths."""
        if not self.roll:
            return self.span.dates[:0]
        return self.span.dates[self.windows[0].trade[0] - 1 : self.windows[self.roll - 1].trade[1]]

    def numbers(self) -> dict[str, float]:
        """Progress, and the state of the traded account."""
        found = {"progress": self.roll / len(self.windows), "windows_traded": float(self.roll)}
        if self.roll:
            for name in self.accounts:
                wealth = self.paths[name][-1] / self.paths[name][0]
                found["wealth" if name == "ensemble" else f"wealth_{name}"] = wealth
            found["sharpe"] = metrics.sharpe(self.returns())
            found["max_drawdown"] = metrics.max_drawdown(self.returns())
        return found

    def report(self) -> dict[str, Any]:
        """Metrics of every account with intervals, how often each family won, the ensemble against the mean of its members, and the
        deflated Sharpe ratio, for as many tries as families and agents were compared in all windows.
        """
        families, found = self.config.algo_families, {}
        for name in self.accounts:
            interval = metrics.sharpe_interval(self.returns(name))
            found[name] = {
                **metrics.summary(self.returns(name), costs=self.costs[name] / self.paths[name][0]),
                "sharpe_low": interval.low,
                "sharpe_high": interval.high,
            }
        found["ensemble"]["turnover"] = metrics.summary(self.returns(), weights=np.asarray(self.weights))[
            "turnover"
        ]
        scores = np.asarray([list(entry["validation_sharpe"].values()) for entry in self.log]) / 252**0.5
        return {
            "accounts": found,
            "wins": {f: sum(entry["selected"] == f for entry in self.log) for f in families},
            "ensemble_minus_members": found["ensemble"]["sharpe"]
            - float(np.mean([found[f]["sharpe"] for f in families])),
            "deflated_sharpe": metrics.deflated_sharpe(
                self.returns(), scores.size * self.config.n_seeds, float(scores.std())
            ),
            "survivorship": self.span.whole.about["survivorship"],
            "data": self.span.whole.about["fingerprint"],
        }

    def evaluate(self, parallel_train_future: Any = None) -> Any:
        """The traded blocks are the evaluation: no bar of them was trained or validated on before."""
        if not self.roll:
            return super().evaluate(parallel_train_future)
        own = self.report()["accounts"]["ensemble"]
        return {"walk_forward": {k: float(v) for k, v in own.items()}}

    def figures(self, folder: Path) -> list[str]:
        """Values, drawdowns, weights and turbulence of the traded blocks."""
        if not self.roll:
            return []
        dates = self.traded_dates()
        first = self.windows[0].trade[0] - 1
        metrics.backtest_figure(
            dates,
            {name: self.paths[name] for name in self.accounts},
            Path(folder) / "backtest.png",
            weights=np.asarray(self.weights),
            names=self.span.symbols,
            turbulence=self.span.turbulence[first : first + len(dates)],
            threshold=self.log[-1]["threshold"],
            title=f"walk-forward on {len(self.span.symbols)} symbols; survivorship {self.span.whole.about['survivorship']}",
        )
        return ["backtest.png"]

    # Checkpoints ------------------------------------------------------------------------------------------------------

    KEPT = ("roll", "held", "paths", "weights", "costs", "log", "warm", "ready", "seed")

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.KEPT}
        return {**super().get_state(*args, **kwargs), "market_rl": own}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        for name, value in state.get("market_rl", {}).items():
            setattr(self, name, value)

    @classmethod
    def experiment(cls) -> Any:
        from mobula.algorithms.finance.market_rl_experiment import experiment

        return experiment()
