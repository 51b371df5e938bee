"""The service as an ASGI application: routes and checks.  It knows nothing of Ray; a `Backend` answers."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from mobula import __version__
from mobula.errors import DataError
from mobula.policy import Policy
from mobula.serving import acting, completions, wire
from mobula.serving.backend import Backend, mechanism_answer
from mobula.serving.guard import (
    HEADERS,
    Guard,
    Receive,
    Refusal,
    Scope,
    Send,
    refusal_of,
    refuse,
    respond,
)
from mobula.serving.openapi import DESCRIPTION, ERRORS, openapi
from mobula.serving.schemas import (
    NAME,
    Card,
    CardList,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Health,
    MechanismAnswer,
    MechanismRequest,
    Plan,
    PlanPiece,
    PlanRequest,
    PlanStep,
)
from mobula.serving.services import Piece, Sampling
from mobula.serving.tokens import Doorkeeper

Name = Annotated[str, Path(pattern=NAME, description="what `GET /v1/models` lists")]


class Service:
    """The ASGI application: the act route by itself, everything else in FastAPI.

    FastAPI's layers cost several times as much as the answer of a small policy.
    """

    def __init__(self, api: FastAPI, backend: Backend) -> None:
        self.api, self.backend = api, backend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            found = ACT.fullmatch(path)
            if found is not None and scope["method"] == "POST":
                await act(self.backend, found[1], scope, receive, send)
                return
        await self.api(scope, receive, send)


ACT = re.compile(r"/v1/policies/([^/]+)/act")


def create_app(
    backend: Backend,
    doorkeeper: Doorkeeper | None,
    *,
    max_body_bytes: int = 16 * 2**20,
    timeout_s: float = 60.0,
    observe: Callable[[Mapping[tuple[str, int], int]], None] | None = None,
) -> Guard:
    """The service.  doorkeeper None: no tokens are asked for."""
    api = create_api(backend)
    return Guard(
        Service(api, backend),
        doorkeeper,
        max_body_bytes=max_body_bytes,
        timeout_s=timeout_s,
        observe=observe,
    )


def create_api(backend: Backend) -> FastAPI:
    """Every route but that of policies, and the document of all of them."""
    api = FastAPI(
        title="mobula",
        version=__version__,
        description=DESCRIPTION,
        responses=ERRORS,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    _handlers(api)
    _general(api, backend)
    _policies(api)
    _mechanisms(api, backend)
    _plans(api, backend)
    _language(api, backend)
    api.openapi = lambda: openapi(api, backend)  # type: ignore[method-assign]
    return api


def _error(status: int, type: Any, message: str, param: str | None = None, headers: Any = None) -> Response:
    refusal = Refusal(status, type, message, param)
    return Response(refusal.body, status, headers, media_type="application/json")


_FIELDS = (
    set(acting.ActRequest.model_fields)
    | set(MechanismRequest.model_fields)
    | set(PlanRequest.model_fields)
    | set(ChatRequest.model_fields)
    | set(CompletionRequest.model_fields)
)


def _wrong(error: DataError) -> Refusal:
    """422 of an error whose text begins with the field's name."""
    message = str(error)
    found = re.match(r"([A-Za-z_]\w*)[\w.-]*", message)
    named = found is not None and (found[1] in _FIELDS or message.startswith(f"{found[0]}: "))
    return Refusal(422, "invalid_request", message, found[0].rstrip(".") if found and named else None)


