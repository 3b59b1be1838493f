"""The rotary op on a GPU: the kernel built from metal.h or cuda.h, rotary.h and body.h, launched, differentiated.

`mx.custom_function` gives it the transformations that MLX cannot derive for a kernel.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np

from ..frequencies import RotaryFrequencies
from . import ops
from .ops import PhaseConstants

PAIRS = 4  # pairs per thread: 8 bytes of float16, 16 of float32 in one load
HEADS = 8  # heads per thread, which share the angles
THREADS = 256  # per threadgroup
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# MLX hands arrays of fewer elements over in another address space of Metal; they are not worth a launch.
SMALLEST = 8

logger = logging.getLogger("mlx_resonance")


def backend() -> str | None:
    """`metal` or `cuda` where MLX's default device is a GPU, else None; a machine without one is told once."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return "metal" if mx.metal.is_available() else "cuda"
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        _warn("MLX has no GPU here")
    return None


def can_rotate(backend: str, xs: list[mx.array], traditional: bool) -> bool:
    """Whether the kernel is for these arrays, and built and right on this GPU; if it is not, one warning says why."""
    batch, _, length, dims = xs[0].shape
    if batch * length * dims >= 2**31 or any(x.dtype not in DTYPES or x.size < SMALLEST for x in xs):
        return False  # a grid is counted in 31 bits, and has no threads for an empty array
    dtypes = tuple(x.dtype for x in xs)
    return all(_works(backend, dtypes, traditional, backward) for backward in (False, True))


def rotate(
    backend: str, xs: list[mx.array], offset: mx.array, constants: PhaseConstants, traditional: bool
) -> list[mx.array]:
    """Rotate one array or two, (B, H, L, D), in one launch.

    Args:
        backend: `metal` or `cuda`.
        xs: float32, float16 or bfloat16, each of its own H; they agree in B, L and D.
        offset: position of the first token, an integer array of shape (1,) or (B,).
        constants: of P pairs, 2·P <= D.
        traditional: pairs are neighbours (2i, 2i + 1) instead of (i, i + P).

    Returns:
        The arrays rotated, row-contiguous, shapes and types as they came.
    """
    rotated: Any = _rotation(backend, traditional, False)(xs, offset, *constants)
    return list(rotated)


@cache
def _rotation(backend: str, traditional: bool, backward: bool) -> mx.custom_function:
    """The launch as a function that MLX can differentiate and vectorize; `backward` turns the other way."""

    def forward(xs: list[mx.array], offset: mx.array, *constants: mx.array) -> list[mx.array]:
        return launch(backend, xs, offset, PhaseConstants(*constants), traditional, backward)

    rotation = mx.custom_function(forward)

    @rotation.vjp
    def vjp(primals: Any, cotangents: list[mx.array], _: Any) -> Any:
        # The transpose of a scaled rotation by θ is the scaled rotation by -θ.
        _, *rest = primals
        return _rotation(backend, traditional, not backward)(cotangents, *rest), *map(mx.zeros_like, rest)

    @rotation.jvp
    def jvp(primals: Any, tangents: Any) -> Any:
        xs, *rest = primals
        moved = [mx.zeros_like(x) if tangent is None else tangent for x, tangent in zip(xs, tangents[0], strict=True)]
        return rotation(moved, *rest)

    @rotation.vmap
    def vmap(inputs: Any, axes: Any) -> tuple[list[mx.array], list[int]]:
        (xs, offset, *constants), (xs_axes, offset_axis, *_) = inputs, axes
        mapped = [(x, axis) for x, axis in zip([*xs, offset], [*xs_axes, offset_axis], strict=True) if axis is not None]
        size = mapped[0][0].shape[mapped[0][1]]

        def first(x: mx.array, axis: int | None) -> mx.array:
            return mx.broadcast_to(x, (size, *x.shape)) if axis is None else mx.moveaxis(x, axis, 0)

        # The mapped axis and the batch become one batch, with one offset per row.
        xs = [first(x, axis) for x, axis in zip(xs, xs_axes, strict=True)]
        batch = xs[0].shape[1]
        offsets = mx.broadcast_to(first(offset, offset_axis), (size, batch)).flatten()
        rotated: Any = rotation([x.flatten(0, 1) for x in xs], offsets, *constants)
        return [mx.unflatten(x, 0, (size, batch)) for x in rotated], [0] * len(xs)

    return rotation


