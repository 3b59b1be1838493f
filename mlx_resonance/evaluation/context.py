"""The context of an evaluation: checked against the checkpoint and the memory before any weight is read."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..generation.kv_format import KVBits
from ..generation.memory import require_memory
from ..scaling import check_context

DEFAULT = 16384  # tokens, or the checkpoint's context where that is shorter


def choose_context(
    checkpoint: Checkpoint,
    context: int | None = None,
    *,
    kv_bits: KVBits = None,
    memory: int | None = None,
    force: bool = False,
) -> int:
    """The maximum number of tokens of a prompt and its answer.

    Args:
        checkpoint: its weights are not read.
        context: what was asked for; None for the checkpoint's context, at most 16384 tokens.
        kv_bits, memory: as in `plan_memory`.
        force: accept a context that does not fit into memory.

    Raises:
        UsageError: the context exceeds the checkpoint's, or does not fit into memory.
    """
    tokens = context if context is not None else min(DEFAULT, checkpoint.rope.context_length or DEFAULT)
    check_context(checkpoint.rope, tokens)
    if not force:
        require_memory(checkpoint, tokens, kv_bits=kv_bits, memory=memory)
    return tokens
