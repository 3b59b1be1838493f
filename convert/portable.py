"""A resonance checkpoint that stock runtimes run right: its wavelengths written as LongRoPE's factors."""

from __future__ import annotations

import re
from collections.abc import Collection

from mlx_resonance.errors import UsageError
from mlx_resonance.frequencies import default_frequencies
from mlx_resonance.rope_config import RopeConfig

# What follows the rotation last: the projections, or the norms after them (Qwen 3).
PROJECTIONS = re.compile(r"\.self_attn\.[qk]_proj\.(weight|bias)$")
NORMS = re.compile(r"\.self_attn\.[qk]_norm\.weight$")


def portable_rope(rope: RopeConfig) -> tuple[RopeConfig, float]:
    """The same angles under the rope type `longrope`, which transformers and mlx-lm know.

    Both its lists hold, for pair i, the wavelength in use divided by 2π·base^(2i/dims): the length of a text does not
    matter. Both runtimes multiply queries and keys by LongRoPE's own attention scale. transformers would take another
    one from `attention_factor`, which mlx-lm does not read: it is left out.

    Args:
        rope: settings that do not change with the length.

    Returns:
        The settings, and what queries and keys must be multiplied by beyond LongRoPE's scale.

    Raises:
        UsageError: the angles change with the length, a head is rotated in part, which mlx-lm's LLaMA does not do, or
            config.json has no context length.
    """
    if rope.depends_on_length:
        raise UsageError(f"--portable: the angles of {rope.rope_type} change with the length of a text")
    if rope.partial_rotary_factor != 1:
        raise UsageError("--portable: mlx-lm does not read partial_rotary_factor")
    context = rope.context_length
    if context is None:
        raise UsageError("--portable: config.json has no context length (max_position_embeddings)")
    frequencies = rope.frequencies()
    factors = (frequencies.wavelengths / default_frequencies(rope.dims, rope.base).wavelengths).tolist()
    portable = RopeConfig(
        dims=rope.dims,
        rope_type="longrope",
        base=rope.base,
        max_position_embeddings=context,
        parameters={
            "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": rope.trained_length or context,
        },
        partial_rotary_factor=rope.partial_rotary_factor,
    )  # fmt: skip
    return portable, frequencies.attention_scale / portable.frequencies().attention_scale


def scaled_by(names: Collection[str]) -> set[str]:
    """Which tensors of a model decide the size of queries and keys: multiplying these is multiplying those."""
    last = NORMS if any(NORMS.search(name) for name in names) else PROJECTIONS
    return {name for name in names if last.search(name)}
