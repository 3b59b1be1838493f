"""What needs the kernel's source: indices beyond 2³¹, whole blocks of CUDA, Metal's address spaces."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from mlx_resonance import RotaryFrequencies, default_frequencies
from mlx_resonance.kernels import kernel, ops, trial

import mlx.core as mx
import numpy as np
import pytest

from .. import oracle
from ..rotations import MAX_POSITION, PLAIN_YARN, layouts, normal
from . import emulator
from .checks import DTYPES, NO_COMPILER, TABLES, check, dtypes, heads, offsets
from .emulator import Strided

pytestmark = [
    pytest.mark.skipif(emulator.COMPILER is None, reason=NO_COMPILER),
    pytest.mark.usefixtures("eight_heads_per_thread"),
]


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


@layouts
@dtypes
@pytest.mark.parametrize("flags", [emulator.CONTRACTED, emulator.FLUSHED], ids=["contracted", "flushed"])
def test_what_a_gpu_compiler_may_do(dtype: mx.Dtype, traditional: bool, flags: list[str]) -> None:
    """Fused products and sums, tiny numbers flushed to zero: within the same bounds, far out, forward and backward."""
    run = partial(emulator.run, flags=flags)
    for length in (1, 40):
        xs = [Strided.of(heads(2, count, length, 144, count), dtype) for count in (9, 2)]
        for backward in (False, True):
            check(run, xs, offsets(3, MAX_POSITION - 40), TABLES["yarn"], traditional, backward)


@pytest.mark.parametrize("flags", [emulator.CONTRACTED, emulator.FLUSHED], ids=["contracted", "flushed"])
def test_flags_change_the_program(flags: list[str]) -> None:
    """Otherwise the test above would repeat others: contraction changes bits, flushing changes tiny numbers."""
    tiny = 2.0**-130 if flags is emulator.FLUSHED else 1.0
    xs = [Strided.of(normal(1, 9, 40, 128) * np.float32(tiny))]
    call = xs, offsets(MAX_POSITION - 40), ops.phase_constants(PLAIN_YARN), False, False
    [plain], [other] = emulator.run(*call), emulator.run(*call, flags=flags)
    assert not np.array_equal(plain, other)
    assert flags is not emulator.FLUSHED or not other[..., :64].any()


AS_OPENCL = {
    "int32_t": "int", "uint32_t": "uint", "int64_t": "long", "uint64_t": "ulong",
    "float16_t": "half", "bfloat16_t": "half", "device": "__global", "constant": "__constant",
}  # fmt: skip
# In plain C++ a pointer without a space points to thread memory, as in Metal; in C++ for OpenCL to any. But it does not
# copy structures between spaces, as Metal does.
STRICT = """
#include <stdint.h>
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
typedef short float16_t;
typedef unsigned short bfloat16_t;
struct uint3 { uint32_t x, y, z; };
template <typename T> T as_type(uint32_t bits) { return __builtin_bit_cast(T, bits); }
template <int N, typename T> struct Pack;
template <int N, typename T> Pack<N, T> load(const device Pack<N, T>* x) { return {x->at[0]}; }
template <int N, typename T> void store(device Pack<N, T>* x, Pack<N, T> y) { x->at[0] = y.at[0]; }
"""


def clang() -> str:
    """The newest Clang here; the test is skipped if there is none."""
    found = [path for path in (shutil.which(f"clang++-{n}") for n in range(40, 13, -1)) if path]
    path = found[0] if found else shutil.which("clang++")
    if path is None:
        pytest.skip("checking address spaces needs clang++")
    return path


def reject(source: str, strict: bool, folder: Path) -> str:
    """What Clang says against a Metal source; nothing if it has the right address spaces."""
    if strict:
        source = re.sub(r"\*(reinterpret_cast<[^;]*>\([^;]*\)) = (\w+);", r"store(\1, \2);", source)
        source = STRICT + re.sub(r"= \*(reinterpret_cast<[^;]*);", r"= load(\1);", source)
        flags = ["-x", "c++", "-std=c++17"]
    else:
        source = source.replace("as_type<float>", "as_float")
        preamble = "".join(f"#define {name} {other}\n" for name, other in AS_OPENCL.items())
        source = "#pragma OPENCL EXTENSION cl_khr_fp16 : enable\n" + preamble + source
        flags = ["-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-Xclang", "-finclude-default-header"]
    path = folder / "kernel.txt"
    path.write_text(source)
    command = [clang(), *flags, "-fsyntax-only", "-Wno-everything", str(path)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@dtypes
@pytest.mark.parametrize(("batch", "pairs"), [(1, 64), (9, 2), (1, 2), (9, 64)])
@pytest.mark.parametrize("strict", [False, True], ids=["OpenCL", "strict"])
def test_address_spaces(tmp_path: Path, dtype: mx.Dtype, batch: int, pairs: int, strict: bool) -> None:
    """Of every argument, which MLX puts into `constant` where it has fewer than 8 elements."""
    x = Strided.of(normal(batch, 2, 3, 2 * pairs), dtype)
    constants = ops.phase_constants(default_frequencies(2 * pairs))
    source, _ = emulator.metal_source([x, x], np.zeros(batch, np.int32), constants, False, False)
    assert reject(source, strict, tmp_path) == ""


@pytest.mark.parametrize(
    "right", ["const DEVICE_MEMORY T* x", "const DEVICE_MEMORY Pack<PAIRS, T>*>(x + runs.low)", "DEVICE_MEMORY T* y"]
)
def test_a_forgotten_address_space_is_noticed(tmp_path: Path, right: str) -> None:
    x = Strided.of(normal(1, 2, 3, 128))
    source, _ = emulator.metal_source([x, x], offsets(0), ops.phase_constants(PLAIN_YARN), False, False)
    assert right in source
    assert "error" in reject(source.replace(right, right.replace("DEVICE_MEMORY ", "")), True, tmp_path)


def test_every_pointer_names_its_address_space() -> None:
    """Metal demands it of casts and parameters; C++ for OpenCL would accept a generic pointer."""
    x = Strided.of(normal(1, 2, 3, 128))
    source, _ = emulator.metal_source([x, x], offsets(0), ops.phase_constants(PLAIN_YARN), False, False)
    spaces = re.findall(r"(\w+) (?:\w+|Pack<[^>]*>)\*", source)  # a product has spaces around its *
    assert len(spaces) > 15 and set(spaces) == {"device", "constant", "DEVICE_MEMORY"}


def test_queries_and_keys_are_in_device_memory() -> None:
    """From `kernel.SMALL` elements on, a constant of MLX; rotary.h supports no other address space for them."""
    x = Strided.of(normal(1, kernel.SMALL // 4, 1, 4))
    source, _ = emulator.metal_source([x, x], offsets(0), ops.phase_constants(default_frequencies(4)), False, False)
    assert "const device float* q " in source and "const device float* k " in source


def test_nothing_imprecise_in_the_source() -> None:
    source = "".join(map(kernel.source, ("metal.h", "cuda.h", "rotary.h", "body.h")))
    assert "fast" not in source and "double" not in source
    assert source.isascii()  # MLX hands it to Metal as such


@pytest.mark.parametrize(
    ("dtypes", "turns", "heads"),
    [
        ((mx.float32, mx.float32), (False, False), 1),
        ((mx.bfloat16,), (True, True), 8),
        *(
            pytest.param((dtype,) * 2, (traditional, backward), heads, marks=pytest.mark.long)
            for dtype, traditional, backward, heads in product(DTYPES, (False, True), (False, True), (1, 8))
        ),
    ],
    ids=str,
)
def test_the_kernel_passes_its_trial(
    monkeypatch: pytest.MonkeyPatch, dtypes: tuple[mx.Dtype, ...], turns: tuple[bool, bool], heads: int
) -> None:
    """With room to spare: a compiler that contracts, flushes tiny numbers and adds another rounding passes as well."""

    def launch(backend: str, xs: list[mx.array], offset: mx.array, *call: Any) -> list[mx.array]:
        views = [np.array(x.astype(mx.float32)).swapaxes(1, 2).copy().swapaxes(1, 2) for x in xs]
        strided = [Strided.of(view, x.dtype) for view, x in zip(views, xs, strict=True)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "launch", generated)
            rotated = emulator.run(strided, np.array(offset), *call, flags=emulator.FLUSHED)
        # One more rounding of float32: half of what the trial allows.
        return [
            mx.array((y * (1 + 2.0**-23)).astype(np.float32)).astype(x.dtype) for x, y in zip(xs, rotated, strict=True)
        ]

    generated = kernel.launch
    monkeypatch.setattr(kernel, "launch", launch)
    monkeypatch.setattr(kernel, "FEW_TOKENS", 32)
    variant = trial.Variant("metal", dtypes, *turns, heads, few_pairs=False, few_offsets=True)
    assert trial._try(variant) is None
