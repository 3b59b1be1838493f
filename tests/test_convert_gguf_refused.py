"""Hostile, broken and unsupported GGUF files: one line that names the thing, exit code 2, little time and memory."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mlx_resonance.convert import convert
from mlx_resonance.convert.gguf_header import read_gguf_header
from mlx_resonance.errors import UsageError

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from .checkpoints import PEAK
from .gguf_files import fields, model_file, random_model, tensors, write

UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 5, 6, 7, 8, 9, 10


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: bytes | str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def entry(name: str, shape: Iterable[int], kind: int = 0, offset: int = 0, axes: int | None = None) -> bytes:
    """A tensor's, with axes in the file's order."""
    shape = list(shape)
    numbers = struct.pack(f"<I{len(shape)}Q", len(shape) if axes is None else axes, *shape)
    return text(name) + numbers + struct.pack("<IQ", kind, offset)


ARCHITECTURE = pair("general.architecture", STRING, text("llama"))


def raw(
    pairs: Iterable[bytes] = (),
    entries: Iterable[bytes] = (),
    data: int = 0,
    keys: int | None = None,
    count: int | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
) -> bytes:
    """A file of raw parts, with the numbers of keys and tensors that it has or others; `data` bytes of tensors."""
    pairs, entries = [ARCHITECTURE, *pairs], list(entries)
    head = magic + struct.pack(
        "<IQQ", version, len(entries) if count is None else count, len(pairs) if keys is None else keys
    )
    head += b"".join(pairs) + b"".join(entries)
    return head + b"\0" * (-len(head) % 32 + data)


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "another format": (b"PK\3\4" + bytes(60), r"is not a GGUF file: it begins with b'PK\x03\x04'"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "it begins with b'vers'"),
    "version 1": (raw(version=1), "has GGUF version 1"),
    "version 99": (raw(version=99), "has GGUF version 99"),
    "version 0": (raw(version=0), "has GGUF version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "is big-endian"),
    "2**40 tensors": (raw(count=2**40), f"has {2**40} tensors"),
    "2**63 keys": (raw(keys=2**63), f"has {2**63} metadata keys"),
    "10**6 keys": (raw([pair(f"k{i}", UINT8, b"\0") for i in range(10**6)]), "has 1000001 metadata keys"),
    "fewer keys than it says": (raw(keys=9), "has '' twice"),
    "fewer tensors than it says": (raw(count=9), "tensor '' with 0 axes"),
    "a string of 2**63 bytes": (raw([pair("k", STRING, struct.pack("<Q", 2**63))]), "within the value of 'k'"),
    "a key of 2**63 bytes": (raw([struct.pack("<Q", 2**63)]), "within metadata key 1"),
    "an array of 2**40 numbers": (raw([pair("k", ARRAY, array(FLOAT32, 2**40))]), f"'k' with {2**40} entries"),
    "an array of 2**64 - 1 strings": (raw([pair("k", ARRAY, array(STRING, 2**64 - 1))]), "'k' with 18446744"),
    "an array larger than the file": (raw([pair("k", ARRAY, array(FLOAT32, 2**20))]), "within the value of 'k'"),
    "many arrays": (
        raw([pair(f"k{i}", ARRAY, array(UINT8, 2**20, bytes(2**20))) for i in range(5)]), "'k4' with 1048576 entries",
    ),
    "arrays of arrays": (raw([pair("k", ARRAY, array(ARRAY, 1) * 10**5)]), "has 'k', an array of arrays"),
    "a type of values that is unknown": (raw([pair("k", 13, bytes(8))]), "has 'k' of type 13"),
    "an array of an unknown type": (raw([pair("k", ARRAY, array(99, 1, bytes(8)))]), "'k', an array of type 99"),
    "a key twice": (raw([pair("k", UINT8, b"\0")] * 2), "has 'k' twice"),
    "a key that is not UTF-8": (raw([pair(b"\xff\xfe", UINT8, b"\0")]), "not UTF-8 in metadata key 1"),
    "a value that is not UTF-8": (raw([pair("k", STRING, text(b"\xff"))]), "not UTF-8 in the value of 'k'"),
    "a token that is not UTF-8": (
        raw([pair("k", ARRAY, array(STRING, 2, text("a") + text(b"\xff")))]), "not UTF-8 in 'k'[1]",
    ),
    "a flag of 2": (raw([pair("k", BOOL, b"\2")]), "has 2 in the value of 'k'"),
    "flags of 255": (raw([pair("k", ARRAY, array(BOOL, 2, b"\1\xff"))]), "has 255 in the value of 'k'"),
    "alignment 0": (raw([pair("general.alignment", UINT32, bytes(4))]), "general.alignment = 0"),
    "alignment 24": (raw([pair("general.alignment", UINT32, struct.pack("<I", 24))]), "general.alignment = 24"),
    "alignment 2**31": (raw([pair("general.alignment", UINT32, struct.pack("<I", 2**31))]), "general.alignment = 2147"),
    "alignment in words": (raw([pair("general.alignment", STRING, text("32"))]), "general.alignment = '32'"),
    "0 axes": (raw([], [entry("t", [])], 32), "tensor 't' with 0 axes"),
    "5 axes": (raw([], [entry("t", [1] * 5)], 32), "tensor 't' with 5 axes"),
    "2**32 - 1 axes": (raw([], [entry("t", [1], axes=2**32 - 1)], 32), "tensor 't' with 4294967295 axes"),
    "an axis of 0": (raw([], [entry("t", [0, 4])], 32), "tensor 't' of shape (4, 0)"),
    "an axis of 2**31": (raw([], [entry("t", [2**31])], 32), "tensor 't' of shape (2147483648,)"),
    "axes whose product overflows": (raw([], [entry("t", [2**30] * 4)], 32), "tensor 't' ends at byte"),
    "an unknown type": (raw([], [entry("t", [32], 99)], 32), "tensor 't' of type 99"),
    "a type that was removed": (raw([], [entry("t", [32], 4)], 32), "tensor 't' of type 4"),
    "rows that are not of blocks": (raw([], [entry("t", [48, 2], 2)], 64), "'t' with rows of 48: Q4_0 has"),
    "an offset beyond the file": (raw([], [entry("t", [4], offset=2**20)], 32), "tensor 't' ends at byte"),
    "an offset of 2**64 - 32": (raw([], [entry("t", [4], offset=2**64 - 32)], 32), "tensor 't' ends at byte"),
    "an offset that is not aligned": (raw([], [entry("t", [4], offset=4)], 64), "'t' at 4, not a multiple of 32"),
    "tensors that overlap": (
        raw([], [entry("t", [64]), entry("u", [4], offset=32)], 256), "tensor 'u' within the data of 't'",
    ),
    "tensors in one place": (raw([], [entry("t", [4]), entry("u", [4])], 64), "within the data of"),
    "a tensor twice": (raw([], [entry("t", [4]), entry("t", [4], offset=32)], 64), "has tensor 't' twice"),
    "a name that is not UTF-8": (raw([], [text(b"\xff") + entry("", [4])[8:]], 64), "not UTF-8 in the name of"),
    "no architecture": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture = None"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_cannot_be_right(run: Any, tmp_path: Path, case: str) -> None:
    content, named = HEADERS[case]
    refused(run, tmp_path, content, named)


def refused(run: Any, folder: Path, content: bytes | Path, named: str) -> None:
    """Convert a file: one line, exit code 2, and nothing is left."""
    path = folder / "m.gguf"
    if isinstance(content, bytes):
        path.write_bytes(content)
    code, out, err = run("convert", path, "--mlx-path", folder / "out", "--no-tokenizer")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and named in err and len(err) < 600, err
    assert [entry.name for entry in folder.iterdir()] == ["m.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_none_of_them_takes_memory(tmp_path: Path) -> None:
    for i, (content, _) in enumerate(HEADERS.values()):
        (tmp_path / f"{i}.gguf").write_bytes(content)
    code = """
