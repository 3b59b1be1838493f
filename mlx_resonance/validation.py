"""Check a checkpoint's config.json against the names of its tensors, before any weight is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from . import _mlx_lm
from .config_values import check_values
from .errors import UsageError

if TYPE_CHECKING:
    import mlx.nn as nn

logger = logging.getLogger("mlx_resonance")

# Each model_type in config.json, and mlx-lm's model file that runs it.
SUPPORTED: Mapping[str, str] = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "granite": "granite",
    "smollm3": "smollm3",
}  # fmt: skip
# mlx-lm's quantization modes, each with its bits and group sizes.
QUANTIZATIONS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
# transformers' defaults of keys that mlx-lm needs and that are not sizes.
DEFAULTS: Mapping[str, Any] = {
    "rms_norm_eps": 1e-6, "head_dim": 128, "attention_bias": False, "mlp_bias": False, "logits_scaling": 1.0,
    "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
}  # fmt: skip
WINDOWS: Mapping[str, int] = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096}  # where there is no sliding_window
FOUND_ELSEWHERE = {"rope_theta", "max_position_embeddings", "tie_word_embeddings"}  # transformers has defaults
FALSE_IS_NONE = ("quantization_config", "sliding_window")


def check_config(config: dict[str, Any], tensors: Collection[str] | None) -> dict[str, Any]:
    """Check config.json against what a model needs, and against the names of the tensors.

    Args:
        config: the whole object.
        tensors: their names; None to check config.json alone, without the weights.

    Returns:
        config, without values that count as absent.

    Raises:
        UsageError: config.json cannot be right.
    """
    kind = config["model_type"]
    if kind not in SUPPORTED:
        raise UsageError(f"model_type {kind!r} is not supported; supported are {', '.join(SUPPORTED)}")
    _, args_class = model_classes(config)
    # A false, 0 or empty value counts as absent here; mlx-lm and transformers each take it to mean something else.
    config = config | {key: config[key] or None for key in ("quantization", *FALSE_IS_NONE) if key in config}
    config = without_leftover(config)
    config = _with_defaults(config, args_class)
    check_values(config)
    _check_rotating_layers(config)
    if tensors is not None:
        _check_prefix(tensors)
        _check_layers(config, tensors)
    config = _without_layer_types(config)
    method = config.get("quantization_config")
    if method and not config.get("quantization"):
        if not isinstance(method, Mapping) or not isinstance(method.get("quant_method"), str):
            raise UsageError(f"quantization_config must be an object with a quant_method, got {method!r:.80}")
    if tensors is None:
        return config
    _check_quantization(config.get("quantization"), tensors)
    if "model.norm.weight" not in tensors:
        raise UsageError("the weights have no model.norm.weight, which every supported model has")
    return config


def _with_defaults(config: dict[str, Any], args_class: Any) -> dict[str, Any]:
    """config.json with transformers' default for a key that mlx-lm needs, where it is no size."""
    kind, needed = config["model_type"], {}
    for entry in fields(args_class):
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and entry.name not in FOUND_ELSEWHERE and config.get(entry.name) is None:
            if entry.name not in DEFAULTS or entry.name in config:
                raise UsageError(f"config.json has no {entry.name}, which a {kind} model needs")
            needed[entry.name] = DEFAULTS[entry.name]
            logger.warning(
                f"config.json has no {entry.name}: {needed[entry.name]} is assumed, as in transformers' {kind}"
            )
    return config | needed


