"""KV formats: bits of keys and of values, rotation, bytes per number; what a user writes for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UsageError, check_option

GROUP_SIZES = (64, 32)  # values that share a scale and a bias; MLX has no smaller groups
SCALE_BYTES = 2  # of a scale, and of a bias: a float32 model's are float16, another's have its type
BITS = (8, 4)
# Sylvester's Hadamard matrices exist for powers of two. Products with a stored one are exact in every type and on every
# device; mx.hadamard_transform is wrong or unsafe at several other sizes (36, 72, 100, 120).
ROTATED = (32, 64, 128, 256)
SEED = 20_240_404  # of the signs of the rotation; on-disk KV caches depend on it

Arrays = tuple[mx.array, mx.array, mx.array]  # packed numbers, scales, biases


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored: in the model's type, or quantized in groups with a scale and a bias each.

    A rotated format multiplies every head by a random orthogonal matrix first, which spreads a head's largest numbers
    over all of them. Scores do not change, as queries are rotated alike, and the output is rotated back.

    Args:
        key_bits, value_bits: 8 or 4; both None for the model's type.
        rotate: whether to rotate; only if quantized.

    Raises:
        UsageError: a number of bits is not supported, or there is nothing to rotate for.
    """

    key_bits: int | None = None
    value_bits: int | None = None
    rotate: bool = False

    def __post_init__(self) -> None:
        for bits in (self.key_bits, self.value_bits):
            check_option("kv_bits", bits in BITS or self.key_bits is self.value_bits is None, "4 or 8", bits)
        if self.rotate and self.key_bits is None:
            raise UsageError("rotation is for a quantized KV cache", option="kv_rotate", remedies=[{"kv_bits": 4}])

    @classmethod
    def of(cls, kv_bits: KVBits, kv_rotate: bool = False) -> KVFormat:
        """The format that arguments ask for.

        Args:
            kv_bits: 8 or 4 for keys and values; two of them, as (8, 4) or "8,4", for keys and for values; None for the
                model's type; or a format.
            kv_rotate: whether to rotate.

        Raises:
            UsageError: a value is not one of these.
        """
        if isinstance(kv_bits, KVFormat):
            return cls(kv_bits.key_bits, kv_bits.value_bits, kv_rotate or kv_bits.rotate)
        parts: Any = kv_bits
        if isinstance(kv_bits, str):
            parts = tuple(int(part) if part.strip() in ("4", "8") else part for part in kv_bits.split(","))
        if not isinstance(parts, (tuple, list)):
            parts = (parts,)
        right = 1 <= len(parts) <= 2 and (kv_bits is None or all(type(bits) is int for bits in parts))
        check_option("kv_bits", right, "4 or 8, or two of them: for keys, for values", kv_bits)
        return cls(parts[0], parts[-1], kv_rotate)

    @property
    def quantized(self) -> bool:
        """Whether it is another than the model's type."""
        return self.key_bits is not None

    @property
    def value(self) -> int | str | None:
        """As JSON: 8, "8,4", "4 rotated"; None for the model's type."""
        bits = self.key_bits if self.key_bits == self.value_bits else f"{self.key_bits},{self.value_bits}"
        return f"{bits} rotated" if self.rotate else bits

    def name(self, item_size: int) -> str:
        """In words: "16 bit", "8,4 bit", "4 bit, rotated".

        Args:
            item_size: bytes of a number in the model's type.
        """
        bits = KVFormat(self.key_bits, self.value_bits).value or 8 * item_size
        return f"{bits} bit, rotated" if self.rotate else f"{bits} bit"

    def bytes_per_pair(self, dims: int, item_size: int) -> float:
        """Average bytes of a number of the keys and one of the values, scales and biases included.

        Args:
            dims: features per head.
            item_size: bytes of a number in the model's type.
        """
        return self._bytes(self.key_bits, dims, item_size) + self._bytes(self.value_bits, dims, item_size)

    def bytes_per_key(self, dims: int, item_size: int) -> float:
        """Average bytes of a number of the keys, as in `bytes_per_pair`."""
        return self._bytes(self.key_bits, dims, item_size)

    def _bytes(self, bits: int | None, dims: int, item_size: int) -> float:
        return item_size if bits is None else bits / 8 + 2 * SCALE_BYTES / group_size(dims)

    def quantize(self, keys: mx.array, values: mx.array, group_size: int) -> tuple[Arrays, Arrays]:
        """Keys and values (B, H, L, D) as a quantized cache stores them, rotated if the format rotates."""
        return self.quantize_keys(keys, group_size), _quantize(self.stored(values), self.value_bits, group_size)

    def quantize_keys(self, keys: mx.array, group_size: int) -> Arrays:
        """Keys as a quantized cache stores them."""
        return _quantize(self.stored(keys), self.key_bits, group_size)

    def stored(self, x: mx.array) -> mx.array:
        """Keys or values (…, D), rotated if the format rotates."""
        return x @ rotation(x.shape[-1], x.dtype)[0] if self.rotate else x

    def asked(self, queries: mx.array) -> mx.array:
        """Queries (…, D), rotated so that their scores are those without rotation."""
        return queries @ rotation(queries.shape[-1], queries.dtype)[1].T if self.rotate else queries

    def restored(self, output: mx.array) -> mx.array:
        """The output of attention (…, D), a mean of stored values, rotated back."""
        return output @ rotation(output.shape[-1], output.dtype)[1] if self.rotate else output

    def check(self, dims: int) -> None:
        """Raise UsageError if heads of `dims` features cannot be stored in it."""
        if self.quantized:
            group_size(dims)
        if self.rotate and dims not in ROTATED:
            sizes = ", ".join(map(str, ROTATED))
            raise UsageError(f"kv_rotate needs a head size that is one of {sizes}, got {dims}", option="kv_rotate")


