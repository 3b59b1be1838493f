"""Wavelengths and attention scales: against the authors' figures, transformers, and the paper's formulas."""

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

from mlx_resonance import (
    ResonanceRoPE,
    RotaryFrequencies,
    default_frequencies,
    dynamic_ntk_frequencies,
    feature_gap,
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


# --- the authors' figures


def test_wavelengths_equal_those_of_the_authors(golden):
    exact = made_here(golden).wavelengths
    ours, theirs = made_here(golden).resonate().wavelengths, np.array(golden["wavelengths"])
    # Theirs are float32: a wavelength that near to a half may round to the other side, a longer one has no more digits.
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

YARN = {"factor": 8.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
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


def test_resonate_rounds_to_the_nearest_whole_number_and_keeps_the_scale():
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


# --- feature gap


def brute_force_gap(wavelengths, train_length, test_length):
    """The definition, position by position: distance of points on the unit circle."""

    def point(m, wavelength):
        angle = 2 * math.pi * oracle.turns(m, wavelength)
        return complex(math.cos(angle), math.sin(angle))

    return [
        max(min(abs(point(m, λ) - point(n, λ)) for n in range(train_length)) for m in range(train_length, test_length))
        for λ in wavelengths
    ]


@pytest.mark.parametrize("resonant", [False, True])
@pytest.mark.parametrize("train_length, test_length", [(1, 2), (13, 40), (64, 80)])
def test_feature_gap_is_its_definition(train_length, test_length, resonant):
    frequencies = yarn_frequencies(16, 100, 4, 32, beta_fast=4)
    frequencies = frequencies.resonate() if resonant else frequencies
    expected = brute_force_gap(frequencies.wavelengths.tolist(), train_length, test_length)
    np.testing.assert_allclose(feature_gap(frequencies, train_length, test_length), expected, rtol=0, atol=1e-13)


def test_feature_gap_to_other_angles_of_training():
    """Against every pair of positions, by complex numbers."""
    trained, tested = default_frequencies(16, 100), yarn_frequencies(16, 100, 4, 32, beta_fast=4).resonate()
    seen = np.exp(2j * np.pi * np.arange(30)[:, None] / trained.wavelengths)
    new = np.exp(2j * np.pi * np.arange(30, 100)[:, None] / tested.wavelengths)
    expected = np.abs(new[:, None] - seen).min(axis=1).max(axis=0)
    np.testing.assert_allclose(feature_gap(tested, 30, 100, trained), expected, rtol=0, atol=1e-13)
    assert np.any(feature_gap(tested, 30, 100) < expected - 0.01)
    with pytest.raises(ValueError, match="trained has 4 pairs, expected 8"):
        feature_gap(tested, 30, 100, default_frequencies(8))


def test_rounding_closes_the_gap_of_every_pre_critical_pair():
    plain = yarn_frequencies(64, 10000, 4, 512)
    resonant = plain.resonate()
    seen = resonant.wavelengths <= 512
    assert 0 < seen.sum() < len(seen)
    np.testing.assert_array_equal(feature_gap(resonant, 512, 2048)[seen], 0)
    assert np.all(feature_gap(plain, 512, 2048)[seen] > 1e-5)
    assert np.all(feature_gap(resonant, 512, 2048)[~seen] > 0)


def test_feature_gap_of_one_length_is_zero():
    np.testing.assert_array_equal(feature_gap(default_frequencies(8), 7, 7), np.zeros(4))


def test_feature_gap_of_a_pair_that_never_turns_is_zero():
    assert feature_gap(RotaryFrequencies(np.array([np.inf])), 4, 100) == [0]


@pytest.mark.parametrize("train_length, test_length", [(0, 10), (-1, 10), (10, 9)])
def test_feature_gap_refuses_lengths_out_of_order(train_length, test_length):
    with pytest.raises(ValueError, match="train_length"):
        feature_gap(default_frequencies(8), train_length, test_length)


# --- what is refused

NAN, INF = math.nan, math.inf
REFUSED = [
    ("dims", default_frequencies, {"dims": 7}),
    ("dims", default_frequencies, {"dims": 0}),
    ("dims", default_frequencies, {"dims": -2}),
    ("dims", ntk_frequencies, {"dims": 2, "base": 1e4, "factor": 2}),
    ("dims", dynamic_ntk_frequencies, {"dims": 2, "base": 1e4, "factor": 2, "max_position_embeddings": 64}),
    *(("rope_theta", default_frequencies, {"dims": 8, "base": base}) for base in (1, 0, -10.0, NAN, INF)),
    *(("factor", linear_frequencies, {"dims": 8, "base": 1e4, "factor": factor}) for factor in (0.5, 0, -2, NAN, INF)),
    ("factor", ntk_frequencies, {"dims": 8, "base": 1e4, "factor": 0.9}),
    ("factor", dynamic_ntk_frequencies, {"dims": 8, "base": 1e4, "factor": 0.9, "max_position_embeddings": 64}),
    (
        "max_position_embeddings",
        dynamic_ntk_frequencies,
        {"dims": 8, "base": 1e4, "factor": 2, "max_position_embeddings": 1},
    ),
    *(
        (key, yarn_frequencies, {"dims": 64, "base": 1e4} | YARN | change)
        for key, change in [
            ("factor", {"factor": 0.5}),
            ("original_max_position_embeddings", {"original_max_position_embeddings": 0}),
            ("beta_fast", {"beta_fast": 0.5}),
            ("beta_slow", {"beta_slow": 0}),
            ("beta_fast", {"beta_fast": NAN}),
            ("extrapolation_factor", {"extrapolation_factor": 1.5}),
            ("extrapolation_factor", {"extrapolation_factor": NAN}),
            ("attention_factor", {"attention_factor": 0}),
            ("attention_factor", {"attention_factor": -1.0}),
            ("attention_factor", {"attention_factor": NAN}),
            ("dims", {"dims": 63}),
            ("rope_theta", {"base": 1}),
        ]
    ),
    *(
        (key, llama3_frequencies, {"dims": 64, "base": 1e4} | LLAMA3 | change)
        for key, change in [
            ("factor", {"factor": 0.5}),
            ("high_freq_factor", {"high_freq_factor": 1.0}),
            ("low_freq_factor", {"low_freq_factor": 0}),
            ("low_freq_factor", {"low_freq_factor": NAN}),
            ("original_max_position_embeddings", {"original_max_position_embeddings": 1}),
        ]
    ),
    *(
        (key, longrope_frequencies, {"dims": 64, "base": 1e4} | LONGROPE | change)
        for key, change in [
            ("short_factor", {"short_factor": [1.0] * 31}),
            ("long_factor", {"long_factor": [1.0] * 33}),
            ("short_factor", {"short_factor": [1.0] * 31 + [0.0]}),
            ("long_factor", {"long_factor": [1.0] * 31 + [NAN]}),
            ("attention_factor", {"attention_factor": 0.0}),
            ("original_max_position_embeddings", {"original_max_position_embeddings": 1}),
        ]
    ),
    ("wavelengths", RotaryFrequencies, {"wavelengths": np.array([6.0, 0.0])}),
    ("wavelengths", RotaryFrequencies, {"wavelengths": np.array([6.0, NAN])}),
    ("wavelengths", RotaryFrequencies, {"wavelengths": np.array([])}),
    ("wavelengths", RotaryFrequencies, {"wavelengths": np.ones((2, 2))}),
    ("attention_scale", RotaryFrequencies, {"wavelengths": np.array([6.0]), "attention_scale": INF}),
    ("wavelength", RotaryFrequencies(np.array([0.3])).resonate, {}),
]


@pytest.mark.parametrize("key, maker, arguments", REFUSED)
def test_refused_with_the_key_in_the_message(key, maker, arguments):
    with pytest.raises(ValueError, match=rf"^\[\w+\] .*\b{key}\b"):
        maker(**arguments)


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