def _without_layer_types(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without what says that layers of a LLaMA or a Mistral differ: in transformers they do not.

    mlx-lm would give each its own attention.
    """
    kind, kinds = config["model_type"], config.get("layer_types")
    if kind not in ("llama", "mistral") or kinds is None or set(kinds) == {"full_attention"}:
        return config
    logger.warning(f"layer_types = {', '.join(dict.fromkeys(kinds))} is ignored, as in transformers' {kind}")
    return config | {"layer_types": None} | ({"sliding_window": None} if kind == "llama" else {})


def without_leftover(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without a `quantization_config` of bitsandbytes that says the weights are not quantized."""
    found = config.get("quantization_config")
    if isinstance(found, Mapping) and found.get("quant_method", "bitsandbytes") == "bitsandbytes":
        switches = [value for key, value in found.items() if key.endswith(("load_in_4bit", "load_in_8bit"))]
        if switches and not any(switches):
            return config | {"quantization_config": None}
    return config


def _check_prefix(tensors: Collection[str]) -> None:
    """Refuse weights of a model that is a part of another one, or that were saved without their model."""
    if any(name.startswith("model.layers.") for name in tensors):
        return
    for name in sorted(tensors):
        if found := re.match(r"(.*?)(layers|h|blocks?)\.[0-9]+\.", name):
            has = f"begin with {found[1]!r}" if found[1] else "have no prefix"
            raise UsageError(f"the weights' names {has}, as {name}: expected 'model.', as in model.layers.0")


def _check_quantization(settings: Any, tensors: Collection[str]) -> None:
    """Refuse settings that MLX refuses in many lines, or not at all: it divides by a group size of 0."""
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise UsageError(f"quantization must be an object, got {settings!r:.80}")
    common = {key: settings[key] for key in ("group_size", "bits", "mode") if key in settings}
    for layer, own in [("", {}), *((key, value) for key, value in settings.items() if key not in common)]:
        if own is True or (own is False and f"{layer}.scales" not in tensors):
            continue
        values = {"mode": "affine"} | common | own if isinstance(own, dict) else {}
        bits, sizes = QUANTIZATIONS.get(str(values.get("mode")), ((), ()))
        right = type(values.get("bits")) is int and type(values.get("group_size")) is int
        if not right or values["bits"] not in bits or values["group_size"] not in sizes or len(values) > 3:
            where = f" of {layer}" if layer else ""
            raise UsageError(
                f"quantization{where}: expected mlx-lm's bits, group_size, mode, got {own or settings!r:.60}"
            )


def _check_rotating_layers(config: Mapping[str, Any]) -> None:
    """Refuse what cannot say which layers of a SmolLM 3 rotate."""
    if config["model_type"] != "smollm3":
        return
    rotates, count = config.get("no_rope_layers"), config["num_hidden_layers"]
    right = isinstance(rotates, list) and len(rotates) == count and all(value in (0, 1) for value in rotates)
    if rotates is not None and not right:
        raise UsageError(f"no_rope_layers must be a list of {count} numbers, each 1 or 0, got {rotates!r:.80}")


def _check_layers(config: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Refuse numbers of layers that differ from the weights'."""
    layers = {int(found[1]) for name in tensors if (found := re.match(r"model\.layers\.([0-9]{1,9})\.", name))}
    kinds = config.get("layer_types")
    counts = {"num_hidden_layers": config["num_hidden_layers"]} | ({} if kinds is None else {"layer_types": len(kinds)})
    for key, count in counts.items():
        if count != len(layers) or layers != set(range(len(layers))):
            raise UsageError(f"config.json's {key} says {count} layers, but the weights have {len(layers)}")


def attention_window(config: Mapping[str, Any]) -> int | None:
    """The window that the model was made for where the one here attends to all tokens; None if they do the same.

    Raises:
        UsageError: `layer_types` has kinds of attention that no model here has.
    """
    kind, kinds = config["model_type"], set(config.get("layer_types") or ())
    window = config.get("sliding_window", WINDOWS.get(kind))
    if kind in ("llama", "granite"):  # these have no windows in transformers
        return None
    if kind in ("qwen2", "qwen3", "smollm3") and not config.get("use_sliding_window"):
        window, kinds = None, set()
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise UsageError(f"layer_types {', '.join(sorted(map(str, kinds)))}: expected full or sliding attention")
    if kind == "smollm3" and kinds == {"sliding_attention"}:
        raise UsageError("layer_types has no full_attention: at least one such layer is needed")
    kept = kind == "smollm3" and kinds == {"full_attention", "sliding_attention"}
    # Qwen's windows begin in this layer, unless layer_types says which layers have one.
    first = config.get("max_window_layers") if kind in ("qwen2", "qwen3") and not kinds else None
    unused = kinds == {"full_attention"} or (isinstance(first, int) and first >= config["num_hidden_layers"])
    return None if kept or unused else window


def model_classes(config: Mapping[str, Any]) -> tuple[type[nn.Module], Any]:
    """mlx-lm's model class and arguments class for a supported `model_type`."""
    return _mlx_lm.model_classes(SUPPORTED[config["model_type"]])


# What mlx-lm says of tensors that do not fit, in many lines, and what that means.
MISFITS: Mapping[str, str] = {
    r"Missing (\d+) parameters: (\S+?)[,.]?(?:\s|$)": "the weights lack {1}, which config.json asks for ({0} in all)",
    r"Received (\d+) parameters not in model: (\S+?)[,.]?(?:\s|$)": "{1} is in the weights, but config.json does not "
    "ask for it ({0} in all)",
    r"Expected shape (\(.*?\)) but received shape (\(.*?\)) for parameter (\S+?)\.?$": "{2} has shape {1}, config.json "
    "asks for {0}",
}


def in_a_line(error: Exception) -> str:
    """An error of mlx-lm's in a line, which names the tensor where one is wrong."""
    text = " ".join(str(error).split()) or type(error).__name__
    for pattern, meaning in MISFITS.items():
        if found := re.match(pattern, text):
            return meaning.format(*found.groups())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
