"""A checkpoint's rope settings for a longer context: a new scaling, rounded or not."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from .errors import Remedy, UsageError
from .positions import position_map
from .rope_config import RopeConfig
from .rope_types import LONGEST, MAKERS, ORIGINAL, PREFIX

logger = logging.getLogger("mlx_resonance")

# A factor and the original context define these; llama3 and longrope need parameters of one trained checkpoint.
SCALINGS = ("linear", "ntk", "dynamic", "yarn")


def new_rope(
    source: RopeConfig, rope: str | None, factor: float | None, original: int | None, resonance: bool
) -> RopeConfig:
    """The rope settings to write.

    Args:
        source: the checkpoint's own settings.
        rope: the new scaling, one of `SCALINGS`; None keeps the source's.
        factor: the factor by which the context grows.
        original: tokens of context before scaling; None for the source's.
        resonance: round the wavelengths.

    Raises:
        UsageError: the arguments contradict each other or the source.
    """
    prefix = PREFIX if resonance else ""
    if rope is None:
        for option, value in (("factor", factor), ("original_max_position_embeddings", original)):
            if value is not None:
                raise UsageError(f"{option} = {value} needs the name of a scaling", remedies=[{"rope": None}])
        return replace(source, rope_type=prefix + source.base_type)
    if rope not in SCALINGS:
        more = " (give its keys in config.json instead)" if rope in MAKERS else ""
        raise UsageError(f"rope must be one of {', '.join(SCALINGS)}, got {rope!r}{more}", option="rope")
    if source.base_type != "default" and not (source.base_type == rope and rope in ("yarn", "dynamic")):
        raise UsageError(
            f"the checkpoint was trained with rope type {source.base_type}, which {rope} would replace: its "
            "wavelengths can be rounded without a new scaling",
            option="rope",
        )
    if factor is None:
        raise UsageError(f"the scaling {rope} needs a factor", remedies=[{"factor": None}])
    if not 1 <= factor <= LONGEST:
        raise UsageError(f"factor must be at least 1 and at most 2**31, got {factor}", option="factor")
    original = original if original is not None else source.trained_length
    if original is None:
        raise UsageError(
            "config.json does not state the context before scaling",
            remedies=[{"original_max_position_embeddings": None}],
        )
    if original < 1:
        raise UsageError(
            f"original_max_position_embeddings must be positive, got {original}",
            option="original_max_position_embeddings",
        )
    parameters: dict[str, Any] = {"factor": factor}
    if rope != "dynamic":
        parameters |= {ORIGINAL: original}
    if rope == "yarn":  # the betas of the paper's language models, written out: other runtimes have other defaults
        own = _kept(source, factor) if source.base_type == rope else {}
        parameters = {"beta_fast": 32, "beta_slow": 1} | own | parameters
    # The dynamic formula counts from max_position_embeddings, which therefore stays the length before scaling.
    length = original if rope == "dynamic" else int(original * factor)
    return with_scaling(source, prefix + rope, parameters, length)


def _kept(source: RopeConfig, factor: float) -> dict[str, Any]:
    """The keys of a YaRN checkpoint that it has with another factor, too: it was trained with them.

    An attention factor that is only what the old factor gives, written out, is not kept: the new one gives another.
    """
    kept = dict(source.parameters)
    if factor != kept["factor"] and (written := kept.pop("attention_factor", None)) is not None:
        given = replace(source, parameters=kept).frequencies().attention_scale
        if not math.isclose(written, given, rel_tol=1e-6):
            kept["attention_factor"] = written
    return kept


def named_rope(source: RopeConfig, name: str, factor: float | None, original: int | None = None) -> RopeConfig:
    """A checkpoint's settings with another scaling, named by its rope type.

    Args:
        source: its own.
        name: `default` for no scaling, or one of `SCALINGS`; with the prefix `resonance_`, the wavelengths are rounded.
        factor, original: the scaling's, as in `new_rope`.

    Raises:
        UsageError: the name is unknown, or as in `new_rope`.
    """
    base = name.removeprefix(PREFIX)
    if base not in ("default", *SCALINGS):
        known = ", ".join(("default", *SCALINGS))
        raise UsageError(f"rope must be one of {known}, each also as {PREFIX}…, got {name!r}", option="rope")
    if base == "default":
        return with_scaling(source, name, {}, source.trained_length)
    return new_rope(source, base, factor, original, name != base)


def with_scaling(source: RopeConfig, rope_type: str, parameters: Mapping[str, Any], length: int | None) -> RopeConfig:
    """Settings for the same heads with another rope type, its parameters, and `max_position_embeddings`."""
    changes: dict[str, Any] = {"rope_type": rope_type, "parameters": parameters, "max_position_embeddings": length}
    return replace(source, **changes, positions=None)


def largest_shift(rope: RopeConfig) -> float:
    """The largest relative change of a wavelength by rounding; 0 if nothing is rounded."""
    if not rope.is_resonant:
        return 0.0
    return float(np.max(rope.unrounded_frequencies().angle_shift()))


def rescale(source: RopeConfig, factor: float) -> RopeConfig:
    """Settings of the same type for `factor` times the context before scaling; Resonance-YaRN if there was no scaling.

    Raises:
        UsageError: the type has no such factor, or config.json does not state the context before scaling.
    """
    if source.base_type == "default":
        return new_rope(source, "yarn", factor, None, True)
    if source.base_type not in SCALINGS:
        raise UsageError(
            f"rope type {source.base_type} belongs to one trained length and has no factor", option="factor"
        )
    if source.length_if_unscaled is not None and factor == source.parameters["factor"]:
        before = {ORIGINAL: source.max_position_embeddings}  # the factor says which length config.json states
        return with_scaling(source, source.rope_type, {**source.parameters, **before}, source.length_if_unscaled)
    if source.trained_length is None:
        raise UsageError(
            "config.json does not state the context before scaling: it needs original_max_position_embeddings",
            option="factor",
        )
    plain = with_scaling(source, "default", {}, source.trained_length)
    kept = source if source.base_type == "yarn" else plain
    return new_rope(kept, source.base_type, factor, None, source.is_resonant)


def factor_for(source: RopeConfig, tokens: int) -> int | None:
    """The smallest integer factor whose context holds `tokens`; None if the type has no factor."""
    if source.trained_length is None or source.base_type not in ("default", *SCALINGS):
        return None
    return math.ceil(tokens / source.trained_length)


def check_context(rope: RopeConfig, tokens: int, what: str = "") -> None:
    """Refuse more tokens than the checkpoint's context holds.

    Args:
        rope: the settings in use.
        tokens: of prompt and answer together.
        what: the tokens in words; empty for just their number.

    Raises:
        UsageError: they exceed the context; the factor that would cover them is a remedy, a position map another.
    """
    limit = rope.context_length
    if limit is None or tokens <= limit:
        return
    what = what or f"{tokens:,} tokens"
    if rope.positions is not None:
        larger = position_map(f"self-extend:{rope.positions.window}", rope.positions.trained, tokens)
        raise UsageError(
            f"{what} exceed the {limit:,} tokens that {rope.positions.extend} serves",
            remedies=[{"extend": larger.extend}, {"extend": "dynamic"}],
        )
    if tokens <= (rope.length_if_unscaled or 0):
        _warn_unclear(rope.rope_type, limit, rope.parameters["factor"])
        return
    factor = factor_for(rope, tokens)
    why = f", which rope type {rope.rope_type} cannot extend" if factor is None else ""
    if rope.window == limit:
        factor, why = None, ", the window of its attention"
    raise UsageError(
        f"{what} exceed the checkpoint's context of {limit:,} tokens{why}",
        remedies=[*([] if factor is None else [{"factor": factor}]), {"extend": "dynamic"}],
    )


def larger_context(rope: RopeConfig, context: int, tokens: int) -> list[Remedy]:
    """Remedies where tokens exceed the context in use: all there may be, where config.json leaves that open."""
    longest = rope.length_if_unscaled or 0
    return [{"context": longest}] if context == rope.context_length and tokens <= longest else []


@cache  # once is enough for all prompts of a process
def _warn_unclear(rope_type: str, limit: int, factor: float) -> None:
    logger.warning(
        f"max_position_embeddings = {limit} may be the context before or after {rope_type} scaling: more tokens than "
        "that are right only if it is the one before",
        extra={"remedies": [{"factor": factor}]},
    )
