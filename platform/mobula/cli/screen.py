"""What commands show while they work and when they are done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def show(*values: Any) -> None:
    """Prints with rich, wide enough for tables in files and pipes."""
    from rich.console import Console

    # Into a file or a pipe, tables need not fit a terminal.
    Console(width=None if sys.stdout.isatty() else 160).print(*values)


@contextmanager
def progress_bar(title: str, quiet: bool, headline: tuple[str, str] | None = None) -> Iterator[Any]:
    """Yields what takes (row, share done) of each iteration; None where nothing is to be shown."""
    if quiet:
        yield None
        return
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeElapsedColumn(),
        Remaining(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=1.0, metrics="starting Ray")

        def show(row: dict[str, float], share: float) -> None:
            bar.update(task, completed=share, metrics=_headline(row, headline))

        yield show


def _headline(row: dict[str, float], headline: tuple[str, str] | None) -> str:
    if headline is not None:
        return f"{headline[1]} {row[headline[0]]:.3g}" if headline[0] in row else ""
    parts = [f"{int(row['env_steps']):,} steps"]
    if "env_runners/episode_return_mean" in row:
        parts.append(f"return {row['env_runners/episode_return_mean']:.1f}")
    elif row.get("env_runners/num_env_steps_sampled"):
        mean = row.get("env_runners/reward_sum", 0.0) / row["env_runners/num_env_steps_sampled"]
        parts.append(f"reward/step {mean:.4f}")
    return ", ".join(parts)
