"""RopeConfig against config.json: both styles and every type, read and written."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

from mlx_resonance import RopeConfig, default_frequencies, yarn_frequencies

import numpy as np
import pytest

from .scalings import PARAMETERS, SIZES, YARN, both_styles, style4, style5

every_type = pytest.mark.parametrize(
    "rope_type", [prefix + name for prefix in ("", "resonance_") for name in PARAMETERS]
)


def parameters_of(rope_type):
    return PARAMETERS[rope_type.removeprefix("resonance_")]


# --- reading


@both_styles
@every_type
def test_from_hf_reads_both_styles(config, rope_type):
    parameters = parameters_of(rope_type)
    rope = RopeConfig.from_hf(config(rope_type=rope_type, **parameters))
    assert rope == RopeConfig(64, rope_type, 500000.0, 32768, parameters)
    assert rope.is_resonant == rope.frequencies().is_resonant == rope_type.startswith("resonance_")


@both_styles
def test_frequencies_are_those_of_the_maker(config):
    rope = RopeConfig.from_hf(config(rope_type="resonance_yarn", **YARN))
    plain = yarn_frequencies(64, 500000.0, 8.0, 4096)
    assert rope.unrounded_frequencies() == plain
    assert rope.frequencies() == plain.resonate()


@both_styles
def test_type_is_the_older_name_of_rope_type(config):
    assert RopeConfig.from_hf(config(type="linear", factor=4.0)) == RopeConfig.from_hf(
        config(rope_type="linear", factor=4.0)
    )


@both_styles
def test_both_names_of_the_type_are_allowed_if_they_agree(config):
    assert RopeConfig.from_hf(config(type="linear", rope_type="linear", factor=4.0)).rope_type == "linear"


@pytest.mark.parametrize(
    "rope_part",
    [
        {},
        {"rope_scaling": None},
        {"rope_parameters": None},
        {"rope_scaling": {}},
        {"rope_parameters": {"rope_type": "default"}},
    ],
)
def test_no_keys_mean_plain_rope_with_base_10000(rope_part):
    rope = RopeConfig.from_hf(SIZES | rope_part)
    assert rope == RopeConfig(64, "default", 10000.0, 32768)
    assert rope.frequencies() == default_frequencies(64, 10000.0)


def test_head_dim_takes_precedence_over_hidden_size():
    assert RopeConfig.from_hf(SIZES | {"head_dim": 32}).dims == 32
    assert RopeConfig.from_hf(SIZES | {"head_dim": None}).dims == 64
    assert RopeConfig.from_hf({"head_dim": 32}).dims == 32


@pytest.mark.parametrize("scaling", [{}, {"original_max_position_embeddings": 4096}], ids=["alone", "twice"])
def test_phi3_keeps_the_original_length_beside_the_dict(scaling):
    factors = {"short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
    config = style4(type="longrope", **factors, **scaling) | {"original_max_position_embeddings": 4096}
    rope = RopeConfig.from_hf(config)
    assert rope.parameters["original_max_position_embeddings"] == 4096
    # factor from the two lengths, 32768 / 4096
    assert rope.frequencies().attention_scale == pytest.approx(math.sqrt(1 + math.log(8) / math.log(4096)), rel=1e-15)


@pytest.mark.parametrize(
    "config",
    [SIZES | {"partial_rotary_factor": 0.5}, style5(rope_type="default", partial_rotary_factor=0.5)],
    ids=["4", "5"],
)
def test_partial_rotary_factor(config):
    rope = RopeConfig.from_hf(config)
    assert (rope.dims, rope.partial_rotary_factor) == (32, 0.5)


def test_rope_scaling_and_rope_parameters_are_both_allowed_if_they_agree():
    both = style4(rope_type="yarn", **YARN) | style5(rope_type="yarn", **YARN)
    assert RopeConfig.from_hf(both) == RopeConfig.from_hf(style4(rope_type="yarn", **YARN))


def test_null_counts_as_a_missing_key():
    with_nulls = style4(rope_type="yarn", **YARN, attention_factor=None, mscale=None)
    assert RopeConfig.from_hf(with_nulls) == RopeConfig.from_hf(style4(rope_type="yarn", **YARN))


def test_finetuned_changes_nothing():
    """The YaRN authors' checkpoints have this key."""
    assert RopeConfig.from_hf(style4(type="yarn", finetuned=True, **YARN)) == RopeConfig.from_hf(
        style4(type="yarn", **YARN)
    )


