"""A cluster with something to see: `python workload.py FOLDER`, FOLDER being Ray's.

Runs of every shape that the dashboards tell apart, one that loses an env runner, and a service that also fails.  When all is done it
writes what happened to FOLDER/said.json, and stays until its input ends.
"""

from __future__ import annotations

import os
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

import ray
from ray import serve
from ray.rllib.algorithms.ppo import PPOConfig
from starlette.requests import Request

import mobula
from mobula import metrics
from mobula.files import write_json

import psutil  # isort: skip  (Ray ships it)

REPORT_SECONDS = 1.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
class Policy:
    async def __call__(self, request: Request) -> str:
        if "fail" in request.query_params:
            raise ValueError("asked to")
        return "0"


def request(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def kill_env_runner(row: dict[str, float], share: float) -> None:
    """SIGKILL to one env runner after the third iteration."""
    if row["training_iteration"] == 3:
        (raylet,) = (p.process.pid for p in ray._private.worker._global_node.all_processes["raylet"])
        runners = [
            p
            for p in psutil.Process(raylet).children(recursive=True)
            if "TensorEnvRunner" in " ".join(p.cmdline())
        ]
        runners[0].kill()


def trained(config: Any, stop: dict[str, float], out: Path, progress: Any = None) -> dict[str, float]:
    run = mobula.train(config, stop=stop, out=out, track=False, evaluate=False, progress=progress)
    return {"run": run.path.name, **run.last}  # type: ignore[dict-item]


def main(folder: Path) -> None:
    dashboard, port = free_port(), free_port()
    ray.init(
        num_cpus=4,
        include_dashboard=True,
        dashboard_port=dashboard,
        _metrics_export_port=free_port(),
        _temp_dir=str(folder),
        log_to_driver=False,
        logging_level="ERROR",
        _system_config={"metrics_report_interval_ms": int(1000 * REPORT_SECONDS)},
    )
    metrics.PERIOD_SECONDS = REPORT_SECONDS / 4
    said: dict[str, Any] = {"without a token": request(f"http://127.0.0.1:{dashboard}/api/jobs/")}

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Policy.bind(), name="policies", route_prefix="/act")
    url = f"http://127.0.0.1:{port}/act"
    said["requests"] = [request(url + "?fail" * (i % 10 == 9)) for i in range(40)]

    mac = mobula.config("mac").environment("goal_grid").debugging(seed=0, log_level="ERROR")
    mac.env_runners(num_env_runners=2, num_cpus_per_env_runner=0.5)
    stop = {"fault_tolerance/num_remote_worker_restarts": 1, "seconds": 120}
    said["mac"] = trained(mac, stop, folder / "runs", kill_env_runner)

    ppo = mobula.config("PPO").environment("cartpole").training(rollout_length=16, num_epochs=1)
    said["PPO"] = trained(ppo.debugging(seed=0, log_level="ERROR"), {"seconds": 4}, folder / "runs")

    games = mobula.config("mrpg").training(workers=2, chunk=64, batch=256, report_every=1)
    said["mrpg"] = trained(games.debugging(seed=0, log_level="ERROR"), {"seconds": 4}, folder / "runs")

    rllib = PPOConfig().environment("CartPole-v1").debugging(log_level="ERROR")
    rllib.env_runners(num_env_runners=1, num_cpus_per_env_runner=0.5)
    rllib.training(train_batch_size=200, minibatch_size=100, num_epochs=1)
    said["rllib:PPO"] = trained(rllib, {"seconds": 5}, folder / "runs")

    said["requests"] += [request(url + "?fail" * (i % 10 == 9)) for i in range(40)]
    write_json(folder / "said.json", said)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
