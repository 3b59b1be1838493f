"""On Linux the package loads OpenBLAS, or warns in one line if there is none, and makes malloc keep freed memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mlx_resonance.blas import core_type

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for Linux only")

PRINT_WHETHER_LOADED = "import sys; print('libopenblas' in open('/proc/self/maps').read(), end='', file=sys.stderr)"


def stderr_of(code: str, **environment: str) -> str:
    import os

    variables = {key: value for key, value in os.environ.items() if key != "MLX_RESONANCE_BLAS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables | environment, capture_output=True, text=True, check=True
    )
    return done.stderr


def test_a_missing_library_is_one_line() -> None:
    lines = stderr_of("import mlx_resonance", MLX_RESONANCE_BLAS="libno-such-blas.so").splitlines()
    assert len(lines) == 1 and "libno-such-blas.so" in lines[0]


def test_the_environment_can_switch_it_off() -> None:
    assert stderr_of(f"import mlx_resonance; {PRINT_WHETHER_LOADED}", MLX_RESONANCE_BLAS="off") == "False"


def test_importing_mlx_first_gives_a_warning() -> None:
    assert "before mlx_resonance" in stderr_of("import mlx.core, mlx_resonance")


def test_a_system_openblas_is_used() -> None:
    import ctypes.util

    if ctypes.util.find_library("openblas") is None:
        pytest.skip("this system has no OpenBLAS")
    multiply = "mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))"
    assert stderr_of(f"import mlx_resonance, mlx.core as mx; {multiply}; {PRINT_WHETHER_LOADED}") == "True"


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("GenuineIntel", "fma avx2 avx512f avx512bw avx512dq avx512vl", "SkylakeX"),
        ("GenuineIntel", "fma avx2 avx512f", "Haswell"),
        ("GenuineIntel", "sse4_2 avx", None),
        ("AuthenticAMD", "fma avx2", None),
    ],
)
def test_the_kernels_for_an_intel_cpu_depend_on_its_flags(
    tmp_path: Path, vendor: str, flags: str, expected: str | None
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel\t\t: 207\nflags\t\t: fpu {flags} vme\n")
    assert core_type(str(cpuinfo)) == expected
    assert core_type(str(tmp_path / "none")) is None


def test_openblas_gets_these_kernels_and_the_environment_stays() -> None:
    """Ask the loaded library itself, with `openblas_get_corename`."""
    import ctypes.util

    expected = core_type()
    if ctypes.util.find_library("openblas") is None or expected is None:
        pytest.skip("needs OpenBLAS and an Intel CPU with AVX2")
    code = (
        "import mlx_resonance, ctypes, os, sys; name = ctypes.CDLL(None).openblas_get_corename;"
        "name.restype = ctypes.c_char_p; print(name().decode(), os.environ.get('OPENBLAS_CORETYPE'), file=sys.stderr)"
    )
    assert stderr_of(code).split() == [expected, "None"]
    assert stderr_of(code, OPENBLAS_CORETYPE="Nehalem").split() == ["Nehalem", "Nehalem"]


@pytest.mark.parametrize(("environment", "few"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)], ids=["kept", "set"])
def test_freed_arrays_are_used_again(environment: dict[str, str], few: bool) -> None:
    """Ten arrays of 40 MB, one after another, cause the page faults of one; with malloc set by the user, of all ten."""
    import platform

    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the malloc settings are for glibc")
    # PR_SET_THP_DISABLE: with huge pages one fault maps 2 MB, and even ten arrays cause few.
    code = (
        "import ctypes; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0);"
        "import mlx_resonance, mlx.core as mx, resource, sys; x = mx.zeros((10, 2**20)); mx.eval(x + 1);"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt; before = faults();"
        "[mx.eval(x + i) for i in range(10)]; print(faults() - before, end='', file=sys.stderr)"
    )
    assert (int(stderr_of(code, **environment)) < 20_000) == few  # one array has 10 240 pages
