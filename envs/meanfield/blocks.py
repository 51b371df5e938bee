"""Very large populations in blocks of agents, spread over Ray actors.

A block draws from streams of its own, seeded by (seed, block, step), and returns small sums; the driver adds them in the order of
the blocks.  So states never leave their actor, traffic does not depend on the number of agents, and results do not depend on
the number of actors, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch

from mobula.metrics import gather

BLOCK = 65_536
"""Agents of a block."""


def generator(seed: int, block: int, step: int) -> torch.Generator:
    """The stream of a block at a step."""
    word = np.random.SeedSequence([seed, block, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> 1))


def sizes(agents: int, block: int = BLOCK) -> list[tuple[int, int]]:
    """(index, agents) of every block."""
    return [(i, min(block, agents - start)) for i, start in enumerate(range(0, agents, block))]


class Spread:
    """Holders of blocks: one in this process (actors = 0), or Ray actors that share the blocks in contiguous ranges."""

    def __init__(self, make: Callable[..., Any], shares: Sequence[Any], actors: int, *args: Any) -> None:
        """make(share of blocks, *args) -> an object whose methods return a list, an entry a block; shares: one a block."""
        count = min(actors, len(shares))
        cuts = np.array_split(np.arange(len(shares)), max(count, 1))
        parts = [[shares[i] for i in cut] for cut in cuts]
        self.local = make(parts[0], *args) if count == 0 else None
        given = [ray.put(arg) for arg in args] if count else []
        self.remote: list[Any] = [
            ray.remote(num_cpus=1)(make).remote(part, *given) for part in parts[: count or 0]
        ]

    def call(self, name: str, *args: Any) -> list[Any]:
        """What the method `name` returns for every block, in their order."""
        if self.local is not None:
            found: list[Any] = getattr(self.local, name)(*args)
            return found
        answers = gather([getattr(actor, name).remote(*args) for actor in self.remote], "population")
        return [entry for answer in answers for entry in answer]

    def close(self) -> None:
        """Ends the actors."""
        for actor in self.remote:
            ray.kill(actor)
        self.remote = []
