"""Attention to keys and values in every KV format, by every position map, in launches of bounded size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.base import scaled_dot_product_attention

from .errors import UsageError
from .kernels import Angles
from .positions import PositionMap, Run
from .rope import ResonanceRoPE

# Maximum queries × keys per head in one launch of attention: macOS limits how long a GPU may work without a break.
# 2048 queries reach it at 65 k keys.
BUDGET = 2**27
# Queries for which products with quantized keys beat dequantizing those, on a CPU in float32 and elsewhere. The first
# was measured at 1024 and 4096 keys, the second only for 16 bits on a CPU.
FEW_IN_FLOAT32, FEW = 2, 16
# By a position map: scores of all heads that are held at once, and queries, of which all look at what one of them sees.
SCORES, ROWS = 2**24, 256


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """mlx-lm's attention, split along the queries if one launch would exceed `BUDGET`.

    Args:
        queries: (B, H, L, D).
        keys, values: (B, H_kv, S, D), as the cache returns them.
        scale: factor of the scores.
        mask: "causal", None, or an array that broadcasts to (B, H, L, S).

    Returns:
        Shape (B, H, L, D).
    """
    if queries.shape[2] == 1:
        return scaled_dot_product_attention(queries, keys, values, cache=None, scale=scale, mask=mask)
    size = max(1, BUDGET // (queries.shape[0] * keys.shape[2]))
    return attend_in_parts(
        scaled_dot_product_attention, queries, keys, values, size, cache=None, scale=scale, mask=mask
    )


def attend_quantized(
    queries: mx.array, keys: Any, values: Any, *, cache: Any, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Attention to quantized keys and values, which may have different bits and may be rotated.

    Args:
        queries, scale, mask: as in `attend`.
        keys, values: packed numbers, scales and biases, as the cache returns them.
        cache: the layer's: ours, which has a `format`, or mlx-lm's.
    """
    own, (key_bits, value_bits), size = getattr(cache, "format", None), _bits(cache), cache.group_size
    if own is not None:
        queries = own.asked(queries)
    length, on_cpu = queries.shape[2], mx.default_device() == mx.cpu
    few = FEW_IN_FLOAT32 if on_cpu and queries.dtype == mx.float32 else FEW
    if length > few or (length > 1 and isinstance(mask, mx.array)):
        # A product with quantized keys holds all scores of a chunk, which take more memory than a layer's keys and
        # values in 16 bits: dequantize those for the fused attention instead.
        keys, values = (_dense(x, size, bits, queries.dtype) for x, bits in ((keys, key_bits), (values, value_bits)))
        output = attend(queries, keys, values, scale=scale, mask=mask)
    else:  # the queries that share keys are tokens of one head: each of those is read once
        product: Any = mx.quantized_matmul  # of x, packed numbers, scales and biases
        grouped = (scale * queries).reshape(queries.shape[0], keys[0].shape[1], -1, queries.shape[3])
        if on_cpu:  # where MLX computes this product in 16 bits 40 times slower
            grouped = grouped.astype(mx.float32)
        scores = product(grouped, *keys, transpose=True, group_size=size, bits=key_bits)
        if isinstance(mask, str) and length > 1:  # causal
            seen = mx.tri(length, scores.shape[-1], scores.shape[-1] - length, mx.bool_)
            apart = scores.reshape(*scores.shape[:2], -1, *seen.shape)  # heads that share keys, tokens
            scores = mx.where(seen, apart, mx.finfo(scores.dtype).min).reshape(scores.shape)
        if isinstance(mask, mx.array):  # of a batch: (B, 1, 1, S)
            least = mx.finfo(scores.dtype).min
            scores = mx.where(mask, scores, least) if mask.dtype == mx.bool_ else scores + mask
        weights = mx.softmax(scores, axis=-1, precise=True)
        output = product(weights, *values, transpose=False, group_size=size, bits=value_bits)
        output = output.reshape(*queries.shape[:3], -1).astype(queries.dtype)
    return output if own is None else own.restored(output)


def attend_in_parts(
    attention: Callable[..., mx.array], queries: mx.array, keys: mx.array, values: mx.array, size: int, *,
    mask: mx.array | str | None, **options: Any,
) -> mx.array:  # fmt: skip
    """Attend from the queries of the last L positions to the keys of all S, `size` queries at a time.

    Args:
        attention: a function of queries, keys, values, mask and the options.
        queries, keys, values, mask: as in `attend`.
        size: maximum number of queries in a part.
        options: passed to `attention`.
    """
    length, before = queries.shape[2], keys.shape[2] - queries.shape[2]
    if length <= size:
        return attention(queries, keys, values, mask=mask, **options)
    parts = []
    for start in range(0, length, size):
        end = min(start + size, length)
        part = mask
        seen = keys.shape[2]
        if isinstance(mask, str):
            seen = before + end  # no query sees a later key; "causal" aligns the last query with the last key
        elif mask is not None and mask.shape[-2] == length:
            part = mask[..., start:end, :]
        parts.append(attention(queries[:, :, start:end], keys[:, :, :seen], values[:, :, :seen], mask=part, **options))
    return mx.concatenate(parts, axis=2)


