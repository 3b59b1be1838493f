"""PosGen's decoder: the official one is torch's twin, and text it generates is what it predicts token by token."""

from __future__ import annotations

import math
from dataclasses import replace

from mlx_resonance import ResonanceRoPE
from mlx_resonance.posgen import evaluate, model
from mlx_resonance.posgen.data import make_table, tokens
from mlx_resonance.posgen.evaluate import generated, teacher_forced
from mlx_resonance.posgen.model import Decoder, Dropout
from mlx_resonance.posgen.settings import PRESETS, Settings
from mlx_resonance.posgen.tasks import SUBTASKS, Task
from mlx_resonance.posgen.train import Run, run_training

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlx.utils import tree_flatten

from . import oracle, posgen_torch

VOCABULARY = 17 + 5
SMOKE, OFFICIAL = PRESETS["smoke"], PRESETS["official"]
COT = Task("cot")


def rows(count: int, length: int) -> np.ndarray:
    """Token ids of real sequences, `count` of every subtask, shape (3 · count, 1 + length)."""
    return np.concatenate([tokens(make_table(Task(name), "disjoint", count, length), 17) for name in SUBTASKS])


def rope(settings: Settings, encoding: str) -> ResonanceRoPE:
    readings = settings.readings([encoding])
    return Run(COT, settings, readings, 0).rope(readings[0])


def torch_tables(settings: Settings, encoding: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of an encoding that is scaled to the test length, by the oracle."""
    dims, base, scale = settings.model.head_dim, 10000.0, 1.0
    wavelengths = oracle.rope_wavelengths(dims, base)
    if encoding.endswith("yarn"):
        factor = (settings.test_length + 1) / (settings.train_length + 1)
        original = settings.ramps[0]
        wavelengths = oracle.yarn_wavelengths(dims, base, factor, original, beta_fast=2, beta_slow=1)
        scale = oracle.yarn_attention_scale(factor)
    if encoding.startswith("resonance"):
        wavelengths = oracle.resonate(wavelengths)
    return posgen_torch.tables(oracle.angles(range(length), wavelengths), scale)


def twin(decoder: Decoder) -> posgen_torch.Decoder:
    result = posgen_torch.Decoder(decoder.config, VOCABULARY)
    result.load_state_dict(posgen_torch.translated(tree_flatten(decoder.parameters())))
    return result.eval()


@pytest.fixture(scope="module")
def official() -> Decoder:
    return Decoder(OFFICIAL.model, VOCABULARY, 3)


@pytest.fixture
def smoke() -> Decoder:
    return Decoder(SMOKE.model, VOCABULARY, 3)


# --- the other side


@pytest.mark.parametrize("encoding", ["rope", "yarn", "resonance_rope", "resonance_yarn"])
def test_official_logits_equal_torchs(official: Decoder, encoding: str) -> None:
    ids = rows(1, 256)
    cos, sin = torch_tables(OFFICIAL, encoding, 257)
    ours = np.array(official(mx.array(ids), rope(OFFICIAL, encoding)))
    assert ours.shape == (3, 257, VOCABULARY)
    with torch.no_grad():
        theirs = twin(official)(torch.tensor(ids), cos, sin).numpy()
    assert np.abs(ours - theirs).max() < 3e-5


class Recorded(Dropout):
    """Dropout that records its factors."""

    factors: list[np.ndarray]

    def __call__(self, x: mx.array) -> mx.array:
        factor = super().__call__(mx.ones_like(x))
        self.factors.append(np.array(mx.stop_gradient(factor)))
        return x * factor


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("preset", ["smoke", "two official layers"])
def test_gradients_equal_torchs(monkeypatch: pytest.MonkeyPatch, preset: str, dropout: bool) -> None:
    """With dropout, torch's twin drops what ours dropped, at the same places in the same order."""
    settings = SMOKE if preset == "smoke" else replace(OFFICIAL, model=replace(OFFICIAL.model, layers=2))
    decoder = Decoder(settings.model, VOCABULARY, 3)
    ids, turning, start = rows(1, 24), rope(settings, "resonance_yarn"), COT.seed_length
    Recorded.factors = []
    monkeypatch.setattr(model, "Dropout", Recorded)
    key = mx.array([3, 0], dtype=mx.uint32) if dropout else None

    def loss(decoder: Decoder) -> mx.array:
        logits = decoder(mx.array(ids[:, :-1]), turning, dropout_key=key, start=start)
        return nn.losses.cross_entropy(logits, mx.array(ids[:, start + 1 :]), reduction="mean")

    ours, gradients = nn.value_and_grad(decoder, loss)(decoder)
    assert len(Recorded.factors) == (2 + 4 * settings.model.layers if dropout else 0)
    cos, sin = torch_tables(settings, "resonance_yarn", 24)
    left = [torch.tensor(factor) for factor in Recorded.factors]
    monkeypatch.setattr(F, "dropout", lambda x, rate: x * left.pop(0) if dropout else x)
    other = twin(decoder)
    logits = other(torch.tensor(ids[:, :-1]), cos, sin, start)
    theirs = F.cross_entropy(logits.flatten(0, 1), torch.tensor(ids[:, start + 1 :]).long().flatten())
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    found = posgen_torch.translated(tree_flatten(gradients))
    expected = {name: weight.grad for name, weight in other.named_parameters() if weight.requires_grad}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


# --- initial values


def test_initial_values_match_t5s(official: Decoder) -> None:
    config = OFFICIAL.model
    inner = config.heads * config.head_dim
    deviations = {
        "q": (config.hidden_size * config.head_dim) ** -0.5,
        "k": config.hidden_size**-0.5,
        "v": config.hidden_size**-0.5,
        "o": inner**-0.5,
        "wi": config.hidden_size**-0.5,
        "wo": config.intermediate_size**-0.5,
        "embedding": 1.0,
    }
    drawn = []
    for decoder in (official, Decoder(OFFICIAL.model, VOCABULARY, 5)):
        for name, value in tree_flatten(decoder.parameters()):
            array = np.array(value)
            if name.endswith("weight"):
                assert (array == 1).all(), name
                continue
            deviation = deviations[name.rpartition(".")[-1]]
            assert abs(array.mean()) < 5 * deviation / math.sqrt(array.size), name
            assert array.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * array.size)), name
            drawn.append(array.ravel()[:10_000] / deviation)
    # No two arrays are the same draw, whether from one seed or from two.
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 6 / math.sqrt(10_000)


