"""The engine: one text after another, each as if it were alone; context, stop strings, interrupts, changing angles."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, load, stream_generate
from mlx_resonance.errors import DeviceError, UsageError
from mlx_resonance.generation import Engine, PromptCache, Sampling, engine, stream
from mlx_resonance.generation.conversation import ContextFullError, Conversation
from mlx_resonance.generation.engine import plan_context
from mlx_resonance.server.worker import Work

import mlx.core as mx
import pytest

from .checkpoints import prompt


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint, factor=4)


def alone(loaded: Any, tokens: list[int], new: int, **options: Any) -> list[int]:
    """The answer's tokens, without an engine."""
    return [response.token for response in stream_generate(*loaded, tokens, new, **options)]


def told(running: Engine, tokens: list[int], new: int | None = None, **options: Any) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the prompt's were cached."""
    responses = list(running.stream(tokens, new, **options))
    return [response.token for response in responses], responses[-1].cached_tokens


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_turns_that_continue_each_other_are_as_if_alone(loaded: Any, kv_bits: int | None) -> None:
    running = Engine(*loaded, kv_bits=kv_bits)
    tokens = prompt(loaded[1], 300)
    first, cached = told(running, tokens, 12)
    assert first == alone(loaded, tokens, 12, kv_bits=kv_bits) and cached == 0
    longer = [*tokens, *first, *prompt(loaded[1], 40, start=900)[1:]]
    second, cached = told(running, longer, 12)
    assert cached in (len(tokens) + 11, len(tokens) + 12)
    other = [*tokens[:150], *longer[200:]]
    third, cached = told(running, other, 12)
    assert third == alone(loaded, other, 12, kv_bits=kv_bits) and cached == 150
    if kv_bits is None:  # quantized keys read as one token or as many differ in the last bits: near-ties may fall
        assert second == alone(loaded, longer, 12)
    again, cached = told(running, tokens, 12)
    assert again == first and cached == 150
    running.clear()
    assert told(running, tokens, 12) == (first, 0)


def test_a_growing_text_keeps_its_cache(loaded: Any) -> None:
    """Turn after turn, past what was first allocated."""
    running, tokens = Engine(*loaded), prompt(loaded[1], 30)
    for turn in range(12):
        answer, cached = told(running, tokens, 20)
        assert answer == alone(loaded, tokens, 20) and (cached > len(tokens) - 60 or not turn)
        tokens = [*tokens, *answer, *prompt(loaded[1], 31, start=40 * turn)[1:]]
    assert len(tokens) > 512


def test_the_context_in_use_is_enforced_to_the_token(loaded: Any) -> None:
    running, tokens = Engine(*loaded, context=100), prompt(loaded[1], 90)
    assert len(told(running, tokens, 10)[0]) <= 10
    with pytest.raises(UsageError, match=r"90 prompt tokens and 11 new ones .*up to 89 fits.* context of 100 tokens"):
        running.stream(tokens, 11)
    with pytest.raises(UsageError, match=r"exceed the checkpoint's context of 2,048 tokens: try factor=5"):
        Engine(*loaded).stream(prompt(loaded[1], 2000), 100)


def test_no_maximum_means_what_the_context_has_room_for(loaded: Any) -> None:
    end = loaded[1].eos_token_id
    never = [lambda _, logits: mx.where(mx.arange(logits.shape[-1]) == end, -mx.inf, logits)]
    running = Engine(*loaded, context=120)
    responses = list(running.stream(prompt(loaded[1], 90), logits_processors=never))
    assert len(responses) == 30 and responses[-1].finish_reason == "length"


@pytest.mark.parametrize("where", ["prompt", "answer", "closed"])
def test_an_interrupt_keeps_what_was_read_and_the_next_text_is_right(loaded: Any, where: str) -> None:
    tokens = prompt(loaded[1], 400)
    expected = alone(loaded, tokens, 16)
    running = Engine(*loaded, prefill_step_size=64)

    def interrupt(done: int, _: int) -> None:
        if where == "prompt" and done >= 192:
            raise KeyboardInterrupt

    answer = running.stream(tokens, 16, progress=interrupt)
    if where == "prompt":
        with pytest.raises(KeyboardInterrupt):
            next(answer)
        assert running.tokens == tokens[:192]
    else:
        first = [next(answer).token for _ in range(5)]
        if where == "answer":
            with pytest.raises(KeyboardInterrupt):
                answer.throw(KeyboardInterrupt)
        else:
            answer.close()
        assert running.tokens[:400] == tokens and running.tokens[400:] == first[: len(running.tokens) - 400]
    got, cached = told(running, tokens, 16)
    assert got == expected and cached >= 192


def test_a_stop_string_ends_the_text_before_it(loaded: Any) -> None:
    tokens = prompt(loaded[1], 200)
    running = Engine(*loaded)
    whole = "".join(response.text for response in running.stream(tokens, 40))
    for word in (whole[5:9], whole[10:30], whole[-3:]):
        responses = list(running.stream(tokens, 40, stop=["never in it", word]))
        assert "".join(response.text for response in responses) == whole[: whole.index(word)]
        assert responses[-1].finish_reason == "stop"
    with pytest.raises(UsageError, match="a stop string is empty"):
        running.stream(tokens, 4, stop=[""])


