"""SmolLM2's chat template: the text that transformers makes of a conversation, and its token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_resonance import generate
from mlx_resonance.generation import prompt_tokens

import pytest
import transformers

from .prompts import CAPITAL

pytestmark = pytest.mark.real

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATS = {
    "a question": [{"role": "user", "content": CAPITAL}],
    "a system prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x   2000 €, 東京"}],
    "turns": [{"role": role, "content": f"{role}: 42"} for role in ("user", "assistant", "user")],
}


def by_hand(chat: list[dict[str, str]]) -> str:
    """ChatML, with a system prompt of its own where the chat has none."""
    if chat[0]["role"] != "system":
        chat = [{"role": "system", "content": SYSTEM}, *chat]
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in chat]
    return "".join(turns) + "<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", CHATS)
def test_the_text_and_the_ids_of_transformers(smollm2_32k: Path, loaded: Any, kind: str) -> None:
    tokenizer, chat = loaded[1], CHATS[kind]
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_32k)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == by_hand(chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert ids == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert theirs.decode(ids) == text


def test_a_prompt_becomes_a_chat_and_the_answer_ends(loaded: Any) -> None:
    """`generate` asks with the template, and <|im_end|> ends the answer without being part of it."""
    model, tokenizer = loaded
    tokens = prompt_tokens(tokenizer, CAPITAL, True)
    assert tokenizer.decode(tokens) == by_hand(CHATS["a question"])
    answer = generate(model, tokenizer, tokens, max_tokens=100)
    assert "Paris" in answer and "<|im_end|>" not in answer and len(tokenizer.encode(answer)) < 50
