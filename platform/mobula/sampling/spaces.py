"""Observations that are mostly known beforehand: `Indexed`, a Box whose first number is the row of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from torch import Tensor

Places = Sequence[tuple[int, int]]
"""Ranges [a, b) of columns, in the order of the numbers that go there."""


def expand(obs: Tensor, table: Tensor, places: Places) -> Tensor:
    """Rows [..., K] of `table` [T, K] that `obs` [..., 1 + P] names by its first number, with the other P in their places."""
    out = table.index_select(0, obs[..., 0].long().flatten()).view(*obs.shape[:-1], table.shape[1])
    at = 1
    for a, b in places:
        out[..., a:b] = obs[..., at : at + b - a]
        at += b - a
    return out


class Indexed(spaces.Box):
    """Observations [1 + P] that stand for K numbers: the row of a table that is known beforehand, and P numbers that are not.

    A module's `Encoder` holds the table and sees what it would see of `full`, so that K - P - 1 numbers a step need be neither
    written, sent nor kept.  The table is in no checkpoint and no export: pickled, the space is the recipe `remake`; exported, it is `full`.
    """

    def __init__(self, table: Tensor, places: Places, remake: Callable[[], Indexed]) -> None:
        """table: [T, K] float32, T < 2^24 so that a float32 names each row.  remake: makes the space again, in any process."""
        T, K = table.shape
        if T >= 2**24:
            raise ValueError(f"a table of {T} rows: float32 numbers name no more than {2**24 - 1}")
        self.table, self.places, self.remake = table.cpu(), tuple(places), remake
        P = sum(b - a for a, b in self.places)
        high = np.full(1 + P, np.inf, np.float32)
        low = -high
        low[0], high[0] = 0, T - 1
        super().__init__(low, high, dtype=np.float32)
        self.full = spaces.Box(-np.inf, np.inf, (K,), np.float32)

    def __reduce__(self) -> Any:
        return _made, (self.remake,)

    def __deepcopy__(self, memo: Any) -> Indexed:
        return self

    def expand(self, obs: Tensor) -> Tensor:
        """[..., K] of [..., 1 + P]."""
        return expand(obs, self.table.to(obs.device), self.places)


def _made(remake: Callable[[], Indexed]) -> Indexed:
    return remake()


def full_space(space: gymnasium.Space[Any]) -> gymnasium.Space[Any]:
    """What observations of `space` stand for: the space itself, but for an `Indexed` one."""
    return space.full if isinstance(space, Indexed) else space


def full_observations(space: gymnasium.Space[Any], obs: Tensor) -> Tensor:
    """Observations of `full_space(space)` for those of `space`."""
    return space.expand(obs) if isinstance(space, Indexed) else obs
