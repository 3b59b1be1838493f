"""What quantization costs on a text: the perplexity, and the divergence from the model before it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mlx_resonance.attention import next_token_logits
from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.errors import UsageError
from mlx_resonance.evaluation.texts import read_text

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from .source import Source

WINDOW, WINDOWS = 512, 16  # tokens of a window, and the number of windows, from the beginning of the text
LONGEST_TOKEN = 16  # characters: more than the mean of any text
POSITIONS = 256  # with logits in memory at once


def quantization_report(result: Source, source: Source, ids: list[int]) -> dict[str, Any]:
    """Compare a quantized checkpoint with its source, both with the rope settings of the former, in float32.

    At most one layer is in memory, whatever the size of the model. Where MLX multiplies in TF32, it does so for both:
    unlike in verification, no bound decides on these figures.

    Args:
        result: the quantized checkpoint.
        source: what it was made from.
        ids: of a text, as `tokens_of` returns them. They are read in windows of 512 tokens or the context before
            scaling, each from its beginning.

    Returns:
        `tokens` predicted, `window`; `perplexity` of both; `kl_divergence` of the quantized model's next token from
        the source's, in nats, the mean and the largest; `same_top_token`, how often the likeliest one is the same.
        None stands for what is not finite.
    """
    rope = result.checkpoint.rope
    window = min(WINDOW, rope.trained_length or WINDOW, len(ids))
    count = min(len(ids) // window, WINDOWS)
    tokens = mx.array(ids[: count * window]).reshape(count, window)
    models = [Streamed(weights, source.checkpoint.with_rope(rope).build()) for weights in (source, result)]
    hidden = [model.hidden(tokens) for model in models]
    targets = tokens[:, 1:].reshape(-1)
    sums = [0.0, 0.0, 0.0, 0.0]
    largest = 0.0
    for i in range(0, targets.size, POSITIONS):
        part = slice(i, i + POSITIONS)
        logs = [model.log_probabilities(states[part]) for model, states in zip(models, hidden, strict=True)]
        divergence = mx.sum(mx.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)
        same = mx.sum(mx.argmax(logs[0], axis=-1) == mx.argmax(logs[1], axis=-1))
        chosen = [mx.sum(mx.take_along_axis(log, targets[part, None], axis=-1)) for log in logs]
        values = [float(value.item()) for value in (*chosen, mx.sum(divergence), same)]  # type: ignore[arg-type]
        sums = [total + value for total, value in zip(sums, values, strict=True)]
        found = float(mx.max(divergence).item())  # type: ignore[arg-type]
        largest = found if math.isnan(found) or found > largest else largest
    n = targets.size
    before, after = (_rounded(math.exp(min(-total / n, 700)) if math.isfinite(total) else total) for total in sums[:2])
    return {
        "tokens": n,
        "window": window,
        "perplexity": {"source": before, "quantized": after},
        "kl_divergence": {"mean": _rounded(sums[2] / n), "largest": _rounded(largest)},
        "same_top_token": _rounded(sums[3] / n),
    }


def tokens_of(path: Path, checkpoint: Checkpoint) -> list[int]:
    """The tokens of a text file, up to those that the report reads. Raises UsageError where they are fewer than two."""
    text = read_text(path, "quant_report", WINDOW * WINDOWS * LONGEST_TOKEN)
    ids: list[int] = checkpoint.tokenizer.encode(text)[: WINDOW * WINDOWS]
    if len(ids) < 2:
        raise UsageError(f"{path} is too short: at least two tokens are needed", option="quant_report")
    return ids


class Streamed:
    """A model that holds a layer's weights only while the layer runs; quantized weights are dequantized.

    It is made of a model of the same shapes, not quantized, without weights.
    """

    def __init__(self, source: Source, model: nn.Module) -> None:
        self.source, self.model = source, model
        names = list(dict(tree_flatten(model.parameters())))
        layers: list[Any] = model.model.layers
        self._load(model, [name for name in names if not name.startswith("model.layers.")])
        model.model.layers = [
            OnDemand(layer, self, [name for name in names if name.startswith(f"model.layers.{i}.")])
            for i, layer in enumerate(layers)
        ]
        model.eval()

    def _load(self, module: nn.Module, names: list[str], prefix: str = "") -> None:
        weights = [(name.removeprefix(prefix), self.source.read_float32(name)) for name in names]
        module.load_weights(weights, strict=False)
        mx.eval([value for _, value in weights])

    def hidden(self, tokens: mx.array) -> mx.array:
        """The states (N, hidden) that predict every token but the first of each row."""
        states: mx.array = self.model.model(tokens)[:, :-1]
        states = states.reshape(-1, states.shape[-1])
        mx.eval(states)
        return states

    def log_probabilities(self, states: mx.array) -> mx.array:
        """The log-probabilities (n, vocabulary) of the token after each state (n, hidden)."""
        logits = next_token_logits(self.model, states)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class OnDemand:
    """A layer that reads its weights when it is called, and drops them afterwards."""

    def __init__(self, layer: Any, owner: Streamed, names: list[str]) -> None:
        self._layer, self._owner, self._names = layer, owner, names
        self._empty = tree_map(lambda value: value, layer.parameters())  # never computed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, states: mx.array, *arguments: Any, **options: Any) -> mx.array:
        """The layer's output, one row at a time."""
        self._owner._load(self._layer, self._names, prefix=".".join(self._names[0].split(".")[:3]) + ".")
        rows = []
        for i in range(states.shape[0]):
            rows.append(self._layer(states[i : i + 1], *arguments, **options))
            mx.eval(rows[-1])
        self._layer.update(self._empty)
        mx.clear_cache()
        return mx.concatenate(rows)


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
