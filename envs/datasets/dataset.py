"""`Dataset`: logged transitions as columns of arrays, checked; on disk Parquet and a metadata.json.

Columns (N rows; rows of an episode are contiguous and ordered):

obs, next_obs          [N, d] float32 (int64 [N] for tabular worlds); `next_obs` of a truncated step is the true last one
action                 [N, m] float32 in [-1, 1], or int64 [N] for discrete actions
reward                 [N] float32, as the environment gave it: rescaling is a named transform (`mobula.envs.datasets.transforms`)
terminated, truncated  [N] bool: a true end (no bootstrap), or a time limit (the bootstrap stays)
episode_id, t          [N] int64
behaviour              [N] str: what acted ("random", "medium", "expert", ...)
logp                   [N] float32, optional: its log-density
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from mobula.artifact import space_from_json, space_to_json
from mobula.errors import DataError
from mobula.files import replaced_folder, write_json

Array = np.ndarray[Any, Any]

SCHEMA_VERSION = 1
REQUIRED = ("obs", "next_obs", "action", "reward", "terminated", "truncated", "episode_id", "t", "behaviour")
LEARNED_FROM = ("obs", "action", "reward", "next_obs", "terminated")
"""What a learner needs of a row."""

INSIDE = 1.0 - 1e-5
"""Continuous actions are clipped to this on load: the density of a tanh-policy is finite there."""

TABLE, METADATA = "data.parquet", "metadata.json"


@dataclass(frozen=True)
class Dataset:
    """Logged transitions: `columns` (see the module) and `metadata` (plain data).

    metadata: name, env and env_config (where known), observation_space and action_space, reference (scale, random, expert)
    for normalised scores, and what its maker noted.
    """

    columns: dict[str, Array]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["reward"])

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self.metadata.get("name", "data"))

    @property
    def discrete(self) -> bool:
        """Whether actions are indices."""
        return self["action"].ndim == 1

    def observation_space(self) -> gymnasium.Space[Any]:
        """That of its environment; an unbounded box (or the indices seen) where no environment is known."""
        if "observation_space" in self.metadata:
            return space_from_json(self.metadata["observation_space"])
        if self["obs"].ndim == 1:
            return spaces.Discrete(int(max(self["obs"].max(), self["next_obs"].max())) + 1)
        return spaces.Box(-np.inf, np.inf, self["obs"].shape[1:], dtype=np.float32)

    def action_space(self) -> gymnasium.Space[Any]:
        """That of its environment; the unit box (or the indices seen) where no environment is known."""
        if "action_space" in self.metadata:
            return space_from_json(self.metadata["action_space"])
        if self.discrete:
            return spaces.Discrete(int(self["action"].max()) + 1)
        return spaces.Box(-1.0, 1.0, self["action"].shape[1:], dtype=np.float32)

    # Episodes ----------------------------------------------------------------------------------------------

    def starts(self) -> Array:
        """First row of every episode [E]."""
        ids = self["episode_id"]
        return np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])

    def lengths(self) -> Array:
        """Rows of every episode [E]."""
        return np.diff(np.r_[self.starts(), len(self)])

    def returns(self, gamma: float = 1.0) -> Array:
        """Sum of gamma^t r_t of every episode [E], float64."""
        starts = self.starts()
        steps = np.arange(len(self)) - np.repeat(starts, self.lengths())
        return np.add.reduceat(self["reward"].astype(np.float64) * gamma**steps, starts)

    def rows(self, index: Array) -> Dataset:
        """The rows at `index` (a mask, or increasing indices); an episode that is cut counts as it is."""
        return Dataset({name: value[index] for name, value in self.columns.items()}, dict(self.metadata))

    def episodes(self, index: Array) -> Dataset:
        """Whole episodes at `index` (positions), in the order of the data."""
        keep = np.zeros(len(self.starts()), dtype=bool)
        keep[index] = True
        return self.rows(np.repeat(keep, self.lengths()))

    def with_metadata(self, **about: Any) -> Dataset:
        """The same rows with more metadata."""
        return Dataset(self.columns, {**self.metadata, **about})

    # Facts -------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Counts, returns and statistics, as metadata.json holds them."""
        returns = self.returns()
        about: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "episodes": len(returns),
            "transitions": len(self),
            "return_mean": float(returns.mean()),
            "return_min": float(returns.min()),
            "return_max": float(returns.max()),
            "sha256": self.digest(),
        }
        if self["obs"].ndim > 1:
            about |= {
                "obs_mean": self["obs"].mean(0, dtype=np.float64).tolist(),
                "obs_std": self["obs"].std(0, dtype=np.float64).tolist(),
            }
        return about

    def digest(self) -> str:
        """SHA-256 of all columns: the same rows give the same digest."""
        found = hashlib.sha256()
        for name in sorted(self.columns):
            column = self.columns[name]
            found.update(f"{name} {column.dtype.kind} {column.shape}".encode())
            found.update(
                "\0".join(column.tolist()).encode() if column.dtype.kind == "U" else column.tobytes()
            )
        return found.hexdigest()

    # Disk --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes data.parquet and metadata.json to `folder`, whole or not at all."""
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]

        with replaced_folder(folder) as temporary:
            parquet.write_table(to_arrow(self.columns), temporary / TABLE, compression="zstd")
            write_json(temporary / METADATA, {**self.metadata, **self.summary()})
        return Path(folder)


