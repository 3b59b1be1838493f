"""Time one rotation of 32 query and 8 key heads, 2048 × 128: ours, mlx-lm's YarnRoPE, mx.fast.rope, and x + 1.

    python benchmarks/rotary.py [--repeats 25]

All contenders take turns in one run; the figures are medians in milliseconds. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

from mlx_resonance import ResonanceRoPE, yarn_frequencies

import mlx.core as mx
from mlx_lm.models.rope_utils import YarnRoPE

Q_HEADS, KV_HEADS, LENGTH, DIMS = 32, 8, 2048, 128
FACTOR, ORIGINAL = 8, 4096


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
    print(json.dumps(report))


if __name__ == "__main__":
    main()
