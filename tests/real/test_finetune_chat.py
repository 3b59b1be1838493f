"""Chats through SmolLM2's own template: what the loss counts, read as text."""

from __future__ import annotations

from pathlib import Path

from mlx_resonance import Checkpoint
from mlx_resonance.finetuning.chat import Chat, encode
from mlx_resonance.finetuning.data import token_ids

import numpy as np
import pytest

pytestmark = pytest.mark.real


def test_every_answer_and_its_end_are_trained(smollm2: Path) -> None:
    tokenizer = Checkpoint.open(smollm2).tokenizer
    chat = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "  2 + 2?"}, {"role": "assistant", "content": "\n4"},
    ]  # fmt: skip
    ids = encode(tokenizer, Chat("here", chat))
    trained = ids >= 0
    turns = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1)
    texts = [tokenizer.decode(token_ids(ids)[turn]) for turn in turns if trained[turn[0]]]
    # The line break before the second answer and that of its prompt are one token, which the answer decides.
    assert texts == ["Hello there.<|im_end|>", "\n\n4<|im_end|>"]
