"""The memory plan of fine-tuning: weights, gradients, optimizer state, activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ..checkpoint import Checkpoint
from ..dimensions import Dimensions
from ..errors import UsageError, check_option
from ..files import TensorInfo
from ..generation.memory import RESERVE, RESERVE_PART, device_memory
from ..sizes import format_size
from .chunks import POSITIONS, QUERIES
from .recipes import LARGEST, LORA, Recipe

FLOATING = ("F32", "F16", "BF16")
# Numbers that a layer keeps of a token for the backward pass: multiples of the hidden size, of the size of its keys,
# and of that of the feed-forward layer. SCORES: of its attention, kept and at work; WORK: a layer at work, as a part of
# what it keeps; LOGITS: of the vocabulary; UPDATE: of what is trained, while all of it changes. Fitted to 71 runs on a
# CPU (seven models of 2 to 24 layers, 128 to 1024 tokens): the plan was 0.85 to 1.17 times the measured peak.
HIDDEN, KEYS, FEED_FORWARD, SCORES, WORK, LOGITS, UPDATE = 6.4, 13.6, 5.8, (1.2, 1.8), 0.63, 3.3, 2.3


@dataclass(frozen=True)
class TrainingPlan:
    """The peak of a run, in bytes.

    Args:
        weights: of the model, in the type that it is trained in.
        gradients, optimizer: of the trained parameters, in float32.
        activations: of the sequences that go through the model at once; or, if that is more, the new weights.
        limit: the memory budget, less the reserve.
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
    tensors, dims = checkpoint.tensors, checkpoint.dimensions
    half = recipe.lora and tensors["model.norm.weight"].dtype == "BF16"  # see run.prepare
    dims = replace(dims, item_size=2 if half else 4)
    weights = sum(_numbers(info) * dims.item_size or info.nbytes for info in tensors.values())
    trained = _trained(dims, tensors, recipe)
    gradients = 4 * trained * (1 if recipe.accumulate == 1 else 2)
    activations = max(int(recipe.batch_size * _activations(dims, recipe)), int(UPDATE * 4 * trained) - gradients)
    budget = memory if memory is not None else device_memory()
    limit = budget - int(max(RESERVE, RESERVE_PART * budget))
    return TrainingPlan(weights, gradients, 8 * trained, activations, limit)


def _numbers(info: TensorInfo) -> int:
    """Of a floating-point tensor; 0 for a quantized one."""
    return math.prod(info.shape) if info.dtype in FLOATING else 0


def _trained(dims: Dimensions, tensors: Mapping[str, TensorInfo], recipe: Recipe) -> int:
    """How many parameters the run trains."""
    layers = recipe.num_layers or dims.layers
    if recipe.lora:
        width, ends = dims.heads * dims.head_dim, dims.hidden
        inputs_and_outputs = 2 * (ends + width) + 2 * (ends + dims.keys) + 3 * (ends + dims.feed_forward)
        return layers * recipe.lora_rank * inputs_and_outputs
    if recipe.num_layers is None:
        return sum(map(_numbers, tensors.values()))
    in_layers = sum(_numbers(info) for name, info in tensors.items() if ".layers." in name)
    return in_layers * layers // dims.layers


def _activations(dims: Dimensions, recipe: Recipe) -> float:
    """Bytes of one sequence at the peak."""
    tokens, size = recipe.length, dims.item_size
    seen = min(tokens, QUERIES) if recipe.grad_checkpoint else tokens
    scores = tokens * seen * dims.heads * size
    layer = tokens * size * (HIDDEN * dims.hidden + KEYS * dims.keys + FEED_FORWARD * dims.feed_forward)
    kept, work = layer + SCORES[0] * scores, WORK * layer + SCORES[1] * scores
    logits = LOGITS * 4 * min(tokens, POSITIONS) * dims.vocabulary
    if recipe.grad_checkpoint:
        return dims.layers * tokens * dims.hidden * size + kept + work + logits
    return dims.layers * kept + max(work, logits)


def require_training_memory(checkpoint: Checkpoint, recipe: Recipe, memory: int | None = None) -> None:
    """Raise UsageError where a run does not fit into memory; its remedies would make the run fit."""
    plan = plan_training(checkpoint, recipe, memory)
    if plan.fits:
        return
    parts = ("weights", "gradients", "optimizer", "activations")
    sizes = ", ".join(f"{part} {format_size(getattr(plan, part))}" for part in parts)
    fitting = (change for change, other in _smaller(recipe) if plan_training(checkpoint, other, memory).fits)
    change = next(fitting, None)
    raise UsageError(
        f"{recipe.batch_size} × {recipe.length} tokens need {format_size(plan.total)} ({sizes}), the limit is "
        f"{format_size(plan.limit)}" + ("" if change else ": only a smaller model would fit"),
        remedies=[*([change] if change else []), {"force": True}],
    )


def _smaller(recipe: Recipe) -> Iterator[tuple[dict[str, Any], Recipe]]:
    """Changes that need less memory, and the recipe with them: those that change the result least come first."""
    lengths = [recipe.length >> i for i in range(max(1, recipe.length.bit_length() - 6))]
    kinds, checkpointed = dict.fromkeys((recipe.fine_tune_type, LORA)), dict.fromkeys((recipe.grad_checkpoint, True))
    sizes = dict.fromkeys((recipe.batch_size, 1))
    for length, kind, checkpointing, size in product(lengths, kinds, checkpointed, sizes):
        values: dict[str, Any] = {
            "batch_size": size,
            "accumulate": recipe.accumulate * recipe.batch_size // size,
            "grad_checkpoint": checkpointing,
            "fine_tune_type": kind,
            "length": length,
        }
        change = {name: value for name, value in values.items() if value != getattr(recipe, name)}
        if change and values["accumulate"] <= LARGEST["accumulate"]:
            yield change, replace(recipe, **change)
