"""What an experiment is made of: tasks, arms, claims, measures.

A method's `experiment()` returns an `Experiment`; `mobula.experiment.reproduce` runs it.  Cells are (arm, task, seed); a
measure turns the rows of a cell into named numbers; a claim is an inequality about those numbers over seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from mobula.experiment import statistics
from mobula.experiment.statistics import Estimate

Row = dict[str, float]
"""One training iteration: env_steps and flat metrics such as "env_runners/reward_sum"."""

Numbers = dict[str, Any]
"""What a measure makes of a cell: numbers, and lists of numbers for figures."""

BatchRun = Callable[[Any, "Task", Sequence[int]], Sequence[Numbers]]
"""(config, task, seeds) -> numbers of every seed, all of them computed side by side in one batch."""

Verdict = Literal["holds", "fails", "undecided", "not run"]


@dataclass(frozen=True)
class Task:
    """An environment, a budget and a number of seeds."""

    env: str = ""
    env_steps: int = 0
    seeds: int = 1
    env_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """A config to be run on every task.

    per_task  {task: {knob: value}} where an arm is set differently on a task
    grid      {knob: values}: tuned on each task over the whole grid, on `tuning_seeds` seeds that are not those of the
              evaluation; the combination with the largest mean of `select` is run and recorded
    tasks     the tasks that it runs on (default: all)
    run       for methods that hold all seeds in one batch: computes the numbers of every seed at once, in place of training
              an algorithm a seed and of the experiment's `measure`.  A function of a module, so that it travels to workers
    batch     seeds of one trial (default: all of a task); trials run in parallel
    """

    config: Any
    per_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] | None = None
    select: str = ""
    tuning_seeds: int = 2
    tasks: tuple[str, ...] = ()
    run: BatchRun | None = None
    batch: int | None = None

    def groups(self, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        """The seeds of each trial."""
        size = 1 if self.run is None else self.batch or len(seeds)
        return [tuple(seeds[i : i + size]) for i in range(0, len(seeds), size)]

    def combinations(self) -> list[dict[str, Any]]:
        """Every point of the grid."""
        grid = self.grid or {}
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


# Criteria -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Criterion:
    """An interval that an estimate must lie in."""

    low: float
    high: float
    text: str

    def judge(self, estimate: Estimate) -> Verdict:
        """holds if the whole interval satisfies it, fails if the whole interval violates it, else undecided."""
        if self.low <= estimate.low and estimate.high <= self.high:
            return "holds"
        if estimate.high < self.low or estimate.low > self.high:
            return "fails"
        return "undecided"


def above(x: float) -> Criterion:
    """The interval lies above x (excludes it)."""
    return Criterion(float(np.nextafter(x, np.inf)), np.inf, f"> {x:g}")


def at_least(x: float) -> Criterion:
    """The interval lies at or above x."""
    return Criterion(x, np.inf, f">= {x:g}")


def below(x: float) -> Criterion:
    """The interval lies below x (excludes it)."""
    return Criterion(-np.inf, float(np.nextafter(x, -np.inf)), f"< {x:g}")


def within(low: float, high: float) -> Criterion:
    """The interval lies in [low, high]."""
    return Criterion(low, high, f"in [{low:g}, {high:g}]")


# Statistics of claims -------------------------------------------------------------------------------------


class Results:
    """Numbers of all cells: `results[arm, task]` is a list over seeds (in order) of what the measure returned."""

    def __init__(
        self, experiment: Experiment, cells: Mapping[tuple[str, str], Mapping[int, Numbers]]
    ) -> None:
        self.experiment, self.cells = experiment, cells

    def __getitem__(self, key: tuple[str, str]) -> list[Numbers]:
        found = self.cells.get(key, {})
        return [found[seed] for seed in sorted(found)]

    def values(self, metric: str, arm: str, task: str) -> list[float]:
        """One number a seed.  Raises KeyError where the arm has not been run or measures no such thing."""
        numbers = [cell[metric] for cell in self[arm, task]]
        if not numbers:
            raise KeyError(f"{arm} on {task}")
        return numbers


Statistic = Callable[[Results, str], Estimate]
"""From all results and the name of a task to an estimate."""


def mean_of(metric: str, arm: str) -> Statistic:
    """Mean of `metric` over seeds."""
    return lambda results, task: statistics.mean(results.values(metric, arm, task))


def paired_difference(metric: str, first: str, second: str) -> Statistic:
    """Mean over seeds of `metric` of one arm minus that of the other."""

    def gap(results: Results, task: str) -> Estimate:
        a, b = results.cells.get((first, task), {}), results.cells.get((second, task), {})
        both = sorted(set(a) & set(b))
        if not both:
            raise KeyError(f"{first} and {second} on {task}")
        return statistics.paired_difference([a[s][metric] for s in both], [b[s][metric] for s in both])

    return gap


def ratio_of_means(first: tuple[str, str], second: tuple[str, str]) -> Statistic:
    """Mean of one (metric, arm) over seeds divided by that of another, the seeds of both resampled together."""

    def ratio(results: Results, task: str) -> Estimate:
        (metric_a, arm_a), (metric_b, arm_b) = first, second
        a, b = results.cells.get((arm_a, task), {}), results.cells.get((arm_b, task), {})
        both = sorted(set(a) & set(b))
        if not both:
            raise KeyError(f"{arm_a} and {arm_b} on {task}")
        return statistics.ratio_of_means([a[s][metric_a] for s in both], [b[s][metric_b] for s in both])

    return ratio


def fraction_at_least(metric: str, arm: str, threshold: float | Callable[[Task], float]) -> Statistic:
    """Share of seeds whose `metric` reaches the threshold: a count, judged as it is."""

    def share(results: Results, task: str) -> Estimate:
        wanted = threshold(results.experiment.tasks[task]) if callable(threshold) else threshold
        values = results.values(metric, arm, task)
        return statistics.exact(sum(value >= wanted for value in values) / len(values), len(values))

    return share


def check(function: Callable[[], Estimate | float]) -> Statistic:
    """A claim that needs no cells: a computation of its own, such as an unbiasedness check."""

    def run(results: Results, task: str) -> Estimate:
        found = function()
        return found if isinstance(found, Estimate) else statistics.exact(found)

    return run


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper as an inequality: `criterion` on `statistic`, on each of `tasks`.

    exploratory: a claim that nobody has seen hold yet; its failure is a finding.
    """

    statement: str
    statistic: Statistic
    criterion: Criterion
    tasks: tuple[str, ...] = ()
    exploratory: bool = False

    def judge(self, results: Results, task: str) -> dict[str, Any]:
        """{"statement", "task", "verdict", "value", "low", "high", "n", ...}."""
        record: dict[str, Any] = {
            "statement": self.statement,
            "task": task,
            "criterion": self.criterion.text,
            "exploratory": self.exploratory,
        }
        try:
            estimate = self.statistic(results, task)
        except KeyError as error:
            return {**record, "verdict": "not run", "reason": f"no numbers for {error.args[0]}"}
        return {
            **record,
            "verdict": self.criterion.judge(estimate),
            "value": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "n": estimate.n,
            "confidence": estimate.confidence,
        }