import sys
from pathlib import Path
from mlx_resonance.convert.gguf_source import open_gguf
before = peak()
for path in Path(sys.argv[1]).iterdir():
    try:
        open_gguf(path)
        raise AssertionError(path)
    except ValueError:
        pass
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", PEAK + code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100e6


def test_truncated_at_every_byte_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    whole = raw(
        [
            pair("a", ARRAY, array(STRING, 2, text("x") + text("yz"))),
            pair("b", FLOAT32, struct.pack("<f", 0.1)),
            pair("c", ARRAY, array(BOOL, 2, b"\0\1")),
        ],
        [entry("t", [4]), entry("u", [2, 2], offset=32)],
        data=48,
    )
    path.write_bytes(whole)
    assert read_gguf_header(path).metadata["b"] == 0.1
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"^\S+m\.gguf is (truncated or damaged|empty)") as error:
            read_gguf_header(path)
        assert "\n" not in str(error.value)


def test_every_byte_changed_is_refused_or_read(tmp_path: Path) -> None:
    """Never another error, whatever the byte: the header of a model that is accepted, one byte at a time."""
    path = model_file(tmp_path / "m.gguf")
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 1500, 300):
        before = whole[place]
        whole[place] = rng.integers(0, 256)
        path.write_bytes(whole)
        try:
            convert(path, tmp_path / "out", tokenizer=False, dry_run=True)
        except UsageError as error:
            assert "\n" not in str(error), place
        whole[place] = before


