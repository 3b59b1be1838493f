"""BLAS on Linux: a system OpenBLAS instead of the slow BLAS in MLX's CPU build, and malloc settings for its arrays."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

VARIABLE = "MLX_RESONANCE_BLAS"
KEPT = 256 * 2**20  # bytes: the largest array that malloc reuses, and the most free memory that it keeps
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
COMPLETING = "_MLX_RESONANCE_COMPLETE"  # set by a shell that asks how a command may continue: nothing is computed
CORE_TYPE = "OPENBLAS_CORETYPE"
NAMES = ("libopenblas.so.0", "libopenblas.so")

logger = logging.getLogger("mlx_resonance")


def load_blas() -> str | None:
    """Load OpenBLAS with global symbols, so that MLX, loaded later, multiplies matrices with it (about 40× faster).

    Set the environment variable `MLX_RESONANCE_BLAS` to `off` to leave MLX as it is, or to a library's name or path to
    load that one. Outside Linux this does nothing.

    Returns:
        The name of the loaded library, or None; unless that was asked for, one log line says why.
    """
    wanted = os.environ.get(VARIABLE, "")
    if sys.platform != "linux" or wanted.lower() in ("off", "0", "no") or COMPLETING in os.environ:
        return None
    if "mlx.core" in sys.modules:
        logger.warning("MLX was imported before mlx_resonance: matrix products use MLX's own BLAS")
        return None
    name = next(filter(_loads, (wanted,) if wanted else NAMES), None)
    if name is not None:
        return name
    logger.warning(
        "no %s found: matrix products on the CPU are about 40 times slower"
        " (Debian, Ubuntu: libopenblas0-pthread; %s=off hides this)",
        wanted or "OpenBLAS",
        VARIABLE,
    )
    return None


def _loads(name: str) -> bool:
    """Load a library with global symbols, telling OpenBLAS which kernels to use unless the environment does."""
    core = core_type() if CORE_TYPE not in os.environ else None
    if core is not None:
        os.environ[CORE_TYPE] = core
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    finally:
        if core is not None:
            del os.environ[CORE_TYPE]
    return True


def core_type(cpuinfo: str = "/proc/cpuinfo") -> str | None:
    """The OpenBLAS kernels for an Intel CPU, chosen by its features; None leaves the choice to OpenBLAS.

    OpenBLAS goes by model numbers and mistakes a CPU newer than itself for a Prescott of 2004: on a Xeon of 2023,
    Debian 12's 0.3.21 multiplies matrices at 12 GFLOP/s, and at 80 with these kernels.
    """
    try:
        with open(cpuinfo) as file:
            words = set(file.read().split())
    except OSError:
        return None
    if "GenuineIntel" not in words or not {"avx2", "fma"} <= words:
        return None
    return "SkylakeX" if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= words else "Haswell"


def keep_freed_memory() -> None:
    """Make malloc reuse the memory of large arrays for later ones.

    MLX's CPU backend gets every array from malloc and frees it at once. By default glibc returns blocks above 32 MB to
    the kernel each time, and the next array pays for fresh pages: x + 1 on 42 MB takes 5 ms with this and 25 without.
    If the environment configures malloc (`MALLOC_…`, `GLIBC_TUNABLES`), or the libc is not glibc, nothing changes.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT)
