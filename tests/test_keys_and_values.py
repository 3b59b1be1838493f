"""Whatever is accepted, rejected, trimmed or found in a cache: the keys and values are those of plain passes."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

from mlx_resonance import load
from mlx_resonance.attention import Inference
from mlx_resonance.generation import PromptCache
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.decode import decode
from mlx_resonance.generation.kv_format import KVFormat
from mlx_resonance.generation.prefill import prefill
from mlx_resonance.generation.speculation import Proposals

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from .test_decode import FRESH, GREEDY, REPEATING, Model, Oracle, of_mlx_lm

FORMATS = [KVFormat(), *(KVFormat(k, v, rotate) for k, v in ((8, 8), (8, 4), (4, 4)) for rotate in (False, True))]
MOST = 160  # tokens of a text

# What happens to a text: some tokens are written, with proposals of a number of tokens of which some are right, and
# closed after a number of them; or the last ones are removed, the caches read back from disk, more tokens read.
WRITE = st.tuples(
    st.just("write"),
    st.lists(st.tuples(st.integers(2, 9), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(1, 14),
)
OPERATIONS = st.lists(
    st.one_of(
        WRITE,
        st.tuples(st.just("trim"), st.just(0), st.integers(1, 30)),
        st.tuples(st.just("hit"), st.just(0), st.just(0)),
        st.tuples(st.just("read"), st.just(0), st.integers(1, 20)),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint)


def held(cache: list[Any]) -> list[np.ndarray]:
    """The keys and values in caches, as arrays of packed numbers, scales and biases if they are quantized."""
    arrays = [tree_map(lambda x, end=layer.offset: x[..., :end, :], (layer.keys, layer.values)) for layer in cache]
    return [np.array(array) for _, array in tree_flatten(arrays)]


class Text:
    """A text and its caches, to which operations are applied; every pass of the model is remembered.

    Args:
        loaded: model and tokenizer.
        tokens: its beginning.
        format: of the KV caches.
    """

    def __init__(self, loaded: Any, tokens: list[int], format: KVFormat) -> None:
        self.model, self.tokens, self.format = Model(loaded[0]), list(tokens), format
        self.cache = make_cache(loaded[0], MOST, format)
        prefill(self.model, self.tokens, self.cache)  # type: ignore[arg-type]

    def write(self, script: list[tuple[int, int]], stop: int) -> None:
        self.cut(len(self.tokens) - 1)
        prefill(self.model, self.tokens, self.cache)  # type: ignore[arg-type]
        wanted, _ = of_mlx_lm(self.model._model, self.tokens, kv_bits=self.format, new=stop + 9)  # type: ignore[arg-type]
        proposals = Proposals(Oracle(len(self.tokens), wanted, script), 9)
        options: dict[str, Any] = {"max_tokens": stop + 9, "sampler": GREEDY.sampler(), "proposals": proposals}
        steps = decode(self.model, self.cache, self.tokens, **options)  # type: ignore[arg-type]
        found = [token for token, _ in itertools.islice(steps, stop)]
        steps.close()
        if not self.format.quantized:  # there a near-tie may be decided otherwise
            assert found == wanted[:stop]
        self.tokens += found

    def trim(self, _: Any, count: int) -> None:
        keep = max(2, self.cache[0].offset - count)
        self.cut(keep)
        self.tokens = [*self.tokens[:keep], 7]  # another token follows

    def cut(self, keep: int) -> None:
        for layer in self.cache:
            layer.trim(max(0, layer.offset - keep))

    def hit(self, _: Any, __: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            kept = PromptCache(folder, "key-rotated" if self.format.rotate else "key")
            kept.store(self.tokens, self.cache, least=1)
            self.cache = make_cache(self.model._model, MOST, self.format)
            assert kept.fetch(self.tokens, self.cache) >= len(self.tokens) - 1

    def read(self, _: Any, count: int) -> None:
        self.tokens += range(40, 40 + count)
        prefill(self.model, self.tokens, self.cache)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: str(format.value))
@settings(deadline=None, max_examples=8, phases=[Phase.generate])  # shrinking takes minutes
@given(operations=OPERATIONS, start=st.sampled_from([REPEATING, FRESH]))
def test_they_are_those_of_plain_passes(
    loaded: Any, format: KVFormat, operations: list[tuple[str, Any, int]], start: str
) -> None:
    text = Text(loaded, loaded[1].encode(start), format)
    for name, *given_ in operations:
        if len(text.tokens) < MOST - 40:
            getattr(text, name)(*given_)
            (offset,) = {layer.offset for layer in text.cache}
            assert len(text.tokens) - 1 <= offset <= len(text.tokens) or name == "trim"

    # The same passes over caches in which nothing that was trimmed leaves a trace: bit-identical.
    clean = make_cache(loaded[0], MOST, format)
    for offset, inputs in text.model.passes:
        for layer in clean:
            layer.trim(layer.offset - offset)
            if layer.keys is not None:
                blank = mx.arange(tree_flatten(layer.keys)[0][1].shape[2])[:, None] >= offset
                layer.keys, layer.values = tree_map(
                    lambda x, blank=blank: mx.where(blank, mx.zeros_like(x), x), (layer.keys, layer.values)
                )
        Inference(loaded[0])(inputs, cache=clean)
    for layer in clean:
        layer.trim(layer.offset - text.cache[0].offset)
    for one, other in zip(held(text.cache), held(clean), strict=True):
        assert np.array_equal(one, other)

    # One pass over the whole text: equal but for rounding, which quantized keys amplify.
    if not format.quantized:
        whole = make_cache(loaded[0], MOST)
        Inference(loaded[0])(mx.array(text.tokens[: text.cache[0].offset])[None], cache=whole)
        for one, other in zip(held(text.cache), held(whole), strict=True):
            np.testing.assert_allclose(one, other, rtol=5e-5, atol=5e-5)
