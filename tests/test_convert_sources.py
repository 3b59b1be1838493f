"""The formats a checkpoint may come in: PyTorch's .bin files, 8-bit floats with scales, shards without an index."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.convert import convert, verify
from mlx_resonance.files import INDEX

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from .checkpoints import weights


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        state |= load_file(file)
    return state


def without_weights(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of config.json, tokenizer and card, with keys of config.json changed."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_give_what_safetensors_give(
    random_llama: Path, tmp_path: Path, dtype: torch.dtype, shards: int
) -> None:
    state = {name: value.to(dtype) for name, value in state_of(random_llama).items()}
    theirs, ours = (without_weights(random_llama, tmp_path / name / "llama") for name in ("a", "b"))
    save_file(state, ours / "model.safetensors")
    if shards == 1:
        torch.save(state, theirs / "pytorch_model.bin")
    else:
        names = sorted(state)
        weight_map = {name: f"pytorch_model-0000{1 + (i % 2)}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            torch.save({name: state[name] for name in names if weight_map[name] == file}, theirs / file)
        (theirs / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(ours, tmp_path / "from-safetensors")
    convert(theirs, tmp_path / "from-bin", verify=True)
    expected, found = weights(tmp_path / "from-safetensors"), weights(tmp_path / "from-bin")
    assert expected.keys() == found.keys()
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_pickle_does_not_run(random_llama: Path, tmp_path: Path, how: str) -> None:
    folder = without_weights(random_llama, tmp_path / "source")
    content = state_of(random_llama) | {"x": Malicious(tmp_path / "pwned")}
    if how == "torch":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Malicious(tmp_path / "pwned")}))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "pwned").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with contextlib.suppress(Exception):  # the file does run when unpickled plainly
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([torch.zeros(3)], "holds a list"),
        ({"model": {"a": torch.zeros(3)}}, "model is not a tensor"),
        ({1: torch.zeros(3)}, "1 is not a tensor"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is not a tensor"),
        ({"a": torch.zeros(1).expand(10**5, 10**5)}, "larger than its data"),
    ],
)
def test_bin_files_of_something_else_are_refused(random_llama: Path, tmp_path: Path, content: Any, named: str) -> None:
    folder = without_weights(random_llama, tmp_path / "source")
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=named):
        convert(folder, tmp_path / "out")


def test_a_truncated_bin_file_is_refused(random_llama: Path, tmp_path: Path) -> None:
    folder = without_weights(random_llama, tmp_path / "source")
    torch.save(state_of(random_llama), folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (folder / "pytorch_model.bin").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            convert(folder, tmp_path / "out")


def test_shards_without_an_index(random_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "source")
    (folder / INDEX).unlink()
    convert(folder, tmp_path / "out")
    convert(random_llama, tmp_path / "indexed")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "indexed" / "model.safetensors"
    ).read_bytes()
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        convert(folder, tmp_path / "again")


# How each kind is stored: the block that shares a scale, the scale's name, and quantization_config.
FLOAT = {"type": "float", "num_bits": 8}
KINDS: dict[str, tuple[tuple[int, int] | None, str, dict[str, Any]]] = {
    "fp8, blocks": ((48, 40), "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [48, 40]}),
    "fp8, one": (None, "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": None}),
    "fbgemm": ((1, 10**6), "weight_scale", {"quant_method": "fbgemm_fp8"}),
    "compressed, rows": (
        (1, 10**6),
        "weight_scale",
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": FLOAT | {"strategy": "channel"}}}},
    ),
    "compressed, blocks": (
        (64, 64),
        "weight_scale",
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"weights": FLOAT | {"strategy": "block", "block_structure": [64, 64]}}},
        },
    ),
}


def to_fp8(value: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convert to 8-bit floats by blocks: the bytes, the scales, and the values they represent in float32."""
    rows, columns = value.shape
    b0, b1 = block or (rows, columns)
    b0, b1 = min(b0, rows), min(b1, columns)
    scale = torch.zeros(-(-rows // b0), -(-columns // b1))
    stored, meant = torch.zeros_like(value, dtype=torch.float8_e4m3fn), torch.zeros_like(value)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * b0, (i + 1) * b0), slice(j * b1, (j + 1) * b1))
            scale[i, j] = value[part].abs().max() / 448
            stored[part] = (value[part] / scale[i, j]).to(torch.float8_e4m3fn)
            meant[part] = stored[part].float() * scale[i, j]
    return stored, scale.reshape(1) if block is None else scale, meant


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_8_bit_floats_are_multiplied_by_their_scales(
    random_llama: Path, tmp_path: Path, kind: str, container: str
) -> None:
    block, suffix, quantization = KINDS[kind]
    state, expected = {}, {}
    for name, value in state_of(random_llama).items():
        if name.endswith("proj.weight"):
            state[name], state[name.replace("weight", suffix)], meant = to_fp8(value, block)
            state[name.replace("weight", "input_scale")] = torch.ones(1)
            expected[name] = meant.to(torch.bfloat16)
        else:
            expected[name] = state[name] = value.to(torch.bfloat16)
    folder = without_weights(random_llama, tmp_path / "llama", quantization_config=quantization, dtype="bfloat16")
    if container == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    done = convert(folder, tmp_path / "out", resonance=False, verify=True)
    assert done.checks is not None and done.checks["problems"] == []
    assert set(done.left_out) == {name for name in state if name.endswith("input_scale")}
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == mx.bfloat16
        assert np.array_equal(np.array(found[name].astype(mx.float32)), value.float().numpy()), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    Checkpoint.open(tmp_path / "out").load()(mx.array([[1, 2, 3]]))


