"""Three hosts with addresses of their own (network namespaces): training across them, with one cut off and then killed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobula import running

SUBNET = "10.77.91"
RAY = str(Path(sys.executable).with_name("ray"))


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """A switch and hosts in network namespaces of their own; nothing of the machine's own network is touched."""

    def __init__(self, count: int) -> None:
        self.tag = f"mob{secrets.token_hex(2)}"
        self.count = count
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="m-hosts-", dir="/tmp"))
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "OMP_NUM_THREADS": "1",
            # A host that is cut off is given up after some seconds rather than half a minute.
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "4",
        }

    def name(self, index: int | str) -> str:
        return f"{self.tag}-{index}"

    def address(self, index: int) -> str:
        return f"{SUBNET}.{index + 1}"

    def build(self) -> None:
        ip("netns", "add", self.name("sw"))
        ip("-n", self.name("sw"), "link", "add", "br0", "type", "bridge")
        ip("-n", self.name("sw"), "link", "set", "br0", "up")
        for index in range(self.count):
            host, port = self.name(index), f"port{index}"
            ip("netns", "add", host)
            ip(
                "-n",
                host,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                port,
                "netns",
                self.name("sw"),
            )
            ip("-n", host, "addr", "add", f"{self.address(index)}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", self.name("sw"), "link", "set", port, "master", "br0")
            ip("-n", self.name("sw"), "link", "set", port, "up")

    def on(self, index: int, command: list[str], **options: object) -> subprocess.Popen[bytes]:
        """A process of its own group on a host."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name(index), *command],
            env=self.environment,
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )

    def start_ray(self, index: int) -> None:
        common = [
            "--node-ip-address",
            self.address(index),
            "--object-store-memory",
            str(100 * 2**20),
            "--block",
        ]
        if index == 0:
            where = ["--head", "--port", "6399", "--include-dashboard", "false", "--num-cpus", "2"]
            where += ["--temp-dir", str(self.folder)]
        else:
            where = [
                "--address",
                f"{self.address(0)}:6399",
                "--num-cpus",
                "1",
                "--resources",
                '{"worker": 1}',
            ]
        log = (self.folder / f"host{index}.log").open("wb")
        self.processes[index] = self.on(
            index, [RAY, "start", *where, *common, "--disable-usage-stats"], stdout=log, stderr=log
        )
        told = self.folder / f"host{index}.log"
        deadline = time.time() + 240
        while "Ray runtime started" not in told.read_text():
            assert self.processes[index].poll() is None and time.time() < deadline, told.read_text()[-3000:]
            time.sleep(0.2)

    def mobula(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        """A command on the head."""
        log = (self.folder / "mobula.log").open("ab")
        return self.on(0, [sys.executable, "-m", "mobula.cli", *arguments], stdout=log, stderr=log)

    def cut_off(self, index: int) -> None:
        ip("-n", self.name("sw"), "link", "set", f"port{index}", "down")

    def kill(self, index: int) -> None:
        """Everything that runs on a host."""
        # Ray's daemons leave the process group; all that matters is in the namespace.
        found = subprocess.run(["ip", "netns", "pids", self.name(index)], capture_output=True, text=True)
        for pid in found.stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        process = self.processes.pop(index, None)
        if process is not None:
            process.wait()

    def close(self) -> None:
        for index in range(self.count):
            self.kill(index)
        for name in [*range(self.count), "sw"]:
            subprocess.run(["ip", "netns", "del", self.name(name)], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command `ip` (iproute2)")
    found = Hosts(3)
    try:
        found.build()
    except subprocess.CalledProcessError as error:
        found.close()
        pytest.skip(f"this machine does not let network namespaces be made: {error.stderr.strip()}")
    try:
        for index in range(3):
            found.start_ray(index)
        yield found
    finally:
        found.close()


def wait_for(what: str, done: object, seconds: float, hosts: Hosts) -> None:
    deadline = time.time() + seconds
    while time.time() < deadline:
        if done():  # type: ignore[operator]
            return
        time.sleep(0.2)
    raise AssertionError(f"{what} within {seconds} s\n{(hosts.folder / 'mobula.log').read_text()[-3000:]}")


def options(out: Path, address: str) -> list[str]:
    """Two env runners, one on each worker (the head has no `worker` resource)."""
    return [
        *("--address", address, "--num-env-runners", "2", "--placement", "env_runners.resources={worker: 1}"),
        *("--seed", "0", "--no-track", "-q", "--out", str(out)),
    ]


@pytest.mark.timeout(1500)
def test_training_across_hosts_goes_on_when_one_is_cut_off_and_killed(hosts: Hosts, tmp_path: Path) -> None:
    address = f"{hosts.address(0)}:6399"
    # mac, with nothing going wrong.
    first = hosts.mobula(
        ["train", "mac", "--env", "goal_grid", "--iterations", "8", *options(tmp_path / "mac", address)]
    )
    wait_for("mac trained", lambda: first.poll() is not None, 400, hosts)
    assert first.returncode == 0, (hosts.folder / "mobula.log").read_text()
    (mac,) = (tmp_path / "mac").glob("2*")
    rows = running.read_progress(mac)
    assert len(rows) == 8 and rows[-1]["fault_tolerance/num_healthy_workers"] == 2

    # PPO, while the last host is cut off and, when it is given up, killed.
    second = hosts.mobula(
        [
            *("train", "PPO", "--env", "cartpole", "--num-envs", "8", "--rollout-length", "32"),
            *("--minibatch-size", "128", "--num-epochs", "2", "--iterations", "300"),
            *("--set", "sample_timeout_s=30", *options(tmp_path / "ppo", address)),
        ]
    )

    def progress() -> list[dict[str, float]]:
        found = list((tmp_path / "ppo").glob("2*"))
        return running.read_progress(found[0]) if found else []

    wait_for("PPO's first iterations", lambda: len(progress()) >= 20 or second.poll() is not None, 400, hosts)
    assert progress()[-1]["fault_tolerance/num_healthy_workers"] == 2
    hosts.cut_off(2)
    at = len(progress())
    wait_for("PPO went on", lambda: len(progress()) >= at + 20 or second.poll() is not None, 400, hosts)
    hosts.kill(2)
    wait_for("PPO ended", lambda: second.poll() is not None, 400, hosts)
    assert second.returncode == 0, (hosts.folder / "mobula.log").read_text()
    (ppo,) = (tmp_path / "ppo").glob("2*")
    rows = running.read_progress(ppo)
    sampled = [row["env_runners/num_env_steps_sampled"] for row in rows]
    assert len(rows) == 300 and sampled[0] == 512 and sampled[-1] == 256
    assert rows[-1]["fault_tolerance/num_healthy_workers"] == 1
    about = json.loads((ppo / "run.json").read_text())
    assert about["status"] == "done" and about["recoveries"] == 0
    # What was learned counts: cart-poles stay up longer than at the start.
    assert rows[-1]["env_runners/episode_return_mean"] > 2 * rows[0]["env_runners/episode_return_mean"]
