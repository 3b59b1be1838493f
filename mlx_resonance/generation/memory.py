"""The memory plan for generation: weights, KV cache, and what reading the prompt takes."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..attend import BUDGET, ROWS, SCORES
from ..checkpoint import Checkpoint
from ..dimensions import Dimensions
from ..errors import UsageError, check_option
from ..rope_types import LONGEST
from ..sizes import format_size
from .kv_format import KVBits, KVFormat, offered
from .prefill import PREFILL_BATCH, STEP

logger = logging.getLogger("mlx_resonance")

PAST = 4  # times the context, which a position map goes past
RESERVE, RESERVE_PART = 3 * 2**30, 0.05  # bytes, and fraction of a machine's memory, that are left to everything else
# Head sizes for which Metal's attention stores no scores, by the first MLX version that has them: for more than 8
# queries of any type, with a causal or an array mask. Fewer queries may store theirs: less than a chunk's work.
# 256, which came after 0.32.1, depends on the chip and needs chunks of 1024 tokens: it is left out.
# Source: ml-explore/mlx, mlx/backend/metal/scaled_dot_product_attention.cpp, `use_fallback`, tags v0.26.0 to v0.32.1.
MLX = version("mlx")
FUSED_DIMS = {(0, 26, 0): (64, 80, 128), (0, 32, 1): (64, 72, 80, 96, 128)}
# Numbers in flight per token of a chunk, as multiples of the sizes of the hidden state, the keys and the feed-forward
# layer. MLX schedules about ten operations ahead; found by measuring (benchmarks/memory.py).
HIDDEN, KEYS, FEED_FORWARD = 12.0, 7.0, 1.6
LAUNCHES = 12  # of attention whose scores are in flight at once, where it has to be split; also measured
MAPPED, TURNED = 15.0, 12.0  # by a position map: of a block of scores; bytes per number of a layer's keys, to move them
UNPACKED = 6.0  # bytes per number of a layer's keys: a CPU unpacks quantized ones in 32 bits; also measured


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of memory that a context needs.

    Weights, keys and values are exact. The rest was fitted on a CPU and never measured on Metal: there, a context fits
    if the exact part does, and is tight if the total exceeds the limit. Elsewhere it fits if the total does.

    Args:
        context: tokens of prompt and answer.
        weights: the model's weights.
        kv_per_token: keys and values of one token in all layers.
        kv: keys and values of the context.
        prefill: peak of reading the prompt, on top of those.
        total: the sum of weights, kv and prefill.
        limit: bytes of memory that may be used, see `usable`.
        fits: whether the context is accepted.
        tight: whether it is accepted with a warning.
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
    tight: bool
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


def kv_per_token(dims: Dimensions, kv_bits: KVBits) -> int:
    """Bytes of keys and values per token, scales and biases included; `kv_bits` as in `KVFormat.of`."""
    return int(dims.layers * dims.keys * KVFormat.of(kv_bits).bytes_per_pair(dims.head_dim, dims.item_size))


def fused_dims(mlx: str = MLX) -> tuple[int, ...]:
    """The head sizes for which Metal's attention stores no scores, in a version of MLX."""
    number = tuple(int(part) for part in re.findall(r"\d+", mlx)[:3])
    return max((row for row in FUSED_DIMS.items() if row[0] <= number), default=((), ()))[1]


def prefill_memory(
    dims: Dimensions, context: int, kv_bits: KVBits, step: int, budget: int = BUDGET, sequences: int = 1,
    mapped: bool = False,
) -> int:  # fmt: skip
    """Peak bytes of reading `sequences` prompts of `context` tokens each, not counting weights and cache.

    Chunks have `step` tokens: on a GPU they may be shorter, and take less. `mapped`: by a position map.
    """
    rows, whole = min(sequences, PREFILL_BATCH), context // step * step
    chunks = (step, whole), (context - whole, context)  # tokens and keys of the last whole chunk, and of the remainder
    quantized = KVFormat.of(kv_bits).quantized
    work = max(_chunk_memory(dims, rows, min(size, keys), keys, quantized, budget, mapped) for size, keys in chunks)
    copied = context * kv_per_token(dims, kv_bits) / dims.layers  # by the on-disk cache, which copies layer by layer
    return int(max(work, 3 * 4 * dims.vocabulary * sequences, copied))


