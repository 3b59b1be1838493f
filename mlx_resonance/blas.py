"""On Linux: put a system OpenBLAS in front of the slow reference BLAS that MLX's CPU build carries."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

VARIABLE = "MLX_RESONANCE_BLAS"
NAMES = ("libopenblas.so.0", "libopenblas.so")

logger = logging.getLogger("mlx_resonance")


def load() -> str | None:
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
