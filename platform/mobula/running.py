"""Runs: training with a run folder, tracking and progress; evaluation and films of what was trained."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mobula import registry
from mobula.errors import ArtifactError, ClusterError, ConfigError, DataError, MobulaError, StorageError
from mobula.files import replaced_folder, storage, write_json, write_text
from mobula.versions import commit, machine, versions

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    from mobula.artifact import Policy

logger = logging.getLogger("mobula")

STOP_NAMES = {
    "env_steps": "env_runners/num_env_steps_sampled_lifetime",
    "iterations": "training_iteration",
    "seconds": "time_total_s",
    "return": "env_runners/episode_return_mean",
}
"""Short names of what a run can be stopped by; any metric's full name works too."""


# Ray ------------------------------------------------------------------------------------------------------


def start_ray(address: str | None = None, *, verbose: bool = False) -> None:
    """Joins the cluster at `address` (default: RAY_ADDRESS), or starts a local Ray.  Raises ClusterError in one line."""
    import ray

    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.rllib", "ray.tune"):
        logging.getLogger(name).setLevel(level)
    if address is None:
        ray.init(include_dashboard=False, log_to_driver=verbose, logging_level=level)
        return
    # Clusters of Ray 2.60 ask for a token; a client that sends none is refused.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    match = re.fullmatch(r"(?:ray://|https?://)?([^:/]+):(\d+)", address)
    if match:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=5).close()
        except OSError as error:
            raise ClusterError(
                f"the Ray cluster at {address} does not answer ({error}): start it with `ray start --head`,"
                " or unset RAY_ADDRESS to run on this machine"
            ) from error
    try:
        ray.init(address=address, log_to_driver=verbose, logging_level=level)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise ClusterError(f"cannot join the Ray cluster at {address}: {first}") from error


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
    verbose: bool = False,
) -> AlgorithmConfig:
    """The config of a run.  Raises ConfigError for names or values that do not exist or do not fit."""
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
        config.environment(spelled, env_config=dict(env_config or {}))
    if seed is not None:
        config.debugging(seed=seed)
    counts = {"num_env_runners": num_env_runners, "num_envs_per_env_runner": num_envs_per_env_runner}
    config.env_runners(**{name: value for name, value in counts.items() if value is not None})
    if num_learners is not None:
        config.learners(num_learners=num_learners)
    for name, value in (settings or {}).items():
        _apply(config, name, value)
    try:
        config.validate()
    except ValueError as error:
        raise ConfigError(f"{method}: {' '.join(str(error).split())}") from error
    return config  # type: ignore[no-any-return]


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
        if name in ("config", "hist_stats", "pid", "fault_tolerance", "perf"):
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

    headline: (metric, label) that the method is judged by, where that is not its return.
    """

    path: Path
    status: str
    rows: list[dict[str, float]] = field(default_factory=list)
    evaluation: dict[str, float] = field(default_factory=dict)
    figure: Path | None = None
    tracking_uri: str | None = None
    notes: list[str] = field(default_factory=list)
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
    evaluate: bool = True,
    progress: Progress | None = None,
    verbose: bool = False,
) -> Run:
    """Trains `config` until one of `stop` is reached, in a run folder of its own.

    stop              {metric: value}: ends when the metric is at least the value (see STOP_NAMES for short names);
                      default: what the method says, else 50 iterations
    checkpoint_every  iterations between checkpoints; there is always one at the end

    The folder holds config.yaml, progress.jsonl (a line an iteration, written as it goes), checkpoint/, policy/ (the
    exported policy), learning_curve.png and run.json.  A run that is interrupted keeps what it has.
    """
    method = registry.name_of(config)
    env = config.env if isinstance(config.env, str) else getattr(config.env, "__name__", None)
    targets = {
        STOP_NAMES.get(name, name): float(value) for name, value in (stop or default_stop(config)).items()
    }
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
    write_json(path / "run.json", {**about, "status": run.status})
    start_ray(address, verbose=verbose)
    with ExitStack() as stack:
        stack.enter_context(_quiet(verbose))
        tracker = None
        if track:
            from mobula.tracking import Tracker

            settings = config.knobs() if hasattr(config, "knobs") else {}
            tracker = Tracker.start(
                experiment or method,
                path.name,
                uri=tracking_uri,
                folder=out,
                params={"env": env, "seed": config.seed, **dict(config.env_config), **settings},
                tags={"method": method, "env": str(env), "run": str(path)},
            )
            stack.enter_context(tracker)
            run.tracking_uri = tracker.uri
        try:
            algorithm = build(config)
            stack.callback(algorithm.stop)
            _loop(algorithm, run, targets, tracker, checkpoint_every, progress)
            _finish(algorithm, run, tracker, evaluate)
        except BaseException as error:
            run.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            write_json(path / "run.json", {**about, "status": run.status, "error": str(error).split("\n")[0]})
            raise
    write_json(
        path / "run.json",
        {**about, "status": run.status, "final": run.last, "evaluation": run.evaluation, "notes": run.notes},
    )
    return run


def build(config: AlgorithmConfig) -> Any:
    """The algorithm of `config`; RLlib's complaints about the config come out as ConfigError."""
    import ray

    try:
        return config.build_algo()
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


