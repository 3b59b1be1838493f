"""The passkey test: prompts of exact length, the key at its depth, trials from which a killed run resumes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.errors import UsageError
from mlx_resonance.evaluation import passkey
from mlx_resonance.evaluation.passkey import (
    ANSWER_TOKENS,
    PasskeyGrid,
    accuracy,
    first_integer,
    passkey_prompt,
    run_passkey,
)

import numpy as np
import pytest

GRID = PasskeyGrid((200, 300), (0, 50, 100), repetitions=2)


@pytest.mark.parametrize("length", [160, 200, 511, 4096])
@pytest.mark.parametrize("depth", [0, 33, 100])
def test_prompt_has_its_length_and_the_key_its_depth(tokenizer: Any, length: int, depth: int) -> None:
    prompt = passkey_prompt(tokenizer, length, depth, 31415)
    assert len(prompt) + ANSWER_TOKENS == length
    assert prompt[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in prompt[1:]
    text = tokenizer.decode(prompt)
    assert text.count("31415") == 2 and text.endswith("What is the pass key? The pass key is")
    before, after = re.split(r"\nThe pass key is 31415\. Remember it\. 31415 is the pass key\.\n", text)
    filler = len(before) - before.index("there.") - 7, after.index("\nWhat is")
    assert filler[0] / sum(filler) == pytest.approx(depth / 100, abs=0.05)


def test_too_short_a_length_says_how_many_tokens_are_needed(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="at least") as error:
        passkey_prompt(tokenizer, 60, 0, 50000)
    needed = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert len(passkey_prompt(tokenizer, needed, 0, 50000)) + ANSWER_TOKENS == needed
    with pytest.raises(UsageError, match="no room for filler"):
        passkey_prompt(tokenizer, needed - 1, 0, 50000)


def test_keys_depend_on_their_cell_alone() -> None:
    keys = {cell: GRID.key(*cell) for cell in GRID.cells()}
    assert len(set(keys.values())) > 10 and all(1 <= key <= 50000 for key in keys.values())
    larger = PasskeyGrid((300, 100, 200), (0, 25, 50, 100), repetitions=3)
    assert {cell: larger.key(*cell) for cell in keys} == keys
    assert PasskeyGrid((200,), (0,), 1, seed=1).key(200, 0, 0) != keys[200, 0, 0]


@pytest.mark.parametrize(
    ("answer", "number"),
    [(" 123.", 123), ("is 00045, not 9", 45), ("1 2 3", 1), ("12,345", 12), ("none", None), ("", None), ("-7", 7)],
)
def test_first_integer(answer: str, number: int | None) -> None:
    assert first_integer(answer) == number


def know(depths: set[int]) -> Any:
    """A stand-in for `greedy` that finds the keys at these depths, and answers 7 at the others."""

    def greedy(_: Any, tokenizer: Any, prompt: list[int], *given: Any, **options: Any) -> tuple[str, int, str]:
        for length, depth, repetition in GRID.cells():
            key = GRID.key(length, depth, repetition)
            if depth in depths and prompt == passkey_prompt(tokenizer, length, depth, key):
                return f" {key}. And {key + 1}", 9, "length"
        return " 7, or so", 4, "stop"

    return greedy


def test_a_grid_is_tried_once_and_resumes(stdlib_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(stdlib_llama)
    monkeypatch.setattr(passkey, "greedy", know({0, 100}))
    whole = run_passkey(checkpoint, GRID, tmp_path / "whole.jsonl")
    assert accuracy(GRID, whole).tolist() == [[1, 1], [0, 0], [1, 1]]
    assert [(trial["length"], trial["depth"], trial["repetition"]) for trial in whole] == GRID.cells()

    def kill(done: int, *_: Any) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_passkey(checkpoint, GRID, tmp_path / "part.jsonl", on_trial=kill)
    tried = []
    monkeypatch.setattr(passkey, "greedy", lambda *a, **k: tried.append(1) or know({0, 100})(*a, **k))
    assert run_passkey(checkpoint, GRID, tmp_path / "part.jsonl") == whole
    assert len(tried) == len(whole) - 5
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    part = PasskeyGrid((300,), (50,), 1)
    assert run_passkey(checkpoint, part, tmp_path / "whole.jsonl") == [
        trial for trial in whole if (trial["length"], trial["depth"], trial["repetition"]) == (300, 50, 0)
    ]
    with pytest.raises(UsageError, match="kv_bits is null there and 8 here"):
        run_passkey(checkpoint, GRID, tmp_path / "whole.jsonl", kv_bits=8)
    assert len(tried) == len(whole) - 5


def test_a_wrong_line(stdlib_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passkey, "greedy", know(set()))
    checkpoint, grid, output = Checkpoint.open(stdlib_llama), PasskeyGrid([200], [0], 1), tmp_path / "out.jsonl"
    (trial,) = run_passkey(checkpoint, grid, output)
    header = output.read_text().splitlines()[0]
    for change, message in (
        ({"found": "yes"}, r"out\.jsonl, line 2 has no 'found' that is true or false"),
        ({"key": 123}, rf"for length 200, depth 0, repetition 0: key is 123 there and {grid.key(200, 0, 0)} here"),
    ):
        output.write_text(header + "\n" + json.dumps(trial | change) + "\n")
        with pytest.raises(UsageError, match=message):
            run_passkey(checkpoint, grid, output)


def test_accuracy_has_depths_down_and_lengths_across() -> None:
    grid = PasskeyGrid((300, 200), (50, 0), repetitions=2)
    trials = [{"length": 200, "depth": 0, "found": True}, {"length": 300, "depth": 50, "found": True}] * 2
    np.testing.assert_array_equal(accuracy(grid, trials), [[0, 1], [1, 0]])


def test_command(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    output, figure = tmp_path / "trials.jsonl", tmp_path / "grid.png"
    grid = ("--lengths", "200,160", "--repetitions", "1", "--depths", "0,100")
    arguments = ("eval", "passkey", "--model", checkpoint, *grid)
    code, out, _ = run(*arguments, "--output", output, "--plot", figure, "--json")
    result = json.loads(out)
    assert code == 0 and result["lengths"] == [160, 200] and np.shape(result["accuracy"]) == (2, 2)
    assert result["context"] == 200 and result["version"]["mlx-resonance"] and result["model"] == str(checkpoint)
    assert result["trials"] == 4 == len(output.read_text().splitlines()) - 1 and figure.stat().st_size > 5000
    before = output.read_bytes()
    code, out, _ = run(*arguments, "--output", output)
    assert code == 0 and "160" in out and "100 %" in out and output.read_bytes() == before
    code, _, err = run(*arguments, "--output", output, "--factor", "2")
    assert code == 2 and "results with other settings: max_position_embeddings is 512 there and 1024 here" in err
    assert "give another --output" in err and output.read_bytes() == before
    assert run(*arguments, "--output", tmp_path / "longer.jsonl", "--factor", "2", "--seed", "3")[0] == 0


BAD = {
    "--lengths 600": "600 tokens exceed the checkpoint's context of 512 tokens: give --factor 2",
    "--lengths 60": "60 tokens have no room for filler",
    "--lengths a,b": "'--lengths': expected integers separated by commas",
    "--lengths 0": "lengths must be in [1, 2**31] tokens, got [0] (--lengths)",
    "--lengths 200 --depths 101": "depths must be in [0, 100], got [101] (--depths)",
    "--lengths 200 --repetitions 0": "Invalid value for '--repetitions'",
    "--lengths 200 --repetitions 2147483648": "Invalid value for '--repetitions'",
    "--lengths 200 --seed -1": "Invalid value for '--seed'",
    "--lengths 200 --kv-bits 3": "'--kv-bits': '3' is not one of 8, 4",
    "--lengths 200 --plot grid.tiff2": "suffix must be one of",
    "--lengths 200 --memory 1MB": "the limit is",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input(run: Any, checkpoint: Path, tmp_path: Path, arguments: str) -> None:
    output = tmp_path / "trials.jsonl"
    code, out, err = run("eval", "passkey", "--model", checkpoint, "--output", output, *arguments.split())
    assert (code, out) == (2, "") and BAD[arguments] in err and len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == []
