"""Past the window without training: which method loses least? Perplexity, hidden keys and speed of each.

    python benchmarks/past_the_window.py [--model build/smollm2 --lengths 8192,16384 --documents 3] [--methods …]

Methods: plain RoPE, YaRN, Resonance-YaRN, dynamic NTK, and the position maps self-extend, dca and dynamic, with the
wavelengths as they were trained and rounded. Without --model: the tiny checkpoint at up to eight times its context, on
the standard library's modules that it was not trained on. With it: the beginnings of the texts of documents.py.
The output is a run log with a line for every text and every key: a killed run resumes, and nothing is measured twice.
--report reads it alone, --figure draws it. --speed times every method beside plain attention. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig
from mlx_resonance.attention import Inference, set_rope
from mlx_resonance.evaluation.losses import token_losses
from mlx_resonance.evaluation.passkey import ANSWER_TOKENS as ANSWER
from mlx_resonance.evaluation.passkey import PasskeyGrid, first_integer, passkey_prompt
from mlx_resonance.evaluation.perplexity import select_documents
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.prefill import prefill
from mlx_resonance.generation.stream import generate
from mlx_resonance.plots import legend_below, length_axis, look, new_figure
from mlx_resonance.positions import METHODS, position_map
from mlx_resonance.rope import expect
from mlx_resonance.run_log import RunLog
from mlx_resonance.scaling import named_rope

import mlx.core as mx
import numpy as np
from documents import FOLDER, digest_of, documents
from random_llama import TINY
from reporting import exit_with, markdown, on_progress
from scipy.stats import t as student
from stdlib_llama import read, source_files

ROUNDED = "resonance_"
KEY = ("what", "method", "length", "number")  # of a result: a text's loss, or whether a key was found
LAST = 512  # tokens whose losses count
DEPTHS = (10, 50, 90)  # of keys, in %
NEW, ROUNDS = 16, 3  # of the speed test


def ropes(own: RopeConfig, longest: int) -> dict[str, RopeConfig]:
    """The settings of every method for texts of up to `longest` tokens."""
    trained = own.own_context
    assert trained is not None
    factor = max(1, math.ceil(longest / trained))
    found = {"plain": replace(own, max_position_embeddings=longest)}
    for name in ("yarn", ROUNDED + "yarn", "dynamic"):
        found["dynamic NTK" if name == "dynamic" else name] = named_rope(own, name, factor)
    for method in METHODS:
        positions = position_map(method, trained, longest)
        found[method] = replace(own, positions=positions)
        found[ROUNDED + method] = replace(named_rope(own, ROUNDED + "default", None), positions=positions)
    return found


def loaded(checkpoint: Checkpoint) -> Any:
    """The model in float32, in which a CPU is fast."""
    model = checkpoint.load()
    model.set_dtype(mx.float32)
    return model


def texts_of(args: argparse.Namespace, checkpoint: Checkpoint) -> list[tuple[list[int], str]]:
    """Token ids, as many as the longest length, and digests."""
    if args.model:
        raw = [document.text for document in documents(args.work_dir)]
    else:
        raw = [read(path) for path in source_files()[1]]
    start = [] if checkpoint.tokenizer.bos_token_id is None else [checkpoint.tokenizer.bos_token_id]
    chosen, _ = select_documents(raw, checkpoint.tokenizer, max(args.lengths) - len(start), args.documents)
    found = []
    for document in chosen:
        tokens = start + document.tokens[: max(args.lengths) - len(start)].tolist()
        found.append((tokens, digest_of(json.dumps(tokens))))
    return found


def measure_texts(
    model: Any, method: str, rope: RopeConfig, texts: list[tuple[list[int], str]], lengths: list[int], log: RunLog
) -> None:
    """Sums of the losses of the last tokens of each length; one pass serves all lengths unless the angles change."""
    for number, (tokens, digest) in enumerate(texts):
        missing = [n for n in lengths if log.find("loss", method, n, number, digest=digest) is None]
        passes = [[n] for n in missing] if rope.depends_on_length else [missing] if missing else []
        for group in passes:
            longest = max(group)
            rows, done = np.array([tokens[:longest]], np.int32), [0]

            def told(count: int, done: list[int] = done, longest: int = longest, number: int = number) -> None:
                done[0] += count
                on_progress(f"{method}, text {number + 1}", done[0], longest - 1)

            losses = token_losses(model, rows, longest - 1, on_tokens=told)[0].astype(np.float64)
            for length in group:
                last = losses[: length - 1][-LAST:]
                row = {"what": "loss", "method": method, "length": length, "number": number, "digest": digest}
                log.append(row | {"tokens": last.size, "nll": float(last.sum())})


def measure_keys(model: Any, method: str, checkpoint: Checkpoint, grid: PasskeyGrid, log: RunLog) -> None:
    """Whether each hidden key is found."""
    for place, (length, depth, repetition) in enumerate(grid.cells()):
        key = grid.key(length, depth, repetition)
        if log.find("key", method, length, place, key=key) is not None:
            continue
        prompt = passkey_prompt(checkpoint.tokenizer, length, depth, key)
        answer = generate(model, checkpoint.tokenizer, prompt, max_tokens=ANSWER, prompt_lookup="off")
        row = {"what": "key", "method": method, "length": length, "number": place, "depth": depth, "key": key}
        log.append(row | {"found": first_integer(answer) == key})
        on_progress(f"{method}, key {place + 1}", place + 1, len(grid.cells()))


def speed(model: Any, found: dict[str, RopeConfig], tokens: list[int]) -> dict[str, dict[str, float]]:
    """Tokens per second of prompt and answer, and peak memory over plain attention's, in rounds that take turns."""
    seconds: dict[str, list[tuple[float, float, int]]] = {method: [] for method in found}
    # On a CPU, what others do on it does not count.
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    for _ in range(ROUNDS):
        for method, rope in found.items():
            set_rope(model, rope)
            expect(model, len(tokens))
            cache, step = make_cache(model, len(tokens) + NEW), Inference(model)
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            start = clock()
            prefill(model, tokens, cache)
            read_in, token = clock() - start, mx.array(tokens[-1:])
            mx.eval(step(token[None], cache=cache))  # not measured: the first one moves keys
            start = clock()
            for _ in range(NEW - 1):
                mx.eval(step(token[None], cache=cache))
            seconds[method].append((read_in, (clock() - start) / (NEW - 1), mx.get_peak_memory() - before))
            del cache
    plain = seconds["plain"]
    result = {}
    for method, of_method in seconds.items():
        pairs = zip(plain, of_method, strict=True)
        ratios = [[a / b for a, b in zip(*of_round, strict=True)] for of_round in pairs]
        prompt, answer, memory = (statistics.median(column) for column in zip(*ratios, strict=True))
        result[method] = {
            "prompt": round(prompt, 3), "answer": round(answer, 3), "memory": round(1 / memory, 3),
            "prompt_tps": round(len(tokens) / statistics.median(row[0] for row in of_method), 1),
            "answer_tps": round(1 / statistics.median(row[1] for row in of_method), 2),
        }  # fmt: skip
    return result


