"""The folder that fine-tuning makes: a checkpoint, with LoRA's adapters of its source beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint import Checkpoint
from ..storage import disk_errors
from ..tokenizer import copy_tokenizer
from .recipes import LORA, Recipe

ADAPTERS = "adapters"


def write_result(
    folder: Path, model: nn.Module, checkpoint: Checkpoint, record: Path, *, recipe: Recipe, dtype: str
) -> None:
    """Write weights, config.json, tokenizer, the run log, LoRA's adapters; they are on the disk on return.

    Args:
        folder: to make; what a killed run has left of it is deleted.
        model: after training; it is changed.
        checkpoint: the source, with the rope settings that the model was trained with.
        record: the run log, which is copied.
        recipe, dtype: of the run.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    config = checkpoint.mlx_config
    with disk_errors(folder):
        if recipe.lora:
            _save_adapters(model, folder / ADAPTERS, recipe, checkpoint.name)
            config = _fuse(model, config)
        model.set_dtype(getattr(mx, dtype))
        mlx_lm.utils.save_model(folder, model)
    config = config | {"dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer(checkpoint.folder, folder)
    shutil.copyfile(record, folder / record.name)
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _save_adapters(model: nn.Module, folder: Path, recipe: Recipe, name: str) -> None:
    """In mlx-lm's format: for the source with the new rope settings."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    layers = recipe.num_layers or len(model.layers)
    settings = {"model": name, "fine_tune_type": LORA, "num_layers": layers}
    settings |= {"lora_parameters": recipe.lora_parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _fuse(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Add LoRA's changes to the weights in float32; quantized weights are dequantized: rounding would lose the changes.

    Returns:
        config.json without quantization.
    """
    model.set_dtype(mx.float32)
    fused = [(path, layer.fuse(dequantize=True)) for path, layer in model.named_modules() if hasattr(layer, "fuse")]
    model.update_modules(tree_unflatten(fused))
    mlx_lm.utils.dequantize_model(model)
    return {key: value for key, value in config.items() if not key.startswith("quantization")}
