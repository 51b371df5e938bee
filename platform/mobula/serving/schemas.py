"""Requests and answers of the service, as pydantic models; those of a policy are made from its spaces.

Nothing here needs Ray or torch: clients import the same types.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""What the name of something served looks like: it becomes part of an address."""


def _whole(value: Any) -> Any:
    # JSON does not tell 3.0 from 3.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class Strict(BaseModel):
    """What the service reads: a field that it does not know is a mistake, "3" is no number and 1 no truth."""

    model_config = ConfigDict(extra="forbid", strict=True)


# Errors and descriptions ----------------------------------------------------------------------------------


class Problem(BaseModel):
    """What went wrong, in the form that OpenAI's clients read too."""

    message: str
    type: Literal[
        "invalid_request",
        "authentication",
        "permission",
        "not_found",
        "too_large",
        "rate_limit",
        "timeout",
        "server",
    ]
    param: str | None = Field(default=None, description="the field of the request that is wrong")
    code: str | None = None


class ErrorAnswer(BaseModel):
    error: Problem


class Card(BaseModel):
    """Something that is served."""

    id: str = Field(description="the name to ask for")
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="when it was exported, seconds since 1970; 0 where unknown")
    owned_by: str = "mobula"
    kind: Literal["policy", "mechanism", "planner", "language_model"]
    version: str = Field(description="tells an artefact from its successor of the same name")
    method: str | None = None
    env: str | None = None
    description: str = ""
    observation_space: dict[str, Any] | None = None
    action_space: dict[str, Any] | None = None
    recurrent: bool = False
    example: dict[str, Any] | None = Field(default=None, description="a request and its answer")


class CardList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Card]


class Health(BaseModel):
    status: Literal["ok", "starting"]


# Plans ----------------------------------------------------------------------------------------------------


class PlanRequest(Strict):
    """POST /v1/plans"""

    goal: str = Field(min_length=1, max_length=65536, description="what is to be reached, in words")
    state: str = Field(default="", max_length=1048576, description="where things stand, in words")
    model: str | None = Field(default=None, description="the planner; may be left out where one is served")
    max_steps: Whole = Field(default=32, ge=1, le=4096, description="longest plan")
    seed: Whole | None = Field(default=None, ge=0, lt=2**63)
    stream: bool = Field(default=False, description="server-sent events: pieces as they come")


class PlanStep(BaseModel):
    action: str
    expectation: str = Field(default="", description="what the planner expects to hold afterwards")


class Safety(BaseModel):
    verdict: Literal["safe", "unsafe", "unknown"]
    reasons: list[str] = []


class Plan(BaseModel):
    id: str
    object: Literal["plan"] = "plan"
    created: int
    model: str
    version: str
    plan: list[PlanStep]
    rationale: str
    cost: float | None = Field(
        description="the planner's own estimate, in its own units; null where it has none"
    )
    safety: Safety


class PlanPiece(BaseModel):
    """An event of a streamed plan: a piece of the rationale, a step, or at the end the whole plan."""

    object: Literal["plan.chunk"] = "plan.chunk"
    id: str
    rationale: str | None = None
    step: PlanStep | None = None
    plan: Plan | None = None


# Mechanisms -----------------------------------------------------------------------------------------------


class MechanismRequest(Strict):
    """POST /v1/mechanisms/{name}/run"""

    reports: dict[str, Any] = Field(description="what the participants report; the mechanism's own schema")
    seed: Whole | None = Field(default=None, ge=0, lt=2**63)


class MechanismAnswer(BaseModel):
    mechanism: str
    version: str
    outcome: dict[str, Any]
    payments: dict[str, float] = Field(description="by participant; negative where it is paid")
    audit: dict[str, Any] = Field(description="what is needed to check the outcome")


# Language models: OpenAI's wire format ----------------------------------------------------------------------


class Message(BaseModel):
    """Clients send more fields than a text model reads (name, refusal); those are left alone."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The text, of content parts too."""
        if isinstance(self.content, str):
            return self.content
        return "".join(str(part.get("text", "")) for part in self.content)

    @model_validator(mode="after")
    def _text_only(self) -> Message:
        if isinstance(self.content, list):
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ValueError("content parts other than text are not read here")
        return self


class StreamOptions(Strict):
    include_usage: bool = False


class Generation(Strict):
    """What chat and plain completions share."""

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: Whole = Field(default=1, ge=1, le=16)
    seed: Whole | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @model_validator(mode="after")
    def _stop(self) -> Generation:
        if self.stop == "" or len(self.stops) > 4:
            raise ValueError("stop: one to four texts that are not empty")
        return self


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: Whole | None = Field(default=None, ge=1, le=1048576)
    max_completion_tokens: Whole | None = Field(default=None, ge=1, le=1048576)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)


class CompletionRequest(Generation):
    """POST /v1/completions"""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    max_tokens: Whole = Field(default=16, ge=1, le=1048576)
    logprobs: Whole | None = Field(default=None, ge=0, le=5)
    echo: bool = False


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Finish = Literal["stop", "length"]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Finish
    logprobs: ChatLogprobs | None = None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Finish
    logprobs: TextLogprobs | None = None


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage
