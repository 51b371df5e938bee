"""What goes wrong on a cluster, and how training ends all the same."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces

from mobula import running
from mobula.algorithms.policy_gradient.baselines.ppo import PPOConfig
from mobula.errors import ClusterError, EnvironmentFault
from mobula.sampling.tensor_env import TensorEnv
from mobula.tracking import Tracker

BATCH = 8 * 32
"""Steps that one env runner samples in an iteration."""


def ppo(env: Any = "cartpole", runners: int = 0, env_config: Any = None, **settings: Any) -> Any:
    config = PPOConfig().environment(env, env_config=env_config or {})
    config.training(rollout_length=32, minibatch_size=128, num_epochs=2, **settings)
    config.env_runners(num_env_runners=runners, num_envs_per_env_runner=8, num_cpus_per_env_runner=0.5)
    return config.debugging(seed=0, log_level="ERROR")


def kill_actors(title: str, count: int = 1) -> None:
    """SIGKILL to actors of this test's Ray by the title of their processes."""
    import ray
    import psutil  # isort: skip  (Ray ships it)

    node = ray._private.worker._global_node
    (raylet,) = (p.process.pid for p in node.all_processes["raylet"])
    found = [p for p in psutil.Process(raylet).children(recursive=True) if title in " ".join(p.cmdline())]
    assert len(found) >= count, [p.cmdline() for p in psutil.Process(raylet).children(recursive=True)]
    for process in found[:count]:
        process.kill()


class Once:
    """A progress callback that acts once, after an iteration."""

    def __init__(self, iteration: int, act: Any) -> None:
        self.iteration, self.act = iteration, act

    def __call__(self, row: dict[str, float], share: float) -> None:
        if self.act is not None and row["training_iteration"] == self.iteration:
            act, self.act = self.act, None
            act()


# Processes ----------------------------------------------------------------------------------------------------


def test_an_env_runner_that_dies_is_replaced(ray_session: None, tmp_path: Path) -> None:
    run = running.train(
        ppo(runners=2),
        stop={"fault_tolerance/num_remote_worker_restarts": 1, "seconds": 200},
        out=tmp_path,
        track=False,
        progress=Once(2, lambda: kill_actors("TensorEnvRunner")),
    )
    assert run.status == "done" and run.recoveries == 0
    assert run.last["fault_tolerance/num_remote_worker_restarts"] == 1
    assert run.last["fault_tolerance/num_healthy_workers"] == 2
    sampled = [row["env_runners/num_env_steps_sampled"] for row in run.rows]
    assert sampled[0] == 2 * BATCH and min(sampled) == BATCH  # the other one went on alone
    assert "num_remote_worker_restarts" in (run.path / "progress.jsonl").read_text()


def test_a_run_that_loses_its_learner_goes_on_from_its_checkpoint(ray_session: None, tmp_path: Path) -> None:
    """And comes to the very numbers of a run that lost nothing."""
    options: dict[str, Any] = {
        "stop": {"iterations": 6},
        "out": tmp_path,
        "track": False,
        "checkpoint_every": 2,
        "evaluate": False,
    }
    config = ppo().learners(num_learners=1, num_cpus_per_learner=0.5)
    whole = running.train(config.copy(copy_frozen=False), **options)
    lost = running.train(
        config.copy(copy_frozen=False), progress=Once(5, lambda: kill_actors("_WrappedExecutable")), **options
    )
    assert lost.status == "done" and lost.recoveries == 1
    assert [row["training_iteration"] for row in lost.rows] == [1, 2, 3, 4, 5, 6]
    assert any("went on from iteration 4" in note for note in lost.notes)
    kept = json.loads((lost.path / "run.json").read_text())
    assert kept["recoveries"] == 1 and kept["status"] == "done"
    for name in ("learners/default_policy/entropy", "env_runners/episode_return_mean"):
        assert [row[name] for row in lost.rows] == [row[name] for row in whole.rows]
    assert running.read_progress(lost.path) == lost.rows


def test_a_run_that_loses_its_learner_too_often_ends_in_one_line(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"max_failures = 0.*mobula train --resume") as caught:
        running.train(
            ppo().learners(num_learners=1, num_cpus_per_learner=0.5),
            stop={"iterations": 50},
            out=tmp_path,
            track=False,
            max_failures=0,
            progress=Once(2, lambda: kill_actors("_WrappedExecutable")),
        )
    assert "\n" not in str(caught.value)
    (folder,) = tmp_path.glob("2*")
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


# Environments -------------------------------------------------------------------------------------------------


