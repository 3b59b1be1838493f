"""A draft model: a small one with the same vocabulary, whose most likely tokens are proposed to the large one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..attention import Inference
from ..checkpoint import Checkpoint
from ..errors import UsageError, check_option
from ..rope import expect
from .cache import make_cache
from .decode import same_angles
from .lookup import PromptLookup, check_lookup, lookup_proposals
from .prefill import Pace, prefill
from .prompt_cache import common_prefix
from .speculation import MOST, Proposals

ROOM = 1024  # tokens that its caches have room for after a prompt before they grow
PADDING = 1024  # rows at most that an embedding has beyond its vocabulary


class DraftProposer:
    """Proposes a draft model's most likely tokens: a `Proposer` with a KV cache of its own, in the model's type.

    It reads a prompt when it is first asked, in chunks, and of one that begins like the last text only the rest. It
    proposes nothing past its own context, or where its angles would change with the length of the text.

    Args:
        model: from `load`, with the vocabulary of the model that checks.
        rows: ids of the model that checks: no other is proposed; None for all.
        pace: decides how many tokens of a text are read at once; None for a new one.
    """

    free = False

    def __init__(self, model: nn.Module, rows: int | None = None, *, pace: Pace | None = None) -> None:
        self._model, self._rows, self._pace = model, rows, pace or Pace(len(model.layers))
        self._text: list[int] = []
        self._prompt = 0  # tokens: they decide angles that change with the length
        self._proposed: list[int] = []
        self._cache: list[Any] = []

    def begin(self, tokens: Sequence[int]) -> None:
        """Begin a text: its prompt, at least one token."""
        rope, held = self._model.args.rope, min((layer.offset for layer in self._cache), default=0)
        known = common_prefix(list(tokens[:-1]), self._text[:held])
        if not known or (rope.depends_on_length and rope.frequencies(self._prompt) != rope.frequencies(len(tokens))):
            known, self._cache = 0, make_cache(self._model, ROOM)
        self._text, self._prompt, self._proposed = list(tokens), len(tokens), []
        for layer in self._cache:
            layer.trim(layer.offset - known)
            layer.step = len(tokens) + ROOM - known  # what it grows by

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that may come next."""
        rope, length = self._model.args.rope, len(self._text)
        count = count if rope.context_length is None else min(count, rope.context_length - length)
        if count < 1 or not same_angles(rope, self._prompt, length + count):
            return []
        if rope.depends_on_length:
            expect(self._model, self._prompt)
        try:
            prefill(self._model, self._text, self._cache, pace=self._pace)
            read, token = Inference(self._model), mx.array(self._text[-1:])
            drawn = []
            for _ in range(count):
                logits = read(token[None], cache=self._cache)[:, -1, :]
                token = mx.argmax(logits if self._rows is None else logits[:, : self._rows], axis=-1)
                mx.async_eval(token)
                drawn.append(token)
        finally:
            if rope.depends_on_length:
                expect(self._model, 0)  # another text of the same model has its own length
        self._proposed = mx.concatenate(drawn).tolist()  # type: ignore[assignment]
        return list(self._proposed)

    def accepted(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text, and drop the keys of what was proposed and is not in it."""
        right = len(self._text) + common_prefix(self._proposed, list(tokens))
        self._text += tokens
        held = min(right, len(self._text) - 1, *(layer.offset for layer in self._cache))
        for layer in self._cache:
            layer.trim(layer.offset - held)
        self._proposed = []


def check_proposers(prompt_lookup: PromptLookup, draft: object | None, num_draft_tokens: int | None = None) -> None:
    """Raise UsageError if these settings of who proposes, and how much, are not valid or contradict each other.

    With a draft model, `auto` is off: only one of them proposes.
    """
    check_lookup(prompt_lookup)
    if draft is not None and isinstance(prompt_lookup, int):
        why = "a draft model and prompt lookup propose for the same pass: give one of them"
        raise UsageError(why, option="prompt_lookup", remedies=[{"prompt_lookup": "off"}])
    right = num_draft_tokens is None or 1 <= num_draft_tokens <= MOST
    check_option("num_draft_tokens", right, f"1 to {MOST}", num_draft_tokens)


def proposals_for(
    tokens: Sequence[int], prompt_lookup: PromptLookup, draft: DraftProposer | None, num_draft_tokens: int | None = None
) -> Proposals | None:
    """Proposals for the answer to a prompt: the draft model's if there is one, or what prompt lookup finds.

    Args:
        tokens: the prompt.
        prompt_lookup: as in `lookup_proposals`.
        draft: begins the text.
        num_draft_tokens: it always proposes as many; None for as many as pay.
    """
    if draft is None:
        return lookup_proposals(tokens, prompt_lookup)
    draft.begin(tokens)
    return Proposals(draft, num_draft_tokens)


def draft_for(model: nn.Module, tokenizer: TokenizerWrapper, draft: nn.Module | None) -> DraftProposer | None:
    """The proposer for a draft model; None without one.

    Raises:
        UsageError: it cannot have the tokenizer's vocabulary.
    """
    if draft is None:
        return None
    ids, rows = max(tokenizer.get_vocab().values()) + 1, int(draft.args.vocab_size)
    if not ids <= rows < ids + PADDING:
        what = f"the draft model has another vocabulary: an embedding of {rows:,} rows for {ids:,} tokens"
        raise UsageError(what, option="draft_model")
    return DraftProposer(draft, int(model.args.vocab_size))


def open_draft(checkpoint: Checkpoint, draft: str | Path | None) -> Checkpoint | None:
    """Open the checkpoint of a draft model; None for None.

    Raises:
        MissingFileError, UsageError: as in `Checkpoint.open`; or its tokens are not those of the other checkpoint.
    """
    if draft is None:
        return None
    opened = Checkpoint.open(draft)
    own, other = checkpoint.tokenizer.get_vocab(), opened.tokenizer.get_vocab()
    if own != other:
        token = min(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
        ids = " and ".join(f"{of.get(token, 'not a token')} in {name}" for of, name in
                           ((other, opened.name), (own, checkpoint.name)))  # fmt: skip
        what = f"the draft model has another vocabulary than the model: {token!r} is {ids}"
        raise UsageError(what, option="draft_model")
    return opened
