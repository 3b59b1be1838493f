"""LLaMAs with random weights, for the benchmarks that need a model of some size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_resonance
from mlx_resonance import Checkpoint
from mlx_resonance.tokenizer import copy_tokenizer

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

TINY = Path(mlx_resonance.__file__).parent / "assets" / "stdlib-llama"  # the checkpoint of the package


def make(
    folder: Path, hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
    dtype: mx.Dtype, tied: bool = True, q_bits: int | None = None, **settings: Any,
) -> Path:  # fmt: skip
    """Write a checkpoint of these sizes, with the tokenizer of the package's and 16 384 tokens of context.

    `q_bits` quantizes it; `settings` are further keys of config.json.
    """
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 16384, "tie_word_embeddings": tied,
    } | settings  # fmt: skip
    mx.random.seed(0)  # the same weights every time: of random ones, some have two tokens that are equally likely
    model = Checkpoint.of(folder.name, folder, config, {}).build()
    model.set_dtype(dtype)
    if q_bits is not None:
        config["quantization"] = {"group_size": 64, "bits": q_bits}
        nn.quantize(model, **config["quantization"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    copy_tokenizer(TINY, folder)
    return folder
