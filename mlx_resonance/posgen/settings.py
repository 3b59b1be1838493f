"""PosGen's settings: what a run depends on besides its task and seed, the presets, and the rotary encodings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ..frequencies import (
    RotaryFrequencies,
    default_frequencies,
    linear_frequencies,
    ntk_frequencies,
    yarn_frequencies,
)
from .model import ModelConfig

BASES = ("rope", "linear", "ntk", "yarn")
ENCODINGS = (*BASES, *(f"resonance_{base}" for base in BASES))
OFFICIAL_SEEDS = (5549, 4955, 42, 3701, 49)
DROPOUT_KEYS = 1024  # numbers that a step may use for dropout, once for each of 2 + 4·layers
MOST_STEPS = 2**32 // DROPOUT_KEYS  # they are uint32
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides its task, encoding and seed.

    Args:
        model: shape of the decoder.
        split: `official` or `disjoint`, see `make_splits`.
        sizes: rows of training, validation and test.
        train_length, test_length: digits of a training row, and of a longer one to validate and test on.
        epochs: passes over the training rows.
        batch_size: rows of a step.
        learning_rate: the highest one of the one-cycle schedule.
        weight_decay: AdamW's.
        validate_every: steps between two validations; the last step is followed by one, too.
        train_scaled: train with the scaled frequencies, too, not only evaluate with them.
        original_max_position_embeddings: tokens that YaRN's ramp counts turns in.
        base, beta_fast, beta_slow: of the rotary embedding, as in `yarn_frequencies`.
        generated_rows: test rows that are also generated freely.
    """

    model: ModelConfig
    split: str
    sizes: tuple[int, int, int]
    epochs: int
    batch_size: int
    learning_rate: float
    validate_every: int
    generated_rows: int
    weight_decay: float = 0.01
    train_length: int = 64
    test_length: int = 256
    train_scaled: bool = False
    original_max_position_embeddings: int = 65
    base: float = 10000.0
    beta_fast: float = 2.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"[posgen] epochs must be at least 1, got {self.epochs}")
        if self.steps > MOST_STEPS:
            most = MOST_STEPS // self.steps_per_epoch
            raise ValueError(f"[posgen] epochs must be at most {most}, got {self.epochs}")
        if self.test_length <= self.train_length:
            raise ValueError(
                f"[posgen] the test length must be more than the training length {self.train_length}, "
                f"got {self.test_length}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass; the last one may have fewer rows."""
        return -(-self.sizes[0] // self.batch_size)

    @property
    def steps(self) -> int:
        """Steps of the training."""
        return self.epochs * self.steps_per_epoch

    @property
    def factor(self) -> float:
        """How many times the context grows, [EOS] counted in."""
        return (self.test_length + 1) / (self.train_length + 1)

    def frequencies(self, encoding: str, scaled: bool) -> RotaryFrequencies:
        """The rotary frequencies of an encoding, scaled to the test length or not.

        Raises:
            ValueError: an unknown encoding.
        """
        if encoding not in ENCODINGS:
            raise ValueError(f"[posgen] encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        base = encoding.removeprefix("resonance_")
        dims = self.model.head_dim
        if base == "rope" or not scaled:
            result = default_frequencies(dims, self.base)
        elif base == "linear":
            result = linear_frequencies(dims, self.base, self.factor)
        elif base == "ntk":
            result = ntk_frequencies(dims, self.base, self.factor)
        else:
            result = yarn_frequencies(
                dims, self.base, self.factor, self.original_max_position_embeddings, self.beta_fast, self.beta_slow
            )
        return result.resonate() if encoding != base else result

    def training_encoding(self, encoding: str) -> str:
        """The encoding whose training gives this one's weights: several share one where training is unscaled."""
        if self.train_scaled:
            return encoding
        return "resonance_rope" if encoding.startswith("resonance_") else "rope"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"model": vars(self.model), "sizes": list(self.sizes)}


T5_SMALL = ModelConfig(layers=6, hidden_size=512, heads=8, head_dim=64, intermediate_size=2048, dropout=0.1)

PRESETS = {
    # What the official code runs: sheryc/resonance_rope, configs/experiment/sweep.yaml, custom_decoder.py.
    "official": Settings(
        model=replace(T5_SMALL, train_feed_forward=False),
        split="official",
        sizes=(10000, 1000, 1000),
        epochs=150,
        batch_size=128,
        learning_rate=2e-4,
        validate_every=2 * 79,
        generated_rows=1000,
        original_max_position_embeddings=257,
    ),
    # What the paper says: two layers, all of it trained, seeds of their own for every split, scaled while training.
    "paper": Settings(
        model=replace(T5_SMALL, layers=2),
        split="disjoint",
        sizes=(10000, 1000, 1000),
        epochs=150,
        batch_size=128,
        learning_rate=2e-4,
        validate_every=2 * 79,
        generated_rows=1000,
        train_scaled=True,
    ),
    # The paper's data and lengths, a model that learns them in one to four minutes on a CPU.
    "laptop": Settings(
        model=ModelConfig(layers=2, hidden_size=64, heads=2, head_dim=64, intermediate_size=128),
        split="disjoint",
        sizes=(10000, 100, 500),
        epochs=4,
        batch_size=25,
        learning_rate=3e-3,
        validate_every=200,
        generated_rows=100,
    ),
    # Seconds: for tests of the machinery; it learns nothing.
    "smoke": Settings(
        model=ModelConfig(layers=1, hidden_size=16, heads=2, head_dim=8, intermediate_size=16, dropout=0.1),
        split="disjoint",
        sizes=(40, 4, 4),
        epochs=2,
        batch_size=16,
        learning_rate=1e-2,
        validate_every=2,
        generated_rows=2,
        train_length=12,
        test_length=24,
        original_max_position_embeddings=13,
    ),
}


def settings_from(values: dict[str, Any]) -> Settings:
    """The settings that `Settings.to_dict` gave."""
    return Settings(**values | {"model": ModelConfig(**values["model"]), "sizes": tuple(values["sizes"])})


def sweep_seeds(count: int) -> tuple[int, ...]:
    """The paper's five seeds, then 1, 2, 3 … without them.

    Raises:
        ValueError: `count` does not lie in [1, 1000].
    """
    if not 1 <= count <= MOST_SEEDS:
        raise ValueError(f"[posgen] --seeds must be at least 1 and at most {MOST_SEEDS}, got {count}")
    others = (seed for seed in range(1, MOST_SEEDS + 1) if seed not in OFFICIAL_SEEDS)
    return tuple(islice((*OFFICIAL_SEEDS, *others), count))
