"""The rope settings of config.json from a GGUF file's metadata, and the angles that llama.cpp makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlx_resonance.errors import UsageError
from mlx_resonance.frequencies import default_frequencies, llama3_frequencies, yarn_attention_scale
from mlx_resonance.rope_config import RopeConfig
from mlx_resonance.rope_types import LONGEST, ORIGINAL

import numpy as np

if TYPE_CHECKING:
    from .gguf_config import Fields

TYPES = ("none", "linear", "yarn", "longrope")
YARN = {"yarn_ext_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_log_multiplier": 0.0}
# Llama 3.1, 3.2 and 3.3 differ only in the factor, 8 or 32. Converters write float32, computed in float32.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
OF_FLOAT32 = 5e-5


def rope_settings(fields: Fields, dims: int, factors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The rope part of config.json.

    Args:
        fields: of the architecture.
        dims: features of a head.
        factors: on the wavelengths, as `read_factors` returns them.

    Raises:
        UsageError: no rope type here has these angles.
    """
    base = fields.number("rope.freq_base", 10000.0)
    if base <= 1:
        raise fields.wrong("rope.freq_base", "above 1", base)
    length = fields.count("context_length")
    original = fields.count("rope.scaling.original_context_length", length)
    kind, factor = _scaling(fields)
    for name, values in factors.items():
        if len(values) != dims // 2 or not all(0 < value < math.inf for value in values):
            raise UsageError(f"{name}.weight must hold {dims // 2} positive numbers, one for each pair of features")
    scaling = None
    if kind == "yarn":
        scaling = _yarn(fields, factor, original)
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor} | ({ORIGINAL: original} if original != length else {})
    elif kind == "longrope":
        scaling = _longrope(fields, factors, original)
    if factors and kind != "longrope":
        if kind != "none" or set(factors) != {"rope_freqs"}:
            raise UsageError(f"{', '.join(factors)}: such factors beside the scaling {kind} are not supported")
        scaling = _of_factors(base, dims, list(factors["rope_freqs"]), original)
    return {"max_position_embeddings": length, "rope_theta": base, "rope_scaling": scaling}


def _scaling(fields: Fields) -> tuple[str, float]:
    """The scaling's name and factor; `none` where they change nothing."""
    kind = fields.get("rope.scaling.type")
    kind = "linear" if kind is None else kind  # llama.cpp's default
    if kind not in TYPES:
        raise UsageError(f"{fields.name('rope.scaling.type')} = {kind!r:.80}: expected one of {', '.join(TYPES)}")
    older = fields.get("rope.scale_linear")
    key = (
        "rope.scale_linear"
        if fields.get("rope.scaling.factor") is None and older is not None
        else "rope.scaling.factor"
    )
    factor = fields.number(key, None if kind == "yarn" else 1.0)
    if not 1 <= factor < LONGEST:
        raise fields.wrong(key, "at least 1 and below 2**31", factor)
    if older not in (None, factor):
        raise fields.wrong("rope.scale_linear", f"{factor}, as {fields.name(key)} is", older)
    if kind == "longrope" and factor != 1:
        raise fields.wrong(key, "1 beside the scaling longrope", factor)
    if kind != "yarn":
        neutral = {**YARN, "yarn_attn_factor": 1.0} | ({} if kind == "longrope" else {"attn_factor": 1.0})
        for name, value in neutral.items():
            found = fields.number(f"rope.scaling.{name}", value)
            if found != value and not (name == "yarn_ext_factor" and found <= 0):  # below 0: not set
                raise fields.wrong(f"rope.scaling.{name}", f"{value} beside the scaling {kind}", found)
    return ("none", 1.0) if kind == "linear" and factor == 1 else (kind, factor)


def _yarn(fields: Fields, factor: float, original: int) -> dict[str, Any]:
    """YaRN's settings. The attention scale is written where it is not the usual one."""
    part = {name: fields.number(f"rope.scaling.{name}", value) for name, value in YARN.items()}
    mixed = 1.0 if part["yarn_ext_factor"] < 0 else part["yarn_ext_factor"]  # below 0: not set
    usual = yarn_attention_scale(factor)
    scale = usual if mixed else 1.0
    multiplier = part["yarn_log_multiplier"]
    if multiplier < 0:
        raise fields.wrong("rope.scaling.yarn_log_multiplier", "0 or above", multiplier)
    if mixed and multiplier:
        scale /= yarn_attention_scale(factor, multiplier)
    key = "rope.scaling.yarn_attn_factor"
    stated = fields.number(key, scale)
    if not math.isclose(stated, scale, rel_tol=1e-6):
        # Converters write transformers' attention_factor here; llama.cpp computes the scale whatever it says.
        raise fields.wrong(key, f"{scale:.7g}, which llama.cpp computes", stated)
    scale *= fields.number("rope.scaling.attn_factor", 1.0)
    settings = {"rope_type": "yarn", "factor": factor, ORIGINAL: original}
    settings |= {"beta_fast": part["yarn_beta_fast"], "beta_slow": part["yarn_beta_slow"]}
    settings |= {"extrapolation_factor": mixed} if mixed != 1 else {}
    return settings | ({"attention_factor": scale} if scale != usual else {})


