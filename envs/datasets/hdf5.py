"""D4RL's and Minari's HDF5 files as data sets (h5py alone)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mobula.envs.datasets import scores
from mobula.envs.datasets.dataset import Array, Dataset, make
from mobula.errors import DataError

STEP_LIMIT = 1000
"""Of the v0 files of D4RL's locomotion, which hold no `timeouts`."""

MAZE_KEYS = ("observation", "achieved_goal", "desired_goal")


def _open(path: Path) -> Any:
    import h5py  # type: ignore[import-untyped]

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is no HDF5 file, or a truncated one: {error}") from error


def load_d4rl(path: str | Path, *, step_limit: int = STEP_LIMIT) -> Dataset:
    """A D4RL file: observations, actions, rewards, terminals and, if there are, timeouts and next_observations.

    Without next_observations, those are the observations of the next row, and a row that ends by timeout (or is the
    last) is dropped unless it is terminal: its successor is the first state of another episode.  Without timeouts, episodes
    are cut at `step_limit` steps.  An episode also ends where the next observation is not the next row's observation.
    Raises DataError for missing keys, unequal lengths, and what `make` refuses.
    """
    path = Path(path)
    with _open(path) as file:
        needed = ("observations", "actions", "rewards", "terminals")
        missing = [name for name in needed if name not in file]
        if missing:
            raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(file.keys()))}")
        optional = [name for name in ("timeouts", "next_observations") if name in file]
        raw: dict[str, Array] = {name: file[name][()] for name in (*needed, *optional)}
        logp = file["infos/action_log_probs"][()] if "infos/action_log_probs" in file else None
    n = len(raw["rewards"])
    for name, value in raw.items():
        if len(value) != n:
            raise DataError(f"{path}: {name} has {len(value)} rows and rewards has {n}")
    obs = raw["observations"]
    terminated = raw["terminals"].astype(bool).reshape(n)
    given = raw.get("next_observations")
    timeouts = raw["timeouts"].astype(bool).reshape(n) if "timeouts" in raw else None
    following = given if given is not None else np.concatenate([obs[1:], obs[-1:]])
    jump = np.zeros(n, dtype=bool)
    if given is not None:
        jump[:-1] = np.linalg.norm((obs[1:] - given[:-1]).reshape(n - 1, -1), axis=1) > 1e-6
    truncated = timeouts if timeouts is not None else _cut(terminated | jump, step_limit)
    truncated = (truncated | jump) & ~terminated
    truncated[-1] |= not terminated[-1]
    ends = terminated | truncated
    columns = {
        "obs": obs,
        "next_obs": following,
        "action": raw["actions"],
        "reward": raw["rewards"].reshape(n),
        "terminated": terminated,
        "truncated": truncated,
        "episode_id": np.r_[0, np.cumsum(ends[:-1])],
    }
    if logp is not None and len(logp) == n:
        columns["logp"] = logp.reshape(n)
    if given is None:
        # The successor of such a row is unknown; the one before it becomes the last of its episode.
        dropped = truncated
        columns["truncated"] = np.r_[dropped[1:], False] & ~terminated & ~dropped
        columns = {name: value[~dropped] for name, value in columns.items()}
    behaviour = path.stem.lower().replace("_", "-").split("-")
    about = {
        "name": path.name,
        "source": "d4rl",
        "reference": scores.d4rl_reference(path.name),
        "behaviour": "-".join(word for word in behaviour[1:] if not word.startswith("v")) or "unknown",
    }
    return make(columns, about, where=str(path))


def _cut(ends: Array, limit: int) -> Array:
    """True at every `limit`-th step of an episode, the clock restarting after each end."""
    n, found = len(ends), np.zeros(len(ends), dtype=bool)
    start = 0
    for end in [*np.flatnonzero(ends).tolist(), n - 1]:
        found[start + limit - 1 : end + 1 : limit] = True
        start = end + 1
    return found


