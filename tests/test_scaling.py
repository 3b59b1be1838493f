"""Scaling scaled checkpoints again: the context before scaling is kept, or reported as unknown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance import RopeConfig, load
from mlx_resonance.convert import convert
from mlx_resonance.errors import UsageError
from mlx_resonance.inspection import inspect_rope
from mlx_resonance.scaling import SCALINGS, check_context, factor_for, named_rope, new_rope, rescale

import numpy as np
import pytest

PLAIN = RopeConfig(64, max_position_embeddings=512)
UNSAID = RopeConfig(64, "linear", max_position_embeddings=4096, parameters={"factor": 8.0})


@pytest.mark.parametrize("resonance", [True, False])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaling_again_equals_scaling_once(name: str, resonance: bool) -> None:
    once = new_rope(PLAIN, name, 8, None, resonance)
    read = RopeConfig.from_hf(json.loads(json.dumps({"head_dim": 64, **once.to_hf()})))
    assert read == once and (read.trained_length, read.context_length) == (512, 4096)
    assert rescale(read, 8) == once
    assert rescale(read, 16) == new_rope(PLAIN, name, 16, None, resonance)
    assert factor_for(read, 8192) == 16
    with pytest.raises(UsageError, match="8192 tokens exceed the checkpoint's context of 4096 tokens") as error:
        check_context(read, 8192)
    assert error.value.remedies == ({"factor": 16},)
    assert named_rope(read, "default", None) == PLAIN
    inspected = inspect_rope(read)
    assert (inspected.train_length, inspected.test_length) == (512, 4096)


def test_the_original_context_changes_no_angle() -> None:
    for name in ("linear", "ntk"):
        kept = new_rope(PLAIN, name, 8, None, False).frequencies()
        unsaid = RopeConfig(64, name, max_position_embeddings=4096, parameters={"factor": 8}).frequencies()
        assert np.array_equal(kept.wavelengths, unsaid.wavelengths)


def test_in_other_peoples_files_the_original_context_is_unknown() -> None:
    """Some state it as max_position_embeddings, others the scaled length: we do not guess."""
    assert UNSAID.trained_length is None and UNSAID.context_length == 4096 and factor_for(UNSAID, 8192) is None
    with pytest.raises(ValueError, match="needs original_max_position_embeddings"):
        rescale(UNSAID, 16)
    with pytest.raises(UsageError, match="does not state the context before scaling") as error:
        inspect_rope(UNSAID)
    assert error.value.remedies == ({"train_length": None},)
    with pytest.raises(UsageError, match="rope type linear cannot extend") as error:
        check_context(UNSAID, 8192)
    assert error.value.remedies == ()


def test_a_card_does_not_invent_it(stdlib_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "linear"
    shutil.copytree(stdlib_llama, source)
    config = json.loads((source / "config.json").read_text())
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "max_position_embeddings": 4096}
    (source / "config.json").write_text(json.dumps(config | scaling))
    card = (convert(source, tmp_path / "out").path / "README.md").read_text()
    assert "| `resonance_linear` | 10000 | 8 | unknown | 4096 |" in card


def sliding(folder: Path, target: Path, **changes: Any) -> Path:
    """A Mistral whose attention has a window as long as its context."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 512} | changes
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_a_window_that_the_longer_context_exceeds_is_refused(stdlib_llama: Path, tmp_path: Path, run: Any) -> None:
    source = sliding(stdlib_llama, tmp_path / "sliding")
    load(source)
    wrong = "sliding_window = 512 is shorter than the context of 4096 tokens"
    with pytest.raises(ValueError, match=wrong):
        load(source, factor=8)
    code, _, stderr = run("convert", source, "--mlx-path", tmp_path / "out", "--rope", "yarn", "--factor", 8)
    assert code == 2 and wrong in stderr and not list(tmp_path.glob("out*"))
    (tmp_path / "text.txt").write_text("import os\n" * 2000)
    options = ["--data", tmp_path / "text.txt", "--contexts", 1024, "--output", tmp_path / "p.jsonl"]
    code, _, stderr = run("eval", "perplexity", "--model", source, *options, "--rope", "yarn", "--factor", 8)
    assert code == 2 and wrong in stderr and not (tmp_path / "p.jsonl").exists()
