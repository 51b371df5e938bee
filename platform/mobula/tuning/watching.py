"""A study as it runs: a live table, and MLflow with a child run a trial."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ray.tune import Callback

from mobula.errors import ArtifactError
from mobula.files import write_json
from mobula.results import env_steps, flat_metrics
from mobula.tracking import Tracker
from mobula.tuning.state import STATE_FILES, keep_state, kept_state, state_trials


class Watch(Callback):
    """Shows the trials as they run, and logs them to MLflow as children of the study's run.

    Everything that it must remember lies in the study's folder: Tune takes callbacks apart and makes them anew on resume.
    """

    def __init__(self, path: str, progress: bool) -> None:
        self.path, self.progress = Path(path), progress
        self.about: dict[str, Any] = yaml.safe_load((self.path / "study.yaml").read_text(encoding="utf-8"))
        self.rows: dict[str, dict[str, Any]] = {}
        self.live: Any = None
        self.parent: Tracker | None = None
        self.children: dict[str, Tracker] = {}
        self.pending: dict[str, list[tuple[int, float]]] = {}
        self.kept_at = 0

    def __reduce__(self) -> Any:
        return Watch, (str(self.path), self.progress)

    def setup(
        self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any
    ) -> None:
        if self.about["track"]:
            self.parent = study_tracker(self.path, self.about)
        if self.progress and self.live is None:
            from rich.live import Live

            self.live = Live(self._table(), refresh_per_second=2, transient=True)
            self.live.start()

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """Tune goes on without the trials of a state that it could not read; a study does not."""
        state = None if self.kept_at else kept_state(self.path)
        if state is not None and (lost := state_trials(state).keys() - {t.trial_id for t in trials}):
            raise ArtifactError(
                f"{state} could not be restored: trials {', '.join(sorted(lost))} are missing"
            )

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Tune has just written its state."""
        if trials:
            staging = Path(trials[0].storage.experiment_driver_staging_path)
            written = max(file.stat().st_mtime_ns for file in staging.glob(STATE_FILES[0]))
            if written != self.kept_at:
                keep_state(self.path, staging)
                self.kept_at = written

    def _child(self, trial: Any) -> Tracker | None:
        if self.parent is None:
            return None
        name = str(trial.trial_id)
        if name not in self.children:
            file = self.path / "mlflow.json"
            kept = json.loads(file.read_text(encoding="utf-8"))
            settings = {k: trial.config.get(k) for k in self.about["space"]}
            if name in kept["children"]:
                self.children[name] = Tracker.reopen(kept["uri"], kept["children"][name])
            else:
                self.children[name] = self.parent.child(name, settings, {"trial": name})
                kept["children"][name] = self.children[name].run_id
                write_json(file, kept)
        return self.children[name]

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        row = flat_metrics(result)
        known = self.rows.setdefault(
            trial.trial_id, {"settings": {k: trial.config.get(k) for k in self.about["space"]}}
        )
        known |= {
            "status": "running",
            "score": row.get(self.about["metric"]),
            "steps": env_steps(row),
            "seconds": row.get("time_total_s", 0.0),
        }
        if self.about["metric"] in row and self.about["track"]:
            waiting = self.pending.setdefault(trial.trial_id, [])
            waiting.append((env_steps(row), row[self.about["metric"]]))
            if len(waiting) >= 50:
                self._flush(trial)
        self._show()

    def _flush(self, trial: Any) -> None:
        child, waiting = self._child(trial), self.pending.pop(trial.trial_id, [])
        if child is not None:
            child.log_curve(self.about["metric"], *zip(*waiting, strict=True) if waiting else ((), ()))

    def _ended(self, trial: Any, status: str) -> None:
        self._flush(trial)
        child = self._child(trial)
        if child is not None:
            last = flat_metrics(trial.last_result or {})
            child.log_metrics(last, env_steps(last))
            child.end("FINISHED" if status == "done" else "FAILED")
        self.rows.setdefault(trial.trial_id, {"settings": {}, "score": None, "steps": 0, "seconds": 0.0})[
            "status"
        ] = status
        self._show()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._ended(trial, "done")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._ended(trial, "failed")

    def on_experiment_end(self, trials: Any, **info: Any) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _show(self) -> None:
        if self.live is not None:
            self.live.update(self._table())

    def _table(self) -> Any:
        ended = sum(row["status"] != "running" for row in self.rows.values())
        return trials_table(
            list(self.rows.values()),
            self.about,
            f"{ended} of {self.about['num_samples'] if self.about['search'] != 'grid' else len(self.rows)} trials ended",
        )


def trials_table(
    rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], title: str, most: int = 12
) -> Any:
    """The best trials first: rows of settings, status, score, steps, seconds."""
    from rich.table import Table

    sign = -1 if about["mode"] == "max" else 1
    ranked = sorted(rows, key=lambda row: math.inf if row["score"] is None else sign * row["score"])
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in (about["metric"].rpartition("/")[2], "steps", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("settings")
    for row in ranked[:most]:
        settings = " ".join(f"{name}={_short(row['settings'].get(name))}" for name in about["space"])
        score = "" if row["score"] is None else f"{row['score']:.5g}"
        table.add_row(score, f"{row['steps']:,}", f"{row['seconds']:.1f}", row["status"], settings)
    if len(ranked) > most:
        table.caption = f"and {len(ranked) - most} more"
    return table


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace(" ", "")


def study_tracker(path: Path, about: Mapping[str, Any]) -> Tracker:
    """The MLflow run of the study: a new one, or that of an earlier call."""
    file = path / "mlflow.json"
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Tracker.reopen(kept["uri"], kept["parent"])
    tracker = Tracker.start(
        about["experiment"] or f"tune-{about['method']}",
        path.name,
        uri=about["tracking_uri"],
        folder=about["out"],
        params={
            k: about[k]
            for k in ("method", "env", "metric", "mode", "scheduler", "search", "num_samples", "seed")
        }
        | {f"space.{k}": v for k, v in about["space"].items()},
        tags={"method": about["method"], "study": str(path)},
    )
    write_json(file, {"uri": tracker.uri, "parent": tracker.run_id, "children": {}})
    return tracker
