"""What does a KV format cost and save? Bytes per token, perplexity, KL divergence, found keys and speed of each.

    python benchmarks/kv_formats.py [--model build/smollm2] [--context 8192] [--documents 5] [--output-dir DIR]

Without --model: the tiny checkpoint, stretched with YaRN to 16 times its context, on the standard library's modules
that it was not trained on. With it: the beginnings of the texts of documents.py. Every chunk of a text goes through the
caches of all formats, quantized from the first token on. The run logs in the output folder have a line for each text
and each key: a killed run resumes. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.attention import Inference, next_token_logits
from mlx_resonance.evaluation.passkey import PasskeyGrid, run_passkey
from mlx_resonance.evaluation.perplexity import Subject, check_contexts, select_documents
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.kv_format import KVFormat
from mlx_resonance.generation.memory import kv_per_token
from mlx_resonance.generation.prefill import prefill
from mlx_resonance.rope import expect
from mlx_resonance.run_log import RunLog
from mlx_resonance.scaling import named_rope

import mlx.core as mx
import numpy as np
from documents import FOLDER, digest_of, documents
from random_llama import TINY
from reporting import exit_with, markdown, on_progress

OWN = KVFormat()  # the model's type
FORMATS = [OWN, *(KVFormat.of(bits) for bits in (8, "8,4", 4)), *(KVFormat.of(bits, True) for bits in ("8,4", 4))]
CHUNK, HEAD = 1024, 128  # tokens that are read at once, and whose logits are computed at once
TOKENS, ROUNDS = 8, 3  # per format and round of the speed test


def held_out() -> str:
    """The standard library's modules that the tiny checkpoint was not trained on."""
    names = json.loads((TINY / "training.json").read_text())["held_out_files"]
    root = Path(sysconfig.get_paths()["stdlib"])
    return "".join((root / name).read_text(errors="replace") for name in names if (root / name).is_file())


def subject(model: Path | None, context: int, work_dir: Path, most: int) -> tuple[Subject, list[str]]:
    """What to measure, and the digests of its texts."""
    checkpoint = Checkpoint.open(model or TINY)
    rope = checkpoint.rope if model else named_rope(checkpoint.rope, "yarn", 16)
    check_contexts(checkpoint.name, rope, [context])
    texts = [document.text for document in documents(work_dir)][:most] if model else [held_out()]
    start = [] if checkpoint.tokenizer.bos_token_id is None else [checkpoint.tokenizer.bos_token_id]
    chosen, _ = select_documents(texts, checkpoint.tokenizer, context - len(start), None)
    return Subject(checkpoint.with_rope(rope), [rope], start, chosen), [digest_of(text) for text in texts]


def distances(model: Any, tokens: list[int], label: str) -> list[dict[str, float]]:
    """For each format: the sum of the losses of all tokens but the first, and of the KL divergences from OWN."""
    expect(model, len(tokens))
    caches = [make_cache(model, len(tokens), format) for format in FORMATS]
    sums = [{"nll": 0.0, "kl": 0.0} for _ in FORMATS]
    for start in range(0, len(tokens) - 1, CHUNK):
        end = min(start + CHUNK, len(tokens) - 1)
        states = []
        for cache in caches:
            states.append(model.model(mx.array([tokens[start:end]]), cache=cache))
            mx.eval(states[-1], [layer.state for layer in cache])
        for first in range(start, end, HEAD):
            last = min(first + HEAD, end)
            targets = mx.array(tokens[first + 1 : last + 1])[:, None]
            own: Any = None
            for sum_, hidden in zip(sums, states, strict=True):
                logits = next_token_logits(model, hidden[0, first - start : last - start]).astype(mx.float32)
                logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                own = logprobs if own is None else own
                sum_["nll"] -= mx.take_along_axis(logprobs, targets, axis=-1).sum().item()
                sum_["kl"] += (mx.exp(own) * (own - logprobs)).sum().item()
        mx.clear_cache()
        on_progress(label, end, len(tokens) - 1)
    return sums


