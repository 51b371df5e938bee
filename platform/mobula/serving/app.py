"""The service deployed with Ray Serve: `build(args)` is the application of a Serve config, `mobula serve run` deploys the same.

One deployment, `Gateway`, is the ingress and holds the policies (many in a replica, by Serve's model multiplexing; concurrent requests share
forward passes by `@serve.batch`), so that an observation does not travel twice.  Planners, mechanisms and language models are
deployments of their own, `service-NAME`, each with its own replicas and GPUs.

Artefacts are arguments of the deployments.  A new one is a new version: Serve starts its replica, which verifies and loads it, before the old
one stops taking requests (`max_surge_percent`); where it is refused, the old one stays.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from mobula.artifact import load_policy
from mobula.errors import ArtifactError, ConfigError, DataError
from mobula.policy import Asked, Policy
from mobula.serving import tokens
from mobula.serving.backend import (
    Backend,
    Served,
    answered,
    card_of_service,
    in_thread,
    kind_of,
    one_answer,
    run_mechanism,
)
from mobula.serving.gateway import create_app
from mobula.serving.grpc import remote_act
from mobula.serving.observing import Observer, scrape
from mobula.serving.schemas import NAME, Card, ChatRequest, PlanRequest, PlanStep
from mobula.serving.services import Piece, PlanEnd, Sampling, Settlement, load_service, read_service
from mobula.serving.sources import resolved

APPLICATION = "mobula"

MAX_ONGOING = 256
"""Requests that a replica holds at once; the batches are made of them."""


class ServiceArgs(BaseModel):
    """Arguments of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    artefacts: dict[str, str] = Field(
        min_length=1, description="name: folder, models:/NAME/VERSION or runs:/ID/policy"
    )
    versions: dict[str, str] = Field(
        default={}, description="name: version that the artefact must have; `mobula serve deploy` fills it in"
    )
    tokens: str | dict[str, Any] | None = Field(
        default=str(tokens.TOKENS_FILE), description="file of tokens, or the table in it; null asks for none"
    )
    max_body_mb: float = Field(default=16.0, gt=0, le=4096)
    timeout_s: float = Field(default=60.0, gt=0, description="time until a request is given up")
    max_batch_size: int = Field(
        default=128, ge=1, le=65536, description="requests of one forward pass; 1: no batches"
    )
    batch_wait_s: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="how long a batch waits for more; 0: those that came during the last pass",
    )
    policies_per_replica: int = Field(default=16, ge=1, description="policies that a replica keeps loaded")
    replicas: int = Field(default=1, ge=1, description="of the gateway")
    cpus: float = Field(default=1.0, ge=0, description="that each replica keeps for itself")
    gpus: float = Field(default=0.0, ge=0, description="of each replica")


def checked(args: Mapping[str, Any]) -> ServiceArgs:
    """The arguments, checked.  Raises ConfigError in one line."""
    try:
        found = ServiceArgs.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"serve: {where}: {first['msg']}") from None
    for name in found.artefacts:
        if not re.fullmatch(NAME, name):
            raise ConfigError(
                f"serve: the name {name!r}: letters, digits, dots, dashes and underscores are expected"
            )
    return found


def identified(name: str, uri: str) -> tuple[str, str]:
    """(kind of artefact, version) of what `uri` leads to, verified.  Raises ArtifactError."""
    folder = resolved(uri)
    try:
        if kind_of(folder) == "policy":
            return "policy", load_policy(folder).version
        return "service", str(read_service(folder)["digest"])[:12]
    except ArtifactError as error:
        raise ArtifactError(f"{name} is not served: {error}") from error


