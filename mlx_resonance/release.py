"""The package as a thing to install: its version, its address, and what to type for it. setup.py runs this file."""

from __future__ import annotations

VERSION = "0.1.0"
# https://github.com/OWNER/NAME, once it is known: setup.py makes the project's URLs and the README's links of it.
REPOSITORY: str | None = None


def install_command(extra: str = "", repository: str | None = REPOSITORY) -> str:
    """What to type to install the package.

    Args:
        extra: of those in pyproject.toml, such as `server`.
        repository: the package's address; without one, the command works in a clone.
    """
    extras = f"[{extra}]" if extra else ""
    source = f".{extras}" if repository is None else f"mlx-resonance{extras} @ git+{repository}"
    return f"pip install '{source}'" if len(source) > 1 else "pip install ."


def install_hint(extra: str = "", repository: str | None = REPOSITORY) -> str:
    """The same in a sentence, with the place where it works."""
    return install_command(extra, repository) + ("" if repository else " in a clone of mlx-resonance")
