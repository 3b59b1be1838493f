"""config.json from the metadata of a GGUF file, as llama.cpp reads it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mlx_resonance.errors import UsageError
from mlx_resonance.rope_types import LONGEST

from .gguf_rope import rope_settings

# Architectures of GGUF, each with its model_type and class in transformers. A Mistral is a llama here.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
INTERLEAVED = {"llama"}  # architectures whose rotation pairs neighbouring features
NO_EFFECT = {"expert_used_count", "rope.scaling.finetuned", "tensor_data_layout", "vocab_size"}
QUANTIZATION_VERSION = 2  # of the blocks that the gguf package dequantizes


class Fields:
    """The metadata of an architecture: values by key, of the right kind; remembers which were asked for."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata, self._prefix = metadata, architecture + "."
        self._asked = set(NO_EFFECT)

    def name(self, key: str) -> str:
        """The whole key."""
        return self._prefix + key

    def get(self, key: str) -> Any:
        """A value; None if there is none."""
        self._asked.add(key)
        return self._metadata.get(self.name(key))

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; of a list, one for each layer, the one that all have in common."""
        value = self.get(key)
        if isinstance(value, list) and value:
            if any(entry != value[0] for entry in value):
                raise UsageError(f"{self.name(key)} differs by layer: {value!s:.80}; one for all is supported")
            value = value[0]
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < LONGEST:
            raise self.wrong(key, "a positive integer below 2**31", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(key, "a finite number", value)
        return value

    def wrong(self, key: str, wanted: str, value: Any) -> UsageError:
        """An error that names a key, what it must be, and its value."""
        if value is None:
            return UsageError(f"{self.name(key)} is missing: expected {wanted}")
        return UsageError(f"{self.name(key)} must be {wanted}, got {value!r:.80}")

    def check_rest(self) -> None:
        """Refuse keys that were not asked for, unless they are 0 or false: they may change what a model computes."""
        for name, value in self._metadata.items():
            key = name.removeprefix(self._prefix)
            if key != name and key not in self._asked and (isinstance(value, (str, list)) or value):
                raise UsageError(f"{name} = {value!r:.80} is not supported: it may change what the model computes")


def config_of(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The config.json of a GGUF file.

    Args:
        metadata: of the file, or of the first one of a split set.
        shapes: of all tensors, by their names in the file.
        factors: as `read_factors` returns them.

    Raises:
        UsageError: no model here does what the metadata asks for, or the metadata is contradictory.
    """
    architecture = architecture_of(metadata)
    fields = Fields(metadata, architecture)
    experts = fields.get("expert_count")
    if experts:
        raise UsageError(f"{fields.name('expert_count')} = {experts!r:.80}: mixtures of experts are not supported")
    heads = fields.count("attention.head_count")
    hidden, layers = fields.count("embedding_length"), fields.count("block_count")
    kind, model_class = ARCHITECTURES[architecture]
    config: dict[str, Any] = {
        "architectures": [model_class], "model_type": kind, "hidden_act": "silu", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_key_value_heads": fields.count("attention.head_count_kv", heads),
        "head_dim": _head_dim(fields, hidden, heads), "vocab_size": _vocabulary(fields, shapes, hidden),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
    }  # fmt: skip
    if kind == "llama":
        config |= {"attention_bias": _has_bias(shapes, "attn_"), "mlp_bias": _has_bias(shapes, "ffn_")}
    config |= _window(fields, kind)
    config |= rope_settings(fields, config["head_dim"], factors)
    for name in ("bos", "eos"):
        key, rows = f"tokenizer.ggml.{name}_token_id", config["vocab_size"]
        if (number := metadata.get(key)) is not None:
            if type(number) is not int or not 0 <= number < rows:
                raise UsageError(f"{key} must be an id in [0, {rows}), got {number!r:.80}")
            config[f"{name}_token_id"] = number
    if fields.get("attention.causal") is False:
        raise UsageError(f"{fields.name('attention.causal')} is false: models must predict the next token")
    fields.check_rest()
    return config


def architecture_of(metadata: Mapping[str, Any]) -> str:
    """The architecture of a model. Raises UsageError if it is not one of `ARCHITECTURES`, or the file not a model's."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UsageError(f"general.type = {kind!r:.80}: expected a model")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"general.architecture = {architecture!r:.80} is not supported; supported are {known}")
    version = metadata.get("general.quantization_version", QUANTIZATION_VERSION)
    if version != QUANTIZATION_VERSION:
        raise UsageError(f"general.quantization_version must be {QUANTIZATION_VERSION}, got {version!r:.80}")
    return architecture


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    """Features of a head, all of which are rotated."""
    if fields.get("attention.key_length") is None and hidden % heads:
        what = f"{fields.name('embedding_length')} = {hidden}"
        raise UsageError(f"{what} is not a multiple of {fields.name('attention.head_count')} = {heads}")
    head_dim = fields.count("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (length := fields.count(key, head_dim)) != head_dim:
            raise UsageError(f"{fields.name(key)} = {length}: expected {head_dim}, the length of a head's keys")
    return head_dim


def _vocabulary(fields: Fields, shapes: Mapping[str, tuple[int, ...]], hidden: int) -> int:
    shape = shapes.get("token_embd.weight")
    if shape is None:
        raise UsageError("token_embd.weight is missing: every model has it")
    if len(shape) != 2 or shape[1] != hidden:
        raise UsageError(f"token_embd.weight has shape {shape}: expected rows of {hidden}, the embedding_length")
    if (stated := fields.count("vocab_size", shape[0])) != shape[0]:
        raise UsageError(f"{fields.name('vocab_size')} = {stated}, but token_embd.weight has {shape[0]} rows")
    return shape[0]


def _has_bias(names: Collection[str], part: str) -> bool:
    return any(name.startswith("blk.") and f".{part}" in name and name.endswith(".bias") for name in names)


def _window(fields: Fields, kind: str) -> dict[str, Any]:
    """The window of attention: of a llama it makes a Mistral."""
    if not fields.get("attention.sliding_window"):
        return {}
    window = {"sliding_window": fields.count("attention.sliding_window")}
    if kind == "llama":
        return window | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return window | {"use_sliding_window": True, "max_window_layers": 0}