def launch(
    backend: str,
    xs: list[mx.array],
    offset: mx.array,
    constants: PhaseConstants,
    traditional: bool,
    backward: bool,
    verbose: bool = False,
) -> list[mx.array]:
    """One launch of the kernel: `rotate` without its transformations, or its transpose where `backward`.

    Args: as `rotate`; `verbose` prints the source that MLX compiles.
    """
    q, k = xs[0], xs[-1]
    batch, _, length, dims = q.shape
    pairs = constants.modulus.size
    groups = -(-pairs // PAIRS) - (2 * pairs - dims) // (2 * PAIRS)
    outputs: list[mx.array] = _kernel(backend)(
        inputs=[q, k, mx.broadcast_to(offset.astype(mx.int32), (batch,)), *constants],
        template=[("PAIRS", PAIRS), ("HEADS", HEADS), ("TRADITIONAL", traditional), ("BACKWARD", backward)],
        grid=(batch * length * groups, sum(-(-x.shape[1] // HEADS) for x in xs), 1),
        threadgroup=(THREADS, 1, 1),
        # Of a single array the kernel sees two, of which the grid ends before the second.
        output_shapes=[q.shape, k.shape if len(xs) == 2 else (1,)],
        output_dtypes=[q.dtype, k.dtype],
        verbose=verbose,
    )
    return outputs[: len(xs)]


@cache
def _kernel(backend: str) -> Any:
    make = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    return make(
        name="resonance_rotary",
        input_names=["q", "k", "offset", *PhaseConstants._fields],
        output_names=["q_out", "k_out"],
        header=source(f"{backend}.h") + source("rotary.h"),
        source=source("body.h"),
        ensure_row_contiguous=False,
    )


def source(name: str) -> str:
    """The text of one of the kernel's source files."""
    return (files(__package__) / name).read_text(encoding="utf-8")


@cache
def _works(backend: str, dtypes: tuple[mx.Dtype, ...], traditional: bool, backward: bool) -> bool:
    """Build a variant of the kernel and compare it with its twin once, so that it never turns by wrong angles."""
    frequencies = RotaryFrequencies(np.array([6.0, 2 * np.pi, 44.0, 54410.0, 1e5 / 3]), 1.25)
    constants, offset = ops.phase_constants(frequencies), mx.array([1000003, -2])
    xs = [mx.sin(mx.arange(2 * 3 * 3 * 12)).reshape(2, 3, 3, 12).swapaxes(1, 2).astype(dtype) for dtype in dtypes]
    cos, sin = ops.cos_sin(offset, 3, constants)
    try:
        rotated = launch(backend, xs, offset, constants, traditional, backward)
        expected = ops.rotate(xs, cos, -sin if backward else sin, traditional)
        for x, y in zip(rotated, expected, strict=True):
            error = float(mx.abs(x.astype(mx.float32) - y.astype(mx.float32)).max())
            if not error <= 4 * float(mx.finfo(x.dtype).eps):  # also where it is no number
                raise ValueError(f"its results are off by {error:.2g} in {x.dtype}")
    except (RuntimeError, ValueError) as error:
        _warn(f"the {backend} kernel cannot be used: {' '.join(str(error).split())}")
        return False
    return True


@cache
def _warn(reason: str) -> None:
    logger.warning("[ResonanceRoPE] %s: rotating with plain mlx.core operations", reason)
