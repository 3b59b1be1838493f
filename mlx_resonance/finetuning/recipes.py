"""How a checkpoint is fine-tuned: the paper's recipes, every value of a run, the rope settings that it learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from ..rope_config import MAKERS, PREFIX, RopeConfig
from ..scaling import SCALINGS, new_rope

# Source: arXiv 2403.00071, section 5.2 (length, steps), with sheryc/resonance_rope `llama_finetuning/train.sh`
# (warm-up, factor); 64 sequences a step are YaRN's global batch (arXiv 2309.00071, section 4.1). `paper-4k` is for
# either model: the 13B one wants --factor 4.
_PAPER = {"rope": "resonance_yarn", "batch_size": 1, "accumulate": 64}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper-7b": _PAPER | {"length": 32768, "steps": 50, "warmup": 2, "factor": 8.0},
        "paper-13b": _PAPER | {"length": 16384, "steps": 100, "warmup": 2, "factor": 4.0},
        "paper-4k": _PAPER | {"length": 4096, "steps": 400, "warmup": 2, "factor": 8.0},
    }
)
TYPES = ("full", "lora")
LARGEST = {"batch_size": 2**16, "accumulate": 2**16, "lora_rank": 2**16}  # of others, what MLX counts with


@dataclass(frozen=True)
class Recipe:
    """Every value that decides a run, besides model, rope settings and data.

    Args:
        length: tokens of a sequence.
        steps: updates of the weights.
        warmup: of them, those in which the learning rate rises; None for a twentieth.
        learning_rate: the highest; it rises linearly and falls linearly to 0.
        beta_1, beta_2, weight_decay: of AdamW, with bias correction.
        batch_size: sequences that go through the model at once.
        accumulate: how often they do so in a step.
        fine_tune_type: `full` trains the weights, in float32; `lora` trains low-rank changes of them, in float32.
        lora_rank, lora_scale: of every linear layer's change, as mlx-lm has them.
        num_layers: train only so many layers, the last ones; None for all (and the embedding, where `full`).
        grad_checkpoint: compute activations again instead of keeping them.
        seed: of the order of documents and sequences, and of the first low-rank changes.

    Raises:
        ValueError: a value is out of range.

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
    fine_tune_type: str = "full"
    lora_rank: int = 8
    lora_scale: float = 20.0
    num_layers: int | None = None
    grad_checkpoint: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup is None:
            object.__setattr__(self, "warmup", self.steps // 20)
        if self.fine_tune_type not in TYPES:
            raise ValueError(f"[finetune] fine_tune_type must be {' or '.join(TYPES)}, got {self.fine_tune_type!r}")
        least = {"length": 2, "steps": 1, "warmup": 0, "batch_size": 1, "accumulate": 1, "lora_rank": 1, "seed": 0}
        for name, low in least.items():
            most = LARGEST.get(name, 2**31 - 1)
            if not low <= getattr(self, name) <= most:
                raise ValueError(f"[finetune] {name} must lie in [{low}, {most}], got {getattr(self, name)}")
        if self.rise >= self.steps:
            raise ValueError(f"[finetune] warmup must be shorter than the {self.steps} steps, got {self.warmup}")
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError(f"[finetune] num_layers must be at least 1, got {self.num_layers}")
        ranges = {"learning_rate": (0, 1), "beta_1": (0, 1), "beta_2": (0, 1), "lora_scale": (0, 1e4)}
        for name, (low, high) in ranges.items():
            if not low < getattr(self, name) < high:
                raise ValueError(f"[finetune] {name} must lie in ({low}, {high:g}), got {getattr(self, name)}")
        if not 0 <= self.weight_decay < 1:
            raise ValueError(f"[finetune] weight_decay must lie in [0, 1), got {self.weight_decay}")

    @property
    def rise(self) -> int:
        """Steps of the warm-up."""
        return self.warmup or 0

    @property
    def lora(self) -> bool:
        """Whether low-rank changes are trained, not the weights."""
        return self.fine_tune_type == "lora"

    @property
    def lora_parameters(self) -> dict[str, Any]:
        """As mlx-lm has them."""
        return {"rank": self.lora_rank, "scale": self.lora_scale, "dropout": 0.0}


def choose(
    source: RopeConfig,
    preset: str | None = None,
    rope: str | None = None,
    factor: float | None = None,
    original_max_position_embeddings: int | None = None,
    **changes: Any,
) -> tuple[RopeConfig, Recipe]:
    """Rope settings and recipe from a preset and what is given beside it.

    Args:
        source: the checkpoint's rope settings.
        preset: a key of `PRESETS`; None for the defaults of `Recipe` and the checkpoint's rope settings and length.
        rope, factor, original_max_position_embeddings: as in `rope_for`.
        changes: fields of `Recipe`; None for the preset's value.

    Raises:
        ValueError: an argument is wrong, or the length is longer than the context.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"[finetune] preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    values = dict(PRESETS[preset] if preset else {})
    if rope is not None and rope.removeprefix(PREFIX) not in SCALINGS:
        values.pop("factor", None)
    given = changes | {"rope": rope, "factor": factor}
    values |= {name: value for name, value in given.items() if value is not None}
    after = rope_for(source, values.pop("rope", None), values.pop("factor", None), original_max_position_embeddings)
    known = {entry.name for entry in fields(Recipe)}
    for name in set(values) - known:
        raise ValueError(f"[finetune] {name} is no setting; settings are {', '.join(sorted(known))}")
    context = after.context_length
    if "length" not in values and context is None:
        raise ValueError("[finetune] config.json has no context length: give --length")
    recipe = Recipe(**({"length": context} | values))
    if context is not None and recipe.length > context:
        raise ValueError(
            f"[finetune] length {recipe.length} is longer than the context of {context} tokens that {after.rope_type} "
            "has here: give a larger --factor, or a shorter --length"
        )
    return after, recipe


def rope_for(source: RopeConfig, rope: str | None, factor: float | None, original: int | None) -> RopeConfig:
    """The rope settings to train with.

    Args:
        source: the checkpoint's own.
        rope: a type, with `resonance_` before it to round its wavelengths; None keeps the checkpoint's.
        factor: how many times the context grows.
        original: tokens of context before scaling; None for what the source says.

    Raises:
        ValueError: the arguments contradict each other or the source.
    """
    if rope is None:
        if factor is not None or original is not None:
            raise ValueError("[finetune] --factor and --original-max-position-embeddings need --rope")
        return source
    base, resonance = rope.removeprefix(PREFIX), rope.startswith(PREFIX)
    if base not in MAKERS:
        raise ValueError(f"[finetune] unknown rope type {rope!r}; known: {', '.join(MAKERS)}, each also {PREFIX}…")
    try:
        if base == source.base_type and factor is None and original is None:
            return new_rope(source, None, None, None, resonance)
        if base == "default" and source.base_type == "default":
            raise ValueError(f"[finetune] --rope {rope} scales nothing: it takes neither factor nor original length")
        return new_rope(source, base, factor, original, resonance)
    except ValueError as error:
        raise ValueError(str(error).replace("[convert]", "[finetune]")) from None
