"""The sizes that determine how much memory a model needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .files import ITEM_SIZES, TensorInfo


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model, from config.json and the headers of its weight files.

    Args:
        weights: their bytes.
        layers, heads, head_dim, hidden, feed_forward, vocabulary: the model's.
        keys: number of key features per token and layer.
        item_size: bytes per number in the type that the model computes in.
    """

    weights: int
    layers: int
    heads: int
    head_dim: int
    hidden: int
    feed_forward: int
    vocabulary: int
    keys: int
    item_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Dimensions:
        """From config.json and the headers of the weight files."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            weights=sum(info.nbytes for info in tensors.values()),
            layers=config["num_hidden_layers"],
            heads=heads,
            head_dim=head_dim,
            hidden=config["hidden_size"],
            feed_forward=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            keys=head_dim * (config.get("num_key_value_heads") or heads),
            item_size=ITEM_SIZES[tensors["model.norm.weight"].dtype],
        )
