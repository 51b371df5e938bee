"""Runs: training with a run folder, tracking and progress, checkpoints, resume."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobula import registry
from mobula.errors import ArtifactError, ClusterError, ConfigError, MobulaError, StorageError
from mobula.files import replaced_folder, storage, write_json, write_text
from mobula.joining import start_ray
from mobula.placement import cluster_nodes, lacking, roles
from mobula.results import STOP_NAMES, env_steps, flat_metrics, learning_curve
from mobula.settings import dump_config, load_yaml, make_config
from mobula.versions import commit, machine, versions

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig


logger = logging.getLogger("mobula")

CHECKPOINT_MARK = "mobula.json"
"""File of a checkpoint that says its iteration."""

CHECKPOINT_SECONDS = 300.0
"""Time between checkpoints where no number of iterations is given."""

# Training -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run: its folder, what stopped it, the metrics of every iteration, the evaluation at its end.

    headline: (metric, label) that the method is judged by, where that is not its return; figures: those that it draws itself;
    recoveries: times that it went on from a checkpoint after a loss.
    """

    path: Path
    status: str
    rows: list[dict[str, float]] = field(default_factory=list)
    evaluation: dict[str, float] = field(default_factory=dict)
    figure: Path | None = None
    figures: list[Path] = field(default_factory=list)
    tracking_uri: str | None = None
    notes: list[str] = field(default_factory=list)
    recoveries: int = 0
    headline: tuple[str, str] | None = None

    @property
    def last(self) -> dict[str, float]:
        """Metrics of the last iteration."""
        return self.rows[-1] if self.rows else {}


Progress = Callable[[dict[str, float], float], None]
"""Called after every iteration with its metrics and the finished fraction of the run."""


def new_run_folder(out: str | Path, method: str, env: str | None, seed: int | None) -> Path:
    """Makes `out`/<time>-<method>-<env>-s<seed>.  Raises StorageError where that cannot be written."""
    parts = [
        time.strftime("%Y%m%d-%H%M%S"),
        method.replace(":", "-"),
        (env or "data").replace(":", "-").replace("/", "-"),
    ]
    if seed is not None:
        parts.append(f"s{seed}")
    base = Path(out)
    for attempt in range(100):
        path = base / ("-".join(parts) + (f"-{attempt}" if attempt else ""))
        with storage(path):
            base.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    raise StorageError(f"{base} already holds a hundred runs of this second: choose another folder")


def train(
    config: AlgorithmConfig,
    *,
    stop: Mapping[str, float] | None = None,
    out: str | Path = "runs",
    track: bool = True,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    address: str | None = None,
    checkpoint_every: int | None = None,
    keep: int = 1,
    max_failures: int = 3,
    evaluate: bool = True,
    progress: Progress | None = None,
    verbose: bool = False,
) -> Run:
    """Trains `config` until one of `stop` is reached, in a run folder of its own.

    stop              {metric: value}: ends when the metric is at least the value (see STOP_NAMES for short names);
                      default: what the method says, else 50 iterations
    checkpoint_every  iterations between checkpoints (default: one every five minutes); there is always one at the end
    keep              checkpoints that are kept: the last in checkpoint/, earlier ones in checkpoints/
    max_failures      times that the run goes on from its last checkpoint after it has lost a learner or a machine that it
                      cannot do without (lost env runners are replaced as it goes)

    The folder holds config.yaml, progress.jsonl (a line an iteration, written as it goes), checkpoint/, policy/ (the
    exported policy), learning_curve.png and run.json.  A run that is interrupted keeps what it has.
    """
    method = registry.name_of(config)
    env = config.env if isinstance(config.env, str) else getattr(config.env, "__name__", None)
    targets = {
        STOP_NAMES.get(name, name): float(value) for name, value in (stop or default_stop(config)).items()
    }
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every is {checkpoint_every}: at least 1")
    if keep < 1:
        raise ConfigError(f"keep is {keep}: at least 1 checkpoint is kept")
    if max_failures < 0:
        raise ConfigError(f"max_failures is {max_failures}: at least 0")
    _start(config, address, verbose)
    path = new_run_folder(out, method, env, config.seed)
    run = Run(path, "running")
    write_text(path / "config.yaml", dump_config(config))
    about = {
        "method": method,
        "env": env,
        "env_config": dict(config.env_config),
        "seed": config.seed,
        "stop": targets,
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
    }
    about |= {
        "checkpoint_every": checkpoint_every,
        "keep": keep,
        "max_failures": max_failures,
        "evaluate": evaluate,
    }
    settings = config.knobs() if hasattr(config, "knobs") else {}
    tracking = None
    if track:
        tracking = {
            "experiment": experiment or method,
            "uri": tracking_uri,
            "folder": str(out),
            "params": {"env": env, "seed": config.seed, **dict(config.env_config), **settings},
        }
    return _drive(config, run, about, tracking, progress=progress, verbose=verbose)


