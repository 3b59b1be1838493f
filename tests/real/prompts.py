"""Prompts for SmolLM2 with answers that a person can check."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

CAPITAL = "What is the capital of France?"
KEY = "68417"


def document() -> str:
    """English: Python's reference, about 100 000 tokens."""
    return "\n".join(topics[name] for name in sorted(topics))


def with_key(tokenizer: Any, length: int) -> list[int]:
    """A document of `length` tokens with a pass key in its middle, which its last words ask for."""
    key, question = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in (f"\n\nThe pass key is {KEY}. Remember it. {KEY} is the pass key.\n\n", "\n\nThe pass key is")
    )
    filler = tokenizer.encode(document()[: 8 * length], add_special_tokens=False)[: length - len(key) - len(question)]
    middle = len(filler) // 2
    return [*filler[:middle], *key, *filler[middle:], *question]
