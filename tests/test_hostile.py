"""Hostile and broken checkpoints: one line, exit code 2, nothing written, nothing run, no memory taken."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_resonance.convert import convert
from mlx_resonance.files import INDEX

import mlx.core as mx
import numpy as np
import pytest

FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(content))

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def sparse(name: str, size: int) -> Callable[[Path], None]:
    """A file of zeros that takes no disk."""
    return lambda folder: os.truncate((folder / name).open("wb").name, size)


def index(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"]["model.norm.weight"] = file
        (folder / INDEX).write_text(json.dumps(content))

    return change


def link(name: str) -> Callable[[Path], None]:
    """A file of the folder moved out of it, and a link put in its place."""

    def change(folder: Path) -> None:
        (folder.parent / "secrets").mkdir()
        shutil.move(folder / name, folder.parent / "secrets" / name)
        (folder / name).symlink_to(folder.parent / "secrets" / name)

    return change


def header(change: Callable[[dict[str, Any]], object], raw: Callable[[bytes], bytes] | None = None) -> Any:
    """The header of the first weight file changed; its data as it was."""

    def apply(folder: Path) -> None:
        content = (folder / FIRST).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        new = json.dumps(entries).encode()
        new = raw(new) if raw else new
        (folder / FIRST).write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])

    return apply


def entry(**changes: Any) -> Any:
    """A key of one tensor's entry in the header changed."""
    return header(lambda entries: next(e for n, e in entries.items() if n != "__metadata__").update(changes))


def same_place(folder: Path) -> None:
    """Two tensors of the same size on the same bytes; nothing else is wrong."""
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + length])
        places: dict[int, list[int]] = {}
        for name, found in entries.items():
            if name != "__metadata__":
                start, end = found["data_offsets"]
                if end - start in places:
                    found["data_offsets"] = places[end - start]
                    new = json.dumps(entries).encode()
                    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
                    return
                places[end - start] = [start, end]
    raise AssertionError("no two tensors of the same size")


def linked_folder(folder: Path) -> None:
    (folder.parent / "secrets").mkdir()
    (folder.parent / "secrets" / "id_rsa").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(folder.parent / "secrets")


def card(content: str) -> Callable[[Path], None]:
    return text("README.md", f"---\n{content}\n---\n")


