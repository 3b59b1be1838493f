"""The quantizer stays within its bound, and `compare` notices what does not."""

from __future__ import annotations

from typing import Any

from mlx_resonance.convert.compare import compare
from mlx_resonance.convert.quantization import BITS, GROUP_SIZES, dequantize, largest_error, quantize

import mlx.core as mx
import numpy as np
import pytest

SETTINGS = [{"mode": "affine", "bits": bits, "group_size": group} for bits in BITS for group in GROUP_SIZES]
SETTINGS += [
    {"mode": "mxfp4", "bits": 4, "group_size": 32},
    {"mode": "nvfp4", "bits": 4, "group_size": 16},
    {"mode": "mxfp8", "bits": 8, "group_size": 32},
]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "{mode}-{bits}-{group_size}".format(**s))
def test_the_quantizer_keeps_to_the_bound_and_a_step_more_does_not(settings: dict[str, Any], dtype: mx.Dtype) -> None:
    """Weights of all sizes, including those whose scales are subnormal in float16 or beyond what E4M3 can hold."""
    chance = np.random.default_rng(0)
    normal = chance.standard_normal((16, 512))
    for spread in (1e-4, 1e-3, 0.02, 1, 50):
        for weights in (normal, normal + 3, normal * np.abs(normal) ** 3):
            weight = mx.array(spread * weights).astype(dtype)
            parts, error = quantize(weight, settings)
            assert all(mx.array_equal(a, b) for a, b in zip(parts, mx.quantize(weight, **settings), strict=True))
            value = dequantize(parts, settings)
            bound = largest_error(value, parts, settings)
            assert mx.all(mx.abs(value - weight.astype(mx.float32)) <= bound).item(), spread
            found = compare(parts, settings, weight)
            assert found.wrong == 0 and error == pytest.approx(found.error, rel=1e-3)
    weight = mx.array(0.02 * normal).astype(dtype)
    parts, _ = quantize(weight, settings)
    wide = mx.abs(dequantize(parts, settings)).max() / 2  # half of the largest number: several steps of any format
    assert compare(parts, settings, weight + wide.astype(dtype)).wrong > 0.5 * weight.size


def test_the_error_of_a_large_weight_is_that_of_a_sample() -> None:
    weight = mx.random.normal((3000, 1024), key=mx.random.key(0))
    settings = {"mode": "affine", "bits": 4, "group_size": 64}
    parts, error = quantize(weight, settings)
    assert all(mx.array_equal(a, b) for a, b in zip(parts, mx.quantize(weight, **settings), strict=True))
    assert error == pytest.approx(compare(parts, settings, weight).error, rel=0.01)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_down_instead_of_to_the_nearest_is_noticed(bits: int, dtype: mx.Dtype) -> None:
    weight = mx.array(0.02 * np.random.default_rng(0).standard_normal((16, 512))).astype(dtype)
    settings = {"mode": "affine", "bits": bits, "group_size": 64}
    (_, scales, biases), _ = quantize(weight, settings)
    groups = np.array(weight.astype(mx.float32)).reshape(16, 8, 64)
    scale, bias = (np.array(part.astype(mx.float32))[..., None] for part in (scales, biases))
    codes = np.clip(np.floor((groups - bias) / scale), 0, 2**bits - 1).astype(np.uint32).reshape(16, -1, 32 // bits)
    packed = mx.array((codes << (bits * np.arange(32 // bits, dtype=np.uint32))).sum(-1).astype(np.uint32))
    assert compare([packed, scales, biases], settings, weight).wrong > 0.1 * weight.size


def test_compare_counts() -> None:
    value = mx.array([[1.0, mx.nan, mx.inf, 2.0]])
    found = compare([value], original=value)
    assert (found.nan, found.inf, found.wrong, found.exact) == (1, 1, 0, True)
    found = compare([value], original=mx.array([[1.0, 0.0, mx.inf, 3.0]]))
    assert (found.wrong, found.exact, found.error) == (2, False, None)
    found = compare([mx.array([[3.0, 4.0]])], original=mx.array([[0.0, 4.0]]))
    assert found.error == 0.75
