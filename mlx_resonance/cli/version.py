"""`mlx-resonance --version`: the versions and the device that a report of a fault should name."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata
from typing import Any

from ..release import VERSION


def version_line() -> str:
    """One line, whatever is broken: ours, MLX's, mlx-lm's and Python's versions, the system, the device."""
    mlx, mlx_says = _package("mlx", "MLX", "mlx.core")
    _, mlx_lm_says = _package("mlx-lm", "mlx-lm", "mlx_lm")
    system = f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.system()
    parts = [mlx_says, mlx_lm_says, f"Python {platform.python_version()}", system]
    if mlx is not None:
        parts.append(_device(mlx))
    return f"mlx-resonance {VERSION} ({', '.join(parts)})"


def _package(name: str, label: str, module: str) -> tuple[Any, str]:
    """A package's module, or None if it cannot be imported, and the version or what is wrong."""
    try:
        version = f"{label} {metadata.version(name)}"
    except Exception:  # not installed, or its metadata is damaged
        version = label
    try:
        return importlib.import_module(module), version
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            return None, f"{label} is not installed"
        problem: BaseException = error
    except (Exception, SystemExit) as error:
        problem = error
    return None, f"{version} cannot be imported: {' '.join(str(problem).split()) or type(problem).__name__}"


def _device(mx: Any) -> str:
    """The name of the GPU in use, such as `Apple M3 Max`, or CPU."""
    try:
        if mx.default_device().type == mx.cpu:
            return "CPU"
        return str(mx.device_info().get("device_name", "GPU"))
    except Exception as error:
        return f"no device: {' '.join(str(error).split())}"
