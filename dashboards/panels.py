"""Grafana dashboards as declarations: a panel is its question and its queries, a board its panels in rows of 24 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """A panel.

    title    what it shows
    meaning  what it tells, and what to do when it looks bad (shown behind the panel's "i")
    queries  {legend: PromQL}; "{{label}}" in a legend is the label's value
    unit     Grafana's name of a unit ("s", "ms", "percentunit", "short")
    kind     "timeseries", or "stat": one number
    """

    title: str
    meaning: str
    queries: Mapping[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 12
    height: int = 8
    stack: bool = False

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """Grafana's JSON, at column `x` of row `y`."""
        options: dict[str, Any]
        defaults: dict[str, Any] = {"unit": self.unit, "color": {"mode": "palette-classic"}}
        if self.kind == "stat":
            options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
        else:
            options = {
                "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull"]},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
            defaults["custom"] = {
                "lineWidth": 1,
                "fillOpacity": 30 if self.stack else 0,
                "showPoints": "auto",
                "stacking": {"mode": "normal" if self.stack else "none"},
            }
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.meaning,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": options,
            "targets": [
                {
                    "refId": chr(ord("A") + i),
                    "datasource": DATASOURCE,
                    "expr": query,
                    "legendFormat": legend,
                    "range": True,
                }
                for i, (legend, query) in enumerate(self.queries.items())
            ],
        }


@dataclass(frozen=True)
class Board:
    """A dashboard.  variables: {name: PromQL of its values, `label_values(...)`}, each for choosing several."""

    uid: str
    title: str
    panels: Sequence[Panel]
    variables: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Grafana's JSON."""
        panels, x, y, deepest = [], 0, 0, 0
        for number, panel in enumerate(self.panels, 1):
            if x + panel.width > 24:
                x, y = 0, deepest
            panels.append(panel.json(number, x, y))
            x, deepest = x + panel.width, max(deepest, y + panel.height)
        choices = [
            {
                "name": name,
                "type": "query",
                "datasource": DATASOURCE,
                "query": {"query": query, "refId": name},
                "refresh": 2,
                "sort": 1,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",
                "current": {"text": ["All"], "value": ["$__all"]},
            }
            for name, query in self.variables.items()
        ]
        return {
            "uid": self.uid,
            "title": self.title,
            "tags": ["mobula"],
            "schemaVersion": 39,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"},
            "links": [
                {"type": "dashboards", "title": "mobula", "tags": ["mobula"], "keepTime": True},
                {
                    "type": "link",
                    "title": "Ray: machines and memory",
                    "url": "/d/rayDefaultDashboard",
                    "keepTime": True,
                },
            ],
            "templating": {
                "list": [
                    {"name": "datasource", "label": "source", "type": "datasource", "query": "prometheus"},
                    *choices,
                ]
            },
            "panels": panels,
        }
