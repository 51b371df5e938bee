"""Searches over a method's declared space with Ray Tune: schedulers, searchers, a table, figures, resume.

A study is a folder: study.yaml (what was asked for), tune/ (Tune's own: trials, checkpoints), state/ (whole states of scheduler,
searcher and trials, from which a killed study goes on), trials.json and trials.csv, parallel_coordinates.png, best.yaml (which `mobula train --config` takes) and study.json.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from ray.tune import Callback

from mobula import registry
from mobula.errors import ArtifactError, ConfigError, nearest
from mobula.files import storage, write_json, write_text
from mobula.joining import start_ray
from mobula.running import (
    STOP_NAMES,
    _quiet,
    default_stop,
    dump_config,
    env_steps,
    flat_metrics,
    new_run_folder,
)
from mobula.tracking import Tracker
from mobula.versions import commit, machine, versions

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

SCHEDULERS = ("asha", "pbt", "median", "none")
SEARCHES = ("random", "optuna", "grid")
HELD_OUT_FROM = 1_000_000
"""Seeds on which the best setting is held against the default start here: no trial uses them."""


# Spaces ---------------------------------------------------------------------------------------------------

_DOMAINS = ("uniform", "loguniform", "quniform", "randint", "lograndint", "choice", "grid", "randn")


def parse_space(text: str, where: str) -> Any:
    """A Tune domain from words such as `loguniform(1e-3, 1)`, `choice([1, 2])`, `grid([0.1, 1])`.

    The text is parsed, never run.  Raises ConfigError where it is none of these.
    """
    from ray import tune

    try:
        node = ast.parse(text.strip().removeprefix("tune."), mode="eval").body
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords):
            raise ValueError("not a call")
        name, arguments = node.func.id, [ast.literal_eval(a) for a in node.args]
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"{where}: {text!r} is no search space; write loguniform(1e-3, 1), uniform(0, 1), randint(1, 9), choice([1, 2]) or"
            " grid([1, 2])"
        ) from error
    if name not in _DOMAINS:
        raise ConfigError(f"{where}: no distribution {name!r}.{nearest(name, _DOMAINS)}")
    try:
        return (tune.grid_search if name == "grid" else getattr(tune, name))(*arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{where}: {text!r}: {error}") from error


def describe(domain: Any) -> str:
    """A domain in the words that `parse_space` reads."""
    if isinstance(domain, dict) and "grid_search" in domain:
        return f"grid({domain['grid_search']})"
    if hasattr(domain, "categories"):
        return f"choice({list(domain.categories)})"
    sampler = type(domain.get_sampler()).__name__.strip("_").lower() if domain.sampler else "uniform"
    whole = type(domain).__name__ == "Integer"
    name = (
        ("lograndint" if "log" in sampler else "randint")
        if whole
        else ("log" * ("log" in sampler) + "uniform")
    )
    return f"{name}({domain.lower:g}, {domain.upper:g})"


def gridded(space: Mapping[str, Any]) -> dict[str, Any]:
    """Every domain as a grid.  Raises ConfigError for one that has no finite list of values."""
    from ray import tune

    found = {}
    for name, domain in space.items():
        if isinstance(domain, dict) and "grid_search" in domain:
            found[name] = domain
        elif hasattr(domain, "categories"):
            found[name] = tune.grid_search(list(domain.categories))
        else:
            raise ConfigError(
                f"a grid needs a list of values for {name}, which is {describe(domain)}:"
                f" --space {name}='grid([...])', or leave it out with --only"
            )
    return found


def default_metric(config: AlgorithmConfig) -> tuple[str, str]:
    """(metric, mode) that a method's trials are ranked by if nothing is said."""
    headline = getattr(config, "headline", None)
    if headline is not None:
        return headline[0], getattr(config, "headline_mode", "min")
    env = config.env
    if isinstance(env, str) and hasattr(config, "knobs"):
        world = registry.make_env(env, 1, **dict(config.env_config))
        if world.continuing or getattr(config.adapt_env(world), "continuing", False):  # type: ignore[attr-defined]
            return "env_runners/reward_per_step", "max"
    return "env_runners/episode_return_mean", "max"


