"""The rotary kernel: its source, its build, one launch of it on Metal or CUDA."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

from .ops import PhaseConstants

PAIRS = 4  # pairs per thread: 8 bytes of float16, 16 of float32 in one load
HEADS = 8  # heads per thread of a long step, which share the angles
# Tokens of all rows up to which a thread takes one head: the GPU has threads to spare, and would wait for every load of
# a loop over heads in turn.
FEW_TOKENS = 32
THREADS = 256  # per threadgroup
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# MLX hands arrays of fewer elements over in another address space of Metal: the source is then another one. Queries and
# keys that small are not worth a launch.
SMALL = 8
ARGUMENTS = (  # of rotate_thread, by the names that MLX gives them
    "q", "q_shape", "q_strides", "k", "k_shape", "k_strides", "offset", "offset_shape",
    "offset_strides", "constants", "constants_shape", "q_out", "k_out",
)  # fmt: skip


def launch(
    backend: str, xs: list[mx.array], offset: mx.array, constants: PhaseConstants, traditional: bool, backward: bool
) -> list[mx.array]:
    """Rotate one array or two, (B, H, L, D), in one launch, as a function that MLX cannot transform.

    Args:
        backend: `metal` or `cuda`.
        xs: float32, float16 or bfloat16, each of its own H; they agree in B, L and D.
        offset: position of the first token, int32, shape (1,) or (B,), or of every token, shape (1 or B, L).
        constants: of P pairs, 2·P <= D.
        traditional: pairs are neighbours (2i, 2i + 1) instead of (i, i + P).
        backward: turn the other way, which is the transpose.

    Returns:
        The arrays rotated, row-contiguous, shapes and types as they came.
    """
    q, k = xs[0], xs[-1]
    inputs = [q, k, per_row(offset, q.shape[0]), constants.packed]
    built = build(backend, heads_per_thread(xs), traditional, backward)
    outputs: list[mx.array] = built(inputs=inputs, **options(xs, constants))
    return outputs[: len(xs)]


def per_row(offset: mx.array, batch: int) -> mx.array:
    """The offset as the kernel takes it: shape (B, 1), or (B, L)."""
    offset = offset if offset.ndim == 2 else offset[:, None]
    return mx.broadcast_to(offset, (batch, offset.shape[1]))


def options(xs: list[mx.array], constants: PhaseConstants) -> dict[str, Any]:
    """Every argument of a launch that is not an array."""
    q, k = xs[0], xs[-1]
    return {
        "grid": grid(xs, constants.modulus.size),
        "threadgroup": (THREADS, 1, 1),
        # Of a single array the kernel sees two, of which the grid ends before the second.
        "output_shapes": [q.shape, k.shape if len(xs) == 2 else (1,)],
        "output_dtypes": [q.dtype, k.dtype],
    }


def heads_per_thread(xs: list[mx.array]) -> int:
    """The kernel's HEADS for these arrays."""
    return 1 if xs[0].shape[0] * xs[0].shape[2] <= FEW_TOKENS else HEADS


def grid(xs: list[mx.array], pairs: int) -> tuple[int, int, int]:
    """Threads along the axes of the grid: body.h says what they are for."""
    batch, _, length, dims = xs[0].shape
    groups = _ceil_div(pairs, PAIRS) + _ceil_div(dims - 2 * pairs, 2 * PAIRS)
    heads = heads_per_thread(xs)
    return batch * length * groups, sum(_ceil_div(x.shape[1], heads) for x in xs), 1


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


@cache
def build(backend: str, heads: int, traditional: bool, backward: bool) -> Any:
    """MLX's function that launches a variant of the kernel; it compiles it for the types of the first launch.

    Args:
        backend, traditional, backward: as in `launch`.
        heads: per thread.
    """
    make = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    values = f"{PAIRS}, {heads}, {str(traditional).lower()}, {str(backward).lower()}"
    return make(
        # MLX keeps what it compiles by this name, to which it adds the types.
        name=f"resonance_rotary_{values.replace(', ', '_')}",
        input_names=["q", "k", "offset", "constants"],
        output_names=["q_out", "k_out"],
        header="".join(map(source, (f"{backend}.h", "rotary.h", "body.h"))),
        source=f"rotate_thread<{values}>({', '.join(ARGUMENTS)}, GRID_POSITION(thread_position_in_grid));",
        ensure_row_contiguous=False,
    )


def source(name: str) -> str:
    """One of the kernel's source files, without comments and indentation: MLX hashes the text at every launch."""
    lines = (files(__package__) / name).read_text(encoding="utf-8").splitlines()
    kept = (re.sub("//.*", "", line).strip() for line in lines)
    return "".join(f"{line}\n" for line in kept if line)
