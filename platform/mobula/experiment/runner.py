"""Runs an experiment: cells as Tune trials, claims judged, the ledger written.

Every finished cell is written at once to `<out>/cells/`, so that an interrupted reproduction goes on where it was; a
cell is kept only if its config, task and seed are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobula import registry
from mobula.errors import ConfigError
from mobula.experiment.core import Arm, Experiment, Numbers, Results, Row, Task
from mobula.experiment.ledger import write_index
from mobula.files import storage, write_json
from mobula.versions import commit, machine, versions

TUNING_SEEDS_FROM = 1_000_000
"""Seeds that baselines are tuned on start here: they are never those of the evaluation."""


@dataclass(frozen=True)
class Cell:
    """One trial: an arm's config on a task with a seed, or with several where the arm runs them as a batch."""

    key: str
    arm: str
    task: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]

    def digest(self, config: Any, task: Task) -> str:
        """What the result depends on, in short."""
        knobs = config.knobs() if hasattr(config, "knobs") else {}
        about = [
            type(config).__qualname__,
            knobs,
            self.settings,
            asdict(task) | {"seeds": 0},
            list(self.seeds),
            versions()["mobula"],
        ]
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def run_cell(
    config: Any,
    task: Task,
    seed: int,
    settings: dict[str, Any],
    probe: Callable[[Any], dict[str, float]] | None,
    probe_points: int,
) -> list[Row]:
    """Trains one cell to its budget; returns a row an iteration."""
    from mobula.results import env_steps, flat_metrics

    chosen = config.copy(copy_frozen=False).environment(task.env, env_config=dict(task.env_config))
    chosen.debugging(seed=seed, log_level="ERROR")
    if settings:
        chosen.training(**settings)
    algorithm = chosen.build_algo()
    rows: list[Row] = []
    next_probe = task.env_steps / probe_points
    try:
        while not rows or rows[-1]["env_steps"] < task.env_steps:
            row = flat_metrics(algorithm.train())
            row["env_steps"] = float(env_steps(row))
            kept = {
                name: value
                for name, value in row.items()
                if name == "env_steps"
                or name.startswith(
                    ("env_runners/reward", "env_runners/episode_", "env_runners/num_env_steps", "learners/")
                )
            }
            if probe is not None and row["env_steps"] >= next_probe:
                kept |= {f"probe/{name}": value for name, value in probe(algorithm).items()}
                next_probe += task.env_steps / probe_points
            rows.append(kept)
    finally:
        algorithm.stop()
    return rows


def reproduce(
    name: str,
    *,
    budget: str = "paper",
    seeds: int | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    track: bool = False,
    tracking_uri: str | None = None,
    address: str | None = None,
    progress: bool = False,
    experiment: Experiment | None = None,
) -> dict[str, Any]:
    """Runs the experiment of method `name` and returns what is written to result.json (and "folder").

    budget  "paper", or "smoke" for a quick look.  The paper budget goes to the ledger `reproductions/<name>`, anything else
            to `runs/reproduce/<name>-<budget>`, unless `out` says otherwise.
    resume  keeps the cells that an earlier call has finished
    """
    if budget not in ("paper", "smoke"):
        raise ConfigError(f"budget {budget!r}: it is 'paper' or 'smoke'")
    if experiment is None:
        cls: Any = registry.config_class(name)
        if not hasattr(cls, "method_class"):
            raise ConfigError(f"{name} is RLlib's own and declares no experiment")
        experiment = cls.method_class().experiment()
        name = registry.method_name(name)
    plan = experiment.at(budget, seeds)
    ledger = budget == "paper" and seeds is None
    folder = (
        Path(out)
        if out
        else Path("reproductions") / name
        if ledger
        else Path("runs/reproduce") / f"{name}-{budget}"
    )
    with storage(folder):
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    from mobula.joining import start_ray

    start_ray(address)
    began = time.time()
    runner = _Runner(plan, folder, resume, progress)
    tuned = runner.tune_baselines()
    evaluation = [
        Cell(f"{arm}--{task}--{_span(seeds)}", arm, task, seeds, runner.settings(arm, task))
        for arm in plan.arms
        for task, about in plan.tasks.items()
        if not plan.arm(arm).tasks or task in plan.arm(arm).tasks
        for seeds in plan.arm(arm).groups(range(about.seeds))
    ]
    found = runner.run(evaluation, "evaluation")
    numbers: dict[tuple[str, str], dict[int, Numbers]] = {}
    for cell in evaluation:
        if cell.key in found:
            numbers.setdefault((cell.arm, cell.task), {}).update(runner.numbers(cell, found[cell.key]))
    results = Results(plan, numbers)
    claims = [
        claim.judge(results, task)
        for claim in plan.claims
        for task in (claim.tasks or tuple(plan.tasks)[:1])
        if task in plan.tasks or not claim.tasks
    ]
    result = {
        "method": name,
        "budget": budget,
        "claims": claims,
        "tuned": tuned,
        "notes": plan.notes,
        "tasks": {task: asdict(about) for task, about in plan.tasks.items()},
        "numbers": {f"{arm}--{task}": results[arm, task] for arm, task in numbers},
        "failed_cells": runner.failed,
        "figures": plan.figure(results, folder),
        "wall_time_s": round(time.time() - began + runner.earlier, 1),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
    }
    write_json(folder / "result.json", result)
    if ledger:
        write_index(folder.parent)
    if track:
        _log(name, result, folder, evaluation, results, tracking_uri)
    return {**result, "folder": str(folder)}


