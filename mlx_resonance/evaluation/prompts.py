"""Prompts about documents: read from a benchmark's files, and cut to a context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ANOTHER, MissingFileError, UsageError, check_option
from ..generation import prompt_tokens
from ..rope_types import LONGEST
from ..run_log import Record, check_field, json_lines

TRUNCATIONS = ("words", "head")
WORDS = 250  # L-Eval drops that many at once


@dataclass(frozen=True)
class Prompt:
    """A question about a document.

    Args:
        task, id: identify its answer.
        before, document, after: parts of the text.
        budget: maximum number of tokens of the answer.
        saved: what scoring needs, saved with the answer.
        start: the beginning of the answer; it follows the end of the user's message in the chat template.
        keep_end: cut the beginning of the document instead of its end.
    """

    task: str
    id: str
    before: str
    document: str
    after: str
    budget: int
    saved: Record
    start: str = ""
    keep_end: bool = False

    @property
    def digest(self) -> str:
        """Of everything that the benchmark's file determines."""
        parts = [self.before, self.document, self.after, self.start, self.saved]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def tokens(self, tokenizer: TokenizerWrapper, text: str, chat: bool) -> list[int]:
        """Token ids of the prompt, with another text in place of its own."""
        if not (chat and tokenizer.has_chat_template):
            return prompt_tokens(tokenizer, text + self.start)
        messages = [{"role": "user", "content": text}]
        # The budgets leave no room for thinking before the answer.
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        ids = list(tokenizer.apply_chat_template(messages, **options))
        return ids + (list(tokenizer.encode(self.start, add_special_tokens=False)) if self.start else [])


@dataclass(frozen=True)
class Limits:
    """What prompts and their answers must fit into.

    Args:
        context: maximum number of tokens of prompt and answer.
        truncation: how to cut a long prompt. words: keep the first words of the document, 250 fewer until they fit, as
            in L-Eval; head: keep the first tokens of the document.
        chat: use the tokenizer's chat template, if it has one.

    Raises:
        UsageError: an argument is out of range.
    """

    context: int
    truncation: str = "words"
    chat: bool = True

    def __post_init__(self) -> None:
        names = f"one of {', '.join(TRUNCATIONS)}"
        check_option("truncation", self.truncation in TRUNCATIONS, names, repr(self.truncation))
        check_option("context", 1 <= self.context <= LONGEST, "in [1, 2**31] tokens", self.context)


def check_fits(tokenizer: TokenizerWrapper, prompt: Prompt, limits: Limits) -> None:
    """Raise UsageError where not even the question without its document fits into the context."""
    frame = len(prompt.tokens(tokenizer, prompt.before + prompt.after, limits.chat)) + prompt.budget
    if frame + bool(prompt.document) > limits.context:
        raise UsageError(
            f"{prompt.task}, {prompt.id}: the question and {prompt.budget} tokens of answer take {frame} tokens, the "
            f"context has {limits.context}",
            remedies=[{"context": ANOTHER}, {"lengths": ANOTHER}, {"max_tokens": ANOTHER}],
        )


def fit(tokenizer: TokenizerWrapper, prompt: Prompt, limits: Limits) -> tuple[list[int], bool]:
    """The tokens of a prompt, cut if the prompt and its answer exceed the context; and whether it was cut.

    Raises:
        UsageError: not even the question without its document fits.
    """
    whole = text = prompt.before + prompt.document + prompt.after
    limit: int | None = None
    while True:
        ids = prompt.tokens(tokenizer, text, limits.chat)
        over = len(ids) + prompt.budget - limits.context
        if over <= 0:
            return ids, text != whole
        if limit is None:
            check_fits(tokenizer, prompt, limits)
            limit = len(tokenizer.encode(prompt.document))
        limit -= over  # more than once: the same text may take more tokens between other texts
        document = cut(tokenizer, prompt.document, max(limit, 0), limits.truncation, prompt.keep_end)
        text = prompt.before + document + prompt.after


def cut(tokenizer: TokenizerWrapper, text: str, limit: int, truncation: str, keep_end: bool = False) -> str:
    """At most `limit` tokens of a text, cut by words or to its head, as `Limits` describes it.

    Source: L-Eval's Baselines/llama2-chat-test.py.
    """
    words = text.split(" ")
    for count in range(limit if truncation == "words" else 0, 0, -WORDS):
        part = " ".join(words[-count:] if keep_end else words[:count])
        if len(tokenizer.encode(part, add_special_tokens=False)) <= limit:
            return part
    ids = list(tokenizer.encode(text, add_special_tokens=False))  # truncation "words" too, if not even 250 words fit
    return str(tokenizer.decode(ids[len(ids) - limit :] if keep_end else ids[:limit], skip_special_tokens=True))


def read_lines(path: Path, fields: Mapping[str, type]) -> list[tuple[int, Record]]:
    """The objects of a JSON-lines file, each with the number of its line and fields of these types.

    Raises:
        MissingFileError: there is no such file.
        UsageError: it is empty, or a line is not such an object; its number is named.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file", option="data")
    found = []
    for number, entry in json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(entry, dict):
            raise UsageError(f"{where} is not a JSON object", option="data")
        for name, wanted in fields.items():
            check_field(where, entry, name, wanted, option="data")
        found.append((number, entry))
    if not found:
        raise UsageError(f"{path} is empty", option="data")
    return found
