"""What `benchmarks/lookup.py` and `lookup_proof.py` ask and count, on the tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_resonance import load
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.prefill import prefill
from mlx_resonance.run_log import RunLog

import mlx.core as mx
import pytest

from .test_decode import REPEATING

CODE = '''
def long_enough(text, width):
    """Wrap."""
    lines = []
    for word in text.split():
        if len(word) > width:
            lines.append(word)
        else:
            lines = lines + [word]
        print(lines)
    return lines


def short(x):
    return x
'''


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other by their names."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint)


@pytest.mark.parametrize("cut", [0, 15])
def test_functions_to_edit(cut: int) -> None:
    from lookup_prompts import after, named

    [(function, name)] = named(CODE + "def broken(:\n"[:cut])  # a text may end in the middle
    assert name == "lines" and function.startswith("def long_enough(text, width):\n") and "Wrap" in function
    assert after(function.replace("width", "lines"), name) == "def long_enough(text, new_lines):\n   "


def test_the_beginning_of_a_text() -> None:
    from lookup_prompts import beginning

    assert beginning("one two\n three  four five", 4) == "one two\n three  four"
    assert beginning("one two", 4) == "one two"


def test_a_loop_is_a_run_of_tokens_that_the_answer_had_before() -> None:
    from lookup_proof import LOOP, looping

    assert looping([]) == looping(list(range(50))) == 0
    once = list(range(LOOP))
    assert looping(once * 2) == 1 / (2 * LOOP)  # only the last token completes a run
    assert looping([3] * 40) == (40 - LOOP) / 40


def test_the_first_difference_is_shown_with_both_scores() -> None:
    from lookup_proof import Answer, difference

    scores = [mx.log(mx.array(row)) for row in ([0.5, 0.25, 0.25], [0.1, 0.45, 0.45], [0.1, 0.44, 0.46])]
    plain = Answer([0, 1, 2], [scores[0], scores[1], scores[0]], 3, 1.0)
    other = Answer([0, 2, 0], [scores[0], scores[2], scores[0]], 2, 1.0)
    found = difference(plain, other)
    assert found is not None and (found["place"], found["tokens"]) == (1, [1, 2])
    assert found["distance"] == pytest.approx(0, abs=1e-6)
    assert found["lookup"][1] - found["lookup"][0] == pytest.approx(0.0445, abs=1e-3)
    assert difference(plain, plain) is None


def test_prompts_that_begin_alike_are_read_once_and_a_killed_run_resumes(loaded: Any, tmp_path: Path) -> None:
    from lookup_prompts import Prompt
    from lookup_proof import compare, report

    model, tokenizer = loaded
    tokens = tokenizer.encode(REPEATING)
    group = [Prompt("code", 0, tokens), Prompt("quote", 1, [*tokens[:-3], 50, 60])]
    reads: list[int] = []

    class Watched:
        def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
            reads.append(inputs.shape[1])
            return model(inputs, cache=cache)

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

    log = RunLog(tmp_path / "log.jsonl", "proof", {}, key=("kind", "number"))
    compare(Watched(), tokenizer, group[:1], 12, log)
    assert max(reads) == len(tokens) - 1
    again = RunLog(tmp_path / "log.jsonl", "proof", {}, key=("kind", "number"))
    compare(Watched(), tokenizer, group, 12, again)
    assert len(again) == 2 and [record["same"] for record in again.records] == [True, True]
    reads.clear()
    compare(Watched(), tokenizer, group, 12, again)
    assert not reads
    told = report(again.records)
    assert told["kinds"]["all"]["prompts"] == told["kinds"]["all"]["same"] == 2 and told["differences"] == []
    assert told["kinds"]["code"]["passes_per_token"] < 1
    json.dumps(told)


def test_mlx_lm_writes_the_same_beside_it(loaded: Any) -> None:
    from lookup import figures, rounds
    from lookup_prompts import Prompt

    model, tokenizer = loaded
    found = rounds(model, model, Prompt("code", 0, tokenizer.encode(REPEATING)), 12, set(), 2)
    assert {side: len(answers) for side, answers in found.items()} == {"mlx_lm": 2, "plain": 2, "lookup": 2}
    assert len({tuple(answer.tokens) for answers in found.values() for answer in answers}) == 1
    told = figures([found])
    assert told["passes_per_token"] < 1 and told["same_text"] == 1


def test_an_answer_leaves_the_caches_as_they_were(loaded: Any) -> None:
    from lookup_proof import write

    model, tokenizer = loaded
    tokens = tokenizer.encode(REPEATING)
    cache = make_cache(model, len(tokens) + 20)
    prefill(model, tokens, cache)
    one, two = (write(model, cache, tokens, 12, set(), setting) for setting in ("off", "auto"))
    assert one.tokens == two.tokens and one.passes == 12 > two.passes
    assert {layer.offset for layer in cache} == {len(tokens) - 1}
    ended = write(model, cache, tokens, 12, {one.tokens[3]}, "off")
    assert ended.tokens == one.tokens[: one.tokens.index(one.tokens[3]) + 1]
