"""ResonanceRoPE: rotary position embedding with exact phases, a drop-in for mlx.nn.RoPE."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from . import kernels
from .errors import UsageError
from .frequencies import RotaryFrequencies
from .kernels import Angles
from .positions import PositionMap
from .rope_types import LONGEST

T = TypeVar("T")


class ResonanceRoPE(nn.Module):
    """Rotate queries and keys by position, with angles exact to float32 at every position below 2³¹.

    Args:
        frequencies: the wavelengths and the attention scale; or, if they change with the sequence length (dynamic NTK,
            LongRoPE), a function that returns them for a length.
        traditional: pairs are neighbours (2i, 2i + 1) instead of (i, i + dims / 2).
        positions: the position map of an attention that uses it; this module itself rotates by what it is given.

    Raises:
        TypeError: `frequencies` is neither.
    """

    def __init__(
        self,
        frequencies: RotaryFrequencies | Callable[[int], RotaryFrequencies],
        traditional: bool = False,
        positions: PositionMap | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(frequencies, RotaryFrequencies) or callable(frequencies)):
            raise TypeError(f"[ResonanceRoPE] frequencies must be RotaryFrequencies, got {type(frequencies).__name__}")
        self.traditional, self.positions = traditional, positions
        self._expected_length = 0
        self._step = _Step()
        self._by_length = None if isinstance(frequencies, RotaryFrequencies) else frequencies
        self._use(frequencies if isinstance(frequencies, RotaryFrequencies) else frequencies(0))

    def _use(self, frequencies: RotaryFrequencies) -> None:
        self._frequencies = frequencies
        self._constants = self._unscaled = kernels.phase_constants(frequencies)
        if frequencies.attention_scale != 1:
            self._unscaled = kernels.phase_constants(replace(frequencies, attention_scale=1.0))

    @property
    def frequencies(self) -> RotaryFrequencies:
        """The frequencies in use: those of the last call if they change with the length."""
        return self._frequencies

    @property
    def dims(self) -> int:
        """Number of rotated features."""
        return self._frequencies.dims

    @property
    def shared(self) -> Angles | None:
        """The angles of the current step, inside `sharing`."""
        return self._step.angles

    @contextmanager
    def sharing(self, length: int, offset: int | mx.array, like: mx.array | None = None) -> Iterator[None]:
        """Within it, `shared` holds the angles of a step, computed once for all layers: arguments as for `angles`.

        Within `inference`, the step is not transformable.

        Raises:
            UsageError: as for `angles`; or the angles change with the length, and those of this step would differ
                between its rows, or from those of the keys that an earlier pass over the same text has cached.
        """
        if self._by_length is not None and not _of_every_token(offset):
            self._check_one_length(self._by_length, length, _values(offset))
        step = self._step
        before = step.angles, step.known
        step.angles, step.known = self.angles(length, offset, like, step.transformable), {}
        try:
            yield
        finally:
            step.angles, step.known = before

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Within it, no step is transformable: see `angles`."""
        before, self._step.transformable = self._step.transformable, False
        try:
            yield
        finally:
            self._step.transformable = before

    def _check_one_length(
        self, by_length: Callable[[int], RotaryFrequencies], length: int, offsets: NDArray[np.integer]
    ) -> None:
        """Raise UsageError if the keys of a text, or of the rows of a batch, would not all rotate alike."""
        shortest, longest = (max(int(end) + length, self._expected_length) for end in (offsets.min(), offsets.max()))
        if by_length(shortest) != by_length(longest):
            raise UsageError("angles that change with the length of a text do not serve rows of several lengths")
        if length > 1 and offsets.max() > 0 and by_length(longest) != self._frequencies:
            raise UsageError("angles that change with the length of a text need it to be read in one pass")

    def _extra_repr(self) -> str:
        scale = f"{self.frequencies.attention_scale:.6g}"
        return f"{self.dims}, traditional={self.traditional}, resonant={self.frequencies.is_resonant}, scale={scale}"

    @property
    def expected_length(self) -> int:
        """What `expect` was called with last; 0 before."""
        return self._expected_length

    def expect(self, length: int) -> None:
        """From now on, choose frequencies that change with the length for at least `length` tokens.

        For a prompt that is read in chunks: all its keys then rotate alike, as if it were read in one pass.
        """
        self._expected_length = length
        if self._by_length is not None and length:
            self._use(self._by_length(length))  # keys from a cache were rotated so

    def angles(
        self,
        length: int,
        offset: int | mx.array = 0,
        like: mx.array | None = None,
        transformable: bool = True,
    ) -> Angles:
        """The angles of one step, to be shared by all layers: see `rotate`.

        Args:
            length: number of tokens, L.
            offset: position of the first token, an int in [0, 2³¹ - L] or an integer array of shape () or (B,), whose
                values are cast to int32 and not checked. Or the positions of every token, shape (B, L): frequencies
                that change with the length are then those of the length that `expect` names.
            like: an array of the same step, such as the model's input; `mx.export_function` needs it.
            transformable: whether MLX may differentiate, map or checkpoint what is rotated by them. If not, a GPU's
                kernel is launched directly, which takes the CPU a sixth of the time.

        Returns:
            What `rotate` takes: the offset, the constants, and on a CPU a table of cosines and sines.

        Raises:
            UsageError: an int is out of range, or an array has another type or shape; or it holds the positions of all
                tokens, the angles change with the length, and none is expected.
        """
        if isinstance(offset, mx.array):
            fits = offset.ndim <= 1 or (offset.ndim == 2 and offset.shape[1] == length)
            if not fits or not mx.issubdtype(offset.dtype, mx.integer):
                raise UsageError(
                    "[ResonanceRoPE] offset must be an integer or an integer array of shape (), (B,) or (B, "
                    f"{length}), got {offset.dtype} of shape {offset.shape}"
                )
        elif not (isinstance(offset, (int, np.integer)) and 0 <= offset <= LONGEST - max(length, 1)):
            raise UsageError(f"[ResonanceRoPE] offset must be an integer in [0, 2**31 - {length}], got {offset}")
        if self._by_length is not None:
            if _of_every_token(offset) and not self._expected_length:
                raise UsageError("[ResonanceRoPE] the angles change with the length of the text: expect() must name it")
            tokens = 0 if _of_every_token(offset) else int(_values(offset).max()) + length
            frequencies = self._by_length(max(tokens, self._expected_length))
            if frequencies != self._frequencies:
                self._use(frequencies)
        start = offset.astype(mx.int32) if isinstance(offset, mx.array) else mx.array([int(offset)])
        start = start if start.ndim == 2 else start.reshape(-1)
        return kernels.angles(start, length, self._constants, like, transformable)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate one array, as `mlx.nn.RoPE` does.

        Args:
            x: shape (..., L, D) with D >= dims; features from dims on are copied.
            offset: position of the first token, an int or an integer array of shape () or (B,), B the first axis of x.

        Returns:
            The rotated x, of the same shape and type.

        Raises:
            UsageError: x has fewer than dims features or no axis for L, or the offset is wrong.
        """
        self._check(x)
        batch = x.shape[0] if x.ndim > 2 else 1
        angles = self._fitting(self.angles(x.shape[-2], offset, x), batch, x.shape[-2])
        if x.size == 0:
            return x
        flat = x.reshape(batch, -1, *x.shape[-2:])
        return kernels.rotate([flat], angles, self.traditional)[0].reshape(x.shape)

    def rotate(
        self, q: mx.array, k: mx.array, offset: int | mx.array = 0, angles: Angles | None = None
    ) -> tuple[mx.array, mx.array]:
        """Rotate queries and keys in one call.

        Args:
            q: queries, shape (B, H, L, D).
            k: keys, shape (B, H_kv, L, D).
            offset: position of the first token, an int or an integer array of shape () or (B,).
            angles: from `angles(L, offset)`, if a model computes them once for all layers; offset is then ignored.

        Returns:
            The rotated q and k, of the same shapes and types.

        Raises:
            UsageError: a shape or the offset is wrong.
        """
        if angles is not None and angles.bare is not None and (rotated := angles.bare.launch(q, k)) is not None:
            return rotated[0], rotated[1]  # the shapes of the step's first layer, which were checked
        self._check(q)
        self._check(k)
        if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
            raise UsageError(
                f"[ResonanceRoPE] q and k must be (B, H, L, D) with the same B, L and D, got {q.shape} and {k.shape}"
            )
        if angles is None:
            angles = self.angles(q.shape[2], offset, q)
        angles = self._fitting(angles, q.shape[0], q.shape[2])
        rotated_q, rotated_k = kernels.rotate([q, k], angles, self.traditional)
        return rotated_q, rotated_k

    def turn(self, x: mx.array, angles: Angles) -> mx.array:
        """Rotate one array (B, H, L, D) by given angles."""
        return kernels.rotate([x], self._fitting(angles, x.shape[0], x.shape[2]), self.traditional)[0]

    def of_positions(self, positions: NDArray[np.int64], scaled: bool = True) -> Angles:
        """The angles of given positions (L,), in any order, by the frequencies in use.

        Args:
            positions: below 2³¹; negative ones turn back.
            scaled: whether the attention scale applies. Keys that are moved on from their own position have it.
        """
        offset = mx.array(positions.astype(np.int32))[None]
        return kernels.angles(offset, len(positions), self._constants if scaled else self._unscaled)

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, computed once for the layers that share a step; `name` tells it from others."""
        known = self._step.known
        if known is None:
            return make()
        if name not in known:
            known[name] = make()
        made: T = known[name]
        return made

    def _fitting(self, angles: Angles, batch: int, length: int) -> Angles:
        rows = angles.offset.shape[0]
        if rows not in (1, batch) or angles.length != length:
            raise UsageError(
                f"[ResonanceRoPE] angles (offsets) for {rows} rows of {angles.length} tokens "
                f"do not fit {batch} of {length}"
            )
        return angles

    def _check(self, x: mx.array) -> None:
        if x.ndim < 2 or x.shape[-1] < self.dims:
            raise UsageError(f"[ResonanceRoPE] expected (..., L, D) with D >= {self.dims}, got shape {x.shape}")
        if not mx.issubdtype(x.dtype, mx.floating):
            raise UsageError(f"[ResonanceRoPE] expected a floating-point array, got {x.dtype}")


def _of_every_token(offset: int | mx.array) -> bool:
    """Whether it holds the positions of all tokens, not those of the first ones."""
    return isinstance(offset, mx.array) and offset.ndim == 2


def _values(offset: int | mx.array) -> NDArray[np.integer]:
    """The offset as numbers. Raises UsageError where MLX has none, since it traces the function."""
    try:  # NumPy does not notice MLX's error when it reads an array itself
        return np.array(offset.tolist() if isinstance(offset, mx.array) else offset)
    except ValueError:
        raise UsageError(
            "[ResonanceRoPE] angles that change with the length of a text need an offset whose value is known, "
            "got an argument of a function that MLX compiles, maps or exports"
        ) from None


class _Step(threading.local):
    """A thread's current step, where mlx.nn.Module does not see it: angles are not parameters.

    Attributes:
        angles: what the layers share; None outside `sharing`.
        known: what else they share, by name: see `once`; None outside `sharing`.
        transformable: False inside `inference`.
    """

    angles: Angles | None = None
    known: dict[Hashable, Any] | None = None
    transformable = True

    def __reduce__(self) -> tuple[type[_Step], tuple[()]]:
        return _Step, ()  # a copy of the module begins without a step


def expect(model: nn.Module, length: int) -> None:
    """Make every `ResonanceRoPE` of a model expect a text of `length` tokens: see its method."""
    for module in model.modules():
        if isinstance(module, ResonanceRoPE):
            module.expect(length)
