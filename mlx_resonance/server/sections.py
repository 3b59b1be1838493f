"""What a model writes, divided by its markers: content, reasoning, and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generation.stop import StopStrings
from .responses import Call, ToolCall

Kind = Literal["content", "reasoning", "tool"]
TAIL = 32  # tokens of a prompt that may end with the beginning of reasoning


class Section(NamedTuple):
    """A piece of content or reasoning, or all of a call; `raw` is its text with the markers."""

    kind: Kind
    text: str
    raw: str


class Sections:
    """Divides a text that comes in pieces, and holds back what may be the beginning of a marker.

    Args:
        tokenizer: from `load`; mlx-lm knows its markers.
        prompt: token ids; it may end within reasoning.
        tools: whether to look for calls.
    """

    def __init__(self, tokenizer: TokenizerWrapper, prompt: Sequence[int], tools: bool) -> None:
        self._edges: dict[Kind, list[tuple[str, Kind]]] = {"content": [], "reasoning": [], "tool": []}
        kind: Kind = "content"
        if tokenizer.has_thinking:
            start, end = tokenizer.think_start, tokenizer.think_end
            self._edges["content"].append((start, "reasoning"))
            self._edges["reasoning"].append((end, "content"))
            tail = tokenizer.decode(list(prompt[-TAIL:]))  # a template opens reasoning; a question only mentions it
            kind = "reasoning" if tail.rstrip().endswith(start) else "content"
        if tools and tokenizer.has_tool_calling:
            self._call, end = tokenizer.tool_call_start, tokenizer.tool_call_end
            self._edges["content"].append((self._call, "tool"))
            self._edges["reasoning"].append((self._call, "tool"))
            self._edges["tool"] += [(end, "content")] if end else []
        self._enter(kind)

    def _enter(self, kind: Kind) -> None:
        self._kind, self._held, self._written = kind, "", ""
        self._finder = StopStrings([marker for marker, _ in self._edges[kind]])

    def add(self, piece: str) -> list[Section]:
        """Take the next piece. Returns what is certain now."""
        found = []
        while True:
            self._held += piece
            text = self._finder.add(piece)
            rest = self._held[len(text) :]
            if not self._finder.found:
                self._held = rest
                found += self._section(text)
                return found
            marker, kind = next(edge for edge in self._edges[self._kind] if rest.startswith(edge[0]))
            found += self._section(text, marker, True)
            self._enter(kind)
            piece = rest[len(marker) :]

    def finish(self) -> list[Section]:
        """What was held back, once no more pieces come."""
        return self._section(self._finder.finish(), "", True)

    def _section(self, text: str, end: str = "", ends: bool = False) -> list[Section]:
        if self._kind != "tool":
            return [Section(self._kind, text, text)] if text else []
        self._written += text
        return [Section("tool", self._written, f"{self._call}{self._written}{end}")] if ends else []


def parse_calls(tokenizer: TokenizerWrapper, text: str, tools: list[dict[str, Any]]) -> list[ToolCall]:
    """The calls in the text between the markers, by mlx-lm's parser for this tokenizer; none if it is not a call."""
    try:
        parsed = tokenizer.tool_parser(text, tools)
        calls = parsed if isinstance(parsed, list) else [parsed]
        return [_call(call) for call in calls]
    except Exception:  # of a parser, about a text that a model wrote
        return []


def _call(parsed: Any) -> ToolCall:
    name, arguments = parsed["name"], parsed.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    f"{name}{arguments}".encode()  # not half of a pair of surrogates, which no answer can hold
    call = Call(name=name, arguments=arguments)
    return ToolCall(id=parsed.get("id") or f"call_{uuid4().hex[:24]}", function=call)
