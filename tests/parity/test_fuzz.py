"""Thousands of damaged config.json files: the angles of transformers' model of that type, or a refusal in one line."""

from __future__ import annotations

import copy
import logging
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.errors import UsageError

import numpy as np
import pytest

from .angles import LENGTH, TYPES, of_transformers

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 8192,
    "layer_types": ["full_attention", "full_attention"], "rms_norm_eps": 1e-5,
    "logits_scaling": 1.0, "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
    "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
}  # fmt: skip
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024},
    {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024, "beta_fast": 16, "beta_slow": 2,
        "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5,
    },
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    {
        "rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)], "factor": 8.0, "original_max_position_embeddings": 1024,
    },
]  # fmt: skip
NUMBERS = [0, 1, 1.0, 2, 0.5, 4.0, 8, 16, 32.0, 512, 1024, 1024.0, 2048, 8192, 65536, 500000.0, -1, 1e30]
OTHERS = [None, True, False, "", "yarn", "8", [], [1.0] * 8, {}, {"factor": 2.0}]
NAMES = [
    "rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "mscale",
    "mscale_all_dim", "attention_factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
    "rope_theta", "partial_rotary_factor", "finetuned",
]  # fmt: skip
TOP_LEVEL = [
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings",
    "max_position_embeddings", "head_dim", "rope_ratio", "rotary_pct", "rotary_dim", "rope_interleaved",
    "no_rope_layers", "rotary_emb_base", "use_rope", "max_sequence_length", "rope_type", "factor", "model_max_length",
    "position_embedding_type", "hidden_size", "num_attention_heads",
]  # fmt: skip
RETYPED = {
    int: [str, float, lambda v: [v], lambda v: v + 0.5],
    float: [str, int, lambda v: [v], lambda v: -v],
    str: [lambda v: v.upper(), lambda v: v + "x", lambda v: [v], lambda v: "default"],
    bool: [int, str, lambda v: not v],
    list: [
        lambda v: v[:-1],
        lambda v: [*v, 1.0],
        lambda v: {str(i): x for i, x in enumerate(v)},
        lambda v: [str(x) for x in v],
    ],
    dict: [lambda v: list(v), lambda v: {"full_attention": v}, lambda v: {"full_attention": v, "sliding_attention": v}],
}


def damaged(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Configurations with one to three keys added, removed, nulled or retyped, in either style."""
    draw = random.Random(seed)
    for _ in range(count):
        config = {"model_type": draw.choice(list(TYPES)), **SIZES}
        scaling = copy.deepcopy(draw.choice(SCALINGS))
        base = draw.choice([10000.0, 500000.0, 1000000])
        if draw.random() < 0.5:
            config |= {"rope_parameters": scaling | {"rope_theta": base}}
        else:
            config |= {"rope_theta": base, "rope_scaling": scaling if scaling["rope_type"] != "default" else None}
        for _ in range(draw.choice([1, 1, 2, 3])):
            damage(draw, config)
        yield config


def damage(draw: random.Random, config: dict[str, Any]) -> None:
    inner = config.get("rope_parameters") or config.get("rope_scaling")
    inside = isinstance(inner, dict) and draw.random() < 0.6
    where: dict[str, Any] = inner if inside else config  # type: ignore[assignment]
    if draw.random() < 0.03:  # a second dictionary
        other = draw.choice(["rope_parameters", "rope_scaling"])
        config[other] = copy.deepcopy(draw.choice([*SCALINGS, {"rope_theta": 1e6}]))
        return
    key = draw.choice(NAMES if inside else TOP_LEVEL)
    how = draw.choice(["add", "add", "remove", "null", "retype"])
    if how in ("remove", "null", "retype") and draw.random() < 0.8:
        key = draw.choice(sorted((set(where) & {*NAMES, *TOP_LEVEL}) or {key}))
    if how == "add":
        where[key] = copy.deepcopy(draw.choice(NUMBERS if draw.random() < 0.7 else OTHERS))
    elif how == "remove":
        where.pop(key, None)
    elif how == "null":
        where[key] = None
    elif key in where and type(where[key]) in RETYPED:
        where[key] = draw.choice(RETYPED[type(where[key])])(where[key])


def without_layer_types(config: dict[str, Any]) -> dict[str, Any]:
    """With the settings of a layer type as those of all layers, which transformers' models here do not read."""
    flat = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(value := config.get(key), dict):
            flat[key] = value.get("full_attention", value)
    return flat


def without_nulls(value: Any) -> Any:
    """Without keys that are null, which count as absent here, while transformers stumbles over most of them."""
    if not isinstance(value, dict):
        return value
    meant = ("truncate", "factor")  # transformers reads a null there
    return {key: without_nulls(entry) for key, entry in value.items() if entry is not None or key in meant}


def ours(config: dict[str, Any]) -> list[np.ndarray]:
    """The same, of an opened checkpoint."""
    rope = Checkpoint.of("fuzz", Path("fuzz"), copy.deepcopy(config), {}).rope
    lengths = (16, LENGTH) if rope.depends_on_length else (None, None)
    return [np.append(f.inv_freq, f.attention_scale) for f in map(rope.frequencies, lengths)]


def outcome(config: dict[str, Any], log: list[str]) -> str:
    """What happens to a configuration, in a word. Fails where other angles are made in silence."""
    log.clear()
    try:
        found: list[np.ndarray] | None = ours(config)
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 400, config
        found = None
    said, flat = list(log), without_layer_types(config)
    for candidate in (flat, without_nulls(flat)):
        try:
            expected: list[np.ndarray] | None = of_transformers(candidate)
            break
        except Exception:  # whatever its checks and its arithmetic raise
            expected = None
    if found is None:
        return "both refuse" if expected is None else "refused here only"
    if expected is None:
        return "read here only, with a warning" if said else "read here only"
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape, config
        # transformers computes in float32; on YaRN's ramp, with a factor of 2048, its error reaches 3e-5.
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-12, err_msg=str(config))
    return "same angles"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("count", "seed"), [(3000, 0), pytest.param(100000, 1, marks=pytest.mark.long)], ids=["quick", "night"]
)
def test_a_damaged_config_gives_the_same_angles_or_a_refusal(
    count: int, seed: int, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    log: list[str] = []
    monkeypatch.setattr(logging.getLogger("mlx_resonance"), "warning", lambda line, **_: log.append(line))
    found = Counter(outcome(config, log) for config in damaged(count, seed))
    print(dict(found))
    # transformers refuses a LLaMA whose hidden_size is not a multiple of its heads; here the weights' shapes decide.
    assert found["read here only"] < 0.005 * count
    assert found["refused here only"] < 0.35 * count  # mostly sizes that are null, and keys of other rope types
    assert found["same angles"] > 0.2 * count and found["both refuse"] > 0.1 * count
