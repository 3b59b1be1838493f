"""CPU time of building one decode step, per layer, and its launches and bytes: ours beside mlx-lm's.

    python benchmarks/dispatch.py [--rounds 200] [--layers 32]

Between two tokens a CPU builds the graph of the next step; a GPU waits where that takes longer than its own work. The
same LLaMA is built with our attention and caches, and with mlx-lm's own; they take turns, times are medians of the
rounds, ratios medians of the rounds' ratios. MLX traces the step, which computes nothing; what it does with the graph
afterwards is not measured. Without a GPU, what MLX decomposes on a CPU (mx.fast.rope, rms_norm,
scaled_dot_product_attention) is replaced, for all, by a single operation. Launches are the graph's operations: a trace
has those one by one that mx.compile would join, for all alike; bytes count a KV cache as written whole.
Also: whether both write the same greedy tokens. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any
from unittest.mock import patch

from mlx_resonance import RopeConfig
from mlx_resonance.attention import Inference, set_rope
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.kernels import trial

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache
from reporting import markdown, median_ratio

TOKENS, CONTEXT = 100, 65536
IN_A_ROW = 6  # steps of a contender
HIDDEN, HEADS, KV_HEADS, VOCABULARY = 256, 8, 2, 512  # the time to build a graph does not depend on them
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": CONTEXT // 8}
# For functions of mx.fast that are one launch on a GPU: calls with as many inputs that MLX does not decompose on a CPU.
STAND_INS: dict[str, Any] = {
    "rope": lambda x, *_, offset, **__: mx.maximum(x, offset),
    "rms_norm": lambda x, weight, *_: mx.minimum(x, weight),
    "scaled_dot_product_attention": lambda q, k, v, **_: mx.depends(q, [k, v]),
}
# Operations that are only views of the same memory; constants are there before the step runs.
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze",
    "Transpose", "Unflatten", "View",
}  # fmt: skip

Step = Callable[..., mx.array]


def mlx_lms_own() -> Any:
    """mlx-lm's file in a module of its own: `set_rope` patches the classes of the usual one."""
    spec = spec_from_file_location("mlx_lm.models.llama_as_it_is", llama.__file__)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama_of(layers: int, scaling: dict[str, Any] | None, module: Any = None) -> Any:
    """A LLaMA with the same random weights each time; of mlx-lm's own file, unless another module is given."""
    module = module or mlx_lms_own()
    mx.random.seed(0)
    arguments = module.ModelArgs(
        model_type="llama", hidden_size=HIDDEN, num_hidden_layers=layers, intermediate_size=2 * HIDDEN,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT, rope_theta=10000.0, rope_scaling=scaling,
    )  # fmt: skip
    model = module.Model(arguments)
    mx.eval(model.parameters())
    return model


