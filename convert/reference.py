"""The logits of transformers for a converted checkpoint, where torch and transformers are installed."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from typing import Any

from mlx_resonance.checkpoint import ROPE_KEYS, Checkpoint
from mlx_resonance.float32 import in_float32
from mlx_resonance.tied_head import EMBEDDING, HEAD

import mlx.core as mx
import numpy as np

from .quantization import arguments_of
from .source import Source

TOKENS = 64
# Bytes of float32 weights, one model at a time: a quarter of the machine's. Of a larger model, the first layers.
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
NOT_IN_CONFIG = {*ROPE_KEYS, "quantization", "quantization_config", "dtype", "torch_dtype"}


def compare_logits(result: Source) -> dict[str, Any] | str:
    """Compare the logits of our model with those of transformers' for the same weights and wavelengths, in float32.

    transformers has no resonance types: its model is given the wavelengths. Weights that are quantized are given to it
    dequantized. Where MLX may use TF32, a process without it compares.

    Args:
        result: a folder in MLX's format.

    Returns:
        `error`, the largest as a part of the largest logit; `tokens`, `layers`; or why nothing was compared.
    """
    if find_spec("torch") is None or find_spec("transformers") is None:
        return "torch and transformers are not installed"
    checkpoint = result.checkpoint
    if checkpoint.config.get("rope_traditional"):
        return "transformers has no such rotation"
    layers = _layers_that_fit(checkpoint)
    if layers < 1:
        return f"a layer in float32 takes more than a quarter of the memory, {MEMORY / 1e9:.3g} GB"
    return in_float32(_compare, result, layers)


def _compare(result: Source, layers: int) -> dict[str, Any] | str:
    checkpoint = result.checkpoint
    tokens = np.random.default_rng(0).integers(0, checkpoint.config["vocab_size"], (1, TOKENS))
    model = checkpoint.load(lazy=True)
    model.model.layers = model.model.layers[:layers]
    model.set_dtype(mx.float32)
    ours = np.array(model(mx.array(tokens)))
    del model
    mx.clear_cache()
    try:
        theirs = _logits_of_transformers(result, layers, tokens)
    except Exception as error:  # whatever its checks of config.json raise
        return f"transformers cannot build it: {type(error).__name__}: {' '.join(str(error).split()):.200}"
    if not np.isfinite(theirs).all() and np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        return "they are not finite, in both"
    largest, off = float(np.abs(theirs).max()), float(np.abs(ours - theirs).max())
    part = 0.0 if off == 0 else off / largest if largest > 0 else math.inf
    part = part if math.isfinite(part) else 1e9  # JSON has no infinity
    return {"error": float(f"{part:.3g}"), "tokens": TOKENS, "layers": layers}


def _layers_that_fit(checkpoint: Checkpoint) -> int:
    """The number of layers that fit; 0 where not all kinds, with and without a window, are among them."""
    quantized = arguments_of(checkpoint.tensors, checkpoint.config.get("quantization"))
    each = {0: 0.0}
    for name, info in checkpoint.tensors.items():
        layer = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0
        elements = math.prod(info.shape) * (32 // quantized[name]["bits"] if name in quantized else 1)
        each[layer] = each.get(layer, 0.0) + 4 * elements
    sizes = np.cumsum([each[layer] for layer in sorted(each)])
    fit = int(np.searchsorted(sizes, MEMORY, side="right")) - 1
    kinds = checkpoint.config.get("layer_types") or []
    return fit if fit >= max((kinds.index(kind) + 1 for kind in set(kinds)), default=1) else 0


def _logits_of_transformers(result: Source, layers: int, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import torch
    import transformers

    config, rope = result.checkpoint.config, result.checkpoint.rope
    plain = {key: value for key, value in config.items() if key not in NOT_IN_CONFIG} | {"num_hidden_layers": layers}
    plain["pad_token_id"] = None  # transformers' default may be beyond the vocabulary, and no logit depends on it
    if plain.get("layer_types"):
        plain["layer_types"] = plain["layer_types"][:layers]
    settings = transformers.AutoConfig.for_model(plain.pop("model_type"), **plain)
    with torch.device("meta"):  # no memory: the weights are put in below
        model = transformers.AutoModelForCausalLM.from_config(
            settings, dtype=torch.float32, attn_implementation="eager"
        )
    weights = _float32_weights(result, layers)
    if config["tie_word_embeddings"]:
        weights[HEAD] = weights[EMBEDDING]
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, assign=True)
    frequencies = rope.frequencies(tokens.shape[1] if rope.depends_on_length else None)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq = torch.tensor(frequencies.inv_freq, dtype=torch.float32)
    rotary.attention_scaling = frequencies.attention_scale
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    return logits


def _float32_weights(result: Source, layers: int) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: np.array(result.read_float32(name))
        for name in result.groups
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
