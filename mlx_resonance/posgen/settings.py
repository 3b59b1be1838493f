"""PosGen's settings and presets, and its rotary encodings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from ..errors import UsageError, check_option
from ..frequencies import (
    RotaryFrequencies,
    default_frequencies,
    linear_frequencies,
    ntk_frequencies,
    yarn_frequencies,
)

BASES = ("rope", "linear", "ntk", "yarn")
ENCODINGS = (*BASES, *(f"resonance_{base}" for base in BASES))
OFFICIAL_SEEDS = (5549, 4955, 42, 3701, 49)
DROPOUT_KEYS = 1024  # draws of dropout that a step may use; it needs 2 + 4·layers
MOST_STEPS = 2**32 // DROPOUT_KEYS  # keys are uint32
MOST_SEEDS = 1000
LONGEST = 2**13  # digits of a test row; attention takes memory for their square


class Reading(NamedTuple):
    """How trained weights are read: an encoding, and for YaRN the tokens over which its ramp counts turns.

    Without a ramp, that number is 0.
    """

    encoding: str
    ramp: int = 0

    def __str__(self) -> str:
        return f"{self.encoding}/{self.ramp}" if self.ramp else self.encoding


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the decoder.

    Args:
        layers: number of layers, each self-attention and a feed-forward.
        hidden_size: features of the residual stream.
        heads: number of attention heads.
        head_dim: features of a head, all of them rotated; even.
        intermediate_size: features inside the feed-forward.
        dropout: rate of dropout on embeddings, attention weights and residual branches, inside the feed-forward and
            after the last norm.
        train_feed_forward: whether the feed-forward is trained (the official code leaves it at its initial values).
        ordered: how much of the digits' initial embeddings says their order; the rest of 1 is random. With 0, digits
            start as different from their neighbours as from all others.
    """

    layers: int
    hidden_size: int
    heads: int
    head_dim: int
    intermediate_size: int
    dropout: float = 0.0
    train_feed_forward: bool = True
    ordered: float = 0.0


