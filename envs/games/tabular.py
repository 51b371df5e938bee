"""Zero-sum Markov games in tables, with structured transitions; generators whose draws are the same everywhere.

Every tensor is float64 and may carry leading axes (instances).  Player 1 (actions a) maximises, player 2 (b) minimises the sum
of rewards in [0, 1] over H steps from a fixed start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mobula.errors import ConfigError, DataError


class FactoredGame(NamedTuple):
    """Each player moves a component of its own: P1 [..., H, S1, A, S1], P2 [..., H, S2, B, S2], r [..., H, S1, S2, A, B]."""

    P1: Tensor
    P2: Tensor
    r: Tensor
    start: tuple[int, int] = (0, 0)


class SingleControllerGame(NamedTuple):
    """Player 1 alone moves the state: P [..., H, S, A, S], r [..., H, S, A, B]."""

    P: Tensor
    r: Tensor
    start: int = 0


Game = FactoredGame | SingleControllerGame


def checked(game: Game) -> Game:
    """The game.  Raises DataError naming the field and index of a row that sums to another number than 1, or a reward
    outside [0, 1].
    """
    for name, table in game._asdict().items():
        if name == "start":
            continue
        if name == "r":
            bad = ~((table >= 0) & (table <= 1))
            what = "is outside [0, 1]"
            shown = table
        else:
            shown = table.sum(-1)
            bad = ~((shown - 1).abs() < 1e-9) | (table < 0).any(-1)
            what = "is no probability row"
        if bool(bad.any()):
            index = tuple(bad.nonzero()[0].tolist())
            raise DataError(f"{name}[{', '.join(map(str, index))}] {what}: {float(shown[index]):.6g}")
    return game


def stack(games: Sequence[Game]) -> Game:
    """Games of one kind and size along a new first axis."""
    first = games[0]
    parts = {
        name: torch.stack([getattr(g, name) for g in games]) for name in first._fields if name != "start"
    }
    return type(first)(**parts, start=first.start)  # type: ignore[arg-type]


def random_factored(seed: int, S1: int = 3, S2: int = 3, A: int = 3, B: int = 3, H: int = 3) -> FactoredGame:
    """Transition rows from Dirichlet(1/2), mean rewards uniform."""
    rng = np.random.default_rng(seed)
    P1 = rng.dirichlet(0.5 * np.ones(S1), (H, S1, A))
    P2 = rng.dirichlet(0.5 * np.ones(S2), (H, S2, B))
    return FactoredGame(torch.tensor(P1), torch.tensor(P2), torch.tensor(rng.random((H, S1, S2, A, B))))


def random_single_controller(
    seed: int, S: int = 4, A: int = 3, B: int = 3, H: int = 3
) -> SingleControllerGame:
    """Transition rows from Dirichlet(1/2), mean rewards uniform."""
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(0.5 * np.ones(S), (H, S, A))
    return SingleControllerGame(torch.tensor(P), torch.tensor(rng.random((H, S, A, B))))


def patrol(seed: int = 0, H: int = 6) -> SingleControllerGame:
    """A patrol on a cycle of six cells (moves -1, 0, +1 that succeed with probability 0.9); the other picks site 2b.

    r(s, a, b) = 1 - w_b E[dist(s', 2b)] / 3 with cycle distances and w = (1, 0.8, 0.6).  `seed` is not used.
    """
    P = torch.zeros(6, 3, 6, dtype=torch.float64)
    for s in range(6):
        for a in range(3):
            P[s, a, (s + a - 1) % 6] += 0.9
            P[s, a, s] += 0.1
    cells = torch.arange(6)
    gap = (cells[:, None] - 2 * torch.arange(3)[None]).abs()
    distance = torch.minimum(gap, 6 - gap).double()
    weight = torch.tensor([1.0, 0.8, 0.6], dtype=torch.float64)
    r = 1 - weight * (P @ distance) / 3
    return SingleControllerGame(P.expand(H, 6, 3, 6), r.expand(H, 6, 3, 3))


GENERATORS: dict[str, Callable[[int], Game]] = {
    "random_factored": random_factored,
    "random_single_controller": random_single_controller,
    "patrol": patrol,
}


def make_game(name: str, seed: int) -> Game:
    """The game of that name, drawn from `seed`.  Raises ConfigError for another name."""
    if name not in GENERATORS:
        raise ConfigError(f"game is {name!r}; it is one of {', '.join(GENERATORS)}")
    return checked(GENERATORS[name](seed))
