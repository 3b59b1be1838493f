"""Prompts about documents: read from the benchmarks' files, and cut to a context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generation import prompt_tokens
from ..records import Record, json_lines
from .texts import check_field

TRUNCATIONS = ("words", "head", "middle")
WORDS = 250  # that L-Eval leaves out at once


@dataclass(frozen=True)
class Prompt:
    """A question about a document.

    Args:
        task, id: name its answer.
        before, document, after: the text is these three.
        budget: most tokens of the answer.
        saved: what scoring needs, saved with the answer.
        start: what the answer begins with; it follows the chat template's own end of the user's message.
        chat: whether the benchmark uses a chat template here.
        keep_end: cut the document's beginning instead of its end.
        one_line: the answer ends with its first line that is not empty.
    """

    task: str
    id: str
    before: str
    document: str
    after: str
    budget: int
    saved: Record
    start: str = ""
    chat: bool = True
    keep_end: bool = False
    one_line: bool = False

    @property
    def digest(self) -> str:
        """Of everything that the benchmark's file decides."""
        parts = [self.before, self.document, self.after, self.start, self.saved]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def tokens(self, tokenizer: TokenizerWrapper, text: str, chat: bool) -> list[int]:
        """Token ids of a text in the place of the prompt's."""
        if not (chat and self.chat and tokenizer.has_chat_template):
            return prompt_tokens(tokenizer, text + self.start)
        messages = [{"role": "user", "content": text}]
        # The budgets leave no room to think before the answer.
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        ids = list(tokenizer.apply_chat_template(messages, **options))
        return ids + (list(tokenizer.encode(self.start, add_special_tokens=False)) if self.start else [])


@dataclass(frozen=True)
class Limits:
    """What prompts and their answers must fit into.

    Args:
        context: most tokens of prompt and answer.
        truncation: of what is too long. words: of the document as many words from its beginning, 250 fewer until they
            fit, as in L-Eval; head: tokens from the document's beginning; middle: half of the tokens from each end of
            the whole text, as in LongBench.
        chat: use the tokenizer's chat template, where it has one and the benchmark does, too.

    Raises:
        ValueError: an argument is out of range.
    """

    context: int
    truncation: str = "middle"
    chat: bool = True

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"[eval] truncation must be one of {', '.join(TRUNCATIONS)}, got {self.truncation!r}")
        if self.context < 1:
            raise ValueError(f"[eval] context must be at least 1 token, got {self.context}")


def check_fits(kind: str, tokenizer: TokenizerWrapper, prompt: Prompt, limits: Limits) -> None:
    """Raise ValueError where not even the question without its document fits into the context."""
    frame = len(prompt.tokens(tokenizer, prompt.before + prompt.after, limits.chat)) + prompt.budget
    if frame + bool(prompt.document) > limits.context:
        raise ValueError(
            f"[{kind}] {prompt.task}, {prompt.id}: the question and {prompt.budget} tokens of answer take {frame}, "
            f"the context has {limits.context}: give a longer context or fewer --max-tokens"
        )


def fit(kind: str, tokenizer: TokenizerWrapper, prompt: Prompt, limits: Limits) -> tuple[list[int], bool]:
    """The tokens of a prompt, cut where it and its answer are beyond the context.

    Args:
        kind: of the benchmark, for errors.
        tokenizer: from `load`.
        prompt: what to ask.
        limits: that prompt and budget keep to.

    Returns:
        Token ids; whether something was cut.

    Raises:
        ValueError: not even a question without its document fits.
    """
    whole = text = prompt.before + prompt.document + prompt.after
    middle = limits.truncation == "middle"
    limit: int | None = None
    while True:
        ids = prompt.tokens(tokenizer, text, limits.chat)
        over = len(ids) + prompt.budget - limits.context
        if over <= 0:
            return ids, text != whole
        if limit is None:
            check_fits(kind, tokenizer, prompt, limits)
            limit = len(tokenizer.encode(whole if middle else prompt.document))
        limit -= over  # more than once: the same text may take more tokens between other texts
        if middle:
            text = _middle(tokenizer, whole, limit)
        else:
            document = cut(tokenizer, prompt.document, max(limit, 0), limits.truncation, prompt.keep_end)
            text = prompt.before + document + prompt.after


def _middle(tokenizer: TokenizerWrapper, text: str, limit: int) -> str:
    """Half of so many tokens from each end. Source: LongBench/pred.py, get_pred."""
    ids, half = list(tokenizer.encode(text)), limit // 2
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[len(ids) - half :]))


def cut(tokenizer: TokenizerWrapper, text: str, limit: int, truncation: str, keep_end: bool = False) -> str:
    """At most so many tokens of a text, by words or from its head, as `Limits` describes it.

    Source: L-Eval's Baselines/llama2-chat-test.py.
    """
    words = text.split(" ")
    for count in range(limit if truncation == "words" else 0, 0, -WORDS):
        part = " ".join(words[-count:] if keep_end else words[:count])
        if len(tokenizer.encode(part, add_special_tokens=False)) <= limit:
            return part
    ids = list(tokenizer.encode(text, add_special_tokens=False))  # by words: where 250 have no room
    return str(tokenizer.decode(ids[len(ids) - limit :] if keep_end else ids[:limit], skip_special_tokens=True))


def read_lines(kind: str, path: Path, fields: Mapping[str, type]) -> list[tuple[int, Record]]:
    """The objects of a file of JSON lines, each with the number of its line.

    Args:
        kind: of the benchmark, for errors.
        path: the file.
        fields: what each must have, of a kind of `check_field`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no lines, or one is something else; its number is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"[{kind}] no file {path}")
    found = []
    for number, entry in json_lines(kind, path):
        where = f"[{kind}] {path}, line {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is no JSON object")
        for name, wanted in fields.items():
            check_field(where, entry, name, wanted)
        found.append((number, entry))
    if not found:
        raise ValueError(f"[{kind}] {path} is empty")
    return found
