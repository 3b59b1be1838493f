"""RopeConfig against config.json: both styles, every type, and every way in which a file can be wrong."""

import json
import math
from dataclasses import FrozenInstanceError

from mlx_resonance import RopeConfig, default_frequencies, yarn_frequencies

import numpy as np
import pytest

YARN = {"factor": 8.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONGROPE = {
    "short_factor": [1.0] * 32,
    "long_factor": [4.0] * 32,
    "original_max_position_embeddings": 4096,
    "factor": 8.0,
}
PARAMETERS = {
    "default": {},
    "linear": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": YARN | {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.1, "truncate": False},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
}
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 32768}


def style4(**scaling):
    return SIZES | {"rope_theta": 500000.0, "rope_scaling": scaling}


def style5(**parameters):
    return SIZES | {"rope_parameters": {"rope_theta": 500000.0} | parameters}


both_styles = pytest.mark.parametrize("config", [style4, style5], ids=["4", "5"])
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
def test_both_names_of_the_type_may_stand_where_they_agree(config):
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
def test_nothing_said_is_plain_rope_with_base_10000(rope_part):
    rope = RopeConfig.from_hf(SIZES | rope_part)
    assert rope == RopeConfig(64, "default", 10000.0, 32768)
    assert rope.frequencies() == default_frequencies(64, 10000.0)


def test_head_dim_goes_before_hidden_size():
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


def test_rope_scaling_and_rope_parameters_may_both_stand_where_they_agree():
    both = style4(rope_type="yarn", **YARN) | style5(rope_type="yarn", **YARN)
    assert RopeConfig.from_hf(both) == RopeConfig.from_hf(style4(rope_type="yarn", **YARN))


def test_null_is_a_key_that_is_not_there():
    with_nulls = style4(rope_type="yarn", **YARN, attention_factor=None, mscale=None)
    assert RopeConfig.from_hf(with_nulls) == RopeConfig.from_hf(style4(rope_type="yarn", **YARN))


def test_finetuned_changes_nothing():
    """The YaRN authors' checkpoints have it."""
    assert RopeConfig.from_hf(style4(type="yarn", finetuned=True, **YARN)) == RopeConfig.from_hf(
        style4(type="yarn", **YARN)
    )


@pytest.mark.parametrize("rope_type, short, long", [("dynamic", 32768, 32769), ("longrope", 4096, 4097)])
@pytest.mark.parametrize("prefix", ["", "resonance_"])
def test_types_that_depend_on_the_length(rope_type, short, long, prefix):
    rope = RopeConfig.from_hf(style4(rope_type=prefix + rope_type, **PARAMETERS[rope_type]))
    assert rope.depends_on_length
    assert rope.frequencies(short) == rope.frequencies()
    # A single token more changes a dynamic pair by less than rounding does: compare before rounding.
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
    assert written == {"max_position_embeddings": 32768, "rope_theta": 500000.0, "rope_scaling": scaling}


@every_type
def test_style_5_has_a_resonance_type_under_rope_scaling_too(rope_type):
    """Stock mlx-lm reads nothing but rope_scaling: without it, it would run with plain angles."""
    written = RopeConfig(64, rope_type, 500000.0, 32768, parameters_of(rope_type)).to_hf("5")
    parameters = {"rope_type": rope_type, "rope_theta": 500000.0, **parameters_of(rope_type)}
    expected = {"max_position_embeddings": 32768, "rope_parameters": parameters}
    assert written == (expected | {"rope_scaling": parameters} if rope_type.startswith("resonance_") else expected)


@pytest.mark.parametrize("style", ["3", 4, None])
def test_unknown_style(style):
    with pytest.raises(ValueError, match="style"):
        RopeConfig(64).to_hf(style)


# --- what is refused

NAN = math.nan
LAYERED = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}


def without(parameters, key):
    return {name: value for name, value in parameters.items() if name != key}