def test_initial_values_depend_on_the_seed_alone(smoke: Decoder) -> None:
    mx.random.seed(1)
    again = dict(tree_flatten(Decoder(SMOKE.model, VOCABULARY, 3).parameters()))
    other = dict(tree_flatten(Decoder(SMOKE.model, VOCABULARY, 5).parameters()))
    for name, value in tree_flatten(smoke.parameters()):
        assert mx.array_equal(value, again[name]), name
        assert name.endswith("weight") or not mx.array_equal(value, other[name]), name


def test_the_official_feed_forward_is_not_trained(official: Decoder) -> None:
    names = {name for name, _ in tree_flatten(official.trainable_parameters())}
    frozen = {name for name, _ in tree_flatten(official.parameters())} - names
    parts = ("feed_forward_norm.weight", "feed_forward.wi", "feed_forward.wo")
    assert frozen == {f"layers.{i}.{part}" for i in range(6) for part in parts}

    small = replace(OFFICIAL.model, layers=1)
    run = Run(
        COT, replace(OFFICIAL, model=small, sizes=(8, 2, 2), batch_size=8, epochs=2), OFFICIAL.readings(["rope"]), 3
    )
    before = dict(tree_flatten(run.model().parameters()))
    for name, value in tree_flatten(run_training(run)[0].parameters()):
        assert mx.array_equal(value, before[name]).item() == (name in frozen), name


# --- dropout


def test_every_call_and_every_key_draws_new_dropout() -> None:
    x = mx.ones(1000)
    drop = Dropout(0.5, mx.array([3, 0], dtype=mx.uint32))
    draws = [drop(x), drop(x)]
    draws += [Dropout(0.5, mx.array(key, dtype=mx.uint32))(x) for key in ([3, 64], [5, 0])]
    assert np.abs(np.corrcoef(np.stack(draws)) - np.eye(4)).max() < 0.2


def test_dropout_keeps_the_mean() -> None:
    count = 10**6
    dropped = np.array(Dropout(0.1, mx.array([3, 0], dtype=mx.uint32))(mx.ones(count)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.9)}
    assert dropped.mean() == pytest.approx(1, abs=5 * math.sqrt(0.1 / 0.9 / count))


def test_logits_with_dropout(smoke: Decoder) -> None:
    ids, turning = mx.array(rows(1, 24)), rope(SMOKE, "rope")
    key = mx.array([3, 64], dtype=mx.uint32)
    dropped = smoke(ids, turning, dropout_key=key)
    assert mx.array_equal(dropped, smoke(ids, turning, dropout_key=key))
    assert mx.abs(dropped - smoke(ids, turning, dropout_key=key + 64)).max().item() > 0.1
    assert mx.abs(dropped - smoke(ids, turning)).max().item() > 0.1
    without = Decoder(replace(SMOKE.model, dropout=0.0), VOCABULARY, 3)
    assert mx.array_equal(without(ids, turning, dropout_key=key), smoke(ids, turning))


# --- token by token


