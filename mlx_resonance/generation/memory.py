"""What generation needs of a machine's memory: weights, keys and values, and the work of reading the prompt."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checks import check_config
from ..config import LONGEST, RopeConfig
from ..files import BYTES, TensorInfo, read_config, read_header, resolve, weight_files
from .cache import group_size
from .prefill import BUDGET, PREFILL_BATCH, STEP, chunk_size

RESERVE, RESERVE_PART = 3 * 2**30, 0.05  # bytes, and part of the limit, that are left to everything else
KV_FORMATS: Mapping[str, int | None] = {"16 bit": None, "8 bit": 8, "4 bit": 4}
FUSED_DIMS = (64, 80, 128)  # heads for which Metal's attention keeps no scores
# Numbers that a token of a chunk has in flight: so many times the hidden size, the size of its keys, and that of the
# feed-forward layer. MLX hands out about ten operations ahead; found by measuring (benchmarks/memory.py).
HIDDEN, KEYS, FEED_FORWARD = 12.0, 7.0, 1.6
UNPACKED = 6.0  # bytes for each number of a layer's keys: a CPU unpacks quantized ones in 32 bits; measured as well


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, for one sequence.

    Args:
        context: tokens, prompt and answer.
        weights: of the model.
        kv_per_token: keys and values of one token in all layers.
        kv: of the context.
        prefill: the most that reading the prompt needs besides.
        total: of these.
        limit: what there is, less the reserve.
        fits: whether the total is within the limit.
        max_context: by KV format, the most tokens that fit.
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory.

    Args:
        weights: bytes.
        layers, heads, head_dim, hidden, feed_forward, vocabulary: of the model.
        keys: features of the keys of one token in one layer.
        bytes: of a number that the model computes with.
    """

    weights: int
    layers: int
    heads: int
    head_dim: int
    hidden: int
    feed_forward: int
    vocabulary: int
    keys: int
    bytes: int

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], processes: int = 1) -> Shape:
        """From config.json and the headers of the weight files; one process's part where there are several."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            weights=sum(
                (info.end - info.start) // (processes if "_proj." in name else 1) for name, info in tensors.items()
            ),
            layers=config["num_hidden_layers"],
            heads=heads // processes,
            head_dim=head_dim,
            hidden=config["hidden_size"],
            feed_forward=config["intermediate_size"] // processes,
            vocabulary=config["vocab_size"],
            keys=head_dim * (config.get("num_key_value_heads") or heads) // processes,
            bytes=BYTES[tensors["model.norm.weight"].dtype],
        )

    def kv_per_token(self, kv_bits: int | None) -> int:
        """Bytes of keys and values of a token, scales and biases included."""
        if kv_bits is None:
            return 2 * self.layers * self.keys * self.bytes
        per_number = kv_bits / 8 + 2 * self.bytes / group_size(self.head_dim)
        return int(2 * self.layers * self.keys * per_number)

    def prefill(self, context: int, kv_bits: int | None, step: int, budget: int) -> int:
        """The most bytes at once of reading a prompt of so many tokens, without weights and cache."""
        step = chunk_size(0, step, budget)
        # Chunks and their keys: the last whole one, and what is left. Where the budget makes them shrink, as if all of
        # it and a whole chunk were in use: by then the keys count for more.
        whole = context // step * step
        chunks = ((step, whole), (context - whole, context)) if step * context <= budget else ((step, context),)
        work = max(self.chunk(min(size, keys), keys, kv_bits, budget) for size, keys in chunks)
        return int(max(work, 3 * 4 * self.vocabulary))

    def chunk(self, size: int, keys: int, kv_bits: int | None, budget: int) -> float:
        """Bytes that a chunk of the prompt has in flight, with so many keys in all."""
        in_flight = HIDDEN * self.hidden + KEYS * self.keys + FEED_FORWARD * self.feed_forward
        rotation = 12 * (self.hidden + self.keys) if self.bytes < 4 else 0  # in float32
        work = size * (in_flight * self.bytes + rotation)
        if not (mx.metal.is_available() and self.head_dim in FUSED_DIMS):
            work += min(size * keys, budget) * (self.heads * self.bytes + 1)  # scores, and which of them are masked
        if kv_bits is not None:
            work += 2 * self.keys * keys * self.bytes  # one layer's keys and values, dequantized
            work += UNPACKED * self.keys * keys if mx.default_device() == mx.cpu else 0
        return work


def plan_memory(
    model: str | Path,
    context: int | None = None,
    *,
    kv_bits: int | None = None,
    memory: int | None = None,
    prefill_step_size: int = STEP,
    budget: int = BUDGET,
    processes: int = 1,
    sequences: int = 1,
) -> MemoryPlan:
    """What generating with a checkpoint needs. Its weights are not read.

    Args:
        model: a folder, or the id of a model on the hub, which is downloaded.
        context: tokens of prompt and answer; None for the checkpoint's whole context.
        kv_bits: 8 or 4 for quantized keys and values; None for the model's type.
        memory: bytes there are; None for what the device says.
        prefill_step_size, budget: of reading the prompt, as in `prefill`.
        processes: that the model is divided among; the plan is that of one, embedding and head are in each.
        sequences: of a batch; the plan's kv and prefill are those of all of them.

    Raises:
        FileNotFoundError, ValueError: as `load`; or the context is not positive, or config.json has none.
    """
    if kv_bits not in (None, 4, 8):
        raise ValueError(f"[plan] kv_bits must be 4 or 8, got {kv_bits}")
    folder = resolve(model, None, ["*.json", "model*.safetensors"])
    tensors = {name: info for file in weight_files(folder) for name, info in read_header(file).items()}
    config = check_config(read_config(folder), tensors)
    shape = Shape.of(config, tensors, processes)
    context = context if context is not None else RopeConfig.from_hf(config).context_length
    if context is None:
        raise ValueError("[plan] config.json has no context length: give --context")
    if not 0 < context <= LONGEST:
        raise ValueError(f"[plan] context must lie in [1, 2**31] tokens, got {context}")
    if prefill_step_size < 1:
        raise ValueError(f"[plan] prefill_step_size must be at least 1, got {prefill_step_size}")
    if memory is not None and memory <= 0:
        raise ValueError(f"[plan] memory must be positive, got {memory}")
    there = memory if memory is not None else device_memory()
    limit = there - int(max(RESERVE, RESERVE_PART * there))

    def needed(tokens: int, bits: int | None) -> int:
        work = shape.prefill(tokens, bits, prefill_step_size, budget)
        return shape.weights + sequences * tokens * shape.kv_per_token(bits) + min(sequences, PREFILL_BATCH) * work

    def most(bits: int | None) -> int:
        low, high = 0, LONGEST  # needed() grows with the tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(middle, bits) <= limit else (low, middle - 1)
        return low

    formats = KV_FORMATS if shape.head_dim % 32 == 0 else {"16 bit": None}
    per_token, total = shape.kv_per_token(kv_bits), needed(context, kv_bits)
    return MemoryPlan(
        context=context,
        weights=shape.weights,
        kv_per_token=per_token,
        kv=sequences * context * per_token,
        prefill=total - shape.weights - sequences * context * per_token,
        total=total,
        limit=limit,
        fits=total <= limit,
        max_context={name: most(bits) for name, bits in formats.items()},
    )


def device_memory() -> int:
    """Bytes that the device may work with: Metal's recommended working set, or the machine's memory."""
    info = mx.device_info()
    if "max_recommended_working_set_size" in info:
        return int(info["max_recommended_working_set_size"])
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def guard(model: str | Path, context: int, kind: str = "generate", /, **options: Any) -> None:
    """Refuse what does not fit into memory.

    Args:
        model, context: as in `plan_memory`.
        kind: the command, for the message.
        options: of `plan_memory`; those that a command has flags for, so that the advice names no other flag.

    Raises:
        ValueError: with what is needed, what there is, and what would make it fit.
    """
    plan = plan_memory(model, context, **options)
    if not plan.fits:
        raise ValueError(
            f"[{kind}] {context} tokens need {gigabytes(plan.total)} (weights {gigabytes(plan.weights)}, keys and "
            f"values {gigabytes(plan.kv)}, reading the prompt {gigabytes(plan.prefill)}); there are "
            f"{gigabytes(plan.limit)}: {advice(model, plan, **options)} (--force goes on)"
        )


def advice(model: str | Path, plan: MemoryPlan, **options: Any) -> str:
    """What would make a context fit that does not: flags of `options`, or the largest context that does."""
    kv_bits, step = options.get("kv_bits"), options.get("prefill_step_size", STEP)
    if (count := options.get("sequences", 1)) > 1:
        for size in (16, 8, 4, 2, 1):
            if size < count and plan_memory(model, plan.context, **options | {"sequences": size}).fits:
                return f"--batch-size {size}"
        return "shorter prompts, or a smaller model"
    formats = [name for name in plan.max_context if "kv_bits" in options or KV_FORMATS[name] is None]
    fewer = [bits for name in formats if (bits := KV_FORMATS[name]) and bits < (kv_bits or 16)]
    smaller = [size for size in (512, 128) if "prefill_step_size" in options and size < step]

    def fits(**changes: int) -> bool:
        return plan_memory(model, plan.context, **options | changes).fits

    parts = [f"--kv-bits {bits}" for bits in fewer if fits(kv_bits=bits)][:1]
    parts += [f"--prefill-step-size {size}" for size in smaller if fits(prefill_step_size=size)][:1]
    if not parts:
        both = [(bits, size) for bits in fewer for size in smaller if fits(kv_bits=bits, prefill_step_size=size)]
        parts = [f"--kv-bits {bits} --prefill-step-size {size}" for bits, size in both[:1]]
    best = max(formats, key=plan.max_context.__getitem__)
    if not parts and plan.max_context[best] > 0:
        flag = f" with --kv-bits {KV_FORMATS[best]}" if KV_FORMATS[best] and KV_FORMATS[best] != kv_bits else ""
        parts.append(f"at most {plan.max_context[best]} tokens{flag}")
    return " or ".join(parts) if parts else "take a smaller model, or one with fewer bits (convert -q)"


def gigabytes(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.3g} GB" if abs(size) >= 1e9 else f"{size / 1e6:.3g} MB"