BAD_SCALINGS = {
    # what the message must name: the dict that is wrong
    "unknown type": ("su", {"rope_type": "su", "factor": 4.0}),
    "unknown resonance type": ("resonance_su", {"rope_type": "resonance_su", "factor": 4.0}),
    "prefix alone": ("rope_type", {"rope_type": "resonance_"}),
    "type is a number": ("rope_type", {"rope_type": 4}),
    "type is a list": ("rope_type", {"rope_type": ["yarn"]}),
    "types contradict": ("rope_type", {"rope_type": "linear", "type": "yarn", "factor": 4.0}),
    "default with factor": ("factor", {"rope_type": "default", "factor": 4.0}),
    "no type but a factor": ("factor", {"factor": 4.0}),
    "unknown key": ("beta_quick", {"rope_type": "yarn", **YARN, "beta_quick": 32}),
    "key of another type": ("low_freq_factor", {"rope_type": "yarn", **YARN, "low_freq_factor": 1.0}),
    "dims given": ("dims", {"rope_type": "linear", "factor": 4.0, "dims": 64}),
    "seq_len given": ("seq_len", {"rope_type": "dynamic", "factor": 4.0, "seq_len": 64}),
    **{f"{name} without factor": ("factor", {"rope_type": name} | without(PARAMETERS[name], "factor"))
       for name in ("linear", "ntk", "dynamic", "yarn", "llama3")},
    **{f"{name} without original": (
        "original_max_position_embeddings",
        {"rope_type": name} | without(PARAMETERS[name], "original_max_position_embeddings"))
       for name in ("yarn", "llama3", "longrope")},
    **{f"longrope without {key}": (key, {"rope_type": "longrope"} | without(LONGROPE, key))
       for key in ("short_factor", "long_factor")},
    **{f"llama3 without {key}": (key, {"rope_type": "llama3"} | without(LLAMA3, key))
       for key in ("low_freq_factor", "high_freq_factor")},
    **{f"factor {factor!r}": ("factor", {"rope_type": "yarn", **YARN, "factor": factor})
       for factor in (0.5, 0, -8.0, NAN, math.inf, 10**400, 1e308, "8", True, [8.0])},
    **{f"beta_fast {beta!r}": ("beta_fast", {"rope_type": "yarn", **YARN, "beta_fast": beta})
       for beta in (0.5, NAN, math.inf, "32", False)},
    **{f"attention_factor {value!r}": ("attention_factor", {"rope_type": "yarn", **YARN, "attention_factor": value})
       for value in (0, -1.0, NAN, "1")},
    **{f"truncate {value!r}": ("truncate", {"rope_type": "yarn", **YARN, "truncate": value}) for value in (0, "false")},
    **{f"original {value!r}": (
        "original_max_position_embeddings",
        {"rope_type": "yarn", **YARN, "original_max_position_embeddings": value})
       for value in (0, -4096, 1, 4096.5, "4096", True, 32769)},
    "longrope factor below 1": ("factor", {"rope_type": "longrope", **LONGROPE, "factor": 0.5}),
    "longrope rounds the long list to 0": (
        "round to 0", {"rope_type": "resonance_longrope", **LONGROPE, "long_factor": [0.01] + [1.0] * 31}
    ),
    "llama3 high below low": ("high_freq_factor", {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5}),
    "llama3 high equals low": ("high_freq_factor", {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}),
    **{f"{key} {name}": (key, {"rope_type": "longrope", **LONGROPE, key: value})
       for key in ("short_factor", "long_factor")
       for name, value in {"too short": [1.0] * 31, "too long": [1.0] * 33, "empty": [], "a number": 4.0,
                           "negative": [-1.0] * 32, "NaN": [NAN] * 32, "infinite": [math.inf] * 32,
                           "of strings": ["1"] * 32}.items()},
}  # fmt: skip


