"""Whole states of a study, from which a killed one goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

STATE_FILES = ("experiment_state-*.json", "search*-*", "callback_states-*")
"""Tune's files of one moment of a study: the trials and the scheduler, the searcher, the callbacks."""


def keep_state(path: Path, staging: Path) -> None:
    """Copies Tune's state files from the folder where it writes them to state/N of the study, which then is whole or not there.

    Tune itself copies them into tune/ in the background, each over the last: a kill in the midst leaves half a file, or the files of
    two moments, and Tune would then begin anew without a word.
    """
    newest = max(staging.glob(STATE_FILES[0]))
    session = newest.stem.removeprefix("experiment_state-")
    kept = sorted(p for p in (path / "state").glob("*") if p.name.isdigit())
    number = int(kept[-1].name) + 1 if kept else 0
    fresh = path / "state" / f".{number:09d}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for pattern in STATE_FILES:
        for file in staging.glob(pattern):
            if session in file.name and not file.name.startswith("tmp-"):
                shutil.copy2(file, fresh)
    fresh.rename(path / "state" / f"{number:09d}")
    for old in kept[:-1]:
        shutil.rmtree(old)


def kept_state(path: Path) -> Path | None:
    """The newest whole state of a study, None if it never began a trial."""
    return max((p for p in (path / "state").glob("*") if p.name.isdigit()), default=None)


def state_trials(state: Path) -> dict[str, str]:
    """{trial: Tune's status of it} in a kept state."""
    (file,) = state.glob(STATE_FILES[0])
    rows = (json.loads(row[0]) for row in json.loads(file.read_text(encoding="utf-8"))["trial_data"])
    return {row["trial_id"]: row["status"] for row in rows}