def report(rows: list[dict[str, Any]], lengths: list[int]) -> dict[str, Any]:
    """By method and length: perplexity, more than Resonance-YaRN's in % with a 95 % interval over texts, keys found."""
    losses: dict[tuple[str, int], dict[int, float]] = {}
    keys: dict[tuple[str, int], list[bool]] = {}
    for row in rows:
        place = row["method"], row["length"]
        if row["what"] == "loss":
            losses.setdefault(place, {})[row["number"]] = row["nll"] / row["tokens"]
        else:
            keys.setdefault(place, []).append(row["found"])
    result: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        for length in lengths:
            own, other = losses.get((method, length), {}), losses.get((ROUNDED + "yarn", length), {})
            cell: dict[str, Any] = {}
            if own:
                cell = {"perplexity": round(math.exp(statistics.mean(own.values())), 3), "texts": len(own)}
            paired = [own[number] - other[number] for number in own if number in other]
            if len(paired) > 1 and method != ROUNDED + "yarn":
                mean, half = statistics.mean(paired), 0.0
                half = float(student.ppf(0.975, len(paired) - 1)) * statistics.stdev(paired) / math.sqrt(len(paired))
                cell["to_resonance_yarn"] = [round(100 * math.expm1(mean + part * half), 2) for part in (0, -1, 1)]
            if found := keys.get((method, length)):
                cell |= {"found": sum(found), "keys": len(found)}
            if cell:
                result.setdefault(method, {})[str(length)] = cell
    return result


