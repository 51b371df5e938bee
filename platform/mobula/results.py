"""The numbers of a run: their names, its steps, its learning curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobula.files import storage

STOP_NAMES = {
    "env_steps": "env_runners/num_env_steps_sampled_lifetime",
    "iterations": "training_iteration",
    "seconds": "time_total_s",
    "return": "env_runners/episode_return_mean",
}
"""Short names of what a run can be stopped by; any metric's full name works too."""


def flat_metrics(result: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a result, by names such as "env_runners/episode_return_mean"."""
    flat: dict[str, float] = {}
    for name, value in result.items():
        if name in ("config", "hist_stats", "pid", "perf"):
            continue
        if isinstance(value, Mapping):
            flat |= flat_metrics(value, f"{prefix}{name}/")
        elif value is None or isinstance(value, bool | str):
            continue
        else:
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if math.isfinite(number):
                flat[prefix + str(name)] = number
    return flat


def env_steps(metrics: Mapping[str, float]) -> int:
    """Environment steps so far; iterations for methods without environments."""
    for name in ("env_runners/num_env_steps_sampled_lifetime", "num_env_steps_sampled_lifetime"):
        if name in metrics:
            return int(metrics[name])
    return int(metrics.get("training_iteration", 0))


def reward_per_step(rows: list[dict[str, float]]) -> list[float]:
    """Mean reward per environment step of each iteration, NaN where none was sampled."""
    return [
        row.get("env_runners/reward_sum", math.nan) / row.get("env_runners/num_env_steps_sampled", math.nan)
        for row in rows
    ]


def learning_curve(
    rows: list[dict[str, float]], path: Path, *, title: str, headline: tuple[str, str] | None = None
) -> Path | None:
    """A figure of the return (or of the reward per step, for tasks without episodes) against environment steps; of the
    method's `headline` metric against iterations where it has one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    clock = "env_steps"
    if headline is not None:
        clock, episodic = "training_iteration", True
        found = [row.get(headline[0], math.nan) for row in rows]
    else:
        returns = [row.get("env_runners/episode_return_mean", math.nan) for row in rows]
        episodic = any(math.isfinite(value) for value in returns)
        found = returns if episodic else reward_per_step(rows)
    points = [(row[clock], value) for row, value in zip(rows, found, strict=True) if math.isfinite(value)]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if not episodic and len(values) >= 16:
        axes.plot(steps, values, color="#9ecae1", linewidth=1, label="each iteration")
        width = max(2, len(values) // 8)
        smooth = [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
        axes.plot(steps, smooth, color="#0072b2", linewidth=2, label=f"mean of the last {width}")
        axes.legend(frameon=False)
    else:
        axes.plot(steps, values, color="#0072b2", linewidth=2)
    axes.set_xlabel(clock.replace("env_steps", "environment steps").replace("_", " "))
    if headline is not None:
        axes.set_ylabel(headline[1])
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
    else:
        axes.set_ylabel("episode return (mean)" if episodic else "reward per step")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    with storage(path):
        figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
