"""Random checkpoints of every supported architecture, with any rope settings, whose logits depend on positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance import RopeConfig

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import granite, llama, qwen2, qwen3, smollm3

from .checkpoints import STDLIB_LLAMA

ORIGINAL, FACTOR, LENGTH = 64, 8, 300
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 2048, "tie_word_embeddings": True,
    "max_position_embeddings": ORIGINAL * FACTOR,
}  # fmt: skip
GRANITE = {
    "logits_scaling": 2.0, "attention_multiplier": 0.25, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
MODELS = {
    "llama": (llama, {}),
    "mistral": (llama, {}),
    "qwen2": (qwen2, {}),
    "qwen3": (qwen3, {}),
    "smollm3": (smollm3, {}),
    "granite": (granite, GRANITE),
}


def random_rope(seed: int) -> RopeConfig:
    """Any rope type with any of its options, rounded or not."""
    draw = np.random.default_rng(seed)

    def some(**options: list[Any]) -> dict[str, Any]:
        return {name: values[draw.integers(len(values))] for name, values in options.items() if draw.random() < 0.6}

    original = {"factor": float(FACTOR), "original_max_position_embeddings": ORIGINAL}
    yarn = some(beta_fast=[8, 32], beta_slow=[1, 2], truncate=[True, False]) | some(attention_factor=[0.9, 1.2])
    if "attention_factor" not in yarn:
        yarn |= {"mscale": 1.0, "mscale_all_dim": 0.5} if draw.random() < 0.3 else {}
    longrope = {name: draw.uniform(1, 4, 8).round(3).tolist() for name in ("short_factor", "long_factor")}
    kinds = {
        "default": {},
        "linear": {"factor": 4.0},
        "ntk": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "yarn": original | yarn,
        "llama3": original | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": original | longrope,
    }
    name = list(kinds)[seed % len(kinds)]
    return RopeConfig(
        dims=16,
        rope_type=draw.choice(["", "resonance_"]) + name,
        base=float(draw.choice([10000.0, 500000.0, 1e6])),
        max_position_embeddings=ORIGINAL * FACTOR,
        parameters=kinds[name],
    )


def make(folder: Path, kind: str, rope: RopeConfig, style: str) -> Path:
    """A random checkpoint whose logits depend on positions, with the tokenizer of stdlib-llama."""
    file, extra = MODELS[kind]
    config = {"model_type": kind} | SIZES | extra
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STDLIB_LLAMA / name, folder / name)
    mx.random.seed(1)
    model = file.Model(file.ModelArgs.from_dict(config | {"rope_theta": rope.base}))
    weights = {name: mx.random.normal(value.shape) * 0.2 for name, value in tree_flatten(model.parameters())}
    weights |= {name: 1 + 0.1 * value for name, value in weights.items() if name.endswith("norm.weight")}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config | rope.to_hf(style)))
    return folder
