"""The notebooks' claims, checked out of sight: run.py calls `run` in a notebook's kernel after its last cell.

Every function of `checks/NN_name.py` is a check of `NN-name.ipynb`. Its arguments are names of the notebook.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def run(name: str, namespace: Mapping[str, Any]) -> None:
    """Run all checks of a notebook.

    Args:
        name: of the module with the checks.
        namespace: the notebook's global names, after its last cell.

    Raises:
        AssertionError: some checks failed; it names each of them.
    """
    module = importlib.import_module(f"{__name__}.{name}")
    functions = inspect.getmembers(module, inspect.isfunction)
    checks = {key: value for key, value in functions if value.__module__ == module.__name__ and key[0] != "_"}
    failures = {key: why for key, check in checks.items() if (why := _failure(check, namespace))}
    print(f"{len(checks)} checks, {len(failures)} failed")
    if failures:
        raise AssertionError("\n".join(f"checks/{name}.py, {key}: {why}" for key, why in failures.items()))


def _failure(check: Callable[..., None], namespace: Mapping[str, Any]) -> str | None:
    wanted = inspect.signature(check).parameters
    if missing := [key for key in wanted if key not in namespace]:
        return f"the notebook has no {', '.join(missing)}"
    try:
        check(**{key: namespace[key] for key in wanted})
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next(frame for frame in reversed(frames) if Path(frame.filename).parent == Path(__file__).parent)
        return f"line {frame.lineno}: {frame.line} ({type(error).__name__}: {error})"
    return None
