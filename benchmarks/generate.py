"""Tokens per second of ours and of stock mlx-lm on the same weights; a second question with the on-disk KV cache.

    python benchmarks/generate.py [--model build/smollm2-32k] [--repeats 5] [--document 4096] [--questions-only]

Without --model: the tiny checkpoint, stretched to 16 times its context, and a random LLaMA of 100 M parameters. A model
is converted to unrounded angles, which both read, in float32 on a CPU and float16 on a GPU. Ours and mlx-lm's take
turns; figures are medians. Then the first token of a second question on a document, with and without the on-disk KV
cache, and the bytes that the two questions write to it. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx_resonance
from mlx_resonance import load, stream_generate
from mlx_resonance.convert import convert
from mlx_resonance.generation import PromptCache

import mlx.core as mx
import mlx_lm
from random_llama import TINY, make
from reporting import exit_with, markdown, median_ratio

DTYPE = "float32" if mx.default_device() == mx.cpu else "float16"
RANDOM = (768, 2048, 13, 12, 12, 8192, mx.float32)  # hidden, feed-forward, layers, heads, key heads, vocabulary
PROMPT, NEW = 1024, 64  # tokens
QUESTION = 32


class Run(NamedTuple):
    """One answer: tokens of prompt and of answer per second, and the answer's ids."""

    prompt: float
    answer: float
    tokens: list[int]


def text(length: int) -> list[int]:
    """A prompt of `length` token ids."""
    return [i % 2000 + 10 for i in range(length)]


def run(generate: Any, model: Any, tokenizer: Any, prompt: int, new: int, **options: Any) -> Run:
    """Answer a prompt of `prompt` tokens with `new` ones, greedily."""
    tokenizer.eos_token_ids = set()  # nothing ends an answer early
    pieces = list(generate(model, tokenizer, text(prompt), max_tokens=new, **options))
    return Run(pieces[-1].prompt_tps, pieces[-1].generation_tps, [piece.token for piece in pieces])


def in_turns(
    sides: Mapping[str, Callable[[], Run]], repeats: int, warm_up: bool = True, deadline: float = math.inf
) -> dict[str, list[Run]]:
    """Run every side in turns, in both orders.

    Args:
        sides: by name, what to run.
        repeats: number of rounds.
        warm_up: run each once before, which does not count.
        deadline: of `time.monotonic`: no round but the first starts after it.
    """
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for turn in range(0 if warm_up else 1, repeats + 1):
        if turn > 1 and time.monotonic() > deadline:
            break
        for name in runs if turn % 2 else reversed(runs):
            found = sides[name]()
            if turn:
                runs[name].append(found)
    return runs


def compare(folder: Path, repeats: int) -> dict[str, Any]:
    """Ours and mlx-lm's in turns."""
    ours, stock = load(folder), mlx_lm.load(str(folder))
    sides = {
        "ours": lambda: run(stream_generate, *ours, PROMPT, NEW, prompt_lookup="off"),  # lookup.py measures that
        "mlx_lm": lambda: run(mlx_lm.stream_generate, *stock, PROMPT, NEW),
    }
    runs = in_turns(sides, repeats)
    report: dict[str, Any] = {}
    for i, kind in enumerate(("prompt", "answer")):
        speeds = {name: [found[i] for found in of_side] for name, of_side in runs.items()}
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        report[kind] = {name: round(value, 1) for name, value in medians.items()}
        report[kind]["ratio"] = round(medians["ours"] / medians["mlx_lm"], 3)
        report[kind]["median_of_ratios"] = median_ratio(speeds["ours"], speeds["mlx_lm"])
    return report


def first_token(model: Any, tokenizer: Any, tokens: list[int], kept: PromptCache | None) -> float:
    """Seconds to the first token."""
    start = time.perf_counter()
    next(stream := stream_generate(model, tokenizer, tokens, max_tokens=1, disk_cache=kept))
    seconds = time.perf_counter() - start
    stream.close()
    return seconds


def size(folder: str) -> int:
    """Bytes of the KV caches in a folder."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def second_question(model: Any, tokenizer: Any, length: int, repeats: int) -> dict[str, float]:
    """Seconds to the first token of a question on a document, without the on-disk KV cache and with it; its bytes."""
    document = text(length)
    times: dict[str, list[float]] = {"uncached": [], "cached": []}
    with tempfile.TemporaryDirectory() as kept:
        first_token(model, tokenizer, [*document, *range(20, 20 + QUESTION)], PromptCache(kept, "key"))
        first = size(kept)
        for turn in range(repeats):
            tokens = [*document, *range(100 * turn + 100, 100 * turn + 100 + QUESTION)]
            times["uncached"].append(first_token(model, tokenizer, tokens, None))
            times["cached"].append(first_token(model, tokenizer, tokens, PromptCache(kept, "key")))
        later = (size(kept) - first) / repeats
    medians = {name: statistics.median(values) for name, values in times.items()}
    rounded = {f"{name}_seconds": round(value, 4) for name, value in medians.items()}
    rounded |= {"first_written_mb": round(first / 1e6, 1), "second_written_mb": round(later / 1e6, 1)}
    return rounded | {"times_sooner": round(median_ratio(times["uncached"], times["cached"]), 1)}


def sources(model: Path | None, folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By name: a checkpoint, and how its context is stretched."""
    if model is not None:
        return {model.name: (model, {})}
    stretched = {"tiny": (TINY, 16), "random": (make(folder / "source", *RANDOM), 1)}
    return {name: (source, {"rope": "yarn", "factor": factor}) for name, (source, factor) in stretched.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; default: the tiny one and a random one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--document", type=int, default=4096, help="tokens of the document")
    parser.add_argument("--questions-only", action="store_true", help="leave out the comparison with mlx-lm")
    args = parser.parse_args()
    repeats = args.repeats
    report: dict[str, Any] = {
        "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "mlx_resonance": mlx_resonance.__version__,
        "device": str(mx.default_device()), "dtype": DTYPE, "prompt": PROMPT, "new": NEW, "repeats": repeats,
    }  # fmt: skip
    rows, questions = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, (source, scaling) in sources(args.model, folder).items():
            convert(source, folder / name, resonance=False, dtype=DTYPE, **scaling)
            report[name] = {} if args.questions_only else compare(folder / name, repeats)
            rows += [(name, kind, *speed.values()) for kind, speed in report[name].items()]
            report[name]["second_question"] = second_question(*load(folder / name), args.document, repeats)
            questions.append((name, *report[name]["second_question"].values()))
    if rows:
        columns: tuple[str, ...] = ("model", "", "ours, tokens/s", "mlx-lm, tokens/s", "ratio", "median of ratios")
        print(markdown(columns, rows), end="\n\n")
    columns = (
        f"first token of a second question on {args.document:,} tokens",
        "seconds",
        "with the on-disk KV cache",
        "written for the first, MB",
        "for each later one, MB",
        "times sooner",
    )
    print(markdown(columns, questions))
    print(json.dumps(report))


if __name__ == "__main__":
    exit_with(main)
