"""The same checkpoint with the config.json that transformers 5 writes: what mlx-lm answers, and what we do.

    python benchmarks/transformers5.py [--model build/smollm2] [--question TEXT] [--max-tokens 24]

transformers 5 saves the base of the rotary embedding inside `rope_parameters`. Where a loader does not read that, the
model runs with another base, and without an error. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import mlx_resonance
from mlx_resonance.errors import UsageError

import mlx_lm
from reporting import exit_with


def as_transformers_5(source: Path, folder: Path) -> None:
    """Copy a checkpoint without scaling, its rope settings where transformers 5 has them."""
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    if config.pop("rope_scaling", None):
        raise UsageError(f"{source} has a scaling: name a checkpoint without")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("build") / "smollm2")
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    answers = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        as_transformers_5(args.model, folder)
        for name, package in (("mlx-lm", mlx_lm), ("mlx-resonance", mlx_resonance)):
            model, tokenizer = package.load(str(folder))[:2]
            messages = [{"role": "user", "content": args.question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            answers[name] = package.generate(model, tokenizer, prompt, max_tokens=args.max_tokens)
            print(f"{name}: {answers[name]}")
    print(json.dumps({"question": args.question, "mlx_lm": mlx_lm.__version__, "answers": answers}))


if __name__ == "__main__":
    exit_with(main)
