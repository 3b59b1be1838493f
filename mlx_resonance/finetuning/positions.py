"""Skipped positions: a short sequence, with a random gap between the positions of its two parts, covers a long context.

Source: PoSE, arXiv 2309.10400, with dwzhu-pku/PoSE `src/train_pose.py`: the first part starts at position 0 and is at
most half of the sequence. Here the text stays contiguous; only the positions jump.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..errors import ANOTHER, UsageError
from ..rope_config import RopeConfig
from ..rope_types import PREFIX
from ..scaling import SCALINGS

STREAM = 0x504F5345  # keeps these draws apart from those of the order of the sequences


def check_skips(length: int, rope: RopeConfig) -> None:
    """Raise UsageError unless sequences of `length` tokens leave something of the context to skip."""
    context = rope.context_length
    if context is None:
        raise UsageError("config.json has no context length: no positions to skip to", option="skip_positions")
    if length >= context:
        longer: dict[str, Any] = {} if rope.base_type in SCALINGS else {"rope": PREFIX + "yarn"}
        raise UsageError(
            f"skipping positions needs a length below the context: {length} of {context} tokens leave nothing to skip",
            remedies=[{"length": ANOTHER}, longer | {"factor": ANOTHER}],
        )


def skipped_positions(numbers: NDArray[np.integer], length: int, context: int, seed: int) -> NDArray[np.int32]:
    """Positions of sequences, each strictly increasing, from 0 to at most context - 1.

    Args:
        numbers: of the sequences, counted over the run: the same number always gets the same positions.
        length: tokens of a sequence, less than `context`.
        context: tokens of context to cover.
        seed: of the run.

    Returns:
        Shape (numbers, length).
    """
    positions = np.tile(np.arange(length, dtype=np.int32), (len(numbers), 1))
    for row, number in zip(positions, numbers, strict=True):
        draw = np.random.default_rng((seed, STREAM, int(number)))
        cut = draw.integers(1, (length + 1) // 2, endpoint=True)
        row[cut:] += draw.integers(0, context - length, endpoint=True)
    return positions


def caches_at(model: Any, positions: mx.array | None) -> list[Any] | None:
    """For `model.model`: caches that place its tokens; None where their positions are consecutive.

    Args:
        model: from `Checkpoint.load`.
        positions: of every token, int32, shape (B, L).
    """
    return None if positions is None else [_Placed(positions)] * len(model.layers)


class _Placed:
    """Stands for the cache of a layer, and caches nothing: it only says at which positions the tokens are.

    A layer gets it as an argument, so it is there again when activation checkpointing recomputes the layer.
    """

    def __init__(self, positions: mx.array) -> None:
        self.offset = positions

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As they are."""
        return keys, values
