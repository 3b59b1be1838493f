"""The memory plan for generation: weights, KV cache, and what reading the prompt takes."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..attention import BUDGET
from ..checkpoint import Checkpoint
from ..dimensions import Dimensions
from ..errors import UsageError, check_option
from ..rope_types import LONGEST
from ..sizes import format_size
from .cache import group_size
from .prefill import PREFILL_BATCH, STEP, chunk_size

RESERVE, RESERVE_PART = 3 * 2**30, 0.05  # bytes, and fraction of the limit, that are left to everything else
QUANTIZED = (8, 4)  # bits of a KV cache
FUSED_DIMS = (64, 80, 128)  # head sizes for which Metal's attention stores no scores
# Numbers in flight per token of a chunk, as multiples of the sizes of the hidden state, the keys and the feed-forward
# layer. MLX schedules about ten operations ahead; found by measuring (benchmarks/memory.py).
HIDDEN, KEYS, FEED_FORWARD = 12.0, 7.0, 1.6
UNPACKED = 6.0  # bytes per number of a layer's keys: a CPU unpacks quantized ones in 32 bits; also measured


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of memory that a context needs.

    Args:
        context: tokens of prompt and answer.
        weights: the model's weights.
        kv_per_token: keys and values of one token in all layers.
        kv: keys and values of the context.
        prefill: peak of reading the prompt, on top of those.
        total: the sum of weights, kv and prefill.
        limit: bytes of memory, less the reserve.
        fits: whether the total is within the limit.
        max_context: by KV format, the maximum number of tokens that fit.
        context_length: tokens of context that the checkpoint has; None if config.json does not say.
    """

    context: int
    weights: int
    kv_per_token: int
    kv: int
    prefill: int
    total: int
    limit: int
    fits: bool
    max_context: dict[str, int]
    context_length: int | None

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        return asdict(self)


