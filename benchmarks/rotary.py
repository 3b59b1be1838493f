"""Time one rotation of 32 query and 8 key heads, 2048 × 128: ours, mlx-lm's YarnRoPE, mx.fast.rope, and x + 1.

    python benchmarks/rotary.py [--repeats 25]

All contenders take turns in one run; the figures are medians in milliseconds. Also the largest errors of cosine and
sine at far positions, ours and those of mx.fast.rope. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

from mlx_resonance import ResonanceRoPE, RotaryFrequencies, yarn_frequencies

import mlx.core as mx
import numpy as np
from mlx_lm.models.rope_utils import YarnRoPE

Q_HEADS, KV_HEADS, LENGTH, DIMS = 32, 8, 2048, 128
FACTOR, ORIGINAL = 8, 4096
FAR = (131071, 1000003, 10000019)


def heads(count: int, dtype: mx.Dtype) -> mx.array:
    """A transposed view, (1, count, LENGTH, DIMS), as attention makes it from a projection."""
    x = mx.random.normal((1, LENGTH, count * DIMS)).astype(dtype)
    mx.eval(x)
    return x.reshape(1, LENGTH, count, DIMS).transpose(0, 2, 1, 3)


def contenders() -> dict[str, Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]]:
    ours = ResonanceRoPE(yarn_frequencies(DIMS, 10000.0, FACTOR, ORIGINAL).resonate())
    yarn = YarnRoPE(DIMS, scaling_factor=FACTOR, original_max_position_embeddings=ORIGINAL)
    freqs = mx.array(1 / ours.frequencies.inv_freq, dtype=mx.float32)

    def fast(x: mx.array) -> mx.array:
        return mx.fast.rope(x, DIMS, traditional=False, base=None, scale=1.0, offset=0, freqs=freqs)

    angles = ours.angles(LENGTH)
    mx.eval(angles)
    return {
        "ours": lambda q, k: ours.rotate(q, k),
        "ours_shared_angles": lambda q, k: ours.rotate(q, k, angles=angles),
        "mlx_lm_yarn": lambda q, k: (yarn(q), yarn(k)),
        "mx_fast_rope": lambda q, k: (fast(q), fast(k)),
        "add_one": lambda q, k: (q + 1, k + 1),
    }


def angle_errors() -> dict[str, dict[str, float]]:
    """Largest error of cosine and sine by position, over all pairs, without the attention scale."""
    frequencies = RotaryFrequencies(yarn_frequencies(DIMS, 10000.0, FACTOR, ORIGINAL).resonate().wavelengths)
    ours, freqs = ResonanceRoPE(frequencies), mx.array(1 / frequencies.inv_freq, dtype=mx.float32)
    unit = mx.concatenate([mx.ones((1, 1, 1, DIMS // 2)), mx.zeros((1, 1, 1, DIMS // 2))], axis=-1)
    errors: dict[str, dict[str, float]] = {"ours": {}, "mx_fast_rope": {}}
    for position in FAR:
        theta = 2 * np.pi * (position % frequencies.wavelengths) / frequencies.wavelengths  # whole numbers: exact
        exact = np.concatenate([np.cos(theta), np.sin(theta)])
        fast = mx.fast.rope(unit, DIMS, traditional=False, base=None, scale=1.0, offset=position, freqs=freqs)
        for name, rotated in (("ours", ours(unit, position)), ("mx_fast_rope", fast)):
            errors[name][str(position)] = float(f"{np.abs(np.array(rotated).ravel() - exact).max():.2g}")
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    report = {"device": str(mx.default_device()), "machine": platform.machine(), "mlx": mx.__version__}
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        q, k = heads(Q_HEADS, dtype), heads(KV_HEADS, dtype)
        times: dict[str, list[float]] = {name: [] for name in contenders()}
        runs = contenders()
        for repeat in range(repeats + 2):  # the first two compile and warm up
            for name, run in runs.items():
                start = time.perf_counter()
                mx.eval(run(q, k))
                if repeat >= 2:
                    times[name].append(time.perf_counter() - start)
        medians = {name: round(1000 * statistics.median(values), 2) for name, values in times.items()}
        name = str(dtype).removeprefix("mlx.core.")
        report[name] = medians | {"ours_to_mlx_lm_yarn": round(medians["ours"] / medians["mlx_lm_yarn"], 3)}
        print(name, medians)
    report["angle_errors"] = angle_errors()
    print("largest error of cos and sin:", report["angle_errors"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