def resume(
    path: str | Path,
    *,
    stop: Mapping[str, float] | None = None,
    address: str | None = None,
    progress: Progress | None = None,
    verbose: bool = False,
) -> Run:
    """Goes on with the run in the folder `path` from its newest whole checkpoint, to the same metrics as if it had never ended.

    stop: a later end than the run was started with.  Lines of progress.jsonl after the checkpoint are written again.  Checkpoints are
    RLlib's and hold pickles: resume only your own runs.  Raises ArtifactError where `path` is no run, ConfigError where it has
    reached its end.
    """
    path = Path(path)
    about, given = _read_run(path)
    given.pop("stop", None)
    config = make_config(given.pop("method"), given.pop("env", None), **given, verbose=verbose)
    if stop:
        about["stop"] = {STOP_NAMES.get(name, name): float(value) for name, value in stop.items()}
    run = Run(path, "running", rows=read_progress(path))
    if about.get("status") == "done" and any(
        run.last.get(name, -math.inf) >= value for name, value in about["stop"].items()
    ):
        raise ConfigError(f"{path} has reached its end: give a later one with --stop, or start a new run")
    _start(config, address, verbose)
    checkpoint = _rewind(run)
    for name in ("status", "error", "final", "evaluation", "recoveries", "notes"):
        about.pop(name, None)
    tracking = about.get("tracking")
    return _drive(config, run, about, tracking, restore=checkpoint, progress=progress, verbose=verbose)


def _read_run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(run.json, config.yaml) of a run folder.  Raises ArtifactError where it is none."""
    try:
        return json.loads((path / "run.json").read_text(encoding="utf-8")), load_yaml(path / "config.yaml")
    except (OSError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} is no run folder: {error}") from error


def newest_checkpoint(path: Path) -> tuple[Path | None, int]:
    """(the newest whole checkpoint of a run, its iteration), or (None, 0)."""
    found: list[tuple[int, Path]] = []
    # Of a run that was killed while it put a new checkpoint in the place of the old one, both lie under temporary names.
    places = (path / "checkpoint", *(path / "checkpoints").glob("[0-9]*"), *path.glob(".checkpoint.*"))
    for folder in (*places, *path.glob(".checkpoint.old.*/checkpoint")):
        # Written last: a folder without it is not whole.
        mark = folder / CHECKPOINT_MARK
        if mark.is_file():
            found.append((int(json.loads(mark.read_text(encoding="utf-8"))["training_iteration"]), folder))
    if not found:
        return None, 0
    iteration, folder = max(found)
    return folder, iteration


def _rewind(run: Run) -> Path | None:
    """The newest whole checkpoint of a run, whose rows are cut to those before it; None where it begins anew."""
    checkpoint, iteration = newest_checkpoint(run.path)
    run.rows = [row for row in run.rows if row.get("training_iteration", 0) <= iteration]
    write_text(run.path / "progress.jsonl", "".join(json.dumps(row) + "\n" for row in run.rows))
    return checkpoint


def read_progress(path: Path) -> list[dict[str, float]]:
    """The lines of progress.jsonl; a last one that was cut off is left out."""
    file = path / "progress.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _start(config: AlgorithmConfig, address: str | None, verbose: bool) -> None:
    """Joins or starts Ray.  Raises ConfigError where this machine alone can never hold what the run asks for."""
    start_ray(address, verbose=verbose)
    short = lacking(roles(config), cluster_nodes())
    if short and not (address or os.environ.get("RAY_ADDRESS")):
        raise ConfigError(
            f"{short}; lower num_env_runners or num_learners, or what each asks for (placement)"
        )
    if short:
        logger.warning("%s; Ray waits until the cluster has grown", short)


def _drive(
    config: AlgorithmConfig,
    run: Run,
    about: dict[str, Any],
    tracking: dict[str, Any] | None,
    *,
    restore: Path | None = None,
    progress: Progress | None,
    verbose: bool,
) -> Run:
    """The run itself, from its start or from the checkpoint `restore`."""
    path = run.path
    write_json(path / "run.json", {**about, "status": run.status})
    with ExitStack() as stack:
        stack.enter_context(_quiet(verbose))
        tracker = None
        if tracking is not None:
            from mobula.tracking import Tracker

            if "run_id" in tracking:
                tracker = Tracker.reopen(tracking["uri"], tracking["run_id"])
            else:
                tracker = Tracker.start(
                    tracking["experiment"],
                    path.name,
                    uri=tracking["uri"],
                    folder=tracking["folder"],
                    params=tracking["params"],
                    tags={"method": about["method"], "env": str(about["env"]), "run": str(path)},
                )
            stack.enter_context(tracker)
            run.tracking_uri = tracker.uri
            about["tracking"] = {"uri": tracker.uri, "run_id": tracker.run_id}
            write_json(path / "run.json", {**about, "status": run.status})
        try:
            while True:
                try:
                    _train_once(config, run, about, tracker, restore, progress)
                    break
                except _losses() as error:
                    run.recoveries += 1
                    said = " ".join(str(error).split())[:200]
                    most = about.get("max_failures", 3)
                    if run.recoveries > most:
                        raise ClusterError(
                            f"the run lost what it cannot do without {run.recoveries} times (max_failures ="
                            f" {most}), the last time: {said}. `mobula train --resume {path}` goes on when the"
                            " cluster is well"
                        ) from error
                    restore = _rewind(run)
                    where = f"iteration {len(run.rows)}" if restore is not None else "its start"
                    run.notes.append(f"went on from {where} after a loss: {said}")
                    logger.warning("%s", run.notes[-1])
        except BaseException as error:
            run.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            write_json(path / "run.json", {**about, "status": run.status, "error": str(error).split("\n")[0]})
            raise
    write_json(
        path / "run.json",
        {
            **about,
            "status": run.status,
            "final": run.last,
            "evaluation": run.evaluation,
            "recoveries": run.recoveries,
            "notes": run.notes,
        },
    )
    return run


def _train_once(
    config: AlgorithmConfig,
    run: Run,
    about: dict[str, Any],
    tracker: Any,
    restore: Path | None,
    progress: Progress | None,
) -> None:
    from mobula.metrics import meter_of

    algorithm = build(config)
    meter = meter_of(algorithm)
    meter.name(run.path.name, recoveries=run.recoveries)
    try:
        if restore is not None:
            algorithm.restore_from_path(str(restore.resolve()))
        _loop(algorithm, run, about, tracker, progress)
        _finish(algorithm, run, tracker, about["evaluate"], about["keep"])
    finally:
        meter.close()
        algorithm.stop()


def _losses() -> tuple[type[Exception], ...]:
    """What Ray raises where a process or a machine is gone."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
    )


