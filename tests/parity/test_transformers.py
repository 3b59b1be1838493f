"""Converted checkpoints give the logits of transformers: every rope type, both styles of config.json."""

import json
import shutil

from mlx_resonance import Checkpoint, RopeConfig
from mlx_resonance.convert import convert

import mlx.core as mx
import numpy as np
import pytest

from .cases import CASES, LENGTH, STYLES, compare, save_with_transformers, tokens, transformers_logits, use_style

LARGEST_ERROR = 5e-3  # of the largest logit: transformers' own float32 angles drift by about that in 8 k positions
AGREEMENT = 0.999


def our_logits(folder, rope=None, length=LENGTH):
    checkpoint = Checkpoint.open(folder)
    model = (checkpoint if rope is None else checkpoint.with_rope(rope)).load()
    return np.array(model(mx.array(tokens(length))[None])[0])


# The original contexts are 1024 and 2048 tokens: the shorter text crosses one, the longer both.
@pytest.mark.parametrize("length", [1200, pytest.param(LENGTH, marks=pytest.mark.long)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_equal_those_of_transformers(case, length, tmp_path):
    folder = tmp_path / "saved"
    save_with_transformers(case, folder)
    reference = transformers_logits(folder, length)
    ropes = []
    for style in STYLES:
        source = tmp_path / f"source-{style}"
        shutil.copytree(folder, source)
        use_style(source, style)
        converted = convert(source, mlx_path=tmp_path / f"converted-{style}", resonance=False, tokenizer=False)
        ropes.append(RopeConfig.from_hf(json.loads((converted.path / "config.json").read_text())))
    assert ropes[0] == ropes[1]  # one model then

    error, agreement = compare(our_logits(converted.path, length=length), reference)

    assert reference.shape[0] == length
    assert error <= LARGEST_ERROR
    assert agreement >= AGREEMENT


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("default, base 500000", {"rope_theta": 10000.0}),
        ("yarn", {"rope_type": "resonance_yarn"}),
        ("yarn, attention_factor", {"attention_factor": None}),
    ],
)
def test_a_wrong_rope_would_be_noticed(name, wrong, tmp_path):
    case = next(case for case in CASES if case.name == name)
    save_with_transformers(case, tmp_path / "saved")
    length = 1200  # already there
    reference = transformers_logits(tmp_path / "saved", length)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    rope = RopeConfig.from_hf(config | {"rope_parameters": case.rope | wrong})
    error, agreement = compare(our_logits(tmp_path / "saved", rope, length), reference)
    assert error > LARGEST_ERROR
    assert agreement < AGREEMENT
