"""The experiment of MarketRL: a planted signal whose optimum is known, and a walk-forward on real prices.

1. PPO on the planted signal, without and with cost, against sgn(s) and the policy of value iteration, all scored on the same
   paths of the signal by the reward without noise.
2. PPO on optimal execution, against Almgren and Chriss's schedule and an even one.
3. The rolling ensemble on five US shares, 2015 to 2022, beside random actions, its members and portfolios without learning.
   The shares survived, so levels mean nothing: only differences on the same days do, and few of those are expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobula import registry
from mobula.algorithms.finance.market_rl import MarketRLConfig
from mobula.envs.finance import baselines, metrics, synthetic
from mobula.envs.finance.execution import Execution
from mobula.envs.finance.market_env import LookaheadGuard
from mobula.envs.finance.portfolio import PortfolioAllocation
from mobula.envs.finance.trading import StockTrading
from mobula.errors import EnvironmentFault
from mobula.experiment import (
    Arm,
    Claim,
    Estimate,
    Experiment,
    Task,
    above,
    at_least,
    check,
    mean_of,
    within,
)
from mobula.experiment.core import Results, Statistic
from mobula.experiment.statistics import exact
from mobula.files import storage

PATHS, STEPS = 512, 4000
SOLD_PATHS = 20_000


# Planted signal -------------------------------------------------------------------------------------------------------


def planted(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Trains PPO a seed and scores its mean action, sgn(s) and the value-iteration policy on the seed's own fresh paths."""
    beta, cost = 1e-3, float(task.env_config.get("cost", 0.0))
    oracle, _ = synthetic.optimal_policy(beta, cost) if cost else (lambda s, before: s.sign(), 0.0)
    found = []
    for seed in seeds:
        chosen = config.copy(copy_frozen=False).environment(task.env, env_config=dict(task.env_config))
        chosen.debugging(seed=seed, log_level="ERROR")
        algorithm = chosen.build_algo()
        steps = 0
        curve: list[tuple[int, float]] = []
        s = synthetic.signal_paths(STEPS, PATHS, 10_000 + seed)

        def acts(now: torch.Tensor, before: torch.Tensor, algorithm: Any = algorithm) -> torch.Tensor:
            obs = torch.stack([now, before], -1).float()
            with torch.no_grad():
                out = algorithm.rl_module.pi(algorithm.rl_module.encoder(obs))
            return out[:, 0].clamp(-1, 1).double()

        while steps < task.env_steps:
            steps = int(algorithm.train()["env_runners"]["num_env_steps_sampled_lifetime"])
            if not curve or steps - curve[-1][0] >= task.env_steps / 12:
                short = synthetic.score(acts, s[:500], beta=beta, cost=cost)
                curve.append((steps, float(short.mean())))
        reward = float(synthetic.score(acts, s, beta=beta, cost=cost).mean())
        sign = float(synthetic.score(lambda now, before: now.sign(), s, beta=beta, cost=cost).mean())
        best = float(synthetic.score(oracle, s, beta=beta, cost=cost).mean())
        grid = torch.linspace(-3, 3, 61, dtype=torch.float64)
        found.append(
            {
                "reward": reward,
                "sign": sign,
                "oracle": best,
                "share": reward / synthetic.sign_optimum(beta),
                "share_of_oracle": reward / best,
                "gain_over_sign": reward - sign,
                "curve_steps": [point[0] for point in curve],
                "curve_values": [point[1] for point in curve],
                "grid": grid.tolist(),
                **{
                    f"policy_{name}": acts(grid, torch.full_like(grid, at)).tolist()
                    for name, at in (("short", -1.0), ("flat", 0.0), ("long", 1.0))
                },
                **{
                    f"oracle_{name}": oracle(grid, torch.full_like(grid, at)).tolist()
                    for name, at in (("short", -1.0), ("flat", 0.0), ("long", 1.0))
                },
            }
        )
        algorithm.stop()
    return found


# Optimal execution -----------------------------------------------------------------------------------------------------


