"""Where a checkpoint becomes a model: load(), and install() for mlx-lm's own models and commands."""

from __future__ import annotations

import glob
import importlib
import logging
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.models import rope_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import llama
from .config import PREFIX, RopeConfig
from .files import (
    TOKENIZER_PATTERNS,
    TOKENIZERS,
    WEIGHTS,
    TensorInfo,
    has_tokenizer,
    read_config,
    read_header,
    read_json,
    resolve,
    weight_files,
)
from .rope import ResonanceRoPE
from .scaling import rescale

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
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


def load(
    path_or_hf_repo: str | Path,
    *,
    lazy: bool = False,
    revision: str | None = None,
    adapter_path: str | None = None,
    factor: float | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a checkpoint and its tokenizer, whatever the style of its config.json.

    Args:
        path_or_hf_repo: a folder, or the id of a model on the Hugging Face hub.
        lazy: leave the weights on disk until they are used.
        revision: branch, tag or commit on the hub.
        adapter_path: folder of LoRA adapters made by mlx-lm.
        factor: how many times the context before scaling, instead of what config.json says.

    Returns:
        model, tokenizer: for mlx-lm's generation, caches and samplers. LLaMA and Mistral are `mlx_resonance.llama`,
        other architectures mlx-lm's own.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: a config.json or a weight file that cannot be right.
    """
    folder = resolve(path_or_hf_repo, revision, [*TOKENIZER_PATTERNS, WEIGHTS])
    rope = None if factor is None else rescale(RopeConfig.from_hf(read_config(folder)), factor)
    model, config = load_model(folder, lazy=lazy, rope=rope)
    if adapter_path is not None:
        model = mlx_lm.utils.load_adapters(model, adapter_path)
        model.eval()
    return model, load_tokenizer(folder, config)


def load_model(folder: Path, *, lazy: bool = False, rope: RopeConfig | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Load the weights of a folder into a model that rotates as config.json says.

    Args:
        folder: with config.json and model*.safetensors.
        lazy: leave the weights on disk until they are used.
        rope: other rope settings than those of config.json.

    Returns:
        model, config: config.json with the rope keys of transformers 4, nothing left for mlx-lm to misread.

    Raises: as `load`.
    """
    if glob.escape(str(folder)) != str(folder):
        raise ValueError(f"[load] {folder}: mlx-lm does not find files in a folder with any of *?[ in its name")
    config = check_checkpoint(folder)
    rope = rope or RopeConfig.from_hf(config)
    config, for_mlx_lm = for_models(config, rope)
    cleared = dict.fromkeys(ROPE_KEYS)  # mlx-lm reads the file again: these must not come back
    try:
        model, _ = mlx_lm.utils.load_model(
            folder, lazy=lazy, model_config=cleared | for_mlx_lm, get_model_classes=model_classes
        )
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"[load] {folder} cannot be loaded: {type(error).__name__}: {error}") from None
    set_rope(model, rope)
    return model, config


def set_rope(model: nn.Module, rope: RopeConfig) -> None:
    """Have a model of `model_classes` rotate as `rope` says; its weights stay."""
    frequencies = rope.frequencies if rope.depends_on_length else rope.frequencies()
    module = ResonanceRoPE(frequencies, bool(model.layers[0].self_attn.rope.traditional))
    for layer in model.layers:
        layer.self_attn.rope = module
    if isinstance(model, llama.Model):  # it computes the angles once for all layers
        model.model.rope = module
    model.args.rope = rope


def for_models(config: Mapping[str, Any], rope: RopeConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json with rope settings in the keys of transformers 4, and what a model's arguments are made from."""
    plain = {key: value for key, value in config.items() if key not in ROPE_KEYS} | rope.to_hf("4")
    # mlx-lm's own classes get no scaling to interpret: `set_rope` replaces the module that they make.
    return plain, plain if is_ours(config) else plain | {"rope_scaling": None}


def load_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a folder, in mlx-lm's wrapper. Raises FileNotFoundError where there is none."""
    if not has_tokenizer(folder):
        raise FileNotFoundError(f"[load] {folder} has no tokenizer: expected one of {', '.join(TOKENIZERS)}")
    # It reads config.json too, and would warn of a rope type that it does not know but never uses.
    logging.getLogger("transformers.modeling_rope_utils").setLevel(logging.ERROR)
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    eos = generation.get("eos_token_id") or config.get("eos_token_id")
    try:
        no_code = {"trust_remote_code": False}  # transformers would ask whether to run it
        return mlx_lm.utils.load_tokenizer(folder, no_code, eos_token_ids=eos)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"[load] the tokenizer of {folder} cannot be loaded: {error}") from None


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Everything about a checkpoint that can be checked without reading its weights.

    Returns:
        config.json, as `check_config` gives it.

    Raises:
        FileNotFoundError: config.json or a weight file is missing.
        ValueError: one of them cannot be right.
    """
    config = read_config(folder)
    return check_config(config, unite({file.name: read_header(file) for file in weight_files(folder)}))


def unite(files: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, str]:
    """Which file holds a tensor. Raises ValueError where two do."""
    place: dict[str, str] = {}
    for file, tensors in files.items():
        for name in tensors:
            if name in place:
                raise ValueError(f"[load] {name} is in {place[name]} and in {file}: it must be in one of them")
            place[name] = file
    return place


def check_config(config: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """Compare config.json with what a model needs, and with the names of the tensors.

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
    _check_window(config, RopeConfig.from_hf(config))
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
    if kinds is not None and not isinstance(kinds, list):
        raise ValueError(f"[load] layer_types must be a list, got {kinds!r}")
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


def install() -> None:
    """Teach every mlx-lm model and command the resonance rope types.

    mlx-lm's models make their rotary modules with `initialize_rope(dims, base, traditional, scaling_config,
    max_position_embeddings)`; after this, that function answers `resonance_…` types with `ResonanceRoPE` and all
    others as before. Calling it again changes nothing.
    """
    original = rope_utils.initialize_rope
    if getattr(original, "resonance", False):
        return

    def initialize_rope(
        dims: int,
        base: float,
        traditional: bool,
        scaling_config: dict[str, Any] | None = None,
        max_position_embeddings: int | None = None,
    ) -> nn.Module:
        scaling = scaling_config or {}
        if not str(scaling.get("rope_type") or scaling.get("type")).startswith(PREFIX):
            return original(dims, base, traditional, scaling_config, max_position_embeddings)
        rope = RopeConfig.from_hf(
            {
                "head_dim": dims,
                "rope_theta": base,
                "rope_scaling": {key: value for key, value in scaling.items() if key != "partial_rotary_factor"},
                "max_position_embeddings": max_position_embeddings,
            }
        )
        return ResonanceRoPE(rope.frequencies if rope.depends_on_length else rope.frequencies(), traditional)

    initialize_rope.resonance = True  # type: ignore[attr-defined]
    rope_utils.initialize_rope = initialize_rope
    for name, module in list(sys.modules.items()):  # model files that imported the name before
        if name.startswith("mlx_lm.models.") and getattr(module, "initialize_rope", None) is original:
            module.initialize_rope = initialize_rope  # type: ignore[attr-defined]
