"""decode(): an answer written in fewer passes is the plain one, and so are the keys and values that it leaves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_resonance import load
from mlx_resonance.attention import Inference
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.decode import decode
from mlx_resonance.generation.lookup import LookupProposer
from mlx_resonance.generation.prefill import prefill
from mlx_resonance.generation.sampling import Sampling
from mlx_resonance.generation.speculation import Proposals
from mlx_resonance.rope import expect

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import RotatingKVCache

REPEATING = "def area(width, height):\n    return width * height\n\n\n" * 4 + "def area("
FRESH = "import argparse\nimport sys\n\n\nclass Parser:\n"
NEW = 40
GREEDY = Sampling()


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint)


@pytest.fixture(scope="module")
def prompts(loaded: Any) -> dict[str, list[int]]:
    return {name: loaded[1].encode(text) for name, text in (("repeating", REPEATING), ("fresh", FRESH))}


def read(model: Any, tokens: list[int], kv_bits: int | None = None, new: int = NEW) -> list[Any]:
    """Caches that hold a prompt but for its last token."""
    cache = make_cache(model, len(tokens) + new, kv_bits)
    prefill(model, tokens, cache)
    return cache


def of_mlx_lm(
    model: Any, tokens: list[int], sampling: Sampling = GREEDY, kv_bits: int | None = None, new: int = NEW
) -> tuple[list[int], list[mx.array]]:
    """Tokens and log-probabilities from mlx-lm's loop, which reads the last token of the prompt itself."""

    def seeing_all(processor: Any) -> Any:
        return lambda rest, logits: processor(mx.concatenate([mx.array(tokens[:-1]), rest]), logits)

    mx.random.seed(7)
    steps = generate_step(
        mx.array(tokens[-1:]),
        Inference(model),
        prompt_cache=read(model, tokens, kv_bits, new),
        max_tokens=new,
        sampler=sampling.sampler(),
        logits_processors=[seeing_all(processor) for processor in sampling.processors()],
    )
    drawn, logprobs = zip(*steps, strict=True)
    return list(drawn), list(logprobs)


def ours(
    model: Any, tokens: list[int], proposals: Proposals | None, sampling: Sampling = GREEDY,
    kv_bits: int | None = None, new: int = NEW, **options: Any,
) -> tuple[list[int], list[mx.array], list[Any]]:  # fmt: skip
    """Tokens, log-probabilities and caches."""
    cache = read(getattr(model, "_model", model), tokens, kv_bits, new)
    mx.random.seed(7)
    options = {"logits_processors": sampling.processors()} | options
    steps = decode(model, cache, tokens, max_tokens=new, sampler=sampling.sampler(), proposals=proposals, **options)
    drawn, logprobs = zip(*steps, strict=True)
    return list(drawn), list(logprobs), cache


