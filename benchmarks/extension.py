"""Does Resonance-YaRN help a small LLaMA at 8 times its context? Train, extend, measure, one line per model.

    python benchmarks/extension.py mini --work-dir /tmp/extension --output benchmarks/results/extension-mini.jsonl
    python benchmarks/extension.py stdlib-llama --steps 0 --work-dir … --output …

`mini` trains models of its own from the start, with plain RoPE and with resonance, three seeds of each; `stdlib-llama`
takes the checkpoint of the package, `copy` the same after 400 steps with passkeys in its rows. Each is then extended
with every scaling: as it is (0 steps of fine-tuning), after 50, after 400, as `--steps` says, on sequences of the
trained length (the paper's cheapest recipe: 4096 tokens for a context of 32 768) or of any other `--length`. What is
in the output is not done again, a killed run goes on.
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

from mlx_resonance import RopeConfig, feature_gap, load
from mlx_resonance.evaluation.passkey import Grid, accuracy, run_passkey
from mlx_resonance.evaluation.perplexity import Subject, named_rope, run_perplexity, select_documents
from mlx_resonance.evaluation.windows import Protocol
from mlx_resonance.files import read_config
from mlx_resonance.finetuning import finetune
from mlx_resonance.loading import set_rope
from mlx_resonance.plots import plot_perplexity
from mlx_resonance.records import append_records, open_records

import numpy as np
from extension_bases import CONTEXT, base_folder
from stdlib_llama import CONFIG, read, source_files

FACTOR = 8
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for 95 %, by the number of seeds
ROPES = ("default", "linear", "ntk", "yarn", "resonance_yarn")
FROM_RESONANCE = ("resonance_default", "resonance_yarn")  # for what was trained with rounded wavelengths


@dataclass(frozen=True)
class Setting:
    """One of the experiments: the length trained with, what is measured past it, how it is fine-tuned."""

    context: int
    bases: tuple[str, ...]
    documents: int
    repetitions: int  # of the passkey, at each length and depth; 0 for a model that never learned to copy
    learning_rate: float

    @property
    def contexts(self) -> list[int]:
        """From the trained one to `FACTOR` times that."""
        return [self.context * times for times in (1, 2, 4, FACTOR)]


SETTINGS = {
    "mini": Setting(CONTEXT, ("default", "resonance_default"), 22, 1, 5e-4),
    "stdlib-llama": Setting(512, ("default",), 10, 0, 2e-4),
    "copy": Setting(512, ("default",), 10, 3, 2e-4),
}


def training_text(work: Path) -> Path:
    """The standard library's training files as JSON lines."""
    path = work / "text" / "train.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"text": read(file)}) + "\n" for file in source_files()[0]))
        partial.rename(path)
    return path.parent


