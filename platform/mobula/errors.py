"""The errors that a user can mend.

Every message is one line that says what is wrong, where, and how to mend it.  The command line prints that line
and exits with 2; everything else that escapes is a failed run (exit 1) and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MobulaError(Exception):
    """Base class: something that the user can mend."""


class ConfigError(MobulaError):
    """An unknown or out-of-range setting, or a method and an environment that do not fit together."""


class DataError(MobulaError):
    """Data that cannot be used: missing, truncated, of the wrong shape, or not finite."""


class ArtifactError(MobulaError):
    """An exported policy or a checkpoint that is truncated, tampered with, or of another method."""


class EnvironmentFault(MobulaError):
    """An environment that returned something impossible (NaN, a wrong shape); says which index and step."""


class TrainingFault(MobulaError):
    """Learning that left the finite numbers; says which quantity, when, and which setting to look at."""


class StorageError(MobulaError):
    """A run folder that cannot be written, or a full disk."""


class ClusterError(MobulaError):
    """A Ray cluster or tracking server that does not answer."""


def nearest(name: str, options: Iterable[str], *, n: int = 3) -> str:
    """A did-you-mean sentence (with a leading blank), or an empty string if nothing is near `name`."""
    lowered = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), lowered, n=n, cutoff=0.5)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(lowered[match]) for match in close)}?"
