"""Does Resonance-YaRN help a small LLaMA at 8 times its context? Train, extend, measure, one line per model.

    python benchmarks/extension.py mini --work-dir /tmp/extension --output benchmarks/results/extension-mini.jsonl
    python benchmarks/extension.py stdlib-llama --steps 0 --work-dir … --output …

`mini` trains its own models from scratch, with plain RoPE and with resonance, three seeds of each; `stdlib-llama` is
the checkpoint of the package. Each is then extended with every scaling: as it is (0 steps of fine-tuning) and after the
other `--steps`, on sequences of the trained length (the paper's cheapest recipe: 4096 tokens for a context of 32 768)
or of any other `--length`. The output is a run log: a killed run resumes, and no result is measured twice.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from mlx_resonance import Checkpoint, RopeConfig, feature_gap
from mlx_resonance.evaluation.passkey import PasskeyGrid, accuracy, run_passkey
from mlx_resonance.evaluation.perplexity import Subject, run_perplexity, select_documents
from mlx_resonance.evaluation.windows import Protocol
from mlx_resonance.finetuning import finetune
from mlx_resonance.plots import plot_perplexity
from mlx_resonance.posgen.report import paired
from mlx_resonance.run_log import RunLog
from mlx_resonance.scaling import named_rope
from mlx_resonance.storage import atomic_file

import numpy as np
from extension_bases import CONTEXT, base_folder
from stdlib_llama import CONFIG, read, source_files

FACTOR = 8
ROPES = ("default", "linear", "ntk", "yarn", "resonance_yarn")
FROM_RESONANCE = ("resonance_default", "resonance_yarn")  # for models trained with rounded wavelengths
KEY = ("base", "rope", "steps", "length", "seed")  # of a result


@dataclass(frozen=True)
class Experiment:
    """The trained length, what is measured past it, and how models are fine-tuned."""

    context: int
    bases: tuple[str, ...]
    documents: int
    repetitions: int  # of the passkey, at each length and depth
    learning_rate: float

    @property
    def contexts(self) -> list[int]:
        """From the trained length to `FACTOR` times that."""
        return [self.context * times for times in (1, 2, 4, FACTOR)]


EXPERIMENTS = {
    "mini": Experiment(CONTEXT, ("default", "resonance_default"), 22, 1, 5e-4),
    "stdlib-llama": Experiment(512, ("default",), 10, 3, 2e-4),
}


def training_text(work: Path) -> Path:
    """The standard library's training files as JSON lines."""
    path = work / "text" / "train.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text("".join(json.dumps({"text": read(file)}) + "\n" for file in source_files()[0]))
    return path.parent


