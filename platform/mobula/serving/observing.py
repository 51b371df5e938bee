"""What the service measures of itself, as metrics of Ray's own agents, and all of them in one page."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

import httpx
import ray
from ray.util.metrics import Counter

OURS = re.compile(r"^(?:# (?:HELP|TYPE) )?ray_(?:mobula_serve|serve)_")
"""Lines of Ray's metrics that are about serving."""


class Observer:
    """Counts requests by kind of route and status.  Their seconds Serve measures itself."""

    def __init__(self) -> None:
        self.requests = Counter(
            "mobula_serve_requests", "requests by kind of route and status", tag_keys=("scope", "status")
        )

    def __call__(self, counts: Mapping[tuple[str, int], int]) -> None:
        for (scope, status), number in counts.items():
            self.requests.inc(number, {"scope": scope, "status": str(status)})


async def scrape() -> str:
    """The serving metrics of every machine of the cluster, in Prometheus' text format, each description once."""
    places = {
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"]
    }
    async with httpx.AsyncClient(timeout=5.0) as client:
        pages = await asyncio.gather(*(client.get(place) for place in sorted(places)), return_exceptions=True)
    lines: list[str] = []
    described: set[str] = set()
    for page in pages:
        if isinstance(page, BaseException):
            lines.append(f"# a machine did not answer: {type(page).__name__}")
            continue
        for line in page.text.splitlines():
            if not OURS.match(line) or line in described:
                continue
            if line.startswith("#"):
                described.add(line)
            lines.append(line)
    return "\n".join(lines) + "\n"
