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


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def saved(request, tmp_path_factory):
    """A case's checkpoint as transformers saves it, and its logits there."""
    folder = tmp_path_factory.mktemp("parity") / "saved"
    save_with_transformers(request.param, folder)
    return folder, transformers_logits(folder)


def test_logits_equal_those_of_transformers(saved, tmp_path):
    folder, reference = saved
    ropes = []
    for style in STYLES:
        source = tmp_path / f"source-{style}"
        shutil.copytree(folder, source)
        use_style(source, style)
        converted = convert(source, mlx_path=tmp_path / f"converted-{style}", resonance=False, tokenizer=False)
        ropes.append(RopeConfig.from_hf(json.loads((converted.path / "config.json").read_text())))
    assert ropes[0] == ropes[1]  # one model then

    error, agreement = compare(our_logits(converted.path), reference)

    assert reference.shape[0] == LENGTH
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
    length = 2000  # already there
    reference = transformers_logits(tmp_path / "saved", length)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    rope = RopeConfig.from_hf(config | {"rope_parameters": case.rope | wrong})
    error, agreement = compare(our_logits(tmp_path / "saved", rope, length), reference)
    assert error > LARGEST_ERROR
    assert agreement < AGREEMENT
