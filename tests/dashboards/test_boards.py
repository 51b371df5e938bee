"""The committed dashboards, alerts and provisioning: up to date, well formed, and asking for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobula.dashboards.__main__ import main
from mobula.dashboards.boards import BOARDS
from mobula.dashboards.files import alerts, files
from mobula.errors import StorageError
from mobula.metrics import GAUGES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "dashboards"

RAYS_OWN = {
    "ray_rllib_env_runner_num_env_steps_sampled_counter_total",
    "ray_serve_deployment_error_counter_total",
    "ray_serve_deployment_processing_latency_ms_bucket",
    "ray_serve_deployment_queued_queries",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_request_counter_total",
    "ray_serve_http_request_latency_ms_bucket",
    "ray_serve_num_http_error_requests_total",
    "ray_serve_num_http_requests_total",
    "ray_serve_replica_processing_queries",
}
"""Metrics of Ray 2.60 that the dashboards use; test_prometheus.py finds each of them in a running cluster."""

KEYWORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "bool", "offset"}

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)"
)


def names(query: str) -> set[str]:
    """The metrics that a PromQL query, or Grafana's label_values(metric, label), asks for."""
    query = re.sub(r"^label_values\((.*), \w+\)$", r"\1", query)
    for dropped in (r'"[^"]*"', r"\{[^}]*\}", r"\[[^]]*\]", r"\b(by|without) \([^)]*\)"):
        query = re.sub(dropped, " ", query)
    words = re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", query)
    return set(words) - KEYWORDS


def queries() -> list[str]:
    asked = [query for board in BOARDS for panel in board.panels for query in panel.queries.values()]
    asked += [query for board in BOARDS for query in board.variables.values()]
    return asked + [rule["expr"] for group in alerts()["groups"] for rule in group["rules"]]


def test_names_are_read_out_of_queries() -> None:
    assert names('max by (run) (a_b{x="c", y=~"d.*"}) / sum(rate(e:f[5m])) > 3 unless g offset 5m') >= {
        "a_b",
        "e:f",
        "g",
    }
    assert names('label_values(h{x="y"}, run)') == {"h"}
    assert not names("max by (run) (vector(1))")


def test_every_metric_that_is_asked_for_exists() -> None:
    known = {f"ray_{name}" for name in GAUGES} | RAYS_OWN
    asked = {name for query in queries() for name in names(query)}
    assert asked <= known
    # And nothing is published, or listed, that nobody looks at.
    assert asked == known


def test_the_committed_files_are_those_that_are_generated() -> None:
    written = {
        str(file.relative_to(FOLDER)): file.read_text(encoding="utf-8")
        for folder in ("prometheus", "grafana")
        for file in (FOLDER / folder).rglob("*")
        if file.is_file()
    }
    assert written == files(), "python -m mobula.dashboards --out dashboards --boards-at /etc/mobula/..."


