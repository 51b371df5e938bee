"""RLlib's own IQL and CQL take a few updates on our data, through our loader."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from ray.rllib.algorithms.cql import CQLConfig
from ray.rllib.algorithms.iql import IQLConfig

from mobula.envs.datasets import recipes, rllib


@pytest.fixture(scope="module")
def data() -> Any:
    return recipes.generate("pendulum/scripted-mixed-0.5,size=400")


def test_rows_are_those_of_the_data(data: Any, tmp_path: Path) -> None:
    folder = rllib.write(data, tmp_path / "rows", reward_transform="reward_shift(2)")
    table = parquet.read_table(folder)
    assert len(table) == len(data)
    np.testing.assert_array_equal(np.stack(table["new_obs"].to_numpy()), data["next_obs"])
    np.testing.assert_allclose(table["rewards"].to_numpy(), data["reward"] + 2, rtol=1e-6)
    assert len(set(table["eps_id"].to_pylist())) == len(data)


@pytest.mark.parametrize("config_class", [IQLConfig, CQLConfig])
def test_rllib_learns_from_them(ray_session: None, data: Any, tmp_path: Path, config_class: Any) -> None:
    config = config_class().debugging(log_level="ERROR", seed=0)
    config.training(train_batch_size_per_learner=32)
    if config_class is CQLConfig:
        config.training(lr=None, bc_iters=0)
    algorithm = rllib.configure(config, data, tmp_path / "rows").build_algo()
    results = [algorithm.train()["learners"]["default_policy"] for _ in range(2)]
    losses = [value for name, value in results[-1].items() if name.endswith("loss")]
    assert losses
    assert all(math.isfinite(float(loss)) for loss in losses)
    algorithm.stop()
