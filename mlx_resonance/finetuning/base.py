"""The model in training: a base in its own type or quantized, adapters in float32; or all weights in float32."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..checkpoint import Checkpoint
from ..errors import ANOTHER, UsageError, check_option
from .recipes import LORA, Recipe

AT_ONCE = 2**22  # elements: in a 4-bit float MLX on the CPU needs 70 bytes for each


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether a layer's weights are quantized."""
    return any(name.endswith(".scales") for name in checkpoint.tensors)


def check_trainable(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise UsageError where the recipe does not fit the checkpoint."""
    settings, layers = recipe.quantization, checkpoint.dimensions.layers
    check_option("num_layers", (recipe.num_layers or 0) <= layers, f"at most the model's {layers}", recipe.num_layers)
    if is_quantized(checkpoint):
        if settings:
            found = checkpoint.config.get("quantization") or {}
            how = ", ".join(f"{name} {found[name]}" for name in ("bits", "group_size", "mode") if name in found)
            option = "q_bits" if recipe.q_bits is not None else "q_mode"
            raise UsageError(f"the weights are already quantized ({how}): leave out {option}", option=option)
        if not recipe.lora:
            raise UsageError(
                "the weights are quantized: only LoRA trains those",
                remedies=[{"fine_tune_type": LORA}, {"model": ANOTHER}],
            )
    elif settings and not any(quantizable(name, info.shape, settings) for name, info in checkpoint.tensors.items()):
        size = settings["group_size"]
        raise UsageError(f"no layer's width is a multiple of the group size {size}", option="q_group_size")


def quantizable(name: str, shape: tuple[int, ...], settings: dict[str, Any]) -> bool:
    """Whether mlx-lm quantizes a tensor: the weight of a linear layer or an embedding, of a width that fits."""
    return name.endswith(".weight") and len(shape) == 2 and shape[1] % settings["group_size"] == 0


def prepare(model: nn.Module, recipe: Recipe) -> None:
    """Quantize the weights of a model, if the recipe says so, and make trainable what it trains, in float32.

    Args:
        model: from `Checkpoint.load`, its weights not yet read; each is read when it is quantized.
        recipe: of the run. The base of `lora` keeps its type.
    """
    if recipe.quantization:
        quantize(model, recipe.quantization)
    if not recipe.lora:
        model.set_dtype(mx.float32)
    model.freeze()
    if recipe.lora:
        mx.random.seed(recipe.seed)
        linear_to_lora_layers(model, recipe.num_layers or len(model.layers), recipe.lora_parameters)
    elif recipe.num_layers is None:
        model.unfreeze()
    else:
        for layer in model.layers[-recipe.num_layers :]:
            layer.unfreeze()


def quantize(model: nn.Module, settings: dict[str, Any]) -> None:
    """Quantize every linear layer and embedding, the largest first: one of them at a time is in memory as it was."""
    found = {path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    for path in sorted(found, key=lambda path: -found[path].weight.size):
        module = found.pop(path)
        if quantizable(f"{path}.weight", module.weight.shape, settings):
            model.update_modules(tree_unflatten([(path, _quantized(module, settings))]))


def _quantized(module: Any, settings: dict[str, Any]) -> nn.Module:
    """The layer with its weight quantized a few rows at a time."""
    weight, step = module.weight, max(1, AT_ONCE // module.weight.shape[1])
    pieces: list[Any] = []
    for start in range(0, weight.shape[0], step):
        pieces.append(mx.quantize(weight[start : start + step], **settings))
        mx.eval(pieces[-1])
    parts = [mx.concatenate(list(part)) if len(part) > 1 else part[0] for part in zip(*pieces, strict=True)]
    mx.eval(parts)
    quantized: nn.Module = module.to_quantized(**settings)
    quantized.weight, quantized.scales, *biases = parts
    quantized.biases = biases[0] if biases else None
    return quantized
