"""A resonance checkpoint for stock runtimes: its wavelengths written as LongRoPE's factors."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from mlx_resonance.errors import UsageError
from mlx_resonance.frequencies import default_frequencies
from mlx_resonance.rope_config import RopeConfig

# The last weights before the rotation: the projections, or the norms after them (Qwen 3).
PROJECTIONS = re.compile(r"\.self_attn\.[qk]_proj\.(weight|bias)$")
NORMS = re.compile(r"\.self_attn\.[qk]_norm\.weight$")
LAYER = re.compile(r"\.layers\.(\d+)\.")


def portable_rope(rope: RopeConfig) -> tuple[RopeConfig, float]:
    """The same angles under the rope type `longrope`, which transformers and mlx-lm know.

    Both its lists hold, for pair i, the wavelength in use divided by 2π·base^(2i/dims), so that the length of a text
    does not matter. Both runtimes multiply queries and keys by LongRoPE's own attention scale; `attention_factor`, from
    which transformers would take another one, is left out, since mlx-lm does not read it. `factor` is the ratio of the
    two lengths, from which mlx-lm and transformers 4 compute it: transformers 4 warns where it is missing.

    Args:
        rope: settings that do not change with the length.

    Returns:
        The settings, and what queries and keys must be multiplied by besides LongRoPE's scale.

    Raises:
        UsageError: the angles change with the length, only a part of a head is rotated, which mlx-lm's LLaMA does not
            do, or config.json has no context length.
    """
    if rope.depends_on_length:
        raise UsageError(f"the angles of {rope.rope_type} change with the length of a text", option="portable")
    if rope.partial_rotary_factor != 1:
        raise UsageError("mlx-lm does not read partial_rotary_factor of config.json", option="portable")
    context = replace(rope, window=None).context_length  # a window is a key of its own, which the runtimes know
    if context is None:
        raise UsageError("config.json has no context length (max_position_embeddings)", option="portable")
    original = rope.trained_length or context
    frequencies = rope.frequencies()
    factors = (frequencies.wavelengths / default_frequencies(rope.dims, rope.base).wavelengths).tolist()
    portable = RopeConfig(
        dims=rope.dims,
        rope_type="longrope",
        base=rope.base,
        max_position_embeddings=context,
        parameters={
            "short_factor": factors, "long_factor": factors,
            "factor": context / original, "original_max_position_embeddings": original,
        },
        partial_rotary_factor=rope.partial_rotary_factor,
    )  # fmt: skip
    return portable, frequencies.attention_scale / portable.frequencies().attention_scale


def scaled_by(names: Collection[str], args: Any) -> set[str]:
    """The tensors that queries and keys of the layers that rotate are proportional to.

    Args:
        names: of all tensors.
        args: of the model. SmolLM 3's name layers without rotation, where LongRoPE has no attention scale either.
    """
    last = NORMS if any(NORMS.search(name) for name in names) else PROJECTIONS
    rotates = getattr(args, "no_rope_layers", None)  # 0 for those that do not, in spite of its name
    found = {name: int(layer[1]) for name in names if last.search(name) and (layer := LAYER.search(name))}
    return {name for name, layer in found.items() if rotates is None or rotates[layer]}
