"""What stands before every route: tokens, scopes, rates, limits of size and time, the access log."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from mobula.serving.schemas import ErrorAnswer, Problem
from mobula.serving.tokens import Doorkeeper

log = logging.getLogger("ray.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/healthz", "/readyz")
"""Routes that ask for no token."""

SCOPE_OF = (
    ("/v1/models", "models"),
    ("/v1/policies/", "policies"),
    ("/v1/mechanisms/", "mechanisms"),
    ("/v1/plans", "plans"),
    ("/v1/chat/completions", "completions"),
    ("/v1/completions", "completions"),
    ("/metrics", "metrics"),
)

# The browser asks for the token (as the password) only where a person would look.
BROWSED = ("/docs", "/openapi.json")

LONGEST_ID = 128

NOTE_SECONDS = 0.2
"""How long a line of the access log may wait for others."""

HEADERS = "mobula.headers"
"""Key of the request's headers, {name: text}, in the scope."""


class Refusal(Exception):
    """An answer that is decided before, or instead of, the route's own."""

    def __init__(
        self, status: int, type: str, message: str, param: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.problem = Problem(message=message, type=type, param=param)  # type: ignore[arg-type]

    @property
    def body(self) -> bytes:
        return ErrorAnswer(error=self.problem).model_dump_json().encode()


def scope_of(path: str) -> str:
    """The scope that a path asks for; reading the descriptions asks for "models"."""
    return next((scope for prefix, scope in SCOPE_OF if path.startswith(prefix)), "models")


def bearer(header: str) -> str:
    """An Authorization header as a bearer's; a browser's Basic holds the token as the password."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return header
    try:
        _, _, token = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return f"Bearer {token}"


class Guard:
    """ASGI middleware, outside everything else.  `doorkeeper` None: everybody may pass (the service then listens on loopback alone).

    observe: told {(scope, status): requests} every now and then, as the access log is written.
    """

    def __init__(
        self,
        app: App,
        doorkeeper: Doorkeeper | None,
        *,
        max_body_bytes: int,
        timeout_s: float,
        observe: Callable[[Mapping[tuple[str, int], int]], None] | None = None,
    ) -> None:
        self.app, self.doorkeeper = app, doorkeeper
        self.max_body_bytes, self.timeout_s, self.observe = max_body_bytes, timeout_s, observe
        self._lines: list[str] = []
        self._counts: Counter[tuple[str, int]] = Counter()
        self._waiting = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        scope[HEADERS] = headers
        # Serve gives every request an id, and sends it back.
        request_id = headers.get(b"x-request-id", "")[:LONGEST_ID] or uuid.uuid4().hex
        # Without the prefix that the application is deployed under.
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        status, whole, token = 0, False, "-"

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                whole = not message.get("more_body", False)
            await send(message)

        try:
            token = self._admitted(path, headers)
            limited = self._limited(headers, receive)
            async with asyncio.timeout(self.timeout_s):
                await self.app(scope, limited, sent)
        except Exception as error:
            if not status:
                await refuse(refusal_of(error, request_id, self.timeout_s), sent)
            elif not whole:
                # Half of the answer is on its way: all that is left is to stop in the middle, which the client sees.
                raise
        finally:
            self._note(request_id, token, scope, path, status, time.perf_counter() - begun)

    def _note(
        self, request_id: str, token: str, scope: Scope, path: str, status: int, seconds: float
    ) -> None:
        if path in OPEN:
            return
        self._counts[scope_of(path), status] += 1
        line = {
            "id": request_id,
            "token": token,
            "client": (scope.get("client") or ("-",))[0],
            "method": scope["method"],
            "path": path,
            "status": status,
            "ms": round(1000 * seconds, 2),
        }
        self._lines.append(json.dumps(line))
        if not self._waiting:
            # A record of the log costs more than the answer of a small policy, so many lines share one.
            self._waiting = True
            asyncio.get_running_loop().call_later(NOTE_SECONDS, self._write)

    def _write(self) -> None:
        lines, counts = self._lines, self._counts
        self._lines, self._counts, self._waiting = [], Counter(), False
        log.info("access\n%s", "\n".join(lines))
        if self.observe is not None:
            self.observe(counts)

    def _admitted(self, path: str, headers: dict[bytes, str]) -> str:
        """The name of the token that opens `path`.  Raises Refusal."""
        if path in OPEN or self.doorkeeper is None:
            return "-"
        return admitted(self.doorkeeper, headers.get(b"authorization", ""), scope_of(path), path in BROWSED)

    def _limited(self, headers: dict[bytes, str], receive: Receive) -> Receive:
        """`receive`, which counts."""
        most = self.max_body_bytes
        declared = headers.get(b"content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_large(most)
        count = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal count
            message = await receive()
            if message["type"] == "http.request":
                count += len(message.get("body", b""))
                if count > most:
                    raise too_large(most)
            return message

        return counted


def refusal_of(error: Exception, request_id: str, timeout_s: float) -> Refusal:
    """What the client is told of an error: its own words where it is a Refusal, none of an inner failure."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, TimeoutError):
        return Refusal(504, "timeout", f"no answer within {timeout_s:g} s")
    log.error("request %s failed", request_id, exc_info=error)
    return Refusal(500, "server", f"the service failed; its log tells more under the request id {request_id}")


async def refuse(refusal: Refusal, send: Send) -> None:
    extra = [(name.replace("_", "-").encode(), value.encode()) for name, value in refusal.headers.items()]
    await respond(refusal.status, refusal.body, "application/json", send, extra)


async def respond(
    status: int, body: bytes, kind: str, send: Send, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """A whole answer."""
    described = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": described})
    await send({"type": "http.response.body", "body": body})


def admitted(doorkeeper: Doorkeeper, header: str, scope: str, browsed: bool = False) -> str:
    """The name of the token in an Authorization header, if it has the scope and its rate is not used up.  Raises Refusal."""
    found = doorkeeper.grant(bearer(header))
    if found is None:
        asked = 'Basic realm="mobula"' if browsed else "Bearer"
        raise Refusal(
            401,
            "authentication",
            "a token is needed: send the header `Authorization: Bearer TOKEN` (`mobula serve token new` makes one)",
            **{"www-authenticate": asked},
        )
    key, grant = found
    if not grant.allows(scope):
        raise Refusal(403, "permission", f"the token {grant.name!r} lacks the scope {scope!r}")
    wait = doorkeeper.wait(key, grant.rate)
    if wait > 0:
        raise Refusal(
            429,
            "rate_limit",
            f"the token {grant.name!r} is good for {grant.rate:g} requests a second: wait {wait:.3g} s",
            **{"retry-after": str(max(1, round(wait + 0.5)))},
        )
    return grant.name


def too_large(most: int) -> Refusal:
    return Refusal(
        413, "too_large", f"the body is larger than {most} bytes: send fewer rows, or send them as bytes"
    )
