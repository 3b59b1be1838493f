"""Parameters of every kind of RoPE scaling, and config.json with them in both styles."""

from __future__ import annotations

from typing import Any

import pytest

YARN = {"factor": 8.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONGROPE = {
    "short_factor": [1.0] * 32,
    "long_factor": [4.0] * 32,
    "original_max_position_embeddings": 4096,
    "factor": 8.0,
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": YARN | {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.1, "truncate": False},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
}
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 32768}


def style4(**scaling: Any) -> dict[str, Any]:
    """config.json as transformers 4 writes it."""
    return SIZES | {"rope_theta": 500000.0, "rope_scaling": scaling}


def style5(**parameters: Any) -> dict[str, Any]:
    """config.json as transformers 5 writes it."""
    return SIZES | {"rope_parameters": {"rope_theta": 500000.0} | parameters}


both_styles = pytest.mark.parametrize("config", [style4, style5], ids=["4", "5"])
