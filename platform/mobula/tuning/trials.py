"""What a study found: its trials and their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobula.results import flat_metrics


@dataclass(frozen=True)
class Trial:
    """One setting that was tried; score: the metric's mean over the last fifth of its iterations."""

    name: str
    settings: dict[str, Any]
    status: str
    score: float | None
    iterations: int
    seconds: float
    error: str = ""


@dataclass
class Study:
    """A finished study."""

    path: Path
    metric: str
    mode: str
    trials: list[Trial]
    best: Trial | None
    confirmation: dict[str, Any] | None = None
    figure: Path | None = None
    tracking_uri: str | None = None
    notes: list[str] = field(default_factory=list)


def trial_name(trial: Any) -> str:
    return str(trial.trial_id)


def score(rows: Any, about: Mapping[str, Any]) -> float | None:
    """Mean of the metric over the last fifth of the iterations that report it; single iterations are noisy."""
    if rows is None or about["metric"] not in rows:
        return None
    values = [float(v) for v in rows[about["metric"]] if math.isfinite(float(v))]
    tail = values[-max(len(values) // 5, 1) :]
    return sum(tail) / len(tail) if tail else None


def trial_of(result: Any, about: Mapping[str, Any]) -> Trial:
    metrics = flat_metrics(result.metrics or {})
    reached = any(metrics.get(name, -math.inf) >= value for name, value in about["stop"].items())
    error = str(result.error).strip().split("\n")[-1] if result.error is not None else ""
    return Trial(
        Path(result.path).name,
        {name: (result.config or {}).get(name) for name in about["space"]},
        "failed" if error else "done" if reached else "stopped early",
        score(result.metrics_dataframe, about),
        int(metrics.get("training_iteration", 0)),
        metrics.get("time_total_s", 0.0),
        error,
    )