# Study ----------------------------------------------------------------------------------------------------


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


def tune(
    config: AlgorithmConfig,
    *,
    num_samples: int = 16,
    space: Mapping[str, Any] | None = None,
    only: Sequence[str] | None = None,
    metric: str | None = None,
    mode: str | None = None,
    scheduler: str = "asha",
    search: str = "random",
    stop: Mapping[str, float] | None = None,
    concurrent: int | None = None,
    cpus_per_trial: float | None = None,
    confirm: int = 5,
    out: str | Path = "runs",
    track: bool = True,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    address: str | None = None,
    progress: bool = False,
    verbose: bool = False,
) -> Study:
    """Searches for the best setting of `config`'s method.

    space      {knob: Tune domain} over and above the declared ones; `only`: the knobs to search over (default: all)
    metric     full name of a metric; default: the method's headline, return or reward a step
    scheduler  asha (stops the worst early), pbt (copies the best and perturbs), median, none
    search     random, optuna (TPE), grid (every combination of the listed values; num_samples is then not used)
    stop       where a whole trial ends, as for `train`
    confirm    seeds on which the best setting is then run beside the default one; 0: none

    Raises ConfigError for what does not fit together.
    """
    about = _plan(config, space, only, metric, mode, scheduler, search, stop, num_samples, confirm)
    path = new_run_folder(out, f"tune-{about['method']}", about["env"], config.seed)
    about |= {
        "concurrent": concurrent,
        "cpus_per_trial": cpus_per_trial,
        "track": track,
        "tracking_uri": tracking_uri,
        "experiment": experiment,
        "out": str(Path(out)),
    }
    write_text(path / "study.yaml", yaml.safe_dump(about, sort_keys=False))
    write_text(path / "config.yaml", dump_config(config))
    return _run(path, about, config, address=address, progress=progress, verbose=verbose, restore=False)


def resume(
    path: str | Path, *, address: str | None = None, progress: bool = False, verbose: bool = False
) -> Study:
    """Goes on with the study in the folder `path` where it was: finished trials stay, unfinished ones go on from their last
    checkpoint.  Tune's files are pickles: resume only your own studies.
    """
    from mobula.running import load_yaml, make_config

    path = Path(path)
    if not (path / "study.yaml").is_file():
        raise ArtifactError(f"{path} is no study: study.yaml is missing")
    about = yaml.safe_load((path / "study.yaml").read_text(encoding="utf-8"))
    given = load_yaml(path / "config.yaml")
    given.pop("stop", None)
    config = make_config(given.pop("method"), given.pop("env", None), **given, verbose=verbose)
    state = kept_state(path)
    if state is not None:
        for pattern in STATE_FILES:
            for file in (path / "tune").glob(pattern):
                file.unlink()
        for file in state.iterdir():
            shutil.copy2(file, path / "tune")
    return _run(
        path, about, config, address=address, progress=progress, verbose=verbose, restore=state is not None
    )


STATE_FILES = ("experiment_state-*.json", "search*-*", "callback_states-*")
"""Tune's files of one moment of a study: the trials and the scheduler, the searcher, the callbacks."""


def keep_state(path: Path, staging: Path) -> None:
    """Copies Tune's state files from the folder where it writes them to state/N of the study, which then is whole or not there.

    Tune itself copies them into tune/ in the background, each over the last: a kill in the midst leaves half a file, or the files of
    two moments, and Tune would then begin anew without a word.
    """
    newest = max(staging.glob(STATE_FILES[0]))
    session = newest.stem.removeprefix("experiment_state-")
    kept = sorted(p for p in (path / "state").glob("*") if p.name.isdigit())
    number = int(kept[-1].name) + 1 if kept else 0
    fresh = path / "state" / f".{number:09d}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for pattern in STATE_FILES:
        for file in staging.glob(pattern):
            if session in file.name and not file.name.startswith("tmp-"):
                shutil.copy2(file, fresh)
    fresh.rename(path / "state" / f"{number:09d}")
    for old in kept[:-1]:
        shutil.rmtree(old)


