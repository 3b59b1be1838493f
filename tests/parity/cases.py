"""The checkpoints on which runtimes are compared: one tiny random LLaMA per rope setting, as transformers saves it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 6000
VOCABULARY = 128
STYLES = ("4", "5")


@dataclass(frozen=True)
class Case:
    """A rope setting, and the shape of the model that carries it.

    Args:
        name: for tables and test ids.
        rope: `rope_parameters` of transformers 5.
        shape: other keys of config.json; the cases share out what a LLaMA may have.
        max_position_embeddings: tokens of context.
    """

    name: str
    rope: dict[str, Any]
    shape: dict[str, Any] = field(default_factory=dict)
    max_position_embeddings: int = 8192


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 1024}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
WIDE_HEADS = {"head_dim": 48}
TIED = {"tie_word_embeddings": True}
BIAS = {"attention_bias": True}

CASES = [
    Case("default, base 10000", {"rope_type": "default", "rope_theta": 10000.0}),
    Case("default, base 500000", {"rope_type": "default", "rope_theta": 500000.0}, GQA),
    Case("linear", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, TIED),
    Case("dynamic", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, BIAS, max_position_embeddings=2048),
    Case("yarn", YARN, GQA | TIED),
    Case("yarn, attention_factor", YARN | {"attention_factor": 0.8}, WIDE_HEADS),
    Case("yarn, truncate false", YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2}, BIAS),
    Case("yarn, mscale", YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, TIED | BIAS),
    Case(
        "llama3",
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        WIDE_HEADS | BIAS,
    ),
    Case(
        "longrope",
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 32 for i in range(16)],
            "long_factor": [1.0 + i / 2 for i in range(16)],
            "factor": 8.0,
            "original_max_position_embeddings": 1024,
        },
    ),
]


def tokens(length: int = LENGTH) -> np.ndarray:
    """The text: random token ids."""
    return np.random.default_rng(0).integers(0, VOCABULARY, length)


def save_with_transformers(case: Case, folder: Path) -> None:
    """Save a random model with the case's rope setting, in the style of transformers 5.

    Weights are ten times larger than a new model's, so that attention is sharp and the logits depend on positions.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=case.max_position_embeddings,
        rope_parameters=dict(case.rope),
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        **{**sizes, "tie_word_embeddings": False, **case.shape},
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # new ones are 0
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)


def use_style(folder: Path, style: str) -> None:
    """Rewrite config.json in the keys of transformers 4, or leave those of transformers 5."""
    if style == "5":
        return
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    path.write_text(json.dumps(config))


def transformers_logits(folder: Path, length: int = LENGTH) -> np.ndarray:
    """Logits of transformers, float32, shape (length, VOCABULARY)."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens(length))[None], use_cache=False).logits[0].numpy()


def compare(logits: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Largest error as a part of the largest logit, and the part of positions with the same arg max."""
    error = np.abs(logits - reference).max() / np.abs(reference).max()
    return float(error), float(np.mean(logits.argmax(-1) == reference.argmax(-1)))
