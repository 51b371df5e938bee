"""Writing files so that nothing is ever half-written, and saying in one line why a file cannot be written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobula.errors import StorageError


@contextlib.contextmanager
def storage(path: str | Path) -> Iterator[None]:
    """Turns an operating-system error on `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(
                f"no space left on the disk of {path}: free some, or choose another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise StorageError(f"cannot write {path} ({error.strerror}): choose another folder") from error
        raise


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` to a temporary name beside `path` and renames it."""
    path = Path(path)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


def write_json(path: str | Path, data: Any) -> Path:
    """`data` as indented JSON (no NaN, no infinities)."""
    return write_text(path, json.dumps(data, indent=2, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    # NumPy scalars and arrays.
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


@contextlib.contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well, and is removed when it does not."""
    path = Path(path)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
                os.replace(path, old / path.name)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
