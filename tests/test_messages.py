"""From texts, documents and conversations to token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_resonance import load
from mlx_resonance.errors import UsageError
from mlx_resonance.generation.messages import chat_tokens, document_tokens, prompt_tokens, question_tokens

import pytest

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chatty(stdlib_llama: Path, copy_of: Any) -> Any:
    """A tokenizer with a chat template."""
    folder = copy_of(stdlib_llama)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load(folder)[1]


@pytest.fixture
def plain(stdlib_llama: Path) -> Any:
    """One without."""
    return load(stdlib_llama)[1]


def test_documents_come_before_the_question(chatty: Any, plain: Any) -> None:
    texts = ["def a():\n    pass\n", "import os\n\n"]
    asked = "def a():\n    pass\n\nimport os\n\nwhy?"
    tokens = question_tokens(chatty, texts, "why?", "Be brief.")
    assert chatty.decode(tokens) == f"<s>[system]Be brief.\n[user]{asked}\n[assistant]"
    assert plain.decode(question_tokens(plain, texts, "why?")) == f"<s>{asked}"
    assert plain.decode(question_tokens(chatty, texts, "why?", chat=False)) == f"<s>{asked}"


def test_a_lone_document_is_the_prompt_byte_for_byte(plain: Any) -> None:
    text = "\n  import os\n\n"
    assert question_tokens(plain, [text], None) == prompt_tokens(plain, text)


def test_every_question_begins_with_the_tokens_of_the_documents(chatty: Any, plain: Any) -> None:
    texts = ["def main():\n    return 12\n" * 5]
    for tokenizer in (chatty, plain):
        for system in (None, "Be brief.") if tokenizer is chatty else (None,):
            shared = document_tokens(tokenizer, texts, system)
            for question in ("why?", "1 + 1", "\n\nreturn", "déjà vu"):
                asked = question_tokens(tokenizer, texts, question, system)
                assert asked[: len(shared) - 2] == shared[:-2]  # blank lines may merge with what follows
            assert len(tokenizer.decode(shared)) >= len(texts[0])


def test_a_conversation_without_a_template_is_its_texts(plain: Any) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert plain.decode(chat_tokens(plain, messages)) == "<s>a\n\nb\n\nc"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda t: chat_tokens(t, []), "no messages"),
        (lambda t: chat_tokens(t, [{"role": "system", "content": "a"}]), "no place for a system prompt"),
        (lambda t: question_tokens(t, ["a"], "b", "c"), "no place for a system prompt"),
        (lambda t: question_tokens(t, [], " \n"), "prompt is empty"),
        (lambda t: question_tokens(t, ["a\ud800"], "b"), "not UTF-8"),
        (lambda t: chat_tokens(t, [{"role": "user", "content": "\udfff"}]), "not UTF-8"),
    ],
)
def test_what_is_no_prompt_is_refused(plain: Any, make: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make(plain)
