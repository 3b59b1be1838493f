"""Ways to break a checkpoint, and what each refusal must name (`CASES`); the tests are in test_hostile.py."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_resonance.files import INDEX

import mlx.core as mx

FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(content))

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def sparse(name: str, size: int) -> Callable[[Path], None]:
    """A file of zeros that takes no disk space."""
    return lambda folder: os.truncate((folder / name).open("wb").name, size)


def index(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"]["model.norm.weight"] = file
        (folder / INDEX).write_text(json.dumps(content))

    return change


def link(name: str) -> Callable[[Path], None]:
    """Move a file out of the folder and put a link in its place."""

    def change(folder: Path) -> None:
        (folder.parent / "secrets").mkdir()
        shutil.move(folder / name, folder.parent / "secrets" / name)
        (folder / name).symlink_to(folder.parent / "secrets" / name)

    return change


def header(change: Callable[[dict[str, Any]], object], raw: Callable[[bytes], bytes] | None = None) -> Any:
    """Change the header of the first weight file, but not its data."""

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
    """Change a key of one tensor's entry in the header."""
    return header(lambda entries: next(e for n, e in entries.items() if n != "__metadata__").update(changes))


EMPTY = {"dtype": "F32", "shape": [2**31, 0], "data_offsets": [0, 0]}


def first_again(raw: bytes) -> bytes:
    """Add a second entry for the first tensor, which says that it is smaller."""
    name = next(name for name in json.loads(raw) if name != "__metadata__")
    return raw[:-1] + f', "{name}": {json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})}}}'.encode()


def same_place(folder: Path) -> None:
    """Put two tensors of the same size on the same bytes; nothing else is wrong."""
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
    "header: length": (big_header, "header too large"),
    "header: size": (entry(data_offsets=[0, 4]), "invalid shape, data type, or offset"),
    "header: overlap": (same_place, "invalid offset for tensor"),
    "header: out of range": (entry(data_offsets=[2**62, 2**62 + 4 * 2048 * 64]), "invalid offset for tensor"),
    "header: reversed": (entry(data_offsets=[8, 0]), "invalid offset for tensor"),
    "header: metadata": (header(lambda e: e.update(__metadata__={"a": 1})), "invalid type: integer `1`"),
    "header: NaN": (header(lambda e: e.update(a=float("nan"))), "invalid JSON in header"),
    "header: UTF-16": (header(lambda e: None, lambda raw: raw.decode().encode("utf-16")), "invalid UTF-8"),
    "header: many objects": (header(lambda e: e.update(__metadata__={"a": [{}] * 200_000})), "expected a string"),
    "header: beyond 2**31": (entry(shape=[2**31, 0]), "invalid shape, data type, or offset"),
    "header: an empty axis": (header(lambda e: e.update(a=EMPTY)), "no axis may have 2**31 entries"),
    "header: dtype": (entry(dtype="F12"), "F12"),
    "header: float64": (entry(dtype="F64"), "invalid shape, data type, or offset"),
    "header: negative": (entry(shape=[-1, -4096]), "invalid value: integer `-1`"),
    "header: huge": (entry(shape=[2**31, 2**31]), "overflow computing buffer size"),
    "header: not a list": (entry(shape=7), "invalid type: integer `7`"),
    "header: name twice": (header(lambda e: None, first_again), "file not fully covered"),
    "header: deep": (header(lambda e: None, lambda raw: b"[" * 10**6), "invalid JSON in header"),
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
    "config: layers": (config(num_hidden_layers=10**9, layer_types=None), "num_hidden_layers says 1000000000"),
    "config: layer types": (config(layer_types=["full_attention"] * 10**4), "layer_types says 10000 layers"),
    "config: 18 MB": (config(layer_types=["full_attention"] * 10**6), "expected at most 1048576"),
    "config: a layer less": (config(num_hidden_layers=1, layer_types=None), "num_hidden_layers says 1 layers"),
    "config: wide": (config(hidden_size=2**31 - 4), "config.json asks for"),
    "config: wide heads": (config(head_dim=10**9), "head_dim"),
    "config: other shapes": (config(intermediate_size=96), "config.json asks for"),
    "config: vocabulary of another": (config(vocab_size=2047), "asks for (2047, 64)"),
    "config: activation": (config(hidden_act="gelu"), "hidden_act must be silu, got 'gelu'"),
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
