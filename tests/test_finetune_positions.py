"""Skipped positions: they cover the context, and a model sees them as it sees those of a long text."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, ResonanceRoPE, RopeConfig
from mlx_resonance.errors import UsageError
from mlx_resonance.finetuning import chunks, finetune
from mlx_resonance.finetuning import run as finetuning
from mlx_resonance.finetuning.data import Batches, packed
from mlx_resonance.finetuning.positions import caches_at, skipped_positions
from mlx_resonance.finetuning.recipes import Recipe
from mlx_resonance.inspection import training_of
from mlx_resonance.kernels import gpu, kernel, trial
from mlx_resonance.rope import expect

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from . import rotations
from .checkpoints import STDLIB_LLAMA, source
from .random_models import FACTOR, ORIGINAL, make
from .rotations import YARN

CONTEXT = ORIGINAL * FACTOR
SCALED = {"factor": float(FACTOR), "original_max_position_embeddings": ORIGINAL}
ROPES = {
    "default": {},
    "resonance_yarn": SCALED,
    "dynamic": {"factor": 2.0},
    "resonance_longrope": SCALED | {"short_factor": [1.0] * 8, "long_factor": [1.0 + i / 2 for i in range(8)]},
}


def checkpoint(folder: Path, kind: str = "llama", rope_type: str = "resonance_yarn") -> Checkpoint:
    length = CONTEXT // 2 if rope_type == "dynamic" else CONTEXT
    rope = RopeConfig(16, rope_type=rope_type, max_position_embeddings=length, parameters=ROPES.get(rope_type, SCALED))
    return Checkpoint.open(make(folder / "model", kind, rope, "5"))


def a_step(rows: int = 2, length: int = 48) -> tuple[mx.array, mx.array]:
    """Tokens, and positions that skip."""
    tokens = np.random.default_rng(0).integers(2, 2048, size=(rows, length))
    return mx.array(tokens), mx.array(skipped_positions(np.arange(rows), length, CONTEXT, seed=3))


def test_positions_cover_the_context() -> None:
    length, context = 10, 64
    positions = skipped_positions(np.arange(3000), length, context, seed=0)
    jumps = np.diff(positions)
    assert positions.dtype == np.int32 and (positions[:, 0] == 0).all() and (jumps >= 1).all()
    assert ((jumps > 1).sum(axis=1) <= 1).all() and not (jumps[:, length // 2 :] > 1).any()
    assert sorted(set(positions.flatten())) == list(range(context))
    assert set(np.argmax(jumps > 1, axis=1)[(jumps > 1).any(axis=1)]) == set(range(length // 2))
    counts = np.bincount(positions[:, -1], minlength=context)[length - 1 :]
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 1.7 * counts.mean()


def test_positions_depend_on_the_number_of_the_sequence_alone() -> None:
    sequences = np.arange(70, dtype=np.int32).reshape(7, 10)
    whole = [Batches(sequences, 6, seed=1, context=99)(step) for step in range(4)]
    parts = [Batches(sequences, 2, seed=1, context=99)(step) for step in range(12)]
    for i in range(3):  # tokens, weights, positions
        assert np.array_equal(np.concatenate([step[i] for step in whole]), np.concatenate([step[i] for step in parts]))
    again = Batches(sequences, 6, seed=1, context=99)(3)
    assert np.array_equal(again[2], whole[3][2]) and not np.array_equal(whole[2][2], whole[3][2])
    assert not np.array_equal(Batches(sequences, 6, seed=2, context=99)(3)[2], whole[3][2])
    assert np.array_equal(whole[0][1], np.ones((6, 10)))
    assert not np.array_equal(whole[0][2][0], whole[1][2][1])  # numbers 0 and 7: another pass, other positions


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_positions_rotate_as_offsets_do(monkeypatch: pytest.MonkeyPatch, backend: str, traditional: bool) -> None:
    """Bit for bit, far out, the gradients too; on a GPU the kernel is launched once."""
    launches = []

    def launch(_: str, xs: list[mx.array], offset: mx.array, *rest: Any) -> list[mx.array]:
        launches.append([x.shape for x in xs])
        return gpu.twin([mx.stop_gradient(x) for x in xs], offset, *rest)

    if backend == "gpu":
        monkeypatch.setattr(trial, "current_backend", lambda: "metal")
        monkeypatch.setattr(trial, "can_rotate", lambda *_: True)
        monkeypatch.setattr(kernel, "launch", launch)
        gpu._rotation.cache_clear()
    rope = ResonanceRoPE(YARN, traditional)
    q, k = (mx.array(rotations.normal(2, heads, 9, 136, seed=heads)) for heads in (4, 2))
    starts, cut = [1_000_003, 2**31 - 9], 4
    positions = mx.array([[*range(cut), *range(start, start + 9 - cut)] for start in starts])

    def by_positions(q: mx.array, k: mx.array) -> mx.array:
        return mx.concatenate(rope.rotate(q, k, positions), axis=1)

    def by_offsets(q: mx.array, k: mx.array) -> mx.array:
        near = rope.rotate(q[:, :, :cut], k[:, :, :cut], 0)
        far = rope.rotate(q[:, :, cut:], k[:, :, cut:], mx.array(starts))
        return mx.concatenate([mx.concatenate(pair, axis=2) for pair in zip(near, far, strict=True)], axis=1)

    assert mx.array_equal(by_positions(q, k), by_offsets(q, k)).item()
    for one, other in zip(rope.rotate(q, k, positions[:1]), rope.rotate(q, k, positions[[0, 0]]), strict=True):
        assert mx.array_equal(one, other).item()
    assert backend == "cpu" or launches[0] == [(2, 4, 9, 136), (2, 2, 9, 136)]
    cotangent = mx.array(rotations.normal(2, 6, 9, 136))
    (_, found), (_, wanted) = (mx.vjp(call, [q, k], [cotangent]) for call in (by_positions, by_offsets))
    assert all(mx.array_equal(one, other).item() for one, other in zip(found, wanted, strict=True))
    gpu._rotation.cache_clear()


@pytest.mark.parametrize("compiled", [False, True])
def test_without_skips_the_step_is_the_plain_one(tmp_path: Path, compiled: bool) -> None:
    """Bit for bit, loss and gradients."""
    model = checkpoint(tmp_path).load()
    tokens, positions = a_step()[0], mx.broadcast_to(mx.arange(48), (2, 48))
    step: Any = partial(nn.value_and_grad(model, chunks.next_token_loss), model)
    step = mx.compile(step) if compiled else step
    plain, placed = step(tokens), step(tokens, mx.ones(tokens.shape), positions)
    for (name, one), (_, other) in zip(tree_flatten(plain), tree_flatten(placed), strict=True):
        assert mx.array_equal(one, other).item(), name


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_logits_are_those_of_transformers_at_the_same_positions(tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ours = checkpoint(tmp_path, kind, "yarn").load()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens, positions = a_step()
    hidden = ours.model(tokens, caches_at(ours, positions))
    logits = np.array(ours.model.embed_tokens.as_linear(hidden))
    with torch.no_grad():
        wanted = theirs(torch.tensor(np.array(tokens)), position_ids=torch.tensor(np.array(positions))).logits.numpy()
    assert np.abs(logits - wanted).max() <= 1e-4 * np.abs(wanted).max()
    plain = np.array(ours(tokens))
    assert np.abs(plain - wanted).max() > 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(
    ("kind", "rope_type"),
    [("llama", name) for name in ROPES] + [("granite", "resonance_yarn"), ("smollm3", "resonance_yarn")],
)
def test_a_skip_is_a_gap_that_nobody_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, checkpointing: bool, rope_type: str
) -> None:
    """The loss and its gradients are those of a sequence as long as the context, whose other tokens are masked out.

    Under activation checkpointing, too, which recomputes the layers after the forward pass is done. Where the angles
    change with the length, they are those of the whole context.
    """
    model = checkpoint(tmp_path, kind, rope_type).load()
    finetuning.prepare(model, Recipe(48))
    tokens, positions = a_step()
    expect(model, CONTEXT)

    @partial(mx.compile, inputs=model.state, outputs=model.state)
    def skipping(tokens: mx.array, positions: mx.array) -> Any:
        return nn.value_and_grad(model, chunks.next_token_loss)(model, tokens, None, positions)

    monkeypatch.setattr(chunks, "QUERIES", 20)
    with chunks.activation_checkpointing(model, checkpointing):
        loss, gradients = skipping(tokens, positions)
        mx.eval(loss, gradients)
    places = np.array(positions)
    rows = np.arange(2)[:, None]
    filled, there = np.full((2, CONTEXT), 7), np.zeros((2, CONTEXT), dtype=bool)
    filled[rows, places], there[rows, places] = np.array(tokens), True
    mask = mx.array(np.tril(np.ones((CONTEXT, CONTEXT), dtype=bool)) & there[:, None, None, :])
    monkeypatch.setattr(sys.modules[type(model.model).__module__], "create_attention_mask", lambda *_, **__: mask)

    def full(model: nn.Module, filled: mx.array) -> mx.array:
        logits = mx.take_along_axis(model(filled), mx.array(places)[..., None], axis=1)
        return nn.losses.cross_entropy(logits[:, :-1], tokens[:, 1:], reduction="mean")

    wanted, others = nn.value_and_grad(model, full)(model, mx.array(filled))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for (name, one), (_, other) in zip(tree_flatten(gradients), tree_flatten(others), strict=True):
        assert mx.max(mx.abs(one - other)).item() <= 1e-4 * mx.max(mx.abs(other)).item(), name
    assert model.model.rope.frequencies == model.args.rope.frequencies(CONTEXT)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(source()[:3000])
    return tmp_path / "text.txt"


ROPE = {"rope": "resonance_yarn", "factor": 4.0}


def test_a_stopped_run_resumes_with_the_same_positions(text: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"length": 32, "steps": 4, "accumulate": 2, "learning_rate": 1e-3, "grad_checkpoint": True}
    values |= ROPE | {"skip_positions": True, "checkpoint_every": 1}

    def stop(_: Recipe, step: int, *__: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole = finetune(STDLIB_LLAMA, text, tmp_path / "whole", **values)
    with pytest.raises(KeyboardInterrupt):
        finetune(STDLIB_LLAMA, text, tmp_path / "stopped", **values, on_step=stop)
    resumed = finetune(STDLIB_LLAMA, text, tmp_path / "stopped", **values)
    assert resumed["losses"] == whole["losses"] and whole["settings"]["recipe"]["skip_positions"] is True
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]
    header = json.loads((tmp_path / "whole" / "finetune.jsonl").read_text().splitlines()[0])
    assert '"skip_positions": true' in json.dumps(header)
    # `inspect` measures from the positions that it was trained with: those of the whole context, or of a sequence.
    opened = Checkpoint.open(tmp_path / "whole")
    assert training_of(tmp_path / "whole", opened.rope).length == 2048
    plain = finetune(STDLIB_LLAMA, text, tmp_path / "plain", **values | {"skip_positions": False})
    assert training_of(tmp_path / "plain", opened.rope).length == 32
    assert abs(plain["losses"][0] - whole["losses"][0]) > 1e-3


def test_the_command(run: Any, text: Path, tmp_path: Path) -> None:
    """Without --length, a sequence is as long as the context before scaling; angles are those of the whole context."""
    more = ("--rope", "dynamic", "--factor", 2, "--steps", 1, "--accumulate", 1, "--skip-positions", "--json")
    code, stdout, stderr = run(
        "finetune", "--model", STDLIB_LLAMA, "--data", text, "--mlx-path", tmp_path / "out", *more
    )
    assert code == 0, stderr
    found = json.loads(stdout)
    recipe = found["settings"]["recipe"]
    assert recipe["length"] == 512 and recipe["skip_positions"] is True
    rope = RopeConfig(64, rope_type="dynamic", max_position_embeddings=512, parameters={"factor": 2.0})
    source = Checkpoint.open(STDLIB_LLAMA).with_rope(rope)
    model, sequences = source.load(), packed([text], source.tokenizer, 512, seed=0)
    model.set_dtype(mx.float32)
    tokens, _, positions = Batches(sequences, 1, 0, context=1024)(0)
    assert positions.max().item() > 512
    expect(model, 1024)
    assert found["losses"][0] == pytest.approx(chunks.next_token_loss(model, tokens, None, positions).item(), rel=1e-5)


@pytest.mark.parametrize("more", [(), ("--length", 2048, "--rope", "resonance_yarn", "--factor", 4)])
def test_nothing_to_skip(run: Any, text: Path, tmp_path: Path, more: tuple[object, ...]) -> None:
    arguments = ("--model", STDLIB_LLAMA, "--data", text, "--mlx-path", tmp_path / "out", "--skip-positions", *more)
    code, _, stderr = run("finetune", *arguments)
    length = 2048 if more else 512
    assert code == 2 and stderr.count("\n") == 1
    longer = "another --factor" if more else "--rope resonance_yarn another --factor"
    assert f"{length} of {length} tokens leave nothing to skip: give another --length or {longer}" in stderr


def test_angles_that_change_with_the_length_need_one() -> None:
    """The positions of all tokens do not say how long the text is that they stand for."""
    rope = RopeConfig(64, rope_type="dynamic", max_position_embeddings=512, parameters={"factor": 2.0})
    layer = ResonanceRoPE(rope.frequencies)
    positions = mx.array([[0, 700]])
    with pytest.raises(UsageError, match="the angles change with the length of the text"):
        layer.angles(2, positions)
    layer.expect(1024)
    layer.angles(2, positions)