@pytest.mark.parametrize(
    ("quantization", "scale", "named"),
    [
        ({"quant_method": "fp8", "weight_block_size": [48, 40]}, torch.ones(3, 2), "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 40]}, torch.ones(2, 2), "quantized with fp8"),
        ({"quant_method": "fp8"}, torch.ones(64, 2), "expected one, one per row"),
        ({"quant_method": "fp8"}, torch.ones(64, dtype=torch.uint8), "scales of type U8"),
        ({"quant_method": "fp8"}, None, "without a scale"),
        (None, None, "without a scale"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"type": "int"}}}},
            None,
            "compressed",
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    random_llama: Path, tmp_path: Path, quantization: dict[str, Any] | None, scale: torch.Tensor | None, named: str
) -> None:
    state = state_of(random_llama)
    name = "model.layers.0.self_attn.q_proj.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    if scale is not None:
        state[name + "_scale_inv"] = scale
    folder = without_weights(random_llama, tmp_path / "llama", quantization_config=quantization)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=named):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "modelopt"])
@pytest.mark.parametrize("card", ["base_model: meta-llama/Llama-2-7b-hf", "license: mit", ""])
def test_other_quantizations_are_refused_and_the_original_is_named(
    random_llama: Path, tmp_path: Path, method: str, card: str
) -> None:
    folder = without_weights(random_llama, tmp_path / "llama", quantization_config={"quant_method": method})
    save_file(state_of(random_llama), folder / "model.safetensors")
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(ValueError, match=method) as refused:
        convert(folder, tmp_path / "out")
    assert ("meta-llama/Llama-2-7b-hf" in str(refused.value)) == ("base_model" in card)
    assert "original" in str(refused.value)


def test_a_converted_and_quantized_folder_can_be_converted_again(random_llama: Path, tmp_path: Path) -> None:
    convert(random_llama, tmp_path / "first", quantize=True, resonance=False)
    done = convert(tmp_path / "first", tmp_path / "second", rope="yarn", factor=4, verify=True)
    assert done.checks is not None and done.checks["exact"] == done.checks["tensors"] > 0
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert first.keys() == second.keys() and all(mx.array_equal(first[name], second[name]) for name in first)
    assert verify(tmp_path / "second", tmp_path / "first").problems == []
    with pytest.raises(ValueError, match="quantized already"):
        convert(tmp_path / "first", tmp_path / "third", quantize=True)


def test_a_revision_of_a_folder_is_refused(run: Any, stdlib_llama: Path, tmp_path: Path) -> None:
    code, _, err = run("convert", stdlib_llama, "--mlx-path", tmp_path / "out", "--revision", "main")
    assert code == 2 and "is on the disk: only models of the hub have revisions (--revision)" in err
    assert not list(tmp_path.iterdir())
