"""Perplexity: YaRN's windows by hand and against transformers, the same numbers however computed or resumed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig
from mlx_resonance.attention import set_rope
from mlx_resonance.errors import UsageError
from mlx_resonance.evaluation import key_tokens, perplexity
from mlx_resonance.evaluation.losses import token_losses
from mlx_resonance.evaluation.perplexity import Subject, run_perplexity, select_documents
from mlx_resonance.evaluation.windows import Document, Options, Protocol, sliding_windows, sums
from mlx_resonance.scaling import named_rope

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from .checkpoints import source


@pytest.fixture(scope="module")
def documents(tokenizer: Any) -> list[Document]:
    texts = [source()[start : start + size] for start, size in ((0, 900), (5000, 60), (9000, 1100))]
    return select_documents(texts, tokenizer, 1, None)[0]


def subject(folder: Path, documents: Sequence[Document], *ropes: str, start: Sequence[int] = (0,)) -> Subject:
    checkpoint = Checkpoint.open(folder)
    # As if it had been trained on 64 tokens: longer windows are beyond that, and dynamic angles change.
    own = RopeConfig.from_hf({**checkpoint.config, "max_position_embeddings": 64})
    settings = [named_rope(own, rope, 4) for rope in ropes or ("default",)]
    return Subject(checkpoint, settings, list(start), documents)


@pytest.mark.parametrize(
    ("arguments", "windows"),
    [
        ((10, 6, 2), [(0, 6, 6), (2, 8, 2), (4, 10, 2)]),
        ((9, 6, 2), [(0, 6, 6), (2, 8, 2), (4, 9, 1)]),
        ((6, 6, 2), [(0, 6, 6)]),
        ((3, 6, 2), [(0, 3, 3)]),
        ((7, 3, 3), [(0, 3, 3), (3, 6, 3), (6, 7, 1)]),
    ],
)
def test_windows_by_hand(arguments: tuple[int, int, int], windows: list[tuple[int, int, int]]) -> None:
    assert sliding_windows(*arguments) == windows


@given(st.integers(1, 300), st.integers(1, 100), st.integers(1, 100))
def test_windows_score_every_token_once(length: int, size: int, stride: int) -> None:
    windows = sliding_windows(length, size, min(stride, size))
    scored = [token for begin, end, new in windows for token in range(end - new, end)]
    assert scored == list(range(length))
    assert all(end - new >= begin and end - begin <= size for begin, end, new in windows)
    assert all(after.begin - before.begin == min(stride, size) for before, after in pairwise(windows))


def test_figures_by_hand() -> None:
    counts = sums([np.array([1, 2, 3], np.float32), np.array([6], np.float32)], last=2)
    assert counts == {"windows": 2, "tokens": 4, "nll": 12, "window_mean_sum": 8, "last_tokens": 3, "last_nll": 11}
    figures = perplexity.summarize([counts, {"windows": 1, "tokens": 1, "nll": 0, "window_mean_sum": 0} | counts])
    assert figures["perplexity_windows"] == pytest.approx(math.exp(4))
    assert figures["perplexity_tokens"] == pytest.approx(math.exp(3))
    assert figures["perplexity_last"] == pytest.approx(math.exp(11 / 3)) and figures["windows"] == 4


def by_transformers(
    folder: Path, documents: Sequence[Document], start: Sequence[int], context: int, stride: int | None, last: int
) -> tuple[float, float, float]:
    """The protocol as transformers' users write it: labels of -100 for unscored tokens; no stride means truncated."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rotary = model.model.rotary_emb
    room, means, counts, tails = context - len(start), [], [], []
    for document in documents:
        ids = document.tokens.tolist() if stride else document.tokens.tolist()[:room]
        seen = 0
        for begin in range(0, len(ids), stride or room):
            stop = min(begin + room, len(ids))
            row = torch.tensor([[*start, *ids[begin:stop]]])
            # A dynamic embedding keeps the angles of the longest text before this one.
            rotary.inv_freq, rotary.max_seq_len_cached = rotary.original_inv_freq, rotary.original_max_seq_len
            labels = row.clone()
            labels[:, : -(stop - seen)] = -100
            with torch.no_grad():
                result = model(row, labels=labels)
            means.append(result.loss.item())
            counts.append(int((labels[:, 1:] != -100).sum()))
            every = torch.nn.functional.cross_entropy(result.logits[0, :-1], row[0, 1:], reduction="none")
            tails.append(every[-last:].mean().item())
            seen = stop
            if stop == len(ids):
                break
    return tuple(float(np.exp(np.average(*of))) for of in ((means,), (means, None, counts), (tails,)))


