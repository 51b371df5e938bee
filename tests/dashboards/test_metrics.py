"""What is published of a run: which numbers, how often, under which tags."""

from __future__ import annotations

import gc
import math
import posixpath
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from mobula import metrics
from mobula.metrics import GAUGES, MOST, RUN_TAGS, Meter, gather, meter_of, readings, watched

Published = dict[str, dict[tuple[str, ...], float]]


class Algorithm:
    """As much of an algorithm as a meter looks at."""

    def __init__(self, runners: int = 0) -> None:
        self.config = SimpleNamespace(env="grid", num_env_runners=runners, headline=("own/gap", "the gap"))
        self.logdir, self.iteration, self._storage = "/somewhere/run-1", 0, None
        self.env_runner_group = SimpleNamespace(
            num_healthy_remote_env_runners=lambda: runners - 1, num_remote_worker_restarts=lambda: 3
        )


class Reported:
    """A number of RLlib's, as runners send it."""

    def __init__(self, value: float) -> None:
        self.value = value

    def peek(self) -> float:
        return self.value


def report(steps: float, seconds: float) -> dict[str, Reported]:
    return {"num_env_steps_sampled": Reported(steps), "sample": Reported(seconds)}


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Published:
    """What gauges are set to: {gauge: {values of its own tags: value}}; every set is checked."""
    found: Published = {}

    class Gauge:
        def __init__(self, name: str) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            own = GAUGES[self.name][1]
            assert math.isfinite(value) and set(tags) == {*RUN_TAGS, *own}
            assert all(isinstance(text, str) and text for text in tags.values())
            found.setdefault(self.name, {})[tuple(tags[name] for name in own)] = value

    monkeypatch.setattr(metrics, "_gauge", Gauge)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    return found


def test_only_finite_numbers_are_read() -> None:
    found = readings(
        {
            "env_runners": {
                "num_env_steps_sampled_lifetime": np.int64(700),
                "episode_return_mean": math.nan,
                "reward_per_step": np.float32(0.5),
            },
            "evaluation": {"env_runners": {"episode_return_mean": 4}},
            "learners": {
                "default_policy": {
                    "loss": 2.0,
                    "norm": math.inf,
                    "num_steps": 3,
                    "on": True,
                    "timers": {"a": 1},
                },
                "other": {"loss": -1.0, "text": "x"},
            },
            "policy_entropy": 0.25,
            "own": {"gap": 0.125},
            "num_training_step_calls_per_iteration": 1,
            "time_total_s": 9.0,
            "training_iteration": 7,
            "done": False,
        },
        ("own/gap", "the gap"),
    )
    assert found == {
        ("mobula_env_steps",): 700.0,
        ("mobula_score", "reward_per_step"): 0.5,
        ("mobula_score", "evaluation_return"): 4.0,
        ("mobula_score", "the gap"): 0.125,
        ("mobula_learner", "loss"): 2.0,
        ("mobula_learner", "other/loss"): -1.0,
        ("mobula_learner", "policy_entropy"): 0.25,
    }
    assert readings({}, ("own/gap", "the gap")) == {}


def test_a_method_with_very_many_metrics_does_not_flood_prometheus() -> None:
    found = readings({"learners": {"default_policy": {f"layer_{i}": float(i) for i in range(10 * MOST)}}})
    assert len(found) == MOST