@pytest.mark.parametrize("changed", [0, 5, 24])
def test_a_token_changes_no_logits_before_it(smoke: Decoder, changed: int) -> None:
    ids, turning = rows(1, 24), rope(SMOKE, "resonance_yarn")
    other = ids.copy()
    other[:, changed] = (other[:, changed] + 1) % 17
    one, two = smoke(mx.array(ids), turning), smoke(mx.array(other), turning)
    difference = np.abs(np.array(one - two)).max(axis=(0, 2))
    assert (difference[:changed] < 1e-6).all()
    assert (difference[changed:] > 1e-3).all()


@pytest.mark.parametrize("start", [0, 1, 4, 24])
def test_logits_from_a_start_on(smoke: Decoder, start: int) -> None:
    ids, turning = mx.array(rows(1, 24)), rope(SMOKE, "rope")
    np.testing.assert_allclose(smoke(ids, turning, start=start), smoke(ids, turning)[:, start:], rtol=0, atol=1e-5)


def slowly_written(decoder: Decoder, turning: ResonanceRoPE, ids: np.ndarray, given: int) -> np.ndarray:
    """Token ids, shape (N, 1 + L): after the first `given`, each is the most likely one in a whole pass."""
    written = ids.copy()
    for position in range(given, ids.shape[1]):
        written[:, position] = mx.argmax(decoder(mx.array(written[:, :position]), turning)[:, -1], axis=-1)
    return written


@pytest.mark.parametrize("encoding", ["rope", "resonance_yarn"])
@pytest.mark.parametrize("prompt", [4, 12, 23])
def test_generation_equals_a_pass_for_every_token(monkeypatch: pytest.MonkeyPatch, encoding: str, prompt: int) -> None:
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", 4)  # the last chunk is a shorter one
    decoder = Decoder(replace(SMOKE.model, layers=2), VOCABULARY, 3)
    # An untrained decoder repeats the last token: it outweighs the attention, and the embedding is tied.
    decoder.norm.weight = mx.random.normal(decoder.norm.weight.shape, key=mx.random.key(1))
    for layer in decoder.layers:
        layer.attention.q, layer.attention.o = 4 * layer.attention.q, 4 * layer.attention.o
    ids, turning = rows(3, 24), rope(SMOKE, encoding)
    written = slowly_written(decoder, turning, ids, 1 + prompt)
    assert (written[:, 1 + prompt :] != written[:, prompt:-1]).mean() > 0.4
    expected = (written == ids)[:, 1 + prompt :].sum(axis=0)
    assert (expected < len(ids)).any()
    assert np.array_equal(generated(decoder, turning, ids[:, 1:], COT, prompt), expected)
    # Rows that the decoder wrote itself: all of its tokens are right.
    assert (generated(decoder, turning, written[:, 1:], COT, prompt) == len(ids)).all()


def test_teacher_forced_counts(monkeypatch: pytest.MonkeyPatch, smoke: Decoder) -> None:
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", 4)
    ids, turning = rows(3, 24), rope(SMOKE, "yarn")
    predicted = np.array(mx.argmax(smoke(mx.array(ids), turning), axis=-1))
    expected = (predicted[:, 4:-1] == ids[:, 5:]).sum(axis=0)
    counts = teacher_forced(smoke, turning, ids[:, 1:], COT)
    assert counts.shape == (20,)
    assert np.array_equal(counts, expected)


# --- digits in their order


def test_ordered_digits_lie_on_a_line_and_a_circle() -> None:
    """With nothing random, neighbours are alike, the first and the last differ on the line; [EOS] stays as it was."""
    shape = replace(SMOKE.model, hidden_size=256)
    plain, ordered = (np.array(Decoder(replace(shape, ordered=part), VOCABULARY, 3).embedding) for part in (0.0, 1.0))
    assert np.array_equal(plain[17:], ordered[17:])
    assert np.linalg.matrix_rank(ordered[:17], tol=1e-3) == 3
    steps = np.linalg.norm(np.diff(ordered[:17], axis=0), axis=1)
    assert steps.max() < 1.5 * steps.min()
    # Sums of digits are sums of their places: the line's part is what second differences around the circle leave.
    turns = 2 * np.pi * np.arange(17) / 17
    basis = np.stack([np.arange(17) - 8, np.cos(turns), np.sin(turns)], axis=1)
    fitted = basis @ np.linalg.lstsq(basis, ordered[:17], rcond=None)[0]
    np.testing.assert_allclose(fitted, ordered[:17], atol=1e-4)
    half = np.array(Decoder(replace(shape, ordered=0.5), VOCABULARY, 3).embedding)
    np.testing.assert_allclose(half[:17], (plain + ordered)[:17] / 2, atol=1e-5)