def send(path: str | Path, *, uri: str | None = None, experiment: str | None = None) -> str:
    """Logs what MLflow lacks of the run in the folder `path`: a server was away, or the run was not tracked.

    uri: default where the run was tracked, else MLFLOW_TRACKING_URI, else the MLflow file beside its folder.  Returns the URI.
    """
    from mobula.tracking import Tracker

    path = Path(path)
    about, given = _read_run(path)
    kept = about.get("tracking")
    if kept and uri in (None, kept["uri"]):
        tracker = Tracker.reopen(kept["uri"], kept["run_id"])
    else:
        tracker = Tracker.start(
            experiment or about["method"],
            path.name,
            uri=uri,
            folder=path.parent,
            params={
                "env": about["env"],
                "seed": about["seed"],
                **about["env_config"],
                **given.get("settings", {}),
            },
            tags={"method": about["method"], "env": str(about["env"]), "run": str(path)},
        )
        write_json(path / "run.json", {**about, "tracking": {"uri": tracker.uri, "run_id": tracker.run_id}})
    # The last name of every row: where it is known, the row is.
    known = {point.step for point in tracker.client.get_metric_history(tracker.run_id, "env_steps")}
    for row in read_progress(path):
        if int(row["env_steps"]) not in known:
            tracker.log_metrics(row, int(row["env_steps"]))
    if about.get("evaluation"):
        tracker.log_metrics(
            {f"evaluation/{k}": v for k, v in about["evaluation"].items()}, env_steps(about["final"])
        )
    for name in ("config.yaml", *(file.name for file in path.glob("*.png")), "checkpoint", "policy"):
        if (path / name).exists():
            tracker.log_artifact(path / name)
    tracker.end({"done": "FINISHED", "failed": "FAILED"}.get(about["status"], "KILLED"))
    return tracker.uri


