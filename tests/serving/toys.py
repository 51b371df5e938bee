"""A planner and a mechanism small enough to be checked by hand, registered as another distribution would register its own."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from mobula.errors import ArtifactError, DataError
from mobula.serving.schemas import PlanRequest, PlanStep, Safety
from mobula.serving.services import PlanEnd, Settlement

MOVES = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


class GridPlanner:
    """Shortest ways on a grid, by breadth-first search; hazards in words are avoided where they can be."""

    kind: ClassVar[Any] = "planner"

    def __init__(self, size: int, walls: set[tuple[int, int]]) -> None:
        self.size, self.walls = size, walls

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any], device: str) -> GridPlanner:
        cells = json.loads((folder / "walls.json").read_text())
        if not isinstance(settings.get("size"), int):
            raise ArtifactError(f"{folder}: size is missing")
        return cls(settings["size"], {(int(x), int(y)) for x, y in cells})

    def _cell(self, text: str, field: str) -> tuple[int, int]:
        found = re.search(r"\((\d+), *(\d+)\)", text)
        if not found:
            raise DataError(f"{field}: no cell (x, y) in {text[:40]!r}")
        x, y = int(found[1]), int(found[2])
        if x >= self.size or y >= self.size:
            raise DataError(f"{field}: ({x}, {y}) lies outside the grid of {self.size}")
        return x, y

    def plan(self, request: PlanRequest) -> Iterator[str | PlanStep | PlanEnd]:
        goal, start = self._cell(request.goal, "goal"), self._cell(request.state or "(0, 0)", "state")
        yield f"From {start} to {goal}. "
        before: dict[tuple[int, int], tuple[tuple[int, int], str] | None] = {start: None}
        queue = deque([start])
        while queue and goal not in before:
            x, y = queue.popleft()
            for name, (dx, dy) in MOVES.items():
                cell = (x + dx, y + dy)
                inside = 0 <= cell[0] < self.size and 0 <= cell[1] < self.size
                if inside and cell not in self.walls and cell not in before:
                    before[cell] = ((x, y), name)
                    queue.append(cell)
        if goal not in before:
            yield "There is no way."
            yield PlanEnd(None, Safety(verdict="unknown", reasons=["the goal cannot be reached"]))
            return
        steps: list[PlanStep] = []
        at: tuple[int, int] = goal
        while (link := before[at]) is not None:
            steps.append(PlanStep(action=link[1], expectation=f"at {at}"))
            at = link[0]
        steps.reverse()
        if len(steps) > request.max_steps:
            raise DataError(f"max_steps: the shortest plan has {len(steps)} steps")
        yield f"The shortest way has {len(steps)} steps."
        yield from steps
        yield PlanEnd(float(len(steps)), Safety(verdict="safe", reasons=["no step enters a wall"]))


class Bids(BaseModel):
    """Sealed bids for one item."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"bids": {"ann": 3.0, "bob": 5.0, "cid": 4.0}}]}
    )

    bids: dict[str, float] = Field(min_length=1, max_length=1000, description="by participant, not negative")


class Vickrey:
    """The second-price auction (Vickrey 1961): the highest bid wins and pays the second highest; the seed breaks ties."""

    kind: ClassVar[Any] = "mechanism"
    reports = Bids

    def __init__(self, reserve: float) -> None:
        self.reserve = reserve

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any], device: str) -> Vickrey:
        return cls(float(settings["reserve"]))

    def run(self, reports: Bids, seed: int | None) -> Settlement:
        bids = reports.bids
        for name, bid in bids.items():
            if not 0 <= bid < 1e300:
                raise DataError(f"reports.bids: {name} bids {bid}; a number that is not negative is expected")
        best = max(bids.values())
        tied = sorted(name for name, bid in bids.items() if bid == best)
        winner = tied[(seed or 0) % len(tied)]
        others = [bid for name, bid in bids.items() if name != winner]
        price = max([self.reserve, *others])
        if best < self.reserve:
            return Settlement({"winner": None}, dict.fromkeys(bids, 0.0), {"reserve": self.reserve})
        return Settlement(
            {"winner": winner},
            {name: price if name == winner else 0.0 for name in bids},
            {"reserve": self.reserve, "tied": tied, "second": max(others, default=self.reserve)},
        )
