"""How the next token is chosen: mlx-lm's samplers and logits processors, and a checkpoint's own defaults for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..checkpoint import Checkpoint
from ..errors import UsageError, check_option
from ..files import MAX_CONFIG, read_json

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
GENERATION_CONFIG = "generation_config.json"
# transformers' names in generation_config.json, and its value where the file asks to sample and does not say.
KEYS = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
LEAST_P, LEAST_TEMP = 1e-6, 1e-6
LARGEST = {"temp": 100, "repetition_penalty": 100}  # in the file; of flags, too
PENALTY_CONTEXT = 20  # tokens that a penalty looks back at, as in mlx-lm


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from their probabilities.

    Args:
        temp: temperature; 0 for the most likely token.
        top_p: total probability, in (0, 1], of the tokens to sample from.
        top_k: number of tokens to sample from; 0 for all.
        min_p: probability, relative to the most likely token's, that a token must have.
        repetition_penalty: divides the logits of tokens in the last 20; 1 for none.
        seed: of MLX's random numbers; None leaves their state as it is.

    Raises:
        UsageError: a value is out of range.
    """

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_option("temp", 0 <= self.temp < math.inf, "0 or more", self.temp)
        check_option("top_p", 0 < self.top_p <= 1, "in (0, 1]", self.top_p)
        check_option("top_k", 0 <= self.top_k < 2**31, "0 or more", self.top_k)
        check_option("min_p", 0 <= self.min_p <= 1, "in [0, 1]", self.min_p)
        penalty = self.repetition_penalty
        check_option("repetition_penalty", 0 < penalty < math.inf, "positive", penalty)
        check_option("seed", self.seed is None or 0 <= self.seed < 2**64, "in [0, 2**64)", self.seed)

    def check(self, vocabulary: int) -> None:
        """Raise UsageError if more tokens are to be kept than the vocabulary has."""
        check_option("top_k", self.top_k < vocabulary, f"less than the vocabulary of {vocabulary:,} tokens", self.top_k)

    def sampler(self) -> Sampler:
        """mlx-lm's sampler. It gets log-probabilities in 32 bits: divided by a low temperature, 16 bits overflow."""
        top_p = max(self.top_p, LEAST_P) if self.top_p < 1 else 0.0  # 0, or what 32 bits round to it, is no limit
        temp = self.temp if self.temp >= LEAST_TEMP else 0.0  # its inverse would be infinite in 32 bits
        sample = make_sampler(temp=temp, top_p=top_p, top_k=self.top_k, min_p=self.min_p)
        return sample if temp == 0 else lambda logprobs: sample(logprobs.astype(mx.float32))

    def processors(self) -> list[LogitsProcessor]:
        """mlx-lm's logits processors."""
        if self.repetition_penalty == 1:
            return []
        return make_logits_processors(
            repetition_penalty=self.repetition_penalty, repetition_context_size=PENALTY_CONTEXT
        )

    def settings(self) -> dict[str, Any]:
        """What an answer depends on, for the header of a run log: values that do nothing are left out."""
        always = ("temp", "top_p", "seed")
        return {
            entry.name: value
            for entry in fields(self)
            if (value := getattr(self, entry.name)) != entry.default or entry.name in always
        }


def sampling_for(checkpoint: Checkpoint, **given: Any) -> tuple[Sampling, dict[str, Any]]:
    """How to sample from a checkpoint: as given, and where a value is None, as its generation_config.json says.

    Args:
        checkpoint: an opened one.
        given: arguments of `Sampling`, None for those that were not given.

    Returns:
        The sampling, and the values in it that come from the file.

    Raises:
        UsageError: a value is out of range, or the file is not what it should be.
    """
    known = {name: value for name, value in given.items() if value is not None}
    own = {name: value for name, value in own_defaults(checkpoint).items() if name not in known}
    if known.get("temp") == 0:  # greedy: the other values of the file are for sampling
        own = {name: value for name, value in own.items() if name == "repetition_penalty"}
    try:
        Sampling(**own)
    except UsageError as error:
        where = f"{checkpoint.folder / GENERATION_CONFIG}: {error.message}"
        raise UsageError(where, remedies=[{error.option or "temp": None}]) from None
    sampling = Sampling(**(own | known))
    sampling.check(checkpoint.config["vocab_size"])
    return sampling, own


def own_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sampling that generation_config.json asks for, under the names of `Sampling`; only what differs from none.

    A file that does not say `do_sample` is for greedy answers, as in transformers; only its penalty counts.
    """
    path = checkpoint.folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    config = read_json(path, MAX_CONFIG)
    if config.get("do_sample") not in (None, True, False):
        raise UsageError(f"{path}: do_sample must be true or false, got {config['do_sample']!r:.40}")
    keys = {"repetition_penalty": "repetition_penalty"} | (KEYS if config.get("do_sample") is True else {})
    found = {name: config[key] for name, key in keys.items() if config.get(key) is not None}
    if config.get("do_sample") is True:
        found = {"temp": 1.0} | found
    for name, value in found.items():
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = found[name] = int(value)
        kind: Any = int if name == "top_k" else (int, float)
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or (name in LARGEST and value > LARGEST[name]):
            wanted = "an integer" if name == "top_k" else f"a number, at most {LARGEST.get(name, 1)}"
            raise UsageError(f"{path}: {keys[name]} must be {wanted}, got {value!r:.40}", remedies=[{name: None}])
    if found.get("temp") == 0:
        found = {name: value for name, value in found.items() if name == "repetition_penalty"}
    if found.get("top_k", 0) >= checkpoint.config["vocab_size"]:
        del found["top_k"]  # all tokens, as in transformers
    defaults = Sampling()
    return {name: value for name, value in found.items() if value != getattr(defaults, name)}
