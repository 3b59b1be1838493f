"""Conversations: what the model gets, KV reuse that changes no text, files, the overflow rules, interrupts."""

from __future__ import annotations

import shutil
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_resonance import load
from mlx_resonance.errors import DeviceError, UsageError
from mlx_resonance.generation import Engine, PromptCache
from mlx_resonance.generation.conversation import ContextFullError, Conversation
from mlx_resonance.generation.messages import chat_tokens

import pytest

from .checkpoints import source

FILE = source()[:600]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder, factor=4)


def talk(loaded: Any, context: int | None = None, kv_bits: int | None = None, **options: Any) -> Conversation:
    options = {"max_tokens": 12} | options
    return Conversation(Engine(*loaded, context=context, kv_bits=kv_bits), **options)


def ask(conversation: Conversation, text: str) -> list[Any]:
    """The responses to a question."""
    return list(conversation.answer(conversation.prepare(text)))


def prompts_of(conversation: Conversation) -> list[list[int]]:
    """A list that gets every prompt from now on."""
    prompts, stream = [], conversation.engine.stream

    def recorded(tokens: list[int], *arguments: Any, **options: Any) -> Any:
        prompts.append(list(tokens))
        return stream(tokens, *arguments, **options)

    conversation.engine.stream = recorded  # type: ignore[method-assign]
    return prompts


def template(loaded: Any, *messages: tuple[str, str]) -> list[int]:
    """The tokens of messages, from the template above written out."""
    lines = "".join(f"[{role}] {content}\n" for role, content in messages)
    text = f"{loaded[1].bos_token}{lines}[assistant] "
    return loaded[1].encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_second_turn_reads_only_what_is_new_and_writes_what_a_fresh_engine_writes(
    loaded: Any, kv_bits: int | None
) -> None:
    conversation = talk(loaded, kv_bits=kv_bits)
    prompts = prompts_of(conversation)
    first = ask(conversation, "import argparse")
    second = ask(conversation, "def main():")
    answer = "".join(response.text for response in first)
    assert prompts[1] == template(loaded, ("user", "import argparse"), ("assistant", answer), ("user", "def main():"))
    assert second[-1].cached_tokens >= len(prompts[0]) and first[-1].cached_tokens == 0
    fresh = Engine(*loaded, kv_bits=kv_bits).stream(prompts[1], 12)
    assert [response.token for response in second] == [response.token for response in fresh]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_files_stand_before_the_next_question(loaded: Any) -> None:
    conversation = talk(loaded, system_prompt="Be brief.")
    prompts = prompts_of(conversation)
    conversation.put(FILE + "\n\n")
    conversation.put("a = 1")
    read = len(conversation.engine.tokens)
    (last,) = ask(conversation, "What is a?")[-1:]
    content = f"{FILE}\n\na = 1\n\nWhat is a?"
    assert prompts == [template(loaded, ("system", "Be brief."), ("user", content))]
    assert last.cached_tokens == read > 150
    assert conversation.files == [] and len(conversation.turns[0].files) == 2


def test_the_tokens_in_use_are_those_that_every_next_prompt_begins_with(loaded: Any) -> None:
    conversation = talk(loaded)
    ask(conversation, "import os")
    conversation.put("b = 2")
    used = conversation.beginning
    for question in ("x", "Why 7?"):
        assert conversation.prepare(question).tokens[: len(used)] == used
    assert len(used) > len(template(loaded, ("user", "import os")))
    assert used != template(loaded)[: len(used)]


def test_when_the_context_is_full_a_question_is_refused_and_nothing_changes(loaded: Any) -> None:
    conversation = talk(loaded, context=100)
    ask(conversation, "import os " * 20)
    before = conversation.messages
    with pytest.raises(ContextFullError, match="exceed the context of 100") as error:
        conversation.prepare("import re " * 30)
    assert error.value.remedies == ({"overflow": "drop-oldest"},)
    assert conversation.messages == before
    ask(conversation, "x")
    conversation.clear()
    assert conversation.messages == []
    ask(conversation, "import re " * 30)


def test_a_factor_is_a_remedy_where_it_would_help(folder: Path) -> None:
    loaded = load(folder)
    limit = loaded[0].args.rope.context_length
    with pytest.raises(ContextFullError, match=f"exceed the context of {limit:,}") as error:
        talk(loaded).put(source()[: 8 * limit])
    factor, extend = error.value.remedies
    assert factor["factor"] > 1 and extend == {"extend": "dynamic"}


def test_the_oldest_turns_are_dropped_until_half_of_their_room_is_free(loaded: Any) -> None:
    conversation = talk(loaded, context=240, overflow="drop-oldest", system_prompt="Be brief.", max_tokens=4)
    prompts = prompts_of(conversation)
    conversation.put("a = 1")
    questions = [f"{number} " + "import re " * 8 for number in range(12)]
    messages: list[tuple[str, str]] = []
    dropped_at = []
    for question in questions:
        prepared = conversation.prepare(question)
        content = question if messages else f"a = 1\n\n{question}"
        if prepared.dropped:
            dropped_at.append(len(messages) // 2)
            messages = messages[2 * prepared.dropped :]
            messages[0] = ("user", f"a = 1\n\n{messages[0][1]}")
        messages.append(("user", content))
        answer = "".join(response.text for response in conversation.answer(prepared))
        assert prompts[-1] == template(loaded, ("system", "Be brief."), *messages)
        assert len(prompts[-1]) + 4 <= 240
        messages.append(("assistant", answer))
    assert len(dropped_at) >= 2 and dropped_at[0] >= 4
    alone = len(template(loaded, ("system", "Be brief."), ("user", f"a = 1\n\n{questions[0]}")))
    first = next(prompt for before, prompt in pairwise(prompts) if len(prompt) < len(before))
    assert len(first) <= (alone + 240) // 2


def test_a_file_drops_turns_too_and_their_files_move_to_it(loaded: Any) -> None:
    conversation = talk(loaded, context=300, overflow="drop-oldest")
    conversation.put("a = 1")
    ask(conversation, "import re " * 30)
    assert conversation.put(FILE) == 1
    assert conversation.turns == [] and conversation.files == ["a = 1", FILE]
    with pytest.raises(ContextFullError) as error:
        conversation.put(2 * FILE)
    assert error.value.remedies == () and conversation.files == ["a = 1", FILE]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, DeviceError("the GPU gave up"), SystemExit])
def test_a_file_that_cannot_be_read_leaves_the_conversation_as_it_was(loaded: Any, failure: Any) -> None:
    conversation = talk(loaded, context=300, overflow="drop-oldest", max_tokens=2)
    conversation.put("a = 1")
    for question in ("import os", "import re " * 30):
        ask(conversation, question)
    conversation.put("b = 2")
    before = conversation.messages, list(conversation.files)

    def fail(done: int, total: int) -> None:
        assert conversation.turns == []  # dropped for the file
        raise failure

    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        conversation.put(FILE, progress=fail)
    assert (conversation.messages, conversation.files) == before
    fresh = Engine(*loaded).stream(conversation.prepare("x").tokens, 2)
    assert [response.token for response in ask(conversation, "x")] == [response.token for response in fresh]


def test_a_conversation_is_not_tokenized_again_until_it_changes(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = talk(loaded, system_prompt="Be brief.", max_tokens=2)
    questions: list[str] = []

    def counted(tokenizer: Any, messages: Any) -> list[int]:
        questions.append(messages[-1]["content"])
        return chat_tokens(tokenizer, messages)

    monkeypatch.setattr("mlx_resonance.generation.conversation.chat_tokens", counted)

    def times(change: Any) -> int:
        """How often a change tokenizes, with what shows how much of the context is used."""
        questions.clear()
        change()
        assert [len(conversation.beginning) for _ in range(2)]
        return len(questions)

    assert times(lambda: conversation.put(FILE)) == 2  # two questions, to see what any two have in common
    assert times(lambda: ask(conversation, "x")) == 1 + 2
    assert times(lambda: conversation.set_system_prompt("Be long.")) == 2
    assert times(lambda: None) == 0
    assert times(conversation.clear) == 2
    assert (
        conversation.beginning == template(loaded, ("system", "Be long."), ("user", "x"))[: len(conversation.beginning)]
    )


def test_an_answer_ends_with_the_context(loaded: Any) -> None:
    conversation = talk(loaded, context=64, max_tokens=None)
    question = conversation.prepare("import os")
    responses = list(conversation.answer(question))
    assert question.fills and responses[-1].finish_reason == "length"
    assert responses[-1].prompt_tokens + responses[-1].generation_tokens == 64


def test_a_stopped_answer_stays_and_its_keys_are_used(loaded: Any) -> None:
    conversation = talk(loaded, max_tokens=None)
    with closing(conversation.answer(conversation.prepare("import os"))) as answer:
        pieces = [next(answer).text for _ in range(5)]
    assert conversation.turns[0].answer == "".join(pieces) != ""
    again = ask(talk(loaded), "x")  # another engine is of no use to this one
    assert again[-1].cached_tokens == 0
    conversation.max_tokens = 2
    assert ask(conversation, "def f(): pass")[-1].cached_tokens >= len(template(loaded, ("user", "import os")))


def test_an_interrupt_in_a_prompt_drops_the_question_and_keeps_what_was_read(loaded: Any, tmp_path: Path) -> None:
    disk = PromptCache(tmp_path, "key")
    engine = Engine(*loaded, prefill_step_size=64, disk_cache=disk)
    conversation = Conversation(engine, max_tokens=2)
    conversation.files = ["a = 1"]

    def interrupt(done: int, _: int) -> None:
        if done >= 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _ in conversation.answer(conversation.prepare(FILE), interrupt):
            pass
    assert conversation.turns == [] and conversation.files == ["a = 1"]
    assert len(engine.tokens) == 128
    assert ask(conversation, FILE)[-1].cached_tokens == 128


def test_a_system_prompt_changes_what_follows(loaded: Any) -> None:
    conversation = talk(loaded)
    ask(conversation, "import os")
    conversation.set_system_prompt("Be brief.")
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    conversation.clear()
    assert conversation.prepare("x").tokens == template(loaded, ("system", "Be brief."), ("user", "x"))


def test_without_a_template_texts_are_joined(checkpoint: Path) -> None:
    plain = load(checkpoint)
    conversation = talk(plain)
    (answer,) = ["".join(response.text for response in ask(conversation, "import os"))]
    tokens = conversation.prepare("import re").tokens
    assert tokens == plain[1].encode(f"import os\n\n{answer}\n\nimport re")
    with pytest.raises(UsageError, match="no place for a system prompt"):
        talk(plain, system_prompt="Be brief.")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"overflow": "forget"}, "overflow must be one of stop, drop-oldest, got forget"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"system_prompt": FILE, "context": 100}, "exceed the context of 100"),
    ],
)
def test_wrong_options(loaded: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        talk(loaded, **options)


def test_an_empty_question(loaded: Any) -> None:
    with pytest.raises(UsageError, match="the question is empty"):
        talk(loaded).prepare(" \n")
