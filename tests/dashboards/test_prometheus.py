"""A real Prometheus on a real cluster: every query of every dashboard is answered, with data."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobula.dashboards.boards import BOARDS
from mobula.dashboards.panels import Board, Panel

FOLDER = Path(__file__).parents[2] / "dashboards" / "prometheus"
WORKLOAD = Path(__file__).with_name("workload.py")

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian's package prometheus)"
)


@dataclass
class Seen:
    """A Prometheus that has watched the workload from `begun` to `ended`, and what the workload says of itself."""

    address: str
    begun: float
    ended: float
    said: dict[str, Any]

    def ask(self, path: str, **arguments: Any) -> Any:
        """`data` of the answer of its HTTP API; an error of a query fails the test with its text."""
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(arguments, doseq=True)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{arguments}: {error.read().decode()}")

    def series(self, query: str) -> list[dict[str, Any]]:
        """Every series that `query` had at some time of the workload."""
        found = self.ask("query_range", query=query, start=self.begun, end=self.ended, step=1)["result"]
        return found  # type: ignore[no-any-return]

    def values(self, query: str) -> list[float]:
        return [float(value) for series in self.series(query) for _, value in series["values"]]


def await_(what: str, done: Any, seconds: float, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, f"ended while waiting for {what}: {process.args}"
        assert time.monotonic() < deadline, f"no {what} after {seconds:g} s"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    # Socket paths must stay short: not below pytest's own folder.
    folder = Path(tempfile.mkdtemp(prefix="m-seen-", dir="/tmp"))
    ray_folder = folder / "ray"
    ray_folder.mkdir()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    scraping = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    # The committed file, with Ray's folder of this test, and its intervals in seconds instead of tens of them.
    scraping["global"] = {name: "1s" for name in scraping["global"]}
    discovery = scraping["scrape_configs"][0]["file_sd_configs"][0]
    discovery |= {"files": [str(ray_folder / Path(discovery["files"][0]).name)], "refresh_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(scraping))
    shutil.copy(FOLDER / "alerts.yml", folder)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    begun = time.time()
    with (
        (folder / "prometheus.log").open("wb") as told,
        (folder / "workload.log").open("wb") as printed,
        subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=told,
            stderr=told,
        ) as prometheus,
        subprocess.Popen(
            [sys.executable, str(WORKLOAD), str(ray_folder)],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            env=environment,
        ) as workload,
    ):
        try:
            await_("end of the workload", (ray_folder / "said.json").exists, 250, workload)
            said = json.loads((ray_folder / "said.json").read_text())
            # Two reports of Ray and two scrapes: what was counted last has arrived.
            time.sleep(4)
            yield Seen(f"http://127.0.0.1:{port}", begun, time.time(), said)
        except BaseException:
            print(
                (folder / "workload.log").read_text()[-4000:], (folder / "prometheus.log").read_text()[-2000:]
            )
            raise
        finally:
            prometheus.terminate()
            workload.stdin.close()  # type: ignore[union-attr]
            with suppress(subprocess.TimeoutExpired):
                workload.wait(60)
            workload.kill()
    shutil.rmtree(folder, ignore_errors=True)


def asked(query: str) -> str:
    """A query as Grafana sends it when everything is chosen."""
    return re.sub(r"\$(method|run|metric|application)\b", ".*", query.replace("$__rate_interval", "30s"))


def test_every_machine_is_scraped(seen: Seen) -> None:
    targets = seen.ask("targets", state="active")["activeTargets"]
    assert targets and all(target["health"] == "up" for target in targets), targets
    # Ray asks for its token everywhere but at the metrics, which Prometheus reads without one.
    assert seen.said["without a token"] == 401


@pytest.mark.parametrize(
    ("board", "panel"), [pytest.param(b, p, id=f"{b.uid}: {p.title}") for b in BOARDS for p in b.panels]
)
def test_every_panel_shows_something(seen: Seen, board: Board, panel: Panel) -> None:
    for legend, query in panel.queries.items():
        series = seen.series(asked(query))
        assert series, query
        for name in re.findall(r"\{\{(\w+)\}\}", legend):
            assert all(found["metric"].get(name) for found in series), (name, series)
        assert not all(math.isnan(float(value)) for found in series for _, value in found["values"]), query


@pytest.mark.parametrize(
    ("name", "query"),
    [pytest.param(n, q, id=f"{b.uid}: {n}") for b in BOARDS for n, q in b.variables.items()],
)
def test_every_variable_has_values(seen: Seen, name: str, query: str) -> None:
    match = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    assert match is not None
    assert seen.ask(f"label/{match[2]}/values", **{"match[]": asked(match[1])})


def test_the_alerts_are_evaluated(seen: Seen) -> None:
    rules = [rule for group in seen.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == 4 and all(rule["health"] == "ok" for rule in rules), rules


def test_what_is_shown_is_what_happened(seen: Seen) -> None:
    mac = seen.said["mac"]
    chosen = f'{{method="mac", env="goal_grid", run="{mac["run"]}", trial="-"}}'
    assert max(seen.values(f"ray_mobula_iterations{chosen}")) == mac["training_iteration"]
    steps = seen.values(f"ray_mobula_env_steps{chosen}")
    assert steps == sorted(steps) and steps[-1] == mac["env_steps"]
    assert seen.values(f"ray_mobula_env_runner_restarts{chosen}")[-1] == 1
    healthy = seen.series(f"ray_mobula_env_runners{chosen[:-1]}, state='healthy'}}")
    assert {float(v) for s in healthy for _, v in s["values"]} <= {0, 1, 2}
    runners = seen.series(f"ray_mobula_env_runner_steps_per_second{chosen}")
    assert {series["metric"]["runner"] for series in runners} == {"1", "2"}
    parts = seen.series(f"ray_mobula_iteration_seconds{chosen}")
    assert {series["metric"]["part"] for series in parts} == {"sampling", "learning", "rest"}

    returns = f'ray_mobula_score{{run="{seen.said["PPO"]["run"]}", metric="return"}}'
    assert seen.values(returns)[-1] == pytest.approx(seen.said["PPO"]["env_runners/episode_return_mean"])
    mrpg = seen.said["mrpg"]
    errors = 'ray_mobula_score{method="mrpg", metric="largest error of a learned gain"}'
    assert seen.values(errors)[-1] == pytest.approx(mrpg["error"])
    shards = seen.series('ray_mobula_shard_seconds{method="mrpg", group="rollouts"}')
    assert {series["metric"]["shard"] for series in shards} == {"0", "1"}
    rllib = seen.said["rllib:PPO"]
    assert seen.values('ray_mobula_iterations{method="rllib:PPO"}')[-1] == rllib["training_iteration"]

    requests = seen.said["requests"]
    for code in ("200", "500"):
        counted = seen.values(f'sum(ray_serve_num_http_requests_total{{route="/act", status_code="{code}"}})')
        assert counted[-1] == requests.count(int(code))


def test_a_run_that_has_ended_leaves(seen: Seen) -> None:
    """Its series stop, so that long-lived clusters do not fill up, and nothing looks as if it were still on."""
    deadline = time.monotonic() + 60
    while seen.ask("query", query='ray_mobula_iterations{method="mac"}')["result"]:
        assert time.monotonic() < deadline
        time.sleep(1)
    # The machine that published them is still there.
    assert seen.ask("query", query="ray_serve_deployment_replica_healthy")["result"]
