"""What ran: versions of the libraries that numbers hang on, the commit, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def versions() -> dict[str, str]:
    """{distribution: version} of mobula, Python and the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("mobula", "ray", "torch", "gymnasium", "numpy", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def commit() -> str | None:
    """Git commit of the source tree, with "+changes" where it differs from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if dirty else "")


def machine() -> dict[str, str | int]:
    """The class of machine: cores, processor architecture, operating system."""
    return {"cores": os.cpu_count() or 1, "architecture": platform.machine(), "system": platform.system()}
