"""Rotary frequencies: every scaling of RoPE that config.json can name, rounding to resonance, the feature gap.

Pure NumPy in float64. A pair's *wavelength* is the number of tokens for a full turn, λ = 2π / inv_freq.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

Float64Array = NDArray[np.float64]
MOST_POSITIONS = 2**24  # of which a feature gap is computed


@dataclass(frozen=True, eq=False)
class RotaryFrequencies:
    """What a rotary embedding turns by: one wavelength per feature pair, and one scale.

    Args:
        wavelengths: tokens per full turn, float64, shape (dims / 2,), each positive (infinite: the pair never turns).
        attention_scale: factor on rotated queries and on rotated keys (YaRN's 0.1·ln(factor) + 1).

    Raises:
        UsageError: a wavelength is not a positive number, or the scale not a positive finite one.
    """

    wavelengths: Float64Array
    attention_scale: float = 1.0

    def __post_init__(self) -> None:
        wavelengths = np.array(self.wavelengths, dtype=np.float64)
        if wavelengths.ndim != 1 or wavelengths.size == 0 or not np.all(wavelengths > 0):
            raise UsageError("[RotaryFrequencies] wavelengths must be positive numbers in one dimension")
        if not (math.isfinite(self.attention_scale) and self.attention_scale > 0):
            raise UsageError(
                f"[RotaryFrequencies] attention_scale (attention_factor) must be positive, got {self.attention_scale}"
            )
        wavelengths.flags.writeable = False
        object.__setattr__(self, "wavelengths", wavelengths)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RotaryFrequencies):
            return NotImplemented
        return self.attention_scale == other.attention_scale and np.array_equal(self.wavelengths, other.wavelengths)

    @property
    def dims(self) -> int:
        """Number of rotated features, two for each pair."""
        return 2 * len(self.wavelengths)

    @property
    def inv_freq(self) -> Float64Array:
        """Radians per token, shape (dims / 2,)."""
        return 2 * np.pi / self.wavelengths

    @property
    def is_resonant(self) -> bool:
        """Whether every wavelength is a whole number of tokens."""
        return bool(np.all(self.wavelengths == np.rint(self.wavelengths)))

    def resonate(self) -> RotaryFrequencies:
        """Round every wavelength to the nearest whole number of tokens (halves to even); the scale stays.

        Raises:
            UsageError: a wavelength is below half a token, so that it would become 0.

        Source: arXiv 2403.00071, section 4.1 (equation 8).
        """
        rounded = np.rint(self.wavelengths)
        if np.any(rounded == 0):
            raise UsageError(f"[resonate] wavelength {self.wavelengths.min():g} would round to 0 tokens")
        return replace(self, wavelengths=rounded)

    def angle_shift(self) -> Float64Array:
        """By how much `resonate` changes each wavelength, as a part of it: |rounded - λ| / λ, shape (dims / 2,)."""
        finite = np.where(np.isfinite(self.wavelengths), self.wavelengths, 1.0)
        return np.abs(np.rint(finite) - finite) / finite

    def critical_pairs(self, length: int) -> int:
        """How many pairs make a full turn within `length` tokens (the paper's pre-critical dimensions)."""
        return int(np.sum(self.wavelengths <= length))


def default_frequencies(dims: int, base: float = 10000.0) -> RotaryFrequencies:
    """Plain RoPE: wavelength 2π·base^(2i/dims) for pair i.

    Args:
        dims: number of rotated features, even and positive.
        base: `rope_theta` of config.json, above 1.

    Raises:
        UsageError: an argument is out of range.

    Source: arXiv 2104.09864, section 3.2.2.
    """
    _check_dims_and_base(dims, base)
    return RotaryFrequencies(2 * np.pi * base ** (np.arange(0, dims, 2) / dims))


def linear_frequencies(
    dims: int, base: float, factor: float, original_max_position_embeddings: int | None = None
) -> RotaryFrequencies:
    """Position interpolation: every wavelength `factor` times as long.

    Args:
        dims, base: as in `default_frequencies`.
        factor: how many times the context grows, at least 1.
        original_max_position_embeddings: tokens of context before scaling; no angle depends on it.

    Source: arXiv 2306.15595.
    """
    _check_factor(factor)
    if original_max_position_embeddings is not None:
        _check_length("original_max_position_embeddings", original_max_position_embeddings)
    return RotaryFrequencies(default_frequencies(dims, base).wavelengths * factor)


def ntk_frequencies(
    dims: int, base: float, factor: float, original_max_position_embeddings: int | None = None
) -> RotaryFrequencies:
    """NTK-aware scaling: a larger base, so that the slowest pair is `factor` times as long and the fastest stays.

    Args:
        dims, base: as in `default_frequencies`; dims is at least 4.
        factor: how many times the context grows, at least 1.
        original_max_position_embeddings: as in `linear_frequencies`.

    Source: arXiv 2309.00071, section 3.1 (definition 1).
    """
    _check_factor(factor)
    if original_max_position_embeddings is not None:
        _check_length("original_max_position_embeddings", original_max_position_embeddings)
    _check_dims_and_base(dims, base)
    if dims < 4:
        raise UsageError(f"[frequencies] dims must be at least 4 for NTK scaling, got {dims}")
    return default_frequencies(dims, base * factor ** (dims / (dims - 2)))


def dynamic_ntk_frequencies(
    dims: int, base: float, factor: float, max_position_embeddings: int, seq_len: int | None = None
) -> RotaryFrequencies:
    """NTK-aware scaling that grows with the sequence: unscaled up to `max_position_embeddings` tokens.

    Args:
        dims, base: as in `ntk_frequencies`.
        factor: slope of the growth, at least 1.
        max_position_embeddings: length up to which nothing is scaled.
        seq_len: number of tokens now; None for at most `max_position_embeddings`.

    Source: arXiv 2309.00071, section 3.3; transformers `modeling_rope_utils.py`, `_compute_dynamic_ntk_parameters`.
    """
    _check_factor(factor)
    _check_length("max_position_embeddings", max_position_embeddings)
    growth = max(seq_len or 0, max_position_embeddings) / max_position_embeddings
    return ntk_frequencies(dims, base, factor=factor * growth - (factor - 1))


def yarn_frequencies(
    dims: int,
    base: float,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
    extrapolation_factor: float = 1,
) -> RotaryFrequencies:
    """YaRN: fast pairs as they are, slow pairs interpolated, a linear ramp over the pair index in between.

    Args:
        dims, base: as in `default_frequencies`.
        factor: how many times the context grows, at least 1.
        original_max_position_embeddings: tokens of context before scaling.
        beta_fast: a pair with more turns than this in the original context is not scaled.
        beta_slow: a pair with fewer turns than this is scaled in full.
        attention_factor: the attention scale; None for 0.1·ln(factor) + 1, or from the two below.
        mscale, mscale_all_dim: DeepSeek's form of the attention scale, used when both are given and not 0.
        truncate: round the ends of the ramp outward to whole pairs.
        extrapolation_factor: how much of the unscaled part is kept, in [0, 1]; 0 is plain interpolation.

    Source: arXiv 2309.00071, sections 3.2 and 3.4; transformers `_compute_yarn_parameters`.
    """
    _check_factor(factor)
    _check_length("original_max_position_embeddings", original_max_position_embeddings)
    if not 0 < beta_slow <= beta_fast:
        raise UsageError(f"[yarn] beta_fast must be at least beta_slow > 0, got {beta_fast} and {beta_slow}")
    if not 0 <= extrapolation_factor <= 1:
        raise UsageError(f"[yarn] extrapolation_factor must lie in [0, 1], got {extrapolation_factor}")

    unscaled = default_frequencies(dims, base).inv_freq

    def pair_with_turns(turns: float) -> float:
        return dims * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with_turns(beta_fast), pair_with_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    # Both bounds as every implementation has them: `high` is capped by features, not by pairs.
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low if high != low else 0.001
    unscaled_part = (1 - np.clip((np.arange(dims // 2) - low) / width, 0, 1)) * extrapolation_factor
    inv_freq = unscaled / factor * (1 - unscaled_part) + unscaled * unscaled_part

    if min(mscale or 0, mscale_all_dim or 0) < 0:
        raise UsageError(f"[yarn] mscale and mscale_all_dim must not be negative, got {mscale} and {mscale_all_dim}")
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = yarn_attention_scale(factor, mscale) / yarn_attention_scale(factor, mscale_all_dim)
        else:
            attention_factor = yarn_attention_scale(factor)
    return RotaryFrequencies(2 * np.pi / inv_freq, attention_factor)


def yarn_attention_scale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on queries and on keys, 0.1·mscale·ln(factor) + 1. Source: arXiv 2309.00071, equation 22."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def llama3_frequencies(
    dims: int,
    base: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> RotaryFrequencies:
    """Llama 3.1's scaling: like YaRN, with the ramp over turns in the original context and no attention scale.

    Args:
        dims, base: as in `default_frequencies`.
        factor: how many times the slow pairs' wavelengths grow, at least 1.
        low_freq_factor: a pair with fewer turns than this in the original context is scaled in full.
        high_freq_factor: a pair with more turns than this is not scaled; above `low_freq_factor`.
        original_max_position_embeddings: tokens of context before scaling.

    Source: transformers `modeling_rope_utils.py`, `_compute_llama3_parameters`.
    """
    _check_factor(factor)
    _check_length("original_max_position_embeddings", original_max_position_embeddings)
    if not 0 < low_freq_factor < high_freq_factor:
        raise UsageError(
            f"[llama3] high_freq_factor must be above low_freq_factor > 0, got {high_freq_factor} and {low_freq_factor}"
        )
    wavelengths = default_frequencies(dims, base).wavelengths
    turns = original_max_position_embeddings / wavelengths
    unscaled_part = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return RotaryFrequencies(wavelengths / ((1 - unscaled_part) / factor + unscaled_part))


def longrope_frequencies(
    dims: int,
    base: float,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_max_position_embeddings: int,
    max_position_embeddings: int | None = None,
    factor: float | None = None,
    attention_factor: float | None = None,
    seq_len: int | None = None,
) -> RotaryFrequencies:
    """LongRoPE: one searched factor per pair; a second list for sequences longer than the original context.

    Args:
        dims, base: as in `default_frequencies`.
        short_factor, long_factor: factors on the wavelengths, dims / 2 positive numbers each.
        original_max_position_embeddings: tokens of context before scaling; longer sequences use `long_factor`.
        max_position_embeddings: tokens of context after scaling; gives `factor` where that is None.
        factor: how many times the context grows; only the attention scale depends on it.
        attention_factor: the attention scale; None for sqrt(1 + ln(factor) / ln(original context)).
        seq_len: number of tokens now; None for at most the original context.

    Source: arXiv 2402.13753; transformers `modeling_rope_utils.py`, `_compute_longrope_parameters`.
    """
    _check_length("original_max_position_embeddings", original_max_position_embeddings)
    for key, values in (("short_factor", short_factor), ("long_factor", long_factor)):
        if len(values) != dims // 2:
            raise UsageError(f"[longrope] {key} must have dims / 2 = {dims // 2} numbers, got {len(values)}")
        if not all(value > 0 for value in values):
            raise UsageError(f"[longrope] {key} must have positive numbers only, got {min(values)}")
    if factor is None:
        factor = (max_position_embeddings or original_max_position_embeddings) / original_max_position_embeddings
    _check_factor(factor)
    if attention_factor is None:
        growth = math.log(factor) / math.log(original_max_position_embeddings)
        attention_factor = math.sqrt(1 + growth)
    factors = long_factor if (seq_len or 0) > original_max_position_embeddings else short_factor
    wavelengths = default_frequencies(dims, base).wavelengths * np.asarray(factors, dtype=np.float64)
    return RotaryFrequencies(wavelengths, attention_factor)


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
        trained: the rotary frequencies of training, such as those before a scaling; None for `frequencies`.

    Returns:
        Euclidean distances in [0, 2], float64, shape (dims / 2,).

    Raises:
        UsageError: the lengths are not 1 <= train_length <= test_length, or there are other numbers of pairs.

    Source: arXiv 2403.00071, section 4.2 (definition 4.1), per feature pair.
    """
    if not 1 <= train_length <= test_length:
        raise UsageError(f"[feature_gap] need 1 <= train_length <= test_length, got {train_length} and {test_length}")
    if test_length > MOST_POSITIONS:
        raise UsageError(
            f"[feature_gap] test_length must be at most {MOST_POSITIONS}, got {test_length}", option="test_length"
        )
    if train_length == test_length:
        return np.zeros(len(frequencies.wavelengths))
    seen_positions, new_positions = np.arange(train_length), np.arange(train_length, test_length)
    new, seen = frequencies.wavelengths, (trained or frequencies).wavelengths
    if len(new) != len(seen):
        raise UsageError(f"[feature_gap] trained has {len(seen)} pairs, expected {len(new)}")
    gaps = [_largest_turn_gap(seen_positions % s / s, new_positions % n / n) for s, n in zip(seen, new, strict=True)]
    return 2 * np.sin(np.pi * np.array(gaps))


def _largest_turn_gap(seen: Float64Array, new: Float64Array) -> float:
    """Largest distance, in turns, from a phase in `new` to the nearest one in `seen`, around the circle."""
    seen = np.sort(seen)
    around = np.concatenate([seen[-1:] - 1, seen, seen[:1] + 1])
    above = np.searchsorted(around, new)
    return float(np.minimum(around[above] - new, new - around[above - 1]).max())


def _check_dims_and_base(dims: int, base: float) -> None:
    if dims < 2 or dims % 2:
        raise UsageError(f"[frequencies] dims must be even and positive, got {dims}")
    if not (math.isfinite(base) and base > 1):
        raise UsageError(f"[frequencies] base (rope_theta) must be above 1, got {base}")


def _check_factor(factor: float) -> None:
    if not (math.isfinite(factor) and factor >= 1):
        raise UsageError(f"[frequencies] factor must be at least 1, got {factor}")


def _check_length(key: str, length: int) -> None:
    if length < 2:
        raise UsageError(f"[frequencies] {key} must be at least 2 tokens, got {length}")