class Stage(NamedTuple):
    """Steps before the first epoch, on rows that are easier; a step has as many tokens as later, so more rows.

    Attributes:
        length: digits of a row.
        steps: number of steps.
        largest: 0 for the beginnings of training rows. Otherwise the rows are random digits, and the answers are what
            the rule gives: small digits have sums that are easy to learn, and no token follows from the one before,
            so that the far tokens are needed.
        least: a row's digits are from a to b, b being drawn from `least` to `largest` (and below the modulus), and a
            from 0 to b - 4, since the smallest and the largest sums of any digits are rare.
    """

    length: int
    steps: int
    largest: int = 0
    least: int = 1


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides its task, encoding and seed.

    Args:
        model: shape of the decoder.
        split: `official` or `disjoint`, see `make_splits`.
        sizes: rows of training, validation and test.
        train_length, test_length: digits of a training row, and of a validation or test row, which is longer.
        epochs: passes over the training rows.
        batch_size: rows of a step.
        learning_rate: the peak of the one-cycle schedule of the epochs; the curriculum is trained at the
            peak, after its rise.
        weight_decay: AdamW's.
        beta_2: AdamW's; with a smaller one, a step adapts sooner to gradients that have grown.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them, as the official code does.
        validate_every: steps between two validations; another one follows the last step.
        train_scaled: scale the frequencies in training, too, not only in validation and test.
        ramps: tokens over which YaRN's ramp counts turns; the same weights are read with each of them.
        base, beta_fast, beta_slow: of the rotary embedding, as in `yarn_frequencies`.
        generated_rows: test rows that are also generated freely.
        curriculum: stages before the first epoch.
        random_rows: rows of a step of the epochs beside those of `batch_size`, of random digits as in the last stage:
            training rows alone may teach the shortcut, which these do not have.
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
    beta_2: float = 0.999
    max_grad_norm: float | None = None
    train_length: int = 64
    test_length: int = 256
    train_scaled: bool = False
    ramps: tuple[int, ...] = (65,)
    base: float = 10000.0
    beta_fast: float = 2.0
    beta_slow: float = 1.0
    curriculum: tuple[Stage, ...] = ()
    random_rows: int = 0

    def __post_init__(self) -> None:
        most = (MOST_STEPS - self.curriculum_steps) // max(1, self.steps_per_epoch)
        check_option("epochs", 1 <= self.epochs <= most, f"at least 1 and at most {most}", self.epochs)
        if self.random_rows and not (self.curriculum and self.curriculum[-1].largest):
            raise UsageError("random_rows are like those of the last stage, which must have random digits")
        if self.test_length <= self.train_length:
            raise UsageError(
                f"the test length must be more than the training length {self.train_length}, got {self.test_length}",
                option="length",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of one epoch; the last one may have fewer rows."""
        return -(-self.sizes[0] // self.batch_size)

    @property
    def curriculum_steps(self) -> int:
        """Number of steps before the first epoch."""
        return sum(stage.steps for stage in self.curriculum)

    @property
    def steps(self) -> int:
        """Number of steps of the training."""
        return self.curriculum_steps + self.epochs * self.steps_per_epoch

    @property
    def factor(self) -> float:
        """How many times the context grows, with [EOS]."""
        return (self.test_length + 1) / (self.train_length + 1)

    def readings(self, encodings: Iterable[str]) -> tuple[Reading, ...]:
        """Encodings with the ramps that they are read with.

        Raises:
            UsageError: an unknown encoding.
        """
        found: list[Reading] = []
        for encoding in encodings:
            check_option("encoding", encoding in ENCODINGS, f"one of {', '.join(ENCODINGS)}", repr(encoding))
            found += [Reading(encoding, ramp) for ramp in (self.ramps if encoding.endswith("yarn") else (0,))]
        return tuple(found)

    def frequencies(self, reading: Reading, scaled: bool) -> RotaryFrequencies:
        """The rotary frequencies of a reading, scaled to the test length or not."""
        encoding, ramp = reading
        base = encoding.removeprefix("resonance_")
        dims = self.model.head_dim
        if base == "rope" or not scaled:
            result = default_frequencies(dims, self.base)
        elif base == "linear":
            result = linear_frequencies(dims, self.base, self.factor)
        elif base == "ntk":
            result = ntk_frequencies(dims, self.base, self.factor)
        else:
            result = yarn_frequencies(dims, self.base, self.factor, ramp, self.beta_fast, self.beta_slow)
        return result.resonate() if encoding != base else result

    def training(self, reading: Reading) -> Reading:
        """The reading whose training gives this one's weights: unscaled, several readings share one training."""
        if self.train_scaled:
            return reading
        return Reading("resonance_rope" if reading.encoding.startswith("resonance_") else "rope")


T5_SMALL = ModelConfig(layers=6, hidden_size=512, heads=8, head_dim=64, intermediate_size=2048, dropout=0.1)

# What the official code runs: sheryc/resonance_rope, configs/experiment/sweep.yaml, custom_decoder.py.
OFFICIAL = Settings(
    model=replace(T5_SMALL, train_feed_forward=False),
    split="official",
    sizes=(10000, 1000, 1000),
    epochs=150,
    batch_size=128,
    learning_rate=2e-4,
    validate_every=2 * 79,
    generated_rows=1000,
    ramps=(257, 65),
)
PRESETS = {
    "official": OFFICIAL,
    # The same with a smaller decoder, all of it trained, and fewer epochs at a higher rate: hours on a CPU become half
    # an hour.
    "official-small": replace(
        OFFICIAL,
        model=ModelConfig(layers=4, hidden_size=128, heads=2, head_dim=64, intermediate_size=512),
        sizes=(10000, 100, 250),
        epochs=40,
        batch_size=64,
        learning_rate=1e-3,
        validate_every=5 * 157,
        generated_rows=20,
    ),
    # What the paper says: two layers, all trained, no seed in two parts of the data, scaled in training.
    "paper": replace(
        OFFICIAL,
        model=replace(T5_SMALL, layers=2),
        split="disjoint",
        train_scaled=True,
        ramps=(65,),
    ),
    # Rows of small random digits first, in which the window is found, then larger ones little by little, since many
    # new sums at once make it forget the window; the sums are learned beside the training rows.
    "learned": Settings(
        model=ModelConfig(layers=4, hidden_size=128, heads=2, head_dim=64, intermediate_size=512, ordered=0.9),
        split="disjoint",
        sizes=(10000, 100, 250),
        epochs=4,
        batch_size=8,
        random_rows=8,
        learning_rate=8e-4,
        beta_2=0.99,
        max_grad_norm=1.0,
        validate_every=2000,
        generated_rows=20,
        ramps=(65, 257),
        curriculum=(
            Stage(16, 200, largest=4),
            Stage(64, 600, largest=4),
            *(Stage(64, 100, largest, least=4) for largest in range(6, 17, 2)),
        ),
    ),
    # Short rows first: for the tokens that follow from the last ones (`near` of `Task.kinds`).
    "shortcut": Settings(
        model=ModelConfig(layers=2, hidden_size=128, heads=2, head_dim=64, intermediate_size=512, ordered=0.7),
        split="disjoint",
        sizes=(10000, 100, 250),
        epochs=1,
        batch_size=16,
        learning_rate=2e-3,
        beta_2=0.98,
        max_grad_norm=1.0,
        validate_every=900,
        generated_rows=20,
        ramps=(65, 257),
        curriculum=(Stage(24, 400), Stage(64, 800)),
    ),
    # The paper's data and lengths in one to four minutes on a CPU; not every seed learns them.
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
    # Takes seconds and learns nothing: for tests of the machinery.
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
        ramps=(13,),
    ),
}


def settings_from(values: dict[str, Any]) -> Settings:
    """The settings of which these are `dataclasses.asdict`, also after JSON."""
    tuples = {name: tuple(values[name]) for name in ("sizes", "ramps")}
    tuples["curriculum"] = tuple(Stage(*stage) for stage in values["curriculum"])
    return Settings(**values | tuples | {"model": ModelConfig(**values["model"])})


def sweep_seeds(count: int) -> tuple[int, ...]:
    """The paper's five seeds, then 1, 2, 3 … without them.

    Raises:
        UsageError: `count` is not in [1, 1000].
    """
    check_option("seeds", 1 <= count <= MOST_SEEDS, f"at least 1 and at most {MOST_SEEDS}", count)
    others = (seed for seed in range(1, MOST_SEEDS + 1) if seed not in OFFICIAL_SEEDS)
    return tuple(islice((*OFFICIAL_SEEDS, *others), count))
