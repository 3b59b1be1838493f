"""The rotary op on a GPU: the kernel of metal.h or cuda.h, rotary.h and body.h, tried, launched, differentiated.

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
# MLX hands arrays of fewer elements over in another address space of Metal: the source is then another one. Queries and
# keys that small are not worth a launch.
SMALL = 8

logger = logging.getLogger("mlx_resonance")
_unusable: set[str] = set()  # the backends that failed, and `gpu` where there is none: each is told once


def current_backend() -> str | None:
    """`metal` or `cuda` where MLX's default device is a GPU, else None; a machine without one is told once."""
    if mx.default_device().type == mx.DeviceType.gpu:
        backend = "metal" if mx.metal.is_available() else "cuda"
        return None if backend in _unusable else backend
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        _give_up("gpu", "MLX has no GPU here")
    return None


def can_rotate(backend: str, xs: list[mx.array], constants: PhaseConstants, traditional: bool) -> bool:
    """Whether the kernel is for these arrays, and has been tried on this GPU; if it fails, one warning says why."""
    if any(x.dtype not in DTYPES or x.size < SMALL for x in xs):
        return False
    few = constants.modulus.size < SMALL, xs[0].shape[0] < SMALL
    reason = _fault(backend, tuple(x.dtype for x in xs), traditional, *few)
    if reason is not None:
        _give_up(backend, f"the {backend} kernel cannot be used: {reason}")
    return reason is None


def rotate(
    backend: str, xs: list[mx.array], offset: mx.array, constants: PhaseConstants, traditional: bool
) -> list[mx.array]:
    """Rotate one array or two, (B, H, L, D), in one launch.

    Args:
        backend: `metal` or `cuda`.
        xs: float32, float16 or bfloat16, each of its own H; they agree in B, L and D.
        offset: position of the first token, int32, shape (1,) or (B,).
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
        call = xs, offset, PhaseConstants(*constants), traditional, backward
        # MLX counts a grid in 31 bits; what is mapped grows it.
        return launch(backend, *call) if grid(xs, constants[0].size)[0] < 2**31 else twin(*call)

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
    backend: str, xs: list[mx.array], offset: mx.array, constants: PhaseConstants, traditional: bool, backward: bool
) -> list[mx.array]:
    """One launch of the kernel: `rotate` without its transformations, or its transpose where `backward`."""
    q, k = xs[0], xs[-1]
    outputs: list[mx.array] = _kernel(backend)(
        inputs=[q, k, mx.broadcast_to(offset, q.shape[:1]), *constants],
        template=[("PAIRS", PAIRS), ("HEADS", HEADS), ("TRADITIONAL", traditional), ("BACKWARD", backward)],
        grid=grid(xs, constants.modulus.size),
        threadgroup=(THREADS, 1, 1),
        # Of a single array the kernel sees two, of which the grid ends before the second.
        output_shapes=[q.shape, k.shape if len(xs) == 2 else (1,)],
        output_dtypes=[q.dtype, k.dtype],
    )
    return outputs[: len(xs)]


def grid(xs: list[mx.array], pairs: int) -> tuple[int, int, int]:
    """Threads along the axes of the grid: body.h says what they are for."""
    batch, _, length, dims = xs[0].shape
    groups = _ceil_div(pairs, PAIRS) + _ceil_div(dims - 2 * pairs, 2 * PAIRS)
    return batch * length * groups, sum(_ceil_div(x.shape[1], HEADS) for x in xs), 1


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


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


def twin(
    xs: list[mx.array], offset: mx.array, constants: PhaseConstants, traditional: bool, backward: bool
) -> list[mx.array]:
    """What `launch` does, in plain mlx.core."""
    cos, sin = ops.cos_sin(offset, xs[0].shape[2], constants)
    return ops.rotate(xs, cos, -sin if backward else sin, traditional)


@cache
def _fault(
    backend: str, dtypes: tuple[mx.Dtype, ...], traditional: bool, few_pairs: bool, few_rows: bool
) -> str | None:
    """What is wrong with a variant of the kernel: it is built once, and compared with its twin. None: nothing."""
    # One size lets the kernel move whole packs, the other does not; both have more heads than one thread takes, and
    # features to copy.
    for pairs in (4, 3) if few_pairs else (8, 11):
        wavelengths = np.array([6.0, 2 * np.pi, 44.0, 54410.0, 1e5 / 3, *range(700, 706)])[:pairs]
        constants = ops.phase_constants(RotaryFrequencies(wavelengths, 1.25))
        shape = (2 if few_rows else SMALL, 3, HEADS + 1, 2 * pairs + 8)
        x = mx.sin(mx.arange(int(np.prod(shape)))).reshape(shape).swapaxes(1, 2)
        xs, offset = [x.astype(dtype) for dtype in dtypes], mx.arange(shape[0]) * 1000003 - 2
        for backward in (False, True):
            call = xs, offset, constants, traditional, backward
            try:
                for y, expected in zip(launch(backend, *call), twin(*call), strict=True):
                    off = float(mx.abs(y.astype(mx.float32) - expected.astype(mx.float32)).max())
                    # A rounding to 16 bits may go either way; compilers contract float32 each in their own way.
                    if not off <= max(float(mx.finfo(y.dtype).eps), 4 * 2.0**-23):  # nor if it is not a number
                        return f"its results are off by {off:.2g} in {y.dtype}"
            except (RuntimeError, ValueError) as error:
                return " ".join(str(error).split())
    return None


def _give_up(backend: str, reason: str) -> None:
    if backend not in _unusable:
        _unusable.add(backend)
        logger.warning("[ResonanceRoPE] %s: rotating with plain mlx.core operations", reason)
