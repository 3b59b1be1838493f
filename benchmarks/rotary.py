"""Time the rotation of queries and keys: ours, mlx-lm's YarnRoPE, mx.fast.rope, and x + 1, the floor.

    python benchmarks/rotary.py [--repeats 25] [--figure angle-error.svg]

All contenders take turns in one run on MLX's default device; times are medians in milliseconds, ratios medians of the
rounds' ratios. mx.fast.rope has our wavelengths but no attention scale. Also: the operations of each contender, counted
in MLX's graph on that device, and the largest error of cosine and sine at far positions. Last line: one JSON object.

A CPU says nothing about a GPU: mx.fast.rope is one launch per array there, and 16 operations on a CPU.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_resonance import ResonanceRoPE, RotaryFrequencies, yarn_frequencies
from mlx_resonance.plots import BLUE, GREEN, GREY, ORANGE, STYLE

import matplotlib
import mlx.core as mx
import mlx_lm
import numpy as np
from matplotlib.figure import Figure
from mlx_lm.models.rope_utils import YarnRoPE
from reporting import median_ratio
from rich.console import Console
from rich.table import Table

FACTOR, ORIGINAL, BASE = 8, 4096, 10000.0
# batch, tokens, query heads, key heads, features of a head, offset
CASES = {
    "prefill": (1, 2048, 32, 8, 128, 0),
    "decode": (1, 1, 32, 8, 128, 100_000),
    "decode, batch of 32": (32, 1, 32, 8, 128, 100_000),
    "small heads": (1, 512, 4, 4, 64, 0),
}
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
FAR = (131_071, 1_000_003, 10_000_019)
# Operations that are only views of the same memory in these graphs.
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "CustomTransforms", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip

Rotation = Callable[[mx.array, mx.array], Any]


def heads(batch: int, length: int, count: int, dims: int, dtype: mx.Dtype) -> mx.array:
    """A transposed view, (B, H, L, D), as attention makes it from a projection."""
    x = mx.random.normal((batch, length, count * dims)).astype(dtype)
    mx.eval(x)
    return x.reshape(batch, length, count, dims).transpose(0, 2, 1, 3)


def contenders(length: int, dims: int, offset: int) -> dict[str, Rotation]:
    """Every way to rotate, as a function of queries and keys."""
    ours = ResonanceRoPE(yarn_frequencies(dims, BASE, FACTOR, ORIGINAL).resonate())
    yarn = YarnRoPE(dims, base=BASE, scaling_factor=FACTOR, original_max_position_embeddings=ORIGINAL)
    freqs = mx.array(1 / ours.frequencies.inv_freq, dtype=mx.float32)

    def fast(x: mx.array) -> mx.array:
        return mx.fast.rope(x, dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs)

    angles = ours.angles(length, offset)
    mx.eval(angles.table or angles.offset)
    return {
        "ours": lambda q, k: ours.rotate(q, k, offset),
        "ours_shared_angles": lambda q, k: ours.rotate(q, k, angles=angles),
        "mlx_lm_yarn": lambda q, k: (yarn(q, offset), yarn(k, offset)),
        "mx_fast_rope": lambda q, k: (fast(q), fast(k)),
        "add_one": lambda q, k: (q + 1, k + 1),
    }


def times_of(case: str, dtype: mx.Dtype, rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of one rotation, in each round, by contender; `calls` of them are evaluated at once."""
    batch, length, q_heads, k_heads, dims, offset = CASES[case]
    q, k = heads(batch, length, q_heads, dims, dtype), heads(batch, length, k_heads, dims, dtype)
    runs = contenders(length, dims, offset)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):  # the first two compile and warm up
        for name, run in runs.items():
            start = time.perf_counter()
            mx.eval([run(q, k) for _ in range(calls)])
            if i >= 2:
                times[name].append((time.perf_counter() - start) / calls)
    return times


def measure(case: str, dtype: mx.Dtype, repeats: int) -> dict[str, float]:
    """Medians in milliseconds; our time as a part of YarnRoPE's, and the floor's as a part of ours."""
    times = times_of(case, dtype, repeats if CASES[case][1] > 1 else 8 * repeats)
    medians = {name: round(1000 * statistics.median(values), 4) for name, values in times.items()}
    return medians | {
        "ours_to_mlx_lm_yarn": median_ratio(times["ours"], times["mlx_lm_yarn"]),
        "floor_to_ours": median_ratio(times["add_one"], times["ours"]),
    }


def computing(run: Rotation, q: mx.array, k: mx.array) -> list[str]:
    """The operations of a rotation's graph that compute something."""
    text = io.StringIO()
    mx.export_to_dot(text, *run(q, k))
    operations = re.findall(r'\[label ="(\w+)', text.getvalue())
    return [name for name in operations if name not in VIEWS]


def traffic(run: Rotation, q: mx.array, k: mx.array) -> dict[str, int]:
    """Operations that compute, before MLX compiles any, and the bytes they read and write."""
    nodes: list[dict[str, Any]] = []
    mx.export_function(nodes.append, lambda q, k: list(run(q, k)), q, k)
    operations, moved, view_of = 0, 0, {}
    for node in (node for node in nodes if node["type"] == "primitive"):
        read = [min(size(entry), view_of.get(entry[0], size(entry))) for entry in node["inputs"]]
        if node["name"] in VIEWS:
            view_of[node["outputs"][0][0]] = read[0]  # a broadcast array counts as the array that it repeats
        else:
            operations += 1
            moved += sum(read) + sum(map(size, node["outputs"]))
    return {"operations": operations, "bytes": moved}


