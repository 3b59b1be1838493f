"""A portable checkpoint: stock transformers and stock mlx-lm give the logits and the text of our resonance model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_resonance import RopeConfig
from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.convert import convert
from mlx_resonance.convert.portable import portable_rope
from mlx_resonance.errors import UsageError

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers
from mlx_lm.generate import generate_step

VOCABULARY = 128
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 8000)
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True},
    "Mistral": {"num_key_value_heads": 4, "sliding_window": None},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "SmolLM3": {"num_key_value_heads": 2, "num_hidden_layers": 4, "pad_token_id": None},  # the fourth has no rope
}
# Without scaling the attention scale is 1 on both sides; YaRN's is not LongRoPE's, and the projections take the rest.
ROPES: dict[str, dict[str, Any]] = {"default": {}, "yarn": {"rope": "yarn", "factor": 8}}


def source(kind: str, folder: Path, context: int) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,  # attention is sharp, so that logits depend on positions
        **{"num_attention_heads": 4, "num_hidden_layers": 2, **SHAPES[kind]},
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # new ones are 0
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)


def greedy(model: Any, prompt: np.ndarray) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=40)]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", SHAPES)
def test_stock_runtimes_agree(tmp_path: Path, kind: str, rope: str) -> None:
    # The angles are the same for all: once is enough, far out. The others go past the context before scaling, too.
    far = (kind, rope) == ("Llama", "yarn")
    tokens, prompt = (TOKENS, TOKENS[:1500]) if far else (TOKENS[:1000], TOKENS[:600])
    source(kind, tmp_path / "source", context=(1024 if far else 128) if ROPES[rope] else 8192)
    convert(tmp_path / "source", tmp_path / "ours", tokenizer=False, **ROPES[rope])
    convert(tmp_path / "source", tmp_path / "portable", portable=True, tokenizer=False, **ROPES[rope])
    assert "refuses this checkpoint" not in (tmp_path / "portable" / "README.md").read_text()
    ours = Checkpoint.open(tmp_path / "ours").load()
    expected = np.array(ours(mx.array(tokens)[None])[0])
    mlx, _ = mlx_lm.utils.load_model(tmp_path / "portable")
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "portable", dtype=torch.float32)
    again = Checkpoint.open(tmp_path / "portable").load()
    with torch.no_grad():
        logits = {
            "mlx-lm": np.array(mlx(mx.array(tokens)[None])[0]),
            "transformers": torch_model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy(),
            "ours": np.array(again(mx.array(tokens)[None])[0]),
        }
        text = torch_model.generate(torch.from_numpy(prompt)[None], max_new_tokens=40, do_sample=False)
    for name, value in logits.items():
        error = np.abs(value - expected).max() / np.abs(expected).max()
        assert error <= (1e-4 if name == "ours" else 5e-3), name  # theirs: angles in float32
        assert np.mean(value.argmax(-1) == expected.argmax(-1)) >= 0.999, name
    assert greedy(ours, prompt) == greedy(mlx, prompt) == text[0, len(prompt) :].tolist()


def test_the_same_file_without_the_scale_is_another_model(tmp_path: Path) -> None:
    """The bound above would notice: here YaRN's scale is a tenth larger than LongRoPE's."""
    from mlx_resonance.convert import plan

    source("Llama", tmp_path / "source", context=1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "scaled_by", lambda names, args: set())
        convert(tmp_path / "source", tmp_path / "portable", portable=True, tokenizer=False, rope="yarn", factor=32)
    convert(tmp_path / "source", tmp_path / "ours", tokenizer=False, rope="yarn", factor=32)
    tokens = mx.array(TOKENS[:500])[None]
    expected = np.array(Checkpoint.open(tmp_path / "ours").load()(tokens))
    error = (
        np.abs(np.array(Checkpoint.open(tmp_path / "portable").load()(tokens)) - expected).max()
        / np.abs(expected).max()
    )
    assert error > 0.02


@pytest.mark.parametrize(
    ("changes", "flags", "named"),
    [
        ({}, ["-q"], "does not read mlx-lm's quantization"),
        ({}, ["--rope", "dynamic", "--factor", 2], "change with the length"),
        ({"rope_traditional": True}, [], "rope_traditional"),
    ],
)
def test_what_cannot_be_portable(
    run: Any, random_llama: Path, tmp_path: Path, copy_of: Any, changes: dict[str, Any], flags: list[Any], named: str
) -> None:
    folder = copy_of(random_llama, **changes)
    code, _, stderr = run("convert", folder, "--mlx-path", tmp_path / "out", "--portable", *flags)
    assert code == 2 and named in stderr and stderr.endswith(" (--portable)\n"), stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        (RopeConfig(16), "no context length"),
        (RopeConfig(16, max_position_embeddings=128, partial_rotary_factor=0.5), "partial_rotary_factor"),
    ],
)
def test_settings_that_cannot_be_portable(rope: RopeConfig, named: str) -> None:
    """The reader of config.json completes or refuses them, for the models that can be converted."""
    with pytest.raises(UsageError, match=named) as caught:
        portable_rope(rope)
    assert caught.value.option == "portable"


def test_a_quantized_source_cannot_be_portable(run: Any, random_llama: Path, tmp_path: Path) -> None:
    """Its codes must not be scaled."""
    folder = convert(random_llama, tmp_path / "quantized", rope="yarn", factor=8, quantize=True).path
    code, _, stderr = run("convert", folder, "--mlx-path", tmp_path / "out", "--portable")
    assert code == 2 and "does not read mlx-lm's quantization (--portable)" in stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_window_is_no_context(tmp_path: Path) -> None:
    """config.json of Mistral 7B v0.1 has both; within the window, and past it, where the runtimes have it."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": None, "eos_token_id": None}
    config = transformers.MistralConfig(**shape, **heads, max_position_embeddings=8192, sliding_window=64)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "portable", portable=True, tokenizer=False)
    written = Checkpoint.open(tmp_path / "portable")
    assert written.config["max_position_embeddings"] == 8192 and written.config["sliding_window"] == 64
    tokens = TOKENS[:60]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "portable", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    convert(tmp_path / "source", tmp_path / "ours", tokenizer=False)
    ours = np.array(Checkpoint.open(tmp_path / "ours").load()(mx.array(tokens)[None])[0])
    assert np.abs(theirs - ours).max() <= 5e-3 * np.abs(ours).max()
