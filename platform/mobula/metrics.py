"""Training metrics for Prometheus: what a run measures, as gauges of Ray's own metrics agents.

Every algorithm has a `Meter`.  An iteration pays for a few additions; a thread publishes every few seconds.  Ray drops a gauge that has not
been set for two of its report intervals (20 s by default), so a series is there as long as its run is, however long an iteration
takes, and old runs leave nothing behind.  Ray puts `ray_` before every name.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
from ray.util.metrics import Gauge

from mobula import registry
from mobula.errors import ConfigError

PERIOD_SECONDS = 4.0
"""Time between publications; below half of Ray's report interval, so that none of its reports lacks a series."""

MOST = 128
"""Series that one gauge has of one run, at most; learner metrics, env runners and shards beyond them are left out."""

RUN_TAGS = ("method", "env", "run", "trial")
"""Tags of every gauge.  trial: the name of the trial's folder under Tune, "-" for a run of its own."""

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mobula_iterations": ("training iterations so far", ()),
    "mobula_env_steps": ("environment steps so far", ()),
    "mobula_env_steps_per_second": ("environment steps a second of wall-clock time", ()),
    "mobula_score": (
        "what a run is judged by: return, reward_per_step, evaluation_return, or the method's own",
        ("metric",),
    ),
    "mobula_learner": ("metrics of the learners and of the method, by name", ("metric",)),
    "mobula_iteration_seconds": (
        "wall-clock seconds of an iteration: sampling, learning and the rest",
        ("part",),
    ),
    "mobula_idle_seconds": ("seconds since the last iteration ended", ()),
    "mobula_env_runners": ("env runner actors: wanted, healthy", ("state",)),
    "mobula_env_runner_restarts": ("env runner actors that have been started again", ()),
    "mobula_env_runner_steps_per_second": (
        "environment steps a second while an env runner samples; 0 where it returned nothing (0: the run's own process)",
        ("runner",),
    ),
    "mobula_shards": (
        "shards of a population or a search: all, working (not answered yet)",
        ("group", "state"),
    ),
    "mobula_shard_seconds": ("seconds until a shard answered", ("group", "shard")),
    "mobula_recoveries": ("times that a run went on from a checkpoint after a loss", ()),
}
"""Name -> (meaning, tags beside RUN_TAGS)."""


@cache
def _gauge(name: str) -> Gauge:
    meaning, own = GAUGES[name]
    return Gauge(name, meaning, tag_keys=(*RUN_TAGS, *own))


NOT_LEARNED = ("num_", "time", "training_iteration", "iterations_", "episodes_", "pid")
"""How the counts and times begin that RLlib and Tune put beside what is learned."""

Key = tuple[str, ...]
"""(gauge, values of its own tags)."""


def readings(result: Mapping[str, Any], headline: tuple[str, str] | None = None) -> dict[Key, float]:
    """What the result of an iteration says, finite numbers only.  headline: (metric, label) that the method is judged by."""
    found: dict[Key, float] = {}

    def put(value: Any, *key: str) -> None:
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):
                found[key] = number

    sampled = result.get("env_runners", {})
    evaluated = result.get("evaluation", {}).get("env_runners", {})
    steps = sampled.get("num_env_steps_sampled_lifetime") or result.get("num_env_steps_sampled_lifetime")
    put(steps or None, "mobula_env_steps")
    put(sampled.get("episode_return_mean"), "mobula_score", "return")
    put(sampled.get("reward_per_step"), "mobula_score", "reward_per_step")
    put(evaluated.get("episode_return_mean"), "mobula_score", "evaluation_return")
    if headline is not None:
        value: Any = result
        for name in headline[0].split("/"):
            value = value.get(name) if isinstance(value, Mapping) else None
        put(value, "mobula_score", headline[1])

    most = len(found) + MOST
    for module, values in {"": result, **result.get("learners", {})}.items():
        prefix = "" if module in ("", "default_policy") else f"{module}/"
        for name, value in values.items():
            if len(found) < most and not name.startswith(NOT_LEARNED):
                put(value, "mobula_learner", prefix + name)
    return found


@dataclass
class _Window:
    """What some iterations add up to."""

    begun: float
    iterations: int = 0
    env_steps: float = 0.0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    # Runner -> [steps, calls of sample, seconds of a call]; group -> (calls, seconds of each shard).
    runners: dict[int, list[float]] = field(default_factory=dict)
    shards: dict[str, tuple[int, list[float]]] = field(default_factory=dict)