def size(entry: tuple[str, tuple[int, ...], mx.Dtype]) -> int:
    """Bytes of an array in an exported graph."""
    return int(np.prod(entry[1])) * entry[2].size


def graphs() -> dict[str, Any]:
    """Operations and bytes of one prefill in bfloat16, on MLX's default device."""
    batch, length, q_heads, k_heads, dims, offset = CASES["prefill"]
    q, k = (heads(batch, length, count, dims, mx.bfloat16) for count in (q_heads, k_heads))
    rotations = contenders(length, dims, offset)
    result: dict[str, Any] = {}
    for name in ("ours", "mlx_lm_yarn", "mx_fast_rope", "add_one"):
        run = rotations[name]
        mx.eval(run(q, k))  # make first what is made once, such as YarnRoPE's frequencies
        operations = computing(run, q, k)
        compiled = any(operation.startswith("Compiled") for operation in operations)  # hides what it moves
        result[name] = {"operations": len(operations), "bytes": None} if compiled else traffic(run, q, k)
    return result


def angle_errors(positions: list[int]) -> dict[str, list[float]]:
    """Largest error of cosine and sine over all pairs, without the attention scale, for each position."""
    dims = 128
    yarn = yarn_frequencies(dims, BASE, FACTOR, ORIGINAL)
    freqs = mx.array(yarn.resonate().wavelengths / (2 * np.pi), dtype=mx.float32)
    mlx_lm_yarn = YarnRoPE(dims, base=BASE, scaling_factor=FACTOR, original_max_position_embeddings=ORIGINAL)
    rotations: dict[str, tuple[RotaryFrequencies, float, Callable[[mx.array, int], mx.array]]] = {
        "ours": (yarn.resonate(), yarn.attention_scale, ResonanceRoPE(yarn.resonate())),
        "ours_yarn": (yarn, yarn.attention_scale, ResonanceRoPE(yarn)),
        "mlx_lm_yarn": (yarn, yarn.attention_scale, mlx_lm_yarn),
        "mx_fast_rope": (
            yarn.resonate(),
            1.0,
            lambda x, m: mx.fast.rope(x, dims, traditional=False, base=None, scale=1.0, offset=m, freqs=freqs),
        ),
    }
    errors = {}
    for name, (frequencies, scale, rotate) in rotations.items():
        errors[name] = []
        for position in positions:
            # fmod is exact in float64, so the only roundings are of the quotient and of the product with 2π.
            theta = 2 * np.pi * (np.fmod(position, frequencies.wavelengths) / frequencies.wavelengths)
            exact = np.concatenate([np.cos(theta), np.sin(theta)])
            unit = mx.concatenate([mx.ones((1, 1, 1, dims // 2)), mx.zeros((1, 1, 1, dims // 2))], axis=-1)
            rotated = np.array(rotate(unit, position), dtype=np.float64).ravel() / scale
            errors[name].append(float(f"{np.abs(rotated - exact).max():.2g}"))
    return errors


def plot_angle_errors(positions: Sequence[int], errors: Mapping[str, Sequence[float]], path: str | Path) -> None:
    """Draw the largest error of cosine and sine over the position, both logarithmic.

    Args:
        positions: tokens, from 1 on.
        errors: of `ours`, `ours_yarn`, `mlx_lm_yarn` and `mx_fast_rope`, one for each position.
        path: the image to write; its suffix gives the format.
    """
    lines = {
        "mlx_lm_yarn": ("mlx-lm YarnRoPE", GREEN, "--"),
        "mx_fast_rope": ("mx.fast.rope, our wavelengths", ORANGE, "-"),
        "ours_yarn": ("ours, YaRN", GREY, "--"),
        "ours": ("ours, Resonance YaRN", BLUE, "-"),
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axis = figure.subplots()
        for name, (label, color, style) in lines.items():
            axis.plot(positions, errors[name], style, color=color, label=label, linewidth=1.4)
        axis.axhline(2.5e-7, color="black", linewidth=0.8, linestyle=":", label="bound of ours: 2.5e-7")
        axis.set(xscale="log", yscale="log", xlabel="position", ylabel="largest error of cos and sin", ylim=(2e-8, 4))
        axis.legend(loc="upper left")
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--figure", help="draw the errors of the angles over the position into this file")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "device": str(mx.default_device()), "machine": platform.machine(), "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__, "repeats": arguments.repeats, "times": {},
    }  # fmt: skip
    console, table = Console(width=120), None
    for case in CASES:
        for dtype in DTYPES:
            name = str(dtype).removeprefix("mlx.core.")
            row = measure(case, dtype, arguments.repeats)
            report["times"].setdefault(case, {})[name] = row
            table = table or Table("ms", "", *(column.replace("_", " ") for column in row))
            table.add_row(case, name, *(f"{value:.4g}" for value in row.values()))
    console.print(table)
    report["graphs"] = graphs()
    report["angle_errors"] = {"positions": list(FAR), **angle_errors(list(FAR))}
    console.print(report["graphs"], report["angle_errors"])
    if arguments.figure:
        positions = sorted({round(2 ** (i / 4)) for i in range(4 * 31)} | set(FAR) | {2**31 - 1})
        errors = angle_errors(positions)
        plot_angle_errors(positions, errors, arguments.figure)
        report["angle_errors"]["largest_of_ours"] = max(errors["ours"] + errors["ours_yarn"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
