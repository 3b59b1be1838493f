"""Is greedy text with prompt lookup the text without it? Four kinds of prompts, and what the two took.

    python benchmarks/lookup_proof.py [--model build/smollm2] [--prompts 190] [--long 10] [--limit 1000] [--new 64]

Each prompt is read once. From there the answer is written plainly, then with prompt lookup. Where the texts differ, the
first two tokens that do, and the logits of both in both passes, are shown. `--dtype bfloat16` or `--bits 4` casts or
quantizes the weights; 4-bit weights compute in float32. The run log has a line per prompt: a killed run resumes. Last
line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import mlx_resonance
from mlx_resonance import Checkpoint
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.decode import decode
from mlx_resonance.generation.lookup import lookup_proposals
from mlx_resonance.generation.prefill import prefill
from mlx_resonance.generation.prompt_cache import common_prefix
from mlx_resonance.generation.sampling import Sampling
from mlx_resonance.generation.speculation import Proposals
from mlx_resonance.rope import expect
from mlx_resonance.run_log import RunLog

import mlx.core as mx
import mlx.nn as nn
from documents import FOLDER, digest_of
from lookup_prompts import KINDS, LONG, Prompt, long_prompts, prompts
from mlx.utils import tree_map
from reporting import exit_with, markdown

LOOP = 8  # tokens that occurred earlier in the same answer: from there on it loops


class Answer(NamedTuple):
    """A text: its tokens, the log-probabilities of each, and the passes of the model and seconds that it took."""

    tokens: list[int]
    logprobs: list[mx.array]
    passes: int
    seconds: float


def write(model: Any, cache: list[Any], prompt: list[int], new: int, ends: set[int], setting: Any) -> Answer:
    """Write a greedy answer from caches that hold the prompt but for its last token; then trim them to that."""
    proposals, passes, tokens, logprobs = lookup_proposals(prompt, setting), [0], [], []
    if proposals is not None:
        count_passes(proposals, passes)
    start = time.perf_counter()
    steps = decode(model, cache, prompt, max_tokens=new, sampler=Sampling().sampler(), proposals=proposals)
    for token, scores in steps:
        tokens.append(token)
        logprobs.append(scores)
        if token in ends:
            break
    seconds = time.perf_counter() - start
    steps.close()
    for layer in cache:
        layer.trim(layer.offset - (len(prompt) - 1))
    return Answer(tokens, logprobs, passes[0] if proposals is not None else len(tokens), seconds)


def count_passes(proposals: Proposals, passes: list[int]) -> None:
    """Count the passes of the model that proposals hear of."""
    passed = proposals.passed

    def counted(*args: Any) -> None:
        passes[0] += 1
        passed(*args)

    proposals.passed = counted  # type: ignore[method-assign]


def looping(tokens: list[int]) -> float:
    """The part of a text's tokens that end a run of `LOOP` tokens which the same text had before."""
    seen: set[tuple[int, ...]] = set()
    repeated = 0
    for end in range(LOOP, len(tokens) + 1):
        run = tuple(tokens[end - LOOP : end])
        repeated += run in seen
        seen.add(run)
    return repeated / max(1, len(tokens))


def difference(plain: Answer, lookup: Answer) -> dict[str, Any] | None:
    """Where two answers differ first: the two tokens, and their log-probabilities in both; None if they do not.

    The distance of two log-probabilities is that of the logits.
    """
    pairs = enumerate(zip(plain.tokens, lookup.tokens, strict=False))
    place = next((i for i, (one, other) in pairs if one != other), None)
    if place is None:
        return None
    both = [plain.tokens[place], lookup.tokens[place]]
    scores = {name: [answer.logprobs[place][token].item() for token in both]
              for name, answer in (("plain", plain), ("lookup", lookup))}  # fmt: skip
    return {"place": place, "tokens": both} | scores | {"distance": abs(scores["plain"][0] - scores["plain"][1])}


def compare(model: Any, tokenizer: Any, group: list[Prompt], new: int, log: RunLog) -> None:
    """Answer prompts that begin alike, each in both ways."""
    cache: list[Any] | None = None
    held: list[int] = []
    for prompt in group:
        key = {"kind": prompt.kind, "number": prompt.number}
        digest = digest_of(str(prompt.tokens))
        if log.find(*key.values(), digest=digest) is not None:
            continue
        if cache is None:
            cache = make_cache(model, max(len(each.tokens) for each in group) + new)
        known = common_prefix(held, prompt.tokens[:-1])
        for layer in cache:
            layer.trim(layer.offset - known)
        expect(model, len(prompt.tokens))
        prefill(model, prompt.tokens, cache)
        held = prompt.tokens[:-1]
        plain, lookup = (
            write(model, cache, prompt.tokens, new, tokenizer.eos_token_ids, setting) for setting in ("off", "auto")
        )
        alike = common_prefix(plain.tokens, lookup.tokens) + 1  # places where both have read the same text
        pairs = zip(plain.logprobs[:alike], lookup.logprobs, strict=False)
        off = max(mx.abs(one - other).max().item() for one, other in pairs)
        log.append(key | {
            "digest": digest, "prompt": len(prompt.tokens), "new": len(plain.tokens),
            "same": plain.tokens == lookup.tokens, "difference": difference(plain, lookup), "logits_off": off,
            "passes": lookup.passes, "lookup_new": len(lookup.tokens),
            "seconds": [round(plain.seconds, 4), round(lookup.seconds, 4)],
            "looping": round(looping(plain.tokens), 4), "answer": plain.tokens,
        })  # fmt: skip
        print(prompt.kind, prompt.number, log.find(*key.values())["same"], round(plain.seconds / lookup.seconds, 2),
              repr(tokenizer.decode(plain.tokens)[:60]), flush=True)  # fmt: skip
        mx.clear_cache()


def figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What prompts of a kind took. A best and a worst case are ratios of tokens per second, lookup to plain."""
    ratios = sorted(each["lookup_new"] / each["seconds"][1] / (each["new"] / each["seconds"][0]) for each in found)
    seconds, tokens = [sum(each["seconds"][i] for each in found) for i in (0, 1)], sum(each["new"] for each in found)
    new = sum(each["lookup_new"] for each in found)
    return {
        "prompts": len(found),
        "same": sum(each["same"] for each in found),
        "passes_per_token": round(sum(each["passes"] for each in found) / new, 3),
        "plain_tokens_per_s": round(tokens / seconds[0], 2),
        "lookup_tokens_per_s": round(new / seconds[1], 2),
        "median_ratio": round(statistics.median(ratios), 3),
        "worst": round(ratios[0], 3),
        "best": round(ratios[-1], 3),
        "looping": round(sum(each["looping"] * each["new"] for each in found) / tokens, 3),
        "logits_off": max(each["logits_off"] for each in found),
    }


def report(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures by kind and length, and every difference."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for each in records:
        rows.setdefault(each["kind"] + (", long" if each["number"] >= LONG else ""), []).append(each)
    rows["all"] = records
    rows["without loops"] = [each for each in records if not each["looping"]]
    table = {name: figures(found) for name, found in rows.items() if found}
    columns = ("kind", *next(iter(table.values())))
    print(markdown(columns, ((name, *row.values()) for name, row in table.items())))
    differences = [{key: each[key] for key in ("kind", "number", "prompt", "difference")} for each in records]
    return {"kinds": table, "differences": [each for each in differences if each["difference"] is not None]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("build") / "smollm2", help="checkpoint")
    parser.add_argument("--prompts", type=int, default=190, help="number of prompts, of four kinds in equal parts")
    parser.add_argument("--limit", type=int, default=1000, help="tokens of the longest of them")
    parser.add_argument("--long", type=int, default=10, choices=(0, 10), help="number of prompts of 8000 tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), help="type of the weights; default: as they are")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="bits of quantized weights")
    parser.add_argument("--output-dir", type=Path, default=Path("build") / "lookup", help="for run logs")
    parser.add_argument("--work-dir", type=Path, default=FOLDER, help="where documents.py keeps its texts")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    model, tokenizer = checkpoint.load(), checkpoint.tokenizer
    weights = args.dtype or (f"{args.bits} bit" if args.bits else str(model.model.norm.weight.dtype).split(".")[-1])
    if args.dtype:
        model.update(tree_map(lambda x: x.astype(getattr(mx, args.dtype)), model.parameters()))
    if args.bits:
        nn.quantize(model, bits=args.bits)
    mx.eval(model.parameters())
    settings = checkpoint.settings() | {"weights": weights, "new": args.new, "mlx": mx.__version__}
    path = args.output_dir / f"{checkpoint.folder.name}-{weights.replace(' ', '-')}-{args.new}.jsonl"
    log = RunLog(path, "lookup-proof", settings, key=("kind", "number"))
    quarter = [args.prompts // 4 + (i < args.prompts % 4) for i in range(4)]
    found = [prompts(tokenizer, kind, n, args.limit, args.work_dir) for kind, n in zip(KINDS, quarter, strict=True)]
    groups = [[prompt] for row in zip_longest(*found) for prompt in row if prompt is not None]
    groups += long_prompts(tokenizer, 8000, args.work_dir) if args.long else []
    for group in groups:
        compare(model, tokenizer, group, args.new, log)
    wanted = {(prompt.kind, prompt.number) for group in groups for prompt in group}
    records = [record for record in log.records if (record["kind"], record["number"]) in wanted]
    versions = {"mlx": mx.__version__, "mlx_resonance": mlx_resonance.__version__, "device": str(mx.default_device())}
    about = {"model": checkpoint.folder.name, "weights": weights, "new": args.new}
    print(json.dumps(versions | about | report(records)))


if __name__ == "__main__":
    exit_with(main)