def table(result: dict[str, Any], lengths: list[int]) -> str:
    """In Markdown."""

    def cell(found: dict[str, Any] | None) -> str:
        if not found:
            return ""
        text = f"{found['perplexity']:.2f}" if "perplexity" in found else ""
        if "to_resonance_yarn" in found:
            mean, low, high = found["to_resonance_yarn"]
            text += f" ({mean:+.1f} %: {low:+.1f} to {high:+.1f})"
        return text + (f", keys {found['found']}/{found['keys']}" if "keys" in found else "")

    columns = ("method", *(f"{length:,} tokens" for length in lengths))
    return markdown(columns, [(m, *(cell(of.get(str(n))) for n in lengths)) for m, of in result.items()])


def draw(result: dict[str, Any], lengths: list[int], path: Path) -> None:
    """Perplexity over the length; methods that leave the neighbourhood of the others leave the figure."""
    with new_figure(path, 6, 3.6) as figure:
        axis = figure.subplots()
        highest = 0.0
        for method, of in result.items():
            if method.removeprefix(ROUNDED) in METHODS and method not in METHODS:
                continue  # within half a percent of its unrounded form
            values = [of.get(str(length), {}).get("perplexity", math.nan) for length in lengths]
            style = look(method)
            if method in METHODS:  # they nearly coincide: the first is the widest
                size = len(METHODS) - METHODS.index(method)
                style |= {"linewidth": 2 * size - 0.8, "markersize": 3 + 2 * size}
            axis.plot(lengths, values, label="plain RoPE" if method == "plain" else method, **style)
            highest = max(highest, *values) if "yarn" in method else highest
        length_axis(axis, lengths)
        axis.set(xlabel="tokens", ylabel="perplexity of the last 512", ylim=(0, 1.3 * highest))
        legend_below(figure, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint; default: the tiny one of the package")
    parser.add_argument("--lengths", help="tokens, separated by commas; default: 1, 2, 4 and 8 times the context")
    parser.add_argument("--documents", type=int, default=10, help="number of texts")
    parser.add_argument("--keys", type=int, default=5, help="keys to find at each length and depth; 0 for none")
    parser.add_argument("--methods", help="names, separated by commas; default: all")
    parser.add_argument("--output", type=Path, help="run log; default: benchmarks/results/past-the-window-NAME.jsonl")
    parser.add_argument("--work-dir", type=Path, default=FOLDER, help="where documents.py keeps its texts")
    parser.add_argument("--figure", type=Path, help="draw the results")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--speed", action="store_true", help="time the methods at the longest length instead")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model or TINY)
    trained = checkpoint.rope.own_context or 0
    given = args.lengths.split(",") if args.lengths else [trained * n for n in (1, 2, 4, 8)]
    args.lengths = lengths = sorted(int(length) for length in given)
    found = ropes(checkpoint.rope, max(lengths))
    if args.methods:
        found = {name: rope for name, rope in found.items() if name in ("plain", *args.methods.split(","))}
    texts = texts_of(args, checkpoint)
    about = {"mlx": mx.__version__, "device": str(mx.default_device()), "model": checkpoint.folder.name}
    if args.speed:
        measured = speed(loaded(checkpoint), found, texts[0][0])
        columns = (
            "method",
            "prompt, of plain's speed",
            "answer, of plain's speed",
            "memory, of plain's",
            "prompt tokens/s",
            "tokens/s",
        )
        names = ("prompt", "answer", "memory", "prompt_tps", "answer_tps")
        print(markdown(columns, [(method, *(row[name] for name in names)) for method, row in measured.items()]))
        print(json.dumps(about | {"length": max(lengths), "speed": measured}))
        return
    output = args.output or Path(__file__).parent / "results" / f"past-the-window-{checkpoint.folder.name}.jsonl"
    settings = {"digest": checkpoint.digest, "longest": max(lengths), "last": LAST}
    log = RunLog(output, "past-the-window", settings, key=KEY)
    model = None if args.report else loaded(checkpoint)
    for method, rope in found.items() if model is not None else ():
        set_rope(model, rope)
        measure_texts(model, method, rope, texts, lengths, log)
    if args.keys and model is not None:
        grid = PasskeyGrid(lengths, DEPTHS, args.keys)
        for method, rope in found.items():
            set_rope(model, rope)
            measure_keys(model, method, checkpoint, grid, log)
    result = report(log.records, lengths)
    if args.figure:
        draw(result, lengths, args.figure)
    print(table(result, lengths))
    print(json.dumps(about | {"lengths": lengths, "methods": result}))


if __name__ == "__main__":
    exit_with(main)
