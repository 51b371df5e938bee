"""OpenAI's wire format: from pieces of generated text to answers and to streamed chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from mobula.serving.schemas import (
    AnswerMessage,
    Card,
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Finish,
    Generation,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mobula.serving.services import Piece, Sampling, Token

Generate = Callable[[Sampling], AsyncIterator[Piece]]
GenerateFrom = Callable[[str, Sampling], AsyncIterator[Piece]]


@dataclass(frozen=True)
class Head:
    """What every answer and every chunk of one request begin with."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, card: Card) -> Head:
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), card.id, card.version)


@dataclass
class _Text:
    """A finished continuation."""

    text: str
    tokens: list[Token]
    finish: Finish
    prompt_tokens: int
    completion_tokens: int


def _sampling(request: Generation, index: int, max_tokens: int | None, top_logprobs: int | None) -> Sampling:
    """The settings of the choice `index`: each has a stream of its own."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=None if request.seed is None else request.seed + index,
        stop=tuple(request.stops),
        top_logprobs=top_logprobs,
    )


async def _whole(pieces: AsyncIterator[Piece]) -> _Text:
    text, last = "", Piece("", finish="stop")
    tokens: list[Token] = []
    async for piece in pieces:
        text += piece.text
        tokens += piece.tokens
        last = piece
    return _Text(text, tokens, last.finish or "stop", last.prompt_tokens, last.completion_tokens)


def _usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


# Chat -----------------------------------------------------------------------------------------------------


def _chat_sampling(request: ChatRequest, index: int) -> Sampling:
    most = request.max_completion_tokens or request.max_tokens
    return _sampling(request, index, most, (request.top_logprobs or 0) if request.logprobs else None)


def _chat_logprobs(tokens: Sequence[Token], wanted: bool) -> ChatLogprobs | None:
    if not wanted:
        return None
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=token.text,
                logprob=token.logprob,
                bytes=list(token.text.encode()),
                top_logprobs=[
                    TopLogprob(token=text, logprob=value, bytes=list(text.encode()))
                    for text, value in token.top
                ],
            )
            for token in tokens
        ]
    )


async def chat_answer(head: Head, request: ChatRequest, generate: Generate) -> ChatAnswer:
    texts = [await _whole(generate(_chat_sampling(request, index))) for index in range(request.n)]
    return ChatAnswer(
        **vars(head),
        choices=[
            ChatChoice(
                index=index,
                message=AnswerMessage(content=text.text),
                finish_reason=text.finish,
                logprobs=_chat_logprobs(text.tokens, request.logprobs),
            )
            for index, text in enumerate(texts)
        ],
        usage=_usage(texts[0].prompt_tokens, sum(text.completion_tokens for text in texts)),
    )


class ChatChunk(BaseModel):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: Usage | None = None


async def chat_chunks(head: Head, request: ChatRequest, generate: Generate) -> AsyncIterator[ChatChunk]:
    read, written = 0, 0
    for index in range(request.n):
        delta: dict[str, Any] = {"role": "assistant"}
        async for piece in generate(_chat_sampling(request, index)):
            choice: dict[str, Any] = {
                "index": index,
                "delta": {**delta, "content": piece.text},
                "finish_reason": None,
            }
            found = _chat_logprobs(piece.tokens, request.logprobs)
            if found is not None:
                choice["logprobs"] = found.model_dump()
            yield ChatChunk(**vars(head), choices=[choice])
            delta = {}
            if piece.finish is not None:
                end = {"index": index, "delta": {}, "finish_reason": piece.finish}
                yield ChatChunk(**vars(head), choices=[end])
                read, written = piece.prompt_tokens, written + piece.completion_tokens
    if request.stream_options is not None and request.stream_options.include_usage:
        yield ChatChunk(**vars(head), choices=[], usage=_usage(read, written))


# Plain text -----------------------------------------------------------------------------------------------


def _prompts(request: CompletionRequest) -> list[str]:
    return [request.prompt] if isinstance(request.prompt, str) else request.prompt


def _text_logprobs(tokens: Sequence[Token], wanted: int | None, offset: int) -> TextLogprobs | None:
    if wanted is None:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return TextLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[dict(token.top) for token in tokens],
        text_offset=offsets,
    )


async def text_answer(head: Head, request: CompletionRequest, generate: GenerateFrom) -> CompletionAnswer:
    choices, read, written = [], 0, 0
    for number, prompt in enumerate(_prompts(request)):
        for copy in range(request.n):
            index = number * request.n + copy
            sampling = _sampling(request, index, request.max_tokens, request.logprobs)
            text = await _whole(generate(prompt, sampling))
            before = prompt if request.echo else ""
            choices.append(
                TextChoice(
                    index=index,
                    text=before + text.text,
                    finish_reason=text.finish,
                    logprobs=_text_logprobs(text.tokens, request.logprobs, len(before)),
                )
            )
            read, written = read + (text.prompt_tokens if copy == 0 else 0), written + text.completion_tokens
    return CompletionAnswer(**vars(head), choices=choices, usage=_usage(read, written))


class TextChunk(BaseModel):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: Usage | None = None


async def text_chunks(
    head: Head, request: CompletionRequest, generate: GenerateFrom
) -> AsyncIterator[TextChunk]:
    read, written = 0, 0
    for number, prompt in enumerate(_prompts(request)):
        for copy in range(request.n):
            index = number * request.n + copy
            before, offset = (prompt if request.echo else ""), 0
            offset += len(before)
            async for piece in generate(
                prompt, _sampling(request, index, request.max_tokens, request.logprobs)
            ):
                choice: dict[str, Any] = {
                    "index": index,
                    "text": before + piece.text,
                    "finish_reason": piece.finish,
                }
                found = _text_logprobs(piece.tokens, request.logprobs, offset)
                if found is not None:
                    choice["logprobs"] = found.model_dump()
                yield TextChunk(**vars(head), choices=[choice])
                before, offset = "", offset + sum(len(token.text) for token in piece.tokens)
                if piece.finish is not None:
                    read += piece.prompt_tokens if copy == 0 else 0
                    written += piece.completion_tokens
    if request.stream_options is not None and request.stream_options.include_usage:
        yield TextChunk(**vars(head), choices=[], usage=_usage(read, written))
