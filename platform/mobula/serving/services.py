"""What can be served beside policies: planners, mechanisms and language models, and the folder that each is exported to.

A service is a class with `load(folder, settings, device)`, registered under a name in the entry-point group `mobula.services`, and the
methods of one of the three protocols below.  One that is made of a trained policy has `export(run, folder)` too (`mobula export
--service`).  Its artefact is a folder: `service.json` names the class by its registered name (never by
a path), holds its settings, and lists every file with its SHA-256 digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel

from mobula import registry
from mobula.artifact import read_manifest, sealed
from mobula.errors import ArtifactError, ConfigError
from mobula.files import replaced_folder, write_json
from mobula.serving.schemas import Card, Finish, Message, PlanRequest, PlanStep, Safety
from mobula.versions import versions

FORMAT, FORMAT_VERSION, MANIFEST = "mobula-service", 1, "service.json"

Kind = Literal["planner", "mechanism", "language_model"]


class Service(Protocol):
    """What all of them have."""

    kind: ClassVar[Kind]

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any], device: str) -> Service:
        """The service from its verified files.  Raises ArtifactError where they do not fit together."""
        ...


# Planners -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanEnd:
    """What a planner says when it is done.  cost: its own estimate, in its own units."""

    cost: float | None = None
    safety: Safety = field(default_factory=lambda: Safety(verdict="unknown"))


class Planner(Service, Protocol):
    """A planner thinks and acts piece by piece."""

    def plan(self, request: PlanRequest) -> Iterator[str | PlanStep | PlanEnd]:
        """Pieces of the rationale (str) and steps, in the order in which they come, and a PlanEnd at the end.

        The same request with the same seed gives the same plan.  Raises DataError, whose text begins with the name of a field, for a
        goal or a state that it cannot read.
        """
        ...


# Mechanisms -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settlement:
    """outcome: who gets what; payments by participant; audit: what is needed to check both."""

    outcome: dict[str, Any]
    payments: dict[str, float]
    audit: dict[str, Any]


class Mechanism(Service, Protocol):
    """Reports in; outcome and payments out."""

    @property
    def reports(self) -> type[BaseModel]:
        """The schema of the reports; its `model_config["json_schema_extra"]["examples"]` holds at least one."""
        ...

    def run(self, reports: Any, seed: int | None) -> Settlement:
        """Runs the mechanism on checked reports.  Raises DataError, beginning with a field's name, where they make no sense."""
        ...


# Language models ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens.  temperature 0: the most likely one.  top_logprobs: how many alternatives to report, None for no log
    probabilities at all.  max_tokens None: as many as the model's context holds."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A generated token: its text, log probability, and the most likely ones at its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some more text, with the tokens that it is made of; the last piece says why it ended and what was counted."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class LanguageModel(Service, Protocol):
    """Text in, text out."""

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """The text that a conversation becomes.  Raises DataError where the model has no form for conversations."""
        ...

    def generate(self, prompt: str, sampling: Sampling) -> Iterator[Piece]:
        """Pieces of the continuation.  Raises DataError where the prompt does not fit the context."""
        ...


# Artefacts ------------------------------------------------------------------------------------------------


def save_service(
    path: str | Path,
    loader: str,
    settings: Mapping[str, Any],
    files: Mapping[str, bytes | Path],
    description: str = "",
) -> Path:
    """Writes the artefact of a service to the folder `path` (replaced whole, or not at all).

    loader: registered name of its class; files: content, or the file to copy, by relative name.
    Raises ConfigError for an unknown loader, ArtifactError for a name that leaves the folder.
    """
    registry.service_class(loader)
    with replaced_folder(path) as folder:
        digests = {}
        for name, content in files.items():
            target = folder / _safe(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            data = content if isinstance(content, bytes) else Path(content).read_bytes()
            target.write_bytes(data)
            digests[name] = hashlib.sha256(data).hexdigest()
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "loader": loader,
            "settings": dict(settings),
            "files": digests,
            "description": description,
            "versions": versions(),
        }
        write_json(folder / MANIFEST, sealed(manifest))
    return Path(path)


def _safe(name: Any) -> PurePosixPath:
    """`name` as a path inside the folder.  Raises ArtifactError for any other."""
    good = (
        isinstance(name, str)
        and 0 < len(name) <= 512
        and "\\" not in name
        and all(part not in ("", ".", "..") for part in name.split("/"))
        and not any(ord(c) < 32 for c in name)
    )
    if not good or ":" in name:
        raise ArtifactError(f"{str(name)[:80]!r} is no name of a file inside the artefact")
    return PurePosixPath(name)


def read_service(path: str | Path) -> dict[str, Any]:
    """The manifest of the service in the folder `path`, its files checked one by one.  Raises ArtifactError."""
    folder = Path(path)
    manifest = read_manifest(folder / MANIFEST, FORMAT, FORMAT_VERSION)
    files, settings = manifest.get("files"), manifest.get("settings")
    if not isinstance(files, dict) or not isinstance(settings, dict):
        raise ArtifactError(f"{folder / MANIFEST}: files and settings are missing: export it again")
    if not isinstance(manifest.get("loader"), str):
        raise ArtifactError(f"{folder / MANIFEST}: the loader is missing: export it again")
    root = folder.resolve()
    for name, wanted in files.items():
        file = folder / _safe(name)
        # A link could lead out of the folder, or change after it was checked.
        if not file.is_file() or file.resolve() != root / name:
            raise ArtifactError(f"{file} is missing, or no file of the artefact's own: export it again")
        if (
            not isinstance(wanted, str)
            or not re.fullmatch(r"[0-9a-f]{64}", wanted)
            or _sha256(file) != wanted
        ):
            raise ArtifactError(f"{file} is truncated or has been changed: export it again")
    return manifest


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_service(path: str | Path, device: str = "cpu") -> tuple[Any, Card]:
    """(service, its card without a name) of the artefact in `path`.

    Raises ArtifactError where the folder is damaged, its class is not registered, or does not take what it finds.
    """
    folder = Path(path)
    manifest = read_service(folder)
    try:
        cls = registry.service_class(manifest["loader"])
        service = cls.load(folder, manifest["settings"], device)
    except (
        *(ConfigError, LookupError, TypeError, ValueError, AttributeError, OSError),
        *(ArithmeticError, AssertionError, RuntimeError, MemoryError),
    ) as error:
        # The settings may be anything that somebody wrote by hand.
        raise ArtifactError(f"{folder} cannot be loaded: {error}") from error
    card = Card(
        id="",
        kind=service.kind,
        version=manifest["digest"][:12],
        method=manifest["loader"],
        description=str(manifest.get("description", "")),
    )
    return service, card
