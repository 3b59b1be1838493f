"""The folders that `make smollm2` leaves, and a model from one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_resonance import load

import pytest

BUILD = Path(__file__).parents[2] / "build"


def folder(name: str) -> Path:
    """One of the two, or a skipped test."""
    if not (BUILD / name / "config.json").is_file():
        pytest.skip(f"build/{name} is missing: make smollm2")
    return BUILD / name


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint as it was trained, on 8192 tokens."""
    return folder("smollm2")


@pytest.fixture(scope="session")
def smollm2_32k() -> Path:
    """The same with Resonance-YaRN × 4."""
    return folder("smollm2-32k")


@pytest.fixture(scope="session")
def loaded(smollm2_32k: Path) -> Any:
    """Model and tokenizer of the latter."""
    return load(smollm2_32k)