def without(name: str, new: str = "") -> Callable[..., Any]:
    """A change to a model's tensors: one less, or one under another name."""
    return lambda content: {new if key == name else key: v for key, v in content.items() if new or key != name}


MODELS: dict[str, tuple[dict[str, Any], Callable[..., Any] | None, str]] = {
    "experts": ({"expert_count": 8, "expert_used_count": 2}, None, "llama.expert_count = 8: mixtures"),
    "0 heads": ({"attention__head_count": 0}, None, "llama.attention.head_count must be a positive integer"),
    "a number of heads in words": ({"attention__head_count": "4"}, None, "llama.attention.head_count must be"),
    "heads of a float": ({"attention__head_count": 4.0}, None, "llama.attention.head_count must be"),
    "heads of true": ({"attention__head_count": True}, None, "llama.attention.head_count must be"),
    "an empty list of heads": ({"attention__head_count": ["x"]}, None, "llama.attention.head_count must be"),
    "heads that differ by layer": ({"attention__head_count_kv": [2, 4]}, None, "head_count_kv differs by layer"),
    "heads that do not divide": ({"attention__head_count": 3}, None, "llama.embedding_length = 256 is not a multiple"),
    "key heads that do not divide": ({"attention__head_count_kv": 3}, None, "num_key_value_heads = 3"),
    "no context": ({"context_length": None}, None, "llama.context_length is missing"),
    "a huge context": ({"context_length": 2**40}, None, "llama.context_length must be a positive integer below 2**31"),
    "a negative context": ({"context_length": -1}, None, "llama.context_length must be a positive integer"),
    "no epsilon": ({"attention__layer_norm_rms_epsilon": None}, None, "layer_norm_rms_epsilon is missing"),
    "an epsilon of 0": ({"attention__layer_norm_rms_epsilon": 0.0}, None, "rms_norm_eps must be a positive number"),
    "values of another length": ({"attention__value_length": 32}, None, "attention.value_length = 32: expected 64"),
    "another vocabulary": ({"vocab_size": 321}, None, "llama.vocab_size = 321, but token_embd.weight has 320 rows"),
    "more layers": ({"block_count": 3}, None, "num_hidden_layers says 3 layers, but the weights have 2"),
    "fewer layers": ({"block_count": 1}, None, "num_hidden_layers says 1 layers, but the weights have 2"),
    "another width": ({"embedding_length": 128, "attention__key_length": 64}, None, "token_embd.weight has shape"),
    "another inner width": ({"feed_forward_length": 256}, None, "has shape (256, 512), config.json asks for"),
    "attention both ways": ({"attention__causal": False}, None, "llama.attention.causal is false"),
    "a scale of attention": ({"attention__scale": 0.1}, None, "llama.attention.scale = 0.1 is not supported"),
    "a scale of logits": ({"logit_scale": 0.5}, None, "llama.logit_scale = 0.5 is not supported"),
    "a scale of embeddings": ({"embedding_scale": 12.0}, None, "llama.embedding_scale = 12.0 is not supported"),
    "a scale of residuals": ({"residual_scale": 0.25}, None, "llama.residual_scale = 0.25 is not supported"),
    "softcapping": ({"final_logit_softcapping": 30.0}, None, "llama.final_logit_softcapping = 30.0"),
    "clamping": ({"attention__clamp_kqv": 8.0}, None, "llama.attention.clamp_kqv = 8.0 is not supported"),
    "parallel residuals": ({"use_parallel_residual": True}, None, "llama.use_parallel_residual = True"),
    "a key that is not known": ({"something.new": "x"}, None, "llama.something.new = 'x' is not supported"),
    "no embedding": ({}, without("token_embd.weight"), "token_embd.weight is missing"),
    "no norm": ({}, without("output_norm.weight"), "model.norm.weight"),
    "a projection less": ({}, without("blk.1.ffn_up.weight"), "layers.1.mlp.up_proj.weight is missing"),
    "a tensor of another model": (
        {}, without("blk.1.ffn_up.weight", "blk.1.ffn_up_exps.weight"), "is missing",
    ),
    "norms of queries": (
        {}, without("blk.0.attn_norm.weight", "blk.0.attn_q_norm.weight"), "input_layernorm.weight",
    ),
    "a tensor under both names": (
        {}, lambda c: c | {"model.norm.weight": c["output_norm.weight"]}, "model.norm.weight under two names",
    ),
    "a tensor too many": ({}, lambda c: c | {"extra.weight": c["output_norm.weight"]}, "extra.weight is in the"),
    "factors without .weight": (
        {}, lambda c: c | {"rope_freqs": (np.ones(32, np.float32), Kind.F32)}, "rope_freqs is in the weights",
    ),
    "a type without dequantization": (
        {}, lambda c: c | {"blk.0.ffn_down.weight": (np.zeros((256, 584), np.uint8), Kind.Q8_K)},
        "'blk.0.ffn_down.weight' is of type Q8_K",
    ),
    "integers": (
        {}, lambda c: c | {"output_norm.weight": (np.ones(256, np.int32), Kind.I32)}, "is of type I32, which cannot be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_right(run: Any, tmp_path: Path, case: str) -> None:
    keys, change, named = MODELS[case]
    model = random_model("llama")
    content = tensors("llama", model, Kind.F32)
    path = write(
        tmp_path / "m.gguf", "llama", fields("llama", model, **keys), content if change is None else change(content)
    )
    refused(run, tmp_path, path, named)


@pytest.mark.parametrize(
    ("architecture", "whole", "named"),
    [
        ("gemma3", {}, "general.architecture = 'gemma3' is not supported; supported are llama, qwen2, qwen3"),
        ("qwen3moe", {}, "general.architecture = 'qwen3moe' is not supported"),
        ("clip", {}, "general.architecture = 'clip' is not supported"),
        ("llama", {"general.type": "adapter"}, "general.type = 'adapter': expected a model"),
        ("llama", {"general.type": "mmproj"}, "general.type = 'mmproj': expected a model"),
        ("llama", {"general.quantization_version": 1}, "general.quantization_version must be 2, got 1"),
        ("llama", {"tokenizer.ggml.eos_token_id": 999_999}, "tokenizer.ggml.eos_token_id must be an id in [0, 320)"),
        (
            "llama",
            {"tokenizer.ggml.bos_token_id": "1"},
            "tokenizer.ggml.bos_token_id must be an id in [0, 320), got '1'",
        ),
        ("llama", {"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model = 'bert' cannot be converted"),
    ],
)
def test_models_of_other_kinds(run: Any, tmp_path: Path, architecture: str, whole: dict[str, Any], named: str) -> None:
    model = random_model("llama")
    keys, content = fields("llama", model), tensors("llama", model, Kind.F32)
    refused(run, tmp_path, write(tmp_path / "m.gguf", architecture, keys, content, whole), named)


def test_files_of_other_names(run: Any, tmp_path: Path) -> None:
    other = model_file(tmp_path / "m.gguf").rename(tmp_path / "model.bin")
    code, _, err = run("convert", other, "--mlx-path", tmp_path / "out")
    assert code == 2 and err.endswith("model.bin is not a .gguf file: expected one, or a folder\n"), err


def test_a_folder_with_the_name_of_a_file(run: Any, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").mkdir()
    refused(run, tmp_path, tmp_path, "m.gguf has no model*.safetensors, no pytorch_model*.bin and no .gguf file")
    (tmp_path / "m.gguf" / "x.gguf").mkdir()
    refused(run, tmp_path, tmp_path, "x.gguf is not a file")
