"""What is promised holds on every way to a text, with an answer that a person can check: see tests/test_promises.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..checkpoints import source
from ..test_promises import WAYS, Generate, Machines, Way

pytestmark = [pytest.mark.real, pytest.mark.long]
CAPITAL = "What is the capital of France? Answer in one sentence."
LONG = " ".join(source()[:6000].split()) + " " + CAPITAL  # about 1300 tokens


# Its three key-value heads are not divided between two processes: three are in test_generation.py.
@pytest.fixture(params=[way for way in WAYS if way is not Machines], ids=lambda way: way.__name__.lower())
def way(request: Any, smollm2_32k: Path, run: Any, tmp_path: Path) -> Way:
    return request.param(smollm2_32k, 4, run, tmp_path)


def test_the_same_greedy_text(way: Way, smollm2_32k: Path, run: Any, tmp_path: Path) -> None:
    said = way.ask(CAPITAL)
    assert "Paris" in said.text and said.text == Generate(smollm2_32k, 4, run, tmp_path).ask(CAPITAL).text


def test_kv_bits(way: Way) -> None:
    assert "Paris" in way.ask(CAPITAL, kv_bits=8).text


def test_the_context_is_checked(way: Way) -> None:
    said = way.ask("1 " * 40_000)  # of 80 kB: an argument may have 128
    assert not said.text and "32,768" in said.error


def test_the_memory_is_planned(way: Way) -> None:
    said = way.ask(CAPITAL, memory="3.5GB")  # of which 3.2 GB are left to everything else
    assert not said.text and "the limit is" in said.error and "weights 538.1 MB" in said.error


def test_the_chunk_rule_and_the_disk_cache(way: Way, smollm2_32k: Path, run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    first = Generate(smollm2_32k, 4, run, tmp_path).ask(LONG, prompt_cache=folder, prefill_step_size=512)
    said = way.ask(LONG, prompt_cache=folder, prefill_step_size=100)
    assert said.text == first.text and (said.cached is None or said.cached > 1200)