@both_styles
@pytest.mark.parametrize("case", BAD_SCALINGS)
def test_bad_scaling_is_refused_and_named(config, case):
    key, scaling = BAD_SCALINGS[case]
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        RopeConfig.from_hf(config(**scaling))


BAD_CONFIGS = {
    "rope_theta contradicts": ("rope_theta", style5(rope_type="default") | {"rope_theta": 10000.0}),
    "rope_theta 1": ("rope_theta", SIZES | {"rope_theta": 1}),
    "rope_theta NaN": ("rope_theta", SIZES | {"rope_theta": NAN}),
    "rope_theta beyond floats": ("rope_theta", SIZES | {"rope_theta": 10**400}),
    "rope_theta a string": ("rope_theta", SIZES | {"rope_theta": "10000"}),
    "rope_theta true": ("rope_theta", SIZES | {"rope_theta": True}),
    "factors contradict": (
        "factor", style4(rope_type="linear", factor=4.0) | style5(rope_type="linear", factor=8.0)
    ),
    "types contradict": (
        "rope_type", style4(rope_type="linear", factor=4.0) | style5(rope_type="ntk", factor=4.0)
    ),
    "original lengths contradict": (
        "original_max_position_embeddings",
        style4(rope_type="yarn", **YARN) | {"original_max_position_embeddings": 8192},
    ),
    "partial_rotary_factor contradicts": (
        "partial_rotary_factor",
        style5(rope_type="default", partial_rotary_factor=0.5) | {"partial_rotary_factor": 0.25},
    ),
    "partial_rotary_factor a string": ("partial_rotary_factor", SIZES | {"partial_rotary_factor": "half"}),
    "rope_parameters by layer type": ("rope_parameters", SIZES | {"rope_parameters": LAYERED}),
    "rope_scaling by layer type": ("rope_scaling", SIZES | {"rope_scaling": LAYERED}),
    **{f"{key} is {value!r}": (key, SIZES | {key: value})
       for key in ("rope_scaling", "rope_parameters")
       for value in ("yarn", 4.0, ["yarn", 4.0], True, False, 0, "", [])},
    "no hidden_size": ("hidden_size", without(SIZES, "hidden_size")),
    "no num_attention_heads": ("num_attention_heads", without(SIZES, "num_attention_heads")),
    "hidden_size a string": ("hidden_size", SIZES | {"hidden_size": "256"}),
    "num_attention_heads 0": ("num_attention_heads", SIZES | {"num_attention_heads": 0}),
    "head_dim odd": ("dims", SIZES | {"head_dim": 63}),
    "head_dim 0": ("dims", SIZES | {"head_dim": 0}),
    "head_dim a float": ("head_dim", SIZES | {"head_dim": 64.0}),
    "dynamic without a length": (
        "max_position_embeddings", without(style4(rope_type="dynamic", factor=2.0), "max_position_embeddings")
    ),
    **{f"max_position_embeddings {value!r}": ("max_position_embeddings", SIZES | {"max_position_embeddings": value})
       for value in (0, -1, "4096", 4096.0, True)},
    "Phi-3's original length longer than the scaled one": (
        "original_max_position_embeddings",
        style4(rope_type="longrope", **without(LONGROPE, "original_max_position_embeddings"))
        | {"original_max_position_embeddings": 65536},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_refused_and_named(case):
    key, config = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        RopeConfig.from_hf(config)


@pytest.mark.parametrize("part", [0, -0.5, 1.5, NAN])
def test_partial_rotary_factor_lies_in_0_to_1(part):
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        RopeConfig.from_hf(SIZES | {"partial_rotary_factor": part})


def test_the_message_says_value_and_what_would_be_right():
    with pytest.raises(ValueError) as error:
        RopeConfig.from_hf(style4(rope_type="linear", factor=4.0, beta_fast=32))
    assert str(error.value) == "[RopeConfig] beta_fast = 32 means nothing to rope_type 'linear', which takes factor"


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
