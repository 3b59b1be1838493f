"""What does a quantized KV cache cost and save? Perplexity and bytes per token of every format.

    python benchmarks/kv_formats.py [--model build/smollm2-32k] [--context 4096] [--output-dir build/kv-formats]

Without --model: the tiny checkpoint, stretched with YaRN to 16 times its context, on the standard library's modules
that it was not trained on. With it: the beginnings of the texts of documents.py. Keys and values are quantized from the
first token on. The output folder has a run log for every format: a killed run resumes. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

from mlx_resonance import Checkpoint, plan_memory
from mlx_resonance.evaluation.perplexity import Subject, check_contexts, run_perplexity, select_documents
from mlx_resonance.evaluation.windows import Options, Protocol
from mlx_resonance.scaling import named_rope

import mlx.core as mx
from documents import FOLDER, digest_of, documents
from random_llama import TINY
from reporting import exit_with, markdown, on_progress

FORMATS = (None, 8, 4)  # bits; None for the model's type


def held_out() -> str:
    """The standard library's modules that the tiny checkpoint was not trained on."""
    names = json.loads((TINY / "training.json").read_text())["held_out_files"]
    root = Path(sysconfig.get_paths()["stdlib"])
    return "".join((root / name).read_text(errors="replace") for name in names if (root / name).is_file())


def subject(model: Path | None, context: int, work_dir: Path) -> tuple[Subject, list[str]]:
    """What to measure, and the digests of its texts."""
    checkpoint = Checkpoint.open(model or TINY)
    rope = checkpoint.rope if model else named_rope(checkpoint.rope, "yarn", 16)
    check_contexts(checkpoint.name, rope, [context])
    texts = [document.text for document in documents(work_dir)] if model else [held_out()]
    start = [] if checkpoint.tokenizer.bos_token_id is None else [checkpoint.tokenizer.bos_token_id]
    chosen, _ = select_documents(texts, checkpoint.tokenizer, context - len(start), None)
    return Subject(checkpoint, [rope], start, chosen), [digest_of(text) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint; default: the tiny one of the package")
    parser.add_argument("--context", type=int, default=4096, help="tokens read of each text")
    parser.add_argument("--output-dir", type=Path, default=Path("build") / "kv-formats", help="for run logs")
    parser.add_argument("--work-dir", type=Path, default=FOLDER, help="where documents.py keeps its texts")
    args = parser.parse_args()
    measured, digests = subject(args.model, args.context, args.work_dir)
    checkpoint = measured.checkpoint
    report = {
        "mlx": mx.__version__, "device": str(mx.default_device()), "model": checkpoint.folder.name,
        "context": args.context, "documents": len(measured.documents), "rope": measured.ropes[0].rope_type,
        "formats": {},
    }  # fmt: skip
    for kv_bits in FORMATS:
        name = f"{kv_bits or 8 * checkpoint.dimensions.item_size} bit"
        output = args.output_dir / f"{checkpoint.folder.name}-{name.replace(' ', '-')}.jsonl"
        protocol, options = Protocol([args.context], truncate=True), Options(kv_bits=kv_bits)
        [row] = run_perplexity([measured], protocol, output, {"documents": digests}, options, on_progress)
        report["formats"][name] = {
            "perplexity": round(row["perplexity_tokens"], 4), "last_512": round(row["perplexity_last"], 4),
            "bytes_per_token": plan_memory(checkpoint, args.context, kv_bits=kv_bits).kv_per_token,
        }  # fmt: skip
    rows = (
        (name, f"{found['perplexity']:.3f}", f"{found['last_512']:.3f}", f"{found['bytes_per_token']:,}")
        for name, found in report["formats"].items()
    )
    print(markdown(("KV cache", "perplexity", "of the last 512 tokens", "bytes per token"), rows))
    print(json.dumps(report))


if __name__ == "__main__":
    exit_with(main)
