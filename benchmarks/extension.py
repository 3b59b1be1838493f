"""Does Resonance-YaRN help a small LLaMA far past its context? Train, extend, measure, one line per model.

        python benchmarks/extension.py mini --steps 0 --work-dir … --output benchmarks/results/extension-mini.jsonl
    python benchmarks/extension.py stdlib-llama --steps 0 --work-dir … --output …
    python benchmarks/extension.py smollm2 --steps 0,25 --ropes yarn,resonance_yarn --work-dir … --output …

`mini` trains its own models from scratch, with plain RoPE and with resonance, three seeds of each; `stdlib-llama` is
the checkpoint of the package; both are extended to 8 times their context. `smollm2` is the LLaMA that `make smollm2`
fetches, at twice its context. Each is extended with every scaling: as it is (0 steps of fine-tuning) and after the
other `--steps`: on sequences of the trained length (the paper's cheapest recipe: 4096 tokens for a context of 32 768)
or of any other `--length`; smollm2 on shorter ones whose positions skip through the whole context, and it is measured
by LongPPL, too, whose tokens it picks as it is with `--extend dynamic`, so that no arm picks its own. The output is a
run log: a killed run resumes, and no result is measured twice. Two processes may share it and the work folder, with
different --seeds, once --steps 0 is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig, feature_gap
from mlx_resonance.errors import check_option
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
from documents import FOLDER, digest_of, documents
from extension_bases import CONTEXT, SMOLLM2, base_folder
from reporting import exit_with, on_progress
from stdlib_llama import CONFIG, read, source_files

ROPES = ("default", "linear", "ntk", "yarn", "resonance_yarn")
FROM_RESONANCE = ("resonance_default", "resonance_yarn")  # for models trained with rounded wavelengths
KEY = ("base", "rope", "steps", "length", "seed")  # of a result


@dataclass(frozen=True)
class Experiment:
    """The trained length, what is measured past it, and how models are fine-tuned.

    Args:
        context: tokens that models were trained with.
        bases: their rope types.
        documents: number of texts, each as long as the longest context.
        repetitions: of the passkey, at each length and depth.
        learning_rate: of fine-tuning.
        last: number of tokens at the end of a text whose perplexity is also measured separately.
        factor: how many times the context grows.
        length: tokens of a training sequence; 0 for `context`. Positions of shorter ones skip through the longest one.
    """

    context: int
    bases: tuple[str, ...]
    documents: int
    repetitions: int
    learning_rate: float
    last: int
    factor: int = 8
    length: int = 0

    @property
    def contexts(self) -> list[int]:
        """From the trained length to `factor` times that."""
        return [self.context * times for times in (1, 2, 4, 8) if times <= self.factor]


EXPERIMENTS = {
    "mini": Experiment(CONTEXT, ("default", "resonance_default"), 22, 1, 5e-4, last=CONTEXT),
    "stdlib-llama": Experiment(512, ("default",), 10, 3, 2e-4, last=512),
    "smollm2": Experiment(8192, ("default",), 3, 1, 5e-5, factor=2, last=512, length=1024),
}


def texts(setting: str) -> tuple[list[str], list[str]]:
    """What to fine-tune on, and what to measure: standard library's modules, or manuals in English."""
    if setting != "smollm2":
        trained, held_out = source_files()
        return [read(path) for path in trained], [read(path) for path in held_out]
    manuals = [document.text for document in documents(FOLDER)]
    count = EXPERIMENTS[setting].documents
    return manuals[count:], manuals[:count]


def digests(setting: str) -> list[str]:
    """Hashes of what is measured: the texts change with the release of Python, or of Debian."""
    return [digest_of(text) for text in texts(setting)[1]]


def training_text(setting: str, work: Path) -> Path:
    """A folder with the training texts as JSON lines."""
    path = work / f"text-{setting}" / "train.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(setting)[0]))
    return path.parent