def test_dashboards_are_well_formed() -> None:
    boards = [json.loads(text) for path, text in files().items() if path.endswith(".json")]
    uids = [board["uid"] for board in boards]
    # Ray's own begin with "ray".
    assert len(set(uids)) == len(uids) == 3 and all(re.fullmatch(r"mobula-[a-z]+", uid) for uid in uids)
    for board in boards:
        panels: list[dict[str, Any]] = board["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        assert len({panel["title"] for panel in panels}) == len(panels)
        cells = [
            (column, row)
            for panel in panels
            for at in [panel["gridPos"]]
            for column in range(at["x"], at["x"] + at["w"])
            for row in range(at["y"], at["y"] + at["h"])
        ]
        assert len(set(cells)) == len(cells) and max(column for column, _ in cells) < 24
        declared = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval"}
        for panel in panels:
            assert panel["description"] and panel["targets"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            for target in panel["targets"]:
                assert set(re.findall(r"\$(\w+)", target["expr"])) <= declared
                # A legend names labels that the query keeps.
                for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                    assert re.search(rf"by \([^)]*\b{label}\b[^)]*\)", target["expr"]), (label, target)


def test_nothing_takes_the_place_of_rays_own() -> None:
    from ray.dashboard.modules.metrics import templates
    from ray.dashboard.modules.metrics.grafana_dashboard_factory import generate_default_grafana_dashboard

    _, uid = generate_default_grafana_dashboard()
    made = files()
    assert f"/d/{uid}" in made["grafana/dashboards/mobula-runs.json"]
    source = yaml.safe_load(made["grafana/provisioning/datasources/mobula.yml"])["datasources"][0]
    rays = yaml.safe_load(
        templates.GRAFANA_DATASOURCE_TEMPLATE("Prometheus", "http://localhost:9090", {}, {})
    )
    assert source["name"] != rays["datasources"][0]["name"] and not source["isDefault"]
    providers = yaml.safe_load(made["grafana/provisioning/dashboards/mobula.yml"])["providers"]
    assert [(p["name"], p["folder"]) for p in providers] == [("mobula", "mobula"), ("Ray", "Ray")]


def test_every_panel_is_explained() -> None:
    text = (ROOT / "docs" / "dashboards.md").read_text(encoding="utf-8")
    missing = [p.title for board in BOARDS for p in board.panels if f"| {p.title} |" not in text]
    missing += [r["alert"] for g in alerts()["groups"] for r in g["rules"] if f"`{r['alert']}`" not in text]
    assert not missing


def test_files_are_written_for_other_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path), "--ray-folder", "/scratch/ray", "--prometheus", "http://prometheus:9090"])
    scraping = yaml.safe_load((tmp_path / "prometheus/prometheus.yml").read_text())
    (job,) = scraping["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/scratch/ray/prom_metrics_service_discovery.json"]
    source = yaml.safe_load((tmp_path / "grafana/provisioning/datasources/mobula.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    providers = yaml.safe_load((tmp_path / "grafana/provisioning/dashboards/mobula.yml").read_text())
    ours, rays = (Path(provider["options"]["path"]) for provider in providers["providers"])
    assert {file.name for file in ours.iterdir()} == {f"{board.uid}.json" for board in BOARDS}
    assert rays == Path("/scratch/ray/session_latest/metrics/grafana/dashboards")
    said = capsys.readouterr().out
    assert str(tmp_path / "prometheus/prometheus.yml") in said and "127.0.0.1" in said

    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        main(["--out", str(tmp_path / "file")])


@promtool
def test_prometheus_takes_its_files() -> None:
    check = ["promtool", "check", "config", str(FOLDER / "prometheus" / "prometheus.yml")]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0 and "4 rules found" in done.stdout, done.stdout + done.stderr


@promtool
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """Rules against series that are written down, minute by minute."""
    run = 'method="mac",env="grid",run="r",trial="-"'

    def series(gauge: str, values: str, own: str = "") -> dict[str, str]:
        return {"series": f"ray_mobula_{gauge}{{{run}{own}}}", "values": values}

    def fires(name: str, minute: int, summary: str | None) -> dict[str, Any]:
        found = next(r for g in alerts()["groups"] for r in g["rules"] if r["alert"] == name)
        labels = {"method": "mac", "env": "grid", "run": "r", "trial": "-", **found["labels"]}
        expected = [{"exp_labels": labels, "exp_annotations": {"summary": summary}}] if summary else []
        return {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": expected}

    def case(given: list[dict[str, str]], *expected: dict[str, Any]) -> dict[str, Any]:
        return {"interval": "1m", "input_series": given, "alert_rule_test": list(expected)}

    stalled, none, recovered, restarts = (
        "MobulaRunStalled",
        "MobulaNoHealthyEnvRunner",
        "MobulaRunRecovered",
        "MobulaEnvRunnersRestart",
    )
    who = "r (mac on grid, trial -)"
    longer = "over ten times as long as one takes"
    lost = f"{who} lost a process that it cannot do without, and went on from its checkpoint"

    idle = series("idle_seconds", "0+60x60")
    quick = [series("iteration_seconds", "20x60", f',part="{p}"') for p in ("sampling", "learning", "rest")]
    slow = [series("iteration_seconds", "200x60", ',part="sampling"')]

    def runners(wanted: str, healthy: str) -> list[dict[str, str]]:
        return [
            series("env_runners", wanted, ',state="wanted"'),
            series("env_runners", healthy, ',state="healthy"'),
        ]

    cases = [
        case(
            [idle, *quick],
            fires(stalled, 15, None),
            fires(stalled, 18, f"{who} has ended no iteration for 18m 0s, {longer}"),
        ),
        case(
            [idle, *slow],
            fires(stalled, 33, None),
            fires(stalled, 36, f"{who} has ended no iteration for 36m 0s, {longer}"),
        ),
        case([idle], fires(stalled, 18, f"{who} has ended no iteration for 18m 0s, {longer}")),
        case(
            runners("2x35", "2x5 0x30"), fires(none, 5, None), fires(none, 9, f"{who} has no env runner left")
        ),
        case(runners("0x30", "0x30"), fires(none, 20, None)),
        case([series("recoveries", "0x10 1x120")], fires(recovered, 9, None), fires(recovered, 12, lost)),
        case([series("env_runner_restarts", "0x10 1x30")], fires(restarts, 20, None)),
        case(
            [series("env_runner_restarts", "0x10 0+1x30")],
            fires(restarts, 20, f"env runners of {who} were started again 9 times in 15 minutes"),
        ),
    ]
    file = tmp_path / "alerts_test.yml"
    rules = str(FOLDER / "prometheus" / "alerts.yml")
    file.write_text(yaml.safe_dump({"rule_files": [rules], "tests": cases}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
