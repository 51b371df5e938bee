"""What stands behind the routes: policies, mechanisms, planners and language models, loaded, by name.

`LocalBackend` holds them in this process (tests, notebooks); `mobula.serving.app` spreads them over Serve's deployments.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from mobula.artifact import MANIFEST as POLICY
from mobula.artifact import load_policy, policy_folder
from mobula.errors import ArtifactError, DataError
from mobula.policy import Asked, Policy
from mobula.serving import acting
from mobula.serving.schemas import Card, ChatRequest, MechanismAnswer, PlanRequest, PlanStep
from mobula.serving.services import MANIFEST as SERVICE
from mobula.serving.services import Piece, PlanEnd, Sampling, Settlement, load_service

T = TypeVar("T")

SLOW_SECONDS = 0.005
"""A policy that takes longer for one observation answers on a thread, so that the others need not wait for it."""


class Backend:
    """What the routes ask for.  cards: everything that is served, by name."""

    cards: dict[str, Card]
    schemas: dict[str, dict[str, Any]]
    """Request and answer schemas of policies, report schemas of mechanisms, by name."""
    ready = True

    async def policy(self, name: str) -> Policy:
        """The policy `name`, loaded."""
        raise NotImplementedError

    async def answer(self, policy: Policy, asked: Asked) -> dict[str, Any]:
        """Its answer to one request, of a batch where others ask at the same time."""
        raise NotImplementedError

    async def settle(self, name: str, reports: dict[str, Any], seed: int | None) -> Settlement:
        """What the mechanism `name` decides."""
        raise NotImplementedError

    def plan(self, name: str, request: PlanRequest) -> AsyncIterator[str | PlanStep | PlanEnd]:
        raise NotImplementedError

    async def chat_prompt(self, name: str, request: ChatRequest) -> str:
        raise NotImplementedError

    def generate(self, name: str, prompt: str, sampling: Sampling) -> AsyncIterator[Piece]:
        raise NotImplementedError

    async def metrics(self) -> str:
        """Prometheus' text format."""
        raise NotImplementedError


# Policies in this process -----------------------------------------------------------------------------------


class Served:
    """A policy with its card, its schemas, and how long it takes."""

    def __init__(self, name: str, policy: Policy) -> None:
        # The first call sets up what the following ones find; the second one is timed.
        policy.example()
        begun = time.perf_counter()
        policy.example()
        policy.slow = time.perf_counter() - begun > SLOW_SECONDS
        self.policy = policy
        self.card = acting.describe(name, policy)
        example = self.card.example or {}
        self.schemas = {
            "request": acting.request_schema(policy),
            "answer": acting.answer_schema(policy, example["answer"]),
        }
        mechanism = getattr(policy.module, "mechanism", None)
        self.mechanism = None if mechanism is None else mechanism(policy)
        if self.mechanism is not None:
            # A policy that is a mechanism too: the leader's decision of a game.
            card, schemas = card_of_service(
                name, self.mechanism, self.card.model_copy(update={"kind": "mechanism"})
            )
            self.card = self.card.model_copy(update={"description": "also a mechanism"})
            self.schemas |= {**schemas, "mechanism_example": card.example or {}}


def answered(works: Sequence[tuple[Policy, Asked]]) -> list[dict[str, Any] | DataError]:
    """The answers of a batch, policy by policy; a DataError in the place of a request that its policy cannot answer."""
    found: list[Any] = [None] * len(works)
    groups: dict[int, list[int]] = {}
    for index, (policy, _) in enumerate(works):
        groups.setdefault(id(policy), []).append(index)
    for members in groups.values():
        policy = works[members[0]][0]
        try:
            answers: Sequence[Any] = policy.answers([works[index][1] for index in members])
        except DataError as error:
            # Somebody's observation makes no sense to the module: each alone, so that the others get their answers.
            answers = [error] if len(members) == 1 else [answered([works[index]])[0] for index in members]
        for index, answer in zip(members, answers, strict=True):
            found[index] = answer
    return found


