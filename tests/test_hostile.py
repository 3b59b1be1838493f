"""Hostile and broken checkpoints: one line, exit code 2; nothing is written or run, and memory stays small."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_resonance.convert import convert

import mlx.core as mx
import numpy as np
import pytest

from .checkpoints import PEAK
from .hostile import CASES, FIRST, NORM, SECOND, card, config, sparse, tensor


@pytest.mark.parametrize("case", CASES)
def test_one_line_exit_2_and_nothing_written(run: Any, random_llama: Path, tmp_path: Path, case: str) -> None:
    change, named = CASES[case]
    folder = tmp_path / "source"
    shutil.copytree(random_llama, folder)
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    code, stdout, stderr = run("convert", folder, "--mlx-path", tmp_path / "out")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert stderr.startswith("error: ") and named in stderr and len(stderr) < 1000
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_none_of_them_takes_memory(random_llama: Path, tmp_path: Path) -> None:
    """All in one process, whose peak is little more than its imports need."""
    folders = []
    for i, (change, _) in enumerate(CASES.values()):
        folder = tmp_path / str(i) / "source"
        shutil.copytree(random_llama, folder)
        change(folder)
        folders.append(str(folder))
    code = """
import sys
from mlx_resonance.convert import convert
before = peak()
for folder in sys.argv[1:]:
    try:
        convert(folder, folder + "-out")
        raise AssertionError(folder)
    except (ValueError, FileNotFoundError):
        pass
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", PEAK + code, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200e6


def test_tensors_of_nan(run: Any, random_llama: Path, tmp_path: Path) -> None:
    """Only a tensor that is all NaN is refused; finished work stays in OUT.partial, and --allow-nan resumes."""
    for name, content in (("some", [np.nan] + [1.0] * 63), ("all", [np.nan] * 64)):
        folder = tmp_path / name
        shutil.copytree(random_llama, folder)
        tensor(NORM, lambda v, content=content: mx.array(content))(folder)  # type: ignore[misc]
    assert run("convert", tmp_path / "some", "--mlx-path", tmp_path / "out")[0] == 0
    before = sorted(tmp_path.iterdir())
    code, stdout, stderr = run("convert", tmp_path / "all", "--mlx-path", tmp_path / "new")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert f"{NORM} is all NaN" in stderr and "give --allow-nan" in stderr
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "new.partial"])
    assert run("convert", tmp_path / "all", "--mlx-path", tmp_path / "new", "--allow-nan")[0] == 0
    assert mx.all(mx.isnan(mx.load(str(tmp_path / "new" / "model.safetensors"))[NORM])).item()


CARDS = {
    "tags": "tags: 5",
    "references": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "tags: *i\nbase_model: *i\nlicense: *i",
    "not YAML": "license: [",
    "long": "license: " + "x" * 10**5,
}


@pytest.mark.parametrize("case", CARDS)
def test_a_hostile_card_costs_its_metadata_only(random_llama: Path, tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "source")
    card(CARDS[case])(folder)
    convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").stat().st_size < 2000
    sparse("README.md", 3 * 10**9)(folder)
    convert(folder, tmp_path / "again")


@pytest.mark.parametrize("nothing", [False, 0, "", [], {}, None])
def test_false_values_count_as_absent(random_llama: Path, tmp_path: Path, nothing: Any) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "source")
    config(quantization=nothing, quantization_config=nothing, sliding_window=nothing)(folder)
    done = convert(folder, tmp_path / "out", verify=True)
    assert done.checks is not None and isinstance(done.checks["logits"], dict)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in written and "quantization_config" not in written


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("o[/foo]bar", "any of *?[ in its name"),
        ("o*", "any of *?[ in its name"),
        ("~nobody-at-all/x", "'~nobody-at-all/x' is not a path"),
    ],
)
def test_odd_names_of_the_result(run: Any, random_llama: Path, tmp_path: Path, name: str, named: str) -> None:
    """mlx-lm looks for a model's files with a pattern, and would not find them in these."""
    target = name if name.startswith("~") else tmp_path / name
    code, stdout, stderr = run("convert", random_llama, "--mlx-path", target)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and named in stderr, stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantize", [False, True])
def test_a_quantized_tensor_of_nan_is_refused_too(random_llama: Path, tmp_path: Path, quantize: bool) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "source")
    tensor("model.layers.0.self_attn.q_proj.weight", lambda v: mx.full(v.shape, mx.nan))(folder)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight is all NaN"):
        convert(folder, tmp_path / "out", quantize=quantize)
    done = convert(folder, tmp_path / "out", quantize=quantize, allow_nan=True)
    assert done.quantization_error.get("model.layers.0.self_attn.q_proj.weight", None) is None
    json.loads((tmp_path / "out" / "conversion.json").read_text(), parse_constant=pytest.fail)


def test_links_in_the_hubs_cache_are_followed(random_llama: Path, tmp_path: Path) -> None:
    """There every file is a link to its content, outside the folder of the revision but within that of the model."""
    snapshot = tmp_path / "models--someone--llama" / "snapshots" / "0123"
    blobs = tmp_path / "models--someone--llama" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(random_llama.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(i)))
    convert(snapshot, tmp_path / "out")
    linked = tmp_path / "linked"
    linked.symlink_to(random_llama)  # the whole folder, by the user
    convert(linked, tmp_path / "again")


@pytest.mark.parametrize("file", [FIRST, SECOND])
def test_every_truncation_is_noticed(random_llama: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "source")
    whole = (folder / file).read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 20):
        (folder / file).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=file):
            convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("file", [FIRST, SECOND])
def test_a_flipped_bit_in_a_header_is_noticed_or_means_nothing(random_llama: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "source")
    convert(random_llama, tmp_path / "right")
    expected = (tmp_path / "right" / "model.safetensors").read_bytes()
    whole = (folder / file).read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(file)
    refused = 0
    for _ in range(100):
        place, bit = chance.randrange(length), chance.randrange(8)
        (folder / file).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            convert(folder, tmp_path / "out")
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error).strip()
            assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
        else:  # in the metadata, or a space
            assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected, (place, bit)
            shutil.rmtree(tmp_path / "out")
    assert refused > 80