def _handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
        field = ".".join(where)
        message = first["msg"].removeprefix("Value error, ")
        return _error(422, "invalid_request", f"{field}: {message}" if field else message, field or None)

    @app.exception_handler(DataError)
    async def wrong(request: Request, error: DataError) -> Response:
        told = _wrong(error)
        return Response(told.body, told.status, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        kind = "not_found" if error.status_code == 404 else "invalid_request"
        return _error(error.status_code, kind, str(error.detail), headers=error.headers)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return Response(error.body, error.status, media_type="application/json")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        told = refusal_of(error, request.headers.get("x-request-id", "-"), 0.0)
        return Response(told.body, told.status, media_type="application/json")


def _find(backend: Backend, name: str, *kinds: str) -> Card:
    """The card of what is served as `name`.  Raises Refusal where nothing of these kinds is."""
    card = backend.cards.get(name)
    if card is not None and (card.kind in kinds or _is_mechanism(backend, name, kinds)):
        return card
    fitting = [n for n, c in backend.cards.items() if c.kind in kinds or _is_mechanism(backend, n, kinds)]
    raise Refusal(
        404,
        "not_found",
        f"no {' or '.join(kinds).replace('_', ' ')} {name!r} is served; there are:"
        f" {', '.join(sorted(fitting)) or 'none'}",
        "model" if "planner" in kinds or "language_model" in kinds else "name",
    )


def _is_mechanism(backend: Backend, name: str, kinds: Sequence[str]) -> bool:
    return "mechanism" in kinds and "reports" in backend.schemas.get(name, {})


def _general(app: FastAPI, backend: Backend) -> None:
    @app.get("/healthz", tags=["health"], summary="The process answers")
    async def healthz() -> Health:
        return Health(status="ok")

    @app.get("/readyz", tags=["health"], summary="Everything is loaded", responses={503: {"model": Health}})
    async def readyz() -> Response:
        status: Literal["ok", "starting"] = "ok" if backend.ready else "starting"
        return JSONResponse(Health(status=status).model_dump(), 200 if backend.ready else 503)

    @app.get("/v1/models", tags=["models"], summary="Everything that is served")
    async def models() -> CardList:
        return CardList(data=list(backend.cards.values()))

    @app.get("/v1/models/{name}", tags=["models"], summary="One of them")
    async def model(name: Name) -> Card:
        return _find(backend, name, "policy", "mechanism", "planner", "language_model")

    @app.get(
        "/metrics",
        tags=["health"],
        summary="Prometheus' text format",
        response_class=PlainTextResponse,
    )
    async def metrics() -> str:
        return await backend.metrics()


# Policies ---------------------------------------------------------------------------------------------------


def _policies(app: FastAPI) -> None:
    @app.post("/v1/policies/{name}/act", tags=["policies"], include_in_schema=False)
    async def act(name: Name) -> None:
        """Answered by `Service`; here so that other methods get 405."""
        raise RuntimeError("the act route is answered outside")


async def act(backend: Backend, name: str, scope: Scope, receive: Receive, send: Send) -> None:
    """POST /v1/policies/{name}/act"""
    try:
        status, body, kind, headers = await _acted(backend, name, scope, receive)
    except wire.BadType as error:
        await refuse(Refusal(415, "invalid_request", str(error)), send)
    except DataError as error:
        await refuse(_wrong(error), send)
    else:
        await respond(status, body, kind, send, headers)


async def _acted(
    backend: Backend, name: str, scope: Scope, receive: Receive
) -> tuple[int, bytes, str, list[tuple[bytes, bytes]]]:
    """(status, body, its type, headers) of an answer.  Raises Refusal, DataError."""
    card = _find(backend, name, "policy")
    sent: dict[bytes, str] = scope[HEADERS]
    kind = wire.media_type(sent.get(b"content-type"))
    policy = await backend.policy(name)
    fields = _fields(await _body(receive), kind, scope, policy)
    asked = policy.check(
        fields.obs,
        explore=fields.explore,
        seed=fields.seed,
        state=fields.state,
        actions=fields.actions,
        bounds=True,
    )
    answer = await backend.answer(policy, asked)
    how = wire.accepted(sent.get(b"accept"), kind)
    if how != wire.RAW:
        return 200, wire.write({"policy": name, "version": card.version, **answer}, how), how, []
    action = answer["action"]
    headers = [
        (b"x-mobula-dtype", action.dtype.str.encode()),
        (b"x-mobula-shape", ",".join(str(n) for n in action.shape).encode()),
        (b"x-mobula-version", card.version.encode()),
    ]
    return 200, action.tobytes(), wire.RAW, headers


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DataError("the client has gone before its request was whole")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _fields(body: bytes, kind: str, scope: Scope, policy: Policy) -> acting.ActRequest:
    if kind == wire.RAW:
        given: dict[str, Any] = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        unknown = sorted(given.keys() - {"explore", "seed"})
        if unknown:
            raise DataError(f"{unknown[0]}: with bytes the query holds explore and seed, nothing else")
        given = {name: _parameter(name, text) for name, text in given.items()}
        given["obs"] = acting.raw_observations(body, policy)
    else:
        given = wire.read(body, kind)
        if kind == wire.JSON and (b"true" in body or b"false" in body):
            for name in ("obs", "actions", "state"):
                if acting.holds_truth(given.get(name)):
                    raise DataError(f"{name} holds true or false; numbers are expected")
    try:
        return acting.ActRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None


def _parameter(name: str, text: str) -> Any:
    if name == "explore" and text in ("true", "false"):
        return text == "true"
    if name == "seed" and text.isdecimal():
        return int(text)
    raise DataError(f"{name}: {text[:40]!r} is no {'seed' if name == 'seed' else 'true or false'}")


# Mechanisms -------------------------------------------------------------------------------------------------


def _mechanisms(app: FastAPI, backend: Backend) -> None:
    @app.post(
        "/v1/mechanisms/{name}/run", tags=["mechanisms"], summary="Reports in, outcome and payments out"
    )
    async def run(name: Name, request: MechanismRequest) -> MechanismAnswer:
        card = _find(backend, name, "mechanism")
        settled = await backend.settle(name, request.reports, request.seed)
        return mechanism_answer(name, card.version, settled)


# Plans ------------------------------------------------------------------------------------------------------


def _plans(app: FastAPI, backend: Backend) -> None:
    @app.post(
        "/v1/plans",
        tags=["plans"],
        summary="A goal in, a plan out",
        response_model=Plan,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def plan(request: PlanRequest) -> Any:
        planners = [name for name, card in backend.cards.items() if card.kind == "planner"]
        if request.model is None and len(planners) != 1:
            raise DataError(f"model: name one of the planners: {', '.join(planners) or 'none is served'}")
        card = _find(backend, request.model or planners[0], "planner")
        identity = f"plan-{uuid.uuid4().hex}"
        pieces = _plan_pieces(backend, card, identity, request)
        if request.stream:
            return await _streamed(pieces)
        async for piece in pieces:
            if piece.plan is not None:
                return piece.plan
        raise RuntimeError(f"planner {card.id} ended without an end")


async def _plan_pieces(
    backend: Backend, card: Card, identity: str, request: PlanRequest
) -> AsyncIterator[PlanPiece]:
    steps: list[PlanStep] = []
    words: list[str] = []
    async for part in backend.plan(card.id, request):
        if isinstance(part, str):
            words.append(part)
            yield PlanPiece(id=identity, rationale=part)
        elif isinstance(part, PlanStep):
            steps.append(part)
            yield PlanPiece(id=identity, step=part)
        else:
            plan = Plan(
                id=identity,
                created=int(time.time()),
                model=card.id,
                version=card.version,
                plan=steps,
                rationale="".join(words),
                cost=part.cost,
                safety=part.safety,
            )
            yield PlanPiece(id=identity, plan=plan)


async def _streamed(pieces: AsyncIterator[BaseModel]) -> StreamingResponse:
    """Server-sent events.  What is wrong with the request shows before the first one, as an ordinary answer."""
    first = await anext(pieces, None)

    async def events() -> AsyncIterator[bytes]:
        piece = first
        while piece is not None:
            yield b"data: " + piece.model_dump_json(exclude_none=True).encode() + b"\n\n"
            try:
                piece = await anext(pieces, None)
            except DataError as error:
                yield b"data: " + Refusal(422, "invalid_request", str(error)).body + b"\n\n"
                break
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


# Language models --------------------------------------------------------------------------------------------


def _language(app: FastAPI, backend: Backend) -> None:
    streams: Any = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}

    @app.post(
        "/v1/chat/completions",
        tags=["language models"],
        summary="OpenAI's chat completions",
        response_model=ChatAnswer,
        responses=streams,
    )
    async def chat(request: ChatRequest) -> Any:
        card = _find(backend, request.model, "language_model")
        prompt = await backend.chat_prompt(card.id, request)
        head = completions.Head.new("chatcmpl", card)

        def generate(sampling: Sampling) -> AsyncIterator[Piece]:
            return backend.generate(card.id, prompt, sampling)

        if request.stream:
            return await _streamed(completions.chat_chunks(head, request, generate))
        return await completions.chat_answer(head, request, generate)

    @app.post(
        "/v1/completions",
        tags=["language models"],
        summary="OpenAI's completions",
        response_model=CompletionAnswer,
        responses=streams,
    )
    async def complete(request: CompletionRequest) -> Any:
        card = _find(backend, request.model, "language_model")
        head = completions.Head.new("cmpl", card)

        def generate(prompt: str, sampling: Sampling) -> AsyncIterator[Piece]:
            return backend.generate(card.id, prompt, sampling)

        if request.stream:
            return await _streamed(completions.text_chunks(head, request, generate))
        return await completions.text_answer(head, request, generate)