def load_minari(path: str | Path) -> Dataset:
    """A Minari data set: a folder with main_data.hdf5 (or `data/main_data.hdf5`), or that file.

    Groups episode_k hold T + 1 observations and T actions, rewards, terminations and truncations; dictionaries of
    observations are concatenated (observation, achieved_goal, desired_goal first, then any others by name).
    """
    path = Path(path)
    file_path = next(
        (p for p in (path / "main_data.hdf5", path / "data" / "main_data.hdf5", path) if p.is_file()), None
    )
    if file_path is None:
        raise DataError(f"{path} holds no main_data.hdf5 (Minari's layout)")
    parts: dict[str, list[Array]] = {}
    with _open(file_path) as file:
        names = [name for name in file if name.startswith("episode_")]
        if not names:
            raise DataError(
                f"{file_path} holds no group episode_k (Minari's layout); it holds {', '.join(sorted(file)) or 'nothing'}"
            )
        for number, name in enumerate(sorted(names, key=lambda text: int(text.split("_")[1]))):
            group = file[name]
            needed = ("observations", "actions", "rewards", "terminations", "truncations")
            missing = [key for key in needed if key not in group]
            if missing:
                raise DataError(
                    f"{file_path}: {name} lacks {', '.join(missing)}; it holds {', '.join(sorted(group))}"
                )
            obs = _observations(group["observations"])
            steps = len(group["rewards"])
            if len(obs) != steps + 1:
                raise DataError(
                    f"{file_path}: {name} has {len(obs)} observations for {steps} rewards; {steps + 1} are needed"
                )
            row = {
                "obs": obs[:-1],
                "next_obs": obs[1:],
                "action": group["actions"][()],
                "reward": group["rewards"][()],
                "terminated": group["terminations"][()],
                "truncated": group["truncations"][()],
                "episode_id": np.full(steps, number),
            }
            for key, value in row.items():
                if len(value) != steps:
                    raise DataError(
                        f"{file_path}: {name}/{key} has {len(value)} rows and rewards has {steps}"
                    )
                parts.setdefault(key, []).append(value)
        about = _minari_about(file, file_path)
    columns = {key: np.concatenate(values) for key, values in parts.items()}
    scale = about.pop("_action_scale", None)
    if scale is not None and columns["action"].dtype.kind == "f":
        low, high = scale
        columns["action"] = 2 * (columns["action"] - low) / (high - low) - 1
    return make(columns, about, where=str(file_path))


def _observations(node: Any) -> Array:
    if not hasattr(node, "keys"):
        return np.asarray(node[()])
    keys = [key for key in MAZE_KEYS if key in node] + sorted(set(node.keys()) - set(MAZE_KEYS))
    return np.concatenate(
        [_observations(node[key]).reshape(len(_observations(node[key])), -1) for key in keys], axis=1
    )


def _minari_about(file: Any, path: Path) -> dict[str, Any]:
    """Name, environment and action bounds, where the file or the metadata.json beside it says them."""
    found: dict[str, Any] = {"name": path.parent.name, "source": "minari"}
    said: dict[str, Any] = {name: file.attrs[name] for name in file.attrs}
    beside = path.parent / "metadata.json"
    if beside.is_file():
        said |= json.loads(beside.read_text(encoding="utf-8"))
    if "dataset_id" in said:
        found["name"] = str(said["dataset_id"])
    spec = said.get("env_spec")
    if spec:
        data = json.loads(spec) if isinstance(spec, str | bytes) else spec
        if isinstance(data, dict) and data.get("id"):
            found["env"] = f"gymnasium:{data['id']}"
    space = said.get("action_space")
    if space:
        data = json.loads(space) if isinstance(space, str | bytes) else space
        if isinstance(data, dict) and data.get("type") == "Box":
            low, high = np.asarray(data["low"], dtype=float), np.asarray(data["high"], dtype=float)
            if np.isfinite(low).all() and np.isfinite(high).all() and (high > low).all():
                found["_action_scale"] = (low, high)
    worst, best = said.get("ref_min_score"), said.get("ref_max_score")
    if worst is not None and best is not None:
        found["reference"] = {
            "scale": f"minari:{found['name']}",
            "random": float(worst),
            "expert": float(best),
        }
    return found
