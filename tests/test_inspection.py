"""What `inspect` measures: how far the angles of a longer text lie from those that the checkpoint was trained with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig
from mlx_resonance.convert import convert
from mlx_resonance.finetuning.run import finetune
from mlx_resonance.inspection import RECORDS, Training, inspect_rope, training_of

import numpy as np
import pytest

from . import oracle
from .checkpoints import source
from .hub import serve

PLAIN = RopeConfig(64, max_position_embeddings=512)


def distances(trained: np.ndarray, tested: np.ndarray, train_length: int, test_length: int) -> np.ndarray:
    """By the definition: every angle of the longer text against every one of training."""
    seen = np.exp(2j * np.pi * np.arange(train_length)[:, None] / trained)
    new = np.exp(2j * np.pi * np.arange(train_length, test_length)[:, None] / tested)
    return np.max([np.abs(row - seen).min(0) for row in new], axis=0)


def found_in(folder: Path) -> Training:
    return training_of(folder, Checkpoint.open(folder).rope)


@pytest.fixture(scope="module")
def tuned(extended: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted checkpoint after one step of fine-tuning on 96 tokens."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "text.txt").write_text(source()[:2000])
    finetune(extended, folder / "text.txt", folder / "out", length=96, steps=1, accumulate=1)
    return folder / "out"


def test_a_converted_checkpoint_was_trained_with_the_angles_of_its_source(run: Any, extended: Path) -> None:
    """Rounding moves the fast pairs away from known angles; YaRN leaves the slow pairs close to them."""
    trained = oracle.rope_wavelengths(64, 10000)
    tested = oracle.resonate(oracle.yarn_wavelengths(64, 10000, 8, 512))
    expected = distances(trained, tested, 512, 4096)
    fast = tested <= 512
    assert (round(expected[fast].sum(), 2), round(expected[~fast].sum(), 2)) == (0.19, 0.06)

    code, out, _ = run("inspect", extended, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and found["trained_on_record"] is True
    assert found["trained_rope"] == {"max_position_embeddings": 512, "rope_theta": 10000, "rope_scaling": None}
    np.testing.assert_allclose(found["feature_gap"], expected, rtol=0, atol=1e-10)
    _, text, _ = run("inspect", extended)
    assert "4096 tokens: 0.19 summed over the pre-critical pairs, 0.06 over the others\n" in text
    assert "trained angles: plain RoPE, base 10000, 512 tokens\n" in text
    assert [line.split()[-1] for line in text.splitlines()[5:]] == [f"{gap:.4f}" for gap in expected]


def test_a_fine_tuned_checkpoint_was_trained_with_its_own_angles(run: Any, extended: Path, tuned: Path) -> None:
    rope = Checkpoint.open(extended).rope
    assert found_in(tuned) == Training(rope, 96)
    code, out, _ = run("inspect", tuned, "--json")
    found = json.loads(out)
    tested = oracle.resonate(oracle.yarn_wavelengths(64, 10000, 8, 512))
    assert code == 0 and (found["train_length"], found["test_length"]) == (96, 4096)
    assert found["critical_pairs"] == (tested <= 96).sum() == 9
    np.testing.assert_allclose(found["feature_gap"], distances(tested, tested, 96, 4096), rtol=0, atol=1e-10)
    assert not any(found["feature_gap"][:9])
    _, text, _ = run("inspect", tuned)
    assert "trained angles: resonance_yarn, base 10000, factor 8, 96 tokens\n" in text


def test_a_chain_of_conversions_keeps_the_record(extended: Path, tuned: Path, tmp_path: Path) -> None:
    for folder in (extended, tuned):
        out = tmp_path / folder.name
        convert(folder, out, quantize=True)
        assert found_in(out) == found_in(folder) and found_in(out).on_record
        convert(out, tmp_path / "again", resonance=False)
        assert found_in(tmp_path / "again") == found_in(folder)
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("folder", ["stdlib_llama", "extended"])
def test_without_a_record_plain_rope_is_assumed(run: Any, folder: str, copy_of: Any, request: Any) -> None:
    copy = copy_of(request.getfixturevalue(folder))
    (copy / "conversion.json").unlink(missing_ok=True)
    code, out, _ = run("inspect", copy, "--json", "--test-length", 1024)
    found = json.loads(out)
    assert code == 0 and found["trained_on_record"] is False
    assert (found["trained_rope"]["rope_theta"], found["trained_rope"]["rope_scaling"]) == (10000, None)
    expected = distances(oracle.rope_wavelengths(64, 10000), np.array(found["wavelengths"]), 512, 1024)
    np.testing.assert_allclose(found["feature_gap"], expected, rtol=0, atol=1e-10)
    _, text, _ = run("inspect", copy)
    assert text.count("trained angles: not on record, plain RoPE assumed\n") == 1


HEADER = {"finetune": 1, "rope": PLAIN.to_hf("4"), "recipe": {"length": 64}}
CONVERSION = {"trained_rope": PLAIN.to_hf("4"), "trained_length": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
LONGROPE |= {"original_max_position_embeddings": 8}
DAMAGED = {
    "of an older version": ("conversion.json", {"rope": {}}),
    "rope": ("conversion.json", CONVERSION | {"trained_rope": 3}),
    "rope type": ("conversion.json", CONVERSION | {"trained_rope": {"rope_scaling": {"rope_type": "unknown"}}}),
    "other pairs": ("conversion.json", CONVERSION | {"trained_rope": {"rope_scaling": LONGROPE}}),
    "length 0": ("conversion.json", CONVERSION | {"trained_length": 0}),
    "no length": ("conversion.json", {"trained_rope": PLAIN.to_hf("4")}),
    "length true": ("conversion.json", CONVERSION | {"trained_length": True}),
    "far too long": ("conversion.json", CONVERSION | {"trained_length": 2**40}),
    "not a number": ("conversion.json", '{"trained_rope": {"rope_theta": NaN}, "trained_length": 64}'),
    "no object": ("conversion.json", "[]"),
    "not JSON": ("conversion.json", "{"),
    "deep": ("conversion.json", "[" * 10**5),
    "not UTF-8": ("conversion.json", b"\xff"),
    "empty": ("finetune.jsonl", ""),
    "an infinite base": ("finetune.jsonl", '{"rope": {"rope_theta": Infinity}, "recipe": {"length": 64}}\n'),
    "no recipe": ("finetune.jsonl", {"finetune": 1, "rope": PLAIN.to_hf("4")}),
    "recipe": ("finetune.jsonl", HEADER | {"recipe": [64]}),
    "length 1.5": ("finetune.jsonl", HEADER | {"recipe": {"length": 1.5}}),
    "many digits": ("finetune.jsonl", '{"rope": {}, "recipe": {"length": ' + "9" * 5000 + "}}\n"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_record_is_none(case: str, tmp_path: Path) -> None:
    name, content = DAMAGED[case]
    content = json.dumps(content) if isinstance(content, dict) else content
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert training_of(tmp_path, PLAIN) == Training(RopeConfig(64), 512, on_record=False)


@pytest.mark.parametrize(("name", "record"), [("conversion.json", CONVERSION), ("finetune.jsonl", HEADER)])
def test_a_record_is_a_file_of_the_folder(name: str, record: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / name).write_text(json.dumps(record) + "\n")
    (folder / name).symlink_to(tmp_path / name)
    assert not training_of(folder, PLAIN).on_record
    (folder / name).unlink()
    os.mkfifo(folder / name)  # to open it would wait for ever
    assert not training_of(folder, PLAIN).on_record
    (folder / name).unlink()
    shutil.copy(tmp_path / name, folder / name)
    assert training_of(folder, PLAIN) == Training(PLAIN, 64)


@pytest.mark.parametrize("resonance", [True, False])
def test_a_lost_record_is_not_made_up(stdlib_llama: Path, tmp_path: Path, resonance: bool) -> None:
    """A converted checkpoint's own settings are not those of its training."""
    once, record = tmp_path / "once", tmp_path / "once" / "conversion.json"
    made = convert(stdlib_llama, once, rope="yarn", factor=8, resonance=resonance)
    record.write_text("{}")  # as of an older version
    convert(once, tmp_path / "old")
    assert not found_in(tmp_path / "old").on_record
    record.unlink()
    convert(once, tmp_path / "none")
    # Unrounded, it could be a checkpoint that its authors trained with YaRN.
    yarn = Training(made.rope, 512)
    assert found_in(tmp_path / "none") == (Training(RopeConfig(64), 512, on_record=False) if resonance else yarn)


