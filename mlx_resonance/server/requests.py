"""Requests in OpenAI's format: their fields, what each may be, and what `null` stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from .errors import Refusal

MOST_PROMPTS = 64  # of a request
MOST_LOGPROBS = 20  # alternatives per token
LARGEST = 2**31 - 1


def _integral(value: Any) -> Any:
    """To JSON Schema, and to clients that have no integers, 10.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
TokenId = Annotated[int, Field(ge=0, le=LARGEST)]
Tokens = Annotated[list[TokenId], Field(fail_fast=True)]
BiasedToken = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Strict(BaseModel):
    """An object without further keys, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _only_text(content: Any) -> Any:
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"the model reads text only, got a part of type {kind!r:.40}")
    return content


Content = Annotated[str | Annotated[list[TextPart], Field(fail_fast=True)], BeforeValidator(_only_text)]


class SystemMessage(Strict):
    """What the conversation is about; `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer"]
    content: Content | None
    name: str | None = None


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: Content | None
    name: str | None = None


class CalledFunction(Strict):
    """A function that the model called, with its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None


class AssistantMessage(Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class ToolMessage(Strict):
    """What a tool returned."""

    role: Literal["tool"]
    content: Content | None
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool."""

    type: Literal["function"]
    function: Function


class ResponseFormat(Strict):
    """The only format there is."""

    type: Literal["text"]


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Asked(Strict):
    """The fields that chats and completions have in common. Penalties look back at 20 tokens."""

    model: str | None = None
    max_tokens: Integer | None = Field(None, ge=1, le=LARGEST)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=0, le=LARGEST)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[BiasedToken, Bias] | None = None
    stop: str | Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = None
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    # Without effect. In OpenAI's API, too, what they change is not what the answer says. `strict` of a function has
    # none either: clients set it without being asked, and what the model writes is not constrained.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def check(self) -> None:
        """Refuse options that have no effect without another. Raises Refusal."""
        if self.stream_options is not None and not self.stream:
            raise Refusal(400, "stream_options needs stream: true", param="stream_options")

    def limit(self) -> int | None:
        """Maximum number of tokens to generate; None if the request does not say."""
        return self.max_tokens

    def alternatives(self) -> int | None:
        """Likeliest tokens to report beside each token; None for no log-probabilities."""
        return None


class ChatRequest(Asked):
    """A request for the next message of a conversation."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Integer | None = Field(None, ge=1, le=LARGEST)
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = Field(None, max_length=32)  # a variable of the chat template, which may know it
    verbosity: str | None = Field(None, max_length=32)  # without effect

    def check(self) -> None:
        """See above."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")

    def limit(self) -> int | None:
        """OpenAI's newer name counts, if both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def alternatives(self) -> int | None:
        """None without `logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _not_empty(prompt: Any) -> Any:
    if prompt in ([], [[]]):
        raise PydanticCustomError("empty", "the prompt is empty")
    return prompt


class CompletionRequest(Asked):
    """A request for what follows a text, or each of several."""

    prompt: Annotated[
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Annotated[Tokens, Field(min_length=1)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)],
        BeforeValidator(_not_empty),
    ]
    logprobs: Integer | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def alternatives(self) -> int | None:
        """`logprobs` is their number."""
        return self.logprobs
