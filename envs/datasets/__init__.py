"""Logged data: one schema, loaders of D4RL, Minari and Parquet files, recipes that make data here, a cache of them.

load("pendulum/scripted-mixed-0.1")          a recipe (see `recipes`), made once and kept
load("~/d4rl/hopper_medium-v2.hdf5")          a D4RL file
load("~/.minari/datasets/pen/human-v2")       a Minari folder, or its main_data.hdf5
load("logs/")                                 Parquet files with the columns of the schema (see `dataset`)

mobula data list | info NAME | fetch NAME [--out FOLDER]
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobula.envs.datasets.dataset import METADATA, Dataset, from_arrow, make
from mobula.errors import ConfigError, DataError
from mobula.files import storage

__all__ = ["Dataset", "alone", "cache_folder", "head", "load", "load_parquet", "make", "stream"]


def cache_folder() -> Path:
    """Where recipes are kept: $MOBULA_DATA, else ~/.cache/mobula/data."""
    return Path(os.environ.get("MOBULA_DATA") or Path.home() / ".cache" / "mobula" / "data")


def load(name: str, *, cache: bool = True) -> Dataset:
    """The data set that `name` names: a path that exists, or a recipe.  Raises DataError or ConfigError in one line."""
    path = Path(name).expanduser()
    if path.exists():
        return load_path(path)
    if path.suffix in (".hdf5", ".h5", ".parquet") or name.startswith(("/", "./", "~", "../")):
        raise DataError(f"data {name}: no such file or folder")
    from mobula.envs.datasets.recipes import generate

    if not cache:
        return generate(name)
    kept = cached(name)
    with alone(kept):
        if not kept.is_dir():
            generate(name).save(kept)
    # Read back, so that the first use and every later one see the same rows.
    return load_parquet(kept)


@contextlib.contextmanager
def alone(kept: Path) -> Iterator[None]:
    """One process at a time makes `kept`: trials that start together must not make the same data twice."""
    with storage(kept.parent):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.with_name(f".{kept.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def cached(name: str) -> Path:
    """The folder that holds, or will hold, recipe `name` as made by the installed versions."""
    from mobula.envs.datasets.recipes import made_by, parse

    pack, quality, options = parse(name)
    about = [pack, quality, sorted(options.items()), made_by(pack)]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    return cache_folder() / f"{pack}-{quality}-{digest}"


def load_path(path: Path) -> Dataset:
    """A file or folder by what it holds: D4RL or Minari HDF5, or Parquet."""
    from mobula.envs.datasets import hdf5

    if path.is_dir():
        if (path / "main_data.hdf5").is_file() or (path / "data" / "main_data.hdf5").is_file():
            return hdf5.load_minari(path)
        return load_parquet(path)
    if path.name == "main_data.hdf5":
        return hdf5.load_minari(path)
    if path.suffix in (".hdf5", ".h5"):
        return hdf5.load_d4rl(path)
    if path.suffix == ".parquet":
        return load_parquet(path)
    raise DataError(f"data {path}: neither HDF5 (.hdf5), nor Parquet (.parquet), nor a folder of them")


def load_parquet(path: str | Path) -> Dataset:
    """Parquet files (one, or a folder of them in order of name) with the schema's columns, and the metadata.json beside them."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data {path}: the folder holds no .parquet file and no main_data.hdf5")
    folder = path if path.is_dir() else path.parent
    about: dict[str, Any] = {"name": path.name}
    try:
        table = pa.concat_tables([parquet.read_table(file) for file in files])
        if (folder / METADATA).is_file():
            about |= json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except (pa.ArrowInvalid, OSError, json.JSONDecodeError) as error:
        raise DataError(f"data {path} cannot be read: {str(error).splitlines()[0]}") from error
    found = make(from_arrow(table, str(path)), about, where=str(path))
    kept = about.get("sha256")
    if kept is not None and kept != found.digest():
        raise DataError(
            f"data {path}: the rows are not those that {METADATA} was written for; delete it to make it again"
        )
    return found


def head(name: str, rows: int = 100_000) -> Dataset:
    """The first rows of Parquet files that are too large for memory: for spaces and diagnostics.

    Statistics of the whole come from the metadata.json beside the files (`Dataset.save` writes it).  Raises DataError without.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    path = Path(name).expanduser()
    folder = path if path.exists() else cached(name)
    if not folder.exists():
        load(name)
    files = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
    beside = (folder if folder.is_dir() else folder.parent) / METADATA
    if not files or not beside.is_file():
        raise DataError(f"data {name}: streaming needs Parquet files with a {METADATA} beside them")
    about = {"name": folder.name, **json.loads(beside.read_text(encoding="utf-8")), "head": True}
    file = parquet.ParquetFile(files[0])
    batches = list(itertools.islice(file.iter_batches(batch_size=10_000), -(-rows // 10_000)))
    columns = from_arrow(pa.Table.from_batches(batches), str(path))
    columns["truncated"] = columns["truncated"].copy()
    columns["truncated"][-1] |= not columns["terminated"][-1]
    return make(columns, about, where=str(path))


def stream(path: str | Path, batch: int, *, seed: int = 0, prefetch: int = 4) -> Any:
    """Endless shuffled batches {column: array} of Parquet files that are larger than memory, through Ray Data.

    One epoch after the other, each shuffled anew; the rest of an epoch that fills no batch is left out.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import ray.data

    path = Path(path)
    files = [str(file) for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]
    if not files:
        raise ConfigError(f"data {path}: no .parquet file")
    ray.data.DataContext.get_current().enable_progress_bars = False
    epoch = 0
    while True:
        table = ray.data.read_parquet(files).random_shuffle(seed=seed + epoch)
        for rows in table.iter_batches(
            batch_size=batch, batch_format="pyarrow", prefetch_batches=prefetch, drop_last=True
        ):
            assert isinstance(rows, pa.Table)
            yield from_arrow(rows, str(path))
        epoch += 1
