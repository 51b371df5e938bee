"""Normalised scores: 100 (J - J_random) / (J_expert - J_random), J the mean undiscounted return.

A score belongs to a scale: D4RL's (its v2 simulators) and those of environments made here are different ones, and a
score is only given where the environment of the evaluation is that of the scale.
"""

from __future__ import annotations

from typing import Any

from mobula.errors import DataError

D4RL = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.8331),
    "hammer": (-274.856578, 12794.1348),
    "door": (-56.512833, 2880.5693),
    "relocate": (-6.425911, 4233.8778),
}
"""Reference returns (random, expert) of D4RL (Fu et al. 2020, arXiv 2004.07219) by task family."""


def d4rl_reference(file_name: str) -> dict[str, Any] | None:
    """The reference of a D4RL file by its name (`hopper_medium-v2.hdf5`), or None for an unknown task."""
    plain = file_name.lower().replace("_", "-")
    found = [name for name in D4RL if plain.startswith(name)]
    if not found:
        return None
    name = max(found, key=len)
    low, high = D4RL[name]
    return {"scale": f"d4rl:{name}", "random": low, "expert": high}


def normalised(mean_return: float, reference: dict[str, Any]) -> float:
    """Score of a mean return on the scale of `reference`.  Raises DataError where the scale has no width."""
    width = reference["expert"] - reference["random"]
    if width == 0:
        raise DataError(
            f"the scale {reference.get('scale')} has no width: random and expert return are equal"
        )
    return float(100.0 * (mean_return - reference["random"]) / width)
