"""What of a checkpoint is read before a question is asked: everything but its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..files import TOKENIZER_PATTERNS, WEIGHTS, read_config, resolve
from ..generation.memory import guard
from ..generation.prompt_cache import model_digest
from ..loading import load_model, load_tokenizer
from ..records import Record
from ..rope_config import RopeConfig
from ..scaling import factor_for, rescale

CONTEXT = 16384  # tokens, if the checkpoint has as many


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is asked questions.

    Args:
        folder: where it is.
        rope: the settings to read with.
        tokenizer: its own.
        context: most tokens of a prompt and its answer.
        header: what tells its answers from another's.
    """

    folder: Path
    rope: RopeConfig
    tokenizer: TokenizerWrapper
    context: int
    header: Record

    def load(self) -> nn.Module:
        """The model, with its weights."""
        return load_model(self.folder, rope=self.rope)[0]


def open_checkpoint(
    kind: str,
    model: str,
    *,
    context: int | None = None,
    factor: float | None = None,
    kv_bits: int | None = None,
    memory: int | None = None,
    force: bool = False,
) -> Checkpoint:
    """Everything of a checkpoint but its weights.

    Args:
        kind: the benchmark, for errors.
        model: folder or hub id.
        context: tokens; None for the checkpoint's, at most 16384.
        factor: how many times the context before scaling, instead of what config.json says.
        kv_bits: as in `stream_generate`.
        memory: bytes there are; None for what the device says.
        force: go on though the context does not fit into memory.

    Raises:
        FileNotFoundError, ValueError: as `load`; the context is beyond the checkpoint's, or does not fit into memory.
    """
    folder = resolve(model, None, [*TOKENIZER_PATTERNS, WEIGHTS])
    config = read_config(folder)
    rope = RopeConfig.from_hf(config)
    rope = rope if factor is None else rescale(rope, factor)
    longest = rope.context_length
    wanted = context if context is not None else min(CONTEXT, longest or CONTEXT)
    if longest is not None and wanted > longest:
        needed = factor_for(rope, wanted)
        longer = "another model" if needed is None else f"--factor {needed}"
        raise ValueError(f"[{kind}] {wanted} tokens exceed the checkpoint's context of {longest}: take {longer}")
    if not force:
        guard(folder, wanted, kind, kv_bits=kv_bits, memory=memory)
    # The digest covers the weights; the rest is for who reads the file.
    digest = model_digest(folder, rope, kv_bits)
    header = {"model": model, "rope": rope.to_hf(), "kv_bits": kv_bits, "digest": digest}
    return Checkpoint(folder, rope, load_tokenizer(folder, config), wanted, header)
