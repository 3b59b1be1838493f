"""What a GGUF file says of rotation, against float64 formulas and transformers' models with an equivalent config."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig
from mlx_resonance.convert import convert
from mlx_resonance.errors import UsageError

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from .gguf_files import TOKENS, fields, model_file, random_model, tensors, write

DIMS, CONTEXT = 64, 512
LONG = np.random.default_rng(0).integers(0, TOKENS, (1, 300))


def converted(path: Path, out: Path, **options: Any) -> RopeConfig:
    """The rope settings of a conversion without rounding, verified, so that llama.cpp's formula has seen them."""
    done = convert(path, out, tokenizer=False, resonance=False, dtype="float32", verify=True, **options)
    assert done.checks is not None and done.checks["problems"] == [] and isinstance(done.checks["logits"], dict)
    return done.rope


def with_factors(path: Path, factors: dict[str, Any], **changes: Any) -> Path:
    """A random LLaMA with tensors of factors."""
    model = random_model("llama")
    lists = {f"{name}.weight": (np.array(values, np.float32), Kind.F32) for name, values in factors.items()}
    return write(path, "llama", fields("llama", model, **changes), lists | tensors("llama", model, Kind.F32))


def plain(base: float = 10000.0) -> Any:
    """Wavelengths without scaling."""
    return 2 * np.pi * base ** (np.arange(0, DIMS, 2) / DIMS)