def make(
    columns: Mapping[str, Array],
    metadata: Mapping[str, Any],
    *,
    where: str = "data",
    continuous: bool | None = None,
) -> Dataset:
    """A checked data set from raw columns; `episode_id`, `t` and `behaviour` are filled in where they are missing.

    Raises DataError: missing columns, unequal lengths, values that are not finite, actions outside the box.
    """
    found = {name: np.asarray(value) for name, value in columns.items()}
    missing = [name for name in (*LEARNED_FROM, "truncated") if name not in found]
    if missing:
        raise DataError(
            f"{where} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has {', '.join(sorted(found))}"
        )
    n = len(found["reward"])
    for name, value in found.items():
        if len(value) != n:
            raise DataError(f"{where}: {name} has {len(value)} rows and reward has {n}")
    if n == 0:
        raise DataError(f"{where} holds no transition")
    ends = found["terminated"].astype(bool) | found["truncated"].astype(bool)
    if "episode_id" not in found:
        found["episode_id"] = np.r_[0, np.cumsum(ends[:-1])]
    if "t" not in found:
        ids = found["episode_id"]
        first = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
        found["t"] = np.arange(n) - np.repeat(first, np.diff(np.r_[first, n]))
    found.setdefault("behaviour", np.full(n, str(metadata.get("behaviour", "unknown"))))
    discrete = found["action"].dtype.kind in "iu" or found["action"].dtype == bool
    if discrete and found["action"].ndim == 2 and found["action"].shape[1] == 1:
        found["action"] = found["action"][:, 0]
    kinds = {
        "obs": np.int64 if found["obs"].ndim == 1 and found["obs"].dtype.kind in "iu" else np.float32,
        "action": np.int64 if discrete else np.float32,
        "reward": np.float32,
        "logp": np.float32,
        "terminated": np.bool_,
        "truncated": np.bool_,
        "episode_id": np.int64,
        "t": np.int64,
        "behaviour": np.str_,
    }
    kinds["next_obs"] = kinds["obs"]
    typed = {
        name: np.ascontiguousarray(value, dtype=kinds[name]) for name, value in found.items() if name in kinds
    }
    if kinds["obs"] == np.float32 and typed["obs"].ndim == 1:
        typed |= {name: typed[name][:, None] for name in ("obs", "next_obs")}
    if not discrete and typed["action"].ndim == 1:
        typed["action"] = typed["action"][:, None]
    for name, value in typed.items():
        if value.dtype.kind == "f":
            bad = ~np.isfinite(value.reshape(n, -1)).all(1)
            if bad.any():
                raise DataError(f"{where}: {name} is not finite in row {int(np.flatnonzero(bad)[0])}")
    if not discrete:
        size = np.abs(typed["action"]).max()
        if size > 1.0 + 1e-3:
            raise DataError(
                f"{where}: actions reach {size:g}, outside [-1, 1]; they look un-normalised: rescale them to the box"
            )
        typed["action"] = typed["action"].clip(-INSIDE, INSIDE)
    if continuous is not None and continuous == discrete:
        raise DataError(f"{where} has {'discrete' if discrete else 'continuous'} actions")
    return Dataset(typed, dict(metadata))


def concatenate(parts: Sequence[Dataset], **metadata: Any) -> Dataset:
    """One data set of several, episodes renumbered; the metadata is that of the first part, with `metadata` added."""
    names = set.intersection(*(set(part.columns) for part in parts))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    counts = [len(part.starts()) for part in parts]
    number = np.concatenate(
        [
            np.repeat(np.arange(k) + sum(counts[:i]), part.lengths())
            for i, (k, part) in enumerate(zip(counts, parts, strict=True))
        ]
    )
    columns["episode_id"] = number.astype(np.int64)
    return Dataset(columns, {**parts[0].metadata, **metadata})


def spaces_of(env: Any) -> dict[str, Any]:
    """The metadata entries for the spaces of an environment."""
    return {
        "observation_space": space_to_json(env.single_observation_space),
        "action_space": space_to_json(env.single_action_space),
    }


def to_arrow(columns: Mapping[str, Array]) -> Any:
    """A pyarrow table; vectors become fixed-size lists."""
    import pyarrow as pa  # type: ignore[import-untyped]

    arrays = {}
    for name, value in columns.items():
        if value.ndim == 1:
            arrays[name] = pa.array(value)
        else:
            flat = pa.array(value.reshape(-1))
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(value.shape[1:])))
    return pa.table(arrays)


def from_arrow(table: Any, where: str) -> dict[str, Array]:
    """Columns of a pyarrow table: lists of equal length become vectors.  Raises DataError where they are unequal."""
    import pyarrow as pa  # type: ignore[import-untyped]

    found: dict[str, Array] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
        kind = column.type
        if pa.types.is_fixed_size_list(kind):
            found[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, kind.list_size)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            sizes = np.unique(np.asarray(column.value_lengths()))
            if len(sizes) > 1:
                raise DataError(f"{where}: the lists of {name} have lengths from {sizes[0]} to {sizes[-1]}")
            found[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        else:
            found[name] = column.to_numpy(zero_copy_only=False)
    return found