class Model:
    """A model that remembers its passes: the caches' tokens before each, and the tokens that it read."""

    def __init__(self, model: Any) -> None:
        self._model, self.passes = model, []

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        self.passes.append((cache[0].offset, inputs))
        return self._model(inputs, cache=cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def lengths(self) -> list[int]:
        return [inputs.shape[1] for _, inputs in self.passes]


class Oracle:
    """Proposes what comes next, as long as the script says how many of the tokens shall be right.

    Args:
        prompt: tokens of the prompt.
        answer: what plain decoding writes.
        script: for each proposal, how many tokens it has and how many are right.
    """

    free = True

    def __init__(self, prompt: int, answer: list[int], script: Sequence[tuple[int, int]]) -> None:
        self.answer, self.script, self.text = answer, itertools.cycle(script), []

    def propose(self, count: int) -> list[int]:
        if count == 1:  # what awaits() asks
            return [0]
        length, right = next(self.script)
        place = len(self.text)
        tokens = self.answer[place : place + min(length, count)]
        return [token if at < right else (token + 1) % 2048 for at, token in enumerate(tokens)]

    def accepted(self, tokens: Sequence[int]) -> None:
        self.text += tokens


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("length", [None, 1, 5, 16])
@pytest.mark.parametrize("name", ["repeating", "fresh"])
def test_greedy_text_is_mlx_lms(loaded: Any, prompts: Any, name: str, length: int | None, kv_bits: int | None) -> None:
    model, tokens = Model(loaded[0]), prompts[name]
    wanted, scores = of_mlx_lm(loaded[0], tokens, kv_bits=kv_bits)
    found, logprobs, cache = ours(model, tokens, Proposals(LookupProposer(tokens), length), kv_bits=kv_bits)
    assert found == wanted
    for one, other in zip(logprobs, scores, strict=True):
        assert one.shape == other.shape == (2048,)
        assert mx.allclose(one, other, atol=1e-4 if kv_bits is None else 0.1)  # a rounded key may be a level off
    assert [layer.offset for layer in cache] == [len(tokens) + NEW] * 5
    if name == "repeating":
        assert len(model.passes) < NEW and max(model.lengths) > 1


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_seeds_text_is_that_of_plain_decoding(loaded: Any, prompts: Any, penalty: float) -> None:
    sampling = Sampling(temp=0.8, top_p=0.9, repetition_penalty=penalty)
    tokens = prompts["repeating"]
    wanted, _ = of_mlx_lm(loaded[0], tokens, sampling)
    assert wanted != of_mlx_lm(loaded[0], tokens, Sampling(repetition_penalty=penalty))[0]
    plain, _, _ = ours(loaded[0], tokens, None, sampling)
    state = mx.random.state[0].tolist()
    assert plain == wanted
    script = [(4, 2), (3, 3), (6, 0), (2, 1)]
    for proposer in (LookupProposer(tokens), Oracle(len(tokens), wanted, script)):
        model = Model(loaded[0])
        found, _, _ = ours(model, tokens, Proposals(proposer, 6), sampling)
        assert found == wanted and (max(model.lengths) > 1 or isinstance(proposer, LookupProposer))
        assert mx.random.state[0].tolist() == state  # one draw per token, none for those that were rejected


def test_a_processor_sees_the_text_before_each_token(loaded: Any, prompts: Any) -> None:
    tokens, seen = prompts["repeating"], {}

    def look(text: mx.array, logits: mx.array) -> mx.array:
        assert logits.shape == (1, 2048)
        seen[text.size] = text.tolist()  # of a position that was rejected, the last time counts
        return logits

    wanted, _ = of_mlx_lm(loaded[0], tokens)
    oracle = Oracle(len(tokens), wanted, [(4, 2), (5, 5), (3, 0)])
    model = Model(loaded[0])
    found, _, _ = ours(model, tokens, Proposals(oracle, 6), logits_processors=[look])
    assert (found == wanted and 1 in model.lengths) or max(model.lengths) == 6
    for count in range(NEW):
        assert seen[len(tokens) + count] == tokens + wanted[:count]


@pytest.mark.parametrize("new", [1, 2, 3, 7, 20])
def test_it_writes_max_tokens_and_reads_them(loaded: Any, prompts: Any, new: int) -> None:
    tokens = prompts["repeating"]
    wanted, _ = of_mlx_lm(loaded[0], tokens)
    for proposals in (None, Proposals(Oracle(len(tokens), wanted, [(16, 16)]), 16), Proposals(LookupProposer(tokens))):
        model = Model(loaded[0])
        found, _, cache = ours(model, tokens, proposals, new=new)
        assert found == wanted[:new]
        assert cache[0].offset == len(tokens) + new
        assert max(offset + inputs.shape[1] for offset, inputs in model.passes) == len(tokens) + new
        assert cache[0].keys.shape[2] == len(tokens) + new  # it did not grow


@pytest.mark.parametrize("kv_bits", [None, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("proposing", [False, True])
def test_closed_at_any_token_the_caches_hold_no_more_than_was_yielded(
    loaded: Any, prompts: Any, proposing: bool, kv_bits: int | None
) -> None:
    model, tokens = loaded[0], prompts["repeating"]
    wanted, _ = of_mlx_lm(model, tokens, kv_bits=kv_bits)
    for stop in range(1, 14):
        cache = read(model, tokens, kv_bits)
        oracle = Oracle(len(tokens), wanted, [(5, 3), (4, 4), (6, 0)])
        proposals = Proposals(oracle, 6) if proposing else None
        steps = decode(model, cache, tokens, max_tokens=NEW, sampler=GREEDY.sampler(), proposals=proposals)
        found = [token for token, _ in itertools.islice(steps, stop)]
        steps.close()
        assert found == wanted[:stop]
        (offset,) = {layer.offset for layer in cache}
        assert len(tokens) + stop - 1 <= offset <= len(tokens) + stop
        text = tokens + found
        for layer in cache:
            layer.trim(layer.offset - (len(text) - 1))
        rest = decode(model, cache, text, max_tokens=8, sampler=GREEDY.sampler())
        assert [token for token, _ in rest] == wanted[stop : stop + 8]


def test_plain_passes_start_before_the_token_is_known(loaded: Any, prompts: Any) -> None:
    tokens = prompts["fresh"]
    paused = Proposals(LookupProposer(tokens))
    paused.paused = 10**6
    nothing = Proposals(Oracle(len(tokens), [], [(0, 0)]))
    nothing.proposer.propose = lambda count: []
    for proposals in (None, paused, nothing):
        model, started = Model(loaded[0]), []

        def clock(model: Any = model, started: list[int] = started) -> float:
            started.append(len(model.passes))  # asked at the start, when a pass is known, around yielding
            return float(len(started))

        ours(model, tokens, proposals, new=9, clock=clock)
        assert started[1::3] == list(range(2, 11)) and model.lengths == [1] * 10


def test_the_times_of_passes_are_those_without_the_consumer(loaded: Any, prompts: Any) -> None:
    tokens, now, told = prompts["repeating"], [0.0], []
    wanted, _ = of_mlx_lm(loaded[0], tokens)

    class Slow(Model):
        def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
            now[0] += 1 + inputs.shape[1] / 10
            return super().__call__(inputs, cache)

    proposals = Proposals(Oracle(len(tokens), wanted, [(4, 4)]), 4)
    passed = proposals.passed
    proposals.passed = lambda *given: (told.append(given), passed(*given))[1]
    cache, clock = read(loaded[0], tokens), lambda: now[0]
    for _ in decode(
        Slow(loaded[0]), cache, tokens, max_tokens=21, sampler=GREEDY.sampler(), proposals=proposals, clock=clock
    ):
        now[0] += 100
    assert [(proposed, len(emitted)) for proposed, emitted, _ in told] == [(0, 1), (4, 5), (4, 5), (4, 5), (4, 5)]
    assert [seconds for *_, seconds in told] == pytest.approx([1.1, *[1.5] * 4])


@pytest.mark.parametrize("which", [1, 2, 3])
def test_an_interrupt_within_a_pass_leaves_layers_alike(loaded: Any, prompts: Any, which: int) -> None:
    tokens = prompts["repeating"]
    wanted, _ = of_mlx_lm(loaded[0], tokens)

    class Interrupted(Model):
        def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
            out = super().__call__(inputs, cache)
            if len(self.passes) == which:
                cache[-1].trim(inputs.shape[1])  # the last layer had not begun
                raise KeyboardInterrupt
            return out

    cache, found = read(loaded[0], tokens), []
    proposals = Proposals(Oracle(len(tokens), wanted, [(4, 4)]), 4)
    with pytest.raises(KeyboardInterrupt):
        for token, _ in decode(
            Interrupted(loaded[0]), cache, tokens, max_tokens=NEW, sampler=GREEDY.sampler(), proposals=proposals
        ):
            found.append(token)
    (offset,) = {layer.offset for layer in cache}
    assert found == wanted[: len(found)] and offset <= len(tokens) + len(found)


SCALINGS = {
    "longrope": (256, {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [8.0] * 8,
                       "original_max_position_embeddings": 64}),
    "dynamic": (64, {"rope_type": "resonance_dynamic", "factor": 4.0}),
}  # fmt: skip


@pytest.mark.parametrize("prompt", [30, 50, 63, 90])
@pytest.mark.parametrize("kind", SCALINGS)
def test_where_angles_change_with_the_length_tokens_are_read_one_by_one(
    random_llama: Path, copy_of: Any, kind: str, prompt: int
) -> None:
    length, scaling = SCALINGS[kind]
    model, _ = load(copy_of(random_llama, rope_scaling=scaling, rope_parameters=None, max_position_embeddings=length))
    tokens = [5 + i % 1000 for i in range(prompt)]
    expect(model, prompt)
    wanted, _ = of_mlx_lm(model, tokens, new=30)
    watched = Model(model)
    expect(model, prompt)
    found, _, _ = ours(watched, tokens, Proposals(Oracle(prompt, wanted, [(5, 3), (4, 4)]), 6), new=30)
    assert found == wanted
    several = [(offset, inputs.shape[1]) for offset, inputs in watched.passes if inputs.shape[1] > 1]
    assert all(offset + count <= 64 or (offset > 64 and kind == "longrope") for offset, count in several)
    assert bool(several) == (prompt < 60 or kind == "longrope")


def test_nothing_is_proposed_to_caches_that_cannot_be_trimmed(loaded: Any, prompts: Any) -> None:
    model, tokens = Model(loaded[0]), prompts["repeating"]
    wanted, _ = of_mlx_lm(loaded[0], tokens)
    cache = [RotatingKVCache(max_size=400) for _ in loaded[0].layers]
    prefill(loaded[0], tokens, cache)
    proposals = Proposals(Oracle(len(tokens), wanted, [(4, 4)]), 4)
    steps = decode(model, cache, tokens, max_tokens=NEW, sampler=GREEDY.sampler(), proposals=proposals)
    assert [token for token, _ in steps] == wanted
    assert model.lengths == [1] * (NEW + 1)