def _chunk_memory(
    dims: Dimensions, rows: int, size: int, keys: int, quantized: bool, budget: int, mapped: bool
) -> float:
    """Bytes in flight for a chunk of `size` tokens in each of `rows` rows that attends to `keys` keys."""
    in_flight = HIDDEN * dims.hidden + KEYS * dims.keys + FEED_FORWARD * dims.feed_forward
    rotation = 12 * (dims.hidden + dims.keys) if dims.item_size < 4 else 0  # in float32
    work = rows * size * (in_flight * dims.item_size + rotation)
    work += rows * size * keys if rows > 1 else 0  # the mask of a batch, which all layers share
    if mapped:
        work += MAPPED * min(rows * min(size, ROWS) * keys * dims.heads, SCORES) * dims.item_size
        work += TURNED * rows * dims.keys * keys
    elif working_set() is None or dims.head_dim not in fused_dims():
        pairs = min(rows * size * keys, LAUNCHES * budget)  # of queries and keys
        work += pairs * (dims.heads * dims.item_size + 1)  # their scores, and the causal mask
    if quantized:
        work += (3 if mapped else 2) * rows * dims.keys * keys * dims.item_size  # of one layer, dequantized
        work += UNPACKED * rows * dims.keys * keys if mx.default_device() == mx.cpu else 0
    return work


def plan_memory(
    model: str | Path | Checkpoint,
    context: int | None = None,
    *,
    kv_bits: KVBits = None,
    kv_rotate: bool = False,
    memory: int | None = None,
    prefill_step_size: int = STEP,
    budget: int = BUDGET,
    processes: int = 1,
    sequences: int = 1,
    draft: Checkpoint | None = None,
) -> MemoryPlan:
    """Plan the memory that generating with a checkpoint needs, without reading its weights.

    Args:
        model: a folder, the id of a model on the hub, which is downloaded, or an opened checkpoint.
        context: tokens of prompt and answer; None for the checkpoint's whole context, with a position map for at most
            four times it.
        kv_bits, kv_rotate: format of the KV cache, as in `KVFormat.of`.
        memory: a budget in bytes, as in `usable`; None for the device's.
        prefill_step_size: maximum number of tokens of a prompt in a chunk.
        budget: maximum queries × keys per head in one launch of attention.
        processes: number of processes that share the model; the plan is for one, and each has embedding and head.
        sequences: number of sequences in a batch; the plan's kv and prefill cover all of them.
        draft: a draft model's: the plan covers its weights, and its keys and values in its type.

    Raises:
        MissingFileError, UsageError: as in `load`; or an argument is out of range, or config.json has no context.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    asked = KVFormat.of(kv_bits, kv_rotate)
    asked.check(checkpoint.dimensions.head_dim)
    positions = checkpoint.rope.positions
    if context is None:
        context = checkpoint.rope.context_length
        context = context if positions is None else min(positions.longest, PAST * positions.trained)
    if context is None:
        raise UsageError("config.json has no context length", remedies=[{"context": None}])
    check_option("context", 0 < context <= LONGEST, "in [1, 2**31] tokens", context)
    check_option("prefill_step_size", prefill_step_size >= 1, "at least 1", prefill_step_size)
    check_option("memory", memory is None or memory > 0, "positive", memory)
    dims = divided(checkpoint, processes)
    limit, on_metal = usable(memory), working_set() is not None
    weights, drafting = dims.weights, 0  # bytes; and of a token in a draft model's KV cache
    if draft is not None:
        weights, drafting = weights + draft.dimensions.weights, kv_per_token(draft.dimensions, None)

    def needed(tokens: int, format: KVFormat) -> tuple[int, int]:
        """The exact part, and the fitted one."""
        exact = weights + sequences * tokens * kv_per_token(dims, format) + drafting * tokens
        if mapped := positions is not None and tokens > positions.unchanged:  # every key at another position, too
            exact += int(tokens * dims.layers * dims.keys * format.bytes_per_key(dims.head_dim, dims.item_size))
        fitted = prefill_memory(dims, tokens, format, prefill_step_size, budget, sequences, mapped)
        if draft is not None:
            fitted = max(fitted, prefill_memory(draft.dimensions, tokens, None, prefill_step_size, budget))
        return exact, fitted

    def accepted(tokens: int, format: KVFormat) -> bool:
        exact, fitted = needed(tokens, format)
        return exact + (0 if on_metal else fitted) <= limit

    def most(format: KVFormat) -> int:
        low, high = 0, LONGEST  # what is needed grows with the tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if accepted(middle, format) else (low, middle - 1)
        return low

    (exact, prefill), fits = needed(context, asked), accepted(context, asked)
    return MemoryPlan(
        context=context,
        weights=weights,
        kv_per_token=kv_per_token(dims, asked) + drafting,
        kv=exact - weights,
        prefill=prefill,
        total=exact + prefill,
        limit=limit,
        fits=fits,
        tight=fits and exact + prefill > limit,
        max_context={format.name(dims.item_size): most(format) for format in offered(dims.head_dim)},
        context_length=checkpoint.rope.context_length,
    )


def working_set() -> int | None:
    """Bytes that Metal recommends as the most to use, the system's share already taken off; None on another device."""
    size = mx.device_info().get("max_recommended_working_set_size")
    return None if size is None else int(size)


