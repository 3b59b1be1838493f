"""Generation: what reaches mlx-lm, what a prompt becomes, and lengths that change the angles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_resonance import generate, load, stream_generate
from mlx_resonance.generation import prompt_tokens, sampling, stream
from mlx_resonance.generation.kv_format import KVFormat
from mlx_resonance.generation.lookup import LookupProposer
from mlx_resonance.generation.quantized_cache import QuantizedCache

import mlx.core as mx
import numpy as np
import pytest

TEXT = "import os\nimport re\n\n\ndef main(argv):\n    return"


@pytest.fixture(scope="module")
def loaded(random_llama: Path) -> Any:
    return load(random_llama)


def test_options_reach_the_loop(stdlib_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(stdlib_llama)
    calls: dict[str, Any] = {}

    def decode(model: Any, cache: list[Any], tokens: list[int], **options: Any) -> Iterator[Any]:
        calls.update(options, cache=cache)
        yield from ()

    monkeypatch.setattr(stream, "decode", decode)
    monkeypatch.setattr(sampling, "make_sampler", lambda **options: calls.update(sampled=options) or len)
    list(stream_generate(model, tokenizer, TEXT, temp=0.5, top_p=0.25, max_tokens=9, kv_bits=4, prefill_step_size=7))
    assert calls.keys() == {"sampled", "max_tokens", "sampler", "logits_processors", "cache", "stream", "proposals"}
    assert calls["max_tokens"] == 9 and calls["logits_processors"] == ()
    assert isinstance(calls["proposals"].proposer, LookupProposer) and calls["proposals"].fixed is None
    assert calls["sampled"] == {"temp": 0.5, "top_p": 0.25, "top_k": 0, "min_p": 0.0}
    length = len(prompt_tokens(tokenizer, TEXT))
    for cache in calls["cache"]:  # quantized, allocated for everything, with all but the last token read
        assert (type(cache), cache.format, cache.step) == (QuantizedCache, KVFormat.of(4), length + 9)
        assert cache.offset == length - 1
    list(stream_generate(model, tokenizer, TEXT, max_tokens=9))
    assert calls["sampled"]["temp"] == calls["sampled"]["top_p"] == 0.0  # mlx-lm's value for "all tokens"
    assert type(calls["cache"][0]).__name__ == "PlainCache"

    # What a caller's own functions remember must not contain guesses, unless that is asked for.
    for options in ({"sampler": mx.argmax}, {"logits_processors": [lambda tokens, logits: logits]}):
        list(stream_generate(model, tokenizer, TEXT, max_tokens=9, **options))
        assert calls["proposals"] is None
        list(stream_generate(model, tokenizer, TEXT, max_tokens=9, **options, prompt_lookup=5))
        assert calls["proposals"].fixed == 5


def test_progress_counts_the_prompt(loaded: Any) -> None:
    seen: list[tuple[int, int]] = []
    options = {"prefill_step_size": 8, "prompt_progress_callback": lambda *at: seen.append(at)}
    responses = stream_generate(*loaded, list(range(10, 30)), max_tokens=2, **options)
    assert [response.prompt_tokens for response in responses] == [20, 20]
    assert [done for done, _ in seen] == [0, 8, 16, 19, 20] and {total for _, total in seen} == {20}


def test_same_seed_same_text(loaded: Any) -> None:
    one, other, third = (generate(*loaded, TEXT, max_tokens=20, temp=1.0, seed=seed) for seed in (5, 5, 6))
    assert one == other != third


def test_a_prompt_starts_with_one_bos(loaded: Any) -> None:
    tokenizer = loaded[1]
    plain = prompt_tokens(tokenizer, TEXT)
    assert plain[0] == tokenizer.bos_token_id and plain.count(tokenizer.bos_token_id) == 1
    assert prompt_tokens(tokenizer, tokenizer.bos_token + TEXT) == plain
    assert prompt_tokens(tokenizer, plain) == plain


def test_the_chat_template_is_used_where_there_is_one(random_llama: Path, copy_of: Any) -> None:
    folder = copy_of(random_llama)
    (folder / "chat_template.jinja").write_text("<s>Q: {{ messages[0]['content'] }}\nA:")
    _, tokenizer = load(folder)
    assert tokenizer.decode(prompt_tokens(tokenizer, "why", chat=True)) == "<s>Q: why\nA:"
    assert tokenizer.decode(prompt_tokens(tokenizer, "why")) == "<s>why"


def test_generation_stops_at_every_eos_of_the_generation_config(random_llama: Path, copy_of: Any) -> None:
    folder = copy_of(random_llama, eos_token_id=1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert load(folder)[1].eos_token_ids == {1, 7}


@pytest.mark.parametrize("prompt", ["", "  \n", []])
def test_an_empty_prompt_is_refused(loaded: Any, prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        list(stream_generate(*loaded, prompt))


def test_the_context_is_enforced_to_the_token(loaded: Any) -> None:
    tokens = [5] * 120
    list(stream_generate(*loaded, tokens, max_tokens=8))
    with pytest.raises(ValueError, match=r"120 prompt tokens and 9 new ones exceed .* 128"):
        list(stream_generate(*loaded, tokens, max_tokens=9))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [8.0] * 8,
         "original_max_position_embeddings": 32},
        {"rope_type": "resonance_dynamic", "factor": 8.0},
    ],
    ids=["longrope", "dynamic"],
)  # fmt: skip
def test_a_prompt_read_in_chunks_rotates_as_in_one_pass(
    random_llama: Path, copy_of: Any, scaling: dict[str, Any]
) -> None:
    """These types change their angles with the length: the first chunks must know the length of the prompt."""
    length = 256 if scaling["rope_type"] == "longrope" else 32
    folder = copy_of(random_llama, rope_scaling=scaling, rope_parameters=None, max_position_embeddings=length)
    model, tokenizer = load(folder)
    tokens = np.random.default_rng(0).integers(2, 2048, 200).tolist()
    expected = np.array(model(mx.array(tokens)[None])[0, -1])
    for step in (7, 64, 1000):
        first = next(iter(stream_generate(model, tokenizer, tokens, max_tokens=2, prefill_step_size=step)))
        logits = np.array(first.logprobs) - np.array(first.logprobs).max() + expected.max()
        # Chunks are summed in a different order; wrong angles would change the logits by as much as their own size.
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max(), step
