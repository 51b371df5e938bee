"""Bearer tokens: kept as SHA-256 digests, each with the scopes and the rate that it is good for.

A token is 256 random bits, so a plain digest is as safe as a slow one, and looking it up costs a microsecond.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobula.errors import ConfigError
from mobula.files import storage, write_json

SCOPES: dict[str, str] = {
    "models": "list what is served, read its schemas",
    "policies": "let policies act",
    "mechanisms": "run mechanisms",
    "plans": "ask for plans",
    "completions": "ask language models",
    "metrics": "read the service's metrics",
}
"""Scope -> what a token with it may do.  "*" stands for all of them."""

PREFIX = "mob_"
TOKENS_FILE = Path("~/.mobula/tokens.json")


@dataclass(frozen=True)
class Grant:
    """What a token is good for.  rate: requests a second (bursts of as many, at least one), None for no limit."""

    name: str
    scopes: frozenset[str]
    rate: float | None = None

    def allows(self, scope: str) -> bool:
        return scope in self.scopes or "*" in self.scopes


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def grants_from(table: Any, where: str = "tokens") -> dict[str, Grant]:
    """{digest: Grant} of {digest: {"name", "scopes", "rate"}}.  Raises ConfigError for what is no such table."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: a table of tokens by their SHA-256 digest is expected")
    found = {}
    for key, entry in table.items():
        if not (isinstance(key, str) and re.fullmatch(r"[0-9a-f]{64}", key)) or not isinstance(
            entry, Mapping
        ):
            raise ConfigError(
                f"{where}: {str(key)[:8]!r} is no SHA-256 digest with a table: `mobula serve token new` writes them"
            )
        name, scopes, rate = entry.get("name"), entry.get("scopes"), entry.get("rate")
        if not isinstance(name, str) or not isinstance(scopes, list):
            raise ConfigError(f"{where}: token {key[:8]}: name (text) and scopes (a list) are needed")
        found[key] = Grant(name, _checked(scopes, where), _rate(rate, where))
    return found


def _checked(scopes: Iterable[Any], where: str) -> frozenset[str]:
    given = frozenset(scopes)
    unknown = sorted(str(scope) for scope in given - {*SCOPES, "*"})
    if unknown or not given:
        raise ConfigError(
            f"{where}: the scopes are {', '.join(SCOPES)} and *; got {', '.join(unknown) or 'none'}"
        )
    return given


def _rate(rate: Any, where: str) -> float | None:
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e9:
        raise ConfigError(f"{where}: rate is {rate!r}; requests a second, above 0, are expected")
    return float(rate)


def read(path: str | Path) -> dict[str, Grant]:
    """The tokens in the file `path`; none where there is no file.  Raises ConfigError for a file that is none of ours."""
    file = Path(path).expanduser()
    if not file.is_file():
        return {}
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no table of tokens ({error}): move it away and make new ones") from None
    return grants_from(table, str(file))


def as_table(grants: Mapping[str, Grant]) -> dict[str, dict[str, Any]]:
    """Plain data of {digest: Grant}: what the file holds, and what a Serve config carries."""
    return {
        key: {"name": grant.name, "scopes": sorted(grant.scopes), "rate": grant.rate}
        for key, grant in grants.items()
    }


def new(
    path: str | Path, name: str, scopes: Iterable[str] = ("*",), rate: float | None = None
) -> tuple[str, Grant]:
    """Adds a token to the file and returns it: the only time that it can be seen."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigError(f"a token's name has 1 to 64 letters, digits, dots, dashes; got {name!r}")
    grants = read(path)
    if any(grant.name == name for grant in grants.values()):
        raise ConfigError(
            f"there is a token {name!r} already: `mobula serve token revoke {name}` takes it back"
        )
    token, grant = fresh(name, scopes, rate)
    save(path, {**grants, digest(token): grant})
    return token, grant


def fresh(name: str, scopes: Iterable[str] = ("*",), rate: float | None = None) -> tuple[str, Grant]:
    """A token that is in no file yet."""
    grant = Grant(name, _checked(scopes, "scopes"), _rate(rate, "rate"))
    return PREFIX + secrets.token_urlsafe(32), grant


def revoke(path: str | Path, name: str) -> None:
    """Takes the token `name` out of the file.  Raises ConfigError where there is none."""
    grants = read(path)
    kept = {key: grant for key, grant in grants.items() if grant.name != name}
    if len(kept) == len(grants):
        names = ", ".join(sorted(grant.name for grant in grants.values())) or "none"
        raise ConfigError(f"{Path(path).expanduser()} holds no token {name!r}; it holds {names}")
    save(path, kept)


def save(path: str | Path, grants: Mapping[str, Grant]) -> None:
    """Writes the file, for its owner's eyes alone."""
    file = Path(path).expanduser()
    with storage(file):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(file, as_table(grants))
    os.chmod(file, 0o600)


class Doorkeeper:
    """Who may pass: tokens by digest, and how much of its rate each has used here (a token bucket each)."""

    def __init__(self, grants: Mapping[str, Grant]) -> None:
        self.grants = dict(grants)
        self._buckets: dict[str, tuple[float, float]] = {}

    def grant(self, authorization: str) -> tuple[str, Grant] | None:
        """(digest, Grant) of an Authorization header, None where it is no token of ours."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            return None
        key = digest(token.strip())
        grant = self.grants.get(key)
        return None if grant is None else (key, grant)

    def wait(self, key: str, rate: float | None, now: float | None = None) -> float:
        """Seconds until this request may pass: 0 where it may now, which then counts."""
        if rate is None:
            return 0.0
        now = time.monotonic() if now is None else now
        most = max(1.0, rate)
        left, then = self._buckets.get(key, (most, now))
        left = min(most, left + (now - then) * rate)
        if left < 1.0:
            self._buckets[key] = (left, now)
            return (1.0 - left) / rate
        self._buckets[key] = (left - 1.0, now)
        return 0.0