@pytest.fixture
def hub_model(extended: Path, tmp_path: Path) -> Iterator[Any]:
    with serve("someone/model", shutil.copytree(extended, tmp_path / "hub")) as hub:
        yield hub


def test_of_a_model_on_the_hub_the_record_is_read(hub_model: Any, tmp_path: Path) -> None:
    done = hub_model.command(tmp_path / "cache", "inspect", "someone/model", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trained_on_record"] is True
    assert sorted(hub_model.downloaded) == ["config.json", "conversion.json", "tokenizer_config.json"]


def test_conversion_of_a_fine_tuned_model_on_the_hub_keeps_its_record(tuned: Path, tmp_path: Path) -> None:
    with serve("someone/model", tuned) as hub:
        done = hub.command(tmp_path / "cache", "convert", "someone/model", "--mlx-path", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert set(RECORDS) & set(hub.downloaded) == {"finetune.jsonl"}
    assert found_in(tmp_path / "out") == found_in(tuned)


@pytest.mark.parametrize("prefix", ["", "resonance_"])
def test_a_dynamic_model_was_trained_unscaled(prefix: str) -> None:
    pairs = np.arange(8) / 8
    trained, tested = (2 * np.pi * base**pairs for base in (10000, 10000 * (8 * 4 - 7) ** (16 / 14)))
    rope = RopeConfig(16, f"{prefix}dynamic", 10000.0, 64, {"factor": 8.0})
    for training in (None, Training(RopeConfig(16, "dynamic", 10000.0, 64, {"factor": 8.0}), 64)):
        found = inspect_rope(rope, test_length=256, training=training)
        gaps = distances(trained, tested, 64, 256), distances(trained, np.rint(tested), 64, 256)
        np.testing.assert_allclose(found.gap, gaps[bool(prefix)], rtol=0, atol=1e-9)
        np.testing.assert_allclose(list(found.gaps().values()), gaps, rtol=0, atol=1e-9)


def test_longrope_was_fine_tuned_with_the_factors_of_long_texts(
    random_llama: Path, copy_of: Any, tmp_path: Path
) -> None:
    """On its whole context, as its authors do."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 64} | factors
    convert(copy_of(random_llama, rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling), tmp_path / "out")
    training = found_in(tmp_path / "out")
    assert (training.rope.rope_type, training.length) == ("longrope", 128)
    wavelengths = 2 * np.pi * 10000 ** (np.arange(8) / 8) * factors["long_factor"]
    found = inspect_rope(Checkpoint.open(tmp_path / "out").rope, test_length=256, training=training)
    expected = distances(wavelengths, np.rint(wavelengths), 128, 256)
    np.testing.assert_allclose(found.gap, expected, rtol=0, atol=1e-9)