def card_of_service(name: str, service: Any, card: Card) -> tuple[Card, dict[str, Any]]:
    """(card, schemas) of a loaded service."""
    if card.kind != "mechanism":
        return card.model_copy(update={"id": name}), {}
    schema = service.reports.model_json_schema()
    examples = schema.pop("examples", [])
    if not examples:
        raise ArtifactError(f"{name}: the reports of the mechanism have no example in their schema")
    settled = service.run(service.reports.model_validate(examples[0]), 0)
    example = {
        "request": {"reports": examples[0], "seed": 0},
        "answer": mechanism_answer(name, card.version, settled).model_dump(),
    }
    return card.model_copy(update={"id": name, "example": example}), {"reports": schema}


def mechanism_answer(name: str, version: str, settled: Settlement) -> MechanismAnswer:
    return MechanismAnswer(
        mechanism=name,
        version=version,
        outcome=settled.outcome,
        payments=settled.payments,
        audit=settled.audit,
    )


def run_mechanism(mechanism: Any, reports: dict[str, Any], seed: int | None) -> Settlement:
    """Runs a mechanism on unchecked reports.  Raises DataError that names the field."""
    try:
        checked = mechanism.reports.model_validate(reports, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("reports", *first["loc"]))
        raise DataError(f"{where}: {first['msg']}") from None
    settled: Settlement = mechanism.run(checked, seed)
    return settled


async def in_thread(pieces: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
    """The items of an iterator that computes, one by one, off the event loop; it is closed when nobody wants the rest."""
    done: Any = object()
    iterator: Any = await asyncio.to_thread(pieces)
    pending: asyncio.Task[Any] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(asyncio.to_thread(next, iterator, done))
            item = await asyncio.shield(pending)
            if item is done:
                return
            yield item
    finally:
        # A generator cannot be closed while it computes.
        if pending is not None and not pending.done():
            await asyncio.wait([pending])
        if hasattr(iterator, "close"):
            iterator.close()


class LocalBackend(Backend):
    """Everything in this process.  artefacts: {name: folder}."""

    def __init__(self, artefacts: Mapping[str, str], device: str = "cpu") -> None:
        self.cards, self.schemas = {}, {}
        self.served: dict[str, Served] = {}
        self.services: dict[str, Any] = {}
        for name, path in artefacts.items():
            if kind_of(path) == "policy":
                served = Served(name, load_policy(path, device))
                self.served[name] = served
                self.cards[name], self.schemas[name] = served.card, served.schemas
                if served.mechanism is not None:
                    self.services[name] = served.mechanism
            else:
                service, card = load_service(path, device)
                self.services[name] = service
                self.cards[name], self.schemas[name] = card_of_service(name, service, card)

    async def policy(self, name: str) -> Policy:
        return self.served[name].policy

    async def answer(self, policy: Policy, asked: Asked) -> dict[str, Any]:
        return await one_answer(policy, asked)

    async def settle(self, name: str, reports: dict[str, Any], seed: int | None) -> Settlement:
        return await asyncio.to_thread(run_mechanism, self.services[name], reports, seed)

    def plan(self, name: str, request: PlanRequest) -> AsyncIterator[str | PlanStep | PlanEnd]:
        return in_thread(lambda: self.services[name].plan(request))

    async def chat_prompt(self, name: str, request: ChatRequest) -> str:
        prompt: str = self.services[name].chat_prompt(request.messages)
        return prompt

    def generate(self, name: str, prompt: str, sampling: Sampling) -> AsyncIterator[Piece]:
        return in_thread(lambda: self.services[name].generate(prompt, sampling))

    async def metrics(self) -> str:
        return "# metrics come from Ray: this service runs without it\n"


async def one_answer(policy: Policy, asked: Asked) -> dict[str, Any]:
    """The answer to one request alone.  Raises DataError."""
    works = [(policy, asked)]
    (found,) = await asyncio.to_thread(answered, works) if policy.slow else answered(works)
    if isinstance(found, DataError):
        raise found
    return found


def kind_of(path: str) -> Literal["policy", "service"]:
    """Which artefact the folder `path` holds.  Raises ArtifactError where it holds none."""
    if (policy_folder(path) / POLICY).is_file():
        return "policy"
    if (Path(path) / SERVICE).is_file():
        return "service"
    raise ArtifactError(
        f"{path} is no artefact: a folder with {POLICY} (`mobula export`, or a run's folder) or {SERVICE} is expected"
    )
