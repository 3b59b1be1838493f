"""Answers in OpenAI's format."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

Reason = Literal["stop", "length", "tool_calls"]


class Error(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Instead of an answer."""

    error: Error


class Health(BaseModel):
    """That the server runs."""

    status: Literal["ok"] = "ok"


class Model(BaseModel):
    """The model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mlx-resonance"


class Models(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class CachedTokens(BaseModel):
    """Where a prompt's tokens came from."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request and its answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: CachedTokens = CachedTokens()


class Alternative(BaseModel):
    """A token and its log-probability; `bytes` are None for part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Alternative):
    """A token of the answer, and the likeliest tokens in its place."""

    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    """Of the tokens of an answer, its reasoning and its calls included."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Of the tokens of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class Call(BaseModel):
    """A call of a function; `arguments` are JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool; `index` only in a stream."""

    index: int | None = None
    id: str
    type: Literal["function"] = "function"
    function: Call


class ChatMessage(BaseModel):
    """The model's message, or in a stream the next piece of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    """The message and why it ended."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class Chat(BaseModel):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """The next piece of a message."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None


class TextChoice(BaseModel):
    """The completion of a prompt, or in a stream the next piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason | None


class Text(BaseModel):
    """The answer to a completion request, or an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


def sparse(value: Any) -> Any:
    """An object for JSON, without the fields that are None because nobody set them."""
    if isinstance(value, list):
        return [sparse(part) for part in value]
    if not isinstance(value, BaseModel):
        return value
    found = {name: getattr(value, name) for name in type(value).model_fields}
    return {name: sparse(part) for name, part in found.items() if part is not None or name in value.model_fields_set}


def documented(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The responses of a route, for its schema: the answer whole or as a stream, and errors."""
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: {"model": answer, "content": stream, "description": "The answer, or a stream of it."}, **ERRORS}


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered: it is wrong."},
    500: {"model": ErrorBody, "description": "The model failed."},
    503: {"model": ErrorBody, "description": "The queue is full, or the server stops."},
}
