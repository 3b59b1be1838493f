"""`finetune`: the model learns a longer context, a killed run resumes bit-identically, mistakes get one line."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig, attend, load
from mlx_resonance.convert import convert
from mlx_resonance.errors import UsageError
from mlx_resonance.finetuning import chunks, result
from mlx_resonance.finetuning import run as finetuning
from mlx_resonance.finetuning.data import Batches, packed
from mlx_resonance.finetuning.memory import plan_training, require_training_memory
from mlx_resonance.finetuning.recipes import PRESETS, Recipe, choose

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from .checkpoints import FITTED_HERE, source, weights

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
def test_lora_is_fused(run: Any, checkpoint: Path, texts: Path, tmp_path: Path, bits: int | None) -> None:
    out, model = tmp_path / "out", checkpoint
    if bits:
        model = convert(checkpoint, tmp_path / "q", quantize=True, q_bits=bits, resonance=False).path
        code, _, stderr = run(*arguments(texts, out, *SHORT, "--fine-tune-type", "full", model=model))
        assert code == 2 and "give --fine-tune-type lora or another --model" in stderr
    lora = (*(["--length", 24] if bits else ["--fine-tune-type", "lora"]), "--num-layers", 3, "--dtype", "float32")
    code, _, stderr = run(*arguments(texts, out, *SHORT, *lora, model=model))
    assert code == 0, stderr
    after = RopeConfig.from_hf(json.loads((out / "config.json").read_text()))
    base = Checkpoint.open(model).with_rope(after).load()
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
from mlx_resonance.run_log import RunLog
append = RunLog.append
def append_and_die(log, line):
    append(log, line)
    if line["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
RunLog.append = append_and_die
cli.main()
"""


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--accumulate", 2), id="full", marks=pytest.mark.long),
        pytest.param(("--q-bits", 4, "--length", 16), id="qlora"),
    ],
)
def test_a_killed_run_resumes_bit_identical(
    run: Any, checkpoint: Path, texts: Path, tmp_path: Path, more: tuple[object, ...]
) -> None:
    options = ("--model", checkpoint, *SHORT, "--steps", 4, "--checkpoint-every", 2, *more)
    assert run(*arguments(texts, tmp_path / "whole", *options))[0] == 0
    command = [sys.executable, "-c", KILLED, *map(str, arguments(texts, tmp_path / "killed", *options))]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    code, _, stderr = run(*arguments(texts, tmp_path / "killed", *options, "--seed", 1))
    assert code == 2 and "seed is 0 there and 1 here" in stderr and "give another --mlx-path" in stderr
    assert stderr.count("\n") == 1
    code, _, stderr = run(*arguments(texts, tmp_path / "killed", *options, "--q-bits", 8))
    differs = "q_bits is 4 there and 8 here" if "--q-bits" in more else 'fine_tune_type is "full" there and "lora" here'
    assert code == 2 and differs in stderr and stderr.count("\n") == 1
    code, _, stderr = run(*arguments(texts, tmp_path / "killed", *options))
    assert code == 0 and "step 1 of 4" not in stderr, stderr
    whole, killed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