def _probes(rows: list[Row]) -> Numbers:
    """Every probed number as a list along the run."""
    names = sorted({name for row in rows for name in row if name.startswith("probe/")})
    found: Numbers = {name: [row[name] for row in rows if name in row] for name in names}
    if names:
        found["probe/env_steps"] = [row["env_steps"] for row in rows if names[0] in row]
    # JSON has no infinity; a chain that does not mix is recorded as null.
    return {k: [v if abs(v) != float("inf") else None for v in values] for k, values in found.items()}


def _span(seeds: tuple[int, ...]) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}-{seeds[-1]}"


class _Runner:
    def __init__(self, plan: Experiment, folder: Path, resume: bool, progress: bool) -> None:
        self.plan, self.folder, self.resume, self.progress = plan, folder, resume, progress
        self.chosen: dict[tuple[str, str], dict[str, Any]] = {}
        self.failed: list[dict[str, str]] = []
        self.earlier = 0.0

    def settings(self, arm: str, task: str) -> dict[str, Any]:
        return {**self.plan.arm(arm).per_task.get(task, {}), **self.chosen.get((arm, task), {})}

    def tune_baselines(self) -> dict[str, Any]:
        """Picks the best of each grid on each task; returns what was chosen among what."""
        cells, tuned = [], {}
        wanted: list[tuple[str, Arm, str]] = [
            (name, self.plan.arm(name), task)
            for name in self.plan.arms
            if self.plan.arm(name).grid
            for task in (self.plan.arm(name).tasks or self.plan.tasks)
            if task in self.plan.tasks
        ]
        for name, arm, task in wanted:
            for index, combination in enumerate(arm.combinations()):
                for seeds in arm.groups(range(arm.tuning_seeds)):
                    settings = {**arm.per_task.get(task, {}), **combination}
                    key = f"tune-{name}-{index}--{task}--{_span(seeds)}"
                    cells.append(Cell(key, name, task, tuple(TUNING_SEEDS_FROM + s for s in seeds), settings))
        found = self.run(cells, "tuning of baselines")
        for name, arm, task in wanted:
            scores = []
            for index, _ in enumerate(arm.combinations()):
                prefix = f"tune-{name}-{index}--{task}--"
                values = [
                    numbers[arm.select]
                    for cell in cells
                    if cell.key.startswith(prefix) and cell.key in found
                    for numbers in self.numbers(cell, found[cell.key]).values()
                ]
                scores.append(sum(values) / len(values) if values else float("-inf"))
            best = max(range(len(scores)), key=scores.__getitem__)
            self.chosen[name, task] = arm.combinations()[best]
            tuned[f"{name} on {task}"] = {
                "chosen": arm.combinations()[best],
                "score": scores[best],
                "select": arm.select,
                "combinations": len(scores),
                "seeds": arm.tuning_seeds,
            }
        return tuned

    def numbers(self, cell: Cell, found: list[Any]) -> dict[int, Numbers]:
        """{seed: numbers} from what a trial returned: rows of its one seed, or numbers of each of its seeds."""
        if self.plan.arm(cell.arm).run is not None:
            return dict(zip(cell.seeds, found, strict=True))
        assert self.plan.measure is not None
        return {cell.seeds[0]: {**self.plan.measure(found), **_probes(found)}}

    def run(self, cells: list[Cell], title: str) -> dict[str, list[Any]]:
        """{cell key: rows, or numbers of each seed} of the cells that ended well; the others are noted in `failed`."""
        found: dict[str, list[Any]] = {}
        waiting: dict[str, Cell] = {}
        for cell in cells:
            file = self.folder / "cells" / f"{cell.key}.json"
            digest = cell.digest(self.plan.arm(cell.arm).config, self.plan.tasks[cell.task])
            if self.resume and file.is_file():
                kept = json.loads(file.read_text(encoding="utf-8"))
                if kept["digest"] == digest:
                    found[cell.key] = kept["rows"]
                    self.earlier += kept["seconds"] / machine()["cores"]  # type: ignore[operator]
                    continue
            waiting[cell.key] = cell
        if waiting:
            with _bar(title, len(cells), len(found), self.progress) as advance:
                found |= self._trials(waiting, advance)
        return found

    def _trials(self, cells: dict[str, Cell], advance: Callable[[str], None]) -> dict[str, list[Any]]:
        from ray import tune

        plan = self.plan
        found: dict[str, list[Any]] = {}

        def trial(given: dict[str, Any], plan: Experiment, cells: dict[str, Cell]) -> None:
            import torch

            # Tiny models are fastest with one thread a process and the seeds side by side.
            torch.set_num_threads(1)
            cell, start = cells[given["cell"]], time.time()
            arm, task = plan.arm(cell.arm), plan.tasks[cell.task]
            if arm.run is not None:
                config = arm.config.copy(copy_frozen=False).training(**cell.settings)
                rows: Any = arm.run(config, task, cell.seeds)
            else:
                rows = run_cell(arm.config, task, cell.seeds[0], cell.settings, plan.probe, plan.probe_points)
            tune.report({"cell": cell.key, "rows": json.dumps(rows), "seconds": time.time() - start})

        def keep(result: dict[str, Any]) -> None:
            if "rows" not in result or result["cell"] in found:
                return
            cell = cells[result["cell"]]
            found[cell.key] = json.loads(result["rows"])
            digest = cell.digest(plan.arm(cell.arm).config, plan.tasks[cell.task])
            record = {**asdict(cell), "digest": digest, "seconds": result["seconds"], "rows": found[cell.key]}
            write_json(self.folder / "cells" / f"{cell.key}.json", record)
            advance(cell.key)

        def fail(key: str, error: str) -> None:
            self.failed.append({"cell": key, "error": error})
            advance(f"{key} failed")

        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        # Tune's newer console output ignores verbose=0.
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        storage_path = (self.folder / "cells" / "tune").resolve()
        tune.Tuner(
            tune.with_resources(tune.with_parameters(trial, plan=plan, cells=cells), {"CPU": 1}),
            param_space={"cell": tune.grid_search(list(cells))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                name="cells", storage_path=str(storage_path), callbacks=[_collect(keep, fail)], verbose=0
            ),
        ).fit()
        shutil.rmtree(storage_path, ignore_errors=True)
        missing = set(cells) - set(found) - {entry["cell"] for entry in self.failed}
        self.failed.extend({"cell": key, "error": "ended without a result"} for key in sorted(missing))
        return found


