"""Chats as training data: read from rows, turned into token ids, of which the loss counts those of the assistant."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from numpy.typing import NDArray

from ..errors import UsageError
from ..run_log import check_field

Ids = NDArray[np.int32]

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Args:
        where: its file and line, for errors.
        messages: with a `role` and a `content` each, as the chat template takes them.
        tools: JSON schemas of functions; None for none.
    """

    where: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


def chat_of(where: str, row: Mapping[str, Any]) -> Chat:
    """The chat of a row with `messages`, perhaps with `tools`; raises UsageError if one has no role or no text."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where} has no 'messages' that are a list of at least one", option="data")
    return Chat(
        where, [_message(f"{where}, message {i}", each) for i, each in enumerate(messages, 1)], _tools(where, row)
    )


def pair_of(where: str, row: Mapping[str, Any]) -> Chat:
    """The chat of a row with `prompt` and `completion`, perhaps with `tools`; raises UsageError if one is not text."""
    prompt, completion = (check_field(where, row, name, str, "data") for name in ("prompt", "completion"))
    messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": completion}]
    return Chat(where, messages, _tools(where, row))


def _tools(where: str, row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UsageError(f"{where} has no 'tools' that are a list of objects", option="data")
    return tools


def _message(where: str, message: Any) -> Mapping[str, Any]:
    """The message, the arguments of its tool calls as objects: OpenAI's format has JSON text, chat templates do not."""
    check_field(where, message, "role", str, "data")
    calls = message.get("tool_calls") or []
    if not (calls and message.get("content") is None):
        check_field(where, message, "content", str, "data")
    if not calls:
        return message
    try:
        return message | {"tool_calls": [_call(call) for call in calls]}
    except (AttributeError, TypeError, ValueError, RecursionError):
        raise UsageError(f"{where} has no 'tool_calls' that are a list of function calls", option="data") from None


def _call(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _call(call["function"])}
    arguments = call.get("arguments")
    return call | {"arguments": json.loads(arguments)} if isinstance(arguments, str) else call


def encode(tokenizer: TokenizerWrapper, chat: Chat, mask_prompt: bool = True) -> Ids:
    """Token ids of a chat, through the chat template; those that the loss does not count are stored as ~id.

    Args:
        tokenizer: of the checkpoint.
        chat: to encode.
        mask_prompt: count only the assistant's turns, each with the token that ends it; else count all tokens.

    Raises:
        UsageError: the template fails, no turn is the assistant's, or its tokens cannot be told from others.
    """
    text = _Template(tokenizer, chat)
    if not mask_prompt:
        return text.whole
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == ASSISTANT]
    if not turns:
        raise UsageError(f"{chat.where} has no turn of the assistant: nothing to train on", option="data")
    if turns[0] == 0:
        raise UsageError(
            f"{chat.where}, message 1 is the assistant's: expected one of the system or the user before it",
            remedies=[{"mask_prompt": False}],
        )
    trained = np.zeros(len(text.whole), dtype=bool)
    for i in turns:
        trained[text.turn(i)] = True
    return np.where(trained, text.whole, ~text.whole)


class _Template:
    """The chat template, applied to a chat and to its beginnings."""

    def __init__(self, tokenizer: TokenizerWrapper, chat: Chat) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.ends = list(tokenizer.eos_token_ids)
        self.whole = self.ids(len(chat.messages))

    def ids(self, count: int, prompt: bool = False) -> Ids:
        """Of the first messages; with `prompt`, followed by what asks the assistant for the next one."""
        messages = list(self.chat.messages[:count])
        try:
            ids = self.tokenizer.apply_chat_template(messages, tools=self.chat.tools, add_generation_prompt=prompt)
        except UsageError as error:
            raise UsageError(f"{self.chat.where}: {error.message}", option="data") from None
        return np.array(ids, dtype=np.int32)

    def turn(self, i: int) -> slice:
        """The tokens that the assistant writes as message `i`, up to and including the end of its turn.

        They begin where the prompt for them ends. Where the template gives the assistant's turn another beginning than
        its prompt has, such as one with `<think>`, they begin where the two part. They end as the chat up to this turn
        does; or, where a template shows the last turn in another way than earlier ones (Qwen 3 cuts the thoughts out of
        those), at the first end of a turn, if the turn alone ends in the same tokens.
        """
        prompt = self.ids(i, prompt=True)
        start = _common(self.whole, prompt)
        if start < len(prompt):
            before = self.ids(i)
            if _common(self.whole, before) < len(before):
                raise self.unclear(i)
            start = max(start, len(before))
        alone = self.whole if i == len(self.chat.messages) - 1 else self.ids(i + 1)
        ends = start + np.flatnonzero(np.isin(alone[start:], self.ends))
        alone = alone[: ends[-1] + 1] if len(ends) else alone  # not the line break after the end of the turn
        stop = len(alone)
        if _common(self.whole, alone) < stop:
            ends = start + np.flatnonzero(np.isin(self.whole[start:], self.ends))
            stop = ends[0] + 1 if len(ends) else start
            if not np.array_equal(self.whole[start:stop], alone[len(alone) - (stop - start) :]):
                raise self.unclear(i)
        if stop <= start:
            raise self.unclear(i)
        return slice(start, stop)

    def unclear(self, i: int) -> UsageError:
        """The error where the tokens of a turn are not to be told from those of others."""
        return UsageError(
            f"{self.chat.where}, message {i + 1}: the chat template does not show which tokens of the chat are those "
            "of this turn",
            remedies=[{"mask_prompt": False}],
        )


def _common(one: Ids, other: Ids) -> int:
    """Length of the common beginning."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size