def build(args: Mapping[str, Any]) -> serve.Application:
    """The Serve application: `import_path: mobula.serving.app:build` with `args` as in `ServiceArgs`.

    Every artefact is verified here, so that a deployment with a bad one is refused and what ran before goes on.
    Raises ConfigError, ArtifactError.
    """
    found = checked(args)
    if found.tokens is None:
        grants = None
    elif isinstance(found.tokens, str):
        grants = tokens.as_table(tokens.read(found.tokens))
    else:
        grants = tokens.as_table(tokens.grants_from(found.tokens))
    if grants == {}:
        raise ConfigError(
            "serve: there is no token that could be used: `mobula serve token new NAME` makes one (tokens: null asks for none)"
        )
    resources = {"num_cpus": found.cpus, "num_gpus": found.gpus}
    policies, services = {}, {}
    for name, uri in found.artefacts.items():
        kind, version = identified(name, uri)
        pinned = found.versions.get(name, version)
        if pinned != version:
            raise ArtifactError(
                f"{name} is not served: {uri} has version {version}, and {pinned} was asked for"
            )
        # Replicas on other machines look from other folders.
        place = uri if re.match(r"[a-z]+:/", uri) else str(Path(uri).expanduser().resolve())
        if kind == "policy":
            policies[name] = (place, version)
        else:
            handle = ServiceHost.options(  # type: ignore[attr-defined]
                name=f"service-{name}", ray_actor_options=resources
            ).bind(name, place, version)
            services[name] = (handle, version)
    settings = found.model_dump(exclude={"artefacts", "versions", "tokens", "cpus", "gpus", "replicas"})
    return Gateway.options(  # type: ignore[attr-defined, no-any-return]
        num_replicas=found.replicas, ray_actor_options=resources
    ).bind(policies, services, grants, settings)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu"


def _verified(name: str, place: str, version: str, device: str) -> Policy:
    policy = load_policy(resolved(place), device)
    if policy.version != version:
        raise ArtifactError(f"{name}: {place} has become version {policy.version}; {version} was deployed")
    return policy


# Deployments ----------------------------------------------------------------------------------------------

# Two attempts: what is wrong with an artefact does not mend itself.
_COMMON: dict[str, Any] = {
    "max_surge_percent": 100,
    "max_constructor_retry_count": 2,
    "logging_config": {"enable_access_log": False},
}


@serve.deployment(max_ongoing_requests=4, **_COMMON)
class ServiceHost:
    """One planner, mechanism or language model."""

    def __init__(self, name: str, place: str, version: str) -> None:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        folder = resolved(place)
        self.service, card = load_service(folder, _device())
        if card.version != version:
            raise ArtifactError(f"{name}: {place} has become version {card.version}; {version} was deployed")
        self.described = card_of_service(name, self.service, card)

    async def describe(self) -> tuple[Card, dict[str, Any]]:
        return self.described

    # All computing is on threads: the loop answers Serve's health checks.  Serve wraps what is raised, so what the client can mend
    # travels as an answer.

    async def settle(self, reports: dict[str, Any], seed: int | None) -> Settlement | DataError:
        try:
            return await asyncio.to_thread(run_mechanism, self.service, reports, seed)
        except DataError as error:
            return error

    async def plan(self, request: PlanRequest) -> AsyncIterator[Any]:
        async for piece in _told(in_thread(lambda: self.service.plan(request))):
            yield piece

    async def chat_prompt(self, request: ChatRequest) -> str | DataError:
        try:
            prompt: str = self.service.chat_prompt(request.messages)
        except DataError as error:
            return error
        return prompt

    async def generate(self, prompt: str, sampling: Sampling) -> AsyncIterator[Any]:
        async for piece in _told(in_thread(lambda: self.service.generate(prompt, sampling))):
            yield piece


