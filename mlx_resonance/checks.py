"""What a checkpoint must be like: its config.json against the names of its tensors, before any weight is read."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import mlx.nn as nn

from . import llama
from .config import RopeConfig
from .files import TensorInfo, read_config, read_header, weight_files

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
# mlx-lm's modes, the bits and the group sizes of each.
QUANTIZATIONS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
FALSE_IS_NONE = ("quantization_config", "sliding_window")
COUNTS = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "head_dim", "sliding_window",
}  # fmt: skip


def check_checkpoint(folder: Path, rope: RopeConfig | None = None) -> dict[str, Any]:
    """Everything about a checkpoint that can be checked without reading its weights.

    Args:
        folder: with config.json and model*.safetensors.
        rope: other rope settings than those of config.json.

    Returns:
        config.json, as `check_config` gives it.

    Raises:
        FileNotFoundError: config.json or a weight file is missing.
        ValueError: one of them cannot be right.
    """
    config = read_config(folder)
    return check_config(config, unite({file.name: read_header(file) for file in weight_files(folder)}), rope)


def unite(files: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, str]:
    """Which file holds a tensor. Raises ValueError where two do."""
    place: dict[str, str] = {}
    for file, tensors in files.items():
        for name in tensors:
            if name in place:
                raise ValueError(f"[load] {name} is in {place[name]} and in {file}: it must be in one of them")
            place[name] = file
    return place


def check_config(config: dict[str, Any], tensors: Collection[str], rope: RopeConfig | None = None) -> dict[str, Any]:
    """Compare config.json with what a model needs, and with the names of the tensors.

    Args:
        config: the whole object.
        tensors: names.
        rope: other rope settings than those of config.json; their context is that of the windows' check.

    Returns:
        config, with `tie_word_embeddings` as the weights have it where it does not say.

    Raises:
        ValueError: it cannot be right.
    """
    kind = config["model_type"]
    if kind not in SUPPORTED:
        raise ValueError(f"[load] model_type {kind!r}: supported are {', '.join(SUPPORTED)}")
    _, args_class = model_classes(config)
    for entry in fields(args_class):
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and entry.name not in ("rope", "rope_theta") and config.get(entry.name) is None:
            raise ValueError(f"[load] config.json has no {entry.name}, which a {kind} model needs")
    if config.get("hidden_act") not in (None, "silu"):
        raise ValueError(f"[load] hidden_act = {config['hidden_act']!r}: the models here have silu")
    # What is false, 0 or empty here is not there; mlx-lm and transformers each see something else in it.
    config = config | {key: config[key] or None for key in ("quantization", *FALSE_IS_NONE) if key in config}
    _check_counts(config, tensors)
    _check_quantization(config.get("quantization"), tensors)
    own = RopeConfig.from_hf(config)
    _check_window(config, rope or own)
    if "model.norm.weight" not in tensors:
        raise ValueError("[load] the weights have no model.norm.weight, which every model here has")
    return {"tie_word_embeddings": "lm_head.weight" not in tensors} | config


def _check_quantization(settings: Any, tensors: Collection[str]) -> None:
    """Refuse what MLX would not refuse in one line, or not at all: it divides by a group size of 0."""
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise ValueError(f"[load] quantization must be an object, got {settings!r:.80}")
    common = {key: settings[key] for key in ("group_size", "bits", "mode") if key in settings}
    for layer, own in [("", {}), *((key, value) for key, value in settings.items() if key not in common)]:
        if own is True or (own is False and f"{layer}.scales" not in tensors):
            continue
        values = {"mode": "affine"} | common | own if isinstance(own, dict) else {}
        bits, sizes = QUANTIZATIONS.get(str(values.get("mode")), ((), ()))
        right = type(values.get("bits")) is int and type(values.get("group_size")) is int
        if not right or values["bits"] not in bits or values["group_size"] not in sizes or len(values) > 3:
            where = f" of {layer}" if layer else ""
            raise ValueError(
                f"[load] quantization{where}: expected mlx-lm's bits, group_size, mode, got {own or settings!r:.60}"
            )


def _check_counts(config: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Refuse numbers of heads and layers that no model has, before one is built."""
    for key in COUNTS & set(config):
        value = config[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31):
            raise ValueError(f"[load] {key} must be a positive integer, got {value!r}")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"[load] num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}")
    if config.get("head_dim") is None and width % heads:
        raise ValueError(f"[load] hidden_size = {width} is no multiple of num_attention_heads = {heads}")
    layers = {int(found[1]) for name in tensors if (found := re.match(r"model\.layers\.([0-9]{1,9})\.", name))}
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ValueError(f"[load] layer_types must be a list of names, got {kinds!r:.80}")
    counts = {"num_hidden_layers": config["num_hidden_layers"]} | ({} if kinds is None else {"layer_types": len(kinds)})
    for key, count in counts.items():
        if count != len(layers) or layers != set(range(len(layers))):
            raise ValueError(f"[load] config.json says {key} of {count} layers, the weights have {len(layers)}")


def _check_window(config: Mapping[str, Any], rope: RopeConfig) -> None:
    """Refuse attention windows that the model would not keep to."""
    window, kinds = config.get("sliding_window"), set(config.get("layer_types") or ())
    if config["model_type"].startswith("qwen") and not config.get("use_sliding_window"):
        window, kinds = None, set()
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"[load] layer_types {', '.join(sorted(map(str, kinds)))}: only full and sliding attention")
    if is_ours(config) and kinds == {"sliding_attention"}:
        raise ValueError("[load] layer_types has no full_attention: a model here needs one such layer")
    windows_kept = is_ours(config) and kinds == {"full_attention", "sliding_attention"}
    if window and not windows_kept and window < (rope.context_length or 0):
        raise ValueError(
            f"[load] sliding_window = {window} is shorter than the context of {rope.context_length} tokens: "
            f"a {config['model_type']} model here attends to all of it"
        )


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether the architecture is that of `mlx_resonance.llama`."""
    return config["model_type"] in ("llama", "mistral")


def model_classes(config: Mapping[str, Any]) -> tuple[type[nn.Module], type]:
    """Model and arguments class of a supported `model_type`: ours, or mlx-lm's."""
    if is_ours(config):
        return llama.Model, llama.ModelArgs
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    return module.Model, module.ModelArgs
