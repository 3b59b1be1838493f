"""The recipe of a fine-tuning run: the paper's presets, every value of a run, the rope settings to learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from ..errors import UsageError, check_option
from ..rope_config import RopeConfig
from ..rope_types import PREFIX
from ..scaling import SCALINGS, check_context, factor_for, named_rope, new_rope

# Source: arXiv 2403.00071, section 5.2 (length, steps), with sheryc/resonance_rope `llama_finetuning/train.sh`
# (warm-up, factor); 64 sequences a step are YaRN's global batch (arXiv 2309.00071, section 4.1). `paper-4k` is for
# either model: the 13B one takes a factor of 4.
_PAPER = {"rope": "resonance_yarn", "batch_size": 1, "accumulate": 64}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper-7b": _PAPER | {"length": 32768, "steps": 50, "warmup": 2, "factor": 8.0},
        "paper-13b": _PAPER | {"length": 16384, "steps": 100, "warmup": 2, "factor": 4.0},
        "paper-4k": _PAPER | {"length": 4096, "steps": 400, "warmup": 2, "factor": 8.0},
    }
)
FULL, LORA = "full", "lora"
LARGEST = {"batch_size": 2**16, "accumulate": 2**16, "lora_rank": 2**16}  # others: what MLX counts with


@dataclass(frozen=True)
class Recipe:
    """Every value that decides a run, besides model, rope settings and data.

    Args:
        length: tokens of a sequence.
        steps: updates of the weights.
        warmup: of these, the steps in which the learning rate rises; None for a twentieth.
        learning_rate: the peak; it rises linearly and falls linearly to 0.
        beta_1, beta_2, weight_decay: of AdamW, with bias correction.
        batch_size: sequences that go through the model at once.
        accumulate: batches of a step.
        fine_tune_type: `full` trains the weights, `lora` low-rank changes of them; both in float32.
        lora_rank, lora_scale: of every linear layer's change, as in mlx-lm.
        num_layers: train only the last N layers; None for all (and the embedding, where `full`).
        grad_checkpoint: activation checkpointing.
        seed: of the order of documents and sequences, and of the initial low-rank changes.

    Raises:
        UsageError: a value is out of range.

    Source: the defaults are those of jquesnelle/yarn `finetune.py`, betas and weight decay of `deepspeed/zero3.json`;
        rank and scale mlx-lm's.
    """

    length: int
    steps: int = 400
    warmup: int | None = None
    learning_rate: float = 2e-5
    beta_1: float = 0.9
    beta_2: float = 0.95
    weight_decay: float = 0.0
    batch_size: int = 1
    accumulate: int = 8
    fine_tune_type: str = FULL
    lora_rank: int = 8
    lora_scale: float = 20.0
    num_layers: int | None = None
    grad_checkpoint: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup is None:
            object.__setattr__(self, "warmup", self.steps // 20)
        check_option(
            "fine_tune_type", self.fine_tune_type in (FULL, LORA), f"{FULL} or {LORA}", repr(self.fine_tune_type)
        )
        least = {"length": 2, "steps": 1, "warmup": 0, "batch_size": 1, "accumulate": 1, "lora_rank": 1, "seed": 0}
        for name, low in least.items():
            value, high = getattr(self, name), LARGEST.get(name, 2**31 - 1)
            check_option(name, low <= value <= high, f"in [{low}, {high}]", value)
        check_option("warmup", self.rise < self.steps, f"less than the {self.steps} steps", self.warmup)
        check_option("num_layers", self.num_layers is None or self.num_layers >= 1, "at least 1", self.num_layers)
        for name, limit in {"learning_rate": 1, "beta_1": 1, "beta_2": 1, "lora_scale": 10_000}.items():
            value = getattr(self, name)
            check_option(name, 0 < value < limit, f"in (0, {limit})", value)
        check_option("weight_decay", 0 <= self.weight_decay < 1, "in [0, 1)", self.weight_decay)

    @property
    def rise(self) -> int:
        """Steps of the warm-up."""
        return self.warmup or 0

    @property
    def lora(self) -> bool:
        """Whether low-rank changes are trained instead of the weights."""
        return self.fine_tune_type == LORA

    @property
    def lora_parameters(self) -> dict[str, Any]:
        """In mlx-lm's format."""
        return {"rank": self.lora_rank, "scale": self.lora_scale, "dropout": 0.0}


def choose(
    source: RopeConfig,
    preset: str | None = None,
    rope: str | None = None,
    factor: float | None = None,
    original_max_position_embeddings: int | None = None,
    **changes: Any,
) -> tuple[RopeConfig, Recipe]:
    """Rope settings and recipe from a preset and the changes to it.

    Args:
        source: the checkpoint's rope settings.
        preset: a key of `PRESETS`; None for the defaults of `Recipe` and the checkpoint's rope settings and context.
        rope, factor, original_max_position_embeddings: as in `rope_for`.
        changes: fields of `Recipe`; None for the preset's value.

    Raises:
        UsageError: an argument is out of range, or the length exceeds the context.
    """
    check_option("preset", preset is None or preset in PRESETS, f"one of {', '.join(PRESETS)}", repr(preset))
    values = dict(PRESETS[preset] if preset else {})
    if rope is not None and rope.removeprefix(PREFIX) not in SCALINGS:
        values.pop("factor", None)
    given = changes | {"rope": rope, "factor": factor}
    values |= {name: value for name, value in given.items() if value is not None}
    after = rope_for(source, values.pop("rope", None), values.pop("factor", None), original_max_position_embeddings)
    known = [entry.name for entry in fields(Recipe)]
    for name in set(values).difference(known):
        raise UsageError(f"a recipe has no {name}: it has {', '.join(known)}")
    context = after.context_length
    if "length" not in values and context is None:
        raise UsageError("config.json has no context length", remedies=[{"length": None}])
    recipe = Recipe(**({"length": context} | values))
    if context is not None and recipe.length > max(context, after.length_if_unscaled or 0):
        longer = None if after.window == context else factor_for(after, recipe.length)
        scaling = after.rope_type if after.base_type in SCALINGS else PREFIX + "yarn"
        raise UsageError(
            f"length {recipe.length} exceeds the context of {context} tokens with rope type {after.rope_type}",
            remedies=[*([{"rope": scaling, "factor": longer}] if longer else []), {"length": context}],
        )
    check_context(after, recipe.length)  # warns where config.json does not say which context it states
    return after, recipe


def rope_for(source: RopeConfig, rope: str | None, factor: float | None, original: int | None) -> RopeConfig:
    """The rope settings to train with.

    Args:
        source: the checkpoint's own.
        rope: a type, after `resonance_` to round its wavelengths; None keeps the checkpoint's.
        factor, original: of the scaling, as in `new_rope`.

    Raises:
        UsageError: the arguments contradict each other or the source.
    """
    if rope is None:
        return new_rope(source, None, factor, original, source.is_resonant)
    base = rope.removeprefix(PREFIX)
    if base == source.base_type and factor is None and original is None:
        return new_rope(source, None, None, None, base != rope)
    if base == "default":
        raise UsageError(
            f"rope type {rope} has no scaling: it takes no factor, and the checkpoint must have none "
            f"(its type is {source.rope_type})",
            option="rope",
        )
    return named_rope(source, rope, factor, original)