def reaches_past(positions: PositionMap, offset: int | mx.array, length: int, mask: mx.array | str | None) -> bool:
    """Whether some of the queries see keys elsewhere than at their own positions.

    Args:
        positions: the map.
        offset: position of the first query.
        length: number of queries.
        mask: as in `attend`.

    Raises:
        UsageError: rows have offsets of their own, or a mask that is not causal.
    """
    if isinstance(offset, mx.array) or isinstance(mask, mx.array):
        raise UsageError(f"{positions.method} is for one text at a time", option="extend")
    return offset + length > positions.unchanged


def attend_mapped(
    unrotated: mx.array, queries: mx.array, keys: Any, values: Any, *, rope: ResonanceRoPE, cache: Any, offset: int,
    scale: float,
) -> mx.array:  # fmt: skip
    """Causal attention by a position map: near and far keys in one softmax, at most `SCORES` of them at once.

    A key is rotated once more at most, from its own position, in which the cache has it, to the one that far queries
    see: on and on in 16 bits would drift. A cache of this package keeps the result.

    Args:
        unrotated, queries: (B, H, L, D), before and after their rotation.
        keys, values: (B, H_kv, S, D), all of them, rotated; or quantized, as the cache returns them.
        rope: of the model, with the map.
        cache: the layer's, which has these keys and values; None for none.
        offset: position of the first query.
        scale: factor of the scores.

    Returns:
        Shape (B, H, L, D).
    """
    positions, length = rope.positions, queries.shape[2]
    assert positions is not None
    outputs = []
    for run in rope.once(("runs", offset, length), lambda: list(positions.runs(offset, offset + length))):
        of_run = slice(run.start - offset, run.end - offset)
        raw, asked = unrotated[:, :, of_run], queries[:, :, of_run]
        held_keys, held_values = tree_map(lambda x, end=run.end: x[:, :, :end], (keys, values))
        mask = "causal" if run.end - run.start > 1 else None
        if run.form:
            outputs.append(_attend_run(run, raw, asked, held_keys, held_values, rope, cache, scale))
        elif hasattr(cache, "group_size"):
            outputs.append(attend_quantized(asked, held_keys, held_values, cache=cache, scale=scale, mask=mask))
        else:
            outputs.append(attend(asked, held_keys, held_values, scale=scale, mask=mask))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


class _Held(NamedTuple):
    """Keys or values of a run: dense (B, H_kv, S, D), or quantized with some bits in groups of some size."""

    arrays: Any
    bits: int | None = None
    group_size: int = 0

    def dense(self, like: mx.Dtype) -> _Held:
        """The same in a dense type."""
        return self if self.bits is None else _Held(_dense(self.arrays, self.group_size, self.bits, like))

    def product(self, x: mx.array, first: int, end: int, transpose: bool) -> mx.array:
        """Of x with a range of the keys (transposed) or of the values."""
        part = tree_map(lambda y: y[:, :, first:end], self.arrays)
        if self.bits is None:
            return x @ (part.swapaxes(-1, -2) if transpose else part)
        product: Any = mx.quantized_matmul
        found: mx.array = product(x, *part, transpose=transpose, group_size=self.group_size, bits=self.bits)
        return found


class _Span(NamedTuple):
    """Neighbouring keys of a piece: its number, their range, and which queries (L, keys) see them; None for all."""

    piece: int
    first: int
    end: int
    mask: mx.array | None


