"""The same data for RLlib's own offline algorithms (IQL, CQL, BC, MARWIL): a bridge to their Parquet input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mobula import registry
from mobula.envs.datasets import transforms
from mobula.envs.datasets.dataset import Dataset, to_arrow
from mobula.files import replaced_folder

NAMES = {
    "obs": "obs",
    "action": "actions",
    "reward": "rewards",
    "next_obs": "new_obs",
    "terminated": "terminateds",
    "truncated": "truncateds",
}


def write(dataset: Dataset, folder: str | Path, *, reward_transform: str = "none") -> Path:
    """Writes the data as RLlib reads them: a row a step, RLlib's column names, every row an episode of its own.

    RLlib rebuilds single-step episodes from rows, with their true next observation; actions are in [-1, 1], as RLlib's
    modules draw them (`normalize_actions`).
    """
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    a, b = transforms.reward_scale(dataset, reward_transform)
    columns = {new: dataset[old] for old, new in NAMES.items()}
    columns["rewards"] = (columns["rewards"] * a + b).astype(np.float32)
    columns["eps_id"] = np.arange(len(dataset)).astype(np.str_)
    with replaced_folder(folder) as temporary:
        # Several files, so that Ray Data has blocks to shuffle and to share out.
        table = to_arrow(columns)
        size = -(-len(dataset) // 8)
        for i in range(8):
            part = table.slice(i * size, size)
            if len(part):
                parquet.write_table(part, temporary / f"part-{i}.parquet")
    return Path(folder)


def configure(config: Any, dataset: Dataset, folder: str | Path, *, reward_transform: str = "none") -> Any:
    """Points an RLlib config (`IQLConfig`, `CQLConfig`, ...) at the data, written to `folder`; returns the config."""
    write(dataset, folder, reward_transform=reward_transform)
    config.environment(observation_space=dataset.observation_space(), action_space=dataset.action_space())
    if dataset.metadata.get("env"):
        # CQL asks for an environment even where none is stepped.
        name = registry.register_with_ray(str(dataset.metadata["env"]))
        config.environment(name, env_config=dict(dataset.metadata.get("env_config", {})))
    config.offline_data(
        input_=[str(Path(folder).resolve())],
        input_read_method="read_parquet",
        input_read_method_kwargs={"override_num_blocks": 8},
        # Updates of a training iteration; RLlib's CQL cannot take a single one.
        dataset_num_iters_per_learner=2,
        map_batches_kwargs={"concurrency": 1},
        iter_batches_kwargs={"prefetch_batches": 1},
    )
    return config
