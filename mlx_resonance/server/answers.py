"""From the pieces that the engine writes to OpenAI's objects: whole, or as the events of a stream."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator
from typing import Any, Protocol
from uuid import uuid4

from mlx_lm.tokenizer_utils import TokenizerWrapper
from pydantic import BaseModel

from .responses import (
    CachedTokens,
    Chat,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Text,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    ToolCall,
    Usage,
)
from .sections import Section, Sections, parse_calls
from .worker import Piece


class Answer(Protocol):
    """What both kinds of answers can do."""

    usage: Usage

    def begin(self) -> Iterator[BaseModel]:
        """The events before the first piece."""

    def add(self, piece: Piece) -> Iterator[BaseModel]:
        """Take the next piece. Returns its events."""

    def end(self) -> BaseModel:
        """The event after the last piece, with the usage."""

    def whole(self) -> BaseModel:
        """All in one, after the last piece."""


def _head(prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}


def _add_usage(usage: Usage, piece: Piece) -> None:
    """Count the tokens of an answer that ends with this piece."""
    usage.prompt_tokens += piece.prompt_tokens
    usage.completion_tokens += piece.generation_tokens
    usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
    usage.prompt_tokens_details.cached_tokens += piece.cached_tokens


def _no_usage() -> Usage:
    return Usage(prompt_tokens_details=CachedTokens())


class ChatAnswer:
    """The model's next message.

    Args:
        model: its name.
        tokenizer: with the parser of calls.
        sections: divides what the model writes.
        tools: those that it may call.
        logprobs: whether they were asked for.
        one_call: pass on only the first call.
    """

    def __init__(
        self,
        model: str,
        tokenizer: TokenizerWrapper,
        sections: Sections,
        tools: list[dict[str, Any]],
        logprobs: bool,
        one_call: bool = False,
    ) -> None:
        self.head, self.usage = _head("chatcmpl", model), _no_usage()
        self._tokenizer, self._sections, self._tools = tokenizer, sections, tools
        self._one_call = one_call
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None
        self._sent = 0  # log-probabilities
        self._texts: dict[str, str] = {}
        self._calls: list[ToolCall] = []
        self._reason: Any = None

    def begin(self) -> Iterator[ChatChunk]:
        """The role."""
        yield self._chunk(ChatMessage(role="assistant", content=""))

    def add(self, piece: Piece) -> Iterator[ChatChunk]:
        """The piece's text, as far as it is certain what it is; calls only whole."""
        if self._logprobs is not None and piece.logprob is not None:
            self._logprobs.append(piece.logprob)
        found = self._sections.add(piece.text)
        if piece.finish_reason is not None:
            found += self._sections.finish()
        for section in found:
            yield from self._message(section)
        if piece.finish_reason is not None:
            _add_usage(self.usage, piece)
            self._reason = "tool_calls" if self._calls and piece.finish_reason == "stop" else piece.finish_reason
            yield self._chunk(ChatMessage())

    def _message(self, section: Section) -> Iterator[ChatChunk]:
        kind, text = section.kind, section.text
        if kind == "tool":
            if calls := parse_calls(self._tokenizer, text, self._tools):
                if self._one_call:
                    calls = calls[: 1 - len(self._calls)]
                for call in calls:
                    call.index = len(self._calls)
                    self._calls.append(call)
                if calls:
                    yield self._chunk(ChatMessage(tool_calls=calls))
                return
            kind, text = "content", section.raw
        self._texts[kind] = self._texts.get(kind, "") + text
        yield self._chunk(ChatMessage(reasoning=text) if kind == "reasoning" else ChatMessage(content=text))

    def _chunk(self, delta: ChatMessage) -> ChatChunk:
        logprobs = None
        if self._logprobs is not None and len(self._logprobs) > self._sent:
            logprobs, self._sent = ChatLogprobs(content=self._logprobs[self._sent :]), len(self._logprobs)
        choice = ChatDelta(index=0, delta=delta, logprobs=logprobs, finish_reason=self._reason)
        return ChatChunk(**self.head, choices=[choice])

    def end(self) -> ChatChunk:
        """The usage."""
        return ChatChunk(**self.head, choices=[], usage=self.usage)

    def whole(self) -> Chat:
        """The message."""
        texts: dict[str, Any] = {"content": None if self._calls else ""} | self._texts
        if self._calls:
            texts["tool_calls"] = [ToolCall(id=call.id, function=call.function) for call in self._calls]
        message = ChatMessage(role="assistant", refusal=None, **texts)
        logprobs = None if self._logprobs is None else ChatLogprobs(content=self._logprobs)
        choice = ChatChoice(index=0, message=message, logprobs=logprobs, finish_reason=self._reason)
        return Chat(**self.head, choices=[choice], usage=self.usage)


class TextAnswer:
    """The completions of a request's prompts.

    Args:
        model: its name.
        prompts: their number.
        alternatives: likeliest tokens beside each; None for no log-probabilities.
    """

    def __init__(self, model: str, prompts: int, alternatives: int | None) -> None:
        self.head, self.usage, self._alternatives = _head("cmpl", model), _no_usage(), alternatives
        self._choices = [self._choice(index) for index in range(prompts)]  # whole
        self._next = [self._choice(index) for index in range(prompts)]  # what the next event has
        self._tokens = [_Characters() for _ in range(prompts)]

    def _choice(self, index: int) -> TextChoice:
        logprobs = None
        if self._alternatives is not None:
            top: list[dict[str, float]] | None = [] if self._alternatives else None
            logprobs = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=top, text_offset=[])
        return TextChoice(index=index, text="", logprobs=logprobs, finish_reason=None)

    def begin(self) -> Iterator[Text]:
        """Nothing."""
        return iter(())

    def add(self, piece: Piece) -> Iterator[Text]:
        """The piece's text."""
        whole, event = self._choices[piece.index], self._next[piece.index]
        for choice in (whole, event):
            choice.text += piece.text
            choice.finish_reason = piece.finish_reason
            if choice.logprobs is not None and piece.logprob is not None:
                _append(choice.logprobs, piece.logprob, self._tokens[piece.index].place(whole.text))
        if piece.logprob is not None:
            self._tokens[piece.index].add(piece.logprob)
        if piece.finish_reason is not None:
            _add_usage(self.usage, piece)
        if event.text or event.finish_reason is not None:
            self._next[piece.index] = self._choice(piece.index)
            yield Text(**self.head, choices=[event])

    def end(self) -> Text:
        """The usage."""
        return Text(**self.head, choices=[], usage=self.usage)

    def whole(self) -> Text:
        """All completions."""
        return Text(**self.head, choices=self._choices, usage=self.usage)


class _Characters:
    """Counts the characters of tokens, some of which are only part of one."""

    def __init__(self) -> None:
        self._decoder, self._text, self._count = codecs.getincrementaldecoder("utf-8")("replace"), "", 0

    def add(self, token: TokenLogprob) -> None:
        """Take the next token."""
        found = token.token if token.bytes is None else self._decoder.decode(bytes(token.bytes))
        self._text = self._text or found[:1]
        self._count += len(found)

    def place(self, text: str) -> int:
        """Where the next token begins in the completion, of which this is the beginning: mlx-lm drops a first space."""
        return self._count - (self._text == " " and not text.startswith(" "))


def _append(logprobs: TextLogprobs, token: TokenLogprob, offset: int) -> None:
    logprobs.tokens.append(token.token)
    logprobs.token_logprobs.append(token.logprob)
    logprobs.text_offset.append(offset)
    if logprobs.top_logprobs is not None:
        logprobs.top_logprobs.append({other.token: other.logprob for other in token.top_logprobs})
