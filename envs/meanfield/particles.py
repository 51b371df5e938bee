"""A population of very many agents in a finite mean-field game, as particles in blocks (see `blocks`), spread over Ray actors.

Agents are sorted by label, so a block is a range of labels.  At each step every block returns its histogram (cells x states);
the driver forms z = W mu of them and sends it back: traffic does not depend on the number of agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobula.envs.meanfield import graphon
from mobula.envs.meanfield.blocks import BLOCK, Spread, generator, sizes
from mobula.envs.meanfield.graphon import FiniteMFG
from mobula.errors import ConfigError, DataError
from mobula.files import replaced_folder, write_json


class Particles:
    """The agents of some blocks: label [n] float32, state [n] int16 each."""

    def __init__(
        self, blocks: Sequence[tuple[int, int, int]], mu0: Tensor, pi: Tensor, agents: int, seed: int
    ) -> None:
        """blocks: (index, first agent, agents) of each; mu0 [M, S] initial laws; pi [M, H, S, A]."""
        self.blocks = list(blocks)
        self.cells, self.states = mu0.shape
        self.label, self.cell = [], []
        for _, start, count in self.blocks:
            label = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) / agents
            self.label.append(label.float())
            self.cell.append((label * self.cells).to(torch.int32).clamp_(max=self.cells - 1))
        self.restart(mu0, pi, seed)

    def restart(self, mu0: Tensor, pi: Tensor, seed: int) -> list[Tensor]:
        """Everybody begins anew in a draw of mu0, and follows pi from now on; then `histograms`."""
        self.policy, self.seed = pi, seed
        first = mu0.cumsum(-1)[:, :-1].float()
        self.state = [
            _draw(first, cell, generator(seed, index, 0)).to(torch.int16)
            for (index, _, _), cell in zip(self.blocks, self.cell, strict=True)
        ]
        return self.histograms()

    def histograms(self) -> list[Tensor]:
        """Counts [M, S] of each block."""
        bins = self.cells * self.states
        return [
            torch.bincount(cell * self.states + state, minlength=bins).view(self.cells, self.states)
            for cell, state in zip(self.cell, self.state, strict=True)
        ]

    def step(self, h: int, P: Tensor) -> list[Tensor]:
        """Everybody acts and moves by the rows P [M, S, A, S] of step h; then `histograms`."""
        S, A = self.states, self.policy.shape[-1]
        act = self.policy[:, h].cumsum(-1)[..., :-1].reshape(-1, A - 1).float()
        move = P.cumsum(-1)[..., :-1].reshape(-1, S - 1).float()
        for k, (index, _, _) in enumerate(self.blocks):
            g = generator(self.seed, index, h + 1)
            row = self.cell[k] * S + self.state[k]
            self.state[k] = _draw(move, row * A + _draw(act, row, g), g).to(torch.int16)
        return self.histograms()

    def arrays(self) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """(label, state) of each block."""
        return [(a.numpy(), b.numpy()) for a, b in zip(self.label, self.state, strict=True)]

    def put(self, states: Sequence[np.ndarray[Any, Any]]) -> list[None]:
        """Sets the states of all blocks of the population; each holder takes its own."""
        for k, (index, _, _) in enumerate(self.blocks):
            self.state[k] = torch.from_numpy(states[index].astype(np.int16))
        return [None] * len(self.blocks)


def _draw(table: Tensor, row: Tensor, g: torch.Generator) -> Tensor:
    """Inverse-CDF draws [n] int32: table [rows, K - 1] of cumulative probabilities without the last, row [n] int32."""
    u = torch.rand(len(row), generator=g)
    found = torch.zeros(len(row), dtype=torch.int32)
    # A column at a time: each is one gather and one comparison, and most tables have very few.
    for column in table.unbind(-1):
        found += u > column.contiguous().index_select(0, row)
    return found


class ParticlePopulation:
    """n agents of a game under a policy.

    actors  Ray actors that hold the blocks (0: this process); nothing that is computed depends on their number
    """

    def __init__(
        self,
        game: FiniteMFG,
        pi: Tensor,
        agents: int,
        *,
        seed: int = 0,
        actors: int = 0,
        block: int = BLOCK,
    ) -> None:
        if agents < 2:
            raise ConfigError(f"a population of {agents} agents: at least 2 are needed")
        self.game, self.agents, self.seed, self.h = game, agents, seed, 0
        shares = [(index, index * block, count) for index, count in sizes(agents, block)]
        self.spread = Spread(Particles, shares, actors, game.mu0, pi, agents, seed)
        self.block = block
        self._now = self._sum(self.spread.call("histograms"))

    def _sum(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum(0).double() / self.agents

    @property
    def mass(self) -> Tensor:
        """Share of all agents in every cell and state, [M, S]."""
        return self._now

    def restart(self, game: FiniteMFG, pi: Tensor, seed: int) -> None:
        """Everybody at the beginning of the game (of as many cells, states and actions) under pi: what a new population would be."""
        self.game, self.seed, self.h = game, seed, 0
        self._now = self._sum(self.spread.call("restart", game.mu0, pi, seed))

    def advance(self) -> Tensor:
        """One step of the game; the new mass [M, S]."""
        if self.h == self.game.horizon:
            raise ConfigError(f"the game ends after {self.game.horizon} steps")
        P, _ = self.game.model(self.h, self.game.at(self.h) @ self._now)
        self._now = self._sum(self.spread.call("step", self.h, P))
        self.h += 1
        return self._now

    def run(self) -> Tensor:
        """Plays to the end: the mass [H + 1 - h, M, S] from now on."""
        found = [self._now]
        while self.h < self.game.horizon:
            found.append(self.advance())
        return torch.stack(found)

    def save(self, path: str | Path) -> Path:
        """Writes the agents as a Parquet folder, a file a block."""
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        with replaced_folder(path) as folder:
            for index, (label, state) in enumerate(self.spread.call("arrays")):
                pq.write_table(
                    pa.table({"label": label, "state": state}), folder / f"block-{index:06d}.parquet"
                )
            about = {"h": self.h, "agents": self.agents, "block": self.block, "seed": self.seed}
            write_json(folder / "population.json", about)
        return Path(path)

    def load(self, path: str | Path) -> None:
        """Takes up a population of the same size, block and seed where `save` left it."""
        import json

        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        folder = Path(path)
        file = folder / "population.json"
        if not file.is_file():
            raise DataError(f"{folder} holds no population: population.json is missing")
        about = json.loads(file.read_text(encoding="utf-8"))
        mine = {"agents": self.agents, "block": self.block, "seed": self.seed}
        if any(about.get(name) != value for name, value in mine.items()):
            raise DataError(f"{folder} holds another population: {about}, where {mine} is expected")
        files = sorted(folder.glob("block-*.parquet"))
        states = [pq.read_table(f).column("state").to_numpy() for f in files]
        if [len(s) for s in states] != [count for _, count in sizes(self.agents, self.block)]:
            raise DataError(f"{folder} is truncated: {len(files)} blocks of agents")
        self.spread.call("put", states)
        self.h = int(about["h"])
        self._now = self._sum(self.spread.call("histograms"))

    def close(self) -> None:
        """Ends the actors."""
        self.spread.close()


def deviation(game: FiniteMFG, pi: Tensor, agents: int, *, repetitions: int, seed: int = 0) -> Tensor:
    """max_h |mu^n_h - mu_h|_1 of the label-averaged flow of n agents, [repetitions]: of order n^{-1/2}."""
    limit = graphon.flow(game, pi).mean(-3)
    found = []
    for k in range(repetitions):
        flow = ParticlePopulation(game, pi, agents, seed=seed + k).run().sum(1)
        found.append((flow - limit).abs().sum(-1).amax())
    return torch.stack(found)