def extended(folder: Path, rope: str, steps: int, length: int, seed: int, setting: str, work: Path) -> Path:
    """The checkpoint after fine-tuning, made if missing; a step has 8 sequences of the usual length's tokens."""
    experiment = EXPERIMENTS[setting]
    target = work / f"{folder.name}-{rope}-{steps}x{length}-{seed}"
    if target.exists():
        return target
    scaling: dict[str, Any]
    if rope.removeprefix("resonance_") == "default":  # nothing scaled: config.json has to allow the length
        declared = work / f"{folder.name}-declared"
        shutil.copytree(folder, declared, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": experiment.contexts[-1]}
        (declared / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        folder, scaling = declared, {}
    else:
        scaling = {"rope": rope, "factor": experiment.factor}

    def on_step(recipe: object, step: int, loss: float, rate: float) -> None:
        if step % 10 == 0:
            print(f"{target.name} step {step}/{steps} loss {loss:.3f}", file=sys.stderr, flush=True)

    finetune(
        folder, training_text(setting, work), target, length=length, steps=steps, batch_size=1, seed=seed,
        dtype="float32", accumulate=max(1, 8 * (experiment.length or experiment.context) // length),
        learning_rate=experiment.learning_rate, force=True, grad_checkpoint=length > experiment.context,
        skip_positions=bool(experiment.length), on_step=on_step, **scaling,
    )  # fmt: skip
    return target


def measure(name: str, checkpoint: Checkpoint, setting: str, work: Path) -> dict[str, Any]:
    """Perplexity on held-out texts and the passkey grid, at every context."""
    experiment = EXPERIMENTS[setting]
    longest = experiment.contexts[-1]
    tokenizer = checkpoint.tokenizer
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    chosen, _ = select_documents(texts(setting)[1], tokenizer, longest - len(start), experiment.documents)
    protocol = Protocol(experiment.contexts, truncate=True, last=experiment.last)
    evaluator = None
    if setting == "smollm2":
        own = Checkpoint.open(base_folder(setting, "default", 0, work))
        evaluator = Subject(own.extended("dynamic", longest), [], start, chosen)
    rows = run_perplexity(
        [Subject(checkpoint, [checkpoint.rope], start, chosen)], protocol, work / f"{setting}-perplexity.jsonl",
        {"data": "held out", "texts": digests(setting)}, evaluator=evaluator, progress=on_progress,
    )  # fmt: skip
    result: dict[str, Any] = {
        "perplexity": [row["perplexity_tokens"] for row in rows],
        "perplexity_last": [row["perplexity_last"] for row in rows],
        "documents": len(chosen),
    }
    if evaluator is not None:
        result |= {name: [row[name] for row in rows] for name in ("longppl", "key_tokens")}
    grid = PasskeyGrid(experiment.contexts, (10, 50, 90), experiment.repetitions)
    trials = run_passkey(checkpoint, grid, work / f"{name}-passkey.jsonl")
    return result | {"passkey": accuracy(grid, trials).mean(0).tolist()}


def tables(lines: list[dict[str, Any]], experiment: Experiment) -> str:
    """Means over seeds: perplexity at every context, of all tokens and of the last; resonance minus plain."""
    groups: dict[tuple, dict[int, dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["steps"], line["length"], line["base"], line["rope"]), {})[line["seed"]] = line
    contexts = experiment.contexts
    names = {
        "perplexity": "",
        "perplexity_last": "last tokens of ",
        "longppl": "LongPPL of ",
        "passkey": "passkeys found at ",
    }
    figures_of = [name for name in names if all(name in line for line in lines)]
    # The last tokens of the shortest context may be all of its tokens.
    cut = {"perplexity_last": int(experiment.last >= experiment.context)}
    marks = [f"{names[figure]}{context}" for figure in figures_of for context in contexts[cut.get(figure, 0) :]]
    rows = [
        f"| trained with | steps × length | rope | seeds | {' | '.join(marks)} |",
        "| --- " * (4 + len(marks)) + "|",
    ]

    def figures(line: dict[str, Any]) -> np.ndarray:
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


def gaps(setting: str) -> dict[str, dict[str, float]]:
    """Sums of the feature gap without fine-tuning, by a base's own rope type and the one it is extended with."""
    experiment = EXPERIMENTS[setting]
    sums: dict[str, dict[str, float]] = {}
    for base in experiment.bases:
        own = RopeConfig(CONFIG["head_dim"], rope_type=base, max_position_embeddings=experiment.context)
        if setting == "smollm2":
            own = Checkpoint.open(SMOLLM2).rope
        tested = {rope: named_rope(own, rope, experiment.factor).frequencies() for rope in (*ROPES, *FROM_RESONANCE)}
        lengths = experiment.context, experiment.contexts[-1]
        sums[base] = {
            rope: round(float(feature_gap(each, *lengths, trained=own.frequencies()).sum()), 2)
            for rope, each in tested.items()
        }
    return sums


def cells(args: argparse.Namespace, experiment: Experiment) -> Iterator[tuple[int, int, str, str]]:
    """Steps, seed, base and rope of every requested model."""
    for steps, seed in product(map(int, args.steps.split(",")), map(int, args.seeds.split(","))):
        if args.setting != "mini" and not steps and seed:
            continue  # without training, a checkpoint has one seed
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
    for rope in args.ropes.split(","):
        check_option("ropes", rope in ROPES, f"one of {', '.join(ROPES)}", rope)
    experiment, work = EXPERIMENTS[args.setting], args.work_dir
    length = args.length or experiment.length or experiment.context
    work.mkdir(parents=True, exist_ok=True)
    header = {"setting": args.setting, "contexts": experiment.contexts} | asdict(experiment)
    log = RunLog(args.output, "extension", header, key=KEY)
    for steps, seed, base, rope in cells(args, experiment):
        trained_on = length if steps else 0
        key = base, rope, steps, trained_on, seed
        log.reload()
        if key in log:
            continue
        training_text(args.setting, work)  # with --steps 0, too: not while two processes begin to fine-tune
        folder = base_folder(args.setting, base, seed, work)
        if steps:
            folder = extended(folder, rope, steps, length, seed, args.setting, work)
        checkpoint = Checkpoint.open(folder)
        angles = checkpoint.rope if steps else named_rope(checkpoint.rope, rope, experiment.factor)
        checkpoint = checkpoint.with_rope(replace(angles, max_position_embeddings=experiment.contexts[-1]))
        record = dict(zip(KEY, key, strict=True))
        record |= measure(f"{base}-{rope}-{steps}x{trained_on}-{seed}", checkpoint, args.setting, work)
        log.append(record)
        print(json.dumps(record), file=sys.stderr, flush=True)
    log.reload()
    lines = log.records
    print(tables(lines, experiment))
    print("feature gap, as it is:", gaps(args.setting))
    if args.figure:
        panels: dict[str, dict[str, list]] = {}
        for line in (line for line in lines if line["base"] == "default"):
            title = f"{line['steps']} steps of {line['length']} tokens" if line["steps"] else "as it is"
            panels.setdefault(title, {}).setdefault(line["rope"], []).append(line["perplexity_last"])
        plot_perplexity(experiment.contexts, panels, args.figure)
    print(json.dumps({"output": str(args.output), "models": len(lines), **header}))


if __name__ == "__main__":
    exit_with(main)
