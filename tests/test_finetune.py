"""`finetune`: a longer context is learned; a killed run goes on to the bit; what is wrong is said in a line."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlx_resonance.config import RopeConfig
from mlx_resonance.convert import convert
from mlx_resonance.finetuning import chunks
from mlx_resonance.finetuning import run as finetuning
from mlx_resonance.finetuning.data import Batches, packed
from mlx_resonance.finetuning.memory import plan_training
from mlx_resonance.finetuning.recipes import PRESETS, Recipe, choose
from mlx_resonance.loading import load, load_model, load_tokenizer
from mlx_resonance.records import open_records

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from .checkpoints import source, weights

STDLIB_LLAMA = Path(str(files("mlx_resonance") / "assets" / "stdlib-llama"))
ROPE = ("--rope", "resonance_yarn", "--factor", 4)
SHORT = (*ROPE, "--length", 64, "--steps", 4, "--accumulate", 1, "--learning-rate", 1e-3)
PLAIN = RopeConfig(dims=64, max_position_embeddings=512)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as mlx-lm has it."""
    folder = tmp_path_factory.mktemp("texts")
    pieces = [source()[i : i + 3000] for i in range(0, 30000, 3000)]
    for name, part in {"train": pieces[:8], "valid": pieces[8:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


def arguments(texts: Path, out: Path, *more: object, model: Path = STDLIB_LLAMA) -> tuple[object, ...]:
    return ("finetune", "--model", model, "--data", texts, "--mlx-path", out, *more)


def logits(model: nn.Module) -> mx.array:
    model.set_dtype(mx.float32)
    return model(mx.array([list(range(5, 69))]))


def test_full(run: Any, texts: Path, tmp_path: Path) -> None:
    out, few = tmp_path / "out", tmp_path / "few"
    few.mkdir()
    (few / "train.jsonl").write_text(json.dumps({"text": source()[:600]}) + "\n")
    shutil.copy(few / "train.jsonl", few / "valid.jsonl")
    code, stdout, stderr = run(*arguments(few, out, *SHORT, "--steps", 6, "--batch-size", 2, "--json"))
    assert code == 0, stderr
    found = json.loads(stdout)
    losses = found["losses"]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    assert found["valid_loss"] < losses[0] and found["peak_memory"] > 0
    assert "step 6 of 6: loss" in stderr and "tokens/s" in stderr and "s left" in stderr
    assert found["settings"]["recipe"]["warmup"] == 0 and found["settings"]["recipe"]["beta_2"] == 0.95
    rope = RopeConfig.from_hf(json.loads((out / "config.json").read_text()))
    assert (rope.rope_type, rope.context_length, rope.trained_length) == ("resonance_yarn", 2048, 512)
    before, after = weights(STDLIB_LLAMA), weights(out)
    assert {name: (v.shape, v.dtype) for name, v in before.items()} == {n: (v.shape, v.dtype) for n, v in after.items()}
    assert not mx.array_equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    model, tokenizer = load(out)
    assert mx.all(mx.isfinite(model(mx.array([tokenizer.encode("import os\n")])))).item()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "out"]


@pytest.mark.parametrize("bits", [None, 4], ids=["lora", "qlora"])
def test_lora_is_fused(run: Any, texts: Path, tmp_path: Path, bits: int | None) -> None:
    out, model = tmp_path / "out", STDLIB_LLAMA
    if bits:
        model = convert(STDLIB_LLAMA, tmp_path / "q", quantize=True, q_bits=bits, resonance=False).path
        code, _, stderr = run(*arguments(texts, out, *SHORT, model=model))
        assert code == 2 and "--fine-tune-type lora" in stderr
    lora = ("--fine-tune-type", "lora", "--num-layers", 3, "--grad-checkpoint", "--dtype", "float32")
    code, _, stderr = run(*arguments(texts, out, *SHORT, *lora, model=model))
    assert code == 0, stderr
    after = RopeConfig.from_hf(json.loads((out / "config.json").read_text()))
    base, _ = load_model(model, rope=after)
    plain = logits(base)
    adapted = mlx_lm.utils.load_adapters(base, str(out / "adapters"))
    adapted.eval()
    wanted = logits(adapted)
    assert mx.max(mx.abs(wanted - plain)).item() > 0.01
    assert mx.allclose(logits(load(out)[0]), wanted, rtol=1e-4, atol=1e-4).item()
    assert "quantization" not in json.loads((out / "config.json").read_text())


KILLED = """
import os, signal
from mlx_resonance import cli
from mlx_resonance.finetuning import run
append = run.append_records
def append_and_die(path, lines):
    append(path, lines)
    if lines[0].get("step") == 3:
        os.kill(os.getpid(), signal.SIGKILL)
run.append_records = append_and_die
cli.main()
"""


def test_killed_and_gone_on_with_is_bit_identical(run: Any, texts: Path, tmp_path: Path) -> None:
    options = (*SHORT, "--steps", 6, "--accumulate", 2, "--checkpoint-every", 2, "--grad-checkpoint")
    assert run(*arguments(texts, tmp_path / "whole", *options))[0] == 0
    command = [sys.executable, "-c", KILLED, *map(str, arguments(texts, tmp_path / "killed", *options))]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    code, _, stderr = run(*arguments(texts, tmp_path / "killed", *options, "--seed", 1))
    assert code == 2 and "seed is 0 there, 1 now" in stderr and stderr.count("\n") == 1
    code, _, stderr = run(*arguments(texts, tmp_path / "killed", *options))
    assert code == 0 and "step 1 of 6" not in stderr, stderr
    whole, killed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


@pytest.mark.parametrize("fault", ["interrupted", "full disk", "full disk at the end"])
def test_stopped_and_gone_on_with(
    run: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    options, out = (*SHORT, "--checkpoint-every", 2), tmp_path / "out"
    original, calls = mx.save_safetensors, 0

    def save(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == {"interrupted": 2, "full disk": 2, "full disk at the end": 3}[fault]:
            raise KeyboardInterrupt if fault == "interrupted" else OSError(errno.ENOSPC, "No space left on device")
        original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", save)
        code, _, stderr = run(*arguments(texts, out, *options))
    last = stderr.splitlines()[-1]
    assert code == (130 if fault == "interrupted" else 1)
    assert ("interrupted" if fault == "interrupted" else "No space left") in last
    assert not out.exists()
    code, _, stderr = run(*arguments(texts, out, *options))
    assert code == 0 and "step 2 of" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--data", "empty.jsonl"), "empty.jsonl is empty"),
        (("--data", "wrong.jsonl"), "wrong.jsonl, line 2 has no 'text' that is a text"),
        (("--data", "broken.jsonl"), "broken.jsonl, line 1 is not JSON"),
        (("--data", "short.txt"), "short.txt has 4 tokens, a sequence needs 64"),
        (("--data", "nothing"), "no data at nothing"),
        (("--length", 4096), "length 4096 is longer than the context of 2048 tokens"),
        (("--preset", "paper"), "preset must be one of paper-7b, paper-13b, paper-4k"),
        (("--rope", "resonance_yran"), "unknown rope type 'resonance_yran'"),
        (("--rope", "default"), "takes neither factor nor original length"),
        (("--warmup", 4), "warmup must be shorter than the 4 steps"),
        (("--num-layers", 6), "num_layers must be at most the model's 5"),
        (("--fine-tune-type", "dora"), "fine_tune_type must be full or lora"),
        (("--dtype", "int8"), "dtype must be one of float32"),
        (("--memory", "3300MB", "--length", 2048, "--batch-size", 4), "give --batch-size 1 --accumulate 4"),
        (("--mlx-path", "taken"), "taken exists"),
        (("--steps", 10**20, "--force"), "steps must lie in [1, 2147483647]"),
        (("--seed", 10**20), "seed must lie in [0, 2147483647]"),
        (("--accumulate", 10**9), "accumulate must lie in [1, 65536]"),
        (("--lora-rank", 10**20, "--fine-tune-type", "lora", "--force"), "lora_rank must lie in [1, 65536]"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    run: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("empty.jsonl").write_text("\n")
    Path("wrong.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    Path("broken.jsonl").write_text("{\n")
    Path("short.txt").write_text("import os")
    code, _, stderr = run(*arguments(texts, Path("out"), *SHORT, *change))
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not Path("out").exists() and not Path("out.partial").exists()


def test_computed_again_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(STDLIB_LLAMA)
    finetuning.prepare(model, Recipe(64))
    tokens = mx.array(np.random.default_rng(0).integers(0, 2048, size=(2, 150)))

    def plain(model: nn.Module, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:], reduction="mean")

    wanted, gradients = nn.value_and_grad(model, plain)(model, tokens)
    monkeypatch.setattr(chunks, "POSITIONS", 64)
    monkeypatch.setattr(chunks, "QUERIES", 64)
    call = type(model.layers[0]).__call__
    with chunks.computed_again(model, True):
        assert type(model.layers[0]).__call__ is not call
        loss, found = nn.value_and_grad(model, chunks.next_token_loss)(model, tokens)
        mx.eval(loss, found)
    assert type(model.layers[0]).__call__ is call
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for (name, one), (_, other) in zip(tree_flatten(gradients), tree_flatten(found), strict=True):
        assert mx.max(mx.abs(one - other)).item() <= 1e-5 * mx.max(mx.abs(one)).item(), name


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (128, {}),
        (512, {"grad_checkpoint": True}),
        (512, {"fine_tune_type": "lora"}),
        (128, {"batch_size": 4, "accumulate": 2}),
    ],
    ids=["full", "checkpointed", "lora", "accumulated"],
)
def test_the_plan_is_what_is_used(tmp_path: Path, length: int, changes: dict[str, Any]) -> None:
    recipe = Recipe(**({"length": length, "steps": 2, "accumulate": 1} | changes))
    sequences = np.random.default_rng(0).integers(0, 2048, size=(8, length)).astype(np.int32)
    open_records(tmp_path / finetuning.RECORD, finetuning.KIND, {})
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load_model(STDLIB_LLAMA, lazy=True)
    finetuning.prepare(model, recipe)
    with chunks.computed_again(model, recipe.grad_checkpoint):
        finetuning._train(model, recipe, sequences, tmp_path, 100, None)
    assert plan_training(STDLIB_LLAMA, recipe).total == pytest.approx(mx.get_peak_memory() - before, rel=0.25)


def test_documents_are_packed(texts: Path) -> None:
    tokenizer = load_tokenizer(STDLIB_LLAMA, {})
    one, same, other = (packed([texts / "train.jsonl"], tokenizer, 64, seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    stream = one.reshape(-1)
    assert stream[0] == 0 and (stream == 0).sum() == 8  # <s> before each document, </s> after it
    assert np.array_equal(np.flatnonzero(stream == 1) + 1, np.flatnonzero(stream == 0)[1:][: (stream == 1).sum()])


def test_a_batch_is_of_its_step() -> None:
    batches = Batches(np.arange(10, dtype=np.int32)[:, None], 4, seed=3)
    rows = [np.array(batches(step)[0])[:, 0].tolist() for step in range(5)]
    assert rows[3] == np.array(batches(3)[0])[:, 0].tolist()
    dealt = [row for step in rows for row in step]
    assert sorted(dealt[:10]) == sorted(dealt[10:]) == list(range(10)) and dealt[:10] != dealt[10:]


def test_flags_override_a_preset() -> None:
    llama2 = RopeConfig(dims=128, max_position_embeddings=4096)
    rope, recipe = choose(llama2, "paper-7b")
    assert (rope.rope_type, rope.context_length, recipe.length, recipe.steps, recipe.warmup) == (
        "resonance_yarn", 32768, 32768, 50, 2,
    )  # fmt: skip
    rope, recipe = choose(llama2, "paper-7b", "yarn", 16.0, length=None, steps=7)
    assert (rope.rope_type, rope.context_length, recipe.length, recipe.steps) == ("yarn", 65536, 32768, 7)
    for name in PRESETS:
        assert choose(llama2, name)[1].learning_rate == 2e-5


@pytest.mark.parametrize(
    ("rope", "factor", "found"),
    [(None, None, "default"), ("resonance_default", None, "resonance_default"), ("linear", 2, "linear")],
)
def test_rope(rope: str | None, factor: float | None, found: str) -> None:
    assert choose(PLAIN, None, rope, factor)[0].rope_type == found