async def _told(pieces: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The pieces, and a DataError as the last of them where one is raised."""
    try:
        async for piece in pieces:
            yield piece
    except DataError as error:
        yield error


@serve.deployment(max_ongoing_requests=MAX_ONGOING, **_COMMON)
@serve.ingress()
class Gateway(Backend):
    """The ingress, and every policy."""

    def __init__(
        self,
        policies: dict[str, tuple[str, str]],
        services: dict[str, tuple[Any, str]],
        grants: dict[str, Any] | None,
        settings: dict[str, Any],
    ) -> None:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self.policies, self.grants, self.settings = policies, grants, settings
        self.handles = {name: handle for name, (handle, _) in services.items()}
        self.device = _device()
        self.cards, self.schemas, self.mechanisms = {}, {}, {}
        self.fresh: dict[str, Policy] = {}
        self.kept: dict[str, Policy] = {}
        for name, (place, version) in policies.items():
            served = Served(name, _verified(name, place, version, self.device))
            self.cards[name], self.schemas[name] = served.card, served.schemas
            if served.mechanism is not None:
                self.mechanisms[name] = served.mechanism
            if len(self.fresh) < settings["policies_per_replica"]:
                self.fresh[name] = served.policy

        # The limit is known only here, so the decorator is used as a function.
        async def load(name: str) -> Policy:
            return await self._loaded(name)

        self._load = serve.multiplexed(max_num_models_per_replica=settings["policies_per_replica"])(load)
        self._batched.set_max_batch_size(settings["max_batch_size"])
        self._batched.set_batch_wait_timeout_s(settings["batch_wait_s"])
        self.ready = not self.handles

    def __serve_build_asgi_app__(self) -> Any:
        keeper = None if self.grants is None else tokens.Doorkeeper(tokens.grants_from(self.grants))
        app = create_app(
            self,
            keeper,
            max_body_bytes=int(self.settings["max_body_mb"] * 2**20),
            timeout_s=self.settings["timeout_s"],
            observe=Observer(),
        )
        self.keeper = keeper
        api: Any = app.app
        api.api.router.on_startup.append(self._meet)
        return app

    async def _meet(self) -> None:
        """Asks the services for their cards: they load their models meanwhile."""
        for name, handle in self.handles.items():
            self.cards[name], self.schemas[name] = await handle.describe.remote()
        self.ready = True

    # Policies

    async def _loaded(self, name: str) -> Policy:
        policy = self.fresh.pop(name, None)
        if policy is None:
            place, version = self.policies[name]
            served = await asyncio.to_thread(
                lambda: Served(name, _verified(name, place, version, self.device))
            )
            policy = served.policy
        return policy

    async def policy(self, name: str) -> Policy:
        found = self.kept.get(name)
        if found is None:
            found = await self._load(name)
            # Where all have room, none is ever put away, and who was used last is of no interest.
            if len(self.policies) <= self.settings["policies_per_replica"]:
                self.kept[name] = found
        return found

    @serve.batch
    async def _batched(self, works: list[tuple[Policy, Asked]]) -> list[dict[str, Any] | DataError]:
        return answered(works)

    async def answer(self, policy: Policy, asked: Asked) -> dict[str, Any]:
        if policy.slow:
            return await one_answer(policy, asked)
        found: Any = await self._batched((policy, asked))
        if isinstance(found, DataError):
            raise found
        return found  # type: ignore[no-any-return]

    async def Act(self, request: Any, grpc_context: Any) -> Any:
        """The act route over gRPC."""
        return await remote_act(self, self.keeper, request, grpc_context)

    # Services

    async def settle(self, name: str, reports: dict[str, Any], seed: int | None) -> Settlement:
        if name in self.mechanisms:
            return await asyncio.to_thread(run_mechanism, self.mechanisms[name], reports, seed)
        found: Settlement = _unwrapped(await self.handles[name].settle.remote(reports, seed))
        return found

    async def plan(self, name: str, request: PlanRequest) -> AsyncIterator[str | PlanStep | PlanEnd]:
        async for piece in self.handles[name].options(stream=True).plan.remote(request):
            yield _unwrapped(piece)

    async def chat_prompt(self, name: str, request: ChatRequest) -> str:
        prompt: str = _unwrapped(await self.handles[name].chat_prompt.remote(request))
        return prompt

    async def generate(self, name: str, prompt: str, sampling: Sampling) -> AsyncIterator[Piece]:
        async for piece in self.handles[name].options(stream=True).generate.remote(prompt, sampling):
            yield _unwrapped(piece)

    async def metrics(self) -> str:
        return await scrape()


def _unwrapped(found: Any) -> Any:
    if isinstance(found, DataError):
        raise found
    return found