def test_another_engine_reads_from_disk_what_this_one_read(loaded: Any, tmp_path: Path) -> None:
    tokens = prompt(loaded[1], 600)
    expected = alone(loaded, tokens, 8)
    assert told(Engine(*loaded, disk_cache=PromptCache(tmp_path, "key")), tokens, 8) == (expected, 0)
    running = Engine(*loaded, disk_cache=PromptCache(tmp_path, "key"))
    assert told(running, tokens, 8) == (expected, 599)
    assert told(running, [*tokens[:500], 7], 8)[1] == 500  # from memory
    reader = Engine(*loaded, disk_cache=PromptCache(tmp_path, "key"))
    longer = [*tokens[:590], *prompt(loaded[1], 300, start=2000)]
    reader.read(longer)
    assert reader.tokens == longer[:-1]
    got, cached = told(Engine(*loaded, disk_cache=PromptCache(tmp_path, "key")), longer, 8)
    assert cached == len(longer) - 1 and got == alone(loaded, longer, 8)


def test_what_the_gpu_did_not_carry_out_is_not_kept(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed chunk, or a failed token, the next text is right, from memory and from disk."""
    tokens = prompt(loaded[1], 400)
    expected = alone(loaded, tokens, 8)
    running = Engine(*loaded, prefill_step_size=128, disk_cache=PromptCache(tmp_path, "key"))
    calls, evaluate = 0, mx.eval

    def fail(*arrays: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity")
        evaluate(*arrays)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", fail)
        with pytest.raises(DeviceError, match="did not read 128 tokens"):
            list(running.stream(tokens, 8))
    assert running.tokens == tokens[:128] and running.disk_cache.known(tokens) == 128
    answer = running.stream(tokens, 8)
    next(answer)
    with monkeypatch.context() as patch:
        patch.setattr(stream.AnswerText, "add", lambda *_: (_ for _ in ()).throw(RuntimeError("GPU Timeout Error")))
        with pytest.raises(DeviceError, match="did not write a token"):
            list(answer)
    assert running.tokens == tokens[:399]
    assert told(running, tokens, 8)[0] == expected
    assert told(Engine(*loaded, disk_cache=PromptCache(tmp_path, "key")), tokens, 8)[0] == expected


SCALINGS = {
    "longrope": (256, {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [8.0] * 8,
                       "original_max_position_embeddings": 64}),
    "dynamic": (64, {"rope_type": "resonance_dynamic", "factor": 4.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
def test_angles_that_change_with_the_length_are_those_of_each_text(
    random_llama: Path, copy_of: Any, kind: str, caplog: Any
) -> None:
    length, scaling = SCALINGS[kind]
    folder = copy_of(random_llama, rope_scaling=scaling, rope_parameters=None, max_position_embeddings=length)
    loaded = load(folder)
    tokens = [5 + i % 1000 for i in range(200)]
    running = Engine(*loaded)
    for count in (40, 50, 100, 120, 30):  # below 64, above, below again
        with caplog.at_level(logging.WARNING, "mlx_resonance"):
            assert told(running, tokens[:count], 8)[0] == alone(loaded, tokens[:count], 8), count
    assert "has grown past" not in caplog.text
    with caplog.at_level(logging.WARNING, "mlx_resonance"):
        list(running.stream(tokens[:60], 12))
    (line,) = [record.getMessage() for record in caplog.records if "has grown past" in record.getMessage()]
    assert "past 64 tokens" in line and kind in line


def test_the_context_of_an_engine_is_what_memory_holds(stdlib_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(stdlib_llama, factor=64)
    assert plan_context(checkpoint, None)[0] == 64 * 512
    monkeypatch.setattr(engine, "plan_memory", small := Planned(engine.plan_memory))
    monkeypatch.setattr(engine, "require_memory", small.require)
    tokens, plan = plan_context(checkpoint, None)
    assert plan is not None and tokens == plan.context == 5000
    with pytest.raises(UsageError, match="does not fit"):
        plan_context(checkpoint, 20_000)
    with pytest.raises(UsageError, match="exceed the checkpoint's context"):
        plan_context(checkpoint, 64 * 512 + 1)
    assert plan_context(checkpoint, 20_000, force=True) == (20_000, None)


class Planned:
    """The memory plan of a machine that holds 5000 tokens."""

    def __init__(self, plan_memory: Any) -> None:
        self.plan_memory = plan_memory

    def __call__(self, checkpoint: Any, context: int, **options: Any) -> Any:
        from dataclasses import replace

        plan = self.plan_memory(checkpoint, context, **options)
        return replace(plan, fits=context <= 5000, max_context=dict.fromkeys(plan.max_context, 5000))

    def require(self, _: Any, context: int, **__: Any) -> None:
        if context > 5000:
            raise UsageError("does not fit")


def test_the_sampling_is_checked_against_the_vocabulary(loaded: Any) -> None:
    running = Engine(*loaded)
    with pytest.raises(UsageError, match="top_k must be less than the vocabulary of 2,048 tokens, got 2048"):
        running.stream([5], 4, sampling=Sampling(temp=1, top_k=2048))
    one, other = (told(running, [5, 6], 8, sampling=Sampling(temp=1, top_k=50, seed=3))[0] for _ in range(2))
    assert one == other


@pytest.mark.parametrize("kind", SCALINGS)
def test_texts_that_share_a_model_keep_their_own_angles(random_llama: Path, copy_of: Any, kind: str) -> None:
    """Two iterators at once, each begun and continued between the other's tokens; and then the model by itself."""
    length, scaling = SCALINGS[kind]
    folder = copy_of(random_llama, rope_scaling=scaling, rope_parameters=None, max_position_embeddings=length)
    tokens = [5 + i % 1000 for i in range(200)]
    short, long = tokens[:40], tokens[:100]
    expected = [alone(load(folder), text, 12) for text in (short, long)]
    logits = load(folder)[0](mx.array([short]))
    loaded = load(folder)
    first = stream_generate(*loaded, short, 12)
    second = stream_generate(*loaded, long, 12)
    assert [[response.token for response in answer] for answer in (first, second)] == expected
    first, found = stream_generate(*loaded, short, 12), [[], []]  # type: ignore[var-annotated]
    found[0].append(next(first).token)
    second = stream_generate(*loaded, long, 12)
    for _ in range(12):
        for answer, seen in zip((first, second), found, strict=True):
            seen += [response.token for response in [next(answer, None)] if response is not None]
    assert found == expected and not [*first, *second]
    assert mx.array_equal(loaded[0](mx.array([short])), logits)
    Engine(*loaded).read(long)
    assert mx.array_equal(loaded[0](mx.array([short])), logits)
    list(stream_generate(*load(folder), long, 6, draft_model=loaded[0], num_draft_tokens=2))
    assert mx.array_equal(loaded[0](mx.array([short])), logits)


def test_a_seed_is_that_of_its_own_text(loaded: Any) -> None:
    tokens = prompt(loaded[1], 30)
    expected = alone(loaded, tokens, 8, temp=1.0, seed=1)
    first = stream_generate(*loaded, tokens, 8, temp=1.0, seed=1)
    stream_generate(*loaded, tokens, 8, temp=1.0, seed=2)
    assert [response.token for response in first] == expected


def test_a_length_that_config_json_leaves_open_is_served_by_every_way(
    checkpoint: Path, copy_of: Any, run: Any, tmp_path: Path
) -> None:
    """With a warning, past max_position_embeddings: the file may state the length before scaling."""
    folder = copy_of(checkpoint, rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters=None)
    text = "import os\n" * 200
    loaded = load(folder)
    tokens = loaded[1].encode(text)
    assert 512 < len(tokens) < 2048
    wanted = loaded[1].decode(alone(loaded, tokens, 6))
    running = Engine(*loaded)
    assert loaded[1].decode(told(running, tokens, 6)[0]) == wanted and running.check(tokens) == 2048 - len(tokens)
    (tmp_path / "prompt.txt").write_text(text)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"id": "1", "prompt": text}) + "\n")
    common = ("generate", "-m", folder, "--max-tokens", 6, "--ignore-chat-template")
    code, out, err = run(*common, "-f", tmp_path / "prompt.txt", "--json")
    assert code == 0 and json.loads(out)["text"] == wanted, err
    answers = tmp_path / "answers.jsonl"
    code, _, err = run(*common, "--prompts-file", tmp_path / "prompts.jsonl", "--output", answers)
    assert code == 0 and json.loads(answers.read_text().splitlines()[1])["text"] == wanted, err
    with pytest.raises(UsageError, match="exceed"):
        running.check([5] * 2048)


def test_a_context_that_is_given_is_a_limit(checkpoint: Path, copy_of: Any) -> None:
    """Memory is planned for it: by chat and server for the one that config.json states, if no other is asked for."""
    folder = copy_of(checkpoint, rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters=None)
    loaded, long = load(folder), [5] * 600
    for context in (512, 300):
        running = Engine(*loaded, context=context)
        with pytest.raises(UsageError, match=f"exceed the context of {context} tokens in use here") as error:
            running.check(long, 4)
        assert list(error.value.remedies) == [{"context": 2048}] * (context == 512)
        work = Work([long], None, Sampling(), lambda _: None, most=64)
        with pytest.raises(UsageError, match=f"exceed the context of {context} tokens in use here"):
            running.stream(long, work.new(len(long), running.context))
        with pytest.raises(ContextFullError, match=f"exceed the context of {context}") as full:
            Conversation(running).put("import os\n" * 200)
        assert ({"context": 2048} in full.value.remedies) == (context == 512)
    assert Engine(*loaded, context=2048).check(long, 4) == 4