class Meter:
    """Measures one algorithm, and publishes it as long as it lives.

    `with meter:` around an iteration, `timed` around its parts, then `record` its result; `close` at the end.  All of these belong to
    the thread that trains; the meter's own thread only sets gauges.
    """

    def __init__(self, algorithm: Any) -> None:
        self._algorithm = weakref.ref(algorithm)
        self._run: str | None = None
        self._tags: dict[str, str] = {}
        self._result: Mapping[str, Any] = {}
        self._iterations, self._ended, self._due = 0, time.perf_counter(), -math.inf
        self._window = _Window(self._ended)
        self._values: dict[Key, float] = {("mobula_iterations",): 0}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def name(self, run: str, *, recoveries: int = 0) -> None:
        """Gives the name that the run is published under (default: where RLlib or Tune keep its files)."""
        self._run = run
        self._values["mobula_recoveries",] = recoveries

    # Measuring -------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if not self._iterations:
            self._window.begun = self._ended = time.perf_counter()
        self._start()
        self._token = _ACTIVE.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _ACTIVE.reset(self._token)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of a block to a part of the iteration: "sampling" or "learning"."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._window.seconds[part] += time.perf_counter() - started

    def sampled(self, results: Sequence[tuple[int, Any, Any]]) -> None:
        """Takes in what `TensorEnvRunner.sample_and_report` returned on each runner."""
        for index, _, metrics in results:
            if index > MOST:
                continue
            total = self._window.runners.setdefault(index, [0.0, 0.0, math.nan])
            total[1] += 1
            if metrics is not None:
                total[0] += metrics["num_env_steps_sampled"].peek()
                total[2] = metrics["sample"].peek()

    def waiting(self, group: str, shards: int) -> None:
        """Says how many shards of a group have not answered yet."""
        with self._lock:
            self._values["mobula_shards", group, "working"] = shards

    def gathered(self, group: str, seconds: Sequence[float]) -> None:
        """Takes in the seconds until each shard of a group answered."""
        calls, before = self._window.shards.get(group, (0, []))
        added = [a + b for a, b in zip_longest(before, seconds[:MOST], fillvalue=0.0)]
        self._window.shards[group] = (calls + 1, added)

    def record(self, result: Mapping[str, Any]) -> None:
        """Takes in the result of an iteration that has just ended."""
        algorithm = self._algorithm()
        assert algorithm is not None
        # RLlib counts an iteration after its step.
        self._iterations = int(result.get("training_iteration", algorithm.iteration + 1))
        self._result, self._ended = result, time.perf_counter()
        self._window.iterations += 1
        self._window.env_steps += result.get("env_runners", {}).get("num_env_steps_sampled", 0)
        if self._ended >= self._due:
            self._add_up(algorithm)
        self._start()

    def _add_up(self, algorithm: Any) -> None:
        """The window's means, as values; then a new window."""
        window, self._window = self._window, _Window(self._ended)
        self._due = self._ended + PERIOD_SECONDS
        found = readings(self._result, getattr(algorithm.config, "headline", None))
        found["mobula_iterations",] = self._iterations
        elapsed = max(self._ended - window.begun, 1e-9)
        if window.env_steps:
            found["mobula_env_steps_per_second",] = window.env_steps / elapsed
        rest = max(elapsed - sum(window.seconds.values()), 0.0)
        for part, seconds in {**window.seconds, "rest": rest}.items():
            found["mobula_iteration_seconds", part] = seconds / window.iterations
        if window.runners:
            for runner in {*window.runners, *range(1, min(algorithm.config.num_env_runners, MOST) + 1)}:
                steps, calls, seconds = window.runners.get(runner, (0.0, 0.0, math.nan))
                speed = steps / (calls * seconds) if calls and seconds > 0 else 0.0
                found["mobula_env_runner_steps_per_second", str(runner)] = speed
        for group, (calls, added) in window.shards.items():
            found["mobula_shards", group, "all"] = len(added)
            for shard, seconds in enumerate(added):
                found["mobula_shard_seconds", group, str(shard)] = seconds / calls
        with self._lock:
            self._values |= found

    # Publishing ------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=_keep_publishing,
                args=(weakref.ref(self), self._closed),
                name="mobula metrics",
                daemon=True,
            )
            self._thread.start()

    def publish(self) -> None:
        """Sets every gauge of the run to what is known now."""
        algorithm = self._algorithm()
        if algorithm is None or not ray.is_initialized():
            return
        with self._lock:
            self._tags = self._tags or self._describe(algorithm)
            self._look_at(algorithm)
            for (name, *own), value in self._values.items():
                tags = dict(zip(GAUGES[name][1], own, strict=True))
                _gauge(name).set(value, tags={**self._tags, **tags})

    def close(self) -> None:
        """Publishes a last time; Ray drops the run's gauges soon after."""
        if self._closed.is_set():
            return
        self._closed.set()
        algorithm = self._algorithm()
        if algorithm is not None and self._iterations:
            if self._window.iterations:
                self._add_up(algorithm)
            self.publish()

    def _describe(self, algorithm: Any) -> dict[str, str]:
        env = algorithm.config.env
        try:
            method = registry.name_of(algorithm.config)
        except ConfigError:
            method = type(algorithm).__name__
        storage = getattr(algorithm, "_storage", None)
        if storage is None:
            run, trial = Path(algorithm.logdir).name, "-"
        else:
            run = f"{Path(storage.storage_fs_path).name}/{storage.experiment_dir_name}"
            # RLlib loses the ID that Tune gives it.
            trial = str(storage.trial_dir_name)
        return {
            "method": method,
            "env": env if isinstance(env, str) else getattr(env, "__name__", "data"),
            "run": self._run or run,
            "trial": trial,
        }

    def _look_at(self, algorithm: Any) -> None:
        """What can be seen while an iteration is on."""
        self._values["mobula_idle_seconds",] = time.perf_counter() - self._ended
        group = getattr(algorithm, "env_runner_group", None)
        if group is None:
            return
        self._values["mobula_env_runners", "wanted"] = algorithm.config.num_env_runners
        # RLlib counts in a table that the iteration may be changing: the next publication sees it.
        with suppress(RuntimeError):
            self._values["mobula_env_runners", "healthy"] = group.num_healthy_remote_env_runners()
            self._values["mobula_env_runner_restarts",] = group.num_remote_worker_restarts()


