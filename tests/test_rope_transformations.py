"""ResonanceRoPE under MLX's transformations: gradients, compile, checkpoint and vmap."""

from __future__ import annotations

from mlx_resonance import ResonanceRoPE

import mlx.core as mx
import numpy as np
import pytest

from . import oracle
from .rotations import ROTATION, YARN, layouts, normal


@layouts
def test_gradient_is_the_inverse_rotation(traditional):
    rope = ResonanceRoPE(YARN, traditional)
    x, weight = mx.array(normal(1, 2, 5, 160)), normal(1, 2, 5, 160, seed=1)
    gradient = mx.grad(lambda x: (rope(x, offset=1000003) * mx.array(weight)).sum())(x)
    # The transpose of a scaled rotation by θ is the scaled rotation by -θ.
    theta = -oracle.angles(range(1000003, 1000008), YARN.wavelengths)
    expected = oracle.rotate(weight, theta, YARN.attention_scale, traditional)
    np.testing.assert_allclose(np.array(gradient), expected, rtol=0, atol=ROTATION * YARN.attention_scale * 6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_gradient_in_half_precision(dtype):
    x = mx.array(normal(1, 2, 5, 128)).astype(dtype)
    gradient = mx.grad(lambda x: (ResonanceRoPE(YARN)(x, offset=7) ** 2).sum())(x)
    assert gradient.dtype == dtype
    # Σ|Rx|² = s²·Σ|x|² has the gradient 2s²x, here through two roundings to half precision.
    expected = 2 * YARN.attention_scale**2 * np.array(x.astype(mx.float32))
    rtol = 4 * {mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype]
    np.testing.assert_allclose(np.array(gradient.astype(mx.float32)), expected, rtol=rtol, atol=rtol)


def loss(rope):
    return lambda x, offset: mx.square(rope(x, offset=offset)[..., :40]).sum()


@layouts
@pytest.mark.parametrize("transformed", [mx.compile, mx.checkpoint])
def test_transformed_call_equals_the_plain_one(transformed, traditional):
    rope = ResonanceRoPE(YARN, traditional)
    x, offset = mx.array(normal(2, 3, 5, 128)), mx.array([3, 1000003])
    call = transformed(lambda x, offset: rope(x, offset=offset))
    np.testing.assert_array_equal(np.array(call(x, offset)), np.array(rope(x, offset=offset)))


def test_gradient_through_checkpoint_and_compile():
    rope = ResonanceRoPE(YARN)
    x, offset = mx.array(normal(2, 3, 5, 128)), mx.array([3, 1000003])
    plain = mx.grad(loss(rope))(x, offset)
    for gradient in (mx.grad(mx.checkpoint(loss(rope))), mx.compile(mx.grad(loss(rope)))):
        # The fused loss may round differently in the last bit.
        np.testing.assert_allclose(np.array(gradient(x, offset)), np.array(plain), rtol=1e-6, atol=1e-6)


@layouts
def test_vmap_over_a_new_axis(traditional):
    rope = ResonanceRoPE(YARN, traditional)
    x = mx.array(normal(3, 2, 2, 5, 128))
    mapped = mx.vmap(lambda x: rope(x, offset=1000003))(x)
    for row in range(3):
        np.testing.assert_array_equal(np.array(mapped[row]), np.array(rope(x[row], offset=1000003)))


def test_vmap_over_offsets():
    rope = ResonanceRoPE(YARN)
    x, offsets = mx.array(normal(3, 1, 2, 5, 128)), mx.array([0, 3, 1000003])
    mapped = mx.vmap(lambda x, offset: rope(x, offset=offset))(x, offsets)
    for row in range(3):
        np.testing.assert_array_equal(np.array(mapped[row]), np.array(rope(x[row], offset=offsets[row])))


def test_no_parameters():
    assert ResonanceRoPE(YARN).parameters() == {}
