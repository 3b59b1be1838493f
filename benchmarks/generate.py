"""Tokens per second of ours and of stock mlx-lm on the same weights; the on-disk KV cache; KV formats' perplexity.

    python benchmarks/generate.py [--repeats 5]

The tiny checkpoint and a random LLaMA of 100 M parameters are converted to plain YaRN, which both read, in float32 on a
CPU and float16 on a GPU. Ours and mlx-lm's take turns; figures are medians. Then a second question on a document of 4 k
tokens with and without the on-disk KV cache, and the tiny checkpoint's perplexity on held-out Python with a KV cache of
16 (or 32), 8 and 4 bits. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx_resonance
from mlx_resonance import load, stream_generate
from mlx_resonance.convert import convert
from mlx_resonance.generation import PromptCache
from mlx_resonance.generation.cache import make_cache

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from random_llama import TINY, make
from rich.console import Console
from rich.table import Table

DTYPE = "float32" if mx.default_device() == mx.cpu else "float16"
RANDOM = (768, 2048, 13, 12, 12, 8192, mx.float32)  # hidden, feed-forward, layers, heads, key heads, vocabulary
PROMPT, NEW = 1024, 64  # tokens
DOCUMENT, QUESTION = 4096, 32


def speeds(generate: Any, model: Any, tokenizer: Any) -> tuple[float, float]:
    """Tokens of prompt and of answer per second."""
    *_, last = generate(model, tokenizer, list(range(10, 10 + PROMPT)), max_tokens=NEW)
    return last.prompt_tps, last.generation_tps


def compare(folder: Path, repeats: int) -> dict[str, Any]:
    """Ours and mlx-lm's in turns, after a warm-up of each."""
    ours, stock = load(folder), mlx_lm.load(str(folder))
    for _, tokenizer in (ours, stock):  # nothing ends an answer early
        tokenizer.eos_token_ids = set()
    runs: dict[str, list[tuple[float, float]]] = {"ours": [], "mlx_lm": []}
    for turn in range(repeats + 1):
        sides = [("ours", stream_generate, ours), ("mlx_lm", mlx_lm.stream_generate, stock)]
        for name, generate, (model, tokenizer) in sides if turn % 2 else sides[::-1]:
            found = speeds(generate, model, tokenizer)
            if turn:
                runs[name].append(found)
    report: dict[str, Any] = {}
    for i, kind in enumerate(("prefill", "decode")):
        medians = {name: statistics.median(run[i] for run in found) for name, found in runs.items()}
        ratios = [one[i] / other[i] for one, other in zip(runs["ours"], runs["mlx_lm"], strict=True)]
        report[kind] = {name: round(value, 1) for name, value in medians.items()}
        report[kind]["ratio"] = round(medians["ours"] / medians["mlx_lm"], 3)
        report[kind]["median_of_ratios"] = round(statistics.median(ratios), 3)
    return report


def first_token(model: Any, tokenizer: Any, tokens: list[int], kept: PromptCache | None) -> float:
    """Seconds to the first token."""
    start = time.perf_counter()
    next(stream := stream_generate(model, tokenizer, tokens, max_tokens=1, disk_cache=kept))
    seconds = time.perf_counter() - start
    stream.close()
    return seconds


def second_question(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds to the first token of a question on a document, without the on-disk KV cache and with it."""
    model, tokenizer = load(folder)
    document = [i % 2000 + 10 for i in range(DOCUMENT)]
    times: dict[str, list[float]] = {"uncached": [], "cached": []}
    with tempfile.TemporaryDirectory() as kept:
        first_token(model, tokenizer, [*document, *range(20, 20 + QUESTION)], PromptCache(kept, "key"))
        for turn in range(repeats):
            tokens = [*document, *range(100 * turn + 100, 100 * turn + 100 + QUESTION)]
            times["uncached"].append(first_token(model, tokenizer, tokens, None))
            times["cached"].append(first_token(model, tokenizer, tokens, PromptCache(kept, "key")))
    medians = {name: statistics.median(values) for name, values in times.items()}
    rounded = {f"{name}_seconds": round(value, 4) for name, value in medians.items()}
    return rounded | {"times_sooner": round(medians["uncached"] / medians["cached"], 1)}


def perplexities(folder: Path) -> dict[str, float]:
    """Of the tiny checkpoint on a held-out text of 4096 tokens, by bits of the KV cache."""
    model, tokenizer = load(folder)
    names = json.loads((TINY / "training.json").read_text())["held_out_files"]
    root = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((root / name).read_text(errors="replace") for name in names if (root / name).is_file())
    tokens = [tokenizer.bos_token_id, *tokenizer.encode(text[: 10 * DOCUMENT], add_special_tokens=False)][
        : DOCUMENT + 1
    ]
    result = {}
    for kv_bits in (None, 8, 4):
        cache = make_cache(model, DOCUMENT, kv_bits)
        losses = []
        for at in range(0, len(tokens) - 1, 512):
            inputs, targets = tokens[at : at + 512], tokens[at + 1 : at + 513]
            inputs = inputs[: len(targets)]
            logits = model(mx.array(inputs)[None], cache=cache)[0]
            losses += nn.losses.cross_entropy(logits, mx.array(targets)).tolist()
        result["unquantized" if kv_bits is None else f"{kv_bits} bit"] = round(math.exp(statistics.fmean(losses)), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    report: dict[str, Any] = {
        "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "mlx_resonance": mlx_resonance.__version__,
        "device": str(mx.default_device()), "dtype": DTYPE, "prompt": PROMPT, "new": NEW, "repeats": repeats,
    }  # fmt: skip
    table = Table("model", "", "ours, tokens/s", "mlx-lm, tokens/s", "ratio", "median of ratios")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = {"tiny": (TINY, 16), "random": (make(folder / "source", *RANDOM), 1)}
        for name, (source, factor) in sources.items():
            settings: dict[str, Any] = {"rope": "yarn", "factor": factor, "resonance": False, "dtype": DTYPE}
            convert(source, folder / name, **settings)
            report[name] = compare(folder / name, repeats)
            for kind, row in report[name].items():
                table.add_row(name, kind, *map(str, row.values()))
        report["second_question"] = {name: second_question(folder / name, repeats) for name in sources}
        report["perplexity"] = perplexities(folder / "tiny")
    console = Console()
    console.print(table)
    for name, row in report["second_question"].items():
        console.print(
            f"first token of a second question on {DOCUMENT} tokens, {name}: {row['uncached_seconds']} s; "
            f"with the on-disk KV cache {row['cached_seconds']} s, {row['times_sooner']} times sooner"
        )
    console.print("perplexity by KV format:", report["perplexity"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