def extended(folder: Path, rope: str, steps: int, length: int, seed: int, experiment: Experiment, work: Path) -> Path:
    """The checkpoint after fine-tuning, made if missing; a step has `FACTOR` times the context's tokens."""
    target = work / f"{folder.name}-{rope}-{steps}x{length}-{seed}"
    if target.exists():
        return target
    if rope.removeprefix("resonance_") == "default":  # nothing scaled: config.json has to allow the length
        declared = work / f"{folder.name}-declared"
        shutil.copytree(folder, declared, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": experiment.contexts[-1]}
        (declared / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        folder, scaling = declared, {}
    else:
        scaling = {"rope": rope, "factor": FACTOR}

    def on_step(recipe: object, step: int, loss: float, rate: float) -> None:
        if step % 10 == 0:
            print(f"{target.name} step {step}/{steps} loss {loss:.3f}", file=sys.stderr, flush=True)

    finetune(
        folder, training_text(work), target, length=length, steps=steps, batch_size=1, seed=seed, dtype="float32",
        accumulate=experiment.contexts[-1] // length, learning_rate=experiment.learning_rate, force=True,
        grad_checkpoint=length > experiment.context, on_step=on_step, **scaling,
    )  # fmt: skip
    return target


def measure(name: str, checkpoint: Checkpoint, experiment: Experiment, work: Path) -> dict:
    """Perplexity on held-out files and the passkey grid, at every context."""
    longest = experiment.contexts[-1]
    tokenizer = checkpoint.tokenizer
    texts = [read(path) for path in source_files()[1]]
    documents, _ = select_documents(texts, tokenizer, longest - 1, experiment.documents)
    subject = Subject(checkpoint, [checkpoint.rope], [tokenizer.bos_token_id], documents)
    protocol = Protocol(experiment.contexts, truncate=True, last=experiment.context)
    rows = run_perplexity([subject], protocol, work / f"{name}-perplexity.jsonl", {"data": "held out"})
    result = {
        "perplexity": [row["perplexity_tokens"] for row in rows],
        "perplexity_last": [row["perplexity_last"] for row in rows],
        "documents": len(documents),
    }
    grid = PasskeyGrid(experiment.contexts, (10, 50, 90), experiment.repetitions)
    trials = run_passkey(checkpoint, grid, work / f"{name}-passkey.jsonl")
    return result | {"passkey": accuracy(grid, trials).mean(0).tolist()}


def tables(lines: list[dict], contexts: list[int]) -> str:
    """Means over seeds: perplexity at every context, of all tokens and of the last; resonance minus plain."""
    groups: dict[tuple, dict[int, dict]] = {}
    for line in lines:
        groups.setdefault((line["steps"], line["length"], line["base"], line["rope"]), {})[line["seed"]] = line
    figures_of = ["perplexity", "perplexity_last", "passkey"]
    names = {"perplexity": "", "perplexity_last": "last tokens of ", "passkey": "passkeys found at "}
    # The last tokens of the shortest context are all of its tokens.
    cut = {"perplexity_last": 1}
    marks = [f"{names[figure]}{context}" for figure in figures_of for context in contexts[cut.get(figure, 0) :]]
    rows = [
        f"| trained with | steps × length | rope | seeds | {' | '.join(marks)} |",
        "| --- " * (4 + len(marks)) + "|",
    ]

    def figures(line: dict) -> np.ndarray:
        return np.concatenate([line[figure][cut.get(figure, 0) :] for figure in figures_of])

    order = [*ROPES[:-1], *FROM_RESONANCE]
    for (steps, length, base, rope), seeds in sorted(groups.items(), key=lambda g: (*g[0][:3], order.index(g[0][3]))):
        values = np.array([figures(line) for line in seeds.values()])
        cells = [
            f"{m:.2f}" + (f" ± {s:.2f}" if len(values) > 1 else "") for m, s in zip(*_mean_and_std(values), strict=True)
        ]
        trained = f"{steps} × {length}" if steps else "as it is"
        rows.append(f"| {base} | {trained} | `{rope}` | {len(values)} | {' | '.join(cells)} |")
        twin = groups.get((steps, length, base.removeprefix("resonance_"), rope.removeprefix("resonance_")), {})
        both = [seed for seed in seeds if seed in twin] if rope.startswith("resonance_") else []
        if both:
            changes = np.array([figures(seeds[seed]) - figures(twin[seed]) for seed in both])
            cells = [
                f"{pair['difference']:+.2f}"
                + ("" if pair["low"] is None else f" [{pair['low']:+.2f}, {pair['high']:+.2f}]")
                for pair in map(paired, changes.T)
            ]
            rows.append(f"| {base} | {trained} | difference to plain | {len(both)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _mean_and_std(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def gaps(experiment: Experiment) -> dict[str, dict[str, float]]:
    """Sums of the feature gap without fine-tuning, by a base's own rope type and the one it is extended with."""
    sums: dict[str, dict[str, float]] = {}
    for base in experiment.bases:
        own = RopeConfig(CONFIG["head_dim"], rope_type=base, max_position_embeddings=experiment.context)
        tested = {rope: named_rope(own, rope, FACTOR).frequencies() for rope in (*ROPES, *FROM_RESONANCE)}
        lengths = experiment.context, experiment.contexts[-1]
        sums[base] = {
            rope: round(float(feature_gap(each, *lengths, trained=own.frequencies()).sum()), 2)
            for rope, each in tested.items()
        }
    return sums


def cells(args: argparse.Namespace, experiment: Experiment) -> Iterator[tuple[int, int, str, str]]:
    """Steps, seed, base and rope of every requested model."""
    for steps, seed in product(map(int, args.steps.split(",")), map(int, args.seeds.split(","))):
        if args.setting == "stdlib-llama" and not steps and seed:
            continue  # without training, the package's checkpoint has one seed
        for base in experiment.bases:
            for rope in args.ropes.split(",") if base == "default" else FROM_RESONANCE:
                yield steps, seed, base, rope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setting", choices=EXPERIMENTS)
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints, and the results of each document")
    parser.add_argument("--output", type=Path, required=True, help="run log, one line per model and scaling")
    parser.add_argument("--steps", default="0,50,400", help="of fine-tuning, separated by commas")
    parser.add_argument("--length", type=int, help="tokens of a training sequence; default: the trained length")
    parser.add_argument("--ropes", default=",".join(ROPES), help="to extend plain models with, separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--figure", type=Path, help="draw the perplexity of the last tokens over the context")
    args = parser.parse_args()
    experiment, work = EXPERIMENTS[args.setting], args.work_dir
    length = args.length or experiment.context
    work.mkdir(parents=True, exist_ok=True)
    header = {"setting": args.setting, "contexts": experiment.contexts, "last": experiment.context}
    log = RunLog(args.output, "extension", header, key=KEY)
    for steps, seed, base, rope in cells(args, experiment):
        trained_on = length if steps else 0
        key = base, rope, steps, trained_on, seed
        if key in log:
            continue
        folder = base_folder(args.setting, base, seed, work)
        if steps:
            folder = extended(folder, rope, steps, length, seed, experiment, work)
        checkpoint = Checkpoint.open(folder)
        angles = checkpoint.rope if steps else named_rope(checkpoint.rope, rope, FACTOR)
        checkpoint = checkpoint.with_rope(replace(angles, max_position_embeddings=experiment.contexts[-1]))
        record = dict(zip(KEY, key, strict=True))
        record |= measure(f"{base}-{rope}-{steps}x{trained_on}-{seed}", checkpoint, experiment, work)
        log.append(record)
        print(json.dumps(record), file=sys.stderr, flush=True)
    lines = log.records
    print(tables(lines, experiment.contexts))
    print("feature gap, as it is:", gaps(experiment))
    if args.figure:
        panels: dict[str, dict[str, list]] = {}
        for line in (line for line in lines if line["base"] == "default"):
            title = f"{line['steps']} steps of {line['length']} tokens" if line["steps"] else "as it is"
            panels.setdefault(title, {}).setdefault(line["rope"], []).append(line["perplexity_last"])
        plot_perplexity(experiment.contexts, panels, args.figure)
    print(json.dumps({"output": str(args.output), "models": len(lines), **header}))


if __name__ == "__main__":
    main()
