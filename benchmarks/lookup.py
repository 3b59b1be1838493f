"""Tokens per second with prompt lookup, without it, and of mlx-lm, on four kinds of prompts.

    python benchmarks/lookup.py [--model build/smollm2] [--prompts 4] [--repeats 3] [--new 96]

Each prompt is read once per model; its greedy answer is then written by mlx-lm's loop, plainly, and with prompt lookup
as it is by default, in turns. Figures are medians over rounds and prompts, ratios the medians of the rounds' ratios; a
time includes the first use of the index. Whether the texts are equal is lookup_proof.py's question. Last line: one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_resonance
from mlx_resonance import Checkpoint
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.prefill import prefill
from mlx_resonance.rope import expect

import mlx.core as mx
import mlx_lm
from documents import FOLDER
from lookup_prompts import KINDS, Prompt, prompts
from lookup_proof import Answer, looping, write
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from reporting import exit_with, markdown

SIDES = ("mlx_lm", "plain", "lookup")


def of_mlx_lm(model: Any, cache: list[Any], prompt: list[int], new: int, ends: set[int]) -> Answer:
    """An answer of mlx-lm's loop, from caches that hold the prompt but for its last token; then they do so again."""
    tokens, start = [], time.perf_counter()
    steps = generate_step(mx.array(prompt[-1:]), model, max_tokens=new, prompt_cache=cache)
    for token, _ in steps:
        tokens.append(int(token))
        if token in ends:
            break
    seconds = time.perf_counter() - start
    steps.close()
    for layer in cache:
        layer.trim(layer.offset - (len(prompt) - 1))
    return Answer(tokens, [], len(tokens), seconds)


def rounds(model: Any, stock: Any, prompt: Prompt, new: int, ends: set[int], repeats: int) -> dict[str, list[Answer]]:
    """The answers of all sides to a prompt, in turns, in both orders, after a few tokens that do not count."""
    expect(model, len(prompt.tokens))
    own, its = make_cache(model, len(prompt.tokens) + new + 1), make_prompt_cache(stock)
    prefill(model, prompt.tokens, own)
    stock(mx.array(prompt.tokens[:-1])[None], cache=its)
    mx.eval([layer.state for layer in its])
    sides: dict[str, Callable[[int], Answer]] = {
        "mlx_lm": lambda new: of_mlx_lm(stock, its, prompt.tokens, new, ends),
        "plain": lambda new: write(model, own, prompt.tokens, new, ends, "off"),
        "lookup": lambda new: write(model, own, prompt.tokens, new, ends, "auto"),
    }
    found: dict[str, list[Answer]] = {side: [] for side in SIDES}
    for side in sides.values():
        side(4)
    for turn in range(repeats):
        for side in SIDES if turn % 2 else reversed(SIDES):
            found[side].append(sides[side](new))
    return found


def figures(answers: list[dict[str, list[Answer]]]) -> dict[str, Any]:
    """Figures of a kind, from the rounds of its prompts."""

    def speed(answer: Answer) -> float:
        return len(answer.tokens) / answer.seconds

    def ratio(side: str) -> float:
        pairs = [zip(each["lookup"], each[side], strict=True) for each in answers]
        return round(statistics.median(speed(one) / speed(other) for pair in pairs for one, other in pair), 3)

    report: dict[str, Any] = {
        f"{side}_tokens_per_s": round(statistics.median(speed(answer) for each in answers for answer in each[side]), 2)
        for side in SIDES
    }
    lookups = [answer for each in answers for answer in each["lookup"]]
    count = sum(len(answer.tokens) for answer in lookups)
    return report | {
        "times_plain": ratio("plain"),
        "times_mlx_lm": ratio("mlx_lm"),
        "passes_per_token": round(sum(answer.passes for answer in lookups) / count, 3),
        "looping": round(statistics.mean(looping(each["plain"][0].tokens) for each in answers), 3),
        "same_text": sum(each["plain"][0].tokens == each["lookup"][0].tokens for each in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("build") / "smollm2", help="a checkpoint")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each kind")
    parser.add_argument("--limit", type=int, default=1000, help="tokens of the longest")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--work-dir", type=Path, default=FOLDER, help="where documents.py keeps its texts")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    model, tokenizer, stock = checkpoint.load(), checkpoint.tokenizer, mlx_lm.load(str(args.model))[0]
    report: dict[str, Any] = {
        "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "mlx_resonance": mlx_resonance.__version__,
        "device": str(mx.default_device()), "model": checkpoint.folder.name,
        "dtype": str(model.model.norm.weight.dtype).split(".")[-1], "new": args.new, "prompts": args.prompts,
        "repeats": args.repeats, "kinds": {},
    }  # fmt: skip
    for kind in KINDS:
        asked = prompts(tokenizer, kind, args.prompts, args.limit, args.work_dir)
        ends = tokenizer.eos_token_ids
        report["kinds"][kind] = figures(
            [rounds(model, stock, prompt, args.new, ends, args.repeats) for prompt in asked]
        )
    columns = ("kind", *next(iter(report["kinds"].values())))
    print(markdown(columns, ((kind, *row.values()) for kind, row in report["kinds"].items())))
    print(json.dumps(report))


if __name__ == "__main__":
    exit_with(main)