def tokens_per_second(model: Any, tokens: list[int]) -> list[float]:
    """For each format, after a prompt: medians of rounds in which the formats take turns."""
    expect(model, len(tokens))
    caches = [make_cache(model, len(tokens) + TOKENS, format) for format in FORMATS]
    for cache in caches:
        prefill(model, tokens, cache, step=CHUNK)
    step, found = Inference(model), [[] for _ in FORMATS]
    for _ in range(ROUNDS):
        for cache, speeds in zip(caches, found, strict=True):
            mx.eval(step(mx.array([tokens[-1:]]), cache=cache))  # not measured: memory that others have used
            start = time.perf_counter()
            for token in tokens[1:TOKENS]:
                mx.eval(step(mx.array([[token]]), cache=cache))
            speeds.append((TOKENS - 1) / (time.perf_counter() - start))
            for layer in cache:
                layer.trim(TOKENS)
    return [statistics.median(speeds) for speeds in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint; default: the tiny one of the package")
    parser.add_argument("--context", type=int, default=4096, help="tokens read of each text")
    parser.add_argument("--documents", type=int, default=5, help="number of texts, with --model")
    parser.add_argument("--keys", type=int, default=1, help="keys to find at each depth of a quarter of the context")
    parser.add_argument("--output-dir", type=Path, default=Path("build") / "kv-formats", help="for run logs")
    parser.add_argument("--work-dir", type=Path, default=FOLDER, help="where documents.py keeps its texts")
    args = parser.parse_args()
    measured, digests = subject(args.model, args.context, args.work_dir, args.documents)
    checkpoint, model = measured.checkpoint, measured.checkpoint.load()
    item_size, folder = checkpoint.dimensions.item_size, args.output_dir
    names = [format.name(item_size) for format in FORMATS]
    settings = checkpoint.settings() | {"context": args.context, "formats": names}
    log = RunLog(folder / f"{checkpoint.folder.name}-{args.context}.jsonl", "kv-formats", settings, key=("document",))
    texts = []
    for document, digest in zip(measured.documents, digests, strict=True):
        found = log.find(document.number, digest=digest)
        if found is None:
            tokens = measured.start + document.tokens[: args.context - len(measured.start)].tolist()
            sums = distances(model, tokens, f"text {document.number}")
            found = {"document": document.number, "digest": digest, "tokens": len(tokens) - 1, "sums": sums}
            log.append(found)
        texts.append(found)
    count = sum(text["tokens"] for text in texts)
    text = measured.documents[0].tokens[: args.context - TOKENS].tolist()
    speeds = tokens_per_second(model, text)
    grid = PasskeyGrid([args.context // 4], [0, 25, 50, 75, 100], args.keys)
    report: dict[str, Any] = {
        "mlx": mx.__version__, "device": str(mx.default_device()), "model": checkpoint.folder.name,
        "context": args.context, "documents": len(texts), "rope": measured.ropes[0].rope_type, "formats": {},
    }  # fmt: skip
    for i, (format, name) in enumerate(zip(FORMATS, names, strict=True)):
        nll, kl = (sum(text["sums"][i][part] for text in texts) / count for part in ("nll", "kl"))
        size = kv_per_token(checkpoint.dimensions, format)
        own = sum(text["sums"][0]["nll"] for text in texts) / count
        trials = run_passkey(checkpoint, grid, folder / f"{checkpoint.folder.name}-keys-{i}.jsonl", kv_bits=format)
        report["formats"][name] = {
            "bytes_per_token": size,
            "percent_of_16_bit": round(100 * size / kv_per_token(checkpoint.dimensions, None) * item_size / 2, 1),
            "perplexity": round(math.exp(nll), 4), "percent_more": round(100 * math.expm1(nll - own), 2),
            "kl": float(np.format_float_scientific(kl, 3)), "keys_found": sum(trial["found"] for trial in trials),
            "keys": len(trials), "tokens_per_s": round(speeds[i], 2),
        }  # fmt: skip
    rows = (
        (name, f"{found['bytes_per_token']:,}", f"{found['percent_of_16_bit']} %", f"{found['perplexity']:.3f}",
         f"{found['percent_more']:+.2f} %", found["kl"], f"{found['keys_found']} of {found['keys']}",
         found["tokens_per_s"])
        for name, found in report["formats"].items()
    )  # fmt: skip
    columns = ("KV cache", "bytes per token", "of 16 bits", "perplexity", "more", "KL (nats)", "keys", "tokens/s")
    print(markdown(columns, rows))
    print(json.dumps(report))


if __name__ == "__main__":
    exit_with(main)