def _longrope(fields: Fields, factors: Mapping[str, Sequence[float]], original: int) -> dict[str, Any]:
    if set(factors) != {"rope_factors_long", "rope_factors_short"}:
        raise UsageError("the scaling longrope needs rope_factors_long.weight and rope_factors_short.weight, no others")
    return {
        "rope_type": "longrope", ORIGINAL: original, "short_factor": list(factors["rope_factors_short"]),
        "long_factor": list(factors["rope_factors_long"]),
        "attention_factor": fields.number("rope.scaling.attn_factor", 1.0),
    }  # fmt: skip


def _of_factors(base: float, dims: int, factors: list[float], original: int) -> dict[str, Any] | None:
    """What `rope_freqs` stands for: nothing, Llama 3's scaling, or else a longrope with the same factors everywhere."""
    largest = max(factors)
    if np.allclose(factors, 1, rtol=0, atol=1e-6):
        return None
    if largest > 1:
        scaled = llama3_frequencies(dims, base, largest, 1.0, 4.0, 8192).wavelengths
        if np.allclose(factors, scaled / default_frequencies(dims, base).wavelengths, rtol=OF_FLOAT32, atol=0):
            return {"rope_type": "llama3", "factor": largest, **LLAMA3}
    return {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
        ORIGINAL: original,
    }  # fmt: skip


def rope_problem(rope: RopeConfig, metadata: Mapping[str, Any], factors: Mapping[str, Sequence[float]]) -> str | None:
    """Compare settings with the angles that llama.cpp computes from the metadata. Returns what is wrong."""
    for tokens in (1, LONGEST):
        wavelengths, scale = llama_cpp_angles(rope.dims, metadata, factors, tokens)
        ours = rope.unrounded_frequencies(tokens if rope.depends_on_length else None)
        if len(wavelengths) != len(ours.wavelengths):
            return f"there are {len(ours.wavelengths)} wavelengths, {len(wavelengths)} in the GGUF file"
        near = OF_FLOAT32 if rope.base_type == "llama3" else 1e-6
        off = float(np.abs(ours.wavelengths / wavelengths - 1).max())
        if not (off <= near and math.isclose(scale, ours.attention_scale, rel_tol=1e-6)):
            return (
                f"the source's {rope.base_type} wavelengths are off those of the GGUF file's metadata by {off:.1e}, "
                f"the attention scale is {ours.attention_scale:.7g} instead of {scale:.7g}"
            )
    return None


def llama_cpp_angles(
    dims: int, metadata: Mapping[str, Any], factors: Mapping[str, Sequence[float]], tokens: int
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], float]:
    """Wavelengths and attention scale for a text, in float64, straight from the metadata.

    Source: ggml-org/llama.cpp, `rope_yarn` in ggml-cpu/ops.cpp, `llama_context` and `get_rope_factors`.
    """
    prefix = f"{metadata['general.architecture']}.rope."

    def value(key: str, default: Any) -> Any:
        return metadata.get(prefix + key, default)

    base, kind = value("freq_base", 10000.0), value("scaling.type", "linear")
    factor = 1.0 if kind == "none" else value("scaling.factor", value("scale_linear", 1.0)) or 1.0
    context = metadata[prefix.removesuffix("rope.") + "context_length"]
    original = value("scaling.original_context_length", context)
    long = "rope_factors_long" if tokens > original else "rope_factors_short"
    by_pair = factors.get("rope_freqs", factors.get(long, [1.0] * (dims // 2)))
    scale = value("scaling.attn_factor", 1.0)
    turns, ramp = [], value("scaling.yarn_ext_factor", -1.0) if kind == "yarn" else 0.0
    ramp = 1.0 if ramp < 0 else ramp

    def pair(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(pair(value("scaling.yarn_beta_fast", 32.0))))
    high = min(dims - 1, math.ceil(pair(value("scaling.yarn_beta_slow", 1.0))))
    for i, per_pair in enumerate(by_pair):
        plain = base ** (-2 * i / dims) / per_pair  # radians per token
        mix = ramp * (1 - min(1.0, max(0.0, (i - low) / max(0.001, high - low))))
        turns.append((plain / factor * (1 - mix) + plain * mix) / (2 * math.pi))
    if ramp:
        multiplier = value("scaling.yarn_log_multiplier", 0.0)
        scale *= (1 + 0.1 * math.log(factor)) / (1 + 0.1 * multiplier * math.log(factor))
    return 1 / np.array(turns), scale
