"""`mobula submit` on a local cluster of two nodes, with its token."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobula import running
from mobula.cluster import jobs
from mobula.cluster.local import LocalCluster
from mobula.errors import ConfigError

MOBULA = [sys.executable, "-m", "mobula.cli"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(2, cpus_per_node=2, resources={"room": 1}, dashboard=True) as found:
        yield found


def mobula(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MOBULA, *arguments], env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=200
    )


def one_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("mobula:")]
    assert text.strip().endswith(line)
    return line


# Jobs ---------------------------------------------------------------------------------------------------------


def test_a_job_trains_with_the_tree_that_it_was_sent_from(cluster: LocalCluster, tmp_path: Path) -> None:
    """Two env runners, one on each node; the log is streamed, the status returned, the run kept where it was asked for."""
    done = mobula(
        *("submit", "--address", cluster.jobs_address, "--", "train", "mac", "--env", "goal_grid"),
        *("--num-env-runners", "2", "--placement", "env_runners.resources={room: 1}", "--iterations", "4"),
        *("--seed", "1", "--no-track", "-q", "--out", str(tmp_path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = tmp_path.glob("2*")
    assert str(run) in done.stdout
    rows = running.read_progress(run)
    assert len(rows) == 4 and rows[-1]["fault_tolerance/num_healthy_workers"] == 2


def test_a_user_s_mistake_is_the_job_s_exit_status(cluster: LocalCluster, tmp_path: Path) -> None:
    done = mobula(
        *(
            "submit",
            "--address",
            cluster.jobs_address,
            "--no-wheel",
            "--",
            "train",
            "mac",
            "--env",
            "goal_gird",
        ),
        *("--out", str(tmp_path)),
    )
    assert done.returncode == 2
    assert "Did you mean 'goal_grid'" in done.stdout


def test_ray_s_own_command_works_too(cluster: LocalCluster, tmp_path: Path) -> None:
    """As the README of Ray's users writes it, on machines that have mobula installed."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster.jobs_address),
            *("--working-dir", str(tmp_path), "--", "mobula", "train", "mac", "--env", "goal_grid"),
            *("--iterations", "3", "--no-track", "-q", "--out", str(tmp_path / "runs")),
        ],
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").glob("2*")
    assert len(running.read_progress(run)) == 3


def test_ctrl_c_stops_the_job_when_asked(cluster: LocalCluster, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(*MOBULA, "submit", "--address", cluster.jobs_address, "--no-wheel", "--stop-on-interrupt"),
            *("--submission-id", "to-be-stopped", "--", "train", "mac", "--env", "goal_grid"),
            *("--stop", "env_steps=100000000", "--no-track", "-q", "--out", str(tmp_path)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores SIGINT, and what it starts would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 150
    while not list(tmp_path.glob("*/progress.jsonl")) and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "job to-be-stopped is stopped" in said
    found = jobs.client(cluster.jobs_address)
    while not found.get_job_status("to-be-stopped").is_terminal() and time.time() < deadline:
        time.sleep(0.2)
    assert found.get_job_status("to-be-stopped") == "STOPPED"


# Tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["wrong", "missing"])
def test_without_the_token_every_command_says_so_in_one_line(
    cluster: LocalCluster, tmp_path: Path, token: str
) -> None:
    env = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    if token == "wrong":
        env["RAY_AUTH_TOKEN"] = "0" * 32
    for command in (
        ["submit", "--address", cluster.jobs_address, "--no-wheel", "--", "methods"],
        [
            "train",
            "mac",
            "--env",
            "goal_grid",
            "--address",
            cluster.address,
            "--no-track",
            "-q",
            "--out",
            str(tmp_path),
        ],
    ):
        done = mobula(*command, env=env)
        assert done.returncode == 2
        assert re.search(r"token.*RAY_AUTH_TOKEN_PATH.*~/.ray/auth_token", one_line(done.stderr))
        assert "Traceback" not in done.stderr


def test_an_address_without_a_job_server(cluster: LocalCluster) -> None:
    done = mobula("submit", "--address", cluster.address, "--no-wheel", "--", "methods")
    assert done.returncode == 2 and "no dashboard of Ray answers" in one_line(done.stderr)


# Nodes --------------------------------------------------------------------------------------------------------


def test_a_node_is_added_and_killed(cluster: LocalCluster) -> None:
    def alive() -> int:
        return len(cluster._cluster.global_state._live_node_ids())

    assert alive() == 2
    index = cluster.add_node()
    assert alive() == 3
    cluster.remove_node(index, kill=True)
    deadline = time.time() + 60
    while alive() == 3 and time.time() < deadline:
        time.sleep(0.5)
    assert alive() == 2
    with pytest.raises(ConfigError, match="removed already"):
        cluster.remove_node(index)


# Without a cluster --------------------------------------------------------------------------------------------


def test_what_is_shipped() -> None:
    with jobs.shipped(jobs.source_tree()) as modules:
        package, metadata = (Path(module) for module in modules)
        assert package.name == "mobula" and (package / "algorithms" / "policy_gradient" / "mac.py").is_file()
        assert (package / "py.typed").is_file()
        assert "mobula.methods" in (metadata / "entry_points.txt").read_text()
    assert not package.exists()


def test_a_tree_that_cannot_be_built(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mobula"\nversion = "not a version"\n')
    assert jobs.source_tree(tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="no wheel could be built"), jobs.shipped(tmp_path):
        pass


def test_where_a_job_keeps_its_runs() -> None:
    assert jobs.entrypoint(["train", "mac"]).endswith('train mac --out "$HOME/mobula-runs"')
    assert jobs.entrypoint(["mobula", "train", "mac", "--out", "/nfs/my runs"]).endswith(
        "--out '/nfs/my runs'"
    )
    assert jobs.entrypoint(["train", "--resume", "/nfs/run"]).endswith("--resume /nfs/run")
    assert jobs.entrypoint(["methods"]) == "python -m mobula.cli methods"
    for out in (["--out", "runs"], ["--out=runs"]):
        with pytest.raises(ConfigError, match="absolute folder"):
            jobs.entrypoint(["train", "mac", *out])
    with pytest.raises(ConfigError, match="nothing to submit"):
        jobs.entrypoint([])