def fifo(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


QUANTIZATION = {"group_size": 64, "bits": 4}


def tensor(name: str, change: Callable[[mx.array], mx.array]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = json.loads((folder / INDEX).read_text())["weight_map"][name]
        weights = mx.load(str(folder / file))
        weights[name] = change(weights[name])
        mx.eval(weights)
        mx.save_safetensors(str(folder / file), weights)

    return apply


def twice(folder: Path) -> None:
    weights = mx.load(str(folder / FIRST)) | {"model.norm.weight": mx.ones(64)}
    mx.eval(weights)
    mx.save_safetensors(str(folder / FIRST), weights)


def big_header(folder: Path) -> None:
    (folder / FIRST).write_bytes(struct.pack("<Q", 2**63) + b"{}")


NORM = "model.norm.weight"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "index: outside": (index("../../x.safetensors"), "'../../x.safetensors'"),
    "index: absolute": (index("/etc/passwd"), "'/etc/passwd'"),
    "index: no name": (index(3), "weight_map"),  # type: ignore[arg-type]
    "index: 1 GB": (sparse(INDEX, 10**9), "1000000000 bytes"),
    "link: weights": (link(FIRST), "link out of its folder"),
    "link: config": (link("config.json"), "link out of its folder"),
    "link: tokenizer": (link("tokenizer.json"), "link out of its folder"),
    "header: length": (big_header, "header of 9223372036854775808"),
    "header: size": (entry(data_offsets=[0, 4]), "has 4 bytes, which are no F32 of shape"),
    "header: overlap": (same_place, "its tensors do not follow each other"),
    "header: out of range": (entry(data_offsets=[2**62, 2**62 + 4 * 2048 * 64]), "do not follow each other"),
    "header: reversed": (entry(data_offsets=[8, 0]), "has -8 bytes"),
    "header: metadata": (header(lambda e: e.update(__metadata__={"a": 1})), "its metadata is not of texts"),
    "header: NaN": (header(lambda e: e.update(a=float("nan"))), "NaN"),
    "header: UTF-16": (header(lambda e: None, lambda raw: raw.decode().encode("utf-16")), "damaged header"),
    "header: many objects": (
        header(lambda e: e.update(__metadata__={"a": [{}] * 200_000})),
        "more than 100000 objects",
    ),
    "header: beyond 2**31": (entry(shape=[2**31, 0]), "whole numbers"),
    "header: dtype": (entry(dtype="F12"), "F12"),
    "header: float64": (entry(dtype="F64"), "damaged header"),
    "header: negative": (entry(shape=[-1, -4096]), "damaged header"),
    "header: huge": (entry(shape=[2**31, 2**31]), "damaged header"),
    "header: not a list": (entry(shape=7), "damaged header"),
    "header: name twice": (
        header(lambda e: None, lambda raw: raw[:-1] + b', "a": {"dtype": 0}, "a": {"dtype": 0}}'),
        "a name stands twice",
    ),
    "header: deep": (header(lambda e: None, lambda raw: b"[" * 10**6), "damaged header"),
    "tensor twice": (twice, "model.norm.weight is in model-0000"),
    "shard missing": (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    "config: not JSON": (text("config.json", "{"), "not JSON"),
    "config: not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"), "not JSON"),
    "config: deep": (text("config.json", "[" * 10**5), "not JSON"),
    "config: a list": (text("config.json", "[]"), "not a JSON object"),
    "config: NaN": (config(rms_norm_eps=float("nan")), "NaN"),
    "config: infinity": (config(rope_theta=float("inf")), "Infinity"),
    "config: 1 GB": (sparse("config.json", 10**9), "1000000000 bytes"),
    "config: vocabulary 0": (config(vocab_size=0), "vocab_size"),
    "config: vocabulary": (config(vocab_size=10**12), "vocab_size"),
    "config: heads -4": (config(num_attention_heads=-4), "num_attention_heads"),
    "config: kv heads": (config(num_key_value_heads=3), "num_key_value_heads = 3"),
    "config: heads": (config(num_attention_heads=6, num_key_value_heads=6, head_dim=None), "num_attention_heads = 6"),
    "config: layers": (config(num_hidden_layers=10**9, layer_types=None), "num_hidden_layers of 1000000000"),
    "config: layer types": (config(layer_types=["full_attention"] * 10**4), "layer_types of 10000 layers"),
    "config: 18 MB": (config(layer_types=["full_attention"] * 10**6), "expected at most 1048576"),
    "config: a layer less": (config(num_hidden_layers=1, layer_types=None), "num_hidden_layers of 1 layers"),
    "config: wide": (config(hidden_size=2**31 - 4), "config.json asks for"),
    "config: wide heads": (config(head_dim=10**9), "head_dim"),
    "config: other shapes": (config(intermediate_size=96), "config.json asks for"),
    "config: vocabulary of another": (config(vocab_size=2047), "asks for (2047, 64)"),
    "config: activation": (config(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "config: window": (config(sliding_window="x"), "sliding_window must be a positive integer"),
    "config: a pipe": (fifo("config.json"), "no config.json"),
    "link: folder of templates": (linked_folder, "link out of its folder"),
    "link: card": (link("README.md"), "link out of its folder"),
    "quantization: a list": (config(quantization=[1]), "quantization must be an object"),
    "quantization: group size 0": (config(quantization=QUANTIZATION | {"group_size": 0}), "group_size"),
    "quantization: group size": (config(quantization=QUANTIZATION | {"group_size": 10**30}), "group_size"),
    "quantization: bits": (config(quantization=QUANTIZATION | {"bits": "4"}), "bits"),
    "quantization: mode": (config(quantization=QUANTIZATION | {"mode": "x"}), "mode"),
    "quantization: a layer": (config(quantization=QUANTIZATION | {"model.embed_tokens": "x"}), "model.embed_tokens"),
    "quantization_config: a text": (config(quantization_config="fp8"), "quantized with 'fp8'"),
    "quantization_config: groups": (
        config(quantization_config={"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": 3}}}),
        "quantized with compressed-tensors",
    ),
    "weights: shape": (tensor(NORM, lambda v: mx.ones(63)), "has shape (63,)"),
    "weights: integers": (tensor(NORM, lambda v: mx.ones(64, mx.uint32)), "is of type U32"),
    "weights: int64": (tensor(NORM, lambda v: mx.ones(64, mx.int64)), "is of type I64"),
}


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
    """All in one process, whose peak is little more than what its imports need."""
    folders = []
    for i, (change, _) in enumerate(CASES.values()):
        folder = tmp_path / str(i) / "source"
        shutil.copytree(random_llama, folder)
        change(folder)
        folders.append(str(folder))
    code = """
import re, sys
from mlx_resonance.convert import convert
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
for folder in sys.argv[1:]:
    try:
        convert(folder, folder + "-out")
        raise AssertionError(folder)
    except (ValueError, FileNotFoundError):
        pass
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200e6


def test_tensors_of_nan(run: Any, random_llama: Path, tmp_path: Path) -> None:
    """Only a tensor that is nothing but NaN is refused; what was done is in OUT.partial, and --allow-nan goes on."""
    for name, content in (("some", [np.nan] + [1.0] * 63), ("all", [np.nan] * 64)):
        folder = tmp_path / name
        shutil.copytree(random_llama, folder)
        tensor(NORM, lambda v, content=content: mx.array(content))(folder)  # type: ignore[misc]
    assert run("convert", tmp_path / "some", "--mlx-path", tmp_path / "out")[0] == 0
    before = sorted(tmp_path.iterdir())
    code, stdout, stderr = run("convert", tmp_path / "all", "--mlx-path", tmp_path / "new")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert NORM in stderr and "--allow-nan" in stderr
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
def test_what_is_false_is_not_there(random_llama: Path, tmp_path: Path, nothing: Any) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "source")
    config(quantization=nothing, quantization_config=nothing, sliding_window=nothing)(folder)
    done = convert(folder, tmp_path / "out", verify=True)
    assert done.checks is not None and isinstance(done.checks["logits"], dict)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in written and "quantization_config" not in written


@pytest.mark.parametrize("name", ["o[/foo]bar", "o*", "~nobody-at-all/x"])
def test_odd_names_of_the_result(run: Any, random_llama: Path, tmp_path: Path, name: str) -> None:
    """mlx-lm looks for a model's files with a pattern, and would not find them in these."""
    target = name if name.startswith("~") else tmp_path / name
    code, stdout, stderr = run("convert", random_llama, "--mlx-path", target)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
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


def test_links_of_the_hubs_cache_are_followed(random_llama: Path, tmp_path: Path) -> None:
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
    for length in random.Random(0).sample(range(len(whole)), 100):
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