def yarn(factor: float, original: int, fast: float = 32, slow: float = 1, mix: float = 1) -> Any:
    """Wavelengths by arXiv 2309.00071, definition 2, with the ramp over pair indices of its authors' code."""
    low, high = (DIMS * math.log(original / (2 * math.pi * turns)) / (2 * math.log(1e4)) for turns in (fast, slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), DIMS - 1)
    kept = mix * (1 - np.clip((np.arange(DIMS // 2) - low) / (high - low), 0, 1))
    return 1 / ((1 - kept) / (plain() * factor) + kept / plain())


def scaling(factor: float | None = None, **more: Any) -> dict[str, Any]:
    changes = {} if factor is None else {"rope__scaling__factor": factor}
    return changes | {f"rope__scaling__{key}": value for key, value in more.items()}


CASES: dict[str, tuple[dict[str, Any], str, Any, float]] = {
    "nothing": ({}, "default", plain(), 1.0),
    "another base": ({"rope__freq_base": 500000.0}, "default", plain(500000.0), 1.0),
    "none": (scaling(4.0, type="none"), "default", plain(), 1.0),
    "linear": (scaling(4.0, type="linear"), "linear", 4 * plain(), 1.0),
    "linear is the default": (scaling(2.5), "linear", 2.5 * plain(), 1.0),
    "linear by 1": (scaling(1.0, type="linear"), "default", plain(), 1.0),
    "the older key": ({"rope__scale_linear": 8.0}, "linear", 8 * plain(), 1.0),
    "both keys": (scaling(8.0) | {"rope__scale_linear": 8.0}, "linear", 8 * plain(), 1.0),
    "linear, original context": (scaling(4.0, original_context_length=128), "linear", 4 * plain(), 1.0),
    "yarn": (
        scaling(4.0, type="yarn", original_context_length=128, finetuned=True), "yarn", yarn(4, 128),
        0.1 * math.log(4) + 1,
    ),
    "yarn, no original context": (scaling(8.0, type="yarn"), "yarn", yarn(8, 512), 0.1 * math.log(8) + 1),
    "yarn, betas": (
        scaling(4.0, type="yarn", original_context_length=256, yarn_beta_fast=16.0, yarn_beta_slow=2.0), "yarn",
        yarn(4, 256, 16, 2), 0.1 * math.log(4) + 1,
    ),
    "yarn, its usual scale": (
        scaling(4.0, type="yarn", yarn_attn_factor=0.1 * math.log(4) + 1), "yarn", yarn(4, 512), 0.1 * math.log(4) + 1,
    ),
    "yarn, another scale": (
        scaling(4.0, type="yarn", attn_factor=0.5), "yarn", yarn(4, 512), 0.5 * (0.1 * math.log(4) + 1),
    ),
    "yarn, log multiplier": (
        scaling(4.0, type="yarn", yarn_log_multiplier=0.5), "yarn", yarn(4, 512),
        (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
    ),
    "yarn, not set": (scaling(4.0, type="yarn", yarn_ext_factor=-1.0), "yarn", yarn(4, 512), 0.1 * math.log(4) + 1),
    "yarn, half of it": (
        scaling(4.0, type="yarn", yarn_ext_factor=0.5), "yarn", yarn(4, 512, mix=0.5), 0.1 * math.log(4) + 1,
    ),
    "yarn, only interpolation": (scaling(4.0, type="yarn", yarn_ext_factor=0.0), "yarn", 4 * plain(), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_scalings(tmp_path: Path, case: str) -> None:
    changes, rope_type, wavelengths, scale = CASES[case]
    rope = converted(model_file(tmp_path / "m.gguf", **changes), tmp_path / "out")
    found = rope.frequencies()
    assert rope.rope_type == rope_type and rope.max_position_embeddings == CONTEXT
    assert np.allclose(found.wavelengths, wavelengths, rtol=1e-12, atol=0)
    assert math.isclose(found.attention_scale, scale, rel_tol=1e-6)  # of float32 metadata
    assert rope.trained_length == changes.get(
        "rope__scaling__original_context_length", None if rope_type == "linear" else CONTEXT
    )


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        (scaling(4.0, type="linear"), {"rope_type": "linear", "factor": 4.0}),
        (
            scaling(4.0, type="yarn", original_context_length=128),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        ({"rope__freq_base": 500000.0}, {"rope_type": "default", "rope_theta": 500000.0}),
    ],
    ids=["linear", "yarn", "base"],
)
def test_logits_of_transformers_with_an_equivalent_config(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    import torch

    model = random_model("llama", rope_parameters={"rope_theta": 10000.0} | settings)
    path = write(tmp_path / "m.gguf", "llama", fields("llama", model, **changes), tensors("llama", model, Kind.F32))
    converted(path, tmp_path / "out")
    ours = np.array(Checkpoint.open(tmp_path / "out").load()(mx.array(LONG)))
    with torch.no_grad():
        theirs = model(torch.from_numpy(LONG)).logits.numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def llama3_factors(factor: float, base: float) -> Any:
    """As llama.cpp's converter computes them, in float32 with torch."""
    import torch

    frequencies = 1.0 / (base ** (torch.arange(0, DIMS, 2, dtype=torch.float32) / DIMS))
    factors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return factors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_llama_3(tmp_path: Path, factor: float) -> None:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    path = with_factors(
        tmp_path / "m.gguf", {"rope_freqs": llama3_factors(factor, 500000.0)}, context_length=131072,
        rope__freq_base=500000.0,
    )  # fmt: skip
    rope = converted(path, tmp_path / "out")
    assert rope.rope_type == "llama3" and dict(rope.parameters) == {
        "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    settings = {"rope_theta": 500000.0, "rope_type": "llama3", **rope.parameters}
    model = random_model("llama", max_position_embeddings=131072, rope_parameters=settings)
    inv_freq, scale = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    assert scale == 1.0 and np.allclose(rope.frequencies().inv_freq, inv_freq.numpy(), rtol=1e-6, atol=0)
    fates = json.loads((tmp_path / "out" / "conversion.json").read_text())["checks"]["source_tensors"]
    assert fates["rope_freqs.weight"] == "left out: its factors are in config.json"


def test_other_factors_are_kept_as_they_are(tmp_path: Path) -> None:
    factors = np.linspace(1, 3, DIMS // 2, dtype=np.float32)
    rope = converted(with_factors(tmp_path / "m.gguf", {"rope_freqs": factors}), tmp_path / "out")
    for tokens in (1, 2**20):
        found = rope.frequencies(tokens)
        assert rope.rope_type == "longrope" and found.attention_scale == 1.0
        assert np.allclose(found.wavelengths, plain() * factors.astype(np.float64), rtol=1e-12, atol=0)


def test_factors_of_1_change_nothing(tmp_path: Path) -> None:
    rope = converted(with_factors(tmp_path / "m.gguf", {"rope_freqs": [1.0] * 32}), tmp_path / "out")
    assert rope.rope_type == "default"


def test_factors_for_short_and_for_long_texts(tmp_path: Path) -> None:
    short, long = np.linspace(1, 2, 32, dtype=np.float32), np.linspace(2, 40, 32, dtype=np.float32)
    path = with_factors(
        tmp_path / "m.gguf", {"rope_factors_short": short, "rope_factors_long": long},
        **scaling(type="longrope", original_context_length=128, attn_factor=1.19),
    )  # fmt: skip
    rope = converted(path, tmp_path / "out")
    for tokens, factors in ((128, short), (129, long)):
        found = rope.frequencies(tokens)
        assert np.allclose(found.wavelengths, plain() * factors.astype(np.float64), rtol=1e-12, atol=0)
        assert math.isclose(found.attention_scale, 1.19, rel_tol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an unknown type": (scaling(4.0, type="dynamic"), {}, "scaling.type = 'dynamic': expected one of none, linear"),
    "a type that is a number": (scaling(4.0, type=3), {}, "scaling.type = 3"),
    "yarn without a factor": (scaling(type="yarn"), {}, "llama.rope.scaling.factor is missing"),
    "a factor of 0": (scaling(0.0), {}, "scaling.factor must be at least 1"),
    "a factor below 1": (scaling(0.25), {}, "scaling.factor must be at least 1 and below 2**31, got 0.25"),
    "a factor of NaN": (scaling(math.nan), {}, "scaling.factor must be a finite number, got nan"),
    "two factors": (scaling(4.0) | {"rope__scale_linear": 8.0}, {}, "scale_linear must be 4.0, as"),
    "a base of NaN": ({"rope__freq_base": math.nan}, {}, "rope.freq_base must be a finite number, got nan"),
    "a base of infinity": ({"rope__freq_base": math.inf}, {}, "rope.freq_base must be a finite number, got inf"),
    "a base of 0": ({"rope__freq_base": 0.0}, {}, "rope.freq_base must be above 1, got 0.0"),
    "a negative base": ({"rope__freq_base": -1e4}, {}, "rope.freq_base must be above 1, got -10000.0"),
    "a base in words": ({"rope__freq_base": "big"}, {}, "rope.freq_base must be a finite number, got 'big'"),
    "half a head": ({"rope__dimension_count": 32}, {}, "rope.dimension_count = 32: expected 64"),
    "sections": ({"rope__dimension_sections": [16, 24, 24, 0]}, {}, "rope.dimension_sections = [16, 24, 24, 0]"),
    "a scale that is not llama.cpp's": (
        scaling(4.0, type="yarn", yarn_attn_factor=1.0), {}, "yarn_attn_factor must be 1.138629",
    ),
    "yarn's keys without yarn": (scaling(4.0, yarn_beta_fast=16.0), {}, "yarn_beta_fast must be 32.0 beside"),
    "a scale without yarn": (scaling(4.0, attn_factor=1.5), {}, "attn_factor must be 1.0 beside the scaling linear"),
    "a negative multiplier": (scaling(4.0, type="yarn", yarn_log_multiplier=-1.0), {}, "yarn_log_multiplier must be"),
    "an original context of words": (scaling(4.0, original_context_length="long"), {}, "got 'long'"),
    "an original context that is longer": (scaling(4.0, original_context_length=1024), {}, "= 1024 is longer than"),
    "factors beside a scaling": (scaling(4.0), {"rope_freqs": [2.0] * 32}, "rope_freqs: such factors beside"),
    "too few factors": ({}, {"rope_freqs": [2.0] * 16}, "rope_freqs.weight must hold 32 positive numbers"),
    "a factor of 0 for a pair": ({}, {"rope_freqs": [0.0] * 32}, "rope_freqs.weight must hold 32 positive numbers"),
    "a NaN among them": ({}, {"rope_freqs": [math.nan] * 32}, "rope_freqs.weight must hold 32 positive numbers"),
    "a longrope without factors": (scaling(type="longrope"), {}, "needs rope_factors_long.weight and"),
    "a longrope with one list": (scaling(type="longrope"), {"rope_factors_long": [2.0] * 32}, "needs rope_factors"),
    "lists without longrope": ({}, {"rope_factors_long": [2.0] * 32}, "rope_factors_long: such factors"),
    "a longrope with a factor": (scaling(4.0, type="longrope"), {}, "scaling.factor must be 1 beside"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(run: Any, tmp_path: Path, case: str) -> None:
    changes, factors, named = REFUSED[case]
    path = with_factors(tmp_path / "m.gguf", factors, **changes)
    code, out, err = run("convert", path, "--mlx-path", tmp_path / "out", "--no-tokenizer")
    assert (code, out, err.count("\n")) == (2, "", 1) and named in err, err
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_a_new_scaling_replaces_none_but_yarn(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.gguf")
    done = convert(path, tmp_path / "out", rope="yarn", factor=8, tokenizer=False, verify=True)
    assert (done.rope.rope_type, done.rope.context_length) == ("resonance_yarn", 8 * CONTEXT)
    path = with_factors(tmp_path / "m.gguf", {"rope_freqs": np.linspace(1, 3, 32)})
    with pytest.raises(UsageError, match="trained with rope type longrope"):
        convert(path, tmp_path / "other", rope="yarn", factor=8, tokenizer=False)
