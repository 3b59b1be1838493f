"""The memory plan of fine-tuning: weights, gradients, optimizer state, activations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import UsageError, check_option
from ..files import ITEM_SIZES, TensorInfo
from ..generation.memory import usable
from ..sizes import format_size
from .base import is_quantized, quantizable
from .chunks import QUERIES, tokens_at_once
from .recipes import BITS, GROUP_SIZE, LARGEST, LORA, Recipe

FLOATING = ("F32", "F16", "BF16")
# Found by measuring, benchmarks/finetune_memory.py. Numbers that a layer keeps of a token for the backward pass:
# multiples of the hidden size, of the size of its keys, of that of the feed-forward layer.
HIDDEN, KEYS, FEED_FORWARD = 4.5, 5.0, 5.0
CASTS = 0.4  # of what LoRA's layers read and write: kept in float32 as well, where activations have 16 bits
WORK, AGAIN = 0.25, 2.9  # a layer at work, as a part of what it keeps; with what it recomputes under checkpointing
SCORES = 3.8, 1.2, 2.7  # arrays of attention scores: at work under checkpointing; kept, and at work, without
LOGITS, HEAD, UPDATE = 4.2, 4.5, 1.5  # arrays of logits; of a trained embedding; of what is trained as it changes


@dataclass(frozen=True)
class TrainingPlan:
    """The peak of a run, in bytes.

    Args:
        weights: of the model, in the type that it is trained in.
        gradients, optimizer: of the trained parameters, in float32.
        activations: of the sequences that go through the model at once; or, if that is more, what an update or
            writing the result takes.
        limit: bytes of memory that may be used.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    limit: int

    @property
    def total(self) -> int:
        """Bytes of all of these."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def fits(self) -> bool:
        """Whether the total is within the limit."""
        return self.total <= self.limit


def plan_training(checkpoint: Checkpoint, recipe: Recipe, memory: int | None = None) -> TrainingPlan:
    """The memory that a run needs, against a budget in bytes; None for the device's limit. No weight is read."""
    check_option("memory", memory is None or memory > 0, "positive", memory)
    trained = _trained(checkpoint, recipe)
    adapters = 4 * trained if recipe.lora else 0
    weights = adapters + sum(_weight(name, info, recipe) for name, info in checkpoint.tensors.items())
    gradients = 4 * trained * (1 if recipe.accumulate == 1 else 2)
    updating, writing = UPDATE * 4 * trained - gradients, _writing(checkpoint, recipe) - gradients - 8 * trained
    working = max(_activations(checkpoint, recipe), updating, writing)
    return TrainingPlan(weights, gradients, 8 * trained, int(working), usable(memory))


def _weight(name: str, info: TensorInfo, recipe: Recipe) -> int:
    """Bytes of a tensor in training."""
    numbers, settings = math.prod(info.shape), recipe.quantization
    if settings and quantizable(name, info.shape, settings):
        of_a_group = 2 * ITEM_SIZES[info.dtype] if settings["mode"] == "affine" else 1  # scale, bias
        return numbers * settings["bits"] // 8 + numbers // settings["group_size"] * of_a_group
    return info.nbytes if recipe.lora or info.dtype not in FLOATING else 4 * numbers


def _trained(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """How many parameters the run trains."""
    dims = checkpoint.dimensions
    layers = recipe.num_layers or dims.layers
    if recipe.lora:
        return layers * recipe.lora_rank * _read_and_written(checkpoint)
    numbers = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items() if info.dtype in FLOATING}
    if recipe.num_layers is None:
        return sum(numbers.values())
    return sum(number for name, number in numbers.items() if ".layers." in name) * layers // dims.layers


def _read_and_written(checkpoint: Checkpoint) -> int:
    """Numbers of a token that a layer's seven projections read and write."""
    dims = checkpoint.dimensions
    width, ends = dims.heads * dims.head_dim, dims.hidden
    return 2 * (ends + width) + 2 * (ends + dims.keys) + 3 * (ends + dims.feed_forward)