def execution(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Trains PPO a seed and sells along 20,000 fresh paths by its mean action: E + lambda V of its mean schedule over the optimum, and
    how far the realised shortfall lies from E, in standard errors.
    """
    found = []
    for seed in seeds:
        chosen = config.copy(copy_frozen=False).environment(task.env, env_config=dict(task.env_config))
        algorithm = chosen.debugging(seed=seed, log_level="ERROR").build_algo()
        env = Execution(SOLD_PATHS, **task.env_config)
        market = env.market

        def sell(env: Execution = env, algorithm: Any = algorithm, seed: int = seed) -> tuple[Any, Any]:
            """(mean schedule [N], shortfall [paths]) of the mean action, which the module gives in [-1, 1]."""
            obs, _ = env.reset(seed=10_000 + seed)
            sold = []
            for _ in range(env.market.trades):
                with torch.no_grad():
                    mean = algorithm.rl_module.pi(algorithm.rl_module.encoder(obs))[:, :1]
                before = env.state["shares"]
                env.state, *_ = env.transition(env.state, (mean.clamp(-1, 1) + 1) / 2)
                obs = env.observe(env.state)
                sold.append((before - env.state["shares"]).mean())
            return torch.stack(sold), env.state["shortfall"]

        steps = 0
        curve: list[tuple[int, float]] = []
        while steps < task.env_steps:
            steps = int(algorithm.train()["env_runners"]["num_env_steps_sampled_lifetime"])
            if not curve or steps - curve[-1][0] >= task.env_steps / 12:
                mean, variance = market.cost(sell()[0])
                curve.append((steps, float(mean + market.risk_aversion * variance) / env.optimum))
        schedule, shortfall = sell()
        mean, variance = market.cost(schedule)
        error = float((shortfall.mean() - mean) / (shortfall.std() / len(shortfall) ** 0.5))
        even = torch.full_like(schedule, market.shares / market.trades)
        even_mean, even_variance = market.cost(even)
        found.append(
            {
                "cost_over_optimum": float(mean + market.risk_aversion * variance) / env.optimum,
                "even_over_optimum": float(even_mean + market.risk_aversion * even_variance) / env.optimum,
                "shortfall_error": error,
                "within_three_errors": float(abs(error) <= 3),
                "shortfall": float(shortfall.mean()),
                "expected_shortfall": float(mean),
                "curve_steps": [point[0] for point in curve],
                "curve_values": [point[1] for point in curve],
                "schedule": (schedule / market.shares).tolist(),
                "optimal_schedule": (market.schedule() / market.shares).tolist(),
            }
        )
        algorithm.stop()
    return found


# Walk-forward on real prices -----------------------------------------------------------------------------------------


def walk_forward(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Runs every window of MarketRL a seed; the traded path beside equal weights and random actions on the same days."""
    found = []
    for seed in seeds:
        chosen = config.copy(copy_frozen=False).environment(task.env, env_config=dict(task.env_config))
        chosen.debugging(seed=seed, log_level="ERROR")
        algorithm = chosen.build_algo()
        stop = task.env_steps or len(algorithm.windows)
        while algorithm.roll < min(stop, len(algorithm.windows)):
            algorithm.train()
        dates = algorithm.traded_dates()
        report = algorithm.report()
        flat = _baselines(algorithm, ("equal_weight",), seed)
        equal = flat.returns("equal_weight")
        to_equal = metrics.sharpe_difference(algorithm.returns(), equal)
        to_random = metrics.sharpe_difference(algorithm.returns(), algorithm.returns("random"))
        accounts = report["accounts"]
        numbers: dict[str, Any] = {
            "windows": float(len(algorithm.log)),
            "logged": float(all(entry["selected"] for entry in algorithm.log)),
            "bars": float(len(equal)),
            "sharpe_equal_weight": metrics.sharpe(equal),
            "difference_to_equal_weight": to_equal.value,
            "difference_to_equal_weight_low": to_equal.low,
            "difference_to_equal_weight_high": to_equal.high,
            "difference_to_random": to_random.value,
            "difference_to_random_low": to_random.low,
            "difference_to_random_high": to_random.high,
            "deflated_sharpe": report["deflated_sharpe"],
            "ensemble_minus_members": report["ensemble_minus_members"],
            "not_below_random": float(
                accounts["ensemble"]["sharpe_high"] >= accounts["random"]["sharpe_low"]
            ),
            **{f"wins_{family}": float(count) for family, count in report["wins"].items()},
            **{
                f"{metric}_{name}": value
                for name, numbers in accounts.items()
                for metric, value in numbers.items()
            },
            "curve_dates": [str(day) for day in dates],
            "curve_steps": list(range(len(dates))),
            "curve_values": [
                round(v / algorithm.paths["ensemble"][0], 6) for v in algorithm.paths["ensemble"]
            ],
            "curve_random": [round(v / algorithm.paths["random"][0], 6) for v in algorithm.paths["random"]],
            "curve_equal_weight": (flat.value[:, 0] / flat.value[0, 0]).round(decimals=6).tolist(),
            "log": algorithm.log,
        }
        if seed == seeds[0]:
            first = algorithm.windows[0].trade[0] - 1
            numbers["weights"] = np.asarray(algorithm.weights).round(4).tolist()
            numbers["symbols"] = list(algorithm.span.symbols)
            numbers["turbulence"] = algorithm.span.turbulence[first : first + len(dates)].tolist()
            numbers["threshold"] = algorithm.log[-1]["threshold"]
        found.append(numbers)
        algorithm.stop()
    return found


def _baselines(algorithm: Any, names: tuple[str, ...], seed: int) -> baselines.Backtest:
    """Portfolios without learning on the days that the windows traded, with the same costs and fills."""
    dates = algorithm.traded_dates()
    settings = {
        name: value
        for name, value in algorithm.config.env_config.items()
        if name in ("universe", "symbols", "cost_bps", "buy_cost_bps", "sell_cost_bps", "fill", "cash")
    }
    env = PortfolioAllocation(
        1,
        **{**settings, "start": str(dates[0]), "end": str(dates[-1] + np.timedelta64(1, "D"))},
        training=False,
        turbulence_q=None,
    )
    return baselines.backtest(env, names, seed=seed)


def without_learning(config: Any, task: Task, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Sharpe ratios of the baselines on the same days; one backtest serves every seed, as only `random` has a seed."""
    chosen = config.copy(copy_frozen=False).environment(task.env, env_config=dict(task.env_config))
    algorithm = chosen.debugging(seed=0, log_level="ERROR").build_algo()
    algorithm.roll = min(task.env_steps or len(algorithm.windows), len(algorithm.windows))
    played = _baselines(algorithm, baselines.NAMES, 0)
    algorithm.stop()
    numbers: dict[str, Any] = {}
    for name in played.names:
        interval = metrics.sharpe_interval(played.returns(name))
        numbers |= {f"sharpe_{name}": interval.value, f"sharpe_{name}_low": interval.low}
        numbers |= {f"sharpe_{name}_high": interval.high}
        numbers[f"annual_return_{name}"] = metrics.summary(played.returns(name))["annual_return"]
        numbers[f"max_drawdown_{name}"] = metrics.max_drawdown(played.returns(name))
    return [numbers for _ in seeds]


# Checks ----------------------------------------------------------------------------------------------------------------


def look_ahead() -> Estimate:
    """Violations that the guard finds in 2 x 40 steps of both environments, both forms of observation."""
    found = 0
    for make in (
        lambda: StockTrading(4, start="2015-01-01", end="2017-01-01", fit_end="2016-01-01"),
        lambda: StockTrading(4, start="2015-01-01", end="2017-01-01", obs="reference"),
        lambda: PortfolioAllocation(4, start="2015-01-01", end="2017-01-01"),
        lambda: PortfolioAllocation(4, start="2015-01-01", end="2017-01-01", form="covariance"),
    ):
        env: Any = make()
        env.reset(seed=1)
        guard, g = LookaheadGuard(env), torch.Generator().manual_seed(2)
        for _ in range(20):
            action = 2 * torch.rand(4, *env.single_action_space.shape, generator=g) - 1
            try:
                guard.check(action)
            except EnvironmentFault:
                found += 1
            env.step(action)
    return exact(found, 80)


def mean_alone(metric: str, arm: str) -> Statistic:
    """The mean over seeds as a number, where a claim is about the mean and not about its interval."""

    def statistic(results: Results, task: str) -> Estimate:
        values = results.values(metric, arm, task)
        return exact(float(np.mean(values)), len(values))

    return statistic


# Figure ----------------------------------------------------------------------------------------------------------------


def draw(results: Results, folder: Path) -> list[str]:
    """The learned position against value iteration's; the learned sales; the walk-forward paths; one seed's backtest in full."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from mobula.experiment.figures import COLOURS, band

    figure, (left, middle, sales, right) = plt.subplots(1, 4, figsize=(17.5, 4.0), layout="constrained")
    for colour, task, label in (
        (COLOURS[0], "planted", "no cost"),
        (COLOURS[1], "planted_cost", "with cost"),
    ):
        cells = results["ppo", task]
        if cells:
            at = cells[0]["curve_steps"]
            centre, low, high = band(
                np.asarray([np.interp(at, c["curve_steps"], c["curve_values"]) for c in cells]) * 1e4
            )
            left.plot(at, centre, color=colour, linewidth=2, label=f"PPO, {label}")
            left.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
            left.axhline(
                1e4 * np.mean([c["oracle"] for c in cells]), color=colour, linestyle="--", linewidth=1
            )
            if task == "planted_cost":
                left.axhline(
                    1e4 * np.mean([c["sign"] for c in cells]), color=colour, linestyle=":", linewidth=1.2
                )
    left.set_ylim(bottom=0)
    left.set_xlabel("environment steps")
    left.set_ylabel("reward a step, basis points")
    left.set_title("planted signal (dashed: optimum; dotted: sgn with cost)", fontsize=9)
    left.ticklabel_format(axis="x", style="sci", scilimits=(0, 4), useMathText=True)
    cells = results["ppo", "planted_cost"]
    if cells:
        for colour, name in ((COLOURS[3], "short"), (COLOURS[6], "flat"), (COLOURS[2], "long")):
            middle.plot(
                cells[0]["grid"], cells[0][f"policy_{name}"], color=colour, linewidth=2, label=f"from {name}"
            )
            middle.plot(
                cells[0]["grid"], cells[0][f"oracle_{name}"], color=colour, linewidth=1, linestyle="--"
            )
        middle.set_xlabel("signal s")
        middle.set_ylabel("new position")
        middle.set_title("with cost, seed 0 (dashed: value iteration)", fontsize=9)
    cells = results["ppo_execution", "execution"]
    if cells:
        trades = np.arange(len(cells[0]["schedule"]) + 1)
        held = np.asarray([np.concatenate([[1.0], 1 - np.cumsum(c["schedule"])]) for c in cells])
        centre, low, high = band(held)
        sales.plot(trades, centre, color=COLOURS[0], linewidth=2, label="PPO")
        sales.fill_between(trades, low, high, color=COLOURS[0], alpha=0.18, linewidth=0)
        best = 1 - np.cumsum(cells[0]["optimal_schedule"])
        sales.plot(trades, [1.0, *best], color="0.2", linestyle="--", linewidth=1, label="Almgren-Chriss")
        sales.plot(trades, 1 - trades / trades[-1], color="0.6", linestyle=":", linewidth=1.2, label="even")
        sales.set_xlabel("trade")
        sales.set_ylabel("share of the position left")
        sales.set_title("optimal execution", fontsize=9)
    cells = results["market_rl", "us5"]
    if cells:
        dates = np.asarray(cells[0]["curve_dates"], dtype="datetime64[D]")
        for colour, key, label in (
            (COLOURS[0], "curve_values", "rolling ensemble"),
            (COLOURS[2], "curve_equal_weight", "equal weights"),
            (COLOURS[1], "curve_random", "random actions"),
        ):
            centre, low, high = band(np.asarray([c[key] for c in cells]))
            right.plot(dates, centre, color=colour, linewidth=1.6, label=label)
            right.fill_between(dates, low, high, color=colour, alpha=0.18, linewidth=0)
        right.set_title(f"five surviving US shares, {len(cells)} seeds", fontsize=9)
        right.set_ylabel("value over the first")
        right.tick_params(axis="x", labelrotation=30)
    for axes in (left, middle, sales, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    with storage(folder / "figure.png"):
        figure.savefig(folder / "figure.png", dpi=140)
    plt.close(figure)
    made = ["figure.png"]
    if cells and "weights" in cells[0]:
        metrics.backtest_figure(
            dates,
            {
                "rolling ensemble": cells[0]["curve_values"],
                "equal weights": cells[0]["curve_equal_weight"],
                "random actions": cells[0]["curve_random"],
            },
            folder / "backtest.png",
            weights=cells[0]["weights"],
            names=tuple(cells[0]["symbols"]),
            turbulence=cells[0]["turbulence"],
            threshold=cells[0]["threshold"],
            title="walk-forward, seed 0 (shares that survived: compare the curves with each other only)",
        )
        made.append("backtest.png")
    return made


def experiment() -> Experiment:
    """Arms, tasks, claims."""
    ppo: Any = registry.config_class("PPO")()
    ppo.training(lr=9e-4, gamma=0.99, lambda_=0.95, rollout_length=32, num_epochs=4, minibatch_size=2048)
    ppo.env_runners(num_envs_per_env_runner=512)
    # A finite horizon without discount.
    seller = ppo.copy(copy_frozen=False).training(gamma=1.0, initial_log_std=-1.0)
    ensemble = MarketRLConfig().training(algo_families=["ppo", "a2c", "sac"], steps=20_000, sac_steps=4000)
    span = {"universe": "us5", "start": "2015-01-01", "end": "2023-01-01"}
    return Experiment(
        arms={
            "ppo": Arm(ppo, run=planted, batch=1, tasks=("planted", "planted_cost")),
            "ppo_execution": Arm(seller, run=execution, batch=1, tasks=("execution",)),
            "market_rl": Arm(ensemble, run=walk_forward, batch=1, tasks=("us5",)),
            "without_learning": Arm(ensemble, run=without_learning, tasks=("us5",)),
        },
        tasks={
            "planted": Task("planted_signal", env_steps=1_000_000, seeds=5, env_config={"cost": 0.0}),
            "planted_cost": Task("planted_signal", env_steps=1_000_000, seeds=5, env_config={"cost": 5e-4}),
            "execution": Task("execution", env_steps=1_000_000, seeds=5),
            "us5": Task("portfolio", seeds=5, env_config=span),
        },
        smoke={
            "planted": {"seeds": 1, "env_steps": 60_000},
            "planted_cost": {"seeds": 1, "env_steps": 60_000},
            "execution": {"seeds": 1, "env_steps": 60_000},
            "us5": {"seeds": 1, "env_steps": 1},
        },
        claims=[
            Claim(
                "1a. planted signal, no cost: PPO's share of the optimum, interval",
                mean_of("share", "ppo"),
                above(0.85),
                ("planted",),
            ),
            Claim(
                "1b. planted signal, no cost: PPO's share of the optimum, mean",
                mean_alone("share", "ppo"),
                at_least(0.9),
                ("planted",),
            ),
            Claim(
                "1c. planted signal, with cost: PPO earns more than sgn(s) does",
                mean_of("gain_over_sign", "ppo"),
                above(0),
                ("planted_cost",),
            ),
            Claim(
                "1d. planted signal, with cost: PPO's share of the value-iteration policy",
                mean_of("share_of_oracle", "ppo"),
                at_least(0.92),
                ("planted_cost",),
            ),
            Claim(
                "2a. execution: E + lambda V of PPO's mean schedule over the optimum of Almgren and Chriss",
                mean_of("cost_over_optimum", "ppo_execution"),
                within(1 - 1e-9, 1.05),
                ("execution",),
            ),
            Claim(
                "2b. execution: the same of an even schedule",
                mean_alone("even_over_optimum", "ppo_execution"),
                at_least(2.0),
                ("execution",),
            ),
            Claim(
                "2c. execution: shortfall on 20,000 paths within three standard errors of E (share of seeds)",
                mean_alone("within_three_errors", "ppo_execution"),
                at_least(1.0),
                ("execution",),
            ),
            Claim("3a. look-ahead found by the guard in 80 steps", check(look_ahead), within(0, 0)),
            Claim(
                "3b. walk-forward: windows with a logged choice (share)",
                mean_alone("logged", "market_rl"),
                at_least(1.0),
                ("us5",),
            ),
            Claim(
                "3c. walk-forward: the ensemble's Sharpe interval is not entirely below that of random actions (share of seeds)",
                mean_alone("not_below_random", "market_rl"),
                at_least(1.0),
                ("us5",),
            ),
            Claim(
                "3d. walk-forward: Sharpe of the ensemble minus that of random actions, same days",
                mean_of("difference_to_random", "market_rl"),
                above(0),
                ("us5",),
                exploratory=True,
            ),
            Claim(
                "3e. walk-forward: Sharpe of the ensemble minus that of equal weights, same days",
                mean_of("difference_to_equal_weight", "market_rl"),
                above(0),
                ("us5",),
                exploratory=True,
            ),
        ],
        figure=draw,
        notes=(
            "The five shares are chosen among companies that survived to the end of the data: levels of return are biased upwards, and"
            " only differences between strategies on the same days are read. Intervals of 3d and 3e are over seeds of training; the"
            " stationary bootstrap over days, which is much wider, stands in the numbers of each seed. SAC gets 4,000 steps a window, the"
            " others 20,000. Execution is that of one agent; throughput (item 4) is in benchmarks/."
        ),
    )
