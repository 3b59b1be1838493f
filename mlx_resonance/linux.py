"""On Linux: a system OpenBLAS in front of the slow BLAS in MLX's CPU build, and malloc settings for its arrays."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

VARIABLE = "MLX_RESONANCE_BLAS"
KEPT = 256 * 2**20  # bytes: of one array, and of free memory
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
NAMES = ("libopenblas.so.0", "libopenblas.so")

logger = logging.getLogger("mlx_resonance")


def load_blas() -> str | None:
    """Load OpenBLAS with global symbols, so that MLX, loaded after it, multiplies matrices with it (about 40× faster).

    The environment variable `MLX_RESONANCE_BLAS` set to `off` leaves MLX as it is; set to a library's name or path,
    that one is loaded. Nothing happens outside Linux.

    Returns:
        The name of the loaded library; None where nothing was loaded, which one log line says unless it was asked for.
    """
    wanted = os.environ.get(VARIABLE, "")
    if sys.platform != "linux" or wanted.lower() in ("off", "0", "no"):
        return None
    if "mlx.core" in sys.modules:
        logger.warning("MLX was imported before mlx_resonance: matrix products keep the BLAS that MLX has")
        return None
    for name in (wanted,) if wanted else NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    logger.warning(
        "no %s found: matrix products on the CPU are about 40 times slower"
        " (Debian, Ubuntu: libopenblas0-pthread; %s=off hides this)",
        wanted or "OpenBLAS",
        VARIABLE,
    )
    return None


def keep_freed_memory() -> None:
    """Have malloc keep the memory of large arrays for the next ones.

    MLX's CPU backend gets every array from malloc and frees it at once. By default glibc returns blocks above 32 MB to
    the kernel each time, and the next array pays for fresh pages: x + 1 on 42 MB takes 5 ms with this and 25 without.
    Where the environment sets malloc (`MALLOC_…`, `GLIBC_TUNABLES`), or the libc is another, nothing is changed.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT)
