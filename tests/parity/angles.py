"""The angles of transformers' models, by their config.json."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

TYPES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "granite": "Granite",
    "smollm3": "SmolLM3",
}  # fmt: skip
LENGTH = 3000  # tokens: more than the context before scaling


def of_transformers(config: dict[str, Any]) -> list[np.ndarray]:
    """Radians per token within the trained context and at `LENGTH`, each with the attention scale at its end.

    Raises whatever transformers does, or ValueError where its attention would: a rotation of a part of the head.
    """
    kind = config["model_type"]
    settings = AutoConfig.for_model(**copy.deepcopy(config))
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    rotary = getattr(module, f"{TYPES[kind]}RotaryEmbedding")(settings)
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    found = []
    for length in (16, LENGTH):
        cos, sin = rotary(torch.zeros(1), torch.tensor([[0, length - 1]]))
        if cos.shape[-1] != head_dim:
            raise ValueError("a part of the head")
        if not (torch.isfinite(cos).all() and torch.isfinite(sin).all()):
            raise ValueError("not finite")
        found.append(np.append(rotary.inv_freq.double().numpy(), rotary.attention_scaling))
    return found
