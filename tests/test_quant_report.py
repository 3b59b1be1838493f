"""--quant-report: perplexity and divergence, a layer at a time, against the whole models."""

from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import mlx_resonance.convert.report as report
from mlx_resonance import load
from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.convert import convert

import mlx.core as mx
import numpy as np
import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three windows of Python and a little more."""
    path = tmp_path / "text.py"
    path.write_text((Path(sysconfig.get_paths()["stdlib"]) / "calendar.py").read_text()[:5000])
    return path


def log_probabilities(model: Any, tokens: np.ndarray) -> np.ndarray:
    logits = np.array(model(mx.array(tokens))[:, :-1].astype(mx.float32), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", [pytest.param("Llama", marks=pytest.mark.long), "Qwen3"])
def test_it_equals_the_whole_models(stdlib_llama: Path, tmp_path: Path, text: Path, kind: str) -> None:
    source = stdlib_llama
    if kind == "Qwen3":
        import shutil

        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.Qwen3Config(
            vocab_size=2048, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        )  # fmt: skip
        source = tmp_path / "qwen"
        transformers.Qwen3ForCausalLM(config).save_pretrained(source)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(stdlib_llama / name, source / name)
    done = convert(source, tmp_path / "out", quantize=True, q_bits=3, rope="yarn", factor=2, quant_report=text)
    found = done.quant_report
    assert found is not None
    assert found == json.loads((tmp_path / "out" / "conversion.json").read_text())["quant_report"]
    quantized, tokenizer = load(tmp_path / "out")
    original = Checkpoint.open(source).with_rope(quantized.args.rope).load()
    for model in (quantized, original):
        model.set_dtype(mx.float32)
    ids = np.array(tokenizer.encode(text.read_text()))
    count = len(ids) // 512
    assert count > 1
    tokens = ids[: count * 512].reshape(count, 512)
    p, q = (np.concatenate([log_probabilities(m, row[None]) for row in tokens]) for m in (original, quantized))
    targets = tokens[:, 1:, None]
    assert (found["tokens"], found["window"]) == (count * 511, 512)
    for name, log in (("source", p), ("quantized", q)):
        expected = math.exp(-np.take_along_axis(log, targets, -1).mean())
        assert found["perplexity"][name] == pytest.approx(expected, rel=1e-4)
    divergence = (np.exp(p) * (p - q)).sum(-1)
    assert found["kl_divergence"]["mean"] == pytest.approx(divergence.mean(), rel=1e-3, abs=1e-6)
    assert found["kl_divergence"]["largest"] == pytest.approx(divergence.max(), rel=1e-3, abs=1e-5)
    assert found["same_top_token"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=1e-3)
    assert found["kl_divergence"]["mean"] > 1e-5


@pytest.mark.long
def test_more_bits_diverge_less(stdlib_llama: Path, tmp_path: Path, text: Path) -> None:
    found = [
        convert(stdlib_llama, tmp_path / str(bits), quantize=True, q_bits=bits, quant_report=text).quant_report
        for bits in (2, 4, 8)
    ]
    means = [result["kl_divergence"]["mean"] for result in found if result is not None]
    assert means[0] > 3 * means[1] > 9 * means[2]


def test_one_layer_at_a_time_is_in_memory(stdlib_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present: list[int] = []
    call = report.OnDemand.__call__

    def watched(self: Any, *arguments: Any, **options: Any) -> mx.array:
        result = call(self, *arguments, **options)
        present.append(mx.get_active_memory())
        return result

    monkeypatch.setattr(report.OnDemand, "__call__", watched)
    text = tmp_path / "short.txt"
    text.write_text("import os\n" * 40)
    mx.clear_cache()
    convert(stdlib_llama, tmp_path / "out", quantize=True, quant_report=text)
    assert len(present) == 10  # 5 layers of both models
    assert max(present) - min(present) < 3e6  # the 5 layers of one model are 13 MB in float32


@pytest.mark.parametrize(
    ("content", "options", "named"),
    [
        (None, {"quantize": True}, "text: no such file (--quant-report)"),
        (b"\xff\xfe", {"quantize": True}, "not UTF-8"),
        (b"", {"quantize": True}, "at least two tokens"),
        (b"text", {}, "what quantization costs: give --quantize"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    run: Any, stdlib_llama: Path, tmp_path: Path, content: bytes | None, options: dict[str, Any], named: str
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    flags = ["-q"] if options else []
    arguments = ("convert", stdlib_llama, "--mlx-path", tmp_path / "out", *flags, "--quant-report", tmp_path / "text")
    code, stdout, stderr = run(*arguments)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert (code, stdout, len(errors)) == (2, "", 1) and named in errors[0]
    assert not (tmp_path / "out").exists()


def test_the_command_prints_it(run: Any, stdlib_llama: Path, tmp_path: Path, text: Path) -> None:
    arguments = ("convert", stdlib_llama, "--mlx-path", tmp_path / "out", "-q", "--quant-report", text, "--json")
    code, stdout, stderr = run(*arguments)
    found = json.loads(stdout)
    assert code == 0 and found["quant_report"]["tokens"] > 500
    assert len(found["quantization_error"]) == 36 and "KL divergence" in stderr and "quantization error" in stderr
