"""The tiny checkpoint that comes with the package: stock runtimes load it, it knows Python and finds keys."""

from __future__ import annotations

import json
import math
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, generate, load
from mlx_resonance.evaluation.passkey import (
    PasskeyGrid,
    accuracy,
    first_integer,
    passkey_prompt,
    run_passkey,
)
from mlx_resonance.scaling import named_rope

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT = 512


def held_out_tokens(folder: Path, windows: int) -> np.ndarray:
    """Windows of 513 tokens from modules of this machine's standard library that were held out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    root = Path(sysconfig.get_paths()["stdlib"])
    names = json.loads((folder / "training.json").read_text())["held_out_files"]
    ids: list[int] = []
    for name in names:
        if (root / name).is_file() and len(ids) < windows * (CONTEXT + 1):
            ids += tokenizer.encode((root / name).read_text(errors="replace"))
    if len(ids) < windows * (CONTEXT + 1):
        pytest.skip("this Python has none of the held-out modules")
    return np.array(ids[: windows * (CONTEXT + 1)]).reshape(windows, CONTEXT + 1)


def test_size(stdlib_llama: Path) -> None:
    assert sum(file.stat().st_size for file in stdlib_llama.iterdir()) <= 8e6


def test_stock_mlx_lm_and_transformers_read_it_alike(stdlib_llama: Path) -> None:
    tokens = held_out_tokens(stdlib_llama, 1)[:, :CONTEXT]
    ours, tokenizer = load(stdlib_llama)
    stock, _ = mlx_lm.load(str(stdlib_llama))
    for model in (ours, stock):
        model.set_dtype(mx.float32)
    reference = AutoModelForCausalLM.from_pretrained(stdlib_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    for model in (ours, stock):
        # float32 sums in another order; the angles are small here
        assert np.abs(np.array(model(mx.array(tokens))) - expected).max() <= 1e-4 * np.abs(expected).max()
    text = "def main(argv):\n    return 0\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.long
def test_held_out_loss_is_the_recorded_one(stdlib_llama: Path) -> None:
    record = json.loads((stdlib_llama / "training.json").read_text())
    tokens = mx.array(held_out_tokens(stdlib_llama, 12))
    model, _ = load(stdlib_llama)
    model.set_dtype(mx.float32)
    loss = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean").item()
    # Twelve windows instead of all, perhaps from another Python version.
    assert loss == pytest.approx(record["held_out_loss"], abs=0.6)
    assert loss < 0.6 * math.log(2048)


@pytest.mark.parametrize(
    ("rope", "length", "least", "most"),
    [
        ("default", 512, 0.6, 1),
        ("default", 1024, 0, 0),
        ("resonance_yarn", 1024, 0.6, 1),
        *(
            pytest.param(rope, 2048, *found, marks=pytest.mark.long)
            for rope, *found in (("default", 0, 0), ("yarn", 0.6, 1), ("resonance_yarn", 0.6, 1))
        ),
    ],
)
def test_it_finds_a_key(rope: str, length: int, least: float, most: float, checkpoint: Path, tmp_path: Path) -> None:
    """Within its context with its own angles, past it only with others."""
    opened = Checkpoint.open(checkpoint)
    angles = replace(named_rope(opened.rope, rope, 8), max_position_embeddings=4096)
    grid = PasskeyGrid([length], (10, 50, 90), repetitions=1)
    trials = run_passkey(opened.with_rope(angles), grid, tmp_path / "trials.jsonl")
    assert least <= accuracy(grid, trials).mean() <= most, trials


def test_it_finds_a_key_in_python(checkpoint: Path) -> None:
    """Not only between the passkey test's sentences: in a held-out module, at any depth."""
    model, tokenizer = load(checkpoint)
    filler = held_out_tokens(checkpoint, 1)[0].tolist()
    found = 0
    for number, depth in enumerate(range(0, 100, 10)):
        key = 10_007 + 3_571 * number
        answer = generate(model, tokenizer, passkey_prompt(tokenizer, CONTEXT, depth, key, filler), max_tokens=7)
        found += first_integer(answer) == key
    assert found >= 8


def test_another_filler_hides_the_key(tokenizer: Any) -> None:
    filler = tokenizer.encode("import os\n", add_special_tokens=False)
    text = tokenizer.decode(passkey_prompt(tokenizer, 200, 50, 31_337, filler))
    assert text.endswith("The pass key is") and text.count("31337") == 2 and text.count("import os\n") > 15
    assert "The grass is green." not in text


def test_no_matrix_has_died(stdlib_llama: Path) -> None:
    """An optimizer whose weight decay outweighs small gradients leaves layers that do nothing."""
    for name, value in mx.load(str(stdlib_llama / "model.safetensors")).items():
        size = mx.sqrt(mx.mean(mx.square(value.astype(mx.float32)))).item()
        assert size > 0.01, f"{name}: {size}"
