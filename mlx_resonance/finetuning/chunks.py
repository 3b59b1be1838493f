"""What keeps long sequences within memory: logits and scores of a few tokens at a time, activation checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .. import attend, attention
from .._mlx_lm import grad_checkpoint
from .positions import caches_at

LOGITS = 64 * 10**6  # bytes that logits and what is computed from them take at once
COPIES = 12  # arrays of logits in float32 that are alive at once, since MLX runs ahead: measured up to 11.3
QUERIES = 256  # tokens whose attention scores are in memory at once under activation checkpointing


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits fit into `LOGITS` bytes."""
    return max(1, LOGITS // (COPIES * 4 * vocabulary))


def next_token_loss(
    model: nn.Module, tokens: mx.array, weights: mx.array | None = None, positions: mx.array | None = None
) -> mx.array:
    """Mean cross-entropy of every next token, in nats, in float32.

    Args:
        model: from `Checkpoint.load`, with LoRA layers or without.
        tokens: ids, (B, L): L - 1 are predicted in each row.
        weights: what each token counts as a target, (B, L); None for 1.
        positions: of every token, (B, L); None for 0, 1, 2, …
    """
    hidden = model.model(tokens, caches_at(model, positions))[:, :-1]
    states, targets = hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
    counts = mx.ones(targets.shape) if weights is None else weights[:, 1:].reshape(-1)
    head = model.model.embed_tokens if model.args.tie_word_embeddings else model.lm_head
    parameters, size = head.trainable_parameters(), tokens_at_once(model.args.vocab_size)

    def logits_of(parameters: Any, states: mx.array) -> mx.array:
        head.update(parameters)
        return attention.next_token_logits(model, states)

    def loss(start: int, parameters: Any, part: mx.array) -> mx.array:
        wanted, count = targets[start : start + size], counts[start : start + size]
        return cross_entropy(logits_of, wanted, count)(parameters, part)

    losses = in_turn(loss, parameters, states, size, axis=0)
    head.update(parameters)  # not those of the last part, which wait for the parts before
    return mx.sum(mx.stack(losses)) / targets.size


def cross_entropy(logits_of: Callable[..., mx.array], targets: mx.array, weights: mx.array) -> Callable[..., mx.array]:
    """The weighted sum of the cross-entropy of logits, as a function of what they are made of.

    Its gradient is written out: differentiated, it would keep a dozen arrays of the size of the logits, not four.

    Args:
        logits_of: makes logits, (T, vocabulary), from a tree of parameters and from states, (T, hidden).
        targets, weights: of each token, (T,).
    """

    @mx.custom_function
    def loss(parameters: Any, states: mx.array) -> mx.array:
        logits = logits_of(parameters, states).astype(mx.float32)
        scores = mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return mx.sum(weights * (mx.logsumexp(logits, axis=1) - scores))

    @loss.vjp
    def backward(primals: Any, gradient: mx.array, _: Any) -> Any:
        logits = logits_of(*primals)
        wrong = mx.softmax(logits.astype(mx.float32), axis=1).at[mx.arange(targets.size), targets].add(-1)
        wrong = (wrong * (weights * gradient)[:, None]).astype(logits.dtype)
        names, arrays = zip(*tree_flatten(primals), strict=True)
        _, gradients = mx.vjp(
            lambda *arrays: logits_of(*tree_unflatten(list(zip(names, arrays, strict=True)))), list(arrays), [wrong]
        )
        return gradients

    found: Any = loss
    return found


def in_turn(function: Callable[..., mx.array], shared: Any, array: mx.array, size: int, axis: int) -> list[mx.array]:
    """Apply a function to parts of an array, one after another, so that memory holds the work of one part at a time.

    The backward pass recomputes each part and takes them in turn, too, from the last to the first. A single part is
    neither cut nor recomputed.

    Args:
        function: of the number of the part's first entry, of `shared` and of the part.
        shared: a tree of arrays that all parts use.
        array: to cut along `axis` into parts of `size` entries.
    """
    length = array.shape[axis]
    if length <= size:
        return [function(0, shared, array)]
    parts = mx.split(array, range(size, length, size), axis=axis)
    results: list[mx.array] = []
    for number, part in enumerate(parts):
        if results:
            waiting: Any = _after((shared, part), results[-1])
            (shared, part), results[-1] = waiting
        results.append(mx.checkpoint(partial(function, number * size))(shared, part))
    return results


@mx.custom_function
def _after(inputs: Any, result: mx.array) -> Any:
    """Return both, but let the inputs of a part wait for the result of the part before."""
    return tree_map(lambda array: mx.depends([array], [result])[0], inputs), result


@_after.vjp
def _before(_: Any, gradients: Any, __: Any) -> Any:
    """Backward, that result's gradient waits for the gradients of the inputs."""
    inputs, result = gradients
    return inputs, mx.depends([result], list(dict(tree_flatten(inputs)).values()))[0]


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
    forward, before = layer.__call__, attend.attend
    grad_checkpoint(model.layers[0])
    attend.attend = _attend_in_turn
    try:
        yield
    finally:
        layer.__call__, attend.attend = forward, before


def _attend_in_turn(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """As `attend.attend`; the scores of `QUERIES` tokens are in memory at once."""

    def attended(start: int, shared: tuple[mx.array, mx.array], part: mx.array) -> mx.array:
        end = start + part.shape[2]
        seen = [array[:, :, :end] for array in shared]  # no query sees a later key
        own = mask[..., start:end, :end] if isinstance(mask, mx.array) else mask
        return mx.fast.scaled_dot_product_attention(part, *seen, scale=scale, mask=own)

    return mx.concatenate(in_turn(attended, (keys, values), queries, QUERIES, axis=2), axis=2)
