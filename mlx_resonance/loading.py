"""Where a checkpoint becomes a model: load(), and install() for mlx-lm's own models and commands."""

from __future__ import annotations

import glob
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.models import rope_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import llama
from .checks import check_checkpoint, is_ours, model_classes
from .config import PREFIX, RopeConfig
from .files import TOKENIZER_PATTERNS, TOKENIZERS, WEIGHTS, has_tokenizer, read_config, read_json, resolve
from .rope import ResonanceRoPE
from .scaling import rescale

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")


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
    config = check_checkpoint(folder, rope)
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
