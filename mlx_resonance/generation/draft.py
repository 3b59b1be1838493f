"""A draft model: a small one with the same vocabulary, whose most likely tokens are proposed to the large one."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..attention import Inference
from ..rope import expect
from .cache import make_cache
from .decode import same_angles
from .prefill import Pace, Progress, prefill
from .prompt_cache import common_prefix

ROOM = 1024  # tokens that its caches have room for after the prompt before they grow


class DraftProposer:
    """Proposes a draft model's most likely tokens: a `Proposer` with a KV cache of its own.

    It reads the prompt when it is first asked, in chunks. It proposes nothing past its own context, or where its angles
    would change with the length of the text.

    Args:
        model: from `load`, with the vocabulary of the model that checks.
        tokens: the prompt, at least one token.
        kv_bits: 8 or 4 for a quantized KV cache.
        pace: decides how many tokens of a text are read at once; None for a new one.
        progress: called with the number of prompt tokens done and their total.

    Raises:
        UsageError: the KV cache cannot be quantized.
    """

    free = False

    def __init__(
        self,
        model: nn.Module,
        tokens: Sequence[int],
        *,
        kv_bits: int | None = None,
        pace: Pace | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._pace, self._progress = model, pace or Pace(len(model.layers)), progress
        self._text, self._prompt = list(tokens), len(tokens)
        self._proposed: list[int] = []
        self._cache = make_cache(model, len(self._text) + ROOM, kv_bits)

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that may come next."""
        rope, length = self._model.args.rope, len(self._text)
        count = count if rope.context_length is None else min(count, rope.context_length - length)
        if count < 1 or not same_angles(rope, self._prompt, length + count):
            return []
        if not self._cache[0].offset:
            expect(self._model, self._prompt)
        prefill(self._model, self._text, self._cache, pace=self._pace, prompt_progress_callback=self._progress)
        self._progress = None
        read, token = Inference(self._model), mx.array(self._text[-1:])
        drawn = []
        for _ in range(count):
            token = mx.argmax(read(token[None], cache=self._cache)[:, -1, :], axis=-1)
            mx.async_eval(token)
            drawn.append(token)
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