def kept_state(path: Path) -> Path | None:
    """The newest whole state of a study, None if it never began a trial."""
    return max((p for p in (path / "state").glob("*") if p.name.isdigit()), default=None)


def state_trials(state: Path) -> dict[str, str]:
    """{trial: Tune's status of it} in a kept state."""
    (file,) = state.glob(STATE_FILES[0])
    rows = (json.loads(row[0]) for row in json.loads(file.read_text(encoding="utf-8"))["trial_data"])
    return {row["trial_id"]: row["status"] for row in rows}


def _plan(
    config: AlgorithmConfig,
    space: Mapping[str, Any] | None,
    only: Sequence[str] | None,
    metric: str | None,
    mode: str | None,
    scheduler: str,
    search: str,
    stop: Mapping[str, float] | None,
    num_samples: int,
    confirm: int,
) -> dict[str, Any]:
    """What study.yaml holds."""
    for value, options, name in ((scheduler, SCHEDULERS, "scheduler"), (search, SEARCHES, "search")):
        if value not in options:
            raise ConfigError(f"--{name} {value}: one of {', '.join(options)}.{nearest(value, options)}")
    if num_samples < 1 or confirm < 0:
        raise ConfigError("a study needs at least one sample, and no negative number of seeds to confirm on")
    declared = config.search_space() if hasattr(config, "search_space") else {}
    domains = {**declared, **(space or {})}
    for name in only or ():
        if name not in domains:
            raise ConfigError(
                f"--only {name}: no space is declared for it.{nearest(name, domains)} Give one with --space"
            )
    if only:
        domains = {name: domains[name] for name in {*only, *(space or {})}}
    known = vars(config)
    for name in domains:
        if name not in known:
            raise ConfigError(
                f"--space {name}: {type(config).__name__} has no setting {name!r}.{nearest(name, known)}"
            )
    if not domains:
        raise ConfigError(
            f"{type(config).__name__} declares no search space: give one with --space knob='loguniform(1e-4, 1e-2)'"
        )
    if search == "grid":
        domains = gridded(domains)
    elif search == "optuna" and any(isinstance(d, dict) for d in domains.values()):
        raise ConfigError(
            "optuna draws from distributions: write choice([...]) where grid([...]) stands, or --search grid"
        )
    if scheduler == "pbt" and search != "random":
        raise ConfigError("population based training draws and perturbs settings itself: leave out --search")
    found_metric, found_mode = (metric, mode or "max") if metric else default_metric(config)
    if found_metric in STOP_NAMES:
        found_metric = STOP_NAMES[found_metric]
    if (mode or found_mode) not in ("max", "min"):
        raise ConfigError(f"--mode {mode}: max or min")
    targets = {STOP_NAMES.get(k, k): float(v) for k, v in (stop or default_stop(config)).items()}
    env = config.env if isinstance(config.env, str) else getattr(config.env, "__name__", None)
    return {
        "method": registry.name_of(config),
        "env": env,
        "metric": found_metric,
        "mode": mode or found_mode,
        "scheduler": scheduler,
        "search": search,
        "num_samples": num_samples,
        "space": {name: describe(domain) for name, domain in domains.items()},
        "stop": targets,
        "confirm": confirm,
        "seed": config.seed,
    }


def _scheduler(about: Mapping[str, Any], space: Mapping[str, Any]) -> Any:
    from ray.tune import schedulers

    # Time is counted in what the run is stopped by, so that early stopping and the end agree.
    counted = [
        n
        for n in about["stop"]
        if n in (STOP_NAMES["env_steps"], STOP_NAMES["iterations"], STOP_NAMES["seconds"])
    ]
    time_attr = counted[0] if counted else STOP_NAMES["iterations"]
    longest = about["stop"].get(time_attr, 100.0)
    rank = {"metric": about["metric"], "mode": about["mode"], "time_attr": time_attr}
    if about["scheduler"] == "asha":
        return schedulers.ASHAScheduler(
            **rank,
            max_t=longest,
            grace_period=max(longest / 9, 1 if time_attr == "training_iteration" else 1e-9),
            reduction_factor=3,
        )
    if about["scheduler"] == "median":
        return schedulers.MedianStoppingRule(**rank, grace_period=longest / 5, min_samples_required=3)
    if about["scheduler"] == "pbt":
        return schedulers.PopulationBasedTraining(
            **rank,
            perturbation_interval=longest / 5,
            hyperparam_mutations={
                k: d["grid_search"] if isinstance(d, dict) else d for k, d in space.items()
            },
            synch=True,
        )
    return schedulers.FIFOScheduler()


