"""The paper's measure of how far a longer text's angles lie from those of training."""

from __future__ import annotations

import numpy as np

from .frequencies import Float64Array, RotaryFrequencies


def feature_gap(
    frequencies: RotaryFrequencies, train_length: int, test_length: int, trained: RotaryFrequencies | None = None
) -> Float64Array:
    """How far each pair's angles past the training length lie from any angle seen inside it.

    For each pair: the largest, over positions m in [train_length, test_length), of the smallest distance between the
    unit vectors (cos, sin) at m and at any n in [0, train_length). Zero: every rotation was seen in training.

    Args:
        frequencies: the rotary frequencies of the longer text.
        train_length: tokens seen in training.
        test_length: tokens of the longer text, at least `train_length`.
        trained: the rotary frequencies of training, where those were others, such as before a scaling.

    Returns:
        Euclidean distances in [0, 2], float64, shape (dims / 2,).

    Raises:
        ValueError: the lengths are not 1 <= train_length <= test_length, or there are other numbers of pairs.

    Source: arXiv 2403.00071, section 4.2 (definition 4.1), per feature pair.
    """
    if not 1 <= train_length <= test_length:
        raise ValueError(f"[feature_gap] need 1 <= train_length <= test_length, got {train_length} and {test_length}")
    if test_length > 2**24:
        raise ValueError(f"[feature_gap] test_length must be at most {2**24}, got {test_length}")
    if train_length == test_length:
        return np.zeros(len(frequencies.wavelengths))
    seen_positions, new_positions = np.arange(train_length), np.arange(train_length, test_length)
    new, seen = frequencies.wavelengths, (trained or frequencies).wavelengths
    if len(new) != len(seen):
        raise ValueError(f"[feature_gap] trained has {len(seen)} pairs, expected {len(new)}")
    gaps = [_largest_turn_gap(seen_positions % s / s, new_positions % n / n) for s, n in zip(seen, new, strict=True)]
    return 2 * np.sin(np.pi * np.array(gaps))


def _largest_turn_gap(seen: Float64Array, new: Float64Array) -> float:
    """Largest distance, in turns, from a phase in `new` to the nearest one in `seen`, around the circle."""
    seen = np.sort(seen)
    around = np.concatenate([seen[-1:] - 1, seen, seen[:1] + 1])
    above = np.searchsorted(around, new)
    return float(np.minimum(around[above] - new, new - around[above - 1]).max())
