"""The independent oracle: rotary embedding and a LLaMA forward pass in float64 NumPy, written from the papers.

Sources: RoPE arXiv 2104.09864, YaRN arXiv 2309.00071, Resonance RoPE arXiv 2403.00071, LLaMA arXiv 2302.13971.
It imports nothing from mlx_resonance and shares no formula with it: phases are quotients of Python integers.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def turns(position: int, wavelength: float) -> float:
    """The fraction of a turn by which `position` exceeds an integer number of turns, in [0, 1], rounded once."""
    if math.isinf(wavelength):
        return 0.0
    numerator, denominator = wavelength.as_integer_ratio()
    return (position * denominator % numerator) / numerator


def angles(positions: Iterable[int], wavelengths: Iterable[float]) -> Array:
    """Angles in [0, 2π], shape (L, pairs)."""
    return 2 * np.pi * np.array([[turns(int(m), float(λ)) for λ in wavelengths] for m in positions])


def rotate(x: Array, theta: Array, scale: float = 1.0, traditional: bool = False) -> Array:
    """Rotate the feature pairs of x, shape (..., L, D), as complex numbers by theta, shape (..., L, pairs).

    A pair is (2i, 2i + 1) if `traditional`, else (i, i + pairs); features past the pairs are copied.
    """
    x = np.array(x, dtype=np.float64)
    dims = 2 * theta.shape[-1]
    first, second = (
        (slice(0, dims, 2), slice(1, dims, 2)) if traditional else (slice(0, dims // 2), slice(dims // 2, dims))
    )
    turned = (x[..., first] + 1j * x[..., second]) * scale * np.exp(1j * theta)
    x[..., first], x[..., second] = turned.real, turned.imag
    return x


def rope_wavelengths(dims: int, base: float) -> Array:
    """λ_i = 2π b^(2i/d)."""
    return np.array([2 * math.pi * base ** (2 * i / dims) for i in range(dims // 2)])


def yarn_wavelengths(
    dims: int, base: float, factor: float, original: int, beta_fast: float = 32, beta_slow: float = 1
) -> Array:
    """YaRN's "NTK-by-parts": harmonic mean of λ and s·λ, weighted by a ramp.

    The paper's ramp runs over turns in the original context. Its authors' code (jquesnelle/yarn) and all others run it
    over the pair index, between the two pairs with `beta_fast` and `beta_slow` turns, rounded outward. So does this.
    """

    def index(turns_in_context: float) -> float:  # solve original / λ_i = turns_in_context for i
        return dims / 2 * math.log(original / (2 * math.pi * turns_in_context), base)

    low, high = max(math.floor(index(beta_fast)), 0), min(math.ceil(index(beta_slow)), dims - 1)
    scaled = [
        0 if i <= low else 1 if i >= high else (i - low) / (high - low)  # how much of pair i is interpolated
        for i in range(dims // 2)
    ]
    return np.array([λ / (1 - g + g / factor) for λ, g in zip(rope_wavelengths(dims, base), scaled, strict=True)])


def yarn_attention_scale(factor: float) -> float:
    """Square root of the paper's 1/t, on queries and on keys (equation 22)."""
    return 1 + math.log(factor) / 10


def resonate(wavelengths: Iterable[float]) -> Array:
    """Every wavelength rounded to an integer number of tokens."""
    return np.array([float(round(λ)) for λ in wavelengths])


def llama_logits(
    tokens: Iterable[int], weights: Mapping[str, Any], config: Mapping[str, Any], wavelengths: Array, scale: float = 1.0
) -> Array:
    """Logits of a LLaMA for one row of tokens, shape (L, vocabulary).

    Args:
        tokens: token ids.
        weights: arrays by their Hugging Face names, with or without biases.
        config: keys of config.json.
        wavelengths, scale: of the rotary embedding; positions start at 0.
    """
    weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    tokens = list(tokens)
    theta = angles(range(len(tokens)), wavelengths)
    future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)

    def linear(name: str, x: Array) -> Array:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(name: str, x: Array) -> Array:
        rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config["rms_norm_eps"])
        return x / rms * weights[f"{name}.weight"]

    def split(x: Array, count: int) -> Array:
        return x.reshape(len(tokens), count, -1).transpose(1, 0, 2)

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        normed = norm(f"{layer}.input_layernorm", x)
        q, k, v = (
            split(linear(f"{layer}.self_attn.{name}_proj", normed), count)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotate(q, theta, scale), rotate(k, theta, scale)
        k, v = np.repeat(k, heads // kv_heads, axis=0), np.repeat(v, heads // kv_heads, axis=0)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]) + future
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attended = attention / attention.sum(-1, keepdims=True) @ v
        x = x + linear(f"{layer}.self_attn.o_proj", attended.transpose(1, 0, 2).reshape(len(tokens), -1))

        normed = norm(f"{layer}.post_attention_layernorm", x)
        gate = linear(f"{layer}.mlp.gate_proj", normed)
        x = x + linear(f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(f"{layer}.mlp.up_proj", normed))

    x = norm("model.norm", x)
    head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return x @ weights[f"{head}.weight"].T


def place(extend: str, trained: int, window: int, group: int | None, query: int, key: int) -> tuple[int, int]:
    """Positions that a query and a key count as for each other, from the papers, one pair of tokens at a time.

    Sources: Self-Extend arXiv 2401.01325, equations 3 and 4; Dual Chunk Attention arXiv 2402.17463, equations 2 to 7;
    `dynamic` leaves a query within the trained length as it is, and then takes the smallest group that keeps it within
    the window and two thirds of what that leaves of the trained length.
    """
    if extend == "dca":
        chunks = query // window - key // window
        if chunks == 0:
            return query % window, key % window
        return (min(window + query % window, trained - 1) if chunks == 1 else trained - 1), key % window
    if query - key < window:
        return query, key
    if group is None:
        kept = window + math.ceil(2 * (trained - window) / 3)
        group = (
            next(g for g in range(2, 2 * query + 3) if query // g + window - window // g < kept)
            if query >= trained
            else 1
        )
    return query // group + window - window // group, key // group


def mapped_attention(
    q: Array, k: Array, v: Array, wavelengths: Array, attention_scale: float, where: tuple[str, int, int, int | None],
    traditional: bool = False,
) -> Array:  # fmt: skip
    """Causal attention of one head, (L, D), whose every score has positions of its own: see `place`, which takes
    `where` before the query and the key."""
    output, table = np.zeros_like(v), angles(range(len(q) + where[1]), wavelengths)  # no position is larger
    for i in range(len(q)):
        of_queries, of_keys = (
            table[list(places)] for places in zip(*(place(*where, i, j) for j in range(i + 1)), strict=True)
        )
        queries = rotate(np.repeat(q[i : i + 1], i + 1, 0), of_queries, attention_scale, traditional)
        keys = rotate(k[: i + 1], of_keys, attention_scale, traditional)
        scores = (queries * keys).sum(-1) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        output[i] = weights @ v[: i + 1] / weights.sum()
    return output