def _searcher(about: Mapping[str, Any]) -> Any:
    from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

    if about["search"] != "optuna":
        return BasicVariantGenerator(max_concurrent=about["concurrent"] or 0, random_state=about["seed"])
    try:
        from optuna.samplers import TPESampler
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise ConfigError("--search optuna needs the package optuna: pip install optuna") from error
    logging.getLogger("optuna").setLevel(logging.ERROR)
    found = OptunaSearch(
        metric=about["metric"], mode=about["mode"], sampler=TPESampler(seed=about["seed"], multivariate=False)
    )
    return ConcurrencyLimiter(found, about["concurrent"]) if about["concurrent"] else found


def _run(
    path: Path,
    about: dict[str, Any],
    config: AlgorithmConfig,
    *,
    address: str | None,
    progress: bool,
    verbose: bool,
    restore: bool,
) -> Study:
    from ray import tune as ray_tune

    # Tune's state is written at every event, so that a kill loses no finished trial.
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "0"
    os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "0")
    start_ray(address, verbose=verbose)
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)
    space = {name: parse_space(text, name) for name, text in about["space"].items()}
    algorithm = config.algo_class
    assert algorithm is not None
    if about["cpus_per_trial"]:
        config.resources(num_cpus_for_main_process=about["cpus_per_trial"])
    watch = Watch(str(path), progress)
    with _quiet(verbose):
        if restore:
            tuner = ray_tune.Tuner.restore(
                str(path / "tune"),
                trainable=algorithm,
                # Tune keeps settings that are no plain data (classes, spaces) as references into this.
                param_space={**config.to_dict(), **space},
                resume_unfinished=True,
                resume_errored=True,
            )
        else:
            grid = about["search"] == "grid"
            tuner = ray_tune.Tuner(
                algorithm,
                param_space={**config.to_dict(), **space},
                tune_config=ray_tune.TuneConfig(
                    num_samples=1 if grid else about["num_samples"],
                    scheduler=_scheduler(about, space),
                    search_alg=_searcher(about),
                    trial_name_creator=_trial_name,
                    trial_dirname_creator=_trial_name,
                ),
                run_config=ray_tune.RunConfig(
                    name="tune",
                    storage_path=str(path.resolve()),
                    stop=dict(about["stop"]),
                    callbacks=[watch],
                    verbose=1 if verbose else 0,
                    checkpoint_config=ray_tune.CheckpointConfig(
                        # A population's trial goes on from another's checkpoint, which must still be there.
                        num_to_keep=None if about["scheduler"] == "pbt" else 2,
                        checkpoint_frequency=_every(about),
                        checkpoint_at_end=True,
                    ),
                    # A machine that is lost takes no trial with it.
                    failure_config=ray_tune.FailureConfig(max_failures=2),
                ),
            )
        results = tuner.fit()
    trials = [_trial(result, about) for result in results]
    return _report(path, about, config, trials, progress=progress)


def _trial_name(trial: Any) -> str:
    return str(trial.trial_id)