def _attend_run(
    run: Run, unrotated: mx.array, queries: mx.array, keys: Any, values: Any, rope: ResonanceRoPE, cache: Any,
    scale: float,
) -> mx.array:  # fmt: skip
    """Attention of a run that has a form: its output, (B, H, L, D)."""
    own, like, (B, H, L, D) = getattr(cache, "format", None), queries.dtype, queries.shape
    far = _far_keys(run, keys, rope, cache, like)
    held = [_Held(keys), _Held(far), _Held(values)]
    if own is not None:
        key_bits, value_bits = _bits(cache)
        bits = key_bits, key_bits, value_bits
        held = [x._replace(bits=b, group_size=cache.group_size) for x, b in zip(held, bits, strict=True)]
    held = [x.dense(like) for x in held] if L > 1 else held  # as in `attend_quantized`
    asked = []
    for i, piece in enumerate(run.pieces):
        turned, places = queries, piece.queries
        if places is not None:
            name = ("queries", run.start, run.end, i)
            turned = rope.turn(unrotated, rope.once(name, partial(rope.of_positions, places)))
        turned = scale * (turned if own is None else own.asked(turned))
        asked.append(turned.astype(mx.float32) if held[0].bits and mx.default_device() == mx.cpu else turned)
    arrays: Any = tree_flatten(keys)
    outputs, heads, step = [], arrays[0][1].shape[1], max(1, min(ROWS, SCORES // (B * H * run.end)))
    for start in range(0, L, step):
        end = min(start + step, L)
        spans = rope.once(("spans", run.start + start, run.start + end), partial(_spans, run, start, end))
        rows = [x[:, :, start:end].reshape(B, heads, -1, D) for x in asked]
        scores = []
        for span in spans:
            of_keys = held[0 if run.pieces[span.piece].queries is None else 1]
            scores.append(_masked(of_keys.product(rows[span.piece], span.first, span.end, True), span.mask))
        weights = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1, precise=True)
        outputs.append(_weighted(weights, held[2], spans).reshape(B, H, end - start, -1))
    output = (outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)).astype(like)
    return output if own is None else own.restored(output)


def _far_keys(run: Run, keys: Any, rope: ResonanceRoPE, cache: Any, like: mx.Dtype) -> Any:
    """The keys that queries of a run see elsewhere than at their own positions, moved there."""
    positions, form = rope.positions, run.form
    assert positions is not None
    count = max(int(piece.end.max()) for piece in run.pieces if piece.queries is not None)

    def moves(first: int, end: int) -> Angles:
        own = np.arange(first, end)
        return rope.of_positions(positions.of_keys(form, own) - own, scaled=False)

    def move(x: mx.array, first: int, end: int) -> mx.array:
        return rope.turn(x, rope.once(("keys", form, first, end), lambda: moves(first, end)))

    if (kept := getattr(cache, "far", None)) is not None:
        return kept.fetch(cache, form, count, move, like)
    if hasattr(cache, "group_size"):
        raise UsageError("a quantized cache of mlx-lm keeps no keys for other positions", option="extend")
    return move(keys[:, :, :count], 0, count)


def _spans(run: Run, start: int, end: int) -> list[_Span]:
    """The keys of some of a run's queries, cut where the queries that see them change."""
    spans = []
    for i, piece in enumerate(run.pieces):
        first, last = piece.first[start:end], piece.end[start:end]
        inner = int(first.max()), int(last.min())
        edges = [int(first.min()), *(inner if inner[0] < inner[1] else ()), int(last.max())]
        for a, b in pairwise(edges):
            if a < b:
                keys = np.arange(a, b)
                seen = (keys >= first[:, None]) & (keys < last[:, None])
                spans.append(_Span(i, a, b, None if seen.all() else mx.array(seen)))
    return spans


def _masked(scores: mx.array, mask: mx.array | None) -> mx.array:
    """Scores (B, H_kv, heads × L, keys), -inf where the mask (L, keys) is false."""
    if mask is None:
        return scores
    by_head = scores.reshape(*scores.shape[:2], -1, *mask.shape)
    return mx.where(mask, by_head, mx.array(-mx.inf, scores.dtype)).reshape(scores.shape)


def _weighted(weights: mx.array, values: _Held, spans: list[_Span]) -> mx.array:
    """The sum of the values of all spans, weighted; those that continue each other are multiplied at once."""
    ranges: list[list[int]] = []
    for span in spans:
        if ranges and ranges[-1][1] == span.first:
            ranges[-1][1] = span.end
        else:
            ranges.append([span.first, span.end])
    parts, done = [], 0
    for first, end in ranges:
        parts.append(values.product(weights[..., done : done + end - first], first, end, False))
        done += end - first
    return sum(parts[1:], parts[0])


def _bits(cache: Any) -> tuple[int, int]:
    """Bits of keys and of values of a quantized cache, ours or mlx-lm's."""
    own = getattr(cache, "format", None)
    return (cache.bits, cache.bits) if own is None else (own.key_bits, own.value_bits)


def _dense(x: Any, size: int, bits: int, like: mx.Dtype) -> mx.array:
    """Quantized keys or values, dequantized into a type."""
    packed, scales, biases = x
    return mx.dequantize(packed, scales.astype(like), biases.astype(like), group_size=size, bits=bits)
