"""What Prometheus and Grafana read: scrape file, alerts, provisioning, dashboards.

The files in dashboards/prometheus and dashboards/grafana are this module's, for the places below; `mobula dashboards --out FOLDER`
writes them for others.
"""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

import yaml

from mobula.dashboards.boards import BOARDS

RAY_FOLDER = "/tmp/ray"
"""Ray's temporary folder on the head node."""

BOARDS_FOLDER = "/etc/mobula/grafana/dashboards"
"""Where Grafana finds the dashboards."""

PROMETHEUS = "http://localhost:9090"

RUN = "method, env, run, trial"


def alerts() -> dict[str, Any]:
    """Prometheus' alerting rules."""

    def rule(name: str, query: str, lasts: str, severity: str, says: str) -> dict[str, Any]:
        return {
            "alert": name,
            "expr": query,
            "for": lasts,
            "labels": {"severity": severity},
            "annotations": {"summary": says},
        }

    of_run = "{{ $labels.run }} ({{ $labels.method }} on {{ $labels.env }}, trial {{ $labels.trial }})"
    idle = f"max by ({RUN}) (ray_mobula_idle_seconds)"
    iteration = f"sum by ({RUN}) (max by ({RUN}, part) (ray_mobula_iteration_seconds))"
    rules = [
        rule(
            "MobulaRunStalled",
            f"{idle} > 900 unless {idle} < 10 * {iteration}",
            "1m",
            "warning",
            f"{of_run} has ended no iteration for {{{{ $value | humanizeDuration }}}}, over ten times as long as one takes",
        ),
        rule(
            "MobulaEnvRunnersRestart",
            f"max by ({RUN}) (increase(ray_mobula_env_runner_restarts[15m])) > 3",
            "0m",
            "warning",
            f"env runners of {of_run} were started again {{{{ $value | humanize }}}} times in 15 minutes",
        ),
        rule(
            "MobulaNoHealthyEnvRunner",
            f'max by ({RUN}) (ray_mobula_env_runners{{state="healthy"}}) == 0'
            f' and max by ({RUN}) (ray_mobula_env_runners{{state="wanted"}}) > 0',
            "2m",
            "critical",
            f"{of_run} has no env runner left",
        ),
        rule(
            "MobulaRunRecovered",
            f"max by ({RUN}) (increase(ray_mobula_recoveries[1h])) > 0",
            "0m",
            "info",
            f"{of_run} lost a process that it cannot do without, and went on from its checkpoint",
        ),
    ]
    return {"groups": [{"name": "mobula", "rules": rules}]}


def scraping(ray_folder: str) -> dict[str, Any]:
    """Prometheus' configuration: the machines that Ray lists, and the alerts beside this file."""
    machines = PurePath(ray_folder) / "prom_metrics_service_discovery.json"
    # A link into the folder of the session: its changes are found by looking again, not by watching.
    discovery = {"files": [str(machines)], "refresh_interval": "30s"}
    return {
        "global": {"scrape_interval": "10s", "evaluation_interval": "10s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [discovery]}],
    }


def datasource(prometheus: str) -> dict[str, Any]:
    """Grafana's data source; not the default one, which may be Ray's."""
    source = {
        "name": "mobula",
        "uid": "mobula",
        "type": "prometheus",
        "access": "proxy",
        "url": prometheus,
        "isDefault": False,
        "jsonData": {"timeInterval": "10s"},
    }
    return {"apiVersion": 1, "datasources": [source]}


def providers(boards: str, ray_folder: str) -> dict[str, Any]:
    """Where Grafana finds dashboards: ours, and those that Ray writes for its session, in folders of their own."""
    rays = PurePath(ray_folder) / "session_latest" / "metrics" / "grafana" / "dashboards"
    return {
        "apiVersion": 1,
        "providers": [
            {"name": name, "folder": name, "type": "file", "options": {"path": str(path)}}
            for name, path in (("mobula", boards), ("Ray", rays))
        ],
    }


def files(
    *, ray_folder: str = RAY_FOLDER, boards: str = BOARDS_FOLDER, prometheus: str = PROMETHEUS
) -> dict[str, str]:
    """{path: text} of every file."""
    told = "# Written by `mobula dashboards`.\n"
    written = {
        "prometheus/prometheus.yml": scraping(ray_folder),
        "prometheus/alerts.yml": alerts(),
        "grafana/provisioning/datasources/mobula.yml": datasource(prometheus),
        "grafana/provisioning/dashboards/mobula.yml": providers(boards, ray_folder),
    }
    found = {path: told + yaml.safe_dump(data, sort_keys=False, width=200) for path, data in written.items()}
    for board in BOARDS:
        found[f"grafana/dashboards/{board.uid}.json"] = json.dumps(board.json(), indent=1) + "\n"
    return found
