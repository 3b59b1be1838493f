"""What `inspect` shows about a checkpoint's rotary embedding: wavelengths, rounding, distance to the trained angles."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import UsageError
from .files import file_of, read_json
from .frequencies import MOST_POSITIONS, Float64Array, RotaryFrequencies, feature_gap
from .rope_config import RopeConfig
from .rope_types import LONGEST

MAX_RECORD = 2**24  # bytes


@dataclass(frozen=True)
class Training:
    """The rotary embedding that a checkpoint was trained with.

    Args:
        rope: its settings.
        length: tokens of a training sequence; None if unknown.
        on_record: False where the checkpoint does not say, and plain RoPE is assumed.
    """

    rope: RopeConfig
    length: int | None = None
    on_record: bool = True

    @property
    def frequencies(self) -> RotaryFrequencies:
        """The rotary frequencies that the model saw."""
        return self.rope.frequencies(self.length)

    def to_record(self) -> dict[str, Any]:
        """For conversion.json, from which `training_of` reads it."""
        return {"trained_rope": self.rope.to_hf("4"), "trained_length": self.length}

    def __str__(self) -> str:
        """For the reader, in one line."""
        if not self.on_record:
            return "not on record, plain RoPE assumed"
        factor = self.rope.parameters.get("factor")
        scaling = "" if factor is None else f", factor {factor:g}"
        length = "" if self.length is None else f", {self.length} tokens"
        name = "plain RoPE" if self.rope.rope_type == "default" else self.rope.rope_type
        return f"{name}, base {self.rope.base:g}{scaling}{length}"


def training_of(folder: Path, rope: RopeConfig) -> Training:
    """What the record of a conversion or a fine-tuning says about a checkpoint's training.

    Args:
        folder: the checkpoint's.
        rope: its settings.

    Returns:
        That; without a record, or with one that is damaged or names no trained angles, plain RoPE with the same base.
    """
    for name, read in RECORDS.items():
        try:
            path = file_of(folder, name)
            if not path.is_file():
                continue
            settings, length = read(path)
            # The record has no sizes; training rotated the same number of features.
            trained = RopeConfig.from_hf({**settings, "head_dim": rope.dims, "partial_rotary_factor": None})
            length = trained.context_length if length == WHOLE else length
            if length is None or (type(length) is int and 1 <= length <= LONGEST):
                return Training(trained, length)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue
    return _plain(rope)


WHOLE = "context"  # in place of a trained length: positions skipped through the whole context


def _of_conversion(path: Path) -> tuple[Any, Any]:
    record = read_json(path, MAX_RECORD)
    return record["trained_rope"], record["trained_length"]


def _of_finetuning(path: Path) -> tuple[Any, Any]:
    with path.open("rb") as file:  # the header of a run log; a line for each step follows
        header = json.loads(file.readline(MAX_RECORD))
    recipe = header["recipe"]
    return header["rope"], WHOLE if recipe.get("skip_positions") else recipe["length"]


RECORDS: Mapping[str, Callable[[Path], tuple[Any, Any]]] = MappingProxyType(
    {"conversion.json": _of_conversion, "finetune.jsonl": _of_finetuning}
)


def _plain(rope: RopeConfig) -> Training:
    return Training(RopeConfig(rope.dims, base=rope.base), rope.trained_length, on_record=False)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's rotary embedding, measured from a training length to a longer one.

    Args:
        rope: the checkpoint's settings.
        training: the settings in training.
        train_length: tokens seen in training.
        test_length: tokens in the longer text.
        unrounded: the frequencies of the base type.
        in_use: the model's frequencies at `test_length`.
        gap: feature gap of every pair: how far the angles in use lie from all that were seen in training.
    """

    rope: RopeConfig
    training: Training
    train_length: int
    test_length: int
    unrounded: RotaryFrequencies
    in_use: RotaryFrequencies
    gap: Float64Array

    def gaps(self) -> dict[str, Float64Array]:
        """The feature gap of every pair with wavelengths as computed, and with rounded ones."""
        both = {"as computed": self.unrounded, "rounded": self.unrounded.resonate()}
        lengths, trained = (self.train_length, self.test_length), self.training.frequencies
        return {name: feature_gap(frequencies, *lengths, trained) for name, frequencies in both.items()}

    def to_dict(self) -> dict[str, Any]:
        """What `inspect --json` prints."""
        return {
            "rope_type": self.rope.rope_type,
            "base": self.rope.base,
            "dims": self.rope.dims,
            "factor": self.rope.parameters.get("factor", 1.0),
            "attention_scale": self.in_use.attention_scale,
            "original_max_position_embeddings": self.rope.trained_length,
            "trained_rope": self.training.rope.to_hf("4"),
            "trained_on_record": self.training.on_record,
            "train_length": self.train_length,
            "test_length": self.test_length,
            "wavelengths": self.in_use.wavelengths.tolist(),
            "angle_shift": self.unrounded.angle_shift().tolist(),
            "critical_pairs": self.in_use.critical_pairs(self.train_length),
            "feature_gap": self.gap.tolist(),
        }


def inspect_rope(
    rope: RopeConfig,
    train_length: int | None = None,
    test_length: int | None = None,
    training: Training | None = None,
) -> Inspection:
    """Measure a rotary embedding.

    Args:
        rope: the settings.
        train_length: tokens seen in training; None for those of `training`, or for the context before scaling.
        test_length: tokens in the longer text; None for the checkpoint's context, or for four times the training
            length if the context is not longer; of these at most 2²⁴.
        training: what the checkpoint was trained with, from `training_of`; None for plain RoPE with the same base.

    Raises:
        UsageError: config.json lacks a length that is needed, or not 1 <= train_length <= test_length.
    """
    training = _plain(rope) if training is None else training
    if train_length is None:
        train_length = training.length or rope.trained_length
    if train_length is None:
        raise UsageError("config.json does not state the context before scaling", remedies=[{"train_length": None}])
    if test_length is None:
        test_length = max(rope.context_length or 0, train_length)
        test_length = 4 * train_length if test_length == train_length else test_length
        test_length = max(train_length, min(test_length, MOST_POSITIONS))
    unrounded, in_use = rope.unrounded_frequencies(test_length), rope.frequencies(test_length)
    gap = feature_gap(in_use, train_length, test_length, training.frequencies)
    return Inspection(rope, training, train_length, test_length, unrounded, in_use, gap)
