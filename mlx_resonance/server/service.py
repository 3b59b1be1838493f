"""What a request asks of the engine: checked, tokenized, and put into the queue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UsageError
from ..generation.conversation import LONGEST_ANSWER
from ..generation.messages import chat_tokens, prompt_tokens
from ..generation.sampling import Sampling
from .errors import Refusal
from .requests import Asked, AssistantMessage, ChatRequest, CompletionRequest, Message, SystemMessage
from .sections import Sections
from .worker import Piece, Work, Worker

DEFAULT_NAME = "default"
RETRY_AFTER = 1  # seconds


def busy(message: str) -> Refusal:
    """What a client hears that should come back."""
    headers = {"Retry-After": str(RETRY_AFTER)}
    return Refusal(503, f"{message}: try again later", code="queue_full", headers=headers)


@dataclass
class Service:
    """The one model, and how many requests may wait for it.

    Args:
        worker: answers them.
        name: the model's, which requests give.
        sampling: of requests that do not say.
        max_tokens: of requests that do not say; None for what the context has room for.
        queue: maximum number of requests that wait while another is answered.
        other_name: another name of the model.
    """

    worker: Worker
    name: str
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    queue: int = 16
    other_name: str | None = None

    def __post_init__(self) -> None:
        self._inside, self._lock = 0, threading.Lock()
        engine = self.worker.engine
        longest = max(map(len, engine.tokenizer.get_vocab()))
        self._characters = None if engine.context is None else engine.context * longest  # that the context may hold
        if engine.context is None and self.max_tokens is None:
            self.max_tokens = LONGEST_ANSWER

    def check_name(self, name: str | None) -> None:
        """Refuse a name that is not the model's."""
        if name not in (None, DEFAULT_NAME, self.name, self.other_name):
            raise Refusal(404, f"The model '{name}' does not exist", code="model_not_found", param="model")

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for a request, from its arrival to its end. Raises Refusal if there is none."""
        with self._lock:
            if self._inside > self.queue:
                raise busy(f"{self.queue} requests are waiting")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1

    def prepare(self, asked: Asked, tell: Callable[[Piece | Exception | None], None]) -> Work:
        """Check a request and tokenize its prompts, before it is put into the queue.

        Raises:
            Refusal, UsageError: it cannot be answered as it is.
        """
        self.check_name(asked.model)
        asked.check()
        engine = self.worker.engine
        vocabulary = engine.vocabulary
        sampling = self._sampling(asked)
        sampling.check(vocabulary)
        if (alternatives := asked.alternatives()) is not None and alternatives >= vocabulary:
            raise Refusal(400, f"the model has {vocabulary} tokens", param="logprobs")
        max_tokens = asked.limit()
        prompts = self._prompts(asked)
        for prompt in prompts:
            self._check_length(prompt, max_tokens)
        return Work(
            prompts=prompts,
            max_tokens=max_tokens,
            most=self.max_tokens,
            sampling=sampling,
            tell=tell,
            stop=[word for word in ([asked.stop] if isinstance(asked.stop, str) else asked.stop or []) if word],
            penalties=_penalties(asked, vocabulary),
            alternatives=alternatives,
        )

    def sections(self, asked: ChatRequest, work: Work) -> Sections:
        """What divides the answer to a chat request."""
        return Sections(self.worker.engine.tokenizer, work.prompts[0], bool(offered_tools(asked)))

    def _sampling(self, asked: Asked) -> Sampling:
        names = ("top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(asked, name) for name in names} | {"temp": asked.temperature}
        given = {name: value for name, value in given.items() if value is not None}
        seed = None if asked.seed is None else asked.seed % 2**64
        return replace(self.sampling, seed=self.sampling.seed if seed is None else seed, **given)

    def _prompts(self, asked: Asked) -> list[list[int]]:
        tokenizer = self.worker.engine.tokenizer
        if isinstance(asked, ChatRequest):
            tools = offered_tools(asked)
            if tools and not tokenizer.has_tool_calling:
                raise Refusal(400, "the model's chat template has no tools", param="tools")
            variables: dict[str, Any] = {"tools": tools} if tools else {}
            if asked.reasoning_effort is not None:
                variables["reasoning_effort"] = asked.reasoning_effort
            messages = [_for_template(message) for message in asked.messages]
            self._check_characters(sum(len(message["content"]) for message in messages), "messages")
            return [chat_tokens(tokenizer, messages, **variables)]
        assert isinstance(asked, CompletionRequest)
        single = isinstance(asked.prompt, str) or isinstance(asked.prompt[0], int)
        prompts: Any = [asked.prompt] if single else asked.prompt
        for prompt in prompts:
            self._check_characters(len(prompt) if isinstance(prompt, str) else 0, "prompt")
        return [prompt_tokens(tokenizer, prompt) for prompt in prompts]

    def _check_characters(self, characters: int, param: str) -> None:
        """Refuse a text that cannot fit, however long its tokens are: to tokenize it takes minutes."""
        if self._characters is not None and characters > self._characters:
            context = self.worker.engine.context
            message = f"a prompt of {characters:,} characters exceeds the context of {context:,} tokens"
            raise Refusal(400, message, code="context_length_exceeded", param=param)

    def _check_length(self, prompt: list[int], max_tokens: int | None) -> None:
        engine = self.worker.engine
        try:
            engine.check(prompt, max_tokens)
        except UsageError as error:
            new = max_tokens or 1
            if engine.context is None or len(prompt) + new <= engine.context:
                raise
            param = "prompt" if new < engine.context else "max_tokens"
            raise Refusal(400, error.message, code="context_length_exceeded", param=param) from None


def offered_tools(asked: ChatRequest) -> list[dict[str, Any]]:
    """The tools that the model may call, for the chat template."""
    if asked.tool_choice == "none":
        return []
    return [tool.model_dump(exclude_none=True) for tool in asked.tools or []]


def _penalties(asked: Asked, vocabulary: int) -> dict[str, Any]:
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    if bias and max(bias) >= vocabulary:
        raise Refusal(400, f"logit_bias: there is no token id {max(bias)}", param="logit_bias")
    penalties = {"presence_penalty": asked.presence_penalty, "frequency_penalty": asked.frequency_penalty}
    return penalties | {"logit_bias": bias or None}


def _for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: one text, the arguments of calls as objects."""
    found = message.model_dump(exclude_none=True, exclude={"refusal", "annotations"})
    if isinstance(message, SystemMessage):
        found["role"] = "system"
    if not isinstance(message.content, str):
        found["content"] = "".join(part.text for part in message.content or [])
    if isinstance(message, AssistantMessage):
        for name, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
            if name in found:
                found.setdefault(other, found[name])
        for call in found.get("tool_calls", []):
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return found


def _arguments(text: str) -> Any:
    from .body import parse_json

    try:
        return parse_json(text.encode()) if text.strip() else {}
    except Refusal:
        raise Refusal(400, "the arguments of a tool call are not JSON", param="messages") from None