def _every(about: Mapping[str, Any]) -> int:
    """Iterations between checkpoints of a trial."""
    return max(int(about["stop"].get(STOP_NAMES["iterations"], 10) // 10), 1)


def _score(rows: Any, about: Mapping[str, Any]) -> float | None:
    """Mean of the metric over the last fifth of the iterations that report it; single iterations are noisy."""
    if rows is None or about["metric"] not in rows:
        return None
    values = [float(v) for v in rows[about["metric"]] if math.isfinite(float(v))]
    tail = values[-max(len(values) // 5, 1) :]
    return sum(tail) / len(tail) if tail else None


def _trial(result: Any, about: Mapping[str, Any]) -> Trial:
    metrics = flat_metrics(result.metrics or {})
    reached = any(metrics.get(name, -math.inf) >= value for name, value in about["stop"].items())
    error = str(result.error).strip().split("\n")[-1] if result.error is not None else ""
    return Trial(
        Path(result.path).name,
        {name: (result.config or {}).get(name) for name in about["space"]},
        "failed" if error else "done" if reached else "stopped early",
        _score(result.metrics_dataframe, about),
        int(metrics.get("training_iteration", 0)),
        metrics.get("time_total_s", 0.0),
        error,
    )


# Watching ---------------------------------------------------------------------------------------------------


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


# Report -----------------------------------------------------------------------------------------------------


def _report(
    path: Path, about: dict[str, Any], config: AlgorithmConfig, trials: list[Trial], *, progress: bool
) -> Study:
    scored = [t for t in trials if t.score is not None and t.status != "failed"]
    pick = max if about["mode"] == "max" else min
    # A trial that was stopped early is not compared with whole ones while there are any.
    whole = [t for t in scored if t.status == "done"] or scored
    best = pick(whole, key=lambda t: t.score) if whole else None  # type: ignore[arg-type, return-value]
    study = Study(path, about["metric"], about["mode"], trials, best)
    write_json(path / "trials.json", [vars(t) for t in trials])
    write_text(path / "trials.csv", trials_csv(trials, about))
    if best is None:
        known = sorted({t.error for t in trials if t.error}) or [f"no trial reported {about['metric']}"]
        study.notes.append(f"no trial has a score: {known[0]}")
    else:
        tuned = config.copy(copy_frozen=False)
        for name, value in best.settings.items():
            _set(tuned, name, value)
        best_yaml = yaml.safe_load(dump_config(tuned)) | {"stop": {k: v for k, v in about["stop"].items()}}
        write_text(path / "best.yaml", yaml.safe_dump(best_yaml, sort_keys=False))
        study.figure = parallel_coordinates(scored, about, path / "parallel_coordinates.png")
        if about["confirm"]:
            study.confirmation = confirm(tuned, config, about, path)
    result = {
        **about,
        "trials": [vars(t) for t in trials],
        "best": vars(best) if best else None,
        "confirmation": study.confirmation,
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
    }
    write_json(path / "study.json", result)
    if about["track"]:
        tracker = study_tracker(path, about)
        study.tracking_uri = tracker.uri
        if best is not None and best.score is not None:
            tracker.log_metrics({f"best/{about['metric']}": best.score}, 0)
        for name in ("study.json", "trials.csv", "best.yaml", "parallel_coordinates.png"):
            if (path / name).is_file():
                tracker.log_artifact(path / name)
        tracker.end()
    return study


def _set(config: Any, name: str, value: Any) -> None:
    if hasattr(config, "hyperparameters") and name in config.hyperparameters():
        config.training(**{name: value})
    else:
        setattr(config, name, value)


def trials_csv(trials: Sequence[Trial], about: Mapping[str, Any]) -> str:
    """A line a trial."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *about["space"], "score", "status", "iterations", "seconds", "error"])
    for t in trials:
        settings = [t.settings.get(name) for name in about["space"]]
        writer.writerow([t.name, *settings, t.score, t.status, t.iterations, round(t.seconds, 2), t.error])
    return text.getvalue()


def confirm(
    tuned: AlgorithmConfig, default: AlgorithmConfig, about: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Both settings on seeds that no trial has used; the paired difference of their scores with its 95 % interval."""
    from ray import tune as ray_tune

    from mobula.experiment import statistics

    seeds = [HELD_OUT_FROM + i for i in range(about["confirm"])]
    scores: dict[str, dict[int, float]] = {}
    for name, config in (("tuned", tuned), ("default", default)):
        results = ray_tune.Tuner(
            config.algo_class,
            param_space={**config.to_dict(), "seed": ray_tune.grid_search(seeds)},
            tune_config=ray_tune.TuneConfig(
                trial_name_creator=_trial_name, trial_dirname_creator=_trial_name
            ),
            run_config=ray_tune.RunConfig(
                name=f"confirm-{name}-{time.time_ns()}",
                storage_path=str(path.resolve()),
                stop=dict(about["stop"]),
                verbose=0,
            ),
        ).fit()
        found = {r.config["seed"]: _score(r.metrics_dataframe, about) for r in results if r.error is None}
        scores[name] = {seed: value for seed, value in found.items() if value is not None}
    both = sorted(set(scores["tuned"]) & set(scores["default"]))
    if not both:
        return {"seeds": [], "verdict": "not run"}
    sign = 1 if about["mode"] == "max" else -1
    a, b = ([scores[name][seed] for seed in both] for name in ("tuned", "default"))
    gap = statistics.paired_difference([sign * x for x in a], [sign * x for x in b])
    verdict = "better" if gap.low > 0 else "worse" if gap.high < 0 else "undecided"
    return {
        "seeds": both,
        "tuned": a,
        "default": b,
        "improvement": gap.value,
        "low": gap.low,
        "high": gap.high,
        "verdict": verdict,
    }


def parallel_coordinates(trials: Sequence[Trial], about: Mapping[str, Any], file: Path) -> Path:
    """One line a trial across its settings to its score, coloured by the score; the best on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [*about["space"], about["metric"]]
    columns: list[list[Any]] = [[t.settings.get(n) for t in trials] for n in about["space"]]
    columns.append([t.score for t in trials])
    figure, axes = plt.subplots(figsize=(max(1.5 * len(names), 5), 4.2), layout="constrained")
    places, scores = [], [float(t.score or 0.0) for t in trials]
    for x, (name, values) in enumerate(zip(names, columns, strict=True)):
        place, ticks = _axis(values, "log" in about["space"].get(name, ""))
        places.append(place)
        axes.axvline(x, color="0.6", linewidth=0.8)
        for height, text in ticks:
            axes.annotate(
                text,
                (x, height),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize=7,
                va="center",
                color="0.25",
            )
    low, high = min(scores), max(scores)
    best_last = sorted(range(len(trials)), key=lambda i: scores[i], reverse=about["mode"] == "min")
    colours = plt.get_cmap("viridis" if about["mode"] == "max" else "viridis_r")
    for rank, i in enumerate(best_last):
        share = 0.5 if high == low else (scores[i] - low) / (high - low)
        last = rank == len(trials) - 1
        axes.plot(
            range(len(names)),
            [place[i] for place in places],
            color="#d55e00" if last else colours(share),
            linewidth=2.6 if last else 1.2,
            alpha=1.0 if last else 0.75,
            label="best trial" if last else None,
        )
    axes.set_xticks(
        range(len(names)), [n.rpartition("/")[2] for n in names], rotation=20, ha="right", fontsize=9
    )
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(names) - 0.55)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.1))
    axes.set_title(f"{about['method']}: {len(trials)} trials", fontsize=10)
    with storage(file):
        figure.savefig(file, dpi=130)
    plt.close(figure)
    return file


def _axis(values: Sequence[Any], logarithmic: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """(height in [0, 1] of every value, ticks) of one axis: numbers by size, anything else by kind."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers:
        kinds = sorted({str(v) for v in values})
        at = {kind: 0.5 if len(kinds) == 1 else i / (len(kinds) - 1) for i, kind in enumerate(kinds)}
        return [at[str(v)] for v in values], [(height, kind) for kind, height in at.items()]
    scale = math.log10 if logarithmic and min(values) > 0 else float
    low, high = scale(min(values)), scale(max(values))
    if high == low:
        return [0.5] * len(values), [(0.5, f"{min(values):.3g}")]
    marks = [low + share * (high - low) for share in (0.0, 0.5, 1.0)]
    back = (lambda v: 10**v) if scale is math.log10 else (lambda v: v)
    return [(scale(v) - low) / (high - low) for v in values], [
        ((m - low) / (high - low), f"{back(m):.3g}") for m in marks
    ]