_ACTIVE: ContextVar[Meter | None] = ContextVar("meter", default=None)
"""The meter of the iteration that is on."""


def _keep_publishing(reference: Callable[[], Meter | None], closed: threading.Event) -> None:
    while ray.is_initialized():
        meter = reference()
        if meter is None:
            return
        meter.publish()
        # An algorithm that nobody holds any more ends this thread.
        del meter
        if closed.wait(PERIOD_SECONDS):
            return


def gather(calls: Iterable[Any], group: str, limit: int | None = None) -> list[Any]:
    """The answers of Ray calls in their order, each call a shard of `group`; within an iteration, publishes how many work and how long
    each takes.

    limit  calls at one time: a generator of calls makes the next one when fewer are on
    """
    meter, source = _ACTIVE.get(), iter(calls)
    begun: dict[Any, float] = {}
    seconds: dict[Any, float] = {}
    pending: list[Any] = []
    while True:
        for call in islice(source, None if limit is None else limit - len(pending)):
            begun[call] = time.perf_counter()
            pending.append(call)
        if meter is not None:
            meter.waiting(group, len(pending))
        if not pending:
            break
        answered, pending = ray.wait(pending, num_returns=1, fetch_local=False)
        seconds |= {call: time.perf_counter() - begun[call] for call in answered}
    if meter is not None:
        meter.gathered(group, [seconds[call] for call in begun])
    answers: list[Any] = ray.get(list(begun))
    return answers


@cache
def _task(function: Callable[..., Any]) -> Any:
    """The function as a Ray task of one core, made once: every other one would be sent to the cluster again."""
    return ray.remote(num_cpus=1)(function)


def spread(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int, group: str
) -> list[Any]:
    """[function(*job) for job in jobs]: in this process (`workers` 0), or as Ray tasks of one core each, `workers` at one time."""
    if not workers:
        return [function(*job) for job in jobs]
    return gather((_task(function).remote(*job) for job in jobs), group, limit=workers)


# RLlib's own algorithms -----------------------------------------------------------------------------------


def meter_of(algorithm: Any) -> Meter:
    """The meter of an algorithm, made at the first call where it is RLlib's own."""
    if "meter" not in vars(algorithm):
        algorithm.meter = Meter(algorithm)
    found: Meter = algorithm.meter
    return found


def watched(config: Any) -> Any:
    """A copy of a config of RLlib's own whose algorithm publishes too, by a callback; mobula's methods do so of themselves."""
    config = config.copy(copy_frozen=False)
    found = config.callbacks_on_train_result
    callbacks = list(found) if isinstance(found, list | tuple) else [found] if found else []
    if _on_train_result not in callbacks:
        config.callbacks(on_train_result=[*callbacks, _on_train_result])
    return config


def _on_train_result(*, algorithm: Any, result: Mapping[str, Any], **kwargs: Any) -> None:
    new = "meter" not in vars(algorithm)
    meter = meter_of(algorithm)
    window, timers = meter._window, result.get("timers", {})
    if new:
        window.begun -= result["time_this_iter_s"]
    # Smoothed seconds of a call.
    for part, name in (("sampling", "env_runner_sampling_timer"), ("learning", "learner_update_timer")):
        seconds = float(timers.get(name, math.nan)) * result.get("num_training_step_calls_per_iteration", 1)
        if math.isfinite(seconds):
            window.seconds[part] += seconds
    meter.record(result)
