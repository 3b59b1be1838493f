"""Every way in which config.json can be wrong: RopeConfig refuses it and names the key."""

from __future__ import annotations

import math

from mlx_resonance import RopeConfig

import pytest

from .scalings import LLAMA3, LONGROPE, PARAMETERS, SIZES, YARN, both_styles, style4, style5

NAN = math.nan
LAYERED = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}


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
    "rope_scaling for one of two layer types": (
        "rope_scaling",
        SIZES | {
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_scaling": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
        },
    ),
    "rope_scaling none for one layer type": (
        "rope_scaling",
        SIZES | {"rope_scaling": {"full_attention": None, "sliding_attention": {"rope_type": "default"}}},
    ),
    "no length at all": (
        "original_max_position_embeddings",
        without(style4(rope_type="yarn", factor=8.0), "max_position_embeddings"),
    ),
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
    assert str(error.value) == (
        "[RopeConfig] beta_fast = 32 does not apply to rope_type 'linear', which takes "
        "factor, original_max_position_embeddings"
    )
