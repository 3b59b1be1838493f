"""Runs the Metal kernel without a Mac: the source that MLX generates, compiled as C++ and run thread by thread.

While `mx.export_function` traces, MLX builds the whole source of a Metal kernel, and prints it if asked. That text,
with shim.h before it, is compiled with the address and undefined-behaviour sanitizers; harness.h runs the whole grid.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlx_resonance.kernels import kernel, ops

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
BUILT = HERE / ".built"  # programs, named by the hash of their sources
# Only GCC accepts attributes where the generated source has them; on a Mac g++ is another name for Clang.
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
FLAGS = [  # compiling takes most of the time: no optimization
    "-std=c++17", "-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra",
    "-Werror", "-Wno-attributes", "-Wno-unknown-pragmas", "-Wno-unused-parameter",
]  # fmt: skip
# What a GPU's compiler may do that the flags above leave out: contract products and sums, flush tiny numbers to zero.
CONTRACTED = ["-std=c++17", "-O2", "-ffp-contract=fast", "-Wno-attributes", "-Wno-unknown-pragmas"]
FLUSHED = [*CONTRACTED, "-DFLUSH_TO_ZERO"]
PARAMETER = re.compile(r"^  (const )?(?:device|constant) (\w+)([*&]) (\w+) \[\[buffer\(\d+\)\]\]", re.MULTILINE)
NAME = re.compile(r"\[\[kernel\]\] void (\w+)\(")
ELEMENTS = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}


@dataclass(frozen=True)
class Strided:
    """An array of any layout: flat memory, and the array's place in it (shape, strides and start in elements)."""

    memory: np.ndarray
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    dtype: mx.Dtype

    @classmethod
    def of(cls, view: np.ndarray, dtype: mx.Dtype | None = None) -> Strided:
        """A view of a float32 array in row-major order, rounded to `dtype`."""
        root = view
        while isinstance(root.base, np.ndarray):
            root = root.base
        assert root.flags.c_contiguous and root.dtype == view.dtype == np.float32
        start = (view.__array_interface__["data"][0] - root.__array_interface__["data"][0]) // 4
        dtype = dtype or mx.float32
        rounded = mx.array(root.ravel()).astype(dtype)
        memory = np.array(rounded.view(mx.uint16)) if dtype == mx.bfloat16 else np.array(rounded)
        return cls(memory, view.shape, tuple(stride // 4 for stride in view.strides), start, dtype)

    def mlx(self) -> mx.array:
        """The same array in MLX, in the same layout."""
        memory = mx.array(self.memory)
        memory = memory.view(mx.bfloat16) if self.dtype == mx.bfloat16 else memory
        # as_strided takes no negative strides: slices do.
        flipped = [stride < 0 for stride in self.strides]
        spans = zip(self.shape, self.strides, strict=True)
        start = self.start + sum((size - 1) * stride for size, stride in spans if stride < 0)
        x = mx.as_strided(memory, self.shape, tuple(map(abs, self.strides)), start)
        return x[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]

    def values(self) -> np.ndarray:
        """The values, float64."""
        return np.array(self.mlx().astype(mx.float32), dtype=np.float64)


@contextmanager
def captured_stdout() -> Iterator[list[str]]:
    """Captures what C++ prints to standard output: after the block, the only item of the list."""
    sys.stdout.flush()
    text: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield text
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            text.append(file.read().decode())


class BuildError(Exception):
    """The compiler rejects the source."""


def metal_source(xs: list[Strided], offset: np.ndarray, constants: ops.PhaseConstants, *flags: bool) -> tuple[str, Any]:
    """The source that MLX would compile for a call, and the arguments of its launch; flags: traditional, backward."""
    launched: dict[str, Any] = {}

    def build(*variant: Any) -> Any:
        built = original(*variant)

        def record(**call: Any) -> Any:
            launched.update(call)
            return built(**call, verbose=True)

        return record

    def trace(offset: mx.array, *arrays: mx.array) -> list[mx.array]:
        return kernel.launch("metal", list(arrays), offset, constants, *flags)

    arrays = [mx.broadcast_to(mx.zeros((), dtype=x.dtype), x.shape) for x in xs]
    original, kernel.build = kernel.build, build
    try:
        with captured_stdout() as printed, tempfile.TemporaryDirectory() as folder:
            mx.export_function(f"{folder}/kernel.mlxfn", trace, mx.array(offset), *arrays)
    finally:
        kernel.build = original
    return printed[0].split("```\n")[1], launched


def machine_flags(flags: list[str]) -> list[str]:
    """The flags for this machine's instructions: half precision, and fused products where the flags ask for them."""
    if os.uname().machine in ("arm64", "aarch64"):
        return flags  # has both
    return [*flags, "-mf16c", *(["-mfma"] if "-ffp-contract=fast" in flags else [])]


@cache
def build(source: str, flags: tuple[str, ...]) -> Path:
    """The program that runs a source, compiled once."""
    assert COMPILER is not None
    parameters = PARAMETER.findall(source)
    arguments = ", ".join(
        f"{'*' if reference == '&' else ''}reinterpret_cast<{const}{kind}*>(buffers[{i}])"
        for i, (const, kind, reference, _) in enumerate(parameters)
    )
    inputs = sum(bool(const) for const, *_ in parameters)
    program = "\n".join(
        [
            '#include "shim.h"',
            source,
            f"enum {{ INPUTS = {inputs}, OUTPUTS = {len(parameters) - inputs} }};",
            f"enum {{ THREADS = {kernel.THREADS} }};",
            f"void run(char** buffers, uint3 at) {{ {NAME.findall(source)[0]}({arguments}, at); }}",
            '#include "harness.h"',
        ]
    )
    BUILT.mkdir(exist_ok=True)
    key = "".join([program, (HERE / "shim.h").read_text(), (HERE / "harness.h").read_text(), COMPILER, *flags])
    path = BUILT / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not path.exists():
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / "main.cpp").write_text(program)
            command = [COMPILER, *flags, "-I", str(HERE), "main.cpp", "-o", "program"]
            done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
            if done.returncode != 0:
                raise BuildError(done.stderr)
            shutil.move(Path(temporary) / "program", f"{path}.{os.getpid()}")
        os.replace(f"{path}.{os.getpid()}", path)
    return path


def run(
    xs: list[Strided],
    offset: np.ndarray,
    constants: ops.PhaseConstants,
    traditional: bool,
    backward: bool,
    preamble: str = "metal.h",
    flags: list[str] = FLAGS,
) -> list[np.ndarray]:
    """What `kernel.launch` does, in the emulator; results in float64.

    With `preamble="cuda.h"` the same kernel body reads its position in the grid from CUDA's variables; `flags` are the
    compiler's.
    """
    source, launched = metal_source(xs, offset, constants, traditional, backward)
    if preamble != "metal.h":
        source = source.replace(kernel.source("metal.h"), kernel.source(preamble))
        # CUDA launches whole blocks.
        launched["grid"] = (-(-launched["grid"][0] // kernel.THREADS) * kernel.THREADS, *launched["grid"][1:])
    raw = Request(source, launched, xs, offset, constants).run(flags)
    outputs = []
    for x in xs:
        count = int(np.prod(x.shape)) * ELEMENTS[x.dtype]().itemsize
        memory, raw = np.frombuffer(raw[:count], ELEMENTS[x.dtype]), raw[count:]
        outputs.append(Strided(memory, x.shape, row_major(x.shape), 0, x.dtype).values())
    return outputs


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous array."""
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


@dataclass
class Request:
    """One run of the emulator: what harness.h reads."""

    source: str
    launched: dict[str, Any]
    xs: list[Strided]
    offset: np.ndarray
    constants: ops.PhaseConstants
    x_from: int = 0  # first thread of the grid along x and along y
    y_from: int = 0
    window: tuple[int, int] | None = None  # bytes of the first output to return: (first, number); None for all
    stretch: tuple[int, ...] | None = None  # other strides for q and k, whose memory grows to match

    def run(self, flags: list[str] = FLAGS) -> bytes:
        """The bytes of the outputs. Raises AssertionError, with the sanitizer's report, if it stops the program."""
        x_to, y_to, _ = self.launched["grid"]
        parts = [struct.pack("<4q", self.x_from, x_to, self.y_from, y_to)]
        parts += [self._input(name) for const, _, _, name in PARAMETER.findall(self.source) if const]
        outputs = zip(self.launched["output_shapes"], self.launched["output_dtypes"], strict=True)
        for i, (shape, dtype) in enumerate(outputs):
            size = int(np.prod(shape)) * dtype.size
            used = size if i < len(self.xs) else 0
            parts.append(struct.pack("<3q", size, *(self.window if self.window and i == 0 else (0, used))))
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
        done = subprocess.run(
            [build(self.source, tuple(machine_flags(flags)))],
            input=b"".join(parts),
            capture_output=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def _input(self, name: str) -> bytes:
        name, _, field = name.partition("_") if name.endswith(("_shape", "_strides")) else (name, "", "memory")
        if name == "constants":
            values = np.array(self.constants.packed)
            x = Strided(values, values.shape, (1,), 0, mx.float32)
        elif name == "offset":
            # MLX broadcasts one row for all: a stride of 0. Rows are neighbours in memory, which the kernel must see.
            values = np.asarray(self.offset, dtype=np.int32)
            values = np.asfortranarray(values if values.ndim == 2 else values[:, None])
            rows, count = values.shape
            memory, strides = values.ravel(order="F"), (0 if rows == 1 else 1, rows)
            x = Strided(memory, (self.xs[0].shape[0], count), strides, 0, mx.float32)
        else:
            x = self.xs[0] if name == "q" else self.xs[-1]
        stretched = self.stretch if name in ("q", "k") else None
        if field == "memory" and stretched:
            return self._stretched(x)
        if field == "memory":
            return buffer(x.memory.nbytes, x.start * x.memory.itemsize, {0: x.memory})
        values = np.array(x.shape, np.int32) if field == "shape" else np.array(stretched or x.strides, np.int64)
        return buffer(values.nbytes, 0, {0: values})

    def _stretched(self, x: Strided) -> bytes:
        assert self.stretch is not None
        places = {int(np.dot(index, self.stretch)): np.dot(index, x.strides) for index in np.ndindex(*x.shape)}
        size = x.memory.itemsize
        pieces = {size * place: x.memory[x.start + element] for place, element in places.items()}
        return buffer(max(pieces) + size, 0, pieces)


def buffer(size: int, start: int, pieces: dict[int, np.ndarray]) -> bytes:
    """An input as harness.h reads it; sizes and positions in bytes."""
    data = [struct.pack("<2q", at, piece.nbytes) + piece.tobytes() for at, piece in pieces.items()]
    return struct.pack("<3q", size, start, len(data)) + b"".join(data)
