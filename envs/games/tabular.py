"""Zero-sum Markov games in tables, with structured transitions; generators whose draws are the same everywhere.

Every tensor is float64 and may carry leading axes (instances).  Player 1 (actions a) maximises, player 2 (b) minimises the sum
of rewards in [0, 1] over H steps from a fixed start.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
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
    outside [0, 1]; or shapes and starts that do not fit together.
    """
    _fits(game)
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


def _fits(game: Game) -> None:
    """Raises DataError where the tables of one game (leading axes aside) have shapes that contradict each other."""
    factored = isinstance(game, FactoredGame)
    tables = {"P1": game.P1, "P2": game.P2} if isinstance(game, FactoredGame) else {"P": game.P}
    axes: dict[str, tuple[str, ...]] = {"P": ("H", "S", "A", "S"), "r": ("H", "S", "A", "B")}
    if factored:
        axes = {
            "P1": ("H", "S1", "A", "S1"),
            "P2": ("H", "S2", "B", "S2"),
            "r": ("H", "S1", "S2", "A", "B"),
        }
    known: dict[str, int] = {}
    for name, table in {**tables, "r": game.r}.items():
        shape = tuple(table.shape[-len(axes[name]) :])
        if len(shape) != len(axes[name]):
            raise DataError(
                f"{name} has {len(shape)} axes; [{', '.join(axes[name])}] is needed, got shape {shape}"
            )
        for axis, size in zip(axes[name], shape, strict=True):
            if known.setdefault(axis, size) != size or size < 1:
                raise DataError(
                    f"{name} has shape {shape}: [{', '.join(axes[name])}] is needed, with {axis} = {known[axis]} as elsewhere"
                )
    starts = game.start if isinstance(game.start, tuple) else (game.start,)
    for start, axis in zip(starts, ("S1", "S2") if factored else ("S",), strict=True):
        if not 0 <= start < known[axis]:
            raise DataError(f"start is {game.start}: a state from 0 to {known[axis] - 1} is needed")


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


def load_game(file: str | Path) -> Game:
    """The game in a NumPy archive (`numpy.savez`): arrays P1, P2, r (factored) or P, r (single controller), and `start` where it is
    not 0.

    Raises DataError where the file is none, or holds no such game; nothing in it is unpickled.
    """
    file = Path(file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is no archive of NumPy arrays: {str(error).splitlines()[0]}") from error
    kind = FactoredGame if "P1" in arrays or "P2" in arrays else SingleControllerGame
    wanted = ("P1", "P2", "r") if kind is FactoredGame else ("P", "r")
    if set(arrays) - {"start"} != set(wanted):
        raise DataError(
            f"{file} holds {', '.join(sorted(arrays)) or 'nothing'}; P1, P2, r or P, r are needed (and start)"
        )
    for name, array in arrays.items():
        if array.dtype.kind not in ("iu" if name == "start" else "fiu"):
            raise DataError(f"{file}: {name} holds {array.dtype}; numbers are needed")
    start = np.ravel(arrays.pop("start", np.zeros(len(wanted) - 1, dtype=np.int64))).tolist()
    if len(start) != len(wanted) - 1:
        raise DataError(f"{file}: start has {len(start)} numbers; {len(wanted) - 1} are needed")
    tables = {name: torch.tensor(arrays[name], dtype=torch.float64) for name in wanted}
    if kind is FactoredGame:
        return checked(FactoredGame(**tables, start=(start[0], start[1])))
    return checked(SingleControllerGame(**tables, start=start[0]))


def make_game(name: str, seed: int) -> Game:
    """The game of that name, drawn from `seed`, or that of a file.  Raises ConfigError for another name."""
    if str(name).endswith(".npz"):
        return load_game(name)
    if name not in GENERATORS:
        raise ConfigError(f"game is {name!r}; it is one of {', '.join(GENERATORS)}, or a file FILE.npz")
    return checked(GENERATORS[name](seed))
