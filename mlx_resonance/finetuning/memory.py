"""What fine-tuning needs of a machine's memory: weights, gradients, optimizer state, activations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import check_config
from ..files import TensorInfo, read_config, read_header, weight_files
from ..generation.memory import RESERVE, RESERVE_PART, Shape, device_memory, gigabytes
from .chunks import POSITIONS, QUERIES
from .recipes import Recipe

# Numbers that a layer keeps of a token for going backwards: so many times the hidden size, the size of its keys, and
# that of the feed-forward layer. SCORES: of its attention, kept and at work; WORK: a layer at work, as a part of what
# it keeps; LOGITS: of the vocabulary; UPDATE: of what is trained, while all of it changes. Fitted to 71 runs on a CPU
# (seven models of 2 to 24 layers, 128 to 1024 tokens): the plan was 0.85 to 1.17 times what they took.
HIDDEN, KEYS, FEED_FORWARD, SCORES, WORK, LOGITS, UPDATE = 6.4, 13.6, 5.8, (1.2, 1.8), 0.63, 3.3, 2.3


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of a run, at its largest.

    Args:
        weights: of the model, in the type that it is trained in.
        gradients, optimizer: of what is trained, in float32.
        activations: of the sequences that go through the model at once; or, if that is more, the new weights.
        total: of these.
        limit: what there is, less the reserve.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    total: int
    limit: int

    @property
    def fits(self) -> bool:
        """Whether the total is within the limit."""
        return self.total <= self.limit


def plan_training(folder: Path, recipe: Recipe, memory: int | None = None) -> TrainingPlan:
    """What a run needs. Weights are not read.

    Args:
        folder: the checkpoint.
        recipe: the run's.
        memory: bytes there are; None for what the device says.

    Raises:
        ValueError: memory is not positive, or the checkpoint is wrong.
    """
    if memory is not None and memory <= 0:
        raise ValueError(f"[finetune] memory must be positive, got {memory}")
    tensors = {name: info for file in weight_files(folder) for name, info in read_header(file).items()}
    shape = Shape.of(check_config(read_config(folder), tensors), tensors)
    half = recipe.lora and tensors["model.norm.weight"].dtype == "BF16"  # see run.prepare
    shape = replace(shape, bytes=2 if half else 4)
    weights = sum(_numbers(info) * shape.bytes or info.end - info.start for info in tensors.values())
    trained = _trained(shape, tensors, recipe)
    gradients = 4 * trained * (1 if recipe.accumulate == 1 else 2)
    activations = max(int(recipe.batch_size * _activations(shape, recipe)), int(UPDATE * 4 * trained) - gradients)
    there = memory if memory is not None else device_memory()
    return TrainingPlan(
        weights=weights,
        gradients=gradients,
        optimizer=8 * trained,
        activations=activations,
        total=weights + gradients + 8 * trained + activations,
        limit=there - int(max(RESERVE, RESERVE_PART * there)),
    )


def _numbers(info: TensorInfo) -> int:
    """Of a tensor of floating point; 0 for packed ones."""
    return math.prod(info.shape) if info.dtype in ("F32", "F16", "BF16") else 0


def _trained(shape: Shape, tensors: dict[str, TensorInfo], recipe: Recipe) -> int:
    """How many numbers the run changes."""
    layers = recipe.num_layers or shape.layers
    if recipe.lora:
        width, ends = shape.heads * shape.head_dim, shape.hidden
        inputs_and_outputs = 2 * (ends + width) + 2 * (ends + shape.keys) + 3 * (ends + shape.feed_forward)
        return layers * recipe.lora_rank * inputs_and_outputs
    if recipe.num_layers is None:
        return sum(map(_numbers, tensors.values()))
    in_layers = sum(_numbers(info) for name, info in tensors.items() if ".layers." in name)
    return in_layers * layers // shape.layers


def _activations(shape: Shape, recipe: Recipe) -> float:
    """Bytes of one sequence when the most of it is there."""
    tokens, size = recipe.length, shape.bytes
    seen = min(tokens, QUERIES) if recipe.grad_checkpoint else tokens
    scores = tokens * seen * shape.heads * size
    layer = tokens * size * (HIDDEN * shape.hidden + KEYS * shape.keys + FEED_FORWARD * shape.feed_forward)
    kept, work = layer + SCORES[0] * scores, WORK * layer + SCORES[1] * scores
    logits = LOGITS * 4 * min(tokens, POSITIONS) * shape.vocabulary
    if recipe.grad_checkpoint:
        return shape.layers * tokens * shape.hidden * size + kept + work + logits
    return shape.layers * kept + max(work, logits)


def guard(folder: Path, recipe: Recipe, memory: int | None = None) -> None:
    """Refuse a run that does not fit into memory.

    Args:
        folder, recipe, memory: as in `plan_training`.

    Raises:
        ValueError: with what is needed, what there is, and what would make it fit.
    """
    plan = plan_training(folder, recipe, memory)
    if plan.fits:
        return
    parts = ("weights", "gradients", "optimizer", "activations")
    sizes = ", ".join(f"{part} {gigabytes(getattr(plan, part))}" for part in parts)
    fitting = (flags for flags, other in _smaller(recipe) if plan_training(folder, other, memory).fits)
    advice = next(fitting, None)
    raise ValueError(
        f"[finetune] {recipe.batch_size} × {recipe.length} tokens need {gigabytes(plan.total)} ({sizes}); there are "
        f"{gigabytes(plan.limit)}: {'give ' + advice if advice else 'take a smaller model'} (--force goes on)"
    )


def _smaller(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Flags that need less memory, and the recipe with them: those that change the result least come first."""
    for length in (recipe.length >> i for i in range(max(1, recipe.length.bit_length() - 6))):
        for kind in dict.fromkeys((recipe.fine_tune_type, "lora")):
            for again in dict.fromkeys((recipe.grad_checkpoint, True)):
                for size in dict.fromkeys((recipe.batch_size, 1)):
                    times = recipe.accumulate * recipe.batch_size // size
                    flags = [
                        f"--batch-size {size} --accumulate {times}" if size != recipe.batch_size else "",
                        "--grad-checkpoint" if again != recipe.grad_checkpoint else "",
                        "--fine-tune-type lora" if kind != recipe.fine_tune_type else "",
                        f"--length {length}" if length != recipe.length else "",
                    ]
                    changes: dict[str, Any] = {
                        "length": length,
                        "batch_size": size,
                        "accumulate": times,
                        "grad_checkpoint": again,
                    }
                    yield " ".join(filter(None, flags)), replace(recipe, fine_tune_type=kind, **changes)
