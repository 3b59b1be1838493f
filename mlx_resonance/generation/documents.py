"""Reading documents beforehand, into the on-disk KV cache, so that the first question about them is a quick one."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .._mlx_lm import generation_stream
from ..rope import expect
from ..wired import wired
from .cache import make_cache
from .kv_format import KVBits
from .prefill import STEP, Pace, Progress, prefill
from .prompt_cache import PromptCache

CHUNKS = 4  # read before a file is written
MOST_FILES = 32  # of a document


def read_document(
    model: nn.Module,
    tokens: Sequence[int],
    kept: PromptCache,
    *,
    kv_bits: KVBits = None,
    prefill_step_size: int = STEP,
    progress: Progress | None = None,
) -> int:
    """Read a document and store its keys and values as reading goes on; a run that was killed resumes at its last file.

    Args:
        model: from `load`.
        tokens: from `document_tokens`.
        kept: the on-disk KV cache.
        kv_bits, prefill_step_size: as in `stream_generate`.
        progress: called with the number of tokens done and their total.

    Returns:
        How many tokens were read, not known.
    """
    # `fetch` and `prefill` leave out a prompt's last token; here that is one more, which is never looked at.
    whole, total = [*tokens, 0], len(tokens)
    cache, pace = make_cache(model, total, kv_bits), Pace(len(model.layers), prefill_step_size)
    expect(model, total)
    done = known = kept.fetch(whole, cache)
    piece = max(CHUNKS * prefill_step_size, total // MOST_FILES)
    count = max(1, round((total - known) / piece))  # equal ones: none is so short that it is not worth a file

    def tell(at: int, _: int) -> None:
        if progress is not None:
            progress(at, total)

    with wired(generation_stream, model=model):
        for i in range(count):
            end = known + (total - known) * (i + 1) // count
            try:
                with mx.stream(generation_stream):
                    prefill(model, [*tokens[:end], 0], cache, pace=pace, prompt_progress_callback=tell)
            finally:
                done = cache[0].offset
                kept.store(tokens[:done], cache, least=1)
    expect(model, 0)
    return done - known