KVBits = int | str | tuple[int, int] | KVFormat | None  # what `KVFormat.of` takes

# Perplexity that a format costs, in %, where it is about 1 or more: of SmolLM2-135M, on five texts of 8192 tokens
# (benchmarks/kv_formats.py --model build/smollm2 --context 8192 --documents 5).
LOSSES = {"8,4 bit": 0.9, "4 bit": 12, "4 bit, rotated": 5}


def offered(dims: int) -> list[KVFormat]:
    """The formats to choose from for a head size, the largest first; with rotation they have the same sizes."""
    quantized = [KVFormat(8, 8), KVFormat(8, 4), KVFormat(4, 4)]
    return [KVFormat(), *(quantized if dims % GROUP_SIZES[-1] == 0 else [])]


def group_size(dims: int) -> int:
    """How many features of a head share a scale. Raises UsageError if no group size divides `dims`."""
    for size in GROUP_SIZES:
        if dims % size == 0:
            return size
    raise UsageError(f"kv_bits needs a head size that is a multiple of {GROUP_SIZES[-1]}, got {dims}", option="kv_bits")


def _quantize(x: mx.array, bits: int | None, group_size: int) -> Arrays:
    packed, *scales = mx.quantize(x, group_size=group_size, bits=bits)
    # float16 has the range of keys and values, and 8 times the precision of bfloat16, in which the error of a scale
    # would exceed that of 8 bits.
    scale, bias = (s.astype(mx.float16) if s.dtype == mx.float32 else s for s in scales)
    return packed, scale, bias


@lru_cache
def rotation(dims: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The randomized Hadamard transform of a head, to multiply from the right.

    Returns:
        forward, back: of shape (dims, dims). Both are orthogonal up to a factor, and forward @ back is the identity,
        exactly: the entries are powers of two in every type. The factors are 1 if dims is a square, else 2**0.5 and
        its inverse.
    """
    matrix, power = np.ones((1, 1), np.float32), dims.bit_length() - 1
    while len(matrix) < dims:
        matrix = np.kron(np.array([[1, 1], [1, -1]], np.float32), matrix)
    matrix *= np.random.default_rng(SEED).choice(np.array([-1, 1], np.float32), (dims, 1))
    forward = mx.array(matrix / 2 ** (power // 2)).astype(dtype)
    back = mx.array(matrix.T / 2 ** (power - power // 2)).astype(dtype)
    mx.eval(forward, back)  # a lazy array belongs to the stream, and so the thread, that made it
    return forward, back
