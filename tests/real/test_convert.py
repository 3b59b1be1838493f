"""Conversions of SmolLM2: verified, and the result still knows what the source does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_resonance import generate, load
from mlx_resonance.convert import convert
from mlx_resonance.generation import prompt_tokens

import mlx_lm
import pytest
import torch
import transformers

from .prompts import CAPITAL

pytestmark = pytest.mark.real

KINDS: dict[
    str, tuple[dict[str, Any], float]
] = {  # and the largest error that rounding may cause, of a tensor's values
    "8 bit": ({"quantize": True, "q_bits": 8}, 0.01),
    "4 bit": ({"quantize": True, "q_bits": 4}, 0.15),
    "mxfp4": ({"quantize": True, "q_mode": "mxfp4"}, 0.15),
    "bfloat16": ({"dtype": "bfloat16"}, 0.002),
}
QUICK = "4 bit"


@pytest.mark.parametrize(
    "kind", [kind if kind == QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
def test_a_smaller_type_still_knows_the_capital(smollm2: Path, tmp_path: Path, kind: str) -> None:
    """Every tensor within rounding of its source, transformers' logits, and Paris."""
    options, bound = KINDS[kind]
    found = convert(smollm2, tmp_path / "out", rope="yarn", factor=4, verify=True, **options).checks
    assert found is not None and found["problems"] == [] and found["tensors"] == 272
    assert 0 < max(found["errors"].values()) < bound
    assert found["logits"]["layers"] == 30 and found["logits"]["error"] < 1e-4
    model, tokenizer = load(tmp_path / "out")
    assert "Paris" in generate(model, tokenizer, prompt_tokens(tokenizer, CAPITAL, True), max_tokens=8)


def test_portable_in_stock_mlx_lm_and_transformers(smollm2: Path, loaded: Any, tmp_path: Path) -> None:
    """Both read the folder without us, and give the answer of our resonance model."""
    folder = convert(smollm2, tmp_path / "out", rope="yarn", factor=4, portable=True).path
    ours, tokenizer = loaded
    prompt = prompt_tokens(tokenizer, CAPITAL, True)
    expected = generate(ours, tokenizer, prompt, max_tokens=16)
    assert "Paris" in expected
    assert mlx_lm.generate(*mlx_lm.load(str(folder)), prompt, max_tokens=16) == expected
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.decode(answer, skip_special_tokens=True) == expected
