"""What keeps long sequences within memory: loss and attention in chunks, layers computed again going backwards."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.trainer import grad_checkpoint

POSITIONS = 1024  # tokens whose logits are there at once
QUERIES = 256  # tokens whose attention scores are there at once, where layers are computed again


def next_token_loss(model: nn.Module, tokens: mx.array) -> mx.array:
    """Mean cross-entropy of every next token, in nats; logits are kept for no more than `POSITIONS` tokens at a time.

    Args:
        model: of `loading.load_model`, LoRA layers or not.
        tokens: ids, (B, L): L - 1 are predicted in each row.
    """
    hidden, targets = model.model(tokens)[:, :-1], tokens[:, 1:]
    tied = model.args.tie_word_embeddings
    head = model.model.embed_tokens if tied else model.lm_head

    def loss(i: int) -> mx.array:
        wanted = targets[:, i : i + POSITIONS]  # from outside: checkpoint() would differentiate an argument

        def of(states: mx.array) -> mx.array:
            logits = head.as_linear(states) if tied else head(states)
            return nn.losses.cross_entropy(logits.astype(mx.float32), wanted, reduction="sum")

        again = nn.utils.checkpoint(head, of) if targets.shape[1] > POSITIONS else of
        return again(hidden[:, i : i + POSITIONS])

    parts = [loss(i) for i in range(0, targets.shape[1], POSITIONS)]
    return mx.sum(mx.stack(parts)) / targets.size


@contextlib.contextmanager
def computed_again(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Within it, the layers keep nothing but their inputs for going backwards, and attend by chunks of queries.

    Args:
        model: of `loading.load_model`. Its layers' class and its module's attention are changed, and changed back.
        wanted: change nothing where false.
    """
    if not wanted:
        yield
        return
    kind = type(model.layers[0])
    module: Any = sys.modules[kind.__module__]
    call, attention = kind.__call__, module.scaled_dot_product_attention
    module.scaled_dot_product_attention = attention_in_chunks
    grad_checkpoint(model.layers[0])
    try:
        yield
    finally:
        kind.__call__ = call
        module.scaled_dot_product_attention = attention


def attention_in_chunks(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: mx.array | str | None
) -> mx.array:
    """mlx-lm's attention of a whole sequence to itself, scores and all of `QUERIES` tokens at a time.

    Args:
        queries, keys, values: (B, H, L, D), the latter two of their own H.
        cache: None.
        scale: of the scores.
        mask: causal; an array (L, L) for a sliding window.
    """
    length = queries.shape[2]

    def attend(q: mx.array, k: mx.array, v: mx.array, masked: mx.array | str | None) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=masked)

    if length <= QUERIES or mask is None:
        return attend(queries, keys, values, mask)
    parts = []
    for i in range(0, length, QUERIES):
        end = min(i + QUERIES, length)  # no query sees a key behind it; "causal" lines up the last of both
        part = mask if isinstance(mask, str) else mask[..., i:end, :end]
        again = mx.checkpoint(partial(attend, masked=part))
        parts.append(again(queries[:, :, i:end], keys[:, :, :end], values[:, :, :end]))
    return mx.concatenate(parts, axis=2)
