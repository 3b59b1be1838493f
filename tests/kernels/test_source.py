"""What needs the kernel's source: indices beyond 2³¹, whole blocks of CUDA, Metal's address spaces."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlx_resonance import RotaryFrequencies, default_frequencies
from mlx_resonance.kernels import gpu, ops

import mlx.core as mx
import numpy as np
import pytest

from .. import oracle
from ..rotations import PLAIN_YARN, layouts, normal
from . import emulator
from .checks import NO_COMPILER, TABLES, check, dtypes, heads, offsets
from .emulator import Strided

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason=NO_COMPILER)


def test_an_output_of_more_than_2_31_elements() -> None:
    """Nine heads of 2²¹ tokens that share memory; the last threads write the last token."""
    length, dims, frequencies = 2**21, 128, TABLES["resonance"]
    token = Strided.of(normal(1, 1, 1, dims), mx.float16)
    x = replace(token, shape=(1, 9, length, dims), strides=(0, 0, 0, 1))
    constants = ops.phase_constants(frequencies)
    source, launched = emulator.metal_source([x], offsets(0), constants, False, False)
    groups = launched["grid"][0] // length
    row = dims * 2
    window = (9 * length * row - row, row)
    request = emulator.Request(
        source, launched, [x], offsets(0), constants, x_from=groups * (length - 1), y_from=1, window=window
    )
    rotated = np.frombuffer(request.run(), np.float16)
    theta = oracle.angles([length - 1], frequencies.wavelengths)
    expected = oracle.rotate(token.values()[0, 0], theta, frequencies.attention_scale)[0]
    np.testing.assert_allclose(rotated, expected, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_strides_beyond_2_31_elements(axis: int) -> None:
    """Two rows, heads, tokens or features; the second lies 2³¹ + 16 elements after the first."""
    x = Strided.of(normal(2, 2, 2, 2), mx.float16)
    far = tuple(2**31 + 16 if i == axis else stride for i, stride in enumerate(x.strides))
    constants = ops.phase_constants(RotaryFrequencies(np.array([6.0])))
    source, launched = emulator.metal_source([x], offsets(3), constants, False, False)
    request = emulator.Request(source, launched, [x], offsets(3), constants, stretch=far)
    rotated = np.frombuffer(request.run(), np.float16).reshape(x.shape)
    expected = oracle.rotate(x.values(), oracle.angles([3, 4], [6.0])[None, None])
    np.testing.assert_allclose(rotated, expected, rtol=2**-10, atol=1e-6)


@layouts
@dtypes
@pytest.mark.parametrize("length", [1, 100])
def test_the_source_for_cuda(dtype: mx.Dtype, length: int, traditional: bool) -> None:
    """CUDA launches whole blocks: 16 groups of pairs of 200 tokens fill 12 and a half blocks of 256 threads."""
    xs = [Strided.of(heads(2, count, length, 128, count), dtype) for count in (9, 2)]
    check(partial(emulator.run, preamble="cuda.h"), xs, offsets(3, 70_000), TABLES["resonance"], traditional)


@dtypes
@pytest.mark.parametrize(("batch", "pairs"), [(1, 64), (9, 2), (1, 2), (9, 64)])
def test_address_spaces(tmp_path: Path, dtype: mx.Dtype, batch: int, pairs: int) -> None:
    """C++ for OpenCL has address spaces like Metal's; plain C++ has none."""
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("reading C++ for OpenCL needs clang++")
    x = Strided.of(normal(batch, 2, 3, 2 * pairs), dtype)
    constants = ops.phase_constants(default_frequencies(2 * pairs))
    source, _ = emulator.metal_source([x, x], np.zeros(batch, np.int32), constants, False, False)
    names = {
        "int32_t": "int", "uint32_t": "uint", "int64_t": "long", "uint64_t": "ulong",
        "float16_t": "half", "bfloat16_t": "half", "device": "__global", "constant": "__constant",
    }  # fmt: skip
    preamble = "".join(f"#define {name} {other}\n" for name, other in names.items())
    source = source.replace('template [[host_name("', '// [[host_name("').replace(
        "[[kernel]] decltype", "\ntemplate decltype"
    )
    path = tmp_path / "kernel.clcpp"
    path.write_text("#pragma OPENCL EXTENSION cl_khr_fp16 : enable\n" + preamble + source)
    command = [clang, "-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-fsyntax-only", "-Wno-everything"]
    done = subprocess.run([*command, "-Xclang", "-finclude-default-header", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_pointer_names_its_address_space() -> None:
    """Metal demands it of casts and parameters; C++ for OpenCL would accept a generic pointer."""
    x = Strided.of(normal(1, 2, 3, 128))
    source, _ = emulator.metal_source([x, x], offsets(0), ops.phase_constants(PLAIN_YARN), False, False)
    spaces = re.findall(r"(\w+) (?:\w+|Pack<[^>]*>)\*", source)  # a product has spaces around its *
    assert len(spaces) > 15 and set(spaces) == {"device", "constant", "DEVICE_MEMORY"}


def test_queries_and_keys_are_in_device_memory() -> None:
    """From `gpu.SMALL` elements on, a constant of MLX; rotary.h supports no other address space for them."""
    x = Strided.of(normal(1, gpu.SMALL // 4, 1, 4))
    source, _ = emulator.metal_source([x, x], offsets(0), ops.phase_constants(default_frequencies(4)), False, False)
    assert "const device float* q " in source and "const device float* k " in source


def test_nothing_imprecise_in_the_source() -> None:
    source = "".join(map(gpu.source, ("metal.h", "cuda.h", "rotary.h", "body.h")))
    assert "fast" not in source and "double" not in source
