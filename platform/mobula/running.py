"""Runs: training with a run folder, tracking and progress, checkpoints, resume."""

from __future__ import annotations

import datetime
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

import yaml

from mobula import registry
from mobula.errors import ArtifactError, ClusterError, ConfigError, MobulaError, StorageError
from mobula.files import replaced_folder, storage, write_json, write_text
from mobula.joining import start_ray
from mobula.placement import apply, cluster_nodes, given, lacking, roles
from mobula.versions import commit, machine, versions

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig


logger = logging.getLogger("mobula")

STOP_NAMES = {
    "env_steps": "env_runners/num_env_steps_sampled_lifetime",
    "iterations": "training_iteration",
    "seconds": "time_total_s",
    "return": "env_runners/episode_return_mean",
}
"""Short names of what a run can be stopped by; any metric's full name works too."""


CHECKPOINT_MARK = "mobula.json"
"""File of a checkpoint that says its iteration."""

CHECKPOINT_SECONDS = 300.0
"""Time between checkpoints where no number of iterations is given."""

# Configs --------------------------------------------------------------------------------------------------


def make_config(
    method: str,
    env: str | None = None,
    *,
    env_config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    num_env_runners: int | None = None,
    num_envs_per_env_runner: int | None = None,
    num_learners: int | None = None,
    placement: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> AlgorithmConfig:
    """The config of a run (`placement`: see mobula.placement).  Raises ConfigError for names or values that do not exist or do not fit."""
    from mobula.method import MethodConfig

    config: Any = registry.config_class(method)()
    # RLlib sets its loggers to this, and remarks on its own API at every start.
    logging.getLogger("ray").setLevel(logging.INFO if verbose else logging.ERROR)
    config.debugging(log_level="INFO" if verbose else "ERROR")
    if env is not None:
        spelled = registry.env_name(env)
        if not isinstance(config, MethodConfig):
            spelled = registry.register_with_ray(spelled)
            if not env.startswith(registry.GYMNASIUM) and spelled == registry.env_name(env):
                config.env_runners(gym_env_vectorize_mode="vector_entry_point")
        config.environment(spelled, env_config=_plain(env_config or {}))
    if seed is not None:
        config.debugging(seed=seed)
    counts = {"num_env_runners": num_env_runners, "num_envs_per_env_runner": num_envs_per_env_runner}
    config.env_runners(**{name: value for name, value in counts.items() if value is not None})
    if num_learners is not None:
        config.learners(num_learners=num_learners)
    for name, value in (settings or {}).items():
        _apply(config, name, value)
    apply(config, placement or {})
    if not isinstance(config, MethodConfig):
        from mobula.metrics import watched

        config = watched(config)
    try:
        config.validate()
    except ValueError as error:
        raise ConfigError(f"{method}: {' '.join(str(error).split())}") from error
    return config  # type: ignore[no-any-return]


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them: YAML reads 2015-01-01 as a date."""
    return {name: v.isoformat() if isinstance(v, datetime.date) else v for name, v in settings.items()}


def _apply(config: Any, name: str, value: Any) -> None:
    """One setting: a hyper-parameter, an argument of RLlib's `training`, or any other attribute of the config."""
    from mobula.method import MethodConfig, _training_arguments

    if (
        isinstance(config, MethodConfig) and (name in config.hyperparameters() or name in config.rejected)
    ) or name in _training_arguments(type(config)):
        config.training(**{name: value})
    elif not name.startswith("_") and name in vars(config):
        setattr(config, name, value)
    elif isinstance(config, MethodConfig):
        config.training(**{name: value})
    else:
        from mobula.errors import nearest

        known = [*_training_arguments(type(config)), *(n for n in vars(config) if not n.startswith("_"))]
        raise ConfigError(f"{type(config).__name__} has no setting {name!r}.{nearest(name, known)}")


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
    for folder in earlier[: max(len(earlier) - keep + 1, 0)]:
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


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Keeps the libraries' warnings off the terminal unless they are asked for."""
    if verbose:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# YAML -----------------------------------------------------------------------------------------------------


def dump_config(config: AlgorithmConfig) -> str:
    """The config as YAML that `mobula train --config` takes."""
    method = registry.name_of(config)
    data = {
        "method": method,
        "env": config.env if isinstance(config.env, str) else None,
        "env_config": dict(config.env_config),
        "seed": config.seed,
        "num_env_runners": config.num_env_runners,
        "num_envs_per_env_runner": config.num_envs_per_env_runner,
        "num_learners": config.num_learners,
        "placement": given(config) or None,
        "settings": config.knobs() if hasattr(config, "knobs") else _changed(config),
    }
    return yaml.safe_dump({k: v for k, v in data.items() if v is not None}, sort_keys=False)


def _changed(config: Any) -> dict[str, Any]:
    """Training settings of an RLlib config that differ from its defaults and are plain data."""
    from mobula.method import _training_arguments

    fresh, found = type(config)(), {}
    for name in sorted(_training_arguments(type(config))):
        value = getattr(config, name, None)
        if value != getattr(fresh, name, None) and isinstance(value, int | float | str | bool | list):
            found[name] = value
    return found


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A config file.  Raises ConfigError where it is no mapping of the names that `dump_config` writes."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is no YAML: {' '.join(str(error).split())}") from error
    known = {
        "method",
        "env",
        "env_config",
        "seed",
        "num_env_runners",
        "num_envs_per_env_runner",
        "num_learners",
        "placement",
        "settings",
        "stop",
    }
    if not isinstance(data, dict) or not set(data) <= known:
        extra = sorted(set(data) - known) if isinstance(data, dict) else [type(data).__name__]
        raise ConfigError(
            f"config file {path} holds {', '.join(map(str, extra))}; it may hold {', '.join(sorted(known))}"
        )
    return data
