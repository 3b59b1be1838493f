"""Scaling scaled checkpoints again: the context before scaling is kept, or reported as unknown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig, load, scaling
from mlx_resonance.convert import convert
from mlx_resonance.errors import UsageError
from mlx_resonance.finetuning.recipes import rope_for
from mlx_resonance.frequencies import yarn_attention_scale
from mlx_resonance.inspection import inspect_rope
from mlx_resonance.scaling import SCALINGS, check_context, factor_for, named_rope, new_rope, rescale
from mlx_resonance.validation import attention_window

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from .random_models import make

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
    with pytest.raises(UsageError, match="8,192 tokens exceed the checkpoint's context of 4,096 tokens") as error:
        check_context(read, 8192)
    assert error.value.remedies == ({"factor": 16}, {"extend": "dynamic"})
    assert named_rope(read, "default", None) == PLAIN
    inspected = inspect_rope(read)
    assert (inspected.train_length, inspected.test_length) == (512, 4096)


YARN = {
    "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1024, "beta_fast": 16, "truncate": False,
    "extrapolation_factor": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", ["yarn", "resonance_yarn"])
@pytest.mark.parametrize("scale", [None, 1.0, 0.9, yarn_attention_scale(4), float(np.float32(yarn_attention_scale(4)))])
def test_another_factor_keeps_what_a_yarn_checkpoint_was_trained_with(name: str, scale: float | None) -> None:
    """By --factor of every command, and by the scaling of convert, finetune and eval perplexity."""
    given = YARN | {"rope_type": name} | ({} if scale is None else {"attention_factor": scale})
    rope = {"head_dim": 64, "max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_scaling": given}
    source = RopeConfig.from_hf(rope)
    for factor in (4, 8):
        asked = RopeConfig.from_hf(
            rope | {"max_position_embeddings": 1024 * factor, "rope_scaling": given | {"factor": factor}}
        )
        wanted = asked.frequencies().wavelengths
        for found in (
            rescale(source, factor), new_rope(source, "yarn", factor, None, source.is_resonant),
            named_rope(source, name, factor), rope_for(source, name, factor, None),
        ):  # fmt: skip
            assert np.array_equal(found.frequencies().wavelengths, wanted)
            assert found.context_length == 1024 * factor
            own = scale if scale in (1.0, 0.9) else yarn_attention_scale(factor)
            assert found.frequencies().attention_scale == pytest.approx(own, abs=1e-7)


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
    longest = 4096 * int(UNSAID.parameters["factor"])
    with pytest.raises(UsageError, match="rope type linear cannot extend") as error:
        check_context(UNSAID, longest + 1)
    assert error.value.remedies == ({"extend": "dynamic"},)


def test_past_the_length_on_file_a_warning_names_the_factor_that_settles_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    factor = UNSAID.parameters["factor"]
    scaling._warn_unclear.cache_clear()
    check_context(UNSAID, 4096)
    assert caplog.records == []
    for tokens in (4097, 4096 * int(factor)):
        check_context(UNSAID, tokens)
    (record,) = caplog.records
    assert "may be the context before or after linear scaling" in record.message
    assert record.remedies == [{"factor": factor}]
    settled = rescale(UNSAID, factor)
    assert (settled.trained_length, settled.context_length) == (4096, 4096 * factor)
    assert settled.frequencies() == UNSAID.frequencies()
    caplog.clear()
    check_context(settled, 4096 * int(factor))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("lengths", "in_tokenizer", "trained", "context"),
    [
        ({"max_position_embeddings": 4096, "max_sequence_length": 16384}, {}, 4096, 16384),  # Vicuna 1.5 16k
        ({"max_position_embeddings": 4096, "max_sequence_length": 4096}, {"model_max_length": 16384}, 4096, 16384),
        ({"max_position_embeddings": 4096, "max_sequence_length": 4096}, {}, None, 4096),  # a leftover of the base
        ({"max_position_embeddings": 4096, "max_sequence_length": None}, {"model_max_length": 16384}, 4096, 16384),
        ({"max_position_embeddings": 4096}, {"model_max_length": 16384}, 4096, 16384),  # LongLoRA
        ({"max_position_embeddings": 4096}, {"model_max_length": 10**30}, None, 4096),
        ({"max_position_embeddings": 4096}, {}, None, 4096),
        ({"max_position_embeddings": 4096, "max_sequence_length": 8192}, {}, None, 4096),
    ],
)
@pytest.mark.parametrize("name", ["linear", "ntk", "resonance_linear"])
def test_another_length_tells_which_context_config_json_states(
    stdlib_llama: Path,
    tmp_path: Path,
    lengths: dict[str, int],
    in_tokenizer: dict[str, int],
    trained: int | None,
    context: int,
    name: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stdlib_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= lengths | {"rope_scaling": {"type": name, "factor": 4.0}}
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer.pop("model_max_length", None)
    path.write_text(json.dumps(tokenizer | in_tokenizer))
    rope = Checkpoint.open(folder).rope
    assert (rope.trained_length, rope.context_length) == (trained, context)
    assert rope.frequencies() == RopeConfig(rope.dims, name, parameters={"factor": 4.0}).frequencies()


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


def test_without_a_longer_context_it_is_capped_at_the_window(
    stdlib_llama: Path, tmp_path: Path, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Mistral 7B v0.1: 32768 positions, a window of 4096 in every layer. Up to there both attend to the same."""
    source = sliding(stdlib_llama, tmp_path / "sliding", sliding_window=256)
    line = "sliding_window = 256: a mistral model here attends to all tokens, so its context is 256 tokens, not 512"
    checkpoint = Checkpoint.open(source)
    assert checkpoint.rope.context_length == 256 and [record.message for record in caplog.records] == [line]
    check_context(checkpoint.rope, 256)
    with pytest.raises(UsageError, match="exceed the checkpoint's context of 256 tokens, the window") as error:
        check_context(checkpoint.rope, 257)
    assert error.value.remedies == ({"extend": "dynamic"},)
    check_context(checkpoint.extended("dynamic").rope, 257)
    code, stdout, stderr = run("plan", "--model", source, "--json")
    assert code == 0 and f"warning: {line}\n" in stderr and json.loads(stdout)["context"] == 256
    options = ("--prompt", "import os", "--max-tokens", 300)
    code, _, stderr = run("generate", "--model", source, *options)
    assert code == 2 and stderr.count("\n") == 2 and "the window of its attention" in stderr
    with pytest.raises(UsageError, match="shorter than the context of 4096"):
        checkpoint.rescaled(8)
    done = convert(source, tmp_path / "out")  # keeps context and window
    assert done.rope.context_length == 256
    assert json.loads((done.path / "config.json").read_text())["max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"sliding_window": 64}),  # transformers' LLaMA has none
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}),
        ("smollm3", {"sliding_window": 64}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_a_window_that_no_layer_has_caps_nothing(kind: str, changes: dict[str, Any]) -> None:
    config = {"model_type": kind, "num_hidden_layers": 2, **changes}
    assert attention_window(config) is None
    assert attention_window({"model_type": "mistral", "num_hidden_layers": 2}) == 4096  # transformers' default
    assert attention_window({"model_type": "qwen2", "num_hidden_layers": 2, "use_sliding_window": True}) == 4096
    assert attention_window(config | {"model_type": "mistral", "layer_types": None, "sliding_window": 64}) == 64


def test_a_length_before_scaling_that_is_stated_gives_the_scaled_one() -> None:
    """As for yarn: the file says 128 tokens, times 4."""
    sizes = {"head_dim": 16, "max_position_embeddings": 128, "rope_theta": 1e4}
    scaling = {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 128}
    for config in (sizes | {"rope_scaling": scaling}, sizes | {"rope_scaling": scaling, "max_sequence_length": 512}):
        rope = RopeConfig.from_hf(config)
        assert (rope.trained_length, rope.context_length) == (128, 512)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_layers_that_differ_by_layer_types_are_those_of_transformers(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its LLaMA has no windows, its Mistral one in every layer; mlx-lm would give some layers a window."""
    folder = make(tmp_path / "model", kind, RopeConfig(16, max_position_embeddings=512), "4")
    config = json.loads((folder / "config.json").read_text())
    config |= {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 40}
    (folder / "config.json").write_text(json.dumps(config))
    opened = Checkpoint.open(folder)
    line = f"layer_types = full_attention, sliding_attention is ignored, as in transformers' {kind}"
    assert line in [record.message for record in caplog.records]
    assert opened.rope.context_length == (512 if kind == "llama" else 40)
    count = opened.rope.context_length or 0
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.arange(count)[None]).logits.numpy()
    ours = np.array(opened.load()(mx.arange(count)[None]))
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


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
