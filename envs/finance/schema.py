"""Market data as it is stored: one row a (bar, symbol), Parquet in hive partitions, with a manifest.

`time` is the instant at which a bar is complete, `available_at` the instant at which the row could first be known.  A
folder holds `freq=<1d|...>/year=<YYYY>/part-0.parquet`, `manifest.json` and, where membership through time is known,
`universe.parquet`.  Folders are written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.dataset as ds  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from mobula.errors import DataError
from mobula.files import replaced_folder, write_json

SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("ns", tz="UTC")),
        ("symbol", pa.dictionary(pa.int32(), pa.string())),
        *((name, pa.float64()) for name in ("open", "high", "low", "close", "adj_close", "volume")),
        ("available_at", pa.timestamp("ns", tz="UTC")),
        ("is_filled", pa.bool_()),
    ]
)
"""Columns of a source's answer.  Prices are positive, null where the source has none; so is an unknown volume."""

UNIVERSE = pa.schema([("symbol", pa.string()), ("from", pa.date32()), ("to", pa.date32())])
ROW_GROUP = 131_072
PRICES = ("open", "high", "low", "close", "adj_close")


def conform(table: pa.Table) -> pa.Table:
    """`table` with the columns of the schema, in order and cast; missing optional ones are null.

    Raises DataError where `time`, `symbol` or `close` is missing or a column cannot be cast.
    """
    columns: dict[str, Any] = {}
    for field in SCHEMA:
        if field.name in table.column_names:
            columns[field.name] = table[field.name]
        elif field.name in ("time", "symbol", "close"):
            raise DataError(f"market data lacks the column {field.name!r}; it has {table.column_names}")
        elif field.name == "adj_close":
            columns["adj_close"] = table["close"]
        elif field.name == "available_at":
            columns["available_at"] = table["time"]
        elif field.name == "is_filled":
            columns["is_filled"] = pa.array(np.zeros(table.num_rows, bool))
        else:
            columns[field.name] = pa.nulls(table.num_rows, pa.float64())
    try:
        return pa.table(columns).cast(SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(f"market data does not fit the schema: {error}") from error


def table_of(columns: Mapping[str, Any]) -> pa.Table:
    """A table of the schema, sorted by (time, symbol), from arrays by column name; `time` as UTC instants."""
    frame = pd.DataFrame(dict(columns))
    frame["time"] = pd.to_datetime(frame["time"], utc=True)
    frame["symbol"] = frame["symbol"].astype("category")
    return ordered(conform(pa.Table.from_pandas(frame, preserve_index=False)))


def ordered(table: pa.Table) -> pa.Table:
    """Sorted by (time, symbol)."""
    keys = pa.table({"time": table["time"], "symbol": table["symbol"].cast(pa.string())})
    return table.take(pc.sort_indices(keys, sort_keys=[("time", "ascending"), ("symbol", "ascending")]))


def validate(table: pa.Table, *, jump: float = 0.5) -> list[str]:
    """Checks what prices and volumes must satisfy; returns remarks on |log return| above `jump`, which are never clipped.

    Raises DataError: a price that is not positive or not finite, high below or low above open or close, a negative volume, a
    row that was available before its bar was complete.
    """
    frame = table.to_pandas()
    for name in PRICES:
        values = frame[name]
        wrong = values.notna() & ~((values > 0) & np.isfinite(values))
        _refuse(frame, wrong, f"{name} must be above 0")
    _refuse(frame, frame["close"].isna(), "close is missing")
    body_high = frame[["open", "close"]].max(axis=1)
    body_low = frame[["open", "close"]].min(axis=1)
    _refuse(frame, frame["high"] < body_high * (1 - 1e-12), "high is below open or close")
    _refuse(frame, frame["low"] > body_low * (1 + 1e-12), "low is above open or close")
    _refuse(frame, frame["volume"] < 0, "volume is negative")
    _refuse(frame, frame["available_at"] < frame["time"], "available_at is before time")
    logs = np.log(frame["adj_close"]).groupby(frame["symbol"], observed=True).diff().abs()
    return [
        f"{row.symbol} moved by {move:+.2f} in log price at {row.time:%Y-%m-%d}"
        for row, move in zip(frame[logs > jump].itertuples(), logs[logs > jump], strict=True)
    ]


def _refuse(frame: pd.DataFrame, wrong: pd.Series, what: str) -> None:
    if wrong.any():
        row = frame[wrong].iloc[0]
        raise DataError(f"{row['symbol']} at {row['time']:%Y-%m-%d %H:%M}: {what} ({int(wrong.sum())} rows)")


# Folders ----------------------------------------------------------------------------------------------------------


def write_market(
    table: pa.Table,
    folder: str | Path,
    *,
    source: str,
    freq: str = "1d",
    licence: str = "unknown",
    calendar: str = "XNYS",
    time_zone: str = "America/New_York",
    adjustment: str = "adjusted close",
    processors: Sequence[Mapping[str, Any]] = (),
    universe: pa.Table | None = None,
) -> dict[str, Any]:
    """Writes `table` as a folder of Parquet files with a manifest, which is returned.

    processors  [{"name", ...parameters}] that made the table, in their order
    universe    rows (symbol, from, to) of membership; without it results on the data are stamped "survivorship: unknown"
    """
    table = ordered(conform(table))
    _refuse_twins(table)
    years = pc.year(table["time"])
    spans = (
        table.to_pandas()
        .groupby("symbol", observed=True)["time"]
        .agg(["min", "max"])
        .map(pd.Timestamp.isoformat)
    )
    with replaced_folder(folder) as new:
        for year in sorted(set(years.to_pylist())):
            file = new / f"freq={freq}" / f"year={year}" / "part-0.parquet"
            file.parent.mkdir(parents=True)
            pq.write_table(
                table.filter(pc.equal(years, year)), file, compression="zstd", row_group_size=ROW_GROUP
            )
        if universe is not None:
            pq.write_table(universe.cast(UNIVERSE), new / "universe.parquet", compression="zstd")
        manifest = {
            "source": source,
            "licence": licence,
            "calendar": calendar,
            "time_zone": time_zone,
            "freq": freq,
            "adjustment": adjustment,
            "survivorship": "unknown" if universe is None else "membership in universe.parquet",
            "symbols": {
                str(name): {"first": first, "last": last} for name, first, last in spans.itertuples(name=None)
            },
            "processors": [dict(step) for step in processors],
            "files": {
                str(file.relative_to(new)): hashlib.sha256(file.read_bytes()).hexdigest()
                for file in sorted(new.rglob("*.parquet"))
            },
        }
        write_json(new / "manifest.json", manifest)
    return manifest


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest: tensors made from data with equal hashes are equal bit for bit."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of a folder.  Raises DataError where it is missing, or (`verify`) a file is not the one it names."""
    folder = Path(folder)
    file = folder / "manifest.json"
    if not file.is_file():
        raise DataError(f"{folder} is no market data: manifest.json is missing (write it with write_market)")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
    if verify:
        for name, digest in files:
            part = folder / name
            if not part.is_file() or hashlib.sha256(part.read_bytes()).hexdigest() != digest:
                raise DataError(f"{part} is missing or is not the file that the manifest describes")
    return manifest


def read_market(
    folder: str | Path,
    *,
    freq: str = "1d",
    symbols: Sequence[str] | None = None,
    start: Any = None,
    end: Any = None,
) -> pa.Table:
    """Rows of a folder with start <= time < end, of `symbols` only; filters are pushed down to the files."""
    folder = Path(folder)
    parts = folder / f"freq={freq}"
    if not parts.is_dir():
        raise DataError(f"{folder} holds no data of frequency {freq!r}")
    data = ds.dataset(parts, format="parquet", partitioning="hive")
    wanted = ds.scalar(True)
    for bound, below in ((start, False), (end, True)):
        if bound is not None:
            instant = pa.scalar(pd.Timestamp(bound).tz_localize(None).value, pa.timestamp("ns", tz="UTC"))
            year = pd.Timestamp(bound).year
            wanted &= (ds.field("time") < instant) if below else (ds.field("time") >= instant)
            wanted &= (ds.field("year") <= year) if below else (ds.field("year") >= year)
    if symbols is not None:
        wanted &= ds.field("symbol").cast(pa.string()).isin(list(symbols))
    table = data.to_table(columns=SCHEMA.names, filter=wanted)
    return ordered(conform(table))


def _refuse_twins(table: pa.Table) -> None:
    keys = table.select(["time", "symbol"]).to_pandas()
    twins = keys[keys.duplicated()]
    if len(twins):
        some = ", ".join(f"({t:%Y-%m-%d %H:%M}, {s})" for t, s in twins.head(5).itertuples(index=False))
        raise DataError(f"{len(twins)} (time, symbol) keys have two different rows: {some}")
