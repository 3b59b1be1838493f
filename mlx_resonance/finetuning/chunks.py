"""What keeps long sequences within memory: the loss in chunks of tokens, and activation checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.trainer import grad_checkpoint

from .. import attention

POSITIONS = 1024  # tokens whose logits are in memory at once
QUERIES = 256  # tokens whose attention scores are in memory at once under activation checkpointing


def next_token_loss(model: nn.Module, tokens: mx.array) -> mx.array:
    """Mean cross-entropy of every next token, in nats; the logits of at most `POSITIONS` tokens are kept at a time.

    Args:
        model: from `Checkpoint.load`, with LoRA layers or without.
        tokens: ids, (B, L): L - 1 are predicted in each row.
    """
    hidden, targets = model.model(tokens)[:, :-1], tokens[:, 1:]
    head = model.model.embed_tokens if model.args.tie_word_embeddings else model.lm_head

    def loss(i: int) -> mx.array:
        wanted = targets[:, i : i + POSITIONS]  # a closure: checkpoint() would differentiate an argument

        def of(states: mx.array) -> mx.array:
            logits = attention.next_token_logits(model, states).astype(mx.float32)
            return nn.losses.cross_entropy(logits, wanted, reduction="sum")

        chunk = nn.utils.checkpoint(head, of) if targets.shape[1] > POSITIONS else of
        return chunk(hidden[:, i : i + POSITIONS])

    parts = [loss(i) for i in range(0, targets.shape[1], POSITIONS)]
    return mx.sum(mx.stack(parts)) / targets.size


@contextlib.contextmanager
def activation_checkpointing(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within it, a layer keeps only its input for the backward pass, which recomputes the rest, attention in parts.

    Args:
        model: from `Checkpoint.load`. The class of its layers and the attention of all models change, and change back.
        wanted: False to change nothing.
    """
    if not wanted:
        yield
        return
    layer = type(model.layers[0])
    forward, attend = layer.__call__, attention.attend
    grad_checkpoint(model.layers[0])
    attention.attend = _checkpointed_attend
    try:
        yield
    finally:
        layer.__call__, attention.attend = forward, attend


def _checkpointed_attend(
    queries: mx.array, keys: mx.array, values: mx.array, *, cache: Any, scale: float, mask: mx.array | str | None
) -> mx.array:
    """As `attention.attend` without a cache; the backward pass recomputes the scores of `QUERIES` tokens at a time."""
    return attention.attend_in_parts(_checkpointed, queries, keys, values, QUERIES, scale=scale, mask=mask)


def _checkpointed(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
    return mx.checkpoint(partial(mx.fast.scaled_dot_product_attention, **options))(queries, keys, values)
