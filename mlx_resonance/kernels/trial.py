"""Whether the kernel may be used: every variant is tried once on this machine and compared with float64."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from ..frequencies import RotaryFrequencies
from ..release import VERSION
from . import kernel, ops
from .ops import PhaseConstants

logger = logging.getLogger("mlx_resonance")
_unusable: set[str] = set()  # the backends that failed, and `gpu` where there is none: each is told once


class Variant(NamedTuple):
    """What decides the text that MLX compiles.

    Attributes:
        backend: `metal` or `cuda`.
        dtypes: of the arrays, one or two.
        traditional, backward: as in `kernel.launch`.
        heads: per thread.
        few_pairs, few_offsets: fewer than `kernel.SMALL`.
    """

    backend: str
    dtypes: tuple[mx.Dtype, ...]
    traditional: bool
    backward: bool
    heads: int
    few_pairs: bool
    few_offsets: bool


def current_backend() -> str | None:
    """`metal` or `cuda` where MLX's default device is a GPU, else None; a machine without one is told once."""
    if mx.default_device().type == mx.DeviceType.gpu:
        backend = "metal" if mx.metal.is_available() else "cuda"
        return None if backend in _unusable else backend
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        _give_up("gpu", "MLX has no GPU here")
    return None


def can_rotate(
    backend: str,
    xs: list[mx.array],
    offset: mx.array,
    constants: PhaseConstants,
    traditional: bool,
    backward: bool = False,
) -> bool:
    """Whether the kernel is for these arrays, and was right when it was tried; if it fails, one warning says why."""
    if backend in _unusable or any(x.dtype not in kernel.DTYPES or x.size < kernel.SMALL for x in xs):
        return False
    if kernel.grid(xs, constants.modulus.size)[0] >= 2**31:  # MLX counts a grid in 31 bits
        return False
    few = constants.modulus.size < kernel.SMALL, kernel.per_row(offset, xs[0].shape[0]).size < kernel.SMALL
    dtypes = tuple(x.dtype for x in xs)
    reason = fault(Variant(backend, dtypes, traditional, backward, kernel.heads_per_thread(xs), *few))
    if reason is not None:
        _give_up(backend, f"the {backend} kernel cannot be used: {reason}")
    return reason is None


@cache
def fault(variant: Variant) -> str | None:
    """What is wrong with a variant of the kernel; None: nothing.

    It is tried unless it passed before: for these versions of MLX and this package, this device, this build of the
    system and this source. Nothing but the variant itself is compiled for that.
    """
    mark = _mark(variant)
    keep = variant.backend == "metal"  # CUDA's compiler and driver come with versions of their own
    if keep and os.path.exists(mark):  # which is False, too, where the folder cannot be read
        return None
    reason = _try(variant)
    if keep and reason is None:
        with contextlib.suppress(OSError):  # nowhere to keep it: it is tried again next time
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    return reason


def _mark(variant: Variant) -> Path:
    """The empty file that says that a variant has passed."""
    device = mx.device_info()
    of_mlx = mx.__version__  # type: ignore[attr-defined]  # mypy's stub has none
    parts = [
        VERSION, of_mlx, platform.platform(), platform.version(), device.get("device_name"),
        device.get("architecture"), variant, *_sources(),
    ]  # fmt: skip
    return user_cache_path("mlx-resonance") / "kernels" / hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _sources() -> list[str]:
    """The text of the kernel, of what launches it, and of the trial itself."""
    return [
        path.read_text(encoding="utf-8")
        for path in sorted(Path(__file__).parent.iterdir())
        if path.suffix in (".h", ".py")
    ]


def _try(variant: Variant) -> str | None:
    # One size lets the kernel move whole packs, the other does not; both have more heads than one thread takes, and
    # features to copy. The second has a position for every token, where there are as few of those, or as many.
    for pairs in (4, 3) if variant.few_pairs else (8, 11):
        wavelengths = np.array([6.0, 2 * np.pi, 44.0, 54410.0, 1e5 / 3, *range(700, 706)])[:pairs]
        frequencies = RotaryFrequencies(wavelengths, 1.25)
        rows, length = 2 if variant.few_offsets else kernel.SMALL, 3 if variant.heads == 1 else kernel.FEW_TOKENS
        shape = rows, length, kernel.HEADS + 1, 2 * pairs + 8
        positions = (np.arange(rows) * 1000003 - 2)[:, None] + np.arange(length)
        per_token = pairs in (3, 11) and (positions.size < kernel.SMALL) == variant.few_offsets
        positions = positions[:, ::-1] if per_token else positions
        values = np.sin(np.arange(np.prod(shape))).reshape(shape).astype(np.float32)
        # The casts run on the CPU, so that the GPU compiles nothing for them.
        xs = [mx.array(values).astype(dtype, stream=mx.cpu).swapaxes(1, 2) for dtype in variant.dtypes]
        offset = mx.array((positions if per_token else positions[:, 0]).astype(np.int32))
        constants = ops.phase_constants(frequencies)
        try:
            rotated = kernel.launch(variant.backend, xs, offset, constants, variant.traditional, variant.backward)
            for x, y in zip(xs, rotated, strict=True):
                given, got = (np.array(array.astype(mx.float32, stream=mx.cpu), np.float64) for array in (x, y))
                expected = _rotated(given, positions[:, None], frequencies, variant)
                off = np.abs(got - expected).max()
                # A rounding to 16 bits may go either way; compilers contract float32 each in their own way.
                if not off <= max(float(mx.finfo(y.dtype).eps), 4 * 2.0**-23):  # nor if it is not a number
                    return f"its results are off by {off:.2g} in {y.dtype}"
        except (RuntimeError, ValueError) as error:
            return " ".join(str(error).split())
    return None


def _rotated(
    x: NDArray[np.float64], positions: NDArray[np.int64], frequencies: RotaryFrequencies, variant: Variant
) -> NDArray[np.float64]:
    """The rotation in NumPy: x of shape (B, H, L, D), positions (B, 1, L)."""
    turn = np.fmod(positions[..., None], frequencies.wavelengths) / frequencies.wavelengths  # fmod is exact
    theta = 2 * np.pi * turn
    cos, sin = (frequencies.attention_scale * part for part in (np.cos(theta), np.sin(theta)))
    sin = -sin if variant.backward else sin
    dims, half = frequencies.dims, frequencies.dims // 2
    one, other = (slice(0, dims, 2), slice(1, dims, 2)) if variant.traditional else (slice(half), slice(half, dims))
    y = x.copy()
    y[..., one] = x[..., one] * cos - x[..., other] * sin
    y[..., other] = x[..., one] * sin + x[..., other] * cos
    return y


def _give_up(backend: str, reason: str) -> None:
    if backend not in _unusable:
        _unusable.add(backend)
        logger.warning("[ResonanceRoPE] %s: rotating with plain mlx.core operations", reason)
