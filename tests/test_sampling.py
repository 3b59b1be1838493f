"""Sampling: the ranges, what mlx-lm gets, and a checkpoint's own defaults."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.errors import UsageError
from mlx_resonance.generation import Sampling
from mlx_resonance.generation.sampling import sampling_for

import mlx.core as mx
import pytest


def with_defaults(folder: Path, copy_of: Any, **config: Any) -> Checkpoint:
    """A checkpoint with this generation_config.json."""
    copy = copy_of(folder)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | config))
    return Checkpoint.open(copy)


def drawn(sampling: Sampling, probabilities: list[float]) -> set[int]:
    """The tokens that 300 draws give."""
    mx.random.seed(0)
    sample, logprobs = sampling.sampler(), mx.log(mx.array([probabilities]))
    return set(Counter(int(sample(logprobs).item()) for _ in range(300)))


def test_each_value_leaves_the_tokens_that_it_says() -> None:
    probabilities = [0.4, 0.3, 0.2, 0.1]
    assert drawn(Sampling(), probabilities) == {0}
    assert drawn(Sampling(temp=1), probabilities) == {0, 1, 2, 3}
    assert drawn(Sampling(temp=1, top_p=0.6), probabilities) == {0, 1}
    assert drawn(Sampling(temp=1, top_k=3), probabilities) == {0, 1, 2}
    assert drawn(Sampling(temp=1, min_p=0.7), probabilities) == {0, 1}
    assert drawn(Sampling(temp=1, top_p=5e-324), probabilities) == {0}
    assert drawn(Sampling(temp=1, top_p=1), probabilities) == {0, 1, 2, 3}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_a_low_temperature_is_nearly_greedy_in_every_type(dtype: mx.Dtype) -> None:
    """The inverse of 1e-6 overflows in 16 bits, that of 1e-39 in 32: every token would be as likely."""
    for temp in (1e-6, 2e-5, 1e-39, 1e-300):
        sample = Sampling(temp=temp).sampler()
        logprobs = mx.log(mx.array([[0.1, 0.2, 0.6, 0.1]])).astype(dtype)
        assert {int(sample(logprobs).item()) for _ in range(50)} == {2}


def test_the_penalty_is_on_the_last_tokens() -> None:
    (process,) = Sampling(repetition_penalty=2.0).processors()
    logits = process(mx.array([3, 3, 1]), mx.array([[1.0, 1.0, 1.0, -1.0]]))
    assert logits.tolist() == [[1.0, 0.5, 1.0, -2.0]]
    assert Sampling().processors() == []


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"temp": -1}, "temp must be 0 or more"),
        ({"temp": float("nan")}, "temp must be"),
        ({"temp": float("inf")}, "temp must be"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"repetition_penalty": 0}, "repetition_penalty must be positive"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
    ],
)
def test_values_out_of_range_are_refused(value: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Sampling(**value)


def test_the_checkpoints_defaults_count_where_nothing_is_given(random_llama: Path, copy_of: Any) -> None:
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    checkpoint = with_defaults(random_llama, copy_of, **own)
    values = {"temp": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    assert sampling_for(checkpoint) == (Sampling(**values), values)
    found, from_file = sampling_for(checkpoint, temp=None, top_p=0.5, seed=3)
    assert found == Sampling(**(values | {"top_p": 0.5, "seed": 3})) and "top_p" not in from_file
    # Greedy was asked for: what the file says of sampling does not apply, its penalty does.
    assert sampling_for(checkpoint, temp=0) == (Sampling(repetition_penalty=1.1), {"repetition_penalty": 1.1})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),  # without do_sample transformers is greedy
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"do_sample": True}, {"temp": 1.0}),
        ({"do_sample": True, "temperature": None, "top_k": 50, "top_p": 1.0}, {"temp": 1.0, "top_k": 50}),
        ({"do_sample": True, "top_k": 50.0}, {"temp": 1.0, "top_k": 50}),
        ({"do_sample": True, "top_k": 2048}, {"temp": 1.0}),  # all tokens
        ({"do_sample": True, "temperature": 0, "top_p": 0.9}, {}),
    ],
)
def test_only_what_the_file_says_counts(
    random_llama: Path, copy_of: Any, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert sampling_for(with_defaults(random_llama, copy_of, **config)) == (Sampling(**expected), expected)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number, at most 100, got 'hot'"),
        ({"do_sample": True, "top_p": 2.0}, r"top_p must be in \(0, 1\], got 2.0"),
        ({"do_sample": True, "top_k": 1.5}, "top_k must be an integer, got 1.5"),
        ({"do_sample": True, "temperature": 10**400}, "temperature must be a number, at most 100, got 1000"),
        ({"do_sample": "yes"}, "do_sample must be true or false, got 'yes'"),
        ({"repetition_penalty": True}, "repetition_penalty must be a number"),
    ],
)
def test_a_file_with_wrong_values_is_refused_by_name(
    random_llama: Path, copy_of: Any, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=rf"generation_config.json: {says}"):
        sampling_for(with_defaults(random_llama, copy_of, **config))


def test_a_value_that_is_given_replaces_a_wrong_one(random_llama: Path, copy_of: Any) -> None:
    checkpoint = with_defaults(random_llama, copy_of, do_sample=True, top_p=2.0)
    assert sampling_for(checkpoint, top_p=0.9, temp=0.5)[0] == Sampling(temp=0.5, top_p=0.9)


def test_settings_name_what_an_answer_depends_on() -> None:
    assert Sampling().settings() == {"temp": 0.0, "top_p": 1.0, "seed": None}
    assert Sampling(temp=1, min_p=0.1, seed=2).settings() == {"temp": 1, "top_p": 1.0, "min_p": 0.1, "seed": 2}