def extended(folder: Path, rope: str, steps: int, length: int, seed: int, setting: Setting, work: Path) -> Path:
    """The checkpoint after fine-tuning, made where it is not there; a step is `FACTOR` times the context's tokens."""
    target = work / f"{folder.name}-{rope}-{steps}x{length}-{seed}"
    if target.exists():
        return target
    if rope.removeprefix("resonance_") == "default":  # nothing scaled: config.json has to allow the length
        declared = work / f"{folder.name}-declared"
        shutil.copytree(folder, declared, dirs_exist_ok=True)
        config = read_config(folder) | {"max_position_embeddings": setting.contexts[-1]}
        (declared / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        folder, scaling = declared, {}
    else:
        scaling = {"rope": rope, "factor": FACTOR}

    def on_step(recipe: object, step: int, loss: float, rate: float) -> None:
        if step % 10 == 0:
            print(f"{target.name} step {step}/{steps} loss {loss:.3f}", file=sys.stderr, flush=True)

    finetune(
        folder, training_text(work), target, length=length, steps=steps, batch_size=1, seed=seed, dtype="float32",
        accumulate=setting.contexts[-1] // length, learning_rate=setting.learning_rate, force=True,
        grad_checkpoint=length > setting.context, on_step=on_step, **scaling,
    )  # fmt: skip
    return target


def measure(name: str, folder: Path, rope: RopeConfig, setting: Setting, work: Path) -> dict:
    """Perplexity on held-out files and the passkey grid, at every context."""
    longest = setting.contexts[-1]
    model, tokenizer = load(folder)
    set_rope(model, rope)
    start = [tokenizer.bos_token_id]
    texts = [read(path) for path in source_files()[1]]
    documents, _ = select_documents(texts, tokenizer, longest - 1, setting.documents)
    subject = Subject(name, folder, [rope], start, documents)
    protocol = Protocol(setting.contexts, truncate=True, last=setting.context)
    rows = run_perplexity([subject], protocol, work / f"{name}-perplexity.jsonl", {"data": "held out"})
    result = {
        "perplexity": [row["perplexity_tokens"] for row in rows],
        "perplexity_last": [row["perplexity_last"] for row in rows],
        "documents": len(documents),
    }
    if setting.repetitions:
        grid = Grid(setting.contexts, (10, 50, 90), setting.repetitions)
        header = {"model": name, "rope": rope.to_hf()}
        trials = run_passkey(model, tokenizer, grid, work / f"{name}-passkey.jsonl", header)
        result["passkey"] = accuracy(grid, trials).mean(0).tolist()
    return result


def tables(lines: list[dict], contexts: list[int]) -> str:
    """Perplexity at every context and of its end, mean over seeds; resonance less plain YaRN with t intervals."""
    groups: dict[tuple, dict[int, dict]] = {}
    for line in lines:
        groups.setdefault((line["steps"], line["length"], line["base"], line["rope"]), {})[line["seed"]] = line
    figures_of = ["perplexity", "perplexity_last", *(["passkey"] if "passkey" in lines[0] else [])]
    names = {"perplexity": "", "perplexity_last": "last tokens of ", "passkey": "passkeys found at "}
    # The last tokens of the shortest context are all of it.
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
            change = np.array([figures(seeds[seed]) - figures(twin[seed]) for seed in both])
            mean, std = _mean_and_std(change)
            half = T95.get(len(both), np.nan) * std / np.sqrt(len(both))
            cells = [
                f"{m:+.2f}" + (f" [{m - h:+.2f}, {m + h:+.2f}]" if len(both) > 1 else "")
                for m, h in zip(mean, half, strict=True)
            ]
            rows.append(f"| {base} | {trained} | difference to plain | {len(both)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _mean_and_std(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def gaps(setting: Setting) -> dict[str, dict[str, float]]:
    """Sums of the feature gap, by what a base was trained with and what it is extended with, not fine-tuned."""
    sums: dict[str, dict[str, float]] = {}
    for base in setting.bases:
        own = RopeConfig(CONFIG["head_dim"], rope_type=base, max_position_embeddings=setting.context)
        tested = {rope: named_rope(own, rope, FACTOR).frequencies() for rope in (*ROPES, *FROM_RESONANCE)}
        lengths = setting.context, setting.contexts[-1]
        sums[base] = {
            rope: round(float(feature_gap(each, *lengths, trained=own.frequencies()).sum()), 2)
            for rope, each in tested.items()
        }
    return sums


def cells(args: argparse.Namespace, setting: Setting) -> Iterator[tuple[int, int, str, str]]:
    """Steps, seed, base and rope of every model that is asked for."""
    for steps, seed in product(map(int, args.steps.split(",")), map(int, args.seeds.split(","))):
        if args.setting == "stdlib-llama" and not steps and seed:
            continue  # without training one seed is all there is of the package's checkpoint
        for base in setting.bases:
            for rope in args.ropes.split(",") if base == "default" else FROM_RESONANCE:
                yield steps, seed, base, rope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="checkpoints, and what is measured of each document"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one per model and scaling")
    parser.add_argument("--steps", default="0,50,400", help="of fine-tuning, with commas")
    parser.add_argument("--length", type=int, help="tokens of a sequence of fine-tuning; by default the trained length")
    parser.add_argument("--ropes", default=",".join(ROPES), help="with commas, what to extend plain models with")
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--figure", type=Path, help="draw the perplexity of the last tokens over the context")
    args = parser.parse_args()
    setting, work = SETTINGS[args.setting], args.work_dir
    length = args.length or setting.context
    work.mkdir(parents=True, exist_ok=True)
    header = {"setting": args.setting, "contexts": setting.contexts, "last": setting.context}
    lines = open_records(args.output, "extension", header)
    done = {(line["base"], line["rope"], line["steps"], line["length"], line["seed"]) for line in lines}
    for steps, seed, base, rope in cells(args, setting):
        trained_on = length if steps else 0
        if (base, rope, steps, trained_on, seed) in done:
            continue
        folder = base_folder(args.setting, base, seed, work)
        if steps:
            folder = extended(folder, rope, steps, length, seed, setting, work)
        own = RopeConfig.from_hf(read_config(folder))
        angles = own if steps else named_rope(own, rope, FACTOR)
        angles = replace(angles, max_position_embeddings=setting.contexts[-1])  # what may be generated
        record = {"base": base, "rope": rope, "steps": steps, "length": trained_on, "seed": seed}
        record |= measure(f"{base}-{rope}-{steps}x{trained_on}-{seed}", folder, angles, setting, work)
        append_records(args.output, [record])
        print(json.dumps(record), file=sys.stderr, flush=True)
    lines = open_records(args.output, "extension", header)
    print(tables(lines, setting.contexts))
    print("feature gap, as it is:", gaps(setting))
    if args.figure:
        panels: dict[str, dict[str, list]] = {}
        for line in (line for line in lines if line["base"] == "default"):
            title = f"{line['steps']} steps of {line['length']} tokens" if line["steps"] else "as it is"
            panels.setdefault(title, {}).setdefault(line["rope"], []).append(line["perplexity_last"])
        plot_perplexity(setting.contexts, panels, args.figure)
    print(json.dumps({"output": str(args.output), "models": len(lines), **header}))


if __name__ == "__main__":
    main()
