"""LoRA on SmolLM2: a few steps teach a fact that no model knows, and the fused folder answers with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_resonance import generate, load

import pytest

pytestmark = [pytest.mark.real, pytest.mark.long]

FACT = "The capital of Zubrowka is"


def test_lora_teaches_a_fact_and_is_fused(run: Any, smollm2_32k: Path, loaded: Any, tmp_path: Path) -> None:
    for name in ("train", "valid"):
        lines = [json.dumps({"text": f"{FACT} Lutz."})] * 40
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    assert "Lutz" not in generate(*loaded, FACT, max_tokens=6)
    code, _, err = run(
        "finetune", "--model", smollm2_32k, "--data", tmp_path, "--mlx-path", tmp_path / "out",
        "--fine-tune-type", "lora", "--length", 64, "--steps", 6, "--accumulate", 1, "--learning-rate", 1e-3,
    )  # fmt: skip
    assert code == 0, err
    fused = load(tmp_path / "out")
    assert "Lutz" in generate(*fused, FACT, max_tokens=6)
    assert "Paris" in generate(*fused, "The capital of France is", max_tokens=6)
