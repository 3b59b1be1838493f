"""What `inspect` shows about a checkpoint's rotary embedding: wavelengths, rounding, feature gap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import UsageError
from .frequencies import Float64Array, RotaryFrequencies, feature_gap
from .rope_config import RopeConfig


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's rotary embedding, measured from a training length to a longer one.

    Args:
        rope: the checkpoint's settings.
        train_length: tokens seen in training.
        test_length: tokens in the longer text.
        unrounded: the frequencies of the base type.
        in_use: the model's frequencies at `test_length`.
        trained: the frequencies in training, before any rounding.
        gap: feature gap of every pair, with the frequencies in use.
    """

    rope: RopeConfig
    train_length: int
    test_length: int
    unrounded: RotaryFrequencies
    in_use: RotaryFrequencies
    trained: RotaryFrequencies
    gap: Float64Array

    def gaps(self) -> dict[str, Float64Array]:
        """Feature gap of every pair, with wavelengths as computed and rounded."""
        lengths = self.train_length, self.test_length
        return {
            "as computed": feature_gap(self.unrounded, *lengths, self.trained),
            "rounded": feature_gap(self.unrounded.resonate(), *lengths, self.trained.resonate()),
        }

    def to_dict(self) -> dict[str, Any]:
        """What `inspect --json` prints."""
        return {
            "rope_type": self.rope.rope_type,
            "base": self.rope.base,
            "dims": self.rope.dims,
            "factor": self.rope.parameters.get("factor", 1.0),
            "attention_scale": self.in_use.attention_scale,
            "original_max_position_embeddings": self.rope.trained_length,
            "train_length": self.train_length,
            "test_length": self.test_length,
            "wavelengths": self.in_use.wavelengths.tolist(),
            "angle_shift": self.unrounded.angle_shift().tolist(),
            "critical_pairs": self.in_use.critical_pairs(self.train_length),
            "feature_gap": self.gap.tolist(),
        }


def inspect_rope(rope: RopeConfig, train_length: int | None = None, test_length: int | None = None) -> Inspection:
    """Measure a rotary embedding.

    Args:
        rope: the settings.
        train_length: tokens seen in training; None for the context before scaling.
        test_length: tokens in the longer text; None for the checkpoint's context, or for four times the training
            length if the context is not longer.

    Raises:
        UsageError: config.json lacks a length that is needed, or not 1 <= train_length <= test_length.
    """
    train_length = rope.trained_length if train_length is None else train_length
    if train_length is None:
        raise UsageError("config.json does not state the context before scaling", remedies=[{"train_length": None}])
    if test_length is None:
        test_length = max(rope.context_length or 0, train_length)
        test_length = 4 * train_length if test_length == train_length else test_length
    # A dynamic model is trained unscaled; LongRoPE's authors fine-tune with the factors of long texts.
    trained_at = train_length if rope.base_type == "dynamic" else test_length
    unrounded, trained = rope.unrounded_frequencies(test_length), rope.unrounded_frequencies(trained_at)
    in_use = rope.frequencies(test_length)
    gap = feature_gap(in_use, train_length, test_length, rope.frequencies(trained_at))
    return Inspection(rope, train_length, test_length, unrounded, in_use, trained, gap)
