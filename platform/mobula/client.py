"""Clients of the service: `PolicyClient` for scripts, `AsyncPolicyClient` for event loops.

    with PolicyClient("http://127.0.0.1:8000", token) as client:
        answer = client.act("grid", obs)
        answer.action, answer.log_probability, answer.version

Arrays travel as MessagePack.  What did not reach a policy, or was cut off by a replica that died, is sent again with growing pauses:
acting changes nothing on the server, and draws with a seed are the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import httpx
import numpy as np

from mobula.errors import ClusterError, ConfigError, DataError
from mobula.serving import wire
from mobula.serving.schemas import Card, CardList, MechanismAnswer, Plan, PlanPiece

Array = np.ndarray[Any, Any]


class AccessError(ConfigError):
    """The token is missing, unknown, or lacks the scope (401, 403)."""


class RequestError(DataError):
    """The service refused the request (4xx).  status, and the field that is wrong where one is named."""

    def __init__(self, message: str, status: int, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class Answer:
    """A policy's answer: arrays with the leading shape of the observations."""

    policy: str
    version: str
    action: Array
    log_probability: Array | None = None
    value: Array | None = None
    state: dict[str, Array] | None = None
    fields: dict[str, Array] = field(default_factory=dict)
    """What else the method serves, by name."""


@dataclass(frozen=True)
class Retries:
    """attempts in all; the pause before the k-th repetition is drawn from [0, min(longest, first 2^k)] seconds (full jitter)."""

    attempts: int = 8
    first: float = 0.1
    longest: float = 5.0

    def pause(self, attempt: int, response: httpx.Response | None) -> float:
        # A server that says how long knows best.
        said = response.headers.get("retry-after", "") if response is not None else ""
        if said.isdecimal():
            return float(said)
        return random.uniform(0.0, min(self.longest, self.first * 2.0**attempt))


AGAIN = (429, 502, 503, 504)


