"""Named transforms of rewards and observations; files hold what the environment gave, transforms are settings of a run."""

from __future__ import annotations

import re

import numpy as np

from mobula.envs.datasets.dataset import Array, Dataset
from mobula.errors import ConfigError, DataError

REWARDS = "none, reward_range, reward_unit, reward_shift(c)"


def reward_scale(dataset: Dataset, transform: str) -> tuple[float, float]:
    """(a, b) of the transform r <- a r + b.

    none             as it is
    reward_range     1000 / (largest minus smallest episode return)
    reward_unit      1 / max |r|
    reward_shift(c)  r + c (c = -1 on sparse mazes)

    Raises ConfigError for another name, DataError where a range is 0.
    """
    shift = re.fullmatch(r"(?:reward_)?shift\(([-+0-9.eE]+)\)", transform)
    if shift:
        try:
            return 1.0, float(shift[1])
        except ValueError:
            pass
    if transform == "none":
        return 1.0, 0.0
    if transform == "reward_range":
        returns = dataset.returns()
        if dataset.metadata.get("head"):
            # A part of data too large for memory: its metadata know the whole.
            returns = np.array([dataset.metadata["return_min"], dataset.metadata["return_max"]])
        span = float(returns.max() - returns.min())
        if span <= 0:
            raise DataError(
                f"{dataset.name}: every episode has the return {returns[0]:g}, so reward_range would divide by zero;"
                " use reward_transform 'none' or 'reward_unit'"
            )
        return 1000.0 / span, 0.0
    if transform == "reward_unit":
        largest = float(np.abs(dataset["reward"]).max())
        if largest == 0:
            raise DataError(f"{dataset.name}: every reward is 0, so reward_unit would divide by zero")
        return 1.0 / largest, 0.0
    raise ConfigError(f"reward_transform is {transform!r}; there are {REWARDS}")


def obs_statistics(dataset: Dataset) -> tuple[Array, Array]:
    """(mean [d], scale [d]) of obs_norm: (s - mean) / scale with scale = standard deviation + 1e-3."""
    if dataset.metadata.get("head"):
        return np.asarray(dataset.metadata["obs_mean"]), np.asarray(dataset.metadata["obs_std"]) + 1e-3
    obs = dataset["obs"].astype(np.float64)
    return obs.mean(0), obs.std(0) + 1e-3
