"""Observations that hold whole numbers beside real ones: a step, a state or a team beside a label or a vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces


class PartlyWhole(spaces.Box):
    """A box whose entries `places` are whole numbers.  It equals the plain box; only what it draws differs.

    A draw is what a service shows as its example and tries a policy on, so it must be something that the policy answers.
    """

    def __init__(self, box: spaces.Box, places: Sequence[int]) -> None:
        dtype: Any = box.dtype
        super().__init__(box.low, box.high, dtype=dtype.type)
        self.places = list(places)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """One element; bounds of the whole entries are whole, so that rounding does not leave them."""
        found = super().sample(*args, **kwargs)
        found[self.places] = np.round(found[self.places])
        return found