class _Common:
    """What both clients do without waiting."""

    def __init__(self, url: str, token: str | None, timeout: float, retries: Retries) -> None:
        token = token or os.environ.get("MOBULA_TOKEN")
        self.url, self.retries = url.rstrip("/"), retries
        self.settings: dict[str, Any] = {
            "base_url": self.url,
            "timeout": timeout,
            "headers": {"authorization": f"Bearer {token}"} if token else {},
        }

    def act_request(self, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        given = {key: _arrays(value) for key, value in fields.items() if value is not None}
        return {
            "method": "POST",
            "url": f"/v1/policies/{name}/act",
            "content": wire.write_request(given, wire.MSGPACK),
            "headers": {"content-type": wire.MSGPACK, "accept": wire.MSGPACK},
        }

    def again(self, attempt: int, response: httpx.Response | None) -> bool:
        """Whether to send once more what got `response` (None: no answer at all)."""
        if attempt + 1 >= self.retries.attempts:
            return False
        if response is None or response.status_code in AGAIN:
            return True
        # 500 of the service itself has our form; of a replica that died on the way it has not.
        return response.status_code == 500 and _problem(response) is None

    def unanswered(self, error: Exception) -> NoReturn:
        raise ClusterError(
            f"{self.url} does not answer after {self.retries.attempts} attempts ({type(error).__name__}: {error}):"
            " is the service running (`mobula serve status`)?"
        ) from error

    def checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        problem = _problem(response) or {}
        message = problem.get("message") or f"HTTP status {response.status_code}"
        if response.status_code in (401, 403):
            raise AccessError(f"{self.url}: {message}")
        if response.status_code < 500:
            raise RequestError(message, response.status_code, problem.get("param"))
        raise ClusterError(f"{self.url}: {message}")


def _problem(response: httpx.Response) -> dict[str, Any] | None:
    try:
        found = response.json()["error"]
    except (ValueError, KeyError, TypeError, httpx.ResponseNotRead):
        return None
    return found if isinstance(found, dict) else None


def _arrays(value: Any) -> Any:
    """Lists and tensors as arrays; what is none of them stays."""
    if isinstance(value, Mapping):
        return {key: _arrays(inner) for key, inner in value.items()}
    if isinstance(value, bool | int | str):
        return value
    array = np.asarray(value)
    return array if array.dtype.kind in "biuf" else value


def _answer(response: httpx.Response) -> Answer:
    found = wire.read(response.content, wire.MSGPACK)
    known = {
        name: found.pop(name, None)
        for name in ("policy", "version", "action", "log_probability", "value", "state")
    }
    return Answer(**known, fields=found)


def _plan_request(goal: str, state: str, **more: Any) -> dict[str, Any]:
    given = {"goal": goal, "state": state, **more}
    return {"method": "POST", "url": "/v1/plans", "json": {k: v for k, v in given.items() if v is not None}}


def _mechanism_request(name: str, reports: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    body = wire.write_request({"reports": dict(reports), "seed": seed}, wire.JSON)
    return {
        "method": "POST",
        "url": f"/v1/mechanisms/{name}/run",
        "content": body,
        "headers": {"content-type": wire.JSON},
    }


def _event(line: str) -> PlanPiece | None:
    """The piece in a line of server-sent events, None where it holds none."""
    data = line.removeprefix("data: ")
    if data == line or data == "[DONE]":
        return None
    found = json.loads(data)
    if "error" in found:
        raise RequestError(found["error"]["message"], 422, found["error"].get("param"))
    return PlanPiece.model_validate(found)


class PolicyClient(_Common):
    """A client that waits.  token: default MOBULA_TOKEN.  timeout: seconds for one attempt."""

    def __init__(
        self, url: str, token: str | None = None, *, timeout: float = 60.0, retries: Retries | None = None
    ) -> None:
        super().__init__(url, token, timeout, retries or Retries())
        self.http = httpx.Client(**self.settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def send(self, **request: Any) -> httpx.Response:
        """One request, sent again where that helps.  Raises AccessError, RequestError, ClusterError."""
        attempt = 0
        while True:
            response = None
            try:
                response = self.http.request(**request)
            except httpx.TransportError as error:
                if not self.again(attempt, None):
                    self.unanswered(error)
            if response is not None and not self.again(attempt, response):
                return self.checked(response)
            time.sleep(self.retries.pause(attempt, response))
            attempt += 1

    def models(self) -> list[Card]:
        """Everything that is served."""
        return CardList.model_validate(self.send(method="GET", url="/v1/models").json()).data

    def act(
        self,
        policy: str,
        obs: Any,
        *,
        explore: bool | None = None,
        seed: int | None = None,
        state: Mapping[str, Any] | None = None,
        actions: Any = None,
    ) -> Answer:
        """What `policy` does at one observation or many (leading axes).  state: that of the last answer, for recurrent policies."""
        fields = {"obs": obs, "explore": explore, "seed": seed, "state": state, "actions": actions}
        return _answer(self.send(**self.act_request(policy, fields)))

    def run(self, mechanism: str, reports: Mapping[str, Any], *, seed: int | None = None) -> MechanismAnswer:
        """Outcome, payments and audit of a mechanism."""
        return MechanismAnswer.model_validate(
            self.send(**_mechanism_request(mechanism, reports, seed)).json()
        )

    def plan(
        self,
        goal: str,
        state: str = "",
        *,
        model: str | None = None,
        max_steps: int = 32,
        seed: int | None = None,
    ) -> Plan:
        """A plan, when it is whole."""
        request = _plan_request(goal, state, model=model, max_steps=max_steps, seed=seed)
        return Plan.model_validate(self.send(**request).json())

    def stream_plan(
        self,
        goal: str,
        state: str = "",
        *,
        model: str | None = None,
        max_steps: int = 32,
        seed: int | None = None,
    ) -> Iterator[PlanPiece]:
        """A plan, piece by piece; the last one holds it whole.  What has begun is not sent again."""
        request = _plan_request(goal, state, model=model, max_steps=max_steps, seed=seed, stream=True)
        with self.http.stream(**request) as response:
            if not response.is_success:
                response.read()
                self.checked(response)
            for line in response.iter_lines():
                piece = _event(line)
                if piece is not None:
                    yield piece


class AsyncPolicyClient(_Common):
    """The same for event loops."""

    def __init__(
        self, url: str, token: str | None = None, *, timeout: float = 60.0, retries: Retries | None = None
    ) -> None:
        super().__init__(url, token, timeout, retries or Retries())
        self.http = httpx.AsyncClient(**self.settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.http.aclose()

    async def send(self, **request: Any) -> httpx.Response:
        """One request, sent again where that helps.  Raises AccessError, RequestError, ClusterError."""
        attempt = 0
        while True:
            response = None
            try:
                response = await self.http.request(**request)
            except httpx.TransportError as error:
                if not self.again(attempt, None):
                    self.unanswered(error)
            if response is not None and not self.again(attempt, response):
                return self.checked(response)
            await asyncio.sleep(self.retries.pause(attempt, response))
            attempt += 1

    async def models(self) -> list[Card]:
        """Everything that is served."""
        return CardList.model_validate((await self.send(method="GET", url="/v1/models")).json()).data

    async def act(
        self,
        policy: str,
        obs: Any,
        *,
        explore: bool | None = None,
        seed: int | None = None,
        state: Mapping[str, Any] | None = None,
        actions: Any = None,
    ) -> Answer:
        """See `PolicyClient.act`."""
        fields = {"obs": obs, "explore": explore, "seed": seed, "state": state, "actions": actions}
        return _answer(await self.send(**self.act_request(policy, fields)))

    async def run(
        self, mechanism: str, reports: Mapping[str, Any], *, seed: int | None = None
    ) -> MechanismAnswer:
        """See `PolicyClient.run`."""
        response = await self.send(**_mechanism_request(mechanism, reports, seed))
        return MechanismAnswer.model_validate(response.json())

    async def plan(
        self,
        goal: str,
        state: str = "",
        *,
        model: str | None = None,
        max_steps: int = 32,
        seed: int | None = None,
    ) -> Plan:
        """See `PolicyClient.plan`."""
        request = _plan_request(goal, state, model=model, max_steps=max_steps, seed=seed)
        return Plan.model_validate((await self.send(**request)).json())

    async def stream_plan(
        self,
        goal: str,
        state: str = "",
        *,
        model: str | None = None,
        max_steps: int = 32,
        seed: int | None = None,
    ) -> AsyncIterator[PlanPiece]:
        """See `PolicyClient.stream_plan`."""
        request = _plan_request(goal, state, model=model, max_steps=max_steps, seed=seed, stream=True)
        async with self.http.stream(**request) as response:
            if not response.is_success:
                await response.aread()
                self.checked(response)
            async for line in response.aiter_lines():
                piece = _event(line)
                if piece is not None:
                    yield piece
