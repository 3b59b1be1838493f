"""A draft model: what it proposes, that it changes no text, and how the ways to a text take one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, load, stream_generate
from mlx_resonance.errors import UsageError
from mlx_resonance.generation import Engine, plan_memory
from mlx_resonance.generation.decode import decode
from mlx_resonance.generation.draft import DraftProposer, draft_for, open_draft
from mlx_resonance.generation.memory import kv_per_token, prefill_memory
from mlx_resonance.generation.prefill import STEP
from mlx_resonance.generation.speculation import Proposals

import pytest

from .test_decode import FRESH, GREEDY, NEW, Model, Sampling, of_mlx_lm, ours, read

SAMPLED = Sampling(temp=0.8, top_p=0.9)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint)


@pytest.fixture(scope="module")
def tokens(loaded: Any) -> list[int]:
    return list(loaded[1].encode(FRESH))


def drafting(model: Any, tokens: list[int], rows: int | None = None) -> DraftProposer:
    """A proposer that has begun a text."""
    proposer = DraftProposer(model, rows)
    proposer.begin(tokens)
    return proposer


@pytest.mark.parametrize("kv_bits", [None, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_its_proposals_do_not_change_the_text(
    loaded: Any, random_llama: Path, tokens: list[int], sampling: Sampling, kv_bits: int | None
) -> None:
    other, _ = load(random_llama)  # as many tokens, 128 of context, random weights
    wanted, _ = of_mlx_lm(loaded[0], tokens, sampling, kv_bits)
    for draft, fewer in ((loaded[0], True), (other, False)):
        model, watched = Model(loaded[0]), Model(draft)
        proposals = Proposals(drafting(watched, tokens), 4)
        assert ours(model, tokens, proposals, sampling, kv_bits)[0] == wanted
        if sampling is GREEDY and kv_bits is None and fewer:
            assert len(model.passes) == 1 + -(-(NEW - 1) // 5) + 1
            text = tokens + wanted
            for offset, inputs in watched.passes:  # each token once, in its place
                assert inputs[0].tolist() == text[offset : offset + inputs.shape[1]]


def test_its_caches_hold_the_text_whatever_was_accepted(loaded: Any, tokens: list[int]) -> None:
    chosen = random.Random(3)
    proposer = drafting(Model(loaded[0]), tokens)
    text = list(tokens)
    for _ in range(12):
        proposed = proposer.propose(5)
        plain = decode(loaded[0], read(loaded[0], text), text, max_tokens=5, sampler=GREEDY.sampler())
        assert proposed == [token for token, _ in plain]
        right = chosen.randrange(6)
        tail = [*proposed[:right], *([] if right == 5 and chosen.random() < 0.5 else [chosen.randrange(2, 2048)])]
        if tail:
            proposer.accepted(tail)
            text += tail


@pytest.mark.parametrize("answered", [True, False])
def test_a_text_that_begins_like_the_last_is_read_from_where_they_differ(
    loaded: Any, tokens: list[int], answered: bool
) -> None:
    model = Model(loaded[0])
    proposer = drafting(model, tokens)
    first = proposer.propose(6)
    if answered:  # else the last text ends with a proposal that was never checked
        proposer.accepted(first)
    for kept in (len(tokens) - 3, len(tokens) + 4, 0):
        text = [*(tokens + first)[:kept], *range(50, 70)]
        model.passes.clear()
        proposer.begin(text)
        assert proposer.propose(5) == drafting(loaded[0], text).propose(5)
        assert model.passes[0][0] == min(kept, len(tokens) + 6 - 1 if answered else len(tokens))
        tokens, first, answered = text, [], True


def test_it_proposes_nothing_past_its_context(random_llama: Path) -> None:
    model, _ = load(random_llama)
    proposer = drafting(model, [5 + i for i in range(120)])
    assert len(proposer.propose(20)) == 8
    proposer.accepted([5] * 8)
    assert proposer.propose(20) == []


def test_it_proposes_no_id_that_the_model_lacks(loaded: Any, tokens: list[int]) -> None:
    all_of_them = drafting(loaded[0], tokens).propose(8)
    assert max(all_of_them) >= 300
    assert max(drafting(loaded[0], tokens, 300).propose(8)) < 300


def test_the_python_way(loaded: Any, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [each.token for each in stream_generate(*loaded, tokens, max_tokens=NEW, prompt_lookup="off")]
    proposed: list[int] = []
    passed = Proposals.passed

    def counted(self: Any, count: int, *args: Any) -> None:
        proposed.append(count)
        passed(self, count, *args)

    monkeypatch.setattr(Proposals, "passed", counted)
    found = [each.token for each in stream_generate(*loaded, tokens, max_tokens=NEW, draft_model=loaded[0])]
    assert found == wanted and max(proposed) > 4  # it grows: all of its guesses are right
    proposed.clear()
    options = {"draft_model": loaded[0], "num_draft_tokens": 3}
    assert [each.token for each in stream_generate(*loaded, tokens, max_tokens=NEW, **options)] == wanted
    assert set(proposed[1:-1]) == {3}


@pytest.mark.parametrize(("options", "said"), [
    ({"prompt_lookup": 4}, "propose for the same pass: give one of them: try prompt_lookup='off'"),
    ({"num_draft_tokens": 0}, "num_draft_tokens must be 1 to 32, got 0"),
    ({"num_draft_tokens": 33}, "num_draft_tokens must be 1 to 32, got 33"),
])  # fmt: skip
def test_what_contradicts_it(loaded: Any, tokens: list[int], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        stream_generate(*loaded, tokens, draft_model=loaded[0], **options)


def test_an_engine_keeps_what_it_has_read(loaded: Any, tokens: list[int]) -> None:
    watched = Model(loaded[0])
    engine, plain = Engine(*loaded, draft_model=watched), Engine(*loaded, prompt_lookup="off")
    text = list(tokens)
    for turn in range(2):
        watched.passes.clear()
        answer = [each.token for each in engine.stream(text, 12)]
        assert answer == [each.token for each in plain.stream(text, 12)]
        first = watched.passes[0]
        assert first[0] == 0 if turn == 0 else first[0] > len(tokens)
        text += [*answer, *range(60, 80)]
    with pytest.raises(UsageError, match="a draft model is for one process"):
        Engine(*loaded, draft_model=watched, agree=lambda size: size)


# The vocabulary.


@pytest.mark.parametrize(("rows", "right"), [(2047, False), (2048, True), (3071, True), (3072, False)])
def test_an_embedding_for_other_tokens(loaded: Any, rows: int, right: bool) -> None:
    class Other:
        layers = loaded[0].layers
        args = type("Args", (), {"vocab_size": rows})

    if right:
        assert draft_for(*loaded, Other()) is not None  # type: ignore[arg-type]
        return
    with pytest.raises(UsageError, match=f"another vocabulary: an embedding of {rows:,} rows for 2,048 tokens"):
        draft_for(*loaded, Other())  # type: ignore[arg-type]


def test_another_vocabulary_is_named(checkpoint: Path, copy_of: Any, tmp_path: Path, run: Any) -> None:
    other = copy_of(checkpoint)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.__getitem__)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(content))
    token, here, there = min((one, 300, 301), (two, 301, 300))
    opened = Checkpoint.open(checkpoint)
    with pytest.raises(UsageError) as raised:
        open_draft(opened, other)
    assert f"{token!r} is {there} in {other} and {here} in {opened.name}" in str(raised.value)
    assert raised.value.option == "draft_model"
    for command in ("generate", "chat"):
        code, out, err = run(
            command, "-m", checkpoint, "--draft-model", other, *(["-p", "x"] * (command == "generate"))
        )
        assert (code, out, err.count("\n")) == (2, "", 1) and "another vocabulary" in err and "--draft-model" in err


def test_a_command_refuses_what_contradicts_it(checkpoint: Path, run: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": 1, "prompt": "x"}\n')
    draft = ("-m", checkpoint, "--draft-model", checkpoint)
    for flags, said in (
        (("generate", *draft, "-p", "x", "--prompt-lookup", 4), "--prompt-lookup off"),
        (("generate", *draft, "--prompts-file", prompts, "--output", tmp_path / "out.jsonl"), "one text at a time"),
        (("chat", *draft, "--prompt-lookup", 4), "--prompt-lookup off"),
    ):
        code, out, err = run(*flags)
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err, err
    assert not (tmp_path / "out.jsonl").exists()


# The memory plan.


@pytest.mark.parametrize("kv_bits", [None, 4])
def test_the_plan_counts_its_weights_keys_and_values(checkpoint: Path, random_llama: Path, kv_bits: int | None) -> None:
    draft, options = Checkpoint.open(random_llama), {"memory": 10**10, "kv_bits": kv_bits}
    alone = plan_memory(checkpoint, 500, **options)
    both = plan_memory(checkpoint, 500, **options, draft=draft)
    assert both.weights - alone.weights == draft.dimensions.weights > 0
    # 2 layers; 64 features of keys and as many of values, or fewer, in 32 bits
    assert both.kv_per_token - alone.kv_per_token == 2 * 2 * draft.dimensions.keys * 4
    assert both.kv - alone.kv == 500 * kv_per_token(draft.dimensions, None)
    assert both.prefill == max(alone.prefill, prefill_memory(draft.dimensions, 500, None, STEP))
    assert both.total == both.weights + both.kv + both.prefill
    assert all(both.max_context[name] < alone.max_context[name] for name in alone.max_context)


def test_what_it_takes_may_exceed_the_memory(checkpoint: Path, run: Any, tmp_path: Path) -> None:
    """A budget that holds the model, but not two of them."""
    opened = Checkpoint.open(checkpoint)
    exact = plan_memory(opened, 64, memory=10**10).total
    budget = 3 * 2**30 + exact + opened.dimensions.weights // 2
    flags = ("generate", "-m", checkpoint, "-p", "import os", "--max-tokens", 16, "--memory", f"{budget / 1e9:.6f}GB")
    assert run(*flags, "--prefill-step-size", 64)[0] == 0
    code, _, err = run(*flags, "--prefill-step-size", 64, "--draft-model", checkpoint)
    assert code == 2 and "the limit is" in err


def test_its_cache_grows(checkpoint: Path) -> None:
    """A prompt longer than the room that a new cache has."""
    model, text = load(checkpoint, factor=8)[0], [5 + i % 1000 for i in range(1500)]
    plain = decode(model, read(model, text), text, max_tokens=3, sampler=GREEDY.sampler())
    assert drafting(model, text).propose(3) == [token for token, _ in plain]
