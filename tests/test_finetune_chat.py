"""Chats as training data: the loss counts the assistant's turns and nothing else, whatever the chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.errors import UsageError
from mlx_resonance.finetuning import finetune
from mlx_resonance.finetuning.chat import Chat, chat_of, encode, pair_of
from mlx_resonance.finetuning.chunks import next_token_loss
from mlx_resonance.finetuning.data import Batches, Dated, packed, rows_of, token_ids
from mlx_resonance.tokenizer import load_tokenizer

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset

from .checkpoints import STDLIB_LLAMA

# Chat templates in the manner of known models. `generation` marks, for transformers, what the assistant writes.
BY_ROLE = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}[system]{{ '\n' }}Be brief.</s>{{ '\n' }}{% endif %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ '\n' }}{% endif %}"
)
INSTRUCTED = (  # no prompt of its own for the assistant, no end of the user's turn
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} {{ m.content }} </s>{% endgeneration %}"
    "{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %} {{ m.content }}{{ '\n' }}"
    "{% endgeneration %}{% else %} {{ m.content }}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Thoughts are cut out of all turns but the last, which always has some.
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]{{ '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last and '</think>' not in m.content %}<think>{{ '\n\n' }}</think>{{ '\n\n' }}{% endif %}"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1].lstrip() }}{% endif %}"
    "</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ '\n' }}{% endif %}"
)
# The prompt opens thoughts; turns are shown without any.
THINKING = BY_ROLE.replace("[assistant]{{ '\n' }}{% endif %}", "[assistant]{{ '\n' }}<think>{{ '\n' }}{% endif %}")

SYSTEM, USER, ASSISTANT = ({"role": role} for role in ("system", "user", "assistant"))
ONE = [USER | {"content": "def area(r):"}, ASSISTANT | {"content": "return 3.14 * r * r"}]
TWO = [*ONE, USER | {"content": "import os"}, ASSISTANT | {"content": "os.getcwd()\n"}]
THOUGHTS = [
    SYSTEM | {"content": "You write Python."}, USER | {"content": "a list"},
    ASSISTANT | {"content": "<think>\nwhich one\n</think>\n\nlist()"}, USER | {"content": "a set"},
    ASSISTANT | {"content": "<think>\nempty\n</think>\n\nset()"}, USER | {"content": "a str"},
    ASSISTANT | {"content": "str()"},
]  # fmt: skip
INDENTED = [USER | {"content": "pass"}, ASSISTANT | {"content": "    pass"}, *TWO]


@pytest.fixture
def tokenizer_with(tmp_path: Path) -> Callable[[str], Any]:
    """tokenizer_with(template): that of stdlib-llama."""

    def load(template: str) -> Any:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(STDLIB_LLAMA / name, tmp_path / name)
        (tmp_path / "chat_template.jinja").write_text(template)
        return load_tokenizer(tmp_path, json.loads((STDLIB_LLAMA / "config.json").read_text()))

    return load


@pytest.mark.parametrize("messages", [ONE, TWO, THOUGHTS, INDENTED], ids=["one", "two", "thoughts", "indented"])
@pytest.mark.parametrize(
    "template",
    [BY_ROLE, INSTRUCTED, WITHOUT_END, FORGETFUL, THINKING],
    ids=["by role", "instructed", "without end", "forgetful", "thinking"],
)
def test_the_assistants_tokens_are_those_that_transformers_marks(
    tokenizer_with: Any, template: str, messages: list[dict[str, Any]]
) -> None:
    tokenizer = tokenizer_with(template)
    marked = tokenizer._tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids = encode(tokenizer, Chat("here", messages))
    assert token_ids(ids).tolist() == marked["input_ids"]
    wanted = np.array(marked["assistant_masks"])
    if template is THINKING and messages is THOUGHTS:  # its prompt has begun these turns with <think>
        prompted = tokenizer.encode("<think>\n", add_special_tokens=False)
        for start in (np.flatnonzero(np.diff(wanted) == 1) + 1)[:2]:
            assert marked["input_ids"][start : start + len(prompted)] == prompted
            wanted[start : start + len(prompted)] = 0
    assert (ids >= 0).astype(int).tolist() == wanted.tolist()
    assert (ids == tokenizer.bos_token_id).sum() == 0  # a start token is not the assistant's
    if template is BY_ROLE:
        assert (ids == tokenizer.eos_token_id).sum() == sum(message["role"] == "assistant" for message in messages)
        assert (token_ids(ids) == tokenizer.bos_token_id).sum() == 1


def test_tools_and_the_arguments_of_calls(tokenizer_with: Any) -> None:
    tokenizer = tokenizer_with(BY_ROLE)
    call = {"type": "function", "function": {"name": "open", "arguments": '{"path": "a.txt"}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "open", "parameters": {}}}]
    row = {"messages": [ONE[0], answer, {"role": "tool", "content": "text"}, *TWO[2:]], "tools": tools}
    chat = chat_of("here", json.loads(json.dumps(row)))
    text = tokenizer.decode(token_ids(encode(tokenizer, chat)))
    assert json.dumps(tools) in text and '[assistant]\n{"path": "a.txt"}</s>' in text


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}" + BY_ROLE,
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}</s>{% endfor %}",
        FORGETFUL.replace("</s>{% endgeneration %}", "{% if loop.last %}</s>{% endif %}{% endgeneration %}"),
        "{% for m in messages | reverse %}{{ m.role }} {{ m.content }}</s>{% endfor %}",
    ],
    ids=["counts", "leaves out", "no end of earlier turns", "reversed"],
)
def test_a_template_whose_turns_cannot_be_told_is_refused(tokenizer_with: Any, template: str) -> None:
    tokenizer = tokenizer_with(template)
    with pytest.raises(UsageError, match=r"^here, message \d: the chat template does not show .*try mask_prompt=False"):
        encode(tokenizer, Chat("here", THOUGHTS))
    assert (encode(tokenizer, Chat("here", THOUGHTS), mask_prompt=False) >= 0).all()


def test_a_single_turn_is_masked_as_in_mlx_lm(tokenizer_with: Any) -> None:
    tokenizer = tokenizer_with(BY_ROLE)
    pair = {"prompt": ONE[0]["content"], "completion": ONE[1]["content"]}
    theirs = [
        ChatDataset([{"messages": ONE}], tokenizer, mask_prompt=True).process({"messages": ONE}),
        CompletionsDataset([pair], tokenizer, "prompt", "completion", True).process(pair),
    ]
    for (tokens, offset), chat in zip(theirs, (chat_of("", {"messages": ONE}), pair_of("", pair)), strict=True):
        ids = encode(tokenizer, chat)
        assert token_ids(ids).tolist() == tokens
        assert np.flatnonzero(ids >= 0)[0] == offset and tokens[np.flatnonzero(ids >= 0)[-1]] == tokenizer.eos_token_id


GOOD = json.dumps({"messages": ONE})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": []}', "has no 'messages' that are a list of at least one"),
        ('{"messages": "hello"}', "has no 'messages' that are a list of at least one"),
        ('{"messages": [{"content": "a"}]}', "message 1 has no 'role' that is a string"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no 'content' that is a string"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "message 1 has no 'content'"),
        ('{"messages": [{"role": "user", "content": "a"}, 5]}', "message 2 has no 'role'"),
        ('{"messages": [{"role": "assistant", "tool_calls": [5]}]}', "message 1 has no 'tool_calls'"),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}',
            "message 1 has no 'tool_calls'",
        ),
        (GOOD[:-1] + ', "tools": "open"}', "has no 'tools' that are a list of objects"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no turn of the assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 1 is the assistant's"),
        ('{"messages": [{"role": "judge", "content": "a"}, {"role": "assistant", "content": "a"}]}', "unknown role"),
        ('{"text": "a"}', "is a row of text, line 1 is one of chats"),
        ('{"prompt": "a", "completion": "b"}', "is a row of prompts, line 1 is one of chats"),
        ('{"prompt": "a"}', "has no 'messages'"),
        ("[]", "is not a JSON object"),
    ],
)
def test_a_broken_row_is_one_line(run: Any, chat_model: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{line}\n")
    arguments = ("--data", tmp_path / "rows.jsonl", "--mlx-path", tmp_path / "out", "--length", 64)
    code, _, stderr = run("finetune", "--model", chat_model, *arguments)
    assert code == 2 and stderr.count("\n") == 1 and "rows.jsonl, line 2" in stderr and message in stderr, stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ('{"prompt": "a"}', (), "line 1 has no completion and prompt, or messages, or text"),
        ('{"text": "a b c d e f g"}', ("--mask-prompt",), "not chats: there is no prompt to mask (--mask-prompt)"),
        (GOOD, ("--length", 8), "no chat has an answer within its first 8 tokens: give another --data or --length"),
        (GOOD, ("--model", STDLIB_LLAMA), "the tokenizer has no chat template: chats need one (--model)"),
    ],
)
def test_data_that_cannot_be_used(
    run: Any, chat_model: Path, tmp_path: Path, rows: str, options: tuple[object, ...], message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(rows)
    arguments = ("--data", tmp_path / "rows.jsonl", "--mlx-path", tmp_path / "out", "--length", 64)
    code, _, stderr = run("finetune", "--model", chat_model, *arguments, *options)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr


def test_rows_are_told_by_their_keys_as_in_mlx_lm(tmp_path: Path) -> None:
    pair, both = {"prompt": "a", "completion": "b"}, {"text": "c", "messages": ONE}
    for name, row in {"pair": pair | both, "both": both, "text": {"text": "c", "prompt": "a"}}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    [pair_row], [chat], [text] = (rows_of(tmp_path / f"{name}.jsonl") for name in ("pair", "both", "text"))
    assert isinstance(pair_row, Chat) and [message["content"] for message in pair_row.messages] == ["a", "b"]
    assert isinstance(chat, Chat) and list(chat.messages) == ONE
    assert text == "c"


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """stdlib-llama with a chat template."""
    folder = shutil.copytree(STDLIB_LLAMA, tmp_path / "model")
    strict = "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('unknown role') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(BY_ROLE + strict + "{% endfor %}")
    return folder


def chats(path: Path, sizes: list[int]) -> Path:
    """A file of chats with answers of these many words, each word with the number of its chat."""
    rows = [[ONE[0], ASSISTANT | {"content": " ".join([f"x{i}"] * size)}] for i, size in enumerate(sizes)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def test_chats_are_packed_whole(tokenizer_with: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(BY_ROLE)
    file = chats(tmp_path / "chats.jsonl", [5, 9, 2, 14, 3, 8, 1, 4])
    alone = [encode(tokenizer, chat).tolist() for chat in rows_of(file)]  # type: ignore[arg-type]
    length = max(map(len, alone)) + 20
    rows = packed([file], tokenizer, length, seed=0)
    assert rows.shape[1] == length and len(rows) < len(alone)
    starts = [np.append(np.flatnonzero(token_ids(row) == tokenizer.bos_token_id), length) for row in rows]
    pieces = [row[i:j].tolist() for row, at in zip(rows, starts, strict=True) for i, j in pairwise(at)]
    found = []
    for piece in pieces:  # each is a whole chat, or padding, whose token is also this tokenizer's first
        if piece == [~0]:
            continue
        [chat] = [chat for chat in alone if piece[: len(chat)] == chat]
        assert len(piece) == len(chat)
        found.append(chat)
    assert sorted(found) == sorted(alone) and not caplog.records
    assert np.array_equal(rows, packed([file], tokenizer, length, seed=0))
    assert not np.array_equal(rows, packed([file], tokenizer, length, seed=1))
    every = packed([file], tokenizer, length, seed=0, mask_prompt=False)
    assert np.array_equal(token_ids(every), token_ids(rows)) and (every >= 0).sum() == sum(map(len, alone))


def test_long_chats_and_padding_are_told(tokenizer_with: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(BY_ROLE)
    file = chats(tmp_path / "chats.jsonl", [90, 1])
    late = [USER | {"content": "x " * 90}, ASSISTANT | {"content": "y"}]
    file.write_text(file.read_text() + json.dumps({"messages": late}) + "\n")
    rows = packed([file], tokenizer, 64, seed=0)
    assert len(rows) == 2 and all((row[1:] >= 0).any() for row in rows)
    [warning] = [record.getMessage() for record in caplog.records]
    assert "2 of 3 chats exceed 64 tokens: only their beginnings are trained on; left out" in warning
    assert warning.endswith("since their answers come later: 1")
    caplog.clear()
    packed([file], tokenizer, 4096, seed=0)
    [warning] = [record.getMessage() for record in caplog.records]
    assert "the chats do not fill sequences of 4096 tokens, 9" in warning


def test_the_loss_is_the_mean_over_the_answers(chat_model: Path, tmp_path: Path) -> None:
    """Of a step, however it is split; computed anew from the logits, in float64."""
    checkpoint = Checkpoint.open(chat_model)
    model = checkpoint.load()
    model.set_dtype(mx.float32)
    tokenizer = checkpoint.tokenizer
    rows = packed([chats(tmp_path / "chats.jsonl", [1, 12, 30, 3])], tokenizer, 64, seed=0)
    batches = Batches(rows, len(rows), seed=0)
    tokens, weights = batches(0)
    logits = np.array(model(tokens).astype(mx.float32)).astype(np.float64)
    losses, prompt = [], tokenizer.encode("[assistant]\n", add_special_tokens=False)
    for row, scores in zip(np.array(tokens).tolist(), logits, strict=True):
        inside = False
        for i in range(1, len(row)):
            if inside:
                losses.append(np.log(np.exp(scores[i - 1] - scores[i - 1].max()).sum()) + scores[i - 1].max())
                losses[-1] -= scores[i - 1][row[i]]
            inside = (inside and row[i] != tokenizer.eos_token_id) or row[max(0, i + 1 - len(prompt)) : i + 1] == prompt
    assert next_token_loss(model, tokens, weights).item() == pytest.approx(np.mean(losses), rel=1e-5)
    parts = [next_token_loss(model, tokens[i : i + 1], weights[i : i + 1]).item() for i in range(len(rows))]
    assert len(parts) > 1 and np.mean(parts) == pytest.approx(np.mean(losses), rel=1e-5)
    assert next_token_loss(model, tokens[:1], mx.zeros_like(weights[:1])).item() == 0


def test_fine_tuning_on_chats(run: Any, chat_model: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    chats(data / "train.jsonl", [3, 5, 8, 2, 4, 6])
    shutil.copy(data / "train.jsonl", data / "valid.jsonl")
    short = ("--length", 64, "--steps", 4, "--accumulate", 2, "--learning-rate", 1e-3, "--json")
    code, stdout, stderr = run("finetune", "--model", chat_model, "--data", data, "--mlx-path", out, *short)
    assert code == 0, stderr
    found = json.loads(stdout)
    assert found["losses"][-1] < found["losses"][0] and found["valid_loss"] < found["losses"][0]
    assert found["settings"]["recipe"]["mask_prompt"] is None
    every = finetune(
        chat_model, data, tmp_path / "every", length=64, steps=1, accumulate=1, batch_size=2, mask_prompt=False
    )
    assert every["losses"][0] != pytest.approx(found["losses"][0], rel=1e-3)
    assert every["settings"]["data_digest"] != found["settings"]["data_digest"]


@pytest.mark.parametrize("split", [{"batch_size": 4, "accumulate": 1}, {"batch_size": 2, "accumulate": 2}])
def test_how_a_step_is_split_does_not_change_it(chat_model: Path, tmp_path: Path, split: dict[str, int]) -> None:
    data = chats(tmp_path / "chats.jsonl", [1, 12, 30, 3, 7, 25])
    values = {"length": 64, "steps": 2, "learning_rate": 1e-3, "warmup": 0}
    one = finetune(chat_model, data, tmp_path / "one", batch_size=1, accumulate=4, **values)
    other = finetune(chat_model, data, tmp_path / "other", **split, **values)
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-5)


def test_what_is_left_out_is_told(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("import os\n" * 60, "  ", "")))
    stream = len(tokenizer.encode("import os\n" * 60)) + 1
    assert packed([path], tokenizer, stream, 0).shape == (1, stream)
    assert [record.getMessage() for record in caplog.records] == [f"{path}: 2 of 3 documents are empty and left out"]
    caplog.clear()
    length = stream * 2 // 3
    assert packed([path], tokenizer, length, 0).shape == (1, length)
    told = f"{stream - length:,} of {stream:,} tokens do not fill another sequence of {length} and are left out"
    assert told in caplog.records[-1].getMessage()


def test_an_error_names_the_first_bad_line(tokenizer_with: Any, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [[{"role": "user", "content": str(i)}] for i in range(20)]  # without an answer
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    for seed in range(3):
        with pytest.raises(UsageError, match="line 1 has no turn of the assistant"):
            packed([path], tokenizer_with(BY_ROLE), 64, seed)


def test_a_run_resumes_on_another_day(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a chat template that writes the date: the sequences are those of the day on which the run began."""
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') }}"
    (chat_model / "chat_template.jinja").write_text(dated + (chat_model / "chat_template.jinja").read_text())
    data = chats(tmp_path / "chats.jsonl", [3, 5, 8, 2, 4, 6])
    values: dict[str, Any] = {"length": 64, "steps": 3, "accumulate": 1, "learning_rate": 1e-3, "checkpoint_every": 1}

    def stop(_: Any, step: int, *__: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(days=1)

    whole = finetune(chat_model, data, tmp_path / "whole", **values)
    with pytest.raises(KeyboardInterrupt):
        finetune(chat_model, data, tmp_path / "out", **values, on_step=stop)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert finetune(chat_model, data, tmp_path / "out", **values)["losses"] == whole["losses"]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1] and not (tmp_path / "out.partial").exists()
    assert finetune(chat_model, data, tmp_path / "another", **values)["losses"] != whole["losses"]
    with pytest.raises(KeyboardInterrupt):
        finetune(chat_model, data, tmp_path / "changed", **values, on_step=stop)
    chats(data, [3, 5, 8, 2, 4, 7])
    with pytest.raises(UsageError, match="results with other settings"):
        finetune(chat_model, data, tmp_path / "changed", **values)

    # Those of another model are its own: the same files, but another template.
    other = shutil.copytree(chat_model, tmp_path / "other")
    (other / "chat_template.jinja").write_text("!" + (chat_model / "chat_template.jinja").read_text())
    (folder := tmp_path / "kept").mkdir()
    own = [np.full((2, 3), number) for number in (1, 2)]
    first, second = (Dated(folder, Checkpoint.open(model), [data], (64, 0)) for model in (chat_model, other))
    first.keep(own[0], None)
    assert np.array_equal(first.as_begun(own[1], None)[0], own[0])
    assert np.array_equal(second.as_begun(own[1], None)[0], own[1])
