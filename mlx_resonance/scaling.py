"""A checkpoint's rope settings for a longer context: a new scaling, rounded or not."""

from __future__ import annotations

import math

import numpy as np

from .config import LONGEST, MAKERS, PREFIX, RopeConfig

# With these three numbers alone; llama3 and longrope need parameters that belong to one trained checkpoint.
SCALINGS = ("linear", "ntk", "dynamic", "yarn")


def new_rope(
    source: RopeConfig, rope: str | None, factor: float | None, original: int | None, resonance: bool
) -> RopeConfig:
    """The rope settings to write.

    Args:
        source: the checkpoint's own settings.
        rope: the new scaling, one of `SCALINGS`; None keeps the source's.
        factor: how many times the context grows.
        original: tokens of context before scaling; None for what the source says.
        resonance: round the wavelengths.

    Raises:
        ValueError: the arguments contradict each other or the source.
    """
    prefix = PREFIX if resonance else ""
    if rope is None:
        if factor is not None or original is not None:
            raise ValueError("[convert] --factor and --original-max-position-embeddings need --rope")
        return _with(source, prefix + source.base_type, dict(source.parameters), source.max_position_embeddings)
    if rope not in SCALINGS:
        more = " (give its keys in config.json instead)" if rope in MAKERS else ""
        raise ValueError(f"[convert] rope must be one of {', '.join(SCALINGS)}, got {rope!r}{more}")
    if source.base_type != "default" and not (source.base_type == rope and rope in ("yarn", "dynamic")):
        raise ValueError(
            f"[convert] the checkpoint was trained with rope type {source.base_type}: --rope {rope} would replace it; "
            "leave --rope out to round its wavelengths"
        )
    if factor is None:
        raise ValueError(f"[convert] --rope {rope} needs --factor")
    if not 1 <= factor <= LONGEST:
        raise ValueError(f"[convert] factor must be at least 1 and at most 2**31, got {factor}")
    original = original if original is not None else source.trained_length
    if original is None:
        raise ValueError("[convert] config.json has no context length: give --original-max-position-embeddings")
    if original < 1:
        raise ValueError(f"[convert] original_max_position_embeddings must be positive, got {original}")
    parameters: dict[str, float] = {"factor": factor}
    if rope != "dynamic":
        parameters |= {"original_max_position_embeddings": original}
    if rope == "yarn":  # the betas of the paper's language models, written out: other runtimes have other defaults
        parameters |= {"beta_fast": 32, "beta_slow": 1}
    # The dynamic formula counts from max_position_embeddings, which therefore stays the length before scaling.
    length = original if rope == "dynamic" else int(original * factor)
    return _with(source, prefix + rope, parameters, length)


def _with(source: RopeConfig, rope_type: str, parameters: dict[str, float], length: int | None) -> RopeConfig:
    return RopeConfig(
        dims=source.dims,
        rope_type=rope_type,
        base=source.base,
        max_position_embeddings=length,
        parameters=parameters,
        partial_rotary_factor=source.partial_rotary_factor,
    )


def largest_shift(rope: RopeConfig) -> float:
    """By how much rounding changes the wavelength that it changes most, as a part of it; 0 where nothing is rounded."""
    if not rope.is_resonant:
        return 0.0
    return float(np.max(rope.unrounded_frequencies().angle_shift()))


def rescale(source: RopeConfig, factor: float) -> RopeConfig:
    """The settings for `factor` times the context before scaling, of the same type; of a checkpoint without scaling
    Resonance-YaRN's.

    Raises:
        ValueError: its type has no such factor, or config.json does not tell the context before scaling.
    """
    if source.base_type == "default":
        return new_rope(source, "yarn", factor, None, True)
    if source.base_type not in SCALINGS:
        raise ValueError(f"[load] factor: rope type {source.base_type} belongs to one trained length")
    if source.trained_length is None:
        raise ValueError(
            "[load] factor: config.json does not tell the context before scaling: it needs "
            "original_max_position_embeddings"
        )
    plain = _with(source, "default", {}, source.trained_length)
    return new_rope(plain, source.base_type, factor, None, source.is_resonant)


def factor_for(source: RopeConfig, tokens: int) -> int | None:
    """The smallest whole factor whose context holds so many tokens; None where the type has no factor."""
    if source.trained_length is None or source.base_type not in ("default", *SCALINGS):
        return None
    return math.ceil(tokens / source.trained_length)