@pytest.mark.parametrize("rope_type, short, long", [("dynamic", 32768, 32769), ("longrope", 4096, 4097)])
@pytest.mark.parametrize("prefix", ["", "resonance_"])
def test_types_that_depend_on_the_length(rope_type, short, long, prefix):
    rope = RopeConfig.from_hf(style4(rope_type=prefix + rope_type, **PARAMETERS[rope_type]))
    assert rope.depends_on_length
    assert rope.frequencies(short) == rope.frequencies()
    # One more token changes a dynamic pair by less than rounding does: compare before rounding.
    assert rope.unrounded_frequencies(long) != rope.unrounded_frequencies()


@pytest.mark.parametrize("rope_type", ["default", "linear", "ntk", "yarn", "llama3"])
def test_types_that_do_not(rope_type):
    rope = RopeConfig.from_hf(style4(rope_type=rope_type, **PARAMETERS[rope_type]))
    assert not rope.depends_on_length
    assert rope.frequencies(10**6) == rope.frequencies()


@pytest.mark.parametrize(
    "config, trained, context",
    [
        (SIZES, 32768, 32768),
        ({"head_dim": 64}, None, None),
        (style4(rope_type="yarn", **YARN), 4096, 32768),
        (style4(rope_type="yarn", **YARN) | {"max_position_embeddings": 4096}, 4096, 32768),
        (style4(rope_type="dynamic", factor=2.0), 32768, 65536),
    ],
    ids=["plain", "unknown", "scaled length", "length before scaling", "dynamic"],
)
def test_lengths(config, trained, context):
    rope = RopeConfig.from_hf(config)
    assert (rope.trained_length, rope.context_length) == (trained, context)


# --- writing


@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("style", ["4", "5"])
@every_type
def test_round_trip(rope_type, style, part):
    rope = RopeConfig(64, rope_type, 500000.0, 32768, parameters_of(rope_type), part)
    written = json.loads(json.dumps({"head_dim": int(64 / part), **rope.to_hf(style)}))
    assert RopeConfig.from_hf(written) == rope


@every_type
def test_style_4_has_only_the_keys_of_transformers_4(rope_type):
    written = RopeConfig(64, rope_type, 500000.0, 32768, parameters_of(rope_type)).to_hf("4")
    scaling = None if rope_type == "default" else {"rope_type": rope_type, **parameters_of(rope_type)}
    beside = {"original_max_position_embeddings": 4096} if rope_type == "longrope" else {}
    assert written == {"max_position_embeddings": 32768, "rope_theta": 500000.0, "rope_scaling": scaling} | beside


@every_type
def test_style_5_has_a_resonance_type_under_rope_scaling_too(rope_type):
    """Stock mlx-lm reads only rope_scaling: without that key, it would run with plain angles."""
    written = RopeConfig(64, rope_type, 500000.0, 32768, parameters_of(rope_type)).to_hf("5")
    parameters = {"rope_type": rope_type, "rope_theta": 500000.0, **parameters_of(rope_type)}
    expected = {"max_position_embeddings": 32768, "rope_parameters": parameters}
    assert written == (expected | {"rope_scaling": parameters} if rope_type.startswith("resonance_") else expected)


@pytest.mark.parametrize("style", ["3", 4, None])
def test_unknown_style(style):
    with pytest.raises(ValueError, match="style"):
        RopeConfig(64).to_hf(style)


# --- the value object


def test_frozen():
    parameters = {"factor": 4.0}
    rope = RopeConfig(64, "linear", parameters=parameters)
    parameters["factor"] = 8.0
    np.testing.assert_array_equal(rope.frequencies().wavelengths, 4 * default_frequencies(64).wavelengths)
    with pytest.raises(FrozenInstanceError):
        rope.base = 1.0
    with pytest.raises(TypeError):
        rope.parameters["factor"] = 2.0


def test_from_hf_leaves_its_argument_alone():
    config = style5(rope_type="yarn", **YARN)
    before = json.dumps(config)
    RopeConfig.from_hf(config)
    assert json.dumps(config) == before