def usable(memory: int | None = None) -> int:
    """Bytes that a model may use.

    On Metal: the budget as given, or the recommended working set. Elsewhere the budget is the memory of a machine,
    of which a reserve is left to everything else.

    Args:
        memory: a budget in bytes; None for the device's.
    """
    recommended = working_set()
    if recommended is not None:
        return recommended if memory is None else memory
    there = memory if memory is not None else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, there - int(max(RESERVE, RESERVE_PART * there)))


def require_memory(checkpoint: Checkpoint, context: int, force: bool = False, **options: Any) -> None:
    """Refuse a context that does not fit into memory; warn of one that may not.

    Args:
        checkpoint, context, options: as in `plan_memory`.
        force: refuse only what has no plan, such as a KV format that the heads cannot have.

    Raises:
        UsageError: it does not fit, as in `complaint`.
    """
    plan = plan_memory(checkpoint, context, **options)
    if force:
        return
    error = complaint(checkpoint, plan, **options)
    if error is not None and not plan.fits:
        raise error
    if error is not None:
        logger.warning(error.message, extra={"remedies": error.remedies})


def complaint(checkpoint: Checkpoint, plan: MemoryPlan, **options: Any) -> UsageError | None:
    """Why a context does not fit, or may not: the sizes, the limit, and what would help; None if it fits.

    Args:
        checkpoint, options: as in `plan_memory`.
        plan: made with them.
    """
    if plan.fits and not plan.tight:
        return None
    ways: list[dict[str, Any]] = [*remedies(checkpoint, plan, **options)]
    need = "may need" if plan.fits else "need"
    message = (
        f"{plan.context:,} tokens {need} {format_size(plan.total)} (weights {format_size(plan.weights)}, keys and "
        f"values {format_size(plan.kv)}, reading the prompt {format_size(plan.prefill)}), the limit is "
        f"{format_size(plan.limit)}"
    )
    if plan.fits:
        return UsageError(message, remedies=ways)
    return UsageError(f"{message}: {fitting_context(plan)}", remedies=[*ways, {"force": True}])


def fitting_context(plan: MemoryPlan) -> str:
    """How many tokens fit, in words."""
    best = max(plan.max_context, key=plan.max_context.__getitem__)
    best_tokens = plan.max_context[best]
    if best_tokens == 0:
        return "only a smaller model, or one with fewer bits, would fit"
    past = best_tokens > (plan.context_length or best_tokens)
    where = f", past the checkpoint's context of {plan.context_length:,}" if past else ""
    return f"up to {best_tokens:,} tokens fit with keys and values in {best}{where}"


def remedies(checkpoint: Checkpoint, plan: MemoryPlan, **options: Any) -> list[dict[str, Any]]:
    """Changes to the options of `plan_memory`, or to the batch size, that would make a context fit.

    None of them leaves it tight; where there is none such, a context that does not fit gets those that do.
    """
    safe = _changes(checkpoint, plan, False, options)
    return safe if safe or plan.fits else _changes(checkpoint, plan, True, options)


def _changes(checkpoint: Checkpoint, plan: MemoryPlan, tight: bool, options: dict[str, Any]) -> list[dict[str, Any]]:
    dims, step = checkpoint.dimensions, options.get("prefill_step_size", STEP)

    def fits(**changes: Any) -> bool:
        changed = plan_memory(checkpoint, plan.context, **options | changes)
        return changed.fits and (tight or not changed.tight)

    ways: list[dict[str, Any]] = []
    if (count := options.get("sequences", 1)) > 1:
        sizes = (size for size in (16, 8, 4, 2, 1) if size < count and fits(sequences=size))
        ways += [{"batch_size": size} for size in sizes][:1]
    now = kv_per_token(dims, options.get("kv_bits"))
    fewer = [format.value for format in offered(dims.head_dim)[1:] if kv_per_token(dims, format) < now]
    smaller = [size for size in (512, 128) if size < step]
    alone: list[dict[str, Any]] = [{"kv_bits": bits} for bits in fewer if fits(kv_bits=bits)][:1]
    alone += [{"prefill_step_size": size} for size in smaller if fits(prefill_step_size=size)][:1]
    both = [{"kv_bits": bits, "prefill_step_size": size} for bits in fewer for size in smaller]
    return ways + (alone or [way for way in both if fits(**way)][:1])
