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
from ..validation import QUANTIZATIONS
from .positions import check_skips

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
BITS, GROUP_SIZE = 4, 64  # mlx-lm's defaults
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
        q_bits, q_group_size, q_mode: for `lora`, of the weights to quantize as they are read, as in `convert`; all None
            to leave them as they are.
        lora_rank, lora_scale: of every linear layer's change, as in mlx-lm.
        num_layers: train only the last N layers; None for all (and the embedding, where `full`).
        grad_checkpoint: activation checkpointing: less memory, a third more time.
        skip_positions: draw the positions of each sequence from the whole context: see `positions`.
        mask_prompt: of chats, train on the assistant's turns only; None for yes. False: on every token.
        seed: of the order of documents and sequences, of the skipped positions, and of the initial low-rank changes.

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
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str | None = None
    lora_rank: int = 8
    lora_scale: float = 20.0
    num_layers: int | None = None
    grad_checkpoint: bool = True
    skip_positions: bool = False
    mask_prompt: bool | None = None
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
        self._check_quantization()

    def _check_quantization(self) -> None:
        mode, given = self.q_mode, {"q_bits": self.q_bits, "q_group_size": self.q_group_size}
        given = {name: value for name, value in given.items() if value is not None}
        check_option("q_mode", mode is None or mode in QUANTIZATIONS, f"one of {', '.join(QUANTIZATIONS)}", mode)
        for name, allowed in zip(("q_bits", "q_group_size"), QUANTIZATIONS["affine"], strict=True):
            value = given.get(name)
            check_option(name, value is None or value in allowed, f"one of {', '.join(map(str, allowed))}", value)
        if mode not in (None, "affine"):
            for name, value in given.items():
                raise UsageError(f"{name} = {value}: q_mode {mode} has its own, leave it out", option=name)
        if self.q_group_size is not None and not self.quantization:
            raise UsageError(
                f"q_group_size = {self.q_group_size} is a setting of quantization", remedies=[{"q_bits": BITS}]
            )
        if self.quantization and not self.lora:
            option = "q_bits" if self.q_bits is not None else "q_mode"
            raise UsageError(
                f"{option} = {getattr(self, option)} quantizes the weights: only LoRA trains those",
                remedies=[{"fine_tune_type": LORA}],
            )

    @property
    def rise(self) -> int:
        """Steps of the warm-up."""
        return self.warmup or 0

    @property
    def lora(self) -> bool:
        """Whether low-rank changes are trained instead of the weights."""
        return self.fine_tune_type == LORA

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How to quantize the weights: mx.quantize's group_size, bits and mode; None to leave them as they are."""
        if self.q_bits is None and self.q_mode is None:
            return None
        mode = self.q_mode or "affine"
        if mode == "affine":
            return {"group_size": self.q_group_size or GROUP_SIZE, "bits": self.q_bits or BITS, "mode": mode}
        (bits,), (group_size,) = QUANTIZATIONS[mode]
        return {"group_size": group_size, "bits": bits, "mode": mode}

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
    quantized: bool = False,
    **changes: Any,
) -> tuple[RopeConfig, Recipe]:
    """Rope settings and recipe from a preset and the changes to it.

    Args:
        source: the checkpoint's rope settings.
        preset: a key of `PRESETS`; None for the defaults of `Recipe` and the checkpoint's rope settings and context.
        rope, factor, original_max_position_embeddings: as in `rope_for`.
        quantized: whether the checkpoint is; LoRA is then the default, as with q_bits and q_mode.
        changes: fields of `Recipe`; None for the preset's value.

    Raises:
        UsageError: an argument is out of range, or the length exceeds the context, or is all of it where positions are
            to be skipped.
    """
    check_option("preset", preset is None or preset in PRESETS, f"one of {', '.join(PRESETS)}", repr(preset))
    values = dict(PRESETS[preset] if preset else {})
    if rope is not None and rope.removeprefix(PREFIX) not in SCALINGS:
        values.pop("factor", None)
    given = changes | {"rope": rope, "factor": factor}
    values |= {name: value for name, value in given.items() if value is not None}
    after = rope_for(source, values.pop("rope", None), values.pop("factor", None), original_max_position_embeddings)
    if quantized or {"q_bits", "q_mode"} & values.keys():
        values.setdefault("fine_tune_type", LORA)
    known = [entry.name for entry in fields(Recipe)]
    for name in set(values).difference(known):
        raise UsageError(f"a recipe has no {name}: it has {', '.join(known)}")
    context = after.context_length
    length = after.trained_length if values.get("skip_positions") else context
    if "length" not in values and length is None:
        raise UsageError("config.json has no context length", remedies=[{"length": None}])
    recipe = Recipe(**({"length": length} | values))
    for name in ("lora_rank", "lora_scale"):
        if not recipe.lora and changes.get(name) is not None:
            what = f"{name} = {changes[name]} is a setting of LoRA, and all weights are trained"
            raise UsageError(what, remedies=[{"fine_tune_type": LORA}])
    if recipe.skip_positions:
        check_skips(recipe.length, after)
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
