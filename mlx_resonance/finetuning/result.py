"""The folder that fine-tuning makes: a checkpoint, with LoRA's adapters of its source beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .._mlx_lm import make_shards
from ..checkpoint import Checkpoint
from ..errors import UsageError
from ..files import INDEX
from ..storage import disk_errors
from ..tokenizer import copy_tokenizer
from .recipes import LORA, Recipe

ADAPTERS = "adapters"
TYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}  # safetensors' names


def check_range(source: Checkpoint, dtype: str) -> None:
    """Refuse a result in float16 where the source has weights beyond it, before anything is trained.

    The weights are read, one at a time: no model that is trained afterwards keeps them.

    Raises:
        UsageError: the first such tensor, with the types that hold it.
    """
    weights = _fused(source.load(lazy=True), mx.float32) if dtype == "float16" else {}
    for name in list(weights):
        largest: float = mx.max(mx.abs(weights.pop(name))).item()  # type: ignore[assignment]
        if largest > mx.finfo(mx.float16).max:
            raise UsageError(
                f"{name} has a value of {largest:.6g}, beyond the range of float16",
                remedies=[{"dtype": "float32"}, {"dtype": "bfloat16"}],
            )


def write_result(
    folder: Path, model: nn.Module, checkpoint: Checkpoint, record: Path, *, recipe: Recipe, dtype: str
) -> None:
    """Write weights, config.json, tokenizer, the run log, LoRA's adapters; they are on the disk on return.

    Args:
        folder: to make; what a killed run has left of it is deleted.
        model: after training.
        checkpoint: the source, with the rope settings that the model was trained with.
        record: the run log, which is copied.
        recipe, dtype: of the run.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    with disk_errors(folder):
        if recipe.lora:
            _save_adapters(model, folder / ADAPTERS, recipe, checkpoint.name)
        weights = _fused(model, getattr(mx, dtype))
        _save(folder, weights)
    config = {key: value for key, value in checkpoint.mlx_config.items() if not key.startswith("quantization")}
    config |= {"dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer(checkpoint.folder, folder)
    shutil.copyfile(record, folder / record.name)
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _save_adapters(model: nn.Module, folder: Path, recipe: Recipe, name: str) -> None:
    """In mlx-lm's format: for the source with the new rope settings, quantized as the recipe says."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    layers = recipe.num_layers or len(model.layers)
    settings = {"model": name, "fine_tune_type": LORA, "num_layers": layers}
    settings |= {"lora_parameters": recipe.lora_parameters}
    settings |= {"quantization": recipe.quantization} if recipe.quantization else {}  # of the source, to apply them
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _fused(model: nn.Module, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The weights without LoRA and quantization, each made when it is used: dequantized and changed in float32."""
    modules: dict[str, Any] = dict(model.named_modules())
    adapted = {path for path, module in modules.items() if "lora_a" in module}
    quantized = {path for path, module in modules.items() if "scales" in module}
    plain = []
    for path in sorted(adapted | {path for path in quantized if path.removesuffix(".linear") not in adapted}):
        module, base = modules[path], modules[f"{path}.linear" if path in adapted else path]
        weight = _dequantized(base)
        if path in adapted:
            weight = weight + module.scale * (module.lora_a @ module.lora_b).T
        plain.append((path, {"weight": weight} | ({"bias": base.bias} if "bias" in base else {})))
    replaced = tuple(f"{path}." for path, _ in plain)
    weights = dict(tree_flatten(model.parameters()))
    weights = {name: value for name, value in weights.items() if not name.startswith(replaced)}
    weights |= {f"{path}.{name}": value for path, parts in plain for name, value in parts.items()}
    return {name: value.astype(dtype) for name, value in weights.items()}


def _dequantized(layer: nn.Module) -> mx.array:
    """The weight of a layer in float32. The scales are widened first, so that no rounding comes on top."""
    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    options = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    if layer.mode != "affine":
        return mx.dequantize(layer.weight, layer.scales, **options, dtype=mx.float32)
    scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    return mx.dequantize(layer.weight, scales, biases, **options)


def _save(folder: Path, weights: dict[str, mx.array]) -> None:
    """Write weights and their index. Each tensor is made when its turn comes, and let go."""
    shards = make_shards(weights)
    weights.clear()
    total, place = 0, dict[str, str]()
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        place |= dict.fromkeys(shard, name)
        total += sum(value.nbytes for value in shard.values())
        _write(folder / name, shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=4), encoding="utf-8")


def _write(path: Path, tensors: dict[str, mx.array]) -> None:
    """A safetensors file, without mx.save_safetensors, which first makes all of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + value.nbytes
        header[name] = {"dtype": TYPES[value.dtype], "shape": value.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in list(tensors):
            file.write(memoryview(mx.contiguous(tensors.pop(name)).view(mx.uint8)))  # type: ignore[arg-type]