# Measures -------------------------------------------------------------------------------------------------

Measure = Callable[[list[Row]], Numbers]


def windows_of_reward(n: int = 8) -> Measure:
    """Reward per step in n equal consecutive windows of the budget, by interpolation of the cumulative reward.

    Gives total_reward (mean over the whole run), last_window_reward, windows [n], and curve_steps and curve_values for
    figures.
    """

    def measure(rows: list[Row]) -> Numbers:
        steps = np.array([0.0] + [row["env_steps"] for row in rows])
        reward = np.cumsum([0.0] + [row["env_runners/reward_sum"] for row in rows])
        edges = np.linspace(0.0, steps[-1], n + 1)
        means = np.diff(np.interp(edges, steps, reward)) / np.diff(edges)
        return {
            "total_reward": float(reward[-1] / steps[-1]),
            "last_window_reward": float(means[-1]),
            "windows": means.tolist(),
            "curve_steps": edges[1:].tolist(),
            "curve_values": means.tolist(),
        }

    return measure


def returns(points: int = 50) -> Measure:
    """Final return (mean of the last tenth of iterations), area under the curve, and the curve at `points` steps."""

    def measure(rows: list[Row]) -> Numbers:
        kept = [row for row in rows if "env_runners/episode_return_mean" in row]
        steps = np.array([row["env_steps"] for row in kept])
        values = np.array([row["env_runners/episode_return_mean"] for row in kept])
        at = np.linspace(steps[0], steps[-1], points)
        curve = np.interp(at, steps, values)
        tail = max(1, len(values) // 10)
        return {
            "final_return": float(values[-tail:].mean()),
            "area": float(curve.mean()),
            "curve_steps": at.tolist(),
            "curve_values": curve.tolist(),
        }

    return measure


@dataclass(frozen=True)
class Experiment:
    """What a paper claims, as something that can be run and can fail.

    probe    called on the algorithm at about `probe_points` times along a run, its numbers join the rows as "probe/..."
    smoke    {task: {field: value}}: what a quick look overrides; tasks that are not named are left out of it
    figure   makes the figure(s): (results, folder) -> file names
    measure  turns the rows of a cell into numbers; arms with a `run` of their own need none
    """

    arms: Mapping[str, Any]
    tasks: Mapping[str, Task]
    claims: Sequence[Claim]
    figure: Callable[[Results, Any], list[str]]
    measure: Measure | None = None
    smoke: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    probe: Callable[[Any], dict[str, float]] | None = None
    probe_points: int = 8
    notes: str = ""

    def at(self, budget: str, seeds: int | None = None) -> Experiment:
        """The experiment at a budget ("paper" or "smoke"), with `seeds` seeds a task where that is given."""
        tasks = dict(self.tasks)
        if budget == "smoke":
            tasks = {name: replace(self.tasks[name], **overrides) for name, overrides in self.smoke.items()}
        if seeds is not None:
            tasks = {name: replace(task, seeds=seeds) for name, task in tasks.items()}
        return replace(self, tasks=tasks)

    def arm(self, name: str) -> Arm:
        """The arm of that name; a bare config is an arm without more."""
        found = self.arms[name]
        return found if isinstance(found, Arm) else Arm(found)