@pytest.mark.parametrize(
    ("rope", "start", "stride"),
    [(rope, (0,), stride) for rope in ("default", "dynamic", "yarn") for stride in (60, None)]
    + [("linear", (), 60), ("dynamic", (), None)],
)
def test_equals_transformers(
    checkpoint: Path, documents: list[Document], tmp_path: Path, rope: str, start: Sequence[int], stride: int | None
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    chosen = documents if stride else [document for document in documents if len(document.tokens) >= 200]
    measured = subject(folder, chosen, rope, start=start)
    config = {key: value for key, value in measured.checkpoint.config.items() if key != "rope_theta"}
    (folder / "config.json").write_text(json.dumps(config | measured.ropes[0].to_hf("5")))
    protocol = Protocol((200, 100), truncate=stride is None, stride=stride or 256, last=40)
    rows = run_perplexity([measured], protocol, tmp_path / "lines.jsonl", {})
    for row, context in zip(rows, (100, 200), strict=True):
        windows, tokens, last = by_transformers(folder, chosen, start, context, stride, 40)
        assert row["context"] == context and row["documents"] == len(chosen)
        assert row["perplexity_windows"] == pytest.approx(windows, rel=1e-3)
        assert row["perplexity_tokens"] == pytest.approx(tokens, rel=1e-3)
        assert row["perplexity_last"] == (None if stride else pytest.approx(last, rel=1e-3))


@pytest.mark.parametrize("rope", ["default", "dynamic", "resonance_yarn"])
def test_chunks_and_batches_change_nothing(
    checkpoint: Path, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rope: str
) -> None:
    of = subject(checkpoint, documents, rope)
    model = of.checkpoint.with_rope(of.ropes[0]).load()
    rows = np.stack([documents[0].tokens[:150], documents[2].tokens[:150]])
    count: list[int] = []
    whole = token_losses(model, rows, 149)
    monkeypatch.setattr("mlx_resonance.evaluation.losses.LOGITS", 2048 * 7)
    chunked = token_losses(model, rows, 149, step=34, on_tokens=count.append)
    assert count == [34] * 8 + [26] and whole.shape == (2, 149)
    # In float32; how a BLAS sums depends on the shapes and on the machine.
    np.testing.assert_allclose(chunked, whole, atol=1e-4)
    np.testing.assert_allclose(token_losses(model, rows[1:], 20, step=64), whole[1:, -20:], atol=1e-4)
    results = []
    for number, options in enumerate((Options(batch_size=1), Options(batch_size=5), Options(step=64))):
        output = tmp_path / f"{number}.jsonl"
        results.append(run_perplexity([of], Protocol((128,), stride=30), output, {}, options))
    for row in results[1:]:
        assert row[0] == results[0][0] | {key: pytest.approx(row[0][key], rel=1e-5) for key in FIGURES}


FIGURES = ("perplexity_windows", "perplexity_tokens")


@pytest.mark.parametrize("protocol", [Protocol((100, 60, 150), True, last=30), Protocol((150, 100), stride=50)])
def test_a_killed_run_resumes_to_the_same_bytes(
    checkpoint: Path, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: Protocol
) -> None:
    long = [document for document in documents if len(document.tokens) >= 150]
    of, options, output = subject(checkpoint, long, "default", "resonance_yarn"), Options(batch_size=2), tmp_path / "x"
    read: list[tuple[str, int, int]] = []
    rows = run_perplexity([of], protocol, output, {"data": "d"}, options, lambda *at: read.append(at))
    whole = output.read_bytes()
    cells = 2 * len(protocol.contexts)
    assert len(rows) == cells and len(whole.splitlines()) == 1 + cells * len(long)
    assert [done for label, done, total in read if done == total] and all(done <= total for _, done, total in read)
    if protocol.truncate:  # the longest context's tokens are read, no other
        assert read[-1][1] == 2 * 149
    for part in (0.3, 0.55, 0.95):
        output.write_bytes(whole[: int(part * len(whole))])
        assert run_perplexity([of], protocol, output, {"data": "d"}, options) == rows
        assert output.read_bytes() == whole
    monkeypatch.setattr(Checkpoint, "load", None)  # nothing is left to do
    assert run_perplexity([of], protocol, output, {"data": "d"}, options) == rows
    with pytest.raises(UsageError, match='data is "d" there and "e" here'):
        run_perplexity([of], protocol, output, {"data": "e"}, options)


def test_a_swapped_rope_equals_a_loaded_one(checkpoint: Path) -> None:
    opened, tokens = Checkpoint.open(checkpoint), mx.arange(2, 300)[None]
    model, own = opened.load(), opened.own_rope
    for name in ("resonance_yarn", "ntk", "resonance_default", "default"):
        rope = named_rope(own, name, 4)
        set_rope(model, rope)
        loaded = opened.with_rope(rope).load()
        assert mx.array_equal(model(tokens), loaded(tokens)) and model.args.rope == loaded.args.rope
    scaled = named_rope(own, "yarn", 4)
    assert named_rope(scaled, "default", None) == own and scaled.context_length == 2048


def test_a_loss_that_is_not_a_number(checkpoint: Path, documents: list[Document], tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "model")
    weights = mx.load(str(broken / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * math.nan
    mx.save_safetensors(str(broken / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(UsageError, match="loss of document 1 at 100 tokens is nan"):
        run_perplexity([subject(broken, documents)], Protocol((100,), stride=50), tmp_path / "x.jsonl", {})


def test_longppl_equals_its_definition(
    checkpoint: Path, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key tokens and their losses as transformers has them, with short windows of 40 to 55 tokens."""
    monkeypatch.setattr(key_tokens, "SHORT", 40)
    monkeypatch.setattr(key_tokens, "STRIDE", 16)
    monkeypatch.setattr(key_tokens, "GAIN", 0.5)
    long = [document for document in documents if len(document.tokens) >= 150]
    of, other = subject(checkpoint, long), subject(checkpoint, long, "resonance_yarn")
    protocol, output = Protocol((100, 150), truncate=True, last=30), tmp_path / "lines.jsonl"
    rows = run_perplexity([of, other], protocol, output, {}, evaluator=of)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def losses(ids: list[int]) -> Any:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()

    found: dict[int, list[float]] = {100: [], 150: []}
    for document in long:
        ids = [0, *document.tokens[:149].tolist()]
        whole = losses(ids)
        for token in range(40, 150):
            begin = (token - 40) // 16 * 16
            short = losses(ids[begin : token + 1])[-1]
            if short - whole[token - 1] > 0.5 and whole[token - 1] < 2:
                for context in found:
                    found[context] += [whole[token - 1]] if token < context else []
    assert [row["key_tokens"] for row in rows] == [len(found[row["context"]]) for row in rows] and len(found[100]) > 3
    for row in rows[:2]:
        assert row["longppl"] == pytest.approx(np.exp(np.mean(found[row["context"]])), rel=1e-3)
    assert rows[2]["longppl"] != rows[0]["longppl"]  # the same tokens, another model
    whole_log = output.read_bytes()
    output.write_bytes(whole_log[: len(whole_log) // 3])
    assert run_perplexity([of, other], protocol, output, {}, evaluator=of) == rows and output.read_bytes() == whole_log
    with pytest.raises(UsageError, match=r"evaluator is .* there and null here"):
        run_perplexity([of], protocol, output, {})
    monkeypatch.setattr(key_tokens, "GAIN", 99)
    (row,) = run_perplexity([of], Protocol((100,), truncate=True), tmp_path / "none.jsonl", {}, evaluator=of)
    assert (row["longppl"], row["key_tokens"]) == (None, 0)
    with pytest.raises(UsageError, match="picked in one window per document: try truncate=True"):
        run_perplexity([of], Protocol((100,), stride=50), tmp_path / "x.jsonl", {}, evaluator=of)
    unlike = subject(checkpoint, long, start=())
    with pytest.raises(UsageError, match="read the documents as different tokens"):
        run_perplexity([of], Protocol((100,), truncate=True), tmp_path / "x.jsonl", {}, evaluator=unlike)