@pytest.mark.parametrize("fault", ["interrupted", "full disk", "full disk at the end"])
def test_a_stopped_run_resumes(
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
        if fault == "full disk at the end":
            patch.setattr(result, "_write", save)
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
        (("--data", "wrong.jsonl"), "wrong.jsonl, line 2 has no 'text' that is a "),
        (("--data", "broken.jsonl"), "broken.jsonl, line 1 is not JSON"),
        (("--data", "chats.json"), "chats.json: the suffix must be one of .txt, .md, .tex, .py, .jsonl"),
        (("--data", "short.txt"), "short.txt has 4 tokens, a sequence needs 64: give another --data or --length"),
        (("--data", "nothing"), "nothing: no such folder or file (--data)"),
        (("--length", 4096), "length 4096 exceeds the context of 2048 tokens"),
        (("--length", 4096), "give --rope resonance_yarn --factor 8 or --length 2048"),
        (("--preset", "paper"), "'paper' is not one of 'paper-7b', 'paper-13b', 'paper-4k'"),
        (
            ("--rope", "resonance_yran"),
            "rope must be one of default, linear, ntk, dynamic, yarn, each also as resonance_…",
        ),
        (("--rope", "default"), "rope type default has no scaling: it takes no factor"),
        (("--warmup", 4), "warmup must be less than the 4 steps, got 4 (--warmup)"),
        (("--num-layers", 6), "num_layers must be at most the model's 5, got 6 (--num-layers)"),
        (("--fine-tune-type", "dora"), "'dora' is not one of 'full', 'lora'"),
        (("--dtype", "int8"), "'float32', 'float16', 'bfloat16'"),
        (("--memory", "3500MB", "--length", 2048, "--batch-size", 4), "give --batch-size 1 --accumulate 4"),
        (("--mlx-path", "taken"), "taken exists: give another --mlx-path"),
        (("--steps", 10**20, "--force"), "'--steps': Input should be less than or equal to 2147483647"),
        (("--seed", 10**20), "'--seed': Input should be less than or equal to 2147483647"),
        (("--accumulate", 10**9), "'--accumulate': Input should be less than or equal to 65536"),
        (("--lora-rank", 10**20, "--fine-tune-type", "lora", "--force"), "'--lora-rank': Input should be less"),
        (("--learning-rate", 0), "learning_rate must be in (0, 1), got 0.0 (--learning-rate)"),
    ],
)
def test_a_mistake_gets_one_line(
    run: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("empty.jsonl").write_text("\n")
    Path("wrong.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    Path("broken.jsonl").write_text("{\n")
    Path("short.txt").write_text("import os")
    Path("chats.json").write_text('[{"messages": [{"role": "user", "content": "A"}]}]')
    code, _, stderr = run(*arguments(texts, Path("out"), *SHORT, *change))
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not Path("out").exists() and not Path("out.partial").exists()


def test_a_weight_beyond_float16_is_refused_before_training(
    run: Any, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    """As by convert; with another type the same folder is used."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    weights = mx.load(str(model / "model.safetensors"))
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][0, 0] = 70000.0
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    for kind in ((), ("--fine-tune-type", "lora")):
        out = tmp_path / f"out{len(kind)}"
        code, _, stderr = run(*arguments(texts, out, *SHORT, *kind, "--dtype", "float16", model=model))
        last = stderr.splitlines()[-1]
        assert (
            code == 2 and f"{name} has a value of 70000, beyond the range of float16" in last and "step" not in stderr
        )
        assert last.endswith("give --dtype float32 or --dtype bfloat16") and not out.exists()
    code, _, stderr = run(*arguments(texts, out, *SHORT, *kind, "--dtype", "bfloat16", model=model))
    assert code == 0, stderr
    half = {n: value if n == name else value.astype(mx.float16) for n, value in weights.items()}  # float16 by itself
    mx.save_safetensors(str(model / "model.safetensors"), half, {"format": "mlx"})
    code, _, stderr = run(*arguments(texts, tmp_path / "half", *SHORT, *kind, model=model))
    assert code == 2 and f"{name} has a value of 70000, beyond the range of float16" in stderr


def test_the_range_is_checked_without_holding_the_model(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    size = sum(value.nbytes for _, value in tree_flatten(opened.load().parameters()))
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result.check_range(opened, "float16")
    assert mx.get_active_memory() - before < size / 8 and mx.get_peak_memory() - before < 0.75 * size


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "granite", "smollm3"])
def test_checkpointed_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Of every model type, and with the loss in chunks; the attention of each layer is recomputed in parts."""
    config = {
        "model_type": kind, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "head_dim": 16, "tie_word_embeddings": kind == "qwen2",
    }  # fmt: skip
    if kind == "granite":
        config |= dict.fromkeys(("logits_scaling", "attention_multiplier"), 0.5)
        config |= dict.fromkeys(("embedding_multiplier", "residual_multiplier"), 2.0)
        config |= {"attention_bias": False, "mlp_bias": False}
    mx.random.seed(0)
    model = Checkpoint.of(kind, Path(), config | {"rope_theta": 10000.0}, {}).build()
    finetuning.prepare(model, Recipe(64))
    tokens = mx.array(np.random.default_rng(0).integers(0, 256, size=(2, 150)))

    def plain(model: nn.Module, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:], reduction="mean")

    wanted, gradients = nn.value_and_grad(model, plain)(model, tokens)
    lengths, original = [], mx.fast.scaled_dot_product_attention

    def counted(queries: mx.array, *args: Any, **options: Any) -> mx.array:
        lengths.append(queries.shape[2])
        return original(queries, *args, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(chunks, "LOGITS", 64 * chunks.COPIES * 4 * 256)  # of 64 tokens
    monkeypatch.setattr(chunks, "QUERIES", 64)
    before = type(model.layers[0]).__call__, attend.attend
    with chunks.activation_checkpointing(model):
        loss, found = nn.value_and_grad(model, chunks.next_token_loss)(model, tokens)
        mx.eval(loss, found)
    assert (type(model.layers[0]).__call__, attend.attend) == before
    forward, backward = [64, 64, 22], [22, 64, 64]
    assert lengths == 4 * forward + 4 * (forward + backward)  # of each layer
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for (name, one), (_, other) in zip(tree_flatten(gradients), tree_flatten(found), strict=True):
        assert mx.max(mx.abs(one - other)).item() <= 1e-5 * mx.max(mx.abs(one)).item(), name


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (128, {}),
        (512, {"grad_checkpoint": False}),
        (128, {"batch_size": 4, "accumulate": 2}),
    ],
    ids=["full", "kept", "accumulated"],
)
def test_the_plan_matches_the_memory_used(tmp_path: Path, length: int, changes: dict[str, Any]) -> None:
    recipe = Recipe(**({"length": length, "steps": 2, "accumulate": 1} | changes))
    sequences = np.random.default_rng(0).integers(0, 2048, size=(8, length)).astype(np.int32)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    checkpoint = Checkpoint.open(STDLIB_LLAMA)
    model = checkpoint.load(lazy=True)
    finetuning.prepare(model, recipe)
    with chunks.activation_checkpointing(model, recipe.grad_checkpoint):
        finetuning._train(model, recipe, sequences, finetuning.open_log(tmp_path, {}, "tiny"), 100, None)
    plan, found = plan_training(checkpoint, recipe), mx.get_peak_memory() - before
    assert plan.weights < found  # both exact
    assert not FITTED_HERE or plan.total == pytest.approx(found, rel=0.25)


def test_remedies_make_a_run_fit() -> None:
    checkpoint, memory = Checkpoint.open(STDLIB_LLAMA), 3_500_000_000
    recipe = Recipe(2048, batch_size=4, accumulate=1)
    with pytest.raises(UsageError, match=r"4 × 2,048 tokens need .* the limit is 278\.8 MB: try batch_size=1") as error:
        require_training_memory(checkpoint, recipe, memory)
    change, force = error.value.remedies
    assert change["accumulate"] == 4 and force == {"force": True}
    assert plan_training(checkpoint, replace(recipe, **change), memory).fits
    with pytest.raises(UsageError, match="only a smaller model would fit: try force=True"):
        require_training_memory(checkpoint, recipe, memory - 275_000_000)


def test_documents_are_packed(texts: Path, tokenizer: Any) -> None:
    one, same, other = (packed([texts / "train.jsonl"], tokenizer, 64, seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    stream = one.reshape(-1)
    assert stream[0] == 0 and (stream == 0).sum() == 8  # <s> before each document, </s> after it
    assert np.array_equal(np.flatnonzero(stream == 1) + 1, np.flatnonzero(stream == 0)[1:][: (stream == 1).sum()])


def test_a_batch_depends_only_on_its_step() -> None:
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
