"""Prompt lookup and a draft model on SmolLM2: the same greedy text in fewer passes of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_resonance import load, stream_generate
from mlx_resonance.generation.speculation import Proposals

import pytest

pytestmark = pytest.mark.real

NEW = 40
TEXT = """A keeper of bees looks into a hive in spring, when the first willows bloom. He counts the frames with brood,
lifts the honey that is left, and writes both into a notebook. A hive with fewer than three frames is joined with its
neighbour in the evening, when all bees are at home; a sheet of newspaper between them keeps the peace for a day."""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that each pass with proposals emitted."""
    emitted: list[int] = []
    passed = Proposals.passed

    def counted(self: Any, proposed: int, tokens: list[int], seconds: float | None) -> None:
        emitted.append(len(tokens))
        passed(self, proposed, tokens, seconds)

    monkeypatch.setattr(Proposals, "passed", counted)
    return emitted


@pytest.mark.parametrize("kv_bits", [None, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("draft", [False, True])
def test_a_quote(smollm2: Path, passes: list[int], draft: bool, kv_bits: int | None) -> None:
    """The draft model is the model itself: all of its guesses are right. A number of its own, not of times."""
    model, tokenizer = load(smollm2)
    prompt = tokenizer.encode(f"{TEXT}\n\nThe text above once more, word for word:\n\n{TEXT[:60]}")
    options: dict[str, Any] = {"max_tokens": NEW, "kv_bits": kv_bits}
    plain = [each.token for each in stream_generate(model, tokenizer, prompt, prompt_lookup="off", **options)]
    assert not passes
    proposing = {"draft_model": model, "num_draft_tokens": 4} if draft else {"prompt_lookup": 8}
    found = [each.token for each in stream_generate(model, tokenizer, prompt, **proposing, **options)]
    assert found == plain
    assert len(passes) < NEW / 2
