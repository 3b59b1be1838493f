"""Every way to open a checkpoint gives the same logits: random rope settings, in both styles of config.json."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig, generate, load
from mlx_resonance.attention import Inference
from mlx_resonance.generation import stream
from mlx_resonance.generation.batch import Request, generate_batch
from mlx_resonance.run_log import read_run_log

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

from .checkpoints import STDLIB_LLAMA, source
from .random_models import LENGTH, MODELS, make, random_rope


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    tokenizer = Checkpoint.open(STDLIB_LLAMA).tokenizer
    return list(tokenizer.encode(source()[: 8 * LENGTH]))[:LENGTH]


def last_log_probabilities(model: Any, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of the token after a text that is read in one pass."""
    logits = model(mx.array([tokens]))[0, -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits))


def used_by(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, command: Callable[[], Any]) -> Any:
    """The model that a command hands to a function of mlx-lm's."""
    models: list[Any] = []
    original = getattr(module, name)

    def watched(*args: Any, **options: Any) -> Any:
        models.extend(arg.of if isinstance(arg, Inference) else arg for arg in args)
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, watched)
        command()
    return next(model for model in models if isinstance(model, nn.Module))


@pytest.mark.parametrize("style", ["4", "5"])
@pytest.mark.parametrize("seed", [*range(7), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(7, 70))])
def test_every_entry_point_gives_the_same_logits(
    seed: int, style: str, tokens: list[int], tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    from mlx_lm import server

    rope = random_rope(seed)
    folder = make(tmp_path / "model", list(MODELS)[seed % 4], rope, style)  # those that `convert` compares
    expected = last_log_probabilities(load(folder)[0], tokens)
    other = Checkpoint.open(folder).with_rope(RopeConfig(16, base=12345.0, max_position_embeddings=512))
    assert np.abs(last_log_probabilities(other.load(), tokens) - expected).max() > 1e-2  # angles matter

    def check(name: str, model: Any) -> None:
        assert np.array_equal(last_log_probabilities(model, tokens), expected), name

    options = ("--model", folder, "--prompt", "import os", "--max-tokens", 2)
    check("Checkpoint", Checkpoint.open(folder).load())
    check("mlx_lm.load", mlx_lm.load(str(folder))[0])
    check("mlx_lm.utils.load_model", mlx_lm.utils.load_model(folder)[0])
    check("generate", used_by(monkeypatch, stream, "decode", lambda: run("generate", *options)))
    of_mlx_lm = sys.modules["mlx_lm.generate"]
    check("lm generate", used_by(monkeypatch, of_mlx_lm, "stream_generate", lambda: run("lm", "generate", *options)))
    arguments = Namespace(
        model=str(folder), adapter_path=None, draft_model=None, trust_remote_code=False, chat_template=None,
        use_default_chat_template=False, chat_template_args={}, pipeline=False, allowed_origins=["*"],
    )  # fmt: skip
    check("lm server", server.ModelProvider(arguments).load("default_model", None, None)[0])
    code, _, err = run(
        "convert", folder, "--mlx-path", tmp_path / "out", *(["--no-resonance"] * (not rope.is_resonant))
    )
    assert code == 0, err
    check("convert", load(tmp_path / "out")[0])
    code, out, err = run("verify", tmp_path / "out", "--source", folder, "--json")
    assert code == 0 and json.loads(out)["logits"]["error"] < 5e-3, err


@pytest.mark.parametrize("style", ["4", "5"])
@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_and_batches_of_every_model(
    kind: str, style: str, tmp_path: Path, installed: None, run: Any
) -> None:
    rope = random_rope(4)  # yarn
    folder = make(tmp_path / "model", kind, rope, style)
    model, tokenizer = load(folder)
    tokens = list(tokenizer.encode(source()[: 8 * LENGTH]))[:LENGTH]  # Qwen's tokenizer splits differently
    logits = model(mx.array([tokens]))[0]
    losses = mx.logsumexp(logits[:-1], axis=-1) - mx.take_along_axis(logits[:-1], mx.array(tokens)[1:, None], -1)[:, 0]
    (tmp_path / "text.txt").write_text(source()[: 8 * LENGTH])
    output = tmp_path / "perplexity.jsonl"
    code, _, err = run(
        "eval", "perplexity", "--model", folder, "--data", tmp_path / "text.txt", "--contexts", LENGTH, "--truncate",
        "--output", output,
    )  # fmt: skip
    assert code == 0, err
    (line,) = read_run_log(output, "perplexity")[1]
    assert line["nll"] / line["tokens"] == pytest.approx(losses.mean().item(), rel=1e-5)
    (answer,) = generate_batch(model, tokenizer, [Request(1, tokens[:200], "")], max_tokens=8)
    streamed = generate(model, tokenizer, tokens[:200], max_tokens=8)
    assert answer["text"].removeprefix(" ") == streamed  # mlx-lm's streaming detokenizer drops the first space
    assert np.array_equal(
        last_log_probabilities(mlx_lm.load(str(folder))[0], tokens), last_log_probabilities(model, tokens)
    )


def test_layers_without_rope_stay_without(tmp_path: Path, tokens: list[int]) -> None:
    folder = make(tmp_path / "model", "smollm3", random_rope(4), "4")
    model = load(folder)[0]
    kinds = [type(layer.self_attn.rope).__name__ for layer in model.layers]
    assert kinds == ["ResonanceRoPE"] * 3 + ["NoPE"]