def _collect(
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
    fail: Callable[[str, str], None] = lambda key, error: None,
) -> Any:
    """A Tune callback that hands every finished trial on as it ends."""
    from ray.tune import Callback

    class Collect(Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            keep(result)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else "no message"
            fail(trial.config["cell"], text.strip().split("\n")[-1])

        def __reduce__(self) -> Any:
            # Tune writes its callbacks to disk for a resume of its own; ours resumes from the cells.
            return _collect, ()

    return Collect()


@contextmanager
def _bar(title: str, total: int, done: int, show: bool) -> Iterator[Callable[[str], None]]:
    if not show:
        yield lambda key: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[last]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=total, completed=done, last="")
        yield lambda key: bar.update(task, advance=1, last=key)


def _log(
    name: str, result: dict[str, Any], folder: Path, cells: list[Cell], results: Results, uri: str | None
) -> None:
    from mobula.tracking import Tracker

    with Tracker.start(
        f"reproduce-{name}", f"{name}-{result['budget']}", uri=uri, tags={"method": name}
    ) as parent:
        for cell, seed in [(one, seed) for one in cells for seed in one.seeds]:
            numbers = results.cells.get((cell.arm, cell.task), {}).get(seed)
            if numbers is None:
                continue
            params = {"arm": cell.arm, "task": cell.task, "seed": seed, **cell.settings}
            with parent.child(f"{cell.arm}--{cell.task}--{seed}", params) as child:
                child.log_metrics({k: v for k, v in numbers.items() if isinstance(v, float)}, 0)
                child.log_curve("curve", numbers.get("curve_steps", []), numbers.get("curve_values", []))
        for index, claim in enumerate(result["claims"]):
            if "value" in claim:
                parent.log_metrics({f"claim_{index + 1}_{claim['task']}": claim["value"]}, 0)
        for file in ("result.json", *result["figures"]):
            parent.log_artifact(folder / file)