def build(config: AlgorithmConfig) -> Any:
    """The algorithm of `config`; RLlib's complaints about the config come out as ConfigError."""
    import ray

    from mobula.method import MethodConfig
    from mobula.metrics import watched

    try:
        return (config if isinstance(config, MethodConfig) else watched(config)).build_algo()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MobulaError):
            raise error.cause from None
        raise
    except ValueError as error:
        if isinstance(error, UnicodeError):
            raise
        raise ConfigError(" ".join(str(error).split())) from error


def default_stop(config: AlgorithmConfig) -> dict[str, float]:
    """Where a run ends if nothing is said: the method's `default_stop`, else 50 iterations."""
    found = getattr(config, "default_stop", None)
    return dict(found) if found else {"iterations": 50}


def _loop(algorithm: Any, run: Run, about: dict[str, Any], tracker: Any, progress: Progress | None) -> None:
    log, targets, every = run.path / "progress.jsonl", about["stop"], about["checkpoint_every"]
    saved = time.monotonic()
    while not any(run.last.get(name, -math.inf) >= value for name, value in targets.items()):
        row = flat_metrics(algorithm.train())
        row["env_steps"] = env_steps(row)
        run.rows.append(row)
        with storage(log), log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if tracker is not None:
            tracker.log_metrics(row, int(row["env_steps"]))
        share = max((row.get(name, 0.0) / value for name, value in targets.items() if value > 0), default=0.0)
        reached = any(name in row and row[name] >= value for name, value in targets.items())
        if progress is not None:
            progress(row, 1.0 if reached else min(max(share, 0.0), 1.0))
        if len(run.rows) == 3 and not any(name in row for name in targets):
            raise ConfigError(
                f"nothing to stop by: none of {', '.join(targets)} is a metric of this run; {run.path / 'progress.jsonl'} lists them"
            )
        due = len(run.rows) % every == 0 if every else time.monotonic() - saved > CHECKPOINT_SECONDS
        if due and not reached:
            save_checkpoint(algorithm, run.path, keep=about["keep"])
            saved = time.monotonic()


def save_checkpoint(algorithm: Any, path: Path, *, keep: int = 1) -> None:
    """Writes `path`/checkpoint whole, or leaves the one that is there; `keep` - 1 earlier ones stay in `path`/checkpoints."""
    last, mark = path / "checkpoint", path / "checkpoint" / CHECKPOINT_MARK
    if keep > 1 and mark.is_file():
        iteration = int(json.loads(mark.read_text(encoding="utf-8"))["training_iteration"])
        with replaced_folder(path / "checkpoints" / f"{iteration:06d}") as folder:
            shutil.copytree(last, folder, dirs_exist_ok=True)
    with replaced_folder(last) as folder:
        algorithm.save_to_path(str(folder.resolve()))
        write_json(folder / CHECKPOINT_MARK, {"training_iteration": algorithm.training_iteration})
    earlier = sorted((path / "checkpoints").glob("[0-9]*"))
    # What a kill left half-written is not needed any more either.
    stray = (*path.glob(".checkpoint.*"), *(path / "checkpoints").glob(".[0-9]*"))
    for folder in (*earlier[: max(len(earlier) - keep + 1, 0)], *stray):
        shutil.rmtree(folder)


def _finish(algorithm: Any, run: Run, tracker: Any, evaluate: bool, keep: int) -> None:
    from mobula.artifact import export_policy

    save_checkpoint(algorithm, run.path, keep=keep)
    if evaluate and algorithm.config.env is not None and hasattr(algorithm, "rl_module"):
        results = flat_metrics(algorithm.evaluate())
        run.evaluation = {name.removeprefix("env_runners/"): value for name, value in results.items()}
        if tracker is not None:
            tracker.log_metrics(
                {f"evaluation/{k}": v for k, v in run.evaluation.items()}, env_steps(run.last)
            )
    try:
        export_policy(algorithm, run.path / "policy")
    except ArtifactError as error:
        # The run is good without an exported policy; the reason is shown and kept.
        run.notes.append(f"policy not exported: {error}")
        logger.warning("policy not exported: %s", error)
    run.headline = getattr(algorithm.config, "headline", None)
    run.figure = learning_curve(
        run.rows, run.path / "learning_curve.png", title=run.path.name, headline=run.headline
    )
    # RLlib's own algorithms draw none.
    names = algorithm.figures(run.path) if hasattr(algorithm, "figures") else []
    run.figures = [run.path / name for name in names]
    run.status = "done"
    if tracker is not None:
        for name in ("config.yaml", "learning_curve.png", *names, "checkpoint", "policy"):
            if (run.path / name).exists():
                tracker.log_artifact(run.path / name)


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Keeps the libraries' warnings off the terminal unless they are asked for."""
    if verbose:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