def test_means_over_iterations_and_what_runners_do(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    algorithm = Algorithm(runners=3)
    meter = Meter(algorithm)
    monkeypatch.setattr(meter, "_start", lambda: None)

    def iteration(steps: int) -> None:
        with meter:
            with meter.timed("sampling"):
                clock[0] += 1.0
            # Two calls, the first without a report; runner 3 is dead.
            meter.sampled([(1, [], None), (2, [], None)])
            meter.sampled([(1, [], report(steps / 2, 0.5)), (2, [], report(steps / 2, 2.0))])
            with meter.timed("learning"):
                clock[0] += 0.5
            clock[0] += 0.5
        meter.record({"env_runners": {"num_env_steps_sampled": steps}})
        algorithm.iteration += 1

    iteration(100)  # published at once
    clock[0] += 1.0  # a checkpoint
    iteration(200)
    iteration(400)
    meter.publish()
    assert published["mobula_env_steps_per_second"] == {(): pytest.approx(600 / 5)}
    assert published["mobula_iteration_seconds"] == {
        ("sampling",): pytest.approx(1.0),
        ("learning",): pytest.approx(0.5),
        ("rest",): pytest.approx(1.0),
    }
    assert published["mobula_env_runner_steps_per_second"] == {
        ("1",): pytest.approx(300 / (4 * 0.5)),
        ("2",): pytest.approx(300 / (4 * 2.0)),
        ("3",): 0.0,
    }
    assert published["mobula_iterations"] == {(): 3}
    assert published["mobula_env_runners"] == {("wanted",): 3, ("healthy",): 2}
    assert published["mobula_env_runner_restarts"] == {(): 3}
    clock[0] += 30.0
    meter.publish()
    assert published["mobula_idle_seconds"] == {(): pytest.approx(30.0)}
    assert published["mobula_env_steps_per_second"] == {(): pytest.approx(600 / 5)}


def test_the_tags_say_which_run(published: Published) -> None:
    algorithm: Any = Algorithm()
    described = Meter(algorithm)._describe(algorithm)
    assert described == {"method": "Algorithm", "env": "grid", "run": "run-1", "trial": "-"}
    algorithm._storage = SimpleNamespace(
        storage_fs_path="/studies/of-mine", experiment_dir_name="tune", trial_dir_name="ab_00001"
    )
    algorithm.config.env = None
    described = Meter(algorithm)._describe(algorithm)
    assert (described["run"], described["trial"]) == ("of-mine/tune", "ab_00001")
    assert described["env"] == "data"
    named = meter_of(algorithm)
    named.name("my-run", recoveries=2)
    assert named._describe(algorithm)["run"] == "my-run" and meter_of(algorithm) is named
    named.publish()
    assert published["mobula_recoveries"] == {(): 2}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mobula metrics"]


def await_threads(before: list[threading.Thread]) -> None:
    deadline = time.monotonic() + 20
    while set(threads()) - set(before):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_is_published_as_long_as_it_lives(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first moment, through an iteration that hangs, until it is closed; the last numbers are published too."""
    monkeypatch.setattr(metrics, "PERIOD_SECONDS", 0.02)
    before = threads()
    algorithm = Algorithm(runners=2)
    meter = meter_of(algorithm)
    with meter:
        deadline = time.monotonic() + 20
        while published.get("mobula_idle_seconds", {}).get((), 0.0) < 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert published["mobula_iterations"] == {(): 0}
    monkeypatch.setattr(metrics, "PERIOD_SECONDS", 1000.0)
    for steps in (5, 6):
        meter.record({"env_runners": {"num_env_steps_sampled": 1, "num_env_steps_sampled_lifetime": steps}})
        algorithm.iteration += 1
    meter.close()
    assert published["mobula_env_steps"] == {(): 6.0} and published["mobula_iterations"] == {(): 2}
    meter.close()
    await_threads(before)


def test_an_algorithm_that_nobody_holds_is_no_longer_published(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PERIOD_SECONDS", 0.02)
    before = threads()
    algorithm = Algorithm()
    with meter_of(algorithm):
        pass
    assert set(threads()) - set(before)
    del algorithm
    gc.collect()
    await_threads(before)


def test_nothing_is_published_where_ray_is_not_there(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    algorithm = Algorithm()
    with meter_of(algorithm):
        pass
    meter_of(algorithm).record({"loss": 1.0})
    meter_of(algorithm).close()
    assert published == {}


def test_shards_are_gathered_in_their_order(
    ray_session: None, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    @ray.remote(num_cpus=0.1)
    def shard(index: int) -> int:
        if index < 0:
            raise ArithmeticError("a shard that fails")
        time.sleep(0.2 * (index == 0))
        return index

    ray.get([shard.remote(1) for _ in range(2)])
    assert gather([shard.remote(i) for i in range(3)], "alone") == [0, 1, 2]
    algorithm = Algorithm()
    meter = Meter(algorithm)
    monkeypatch.setattr(meter, "_start", lambda: None)
    with meter:
        assert gather([shard.remote(i) for i in range(3)], "people") == [0, 1, 2]
        assert gather([shard.remote(i) for i in range(3)], "people") == [0, 1, 2]
        with pytest.raises(ArithmeticError, match="a shard that fails"):
            gather([shard.remote(-1)], "broken")
    assert gather([shard.remote(1)], "after") == [1]
    meter.record({})
    meter.publish()
    assert published["mobula_shards"][("people", "all")] == 3
    assert published["mobula_shards"][("people", "working")] == 0
    seconds = published["mobula_shard_seconds"]
    assert {("people", str(i)) for i in range(3)} <= set(seconds)
    assert seconds["people", "0"] >= 0.2 > seconds["people", "1"]
    assert not any(group in ("alone", "after") for group, _ in published["mobula_shards"])


def test_calls_are_made_as_others_end(ray_session: None) -> None:
    """With a limit, no more calls are on at one time; answers stay in the order of the calls."""

    @ray.remote(num_cpus=0)
    class Counter:
        def __init__(self) -> None:
            self.on = self.most = 0

        def add(self, by: int) -> int:
            self.on += by
            self.most = max(self.most, self.on)
            return self.most

    counter: Any = Counter.remote()

    @ray.remote(num_cpus=0.1)
    def shard(index: int) -> int:
        ray.get(counter.add.remote(1))
        time.sleep(0.05)
        ray.get(counter.add.remote(-1))
        return index

    made = []

    def calls() -> Iterator[Any]:
        for index in range(5):
            made.append(index)
            yield shard.remote(index)

    assert gather(calls(), "few", limit=2) == [0, 1, 2, 3, 4]
    assert made == [0, 1, 2, 3, 4]
    assert 1 <= ray.get(counter.add.remote(0)) <= 2
    assert gather(iter(()), "none", limit=2) == []


def test_jobs_are_done_here_or_as_tasks(ray_session: None) -> None:
    jobs = [("a", "b"), ("c", "d"), ("e", "/f")]
    for workers in (0, 2):
        assert metrics.spread(posixpath.join, jobs, workers, "paths") == ["a/b", "c/d", "/f"]


def test_rllibs_own_algorithms_are_watched_once_beside_other_callbacks() -> None:
    from ray.rllib.algorithms.ppo import PPOConfig

    def mine(**kwargs: Any) -> None: ...

    config = PPOConfig().callbacks(on_train_result=mine)
    config.freeze()
    once = watched(config)
    assert once.callbacks_on_train_result == [mine, metrics._on_train_result]
    assert watched(once).callbacks_on_train_result == once.callbacks_on_train_result
    assert config.callbacks_on_train_result is mine


def test_rllibs_own_algorithms_publish(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Meter, "_start", lambda self: None)
    algorithm = Algorithm()
    metrics._on_train_result(
        algorithm=algorithm,
        metrics_logger=None,
        result={
            "training_iteration": 4,
            "time_this_iter_s": 8.0,
            "num_training_step_calls_per_iteration": 2,
            "timers": {"env_runner_sampling_timer": 1.5, "learner_update_timer": math.nan},
            "env_runners": {"num_env_steps_sampled": 80},
        },
    )
    meter_of(algorithm).publish()
    assert published["mobula_iterations"] == {(): 4}
    assert published["mobula_env_steps_per_second"] == {(): pytest.approx(10.0)}
    assert published["mobula_iteration_seconds"] == {
        ("sampling",): pytest.approx(3.0),
        ("rest",): pytest.approx(5.0),
    }
