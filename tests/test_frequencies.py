"""Wavelengths and attention scales against the authors' numbers, transformers, and the papers' formulas."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

from mlx_resonance import (
    ResonanceRoPE,
    RotaryFrequencies,
    default_frequencies,
    dynamic_ntk_frequencies,
    linear_frequencies,
    llama3_frequencies,
    longrope_frequencies,
    ntk_frequencies,
    yarn_frequencies,
)

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from . import oracle
from .scalings import LLAMA3, YARN

GOLDEN = json.loads((Path(__file__).parent / "data" / "rotary.json").read_text(encoding="utf-8"))


def golden_name(golden):
    return "-".join(str(golden[key]) for key in ("kind", "dim", "base", "factor", "beta_fast") if key in golden)


@pytest.fixture(params=GOLDEN, ids=golden_name)
def golden(request):
    return request.param


def made_here(golden):
    if golden["kind"] == "resonance-rope":
        return default_frequencies(golden["dim"], golden["base"])
    keys = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    return yarn_frequencies(golden["dim"], golden["base"], **{key: golden[key] for key in keys})


# --- the authors' numbers


def test_wavelengths_equal_those_of_the_authors(golden):
    exact = made_here(golden).wavelengths
    ours, theirs = made_here(golden).resonate().wavelengths, np.array(golden["wavelengths"])
    # Theirs are float32: a wavelength this close to a half may round either way, and longer ones have no more digits.
    float32_step = exact * 2.0**-22
    may_differ = (np.abs(exact - np.floor(exact) - 0.5) <= float32_step) | (exact > 2**22)
    allowed = np.where(may_differ, np.maximum(1, float32_step), 0)
    assert np.all(np.abs(ours - theirs) <= allowed)


def test_attention_scale_equals_that_of_the_authors(golden):
    assert made_here(golden).attention_scale == pytest.approx(golden["attention_scale"], rel=1e-15)


def test_cos_and_sin_equal_those_of_the_authors(golden):
    frequencies = RotaryFrequencies(np.array(golden["wavelengths"]), golden["attention_scale"])
    rope = ResonanceRoPE(frequencies)
    # Theirs: angles up to 2π in float32, half a step of 2.4e-7 and a frequency off by 2⁻²⁴; 7 decimals. Ours: 2.5e-7.
    tolerance = 8e-7 * golden["attention_scale"]
    for position, cos, sin in zip(golden["positions"], golden["cos"], golden["sin"], strict=True):
        angles = rope.angles(1, position)
        np.testing.assert_allclose(np.array(angles.cos_sin()[0]).ravel(), cos, rtol=0, atol=tolerance)
        np.testing.assert_allclose(np.array(angles.cos_sin()[1]).ravel(), sin, rtol=0, atol=tolerance)


# --- transformers

LONGROPE = {
    "short_factor": [1 + i / 64 for i in range(32)],
    "long_factor": [1 + i / 2 for i in range(32)],
    "original_max_position_embeddings": 4096,
}
TRANSFORMERS_CASES = {
    "linear": ("linear", linear_frequencies, {"factor": 4.0}, None),
    "dynamic-short": ("dynamic", dynamic_ntk_frequencies, {"factor": 2.0}, None),
    "dynamic-within": ("dynamic", dynamic_ntk_frequencies, {"factor": 2.0}, 1000),
    "dynamic-beyond": ("dynamic", dynamic_ntk_frequencies, {"factor": 2.0}, 100000),
    "yarn": ("yarn", yarn_frequencies, YARN, None),
    "yarn-attention_factor": ("yarn", yarn_frequencies, YARN | {"attention_factor": 0.7}, None),
    "yarn-mscale": ("yarn", yarn_frequencies, YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, None),
    "yarn-mscale-alone": ("yarn", yarn_frequencies, YARN | {"mscale": 0.5}, None),
    "yarn-truncate-false": ("yarn", yarn_frequencies, YARN | {"truncate": False}, None),
    "yarn-betas": ("yarn", yarn_frequencies, YARN | {"beta_fast": 2, "beta_slow": 0.5}, None),
    "yarn-ramp-past-the-last-pair": (
        "yarn",
        yarn_frequencies,
        YARN | {"original_max_position_embeddings": 131072},
        None,
    ),
    "yarn-factor-1": ("yarn", yarn_frequencies, YARN | {"factor": 1.0}, None),
    "llama3": ("llama3", llama3_frequencies, LLAMA3, None),
    "longrope-short": ("longrope", longrope_frequencies, LONGROPE | {"factor": 8.0}, None),
    "longrope-at-original": ("longrope", longrope_frequencies, LONGROPE | {"factor": 8.0}, 4096),
    "longrope-long": ("longrope", longrope_frequencies, LONGROPE | {"factor": 8.0}, 4097),
    "longrope-factor-from-lengths": ("longrope", longrope_frequencies, LONGROPE, None),
    "longrope-attention_factor": ("longrope", longrope_frequencies, LONGROPE | {"attention_factor": 1.5}, None),
}
MAX_POSITIONS = 32768


def llama_config(base, **rope_parameters):
    return LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_theta": base, **rope_parameters},
    )


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("case", TRANSFORMERS_CASES)
def test_maker_equals_transformers(case, base):
    rope_type, maker, parameters, seq_len = TRANSFORMERS_CASES[case]
    config = llama_config(base, rope_type=rope_type, **parameters)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=seq_len)

    lengths = (
        {"seq_len": seq_len, "max_position_embeddings": MAX_POSITIONS} if rope_type in ("dynamic", "longrope") else {}
    )
    ours = maker(64, base, **parameters, **lengths)

    # Theirs are float32, with an error of ln(base)·2⁻²⁴ from the power.
    np.testing.assert_allclose(ours.inv_freq, inv_freq.double().numpy(), rtol=2e-6)
    assert ours.attention_scale == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_default_equals_transformers(base):
    inv_freq, attention_factor = LlamaRotaryEmbedding.compute_default_rope_parameters(
        llama_config(base, rope_type="default")
    )
    np.testing.assert_allclose(default_frequencies(64, base).inv_freq, inv_freq.double().numpy(), rtol=2e-6)
    assert default_frequencies(64, base).attention_scale == attention_factor


# --- the papers


def test_default_follows_the_paper():
    np.testing.assert_allclose(
        default_frequencies(128, 500000).wavelengths, oracle.rope_wavelengths(128, 500000), rtol=1e-14
    )


@pytest.mark.parametrize("factor, beta_fast", [(1, 32), (4, 2), (8, 32), (32, 32)])
def test_yarn_follows_the_paper(factor, beta_fast):
    ours = yarn_frequencies(128, 10000, factor, 4096, beta_fast=beta_fast)
    expected = oracle.yarn_wavelengths(128, 10000, factor, 4096, beta_fast=beta_fast)
    np.testing.assert_allclose(ours.wavelengths, expected, rtol=1e-13)
    assert ours.attention_scale == pytest.approx(oracle.yarn_attention_scale(factor), rel=1e-15)


def test_yarn_without_extrapolation_is_linear():
    yarn, linear = yarn_frequencies(64, 10000, 8, 4096, extrapolation_factor=0), linear_frequencies(64, 10000, 8)
    np.testing.assert_allclose(yarn.wavelengths, linear.wavelengths, rtol=1e-14)


def test_ntk_keeps_the_fastest_pair_and_scales_the_slowest_by_the_factor():
    ratio = ntk_frequencies(64, 10000, 8).wavelengths / default_frequencies(64, 10000).wavelengths
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(8, rel=1e-13)
    assert np.all(np.diff(ratio) > 0)


def test_dynamic_is_ntk_with_the_growth_as_factor():
    dynamic = dynamic_ntk_frequencies(64, 10000, factor=1, max_position_embeddings=1000, seq_len=3000)
    np.testing.assert_allclose(dynamic.wavelengths, ntk_frequencies(64, 10000, 3).wavelengths, rtol=1e-14)


# --- rounding


def test_resonate_rounds_to_the_nearest_integer_and_keeps_the_scale():
    frequencies = RotaryFrequencies(np.array([6.283, 7.5, 8.5, 9.51, np.inf]), 1.25)
    assert frequencies.resonate() == RotaryFrequencies(np.array([6.0, 8.0, 8.0, 10.0, np.inf]), 1.25)


def test_resonate_follows_the_paper():
    frequencies = yarn_frequencies(128, 10000, 8, 4096)
    np.testing.assert_array_equal(frequencies.resonate().wavelengths, oracle.resonate(frequencies.wavelengths))


def test_is_resonant():
    frequencies = default_frequencies(64)
    assert not frequencies.is_resonant
    assert frequencies.resonate().is_resonant
    assert not RotaryFrequencies(np.array([6.0, 7.0, 8.25])).is_resonant
    assert frequencies.resonate().resonate() == frequencies.resonate()


def test_angle_shift_is_the_relative_change_by_rounding():
    shift = RotaryFrequencies(np.array([4.4, 10.0, np.inf])).angle_shift()
    np.testing.assert_allclose(shift, [0.4 / 4.4, 0, 0], rtol=1e-14, atol=0)


def test_critical_pairs_counts_the_pairs_that_turn_within_the_length():
    assert RotaryFrequencies(np.array([6.0, 64.0, 64.5, 1000.0])).critical_pairs(64) == 2


# --- the value object


def test_frozen_and_read_only():
    given = np.array([6.0, 7.0])
    frequencies = RotaryFrequencies(given)
    given[0] = 99
    assert frequencies.wavelengths[0] == 6
    with pytest.raises(ValueError, match="read-only"):
        frequencies.wavelengths[0] = 1
    with pytest.raises(FrozenInstanceError):
        frequencies.attention_scale = 2.0


def test_properties():
    frequencies = RotaryFrequencies([4, 8, np.inf])
    assert frequencies.wavelengths.dtype == np.float64
    assert frequencies.dims == 6
    np.testing.assert_allclose(frequencies.inv_freq, [np.pi / 2, np.pi / 4, 0], rtol=1e-15)


def test_equality_compares_wavelengths_and_scale():
    one = default_frequencies(8)
    assert one == default_frequencies(8)
    assert one != default_frequencies(8, 500000)
    assert one != RotaryFrequencies(one.wavelengths, 2.0)
    assert one != "default"
