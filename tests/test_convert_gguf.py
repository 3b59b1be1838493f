"""GGUF as a source of `convert`: the same weights and logits as transformers reads from the same file."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.convert import VerificationError, checkpoint, convert, gguf_file, gguf_rope, verify
from mlx_resonance.convert.gguf_header import read_gguf_header
from mlx_resonance.errors import UsageError

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, quants

from .checkpoints import PEAK, contents
from .gguf_files import SCALES, TOKENS, fields, model_file, random_blocks, random_model, tensors, write

IDS = np.random.default_rng(0).integers(0, TOKENS, (1, 48))
FIVE = [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16]


def logits_of(folder: Path) -> np.ndarray[Any, Any]:
    return np.array(Checkpoint.open(folder).load()(mx.array(IDS)).astype(mx.float32))


def logits_of_transformers(path: Path) -> np.ndarray[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model.eval()(torch.from_numpy(IDS)).logits.numpy()
    return logits


def weights_of(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        found |= mx.load(str(file))  # type: ignore[arg-type]
    return found


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("kind", FIVE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_transformers_for_the_same_file(tmp_path: Path, architecture: str, kind: Kind) -> None:
    path = model_file(tmp_path / "m.gguf", architecture, kind)
    convert(path, tmp_path / "out", dtype="float32", tokenizer=False, resonance=False)
    theirs = logits_of_transformers(path)
    assert np.abs(logits_of(tmp_path / "out") - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_every_type_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """Against the gguf package's function, on whole tensors; `convert` reads a few rows at a time."""
    monkeypatch.setattr(gguf_file, "AT_ONCE", 1000)
    model = random_model("llama")
    content = tensors("llama", model, Kind.F32)
    for i, (name, (value, _)) in enumerate(content.items()):
        if value.ndim == 2:
            content[name] = (random_blocks(value.shape, kind, seed=i), kind)
    path = write(tmp_path / "m.gguf", "llama", fields("llama", model), content)
    convert(path, tmp_path / "out", dtype="float32", tokenizer=False, verify=True)
    found = weights_of(tmp_path / "out")
    expected = quants.dequantize(content["blk.1.ffn_down.weight"][0], kind)
    assert np.isfinite(expected).all() and expected.std() > 0
    assert np.array_equal(np.array(found["model.layers.1.mlp.down_proj.weight"]), expected)
    query = quants.dequantize(content["blk.1.attn_q.weight"][0], kind)
    rows = [64 * head + 2 * (i % 32) + i // 32 for head in range(4) for i in range(64)]
    assert np.array_equal(np.array(found["model.layers.1.self_attn.q_proj.weight"]), query[rows])


def q4_k(block: np.ndarray[Any, Any]) -> list[float]:
    """256 values of `block_q4_K`, one at a time, from its description in ggml-common.h and `get_scale_min_k4`."""
    d, dmin = (float(value) for value in block[:4].view(np.float16))
    packed, quarters, values = [int(byte) for byte in block[4:16]], block[16:], []
    for j in range(8):
        if j < 4:
            scale, least = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
            least = packed[j + 4] >> 4 | packed[j] >> 6 << 4
        for i in range(32):
            byte = int(quarters[j // 2 * 32 + i])
            values.append(d * scale * (byte >> 4 if j % 2 else byte & 15) - dmin * least)
    return values


def q6_k(block: np.ndarray[Any, Any]) -> list[float]:
    """256 values of `block_q6_K`, likewise."""
    d = float(block[208:].view(np.float16)[0])
    values = []
    for i in range(256):
        half, place = divmod(i, 128)
        quarter, column = divmod(place, 32)
        low = int(block[64 * half + column + 32 * (quarter % 2)]) >> (4 if quarter > 1 else 0) & 15
        high = int(block[128 + 32 * half + column]) >> 2 * quarter & 3
        values.append(d * int(block[192 + i // 16].view(np.int8)) * ((low | high << 4) - 32))
    return values


@pytest.mark.parametrize(("kind", "oracle"), [(Kind.Q4_K, q4_k), (Kind.Q6_K, q6_k)], ids=["Q4_K", "Q6_K"])
def test_the_common_types_against_their_description(tmp_path: Path, kind: Kind, oracle: Any) -> None:
    model = random_model("llama")
    content = tensors("llama", model, Kind.F32)
    blocks = random_blocks((TOKENS, 256), kind)
    content["token_embd.weight"] = (blocks, kind)
    path = write(tmp_path / "m.gguf", "llama", fields("llama", model), content)
    convert(path, tmp_path / "out", dtype="float32", tokenizer=False)
    found = np.array(weights_of(tmp_path / "out")["model.embed_tokens.weight"])[:20]
    expected = np.array([oracle(row) for row in blocks[:20]])
    assert np.allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_float16_unless_asked_and_float32_is_not_rounded(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.gguf", kind=Kind.F32)
    convert(path, tmp_path / "half", tokenizer=False)
    convert(path, tmp_path / "single", dtype="float32", tokenizer=False)
    half, single = weights_of(tmp_path / "half"), weights_of(tmp_path / "single")
    assert {value.dtype for value in half.values()} == {mx.float16}
    expected = random_model("llama").state_dict()
    for name, value in single.items():
        assert np.array_equal(np.array(value), expected[name].numpy()), name
        assert mx.array_equal(half[name], value.astype(mx.float16)), name


def test_a_number_beyond_float16_is_refused(run: Any, tmp_path: Path) -> None:
    model = random_model("llama")
    content = tensors("llama", model, Kind.F32)
    content["blk.1.ffn_up.weight"][0][3, 5] = -70000
    path = write(tmp_path / "m.gguf", "llama", fields("llama", model), content)
    code, out, err = run("convert", path, "--mlx-path", tmp_path / "out", "--no-tokenizer")
    assert (code, out) == (2, "") and "model.layers.1.mlp.up_proj.weight has a value of 70000" in err
    assert "give --dtype float32 or --dtype bfloat16" in err and not (tmp_path / "out").exists()
    convert(path, tmp_path / "out", dtype="bfloat16", tokenizer=False, restart=True)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_where_the_file_has_none(tmp_path: Path, tied: bool) -> None:
    model = random_model("llama", tie_word_embeddings=tied)
    content = tensors("llama", model, Kind.Q8_0)
    assert ("output.weight" in content) is not tied
    path = write(tmp_path / "m.gguf", "llama", fields("llama", model), content)
    convert(path, tmp_path / "out", dtype="float32", tokenizer=False, resonance=False)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is tied
    theirs = logits_of_transformers(path)
    assert np.abs(logits_of(tmp_path / "out") - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}), ("qwen3", {"head_dim": 32})],
    ids=["llama", "qwen3"],
)
def test_biases_and_a_head_length_of_its_own(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    """transformers' reader knows neither; its model of the same weights does."""
    import torch

    model = random_model(architecture, **changes)
    keys = fields(architecture, model, attention__key_length=32, attention__value_length=32)
    path = write(tmp_path / "m.gguf", architecture, keys, tensors(architecture, model, Kind.F32))
    convert(path, tmp_path / "out", dtype="float32", tokenizer=False, resonance=False, verify=True)
    assert changes.items() <= config_of(tmp_path / "out").items()
    with torch.no_grad():
        theirs = model(torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(logits_of(tmp_path / "out") - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_config_is_what_the_metadata_says(tmp_path: Path) -> None:
    path = model_file(
        tmp_path / "m.gguf", attention__layer_norm_rms_epsilon=1e-5, rope__freq_base=123456.0,
        attention__head_count=[4, 4], attention__head_count_kv=[2, 2], feed_forward_length=[512, 512],
        attention__sliding_window=0, expert_count=0, rope__scaling__finetuned=True, tensor_data_layout="Meta AI",
    )  # fmt: skip
    convert(path, tmp_path / "out", tokenizer=False, resonance=False)
    config = config_of(tmp_path / "out")
    expected = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "vocab_size": TOKENS, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 123456.0,
        "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "hidden_act": "silu", "dtype": "float16", "torch_dtype": "float16", "bos_token_id": 300, "eos_token_id": 301,
    }  # fmt: skip
    assert config == expected


def test_a_window_makes_a_mistral(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = model_file(tmp_path / "m.gguf", attention__sliding_window=128)
    done = convert(path, tmp_path / "out", tokenizer=False)
    config = config_of(tmp_path / "out")
    assert (config["model_type"], config["sliding_window"], done.rope.context_length) == ("mistral", 128, 128)
    assert "its context is 128 tokens" in caplog.text


def test_killed_half_way_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.gguf", kind=Kind.Q4_0)
    options = {"tokenizer": False, "max_shard_size": "500KB"}
    convert(path, tmp_path / "whole" / "out", **options)
    code = (
        "import json, os, signal, sys, mlx_resonance.convert.weights as w\n"
        "from mlx_resonance.convert import convert\n"
        "sync, count = w._sync, [0]\n"
        "def kill(*a):\n"
        "    count[0] += 1\n"
        "    if count[0] == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return sync(*a)\n"
        "w._sync = kill\n"
        "convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, path, tmp_path / "out", json.dumps(options)]
    killed = subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    assert killed.returncode == -9 and (tmp_path / "out.partial").exists()
    finished = json.loads((tmp_path / "out.partial" / "conversion.json").read_text())["weights"]
    assert finished
    convert(path, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


@pytest.mark.parametrize("change", ["metadata", "data"])
def test_a_file_that_changed_between_the_runs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = model_file(tmp_path / "m.gguf")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(checkpoint, "write_card", lambda *_: (_ for _ in ()).throw(OSError("full")))
        convert(path, tmp_path / "out", tokenizer=False)
    status = path.stat()
    if change == "metadata":  # of the same size and time
        path.write_bytes(path.read_bytes().replace(np.float32(1e4).tobytes(), np.float32(2e4).tobytes(), 1))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")
    with pytest.raises(UsageError, match=r"was started with source m\.gguf"):
        convert(path, tmp_path / "out", tokenizer=False)
    convert(path, tmp_path / "out", tokenizer=False, restart=True)


def test_temporary_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = model_file(tmp_path / "m.gguf")
    convert(path, tmp_path / "out", tokenizer=False, verify=True)
    with pytest.raises(UsageError):
        convert(path, tmp_path / "other", tokenizer=False, rope="yarn")
    model_file(path, attention__head_count=3, attention__key_length=64)
    with pytest.raises(UsageError):
        convert(path, tmp_path / "other", tokenizer=False)
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_verify_compares_with_the_file(run: Any, tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.gguf", kind=Kind.Q4_1)
    convert(path, tmp_path / "out", dtype="float32", tokenizer=False)
    code, _, err = run("verify", tmp_path / "out", "--source", path)
    assert code == 0 and "equal to the source" in err, err
    assert verify(tmp_path / "out", tmp_path, file="m.gguf").problems == []
    model = random_model("llama")
    content = tensors("llama", model, Kind.F32)
    content["blk.0.attn_k.weight"][0][0, 0] += 1
    write(path, "llama", fields("llama", model), content)
    found = verify(tmp_path / "out", path).problems
    assert any("model.layers.0.self_attn.k_proj.weight" in problem for problem in found)


def test_verify_finds_rows_in_the_wrong_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_file(tmp_path / "m.gguf")
    convert(path, tmp_path / "right", dtype="float32", tokenizer=False, verify=True)
    read = gguf_file.GgufFile.read

    def interleaved(self: Any, tensor: str) -> mx.array:
        heads, self._heads = self._heads, None
        try:
            return read(self, tensor)
        finally:
            self._heads = heads

    monkeypatch.setattr(gguf_file.GgufFile, "read", interleaved)
    with pytest.raises(VerificationError, match=r"self_attn\.[qk]_proj"):
        convert(path, tmp_path / "out", dtype="float32", tokenizer=False, verify=True)


def test_verify_finds_a_scaling_that_was_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_file(tmp_path / "m.gguf", rope__scaling__type="yarn", rope__scaling__factor=4.0)
    convert(path, tmp_path / "right", tokenizer=False, verify=True)
    monkeypatch.setitem(gguf_rope.YARN, "yarn_beta_fast", 16.0)
    with pytest.raises(VerificationError, match="wavelengths are off those of the GGUF file's metadata"):
        convert(path, tmp_path / "out", tokenizer=False, verify=True)


def test_quantized_again(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.gguf", kind=Kind.Q8_0)
    done = convert(path, tmp_path / "out", quantize=True, tokenizer=False, verify=True)
    assert done.checks is not None and done.checks["problems"] == []
    assert config_of(tmp_path / "out")["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_about_one_tensor(tmp_path: Path) -> None:
    """24 tensors of 17 MB in float32, 201 MB in the result: the peak is well below both sums."""
    model = random_model("llama", num_hidden_layers=2)
    keys = fields("llama", model, feed_forward_length=16384, block_count=8)
    kind = Kind.Q4_0
    small = tensors("llama", model, Kind.F32)
    content = {name: entry for name, entry in small.items() if not name.startswith("blk.")}
    for layer in range(8):
        for name, (value, own) in small.items():
            if name.startswith("blk.0."):
                part = name.replace("blk.0.", f"blk.{layer}.")
                shape = tuple(16384 if length == 512 else length for length in value.shape)
                wide = "ffn_" in name and value.ndim == 2
                zeros = np.zeros((*shape[:-1], shape[-1] // 32 * 18), np.uint8)
                content[part] = (zeros, kind) if wide else (value, own)
    path = write(tmp_path / "m.gguf", "llama", keys, content)
    code = """
import sys
from mlx_resonance.convert import convert, gguf_source
before = peak()
convert(sys.argv[1], sys.argv[2], tokenizer=False, max_shard_size="20MB")
print(peak() - before)
"""
    command = [sys.executable, "-c", PEAK + code, str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 130e6 < sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_the_reader_of_the_gguf_package_agrees(tmp_path: Path) -> None:
    """On metadata and places, for a file with values of all types."""

    def change(writer: Any) -> None:
        for name, value in {"uint8": 200, "int8": -5, "uint16": 60000, "int16": -300, "int32": -70000}.items():
            getattr(writer, f"add_{name}")(f"test.{name}", value)
        for name, other in {"uint64": 2**60, "int64": -(2**60), "float64": 0.1, "bool": True}.items():
            getattr(writer, f"add_{name}")(f"test.{name}", other)
        for name, entries in {"texts": ["", "ä", "x" * 300], "flags": [True, False], "floats": [0.5, -2.0]}.items():
            writer.add_array(f"test.{name}", entries)

    model = random_model("llama")
    path = write(
        tmp_path / "m.gguf", "llama", fields("llama", model), tensors("llama", model, Kind.Q4_0), change=change
    )
    header, reader = read_gguf_header(path), GGUFReader(path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata.pop("llama.attention.layer_norm_rms_epsilon") == 1e-5
    del expected["llama.attention.layer_norm_rms_epsilon"]  # float32
    assert header.metadata == expected
    found = {name: (tensor.offset, tensor.nbytes, tensor.kind) for name, tensor in header.tensors.items()}
    assert found == {t.name: (t.data_offset, t.n_bytes, t.tensor_type) for t in reader.tensors}


def test_a_name_with_a_suffix_is_not_what_makes_it_gguf(tmp_path: Path, random_llama: Path) -> None:
    """A folder may have any name, and safetensors come first in one that has both."""
    folder = tmp_path / "named.gguf"
    shutil.copytree(random_llama, folder)
    model_file(folder / "m.gguf")
    convert(folder, tmp_path / "out")
    assert config_of(tmp_path / "out")["hidden_size"] == 64
    convert(folder, tmp_path / "chosen", file="m.gguf", tokenizer=False)
    assert config_of(tmp_path / "chosen")["hidden_size"] == 256