def _loop(
    algorithm: Any,
    run: Run,
    targets: dict[str, float],
    tracker: Any,
    checkpoint_every: int | None,
    progress: Progress | None,
) -> None:
    log = run.path / "progress.jsonl"
    while True:
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
        if reached:
            return
        if len(run.rows) == 3 and not any(name in row for name in targets):
            raise ConfigError(
                f"nothing to stop by: none of {', '.join(targets)} is a metric of this run; {run.path / 'progress.jsonl'} lists them"
            )
        if checkpoint_every and len(run.rows) % checkpoint_every == 0:
            save_checkpoint(algorithm, run.path)


def save_checkpoint(algorithm: Any, path: Path) -> None:
    """Writes `path`/checkpoint whole, or leaves the one that is there."""
    with replaced_folder(path / "checkpoint") as folder:
        algorithm.save_to_path(str(folder.resolve()))


def _finish(algorithm: Any, run: Run, tracker: Any, evaluate: bool) -> None:
    from mobula.artifact import export_policy

    save_checkpoint(algorithm, run.path)
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
    run.status = "done"
    if tracker is not None:
        for name in ("config.yaml", "learning_curve.png", "checkpoint", "policy"):
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
        "settings",
        "stop",
    }
    if not isinstance(data, dict) or not set(data) <= known:
        extra = sorted(set(data) - known) if isinstance(data, dict) else [type(data).__name__]
        raise ConfigError(
            f"config file {path} holds {', '.join(map(str, extra))}; it may hold {', '.join(sorted(known))}"
        )
    return data


# Evaluation -----------------------------------------------------------------------------------------------


def evaluate_policy(
    policy: Policy,
    env: str,
    *,
    episodes: int = 10,
    steps: int = 10_000,
    num_envs: int | None = None,
    seed: int | None = None,
    explore: bool | None = None,
    env_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Plays `episodes` whole episodes (`steps` steps where a task never ends) and returns what they brought.

    {"returns": [...], "lengths": [...]} or {"reward_per_step": x, "steps": n}.  Every environment plays the same number of
    episodes, so that short ones are not favoured.
    """
    import torch

    count = num_envs or max(1, min(episodes, 32))
    world = registry.make_env(env, count, **dict(env_config or {}))
    if (
        world.single_observation_space != policy.observation_space
        or world.single_action_space != policy.action_space
    ):
        raise DataError(
            f"the policy was trained for {policy.observation_space} -> {policy.action_space}; {env} has"
            f" {world.single_observation_space} -> {world.single_action_space}"
        )
    if seed is not None:
        policy.seed(seed)
    obs, _ = world.reset(seed=seed)
    if world.continuing:
        total, taken = 0.0, 0
        while taken < steps:
            obs, reward, *_ = world.step(torch.as_tensor(policy.act(obs.numpy(), explore=explore)))
            total, taken = total + float(reward.sum()), taken + count
        return {"reward_per_step": total / taken, "steps": taken}
    base, extra = divmod(episodes, count)
    quota = [base + (i < extra) for i in range(count)]
    running, length = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
    returns: list[float] = []
    lengths: list[int] = []
    state = None
    while any(quota):
        answer = policy.answer(obs.numpy(), explore=explore, state=state)
        obs, reward, terminated, truncated, _ = world.step(torch.as_tensor(answer["action"]))
        state = answer.get("state")
        running += reward
        length += 1
        for i in (terminated | truncated).nonzero().flatten().tolist():
            if quota[i]:
                quota[i] -= 1
                returns.append(float(running[i]))
                lengths.append(int(length[i]))
            running[i], length[i] = 0.0, 0
            if state is not None:
                initial = policy.module.get_initial_state()
                for name, value in initial.items():
                    state[name][i] = value
    world.close()
    return {"returns": returns, "lengths": lengths}


def record_video(
    policy: Policy,
    env: str,
    path: str | Path,
    *,
    episodes: int = 1,
    steps: int = 500,
    seed: int | None = None,
    explore: bool | None = None,
    env_config: Mapping[str, Any] | None = None,
) -> int:
    """Writes a film (mp4 or gif) of `episodes` episodes, or of `steps` steps where a task never ends; returns the frames."""
    import imageio.v2 as imageio
    import torch

    path = Path(path)
    if path.suffix not in (".mp4", ".gif"):
        raise ConfigError(f"a film is an .mp4 or a .gif, not {path.name!r}")
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    world = registry.make_env(env, 1, render_mode="rgb_array", **dict(env_config or {}))
    if seed is not None:
        policy.seed(seed)
    obs, _ = world.reset(seed=seed)
    frame = world.render()
    if frame is None:
        raise ConfigError(f"{env} does not draw itself: no film can be made of it")
    rate = int(world.metadata.get("render_fps") or 30)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
        options: dict[str, Any] = (
            {"fps": rate, "macro_block_size": 8} if path.suffix == ".mp4" else {"duration": 1000 / rate}
        )
        frames, over, state = 0, 0, None
        writer: Any = imageio.get_writer(temporary, **options)
        with writer:
            while over < episodes and (not world.continuing or frames < steps):
                writer.append_data(frame)
                frames += 1
                answer = policy.answer(obs.numpy(), explore=explore, state=state)
                state = answer.get("state")
                obs, _, terminated, truncated, _ = world.step(torch.as_tensor(answer["action"]))
                over += int(terminated) + int(truncated and not terminated)
                frame = world.render()
        temporary.replace(path)
    world.close()
    return frames