def _item_size(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Bytes of a number of the activations."""
    dtype = checkpoint.tensors["model.norm.weight"].dtype
    quantization = recipe.quantization or checkpoint.config.get("quantization") or {}
    if quantization.get("mode", "affine") != "affine" and dtype == "F16":  # an embedding in bfloat16 meets float16
        return 4
    return ITEM_SIZES[dtype] if recipe.lora else 4


def _activations(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """Bytes of the sequences that go through the model at once, at the peak."""
    dims, size = checkpoint.dimensions, _item_size(checkpoint, recipe)
    layers, tokens = recipe.num_layers or dims.layers, recipe.batch_size * recipe.length
    layer = tokens * size * (HIDDEN * dims.hidden + KEYS * dims.keys + FEED_FORWARD * dims.feed_forward)
    layer += CASTS * tokens * 4 * _read_and_written(checkpoint) if recipe.lora and size < 4 else 0
    logits = LOGITS * 4 * min(tokens, tokens_at_once(dims.vocabulary)) * dims.vocabulary
    head = HEAD * 4 * dims.vocabulary * dims.hidden if not recipe.lora and recipe.num_layers is None else 0
    scores = tokens * dims.heads * size
    if recipe.grad_checkpoint:
        work = AGAIN * layer + SCORES[0] * scores * min(recipe.length, QUERIES)
        return head + layers * tokens * dims.hidden * size + max(work, logits)
    kept, work = layer + SCORES[1] * scores * recipe.length, WORK * layer + SCORES[2] * scores * recipe.length
    return head + layers * kept + max(work, logits)


def _writing(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """Bytes that the largest tensor takes while the result is written, if it is dequantized for that: see `result`."""
    if not recipe.quantization and not is_quantized(checkpoint):
        return 0
    dims = checkpoint.dimensions
    in_its_type = dims.item_size if dims.item_size < 4 else 0
    return (2 * 4 + in_its_type) * dims.hidden * max(dims.vocabulary, dims.feed_forward)


def require_training_memory(checkpoint: Checkpoint, recipe: Recipe, memory: int | None = None) -> None:
    """Raise UsageError where a run does not fit into memory; its remedies would make the run fit."""
    plan = plan_training(checkpoint, recipe, memory)
    if plan.fits:
        return
    parts = ("weights", "gradients", "optimizer", "activations")
    sizes = ", ".join(f"{part} {format_size(getattr(plan, part))}" for part in parts)
    smaller = _smaller(checkpoint, recipe)
    change = next((change for change, other in smaller if plan_training(checkpoint, other, memory).fits), None)
    raise UsageError(
        f"{recipe.batch_size} × {recipe.length:,} tokens need {format_size(plan.total)} ({sizes}), the limit is "
        f"{format_size(plan.limit)}" + ("" if change else ": only a smaller model would fit"),
        remedies=[*([change] if change else []), {"force": True}],
    )


def _smaller(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[tuple[dict[str, Any], Recipe]]:
    """Changes that need less memory, and the recipe with them: those that change the result least come first."""
    lengths = [recipe.length >> i for i in range(max(1, recipe.length.bit_length() - 6))]
    kinds = dict.fromkeys([(recipe.fine_tune_type, recipe.q_bits), (LORA, recipe.q_bits)])
    if not recipe.quantization and not is_quantized(checkpoint) and checkpoint.dimensions.hidden % GROUP_SIZE == 0:
        kinds[LORA, BITS] = None
    skipping = checkpoint.rope.context_length is not None
    checkpointed, sizes = dict.fromkeys((recipe.grad_checkpoint, True)), dict.fromkeys((recipe.batch_size, 1))
    for length, (kind, bits), checkpointing, size in product(lengths, kinds, checkpointed, sizes):
        values: dict[str, Any] = {
            "batch_size": size,
            "accumulate": recipe.accumulate * recipe.batch_size // size,
            "grad_checkpoint": checkpointing,
            "fine_tune_type": kind,
            "q_bits": bits,
            "length": length,
            "skip_positions": recipe.skip_positions or (length < recipe.length and skipping),
        }
        change = {name: value for name, value in values.items() if value != getattr(recipe, name)}
        if change and values["accumulate"] <= LARGEST["accumulate"]:
            yield change, replace(recipe, **change)
