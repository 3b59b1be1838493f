"""transformers 4 reads `longrope` its own way: what we write gives it the same angles and the same logits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig
from mlx_resonance.convert import convert
from mlx_resonance.convert.portable import portable_rope

import mlx.core as mx
import numpy as np
import pytest

from .cases import CASES, compare, save_with_transformers, tokens

ORIGINAL, CONTEXT, BASE = 512, 4096, 10000.0
YARN = {"factor": 8.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {
    "short_factor": [1.0 + i / 32 for i in range(16)],
    "long_factor": [1.0 + i / 2 for i in range(16)],
    "original_max_position_embeddings": ORIGINAL,
}
LENGTHS = [None, 1, ORIGINAL, ORIGINAL + 1, CONTEXT, CONTEXT + 1]
NEEDED = ["transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1"]
LOGITS = """
import sys, numpy as np, torch, transformers
print(transformers.__version__)
tokens = torch.from_numpy(np.load(sys.argv[1]))[None]
for folder in sys.argv[3:]:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # the short text first: the long one switches the angles
        short, long = (model(tokens[:, :length], use_cache=False).logits[0] for length in (int(sys.argv[2]), None))
    np.savez(folder + "/logits.npz", short=short, long=long)
"""


def transformers_4(config: dict[str, Any], length: int | None) -> tuple[np.ndarray, float]:
    """Radians per token of each pair, float64, and the attention scale of `longrope` for a text of `length` tokens.

    Source: transformers 4.57.6, modeling_rope_utils.py: `_compute_longrope_parameters` and `longrope_frequency_update`
    of `dynamic_rope_update`. There, the original context is a key of the whole config; the one in the dict is not read.
    """
    scaling, context = config["rope_scaling"], config["max_position_embeddings"]
    original, factor = context, scaling.get("factor")
    if "original_max_position_embeddings" in config:
        original = config["original_max_position_embeddings"]
        factor = context / original
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = scaling["long_factor" if length is not None and length > original else "short_factor"]
    dims = config["head_dim"]
    return 1 / (np.array(factors) * config["rope_theta"] ** (np.arange(0, dims, 2) / dims)), scale


def written(rope: RopeConfig) -> dict[str, Any]:
    return json.loads(json.dumps({"head_dim": rope.dims, **rope.to_hf("4")}))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("more", "context"),
    [
        ({}, CONTEXT),
        ({}, ORIGINAL),
        ({"factor": 8.0}, CONTEXT),
        ({"factor": 8, "attention_factor": 1.3}, CONTEXT),
        ({"factor": 4.0}, CONTEXT),
        ({"factor": 8.0}, ORIGINAL),
    ],
    ids=["no factor", "no scaling", "factor", "attention_factor", "another factor", "context before scaling"],
)
def test_angles_of_longrope(more: dict[str, Any], context: int, length: int | None) -> None:
    rope = RopeConfig(32, "longrope", BASE, context, LONGROPE | more)
    inv_freq, scale = transformers_4(written(rope), length)
    for ours in (rope, RopeConfig.from_hf(written(rope))):
        np.testing.assert_allclose(inv_freq, ours.frequencies(length).inv_freq, rtol=1e-14)
        assert scale == pytest.approx(ours.frequencies(length).attention_scale, rel=1e-14)


@pytest.mark.parametrize("more", [{}, {"factor": 8}, {"factor": 8.0, "attention_factor": 1.3}], ids=str)
def test_our_own_reader_reads_an_equal_longrope(more: dict[str, Any]) -> None:
    rope = RopeConfig(32, "longrope", BASE, CONTEXT, LONGROPE | more)
    assert RopeConfig.from_hf(written(rope)) == rope


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(32, "resonance_yarn", BASE, CONTEXT, YARN),
        RopeConfig(32, "yarn", BASE, ORIGINAL, YARN | {"attention_factor": 0.8}),
        RopeConfig(32, "resonance_linear", BASE, CONTEXT, {"factor": 8.0}),
        RopeConfig(32, "resonance_default", 500000.0, CONTEXT),
    ],
    ids=lambda rope: rope.rope_type,
)
def test_angles_of_a_portable_checkpoint(rope: RopeConfig) -> None:
    portable, query_key_factor = portable_rope(rope)
    assert RopeConfig.from_hf(written(portable)) == portable
    for length in LENGTHS:
        inv_freq, scale = transformers_4(written(portable), length)
        np.testing.assert_allclose(inv_freq, rope.frequencies().inv_freq, rtol=1e-14)
        assert scale * query_key_factor == pytest.approx(rope.frequencies().attention_scale, rel=1e-14)


@pytest.mark.long
def test_logits_of_transformers_4(tmp_path: Path) -> None:
    """What `convert` writes in the plain rope types, and its portable checkpoints."""
    library, text = tmp_path / "library", tokens(3000)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(library), *NEEDED], check=True)
    for case in CASES:
        save_with_transformers(case, tmp_path / case.name)
        convert(tmp_path / case.name, tmp_path / f"{case.name}.plain", resonance=False, tokenizer=False)
    folders = [tmp_path / f"{case.name}.plain" for case in CASES]
    for name, scaling in (("yarn", {"rope": "yarn", "factor": 8}), ("default", {})):
        source = tmp_path / "default, base 10000"
        made = convert(source, tmp_path / f"{name}.portable", portable=True, tokenizer=False, **scaling)
        folders.append(made.path)
    np.save(tmp_path / "tokens.npy", text)
    short = 1000
    command = [sys.executable, "-c", LOGITS, tmp_path / "tokens.npy", str(short), *folders]
    environment = os.environ | {"PYTHONPATH": str(library)}
    done = subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "4.57.6"
    for folder in folders:
        logits, model = np.load(folder / "logits.npz"), Checkpoint.open(folder).load()
        for name, length in (("short", short), ("long", len(text))):
            error, agreement = compare(logits[name], np.array(model(mx.array(text[:length])[None])[0]))
            assert error <= 5e-3 and agreement >= 0.999, (folder.name, name, error)
