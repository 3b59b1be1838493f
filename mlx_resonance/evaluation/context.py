"""The context of an evaluation: checked against the checkpoint and the memory before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from ..checkpoint import Checkpoint
from ..generation.kv_format import KVBits, KVFormat
from ..generation.memory import require_memory
from ..release import VERSION
from ..run_log import Record
from ..scaling import check_context

DEFAULT = 16384  # tokens, or the checkpoint's context where that is shorter
FRAME = 512  # tokens around a prompt whose length a benchmark counts: chat template, the beginning of the answer


def choose_context(
    checkpoint: Checkpoint,
    context: int | None = None,
    *,
    lengths: Sequence[int] = (),
    kv_bits: KVBits = None,
    memory: int | None = None,
    force: bool = False,
) -> int:
    """The maximum number of tokens of a prompt and its answer.

    Args:
        checkpoint: its weights are not read.
        context: what was asked for; None for the checkpoint's context, at most 16384 tokens or what the lengths need.
        lengths: tokens that a benchmark makes its prompts of.
        kv_bits, memory: as in `plan_memory`.
        force: accept a context that does not fit into memory.

    Raises:
        UsageError: the context exceeds the checkpoint's, or does not fit into memory.
    """
    longest, own = max(lengths, default=0), checkpoint.rope.context_length
    check_context(checkpoint.rope, longest)
    most = max(DEFAULT, longest + FRAME if longest else 0)
    tokens = context if context is not None else min(most, own or most)
    check_context(checkpoint.rope, tokens)
    require_memory(checkpoint, tokens, force, kv_bits=kv_bits, memory=memory)
    return tokens


def describe(
    checkpoint: Checkpoint, kv_bits: KVBits, *, context: int, truncation: str | None, chat_template: bool
) -> Record:
    """What a score depends on besides the question, for the JSON of every evaluation.

    Args:
        checkpoint, kv_bits: the model, and its KV cache.
        context: maximum number of tokens of prompt and answer.
        truncation: how longer prompts are cut; None where none is.
        chat_template: whether prompts go through the tokenizer's template.
    """
    measured = {"context": context, "truncation": truncation, "chat_template": chat_template, "version": versions()}
    return {"model": checkpoint.name} | checkpoint.settings(KVFormat.of(kv_bits).value) | measured


def versions() -> dict[str, str]:
    """The versions of this package and of those that compute."""
    found = {"mlx-resonance": VERSION}
    for name in ("mlx", "mlx-lm", "lm-eval"):
        with suppress(PackageNotFoundError):  # lm-eval is an extra
            found[name] = version(name)
    return found