class Faulty(TensorEnv):
    """From step `at` on it raises, or hangs, once: when the file `mark` is not there yet, which it makes (how="always": every time)."""

    max_episode_steps, reward_range = 20, (0.0, 1.0)

    def __init__(self, num_envs: int = 1, *, mark: str, how: str, at: int = 40, **kwargs: Any) -> None:
        box = spaces.Box(-1.0, 1.0, (2,))
        super().__init__(num_envs, observation_space=box, action_space=spaces.Discrete(2), **kwargs)
        self.mark, self.how, self.at, self.taken = Path(mark), how, at, 0

    def initial(self, n: int) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(n, 2)}

    def transition(self, state: dict[str, torch.Tensor], action: torch.Tensor) -> Any:
        self.taken += 1
        if self.taken >= self.at and self.first():
            if self.how == "hang":
                time.sleep(3600)
            raise KeyError("the simulator lost its licence")
        over = torch.zeros(len(action), dtype=torch.bool)
        return {"x": state["x"]}, action.float(), over

    def first(self) -> bool:
        """Whether no other copy of it was faulty before; two env runners reach the step at the same time."""
        try:
            self.mark.touch(exist_ok=self.how == "always")
        except FileExistsError:
            return False
        return True

    def observe(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        return state["x"]


@pytest.mark.parametrize("runners", [0, 1])
def test_an_environment_that_raises_is_named(ray_session: None, tmp_path: Path, runners: int) -> None:
    config = ppo(Faulty, runners, {"mark": str(tmp_path / "mark"), "how": "raise"})
    with pytest.raises(EnvironmentFault) as caught:
        running.train(config, stop={"iterations": 10}, out=tmp_path, track=False)
    said = str(caught.value)
    assert (
        "KeyError ('the simulator lost its licence') at step 39" in said and f"env runner {runners}" in said
    )
    assert "restart_failed_sub_environments" in said and "\n" not in said


@pytest.mark.parametrize("runners", [0, 1])
def test_an_environment_that_raises_is_started_anew_when_asked(
    ray_session: None, tmp_path: Path, runners: int
) -> None:
    config = ppo(Faulty, runners, {"mark": str(tmp_path / "mark"), "how": "raise"})
    config.fault_tolerance(restart_failed_sub_environments=True)
    run = running.train(config, stop={"iterations": 4}, out=tmp_path, track=False, evaluate=False)
    assert run.last["env_runners/num_env_restarts_lifetime"] == 1
    assert [row["env_runners/num_env_steps_sampled"] for row in run.rows] == [BATCH] * 4


def test_an_environment_that_raises_again_and_again_ends_the_run(tmp_path: Path) -> None:
    config = ppo(Faulty, 0, {"mark": str(tmp_path / "mark"), "how": "always", "at": 3})
    config.fault_tolerance(restart_failed_sub_environments=True)
    with pytest.raises(EnvironmentFault, match="lost its licence"):
        running.train(config, stop={"iterations": 4}, out=tmp_path, track=False)


def test_an_environment_that_hangs_is_started_again(ray_session: None, tmp_path: Path) -> None:
    config = ppo(Faulty, 2, {"mark": str(tmp_path / "mark"), "how": "hang"})
    config.env_runners(sample_timeout_s=15)
    run = running.train(
        config,
        stop={"fault_tolerance/num_remote_worker_restarts": 1, "seconds": 250},
        out=tmp_path,
        track=False,
        evaluate=False,
    )
    assert (tmp_path / "mark").exists() and run.status == "done"
    assert run.last["fault_tolerance/num_remote_worker_restarts"] == 1
    sampled = [row["env_runners/num_env_steps_sampled"] for row in run.rows]
    assert set(sampled) == {BATCH, 2 * BATCH}


# Tracking -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """A real MLflow server on loopback that can go away and come back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}", "--workers", "1"),
                *("--artifacts-destination", str(self.folder / "artifacts")),
            ],
            # The server's job runners take as long to start as the server, and nothing here asks for them.
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.time() + 120
        while time.time() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError("the MLflow server did not start")

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    found = Server(folder)
    found.start()
    try:
        yield found
    finally:
        found.stop()


def test_an_mlflow_server_that_goes_away_loses_nothing(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr("mobula.tracking.RETRY_SECONDS", (0.2, 1.0))
    with server(tmp_path) as mlflow:

        def away_and_back(row: dict[str, float], share: float) -> None:
            if row["training_iteration"] == 3:
                mlflow.stop()
            if row["training_iteration"] == 8:
                mlflow.start()

        run = running.train(
            ppo(),
            stop={"iterations": 12},
            out=tmp_path,
            tracking_uri=mlflow.uri,
            progress=away_and_back,
        )
        assert run.status == "done"
        client = MlflowClient(tracking_uri=mlflow.uri)
        run_id = json.loads((run.path / "run.json").read_text())["tracking"]["run_id"]
        for name in ("training_iteration", "env_steps", "learners/default_policy/entropy"):
            history = client.get_metric_history(run_id, name)
            assert [point.value for point in history] == [row[name] for row in run.rows]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert client.list_artifacts(run_id, "policy")


def test_what_an_mlflow_server_missed_is_sent_later(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr("mobula.tracking.RETRY_SECONDS", (0.2, 1.0))
    monkeypatch.setitem(Tracker.end.__kwdefaults__, "patience", 0.5)
    with server(tmp_path) as mlflow:
        run = running.train(
            ppo(),
            stop={"iterations": 6},
            out=tmp_path,
            tracking_uri=mlflow.uri,
            progress=Once(3, mlflow.stop),
        )
        assert run.status == "done"
        mlflow.start()
        client = MlflowClient(tracking_uri=mlflow.uri)
        run_id = json.loads((run.path / "run.json").read_text())["tracking"]["run_id"]
        assert len(client.get_metric_history(run_id, "env_steps")) < 6
        assert running.send(run.path) == mlflow.uri
        history = client.get_metric_history(run_id, "env_steps")
        assert [point.value for point in history] == [row["env_steps"] for row in run.rows]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert {file.path for file in client.list_artifacts(run_id)} >= {"policy", "learning_curve.png"}
        # Sent again, nothing is doubled.
        running.send(run.path)
        assert len(client.get_metric_history(run_id, "env_steps")) == 6


# Documentation ------------------------------------------------------------------------------------------------


def test_every_test_that_the_table_of_faults_names_is_there() -> None:
    root = Path(__file__).parents[2]
    files = {file.name: file for file in (root / "tests").rglob("test_*.py")}
    named = re.findall(
        r"`(?:tests/)?(?:\w+/)?(test_\w+\.py)(?:::(test_\w+))?`", (root / "docs/faults.md").read_text()
    )
    assert len(named) >= 12
    for file, name in named:
        assert f"def {name or 'test_'}" in files[file].read_text(), (file, name)
