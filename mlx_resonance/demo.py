"""The demo: a number is hidden in texts past a model's context, and asked for with several rope settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from .attention import set_rope
from .checkpoint import Checkpoint
from .convert import convert, verify
from .errors import ANOTHER, UsageError
from .evaluation.passkey import ANSWER_TOKENS, first_integer, passkey_prompt, shuffled_filler
from .generation.stream import figures, stream_generate
from .rope_config import RopeConfig
from .scaling import check_context, named_rope

ROPE = "resonance_yarn"
DEPTH = 5  # where the number is, in % of the text
STEP = 256  # tokens in a pass: of larger passes a CPU computes more scores that the mask then drops


@dataclass(frozen=True)
class Task:
    """A prompt that hides a number.

    Args:
        length: tokens of the prompt and its answer.
        prompt: token ids.
        key: the number.
    """

    length: int
    prompt: list[int]
    key: int


def hide(checkpoint: Checkpoint, length: int, text: str | None, seed: int) -> Task:
    """Hide a number of five digits near the beginning of a text.

    Args:
        checkpoint: its tokenizer counts.
        length: tokens of the prompt and its answer.
        text: what hides it, from its start; None for the passkey test's sentences in random order.
        seed: of the number and of that order.

    Raises:
        UsageError: the length has no room for a text, or the text is shorter.
    """
    tokenizer = checkpoint.tokenizer
    if text is None:
        filler = shuffled_filler(tokenizer, length, seed)
    else:
        filler = list(tokenizer.encode(text, add_special_tokens=False))
        if len(filler) < length:
            raise UsageError(f"the text has {len(filler):,} tokens, fewer than {length:,}", option="lengths")
    key = int(np.random.default_rng([seed, length]).integers(10_000, 50_000))
    return Task(length, passkey_prompt(tokenizer, length, DEPTH, key, filler), key)


def ropes(source: RopeConfig, factor: float, longest: int) -> dict[str, RopeConfig]:
    """Rope settings to compare, by their names: as trained, and with YaRN, unrounded and rounded.

    Args:
        source: as trained.
        factor: of the context.
        longest: tokens that plain RoPE, too, is given.

    Raises:
        UsageError: the factor does not fit the source, or so many tokens exceed the context.
    """
    ours = named_rope(source, ROPE, factor)
    check_context(ours, longest)
    return {
        "plain RoPE, as trained": replace(source, max_position_embeddings=longest),
        "YaRN": named_rope(source, "yarn", factor),
        "Resonance-YaRN": ours,
    }


def answers(
    model: nn.Module, checkpoint: Checkpoint, settings: dict[str, RopeConfig], tasks: Sequence[Task],
    progress: Callable[[int], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The greedy answer to every task with every rope setting; the last of those stays in the model.

    Args:
        model: of the checkpoint.
        checkpoint: its tokenizer.
        settings: from `ropes`.
        tasks: from `hide`.
        progress: called with the number of tokens of every prompt that was read.

    Yields:
        `angles`, `length`, `key`, `found`, and the figures of `generate --json`.
    """
    for name, rope in settings.items():
        set_rope(model, rope)
        for task in tasks:
            options: Any = {"max_tokens": ANSWER_TOKENS, "prefill_step_size": STEP}
            pieces = list(stream_generate(model, checkpoint.tokenizer, task.prompt, **options))
            text = "".join(piece.text for piece in pieces)
            found = first_integer(text) == task.key
            yield {"angles": name, "length": task.length, "key": task.key, "found": found} | figures(text, pieces[-1])
            progress(len(task.prompt))


def converted(source: Checkpoint, folder: Path, factor: float, dtype: str | None) -> Checkpoint:
    """The checkpoint with Resonance-YaRN: in its folder, where an earlier demo may have left it.

    Raises:
        UsageError: the folder has something else.
    """
    wanted = named_rope(source.rope, ROPE, factor)
    if not folder.exists():
        convert(source.folder, folder, rope="yarn", factor=factor, dtype=dtype)
        return Checkpoint.open(folder)
    found = Checkpoint.open(folder)
    same = found.rope == wanted and found.config.get("quantization") == source.config.get("quantization")
    if same and verify(folder, source.folder, logits=False).problems:
        same = False
    if not same:
        what = f"{source.folder.name} with {ROPE}, factor {factor:g}"
        raise UsageError(f"{folder} is not {what}, with the same weights", remedies=[{"mlx_path": ANOTHER}])
    return found