def ours(layers: int, scaling: dict[str, Any] | None) -> Any:
    """The same with our attention."""
    model = llama_of(layers, None, llama)
    config = {"head_dim": HIDDEN // HEADS, "rope_theta": 10000.0, "max_position_embeddings": CONTEXT}
    set_rope(model, RopeConfig.from_hf(config | {"rope_scaling": scaling}))
    return model


def contenders(layers: int) -> dict[str, Step]:
    """Every way to take one step."""
    resonant = ours(layers, YARN | {"rope_type": "resonance_yarn"})
    return {
        "ours": Inference(resonant),  # as our loops take it
        "ours_transformable": resonant,  # as training does
        "mlx_lm": llama_of(layers, None),
        "mlx_lm_yarn": llama_of(layers, YARN),
    }


@contextmanager
def a_gpu() -> Iterator[bool]:
    """Whether there is a GPU; if not, graphs are built as for one in this context."""
    if trial.current_backend() is not None:
        yield True
        return
    with ExitStack() as stack:
        for name, stand_in in STAND_INS.items():
            stack.enter_context(patch.object(mx.fast, name, stand_in))
        stack.enter_context(patch.object(trial, "current_backend", lambda: "metal"))
        stack.enter_context(patch.object(trial, "fault", lambda variant: None))
        yield False


def filled(step: Step, layers: int) -> list[KVCache]:
    """Caches of a text of TOKENS tokens: those that the step's own loop makes."""
    caches = make_cache(step.of, 256) if isinstance(step, Inference) else [KVCache() for _ in range(layers)]
    for cache in caches:
        zeros = mx.zeros((1, KV_HEADS, TOKENS, HIDDEN // HEADS))
        cache.update_and_fetch(zeros, zeros)
    mx.eval([cache.state for cache in caches])
    return caches


class Built(Exception):
    """Ends a trace when the graph is there."""


def build(step: Step, caches: list[KVCache], nodes: list[dict[str, Any]] | None = None) -> float:
    """Build one step in a trace. Returns the seconds that it took; the operations go to `nodes`, if given."""
    arrays = [array for cache in caches for array in (cache.keys, cache.values)]
    seconds = 0.0

    def fill(arrays: Any) -> None:
        for cache, keys, values in zip(caches, arrays[::2], arrays[1::2], strict=True):
            cache.keys, cache.values, cache.offset = keys, values, TOKENS

    def traced(token: mx.array, *traced_arrays: mx.array) -> mx.array:
        nonlocal seconds
        fill(traced_arrays)
        start = time.thread_time()
        logits = step(token, cache=caches)
        seconds = time.thread_time() - start
        if nodes is None:
            raise Built
        return logits

    with suppress(Built):
        mx.export_function([].append if nodes is None else nodes.append, traced, mx.array([[1]]), *arrays)
    fill(arrays)
    return seconds


def measure(steps: dict[str, Step], layers: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds per layer of every round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    caches = {name: filled(step, layers) for name, step in steps.items()}
    gc.collect()
    gc.disable()  # a collection would hit whoever is building
    for _ in range(rounds):
        for name in random.sample(list(steps), len(steps)):  # nobody always follows the same one
            # Several in a row, as in a loop that generates; the first one is after another contender's.
            _, *taken = [build(steps[name], caches[name]) for _ in range(IN_A_ROW)]
            times[name].append(1e6 * statistics.median(taken) / layers)
    gc.enable()
    return times


def size(entry: tuple[str, tuple[int, ...], mx.Dtype]) -> int:
    """Bytes of an array in an exported graph."""
    return math.prod(entry[1]) * entry[2].size


def traffic(step: Step, layers: int) -> dict[str, Counter[str]]:
    """What a step launches: how often, and the bytes read and written, both by the name of the operation.

    A view is not launched, and an array that repeats another counts as that one.
    """
    nodes: list[dict[str, Any]] = []
    build(step, filled(step, layers), nodes)
    launches, moved, view_of = Counter[str](), Counter[str](), {}
    for node in (node for node in nodes if node["type"] == "primitive"):
        read = [min(size(entry), view_of.get(entry[0], size(entry))) for entry in node["inputs"]]
        if node["name"] in VIEWS:
            view_of[node["outputs"][0][0]] = read[0]
        else:
            launches[node["name"]] += 1
            moved[node["name"]] += sum(read) + sum(map(size, node["outputs"]))
    return {"launches": launches, "bytes": moved}


def rotation(step: Step, plain: Step, layers: int) -> dict[str, int]:
    """The launches and bytes of a step, and how many of them are the rotation's: what `plain`, without rope, lacks."""
    counted, without = traffic(step, layers), traffic(plain, layers)
    result = {}
    for name, numbers in counted.items():
        result[name] = sum(numbers.values())
        result[f"{name}_of_the_rotation"] = result[name] - sum(without[name].values())
    return result


def greedy(model: Any, count: int = 32) -> list[int]:
    """The tokens that mlx-lm's loop writes after a prompt, on the device and with the operations that there are."""
    step = Inference(model) if hasattr(model.args, "rope") else model
    cache = [KVCache() for _ in model.layers]
    return [token for token, _ in generate_step(mx.arange(1, 50), step, max_tokens=count, prompt_cache=cache)]


def without_rope(layers: int) -> Step:
    """The same model with no rotation at all."""
    model = llama_of(layers, None)
    for layer in model.layers:
        layer.self_attn.rope = lambda x, offset=0: x
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    layers, steps = arguments.layers, contenders(arguments.layers)
    same = greedy(ours(layers, None)) == greedy(llama_of(layers, None))  # plain RoPE: both have the same angles
    with a_gpu() as real:
        times = measure(steps, layers, arguments.rounds)
        plain = without_rope(layers)
        # MLX exports no function that it could differentiate.
        graphs = {name: rotation(step, plain, layers) for name, step in steps.items() if name != "ours_transformable"}
    report: dict[str, Any] = {
        "device": str(mx.default_device()), "machine": platform.machine(), "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__, "layers": layers, "rounds": arguments.rounds, "stand_ins": not real,
        "same_greedy_tokens": same,
        "us_per_layer": {name: round(statistics.median(values), 1) for name, values in times.items()},
        "ratio_to_mlx_lm": {name: median_ratio(values, times["mlx_lm"]) for name, values in times.items()},
        "graphs": graphs,
    }  # fmt: skip
    columns = list(graphs["ours"])
    rows = [
        [name.replace("_", " "), report["us_per_layer"][name], report["ratio_to_mlx_lm"][name]]
        + [graphs.get(name, {}).get(column, "-") for column in columns]
        for name in steps
    ]
    titles = ["a step of", "µs per layer", "ratio to mlx lm", *(column.replace("_", " ") for column in columns)]
    print(markdown(titles, rows))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
