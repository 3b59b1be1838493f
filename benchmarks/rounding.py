"""What does rounding the wavelengths cost a model inside the context that it was trained on? Perplexity of documents.

    python benchmarks/rounding.py --model build/smollm2 [--contexts 512,1024,2048,4096] [--output build/rounding.jsonl]

The beginnings of the texts of documents.py, with the model's own angles before any scaling and with the same ones
rounded, without fine-tuning. All contexts are measured on the same documents. The output is a run log: a killed run
resumes. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlx_resonance import Checkpoint
from mlx_resonance.evaluation.perplexity import Subject, check_contexts, run_perplexity, select_documents
from mlx_resonance.evaluation.windows import Protocol
from mlx_resonance.scaling import largest_shift, named_rope

import mlx.core as mx
from documents import FOLDER, digest_of, documents
from reporting import exit_with, markdown, on_progress

ROPES = ("default", "resonance_default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="checkpoint; a scaling in its config.json is left out"
    )
    parser.add_argument("--contexts", default="512,1024,2048,4096", help="tokens, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("build") / "rounding.jsonl", help="run log")
    parser.add_argument("--work-dir", type=Path, default=FOLDER, help="where documents.py keeps its texts")
    args = parser.parse_args()
    contexts = [int(part) for part in args.contexts.split(",")]
    checkpoint = Checkpoint.open(args.model)
    ropes = [named_rope(checkpoint.rope, name, None) for name in ROPES]
    check_contexts(str(args.model), ropes[0], contexts)
    start = [] if checkpoint.tokenizer.bos_token_id is None else [checkpoint.tokenizer.bos_token_id]
    texts = [document.text for document in documents(args.work_dir)]
    chosen, _ = select_documents(texts, checkpoint.tokenizer, max(contexts) - len(start), None)
    settings = {"documents": [digest_of(text) for text in texts]}
    rows = run_perplexity(
        [Subject(checkpoint, ropes, start, chosen)], Protocol(contexts, truncate=True), args.output, settings,
        progress=on_progress,
    )  # fmt: skip
    found = {name: [row["perplexity_tokens"] for row in rows if row["rope"] == name] for name in ROPES}
    changes = [rounded / plain - 1 for plain, rounded in zip(*found.values(), strict=True)]
    lines = [[name, *(f"{value:.3f}" for value in values)] for name, values in found.items()]
    print(markdown(["angles", *(f"{context:,} tokens" for context in sorted(contexts))], [
        *lines, ["change", *(f"{change:+.2%}" for change in changes)],
    ]))  # fmt: skip
    report = {
        "mlx": mx.__version__, "device": str(mx.default_device()), "model": args.model.name, "documents": len(chosen),
        "contexts": sorted(contexts), "largest_shift": largest_shift(ropes[1]),
    }  # fmt: skip
    print(json.dumps(report | {name: [round(value, 4) for value in values] for name, values in found.items()}))


if __name__ == "__main__":
    exit_with(main)
