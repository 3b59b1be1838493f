"""The rotary op on a GPU: launches of the kernel that MLX can differentiate and map, and bare ones for inference.

`mx.custom_function` gives it the transformations that MLX cannot derive for a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx

from . import kernel, ops, trial
from .ops import PhaseConstants


def rotate(
    backend: str, xs: list[mx.array], offset: mx.array, constants: PhaseConstants, traditional: bool
) -> list[mx.array]:
    """`kernel.launch`, as a function that MLX can differentiate and map."""
    rotated: Any = _rotation(backend, traditional, False)(xs, offset, *constants)
    return list(rotated)


class BareLaunches:
    """The rotations of one step's layers, each a launch that MLX can neither differentiate nor map.

    The arguments are made once, for the first layer. `launch` is a function of q and k; it returns None before that,
    and for arrays of other shapes or types than the first layer's.
    """

    def __init__(self) -> None:
        self.launch: Callable[[mx.array, mx.array], list[mx.array] | None] = lambda q, k: None

    def prepare(
        self, backend: str, xs: list[mx.array], offset: mx.array, constants: PhaseConstants, traditional: bool
    ) -> list[mx.array]:
        """Make the arguments for arrays like these, and launch the kernel: as `kernel.launch`."""
        q, k = xs
        of = q.shape, k.shape, q.dtype, k.dtype
        built = partial(
            kernel.build(backend, kernel.heads_per_thread(xs), traditional, False), **kernel.options(xs, constants)
        )
        offset, packed = kernel.per_row(offset, q.shape[0]), constants.packed

        def launch(q: mx.array, k: mx.array) -> list[mx.array] | None:
            if (q.shape, k.shape, q.dtype, k.dtype) != of:
                return None
            return built(inputs=[q, k, offset, packed])

        self.launch = launch
        return launch(q, k) or []


@cache
def _rotation(backend: str, traditional: bool, backward: bool) -> mx.custom_function:
    """The launch as a function that MLX can differentiate and vectorize; `backward` turns the other way."""

    def forward(xs: list[mx.array], offset: mx.array, *constants: mx.array) -> list[mx.array]:
        of_pairs = PhaseConstants(*constants)
        # Asked again: what is mapped grows, and the kernel that turns backward is built for the first gradient.
        can_rotate = trial.can_rotate(backend, xs, offset, of_pairs, traditional, backward)
        rotate = partial(kernel.launch, backend) if can_rotate else twin
        return rotate(xs, offset, of_pairs, traditional, backward)

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

        # The mapped axis and the batch become one batch, with an offset for each row, or for each of its tokens.
        xs = [first(x, axis) for x, axis in zip(xs, xs_axes, strict=True)]
        batch = xs[0].shape[1]
        offsets = first(offset, offset_axis)
        offsets = mx.broadcast_to(offsets, (size, batch, *offsets.shape[2:])).flatten(0, 1)
        rotated: Any = rotation([x.flatten(0, 1) for x in xs], offsets, *constants)
        return [mx.unflatten(x, 0, (size, batch)) for x in rotated], [0] * len(xs)

    return rotation


def twin(
    xs: list[mx.array], offset: mx.array, constants: PhaseConstants, traditional: bool, backward: bool
) -> list[mx.array]:
    """What `kernel.launch` does, in plain mlx.core."""
    cos, sin = ops.cos_sin(offset, xs[0].shape[2], constants)
    return ops.rotate(xs, cos, -sin if backward else sin, traditional)