def divided(checkpoint: Checkpoint, processes: int) -> Dimensions:
    """The part of a model that each of several processes has: heads and projections are divided, the rest is not."""
    whole = checkpoint.dimensions
    return replace(
        whole,
        weights=sum(info.nbytes // (processes if "_proj." in name else 1) for name, info in checkpoint.tensors.items()),
        heads=whole.heads // processes,
        feed_forward=whole.feed_forward // processes,
        keys=whole.keys // processes,
    )


def kv_per_token(dims: Dimensions, kv_bits: int | None) -> int:
    """Bytes of keys and values per token, scales and biases included."""
    if kv_bits is None:
        return 2 * dims.layers * dims.keys * dims.item_size
    per_number = kv_bits / 8 + 2 * dims.item_size / group_size(dims.head_dim)
    return int(2 * dims.layers * dims.keys * per_number)


def prefill_memory(dims: Dimensions, context: int, kv_bits: int | None, step: int, budget: int) -> int:
    """Peak bytes of reading a prompt of `context` tokens, not counting weights and cache."""
    step = chunk_size(0, step, budget)
    # Chunks and their keys: the last whole one, and the remainder. Where the budget makes chunks shrink, assume the
    # whole budget and a whole chunk: by then the keys count for more.
    whole = context // step * step
    chunks = ((step, whole), (context - whole, context)) if step * context <= budget else ((step, context),)
    work = max(_chunk_memory(dims, min(size, keys), keys, kv_bits, budget) for size, keys in chunks)
    return int(max(work, 3 * 4 * dims.vocabulary))


def _chunk_memory(dims: Dimensions, size: int, keys: int, kv_bits: int | None, budget: int) -> float:
    """Bytes in flight for a chunk of `size` tokens that attends to `keys` keys."""
    in_flight = HIDDEN * dims.hidden + KEYS * dims.keys + FEED_FORWARD * dims.feed_forward
    rotation = 12 * (dims.hidden + dims.keys) if dims.item_size < 4 else 0  # in float32
    work = size * (in_flight * dims.item_size + rotation)
    if not (mx.metal.is_available() and dims.head_dim in FUSED_DIMS):
        work += min(size * keys, budget) * (dims.heads * dims.item_size + 1)  # scores and their mask
    if kv_bits is not None:
        work += 2 * dims.keys * keys * dims.item_size  # one layer's keys and values, dequantized
        work += UNPACKED * dims.keys * keys if mx.default_device() == mx.cpu else 0
    return work


def plan_memory(
    model: str | Path | Checkpoint,
    context: int | None = None,
    *,
    kv_bits: int | None = None,
    memory: int | None = None,
    prefill_step_size: int = STEP,
    budget: int = BUDGET,
    processes: int = 1,
    sequences: int = 1,
) -> MemoryPlan:
    """Plan the memory that generating with a checkpoint needs, without reading its weights.

    Args:
        model: a folder, the id of a model on the hub, which is downloaded, or an opened checkpoint.
        context: tokens of prompt and answer; None for the checkpoint's whole context.
        kv_bits: 8 or 4 for quantized keys and values; None for the model's type.
        memory: bytes of memory; None for the device's limit.
        prefill_step_size, budget: for reading the prompt, as in `prefill`.
        processes: number of processes that share the model; the plan is for one, and each has embedding and head.
        sequences: number of sequences in a batch; the plan's kv and prefill cover all of them.

    Raises:
        MissingFileError, UsageError: as in `load`; or an argument is out of range, or config.json has no context.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    check_option("kv_bits", kv_bits in (None, 4, 8), "4 or 8", kv_bits)
    context = context if context is not None else checkpoint.rope.context_length
    if context is None:
        raise UsageError("config.json has no context length", remedies=[{"context": None}])
    check_option("context", 0 < context <= LONGEST, "in [1, 2**31] tokens", context)
    check_option("prefill_step_size", prefill_step_size >= 1, "at least 1", prefill_step_size)
    check_option("memory", memory is None or memory > 0, "positive", memory)
    dims = divided(checkpoint, processes)
    there = memory if memory is not None else device_memory()
    limit = max(0, there - int(max(RESERVE, RESERVE_PART * there)))

    def needed(tokens: int, bits: int | None) -> int:
        work = prefill_memory(dims, tokens, bits, prefill_step_size, budget)
        return dims.weights + sequences * tokens * kv_per_token(dims, bits) + min(sequences, PREFILL_BATCH) * work

    def most(bits: int | None) -> int:
        low, high = 0, LONGEST  # needed() grows with the tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(middle, bits) <= limit else (low, middle - 1)
        return low

    formats: dict[str, int | None] = {f"{8 * dims.item_size} bit": None}
    formats |= {f"{bits} bit": bits for bits in QUANTIZED if dims.head_dim % 32 == 0}
    per_token, total = kv_per_token(dims, kv_bits), needed(context, kv_bits)
    return MemoryPlan(
        context=context,
        weights=dims.weights,
        kv_per_token=per_token,
        kv=sequences * context * per_token,
        prefill=total - dims.weights - sequences * context * per_token,
        total=total,
        limit=limit,
        fits=total <= limit,
        max_context={name: most(bits) for name, bits in formats.items()},
        context_length=checkpoint.rope.context_length,
    )


def device_memory() -> int:
    """Bytes that the device can use: Metal's recommended working set, or the machine's memory."""
    info = mx.device_info()
    if "max_recommended_working_set_size" in info:
        return int(info["max_recommended_working_set_size"])
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def require_memory(checkpoint: Checkpoint, context: int, **options: Any) -> None:
    """Refuse a context that does not fit into memory.

    Args:
        checkpoint, context, options: as in `plan_memory`.

    Raises:
        UsageError: it does not fit; the message has the sizes and the limit, the remedies would make it fit.
    """
    plan = plan_memory(checkpoint, context, **options)
    if not plan.fits:
        ways = remedies(checkpoint, plan, **options)
        raise UsageError(
            f"{context:,} tokens need {format_size(plan.total)} (weights {format_size(plan.weights)}, keys and values "
            f"{format_size(plan.kv)}, reading the prompt {format_size(plan.prefill)}), the limit is "
            f"{format_size(plan.limit)}: {fitting_context(plan)}",
            remedies=[*ways, {"force": True}],
        )


def fitting_context(plan: MemoryPlan) -> str:
    """How many tokens fit, in words."""
    best = max(plan.max_context, key=plan.max_context.__getitem__)
    best_tokens = plan.max_context[best]
    if best_tokens == 0:
        return "only a smaller model, or one with fewer bits, would fit"
    past = best_tokens > (plan.context_length or best_tokens)
    where = f", past the checkpoint's context of {plan.context_length:,}" if past else ""
    return f"up to {best_tokens:,} tokens fit with keys and values in {best}{where}"


def remedies(checkpoint: Checkpoint, plan: MemoryPlan, **options: Any) -> list[dict[str, int]]:
    """Changes to the options of `plan_memory`, or to the batch size, that would make a context fit."""
    kv_bits, step = options.get("kv_bits"), options.get("prefill_step_size", STEP)

    def fits(**changes: int) -> bool:
        return plan_memory(checkpoint, plan.context, **options | changes).fits

    ways: list[dict[str, int]] = []
    if (count := options.get("sequences", 1)) > 1:
        sizes = (size for size in (16, 8, 4, 2, 1) if size < count and fits(sequences=size))
        ways += [{"batch_size": size} for size in sizes][:1]
    fewer = [bits for bits in QUANTIZED if f"{bits} bit" in plan.max_context and bits < (kv_bits or 16)]
    smaller = [size for size in (512, 128) if size < step]
    alone = [{"kv_bits": bits} for bits in fewer if fits(kv_bits=bits)][:1]
    alone += [{"prefill_step_size": size} for size in smaller if fits(prefill_step_size=size)][:1]
    both = [{"kv_bits": bits, "prefill_step_size": size} for bits in fewer for size in smaller]
    return ways + (alone or [way for way in both if fits(**way)][:1])
