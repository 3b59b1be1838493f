"""Does Resonance-YaRN help a small LLaMA at 8 times its context? Train, extend, measure, one line per model.

    python benchmarks/extension.py mini --work-dir /tmp/extension --output benchmarks/results/extension-mini.jsonl
    python benchmarks/extension.py stdlib-llama --steps 0 --work-dir … --output …

`mini` trains models of its own from the start, with plain RoPE and with resonance, three seeds of each; `stdlib-llama`
takes the checkpoint of the package, `copy` the same after 100 steps with passkeys in its rows. Each is then extended
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
from mlx_resonance.convert import convert
from mlx_resonance.evaluation.passkey import ANSWER_TOKENS, Grid, accuracy, passkey_prompt, run_passkey
from mlx_resonance.evaluation.perplexity import Subject, named_rope, run_perplexity, select_documents
from mlx_resonance.evaluation.windows import Protocol
from mlx_resonance.files import read_config
from mlx_resonance.finetuning import finetune
from mlx_resonance.loading import load_model, model_classes, set_rope
from mlx_resonance.plots import plot_perplexity
from mlx_resonance.records import append_records, open_records
from mlx_resonance.training import train, warmup_cosine

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from stdlib_llama import CONFIG, read, source_files

TINY = Path(__file__).parents[1] / "mlx_resonance/assets/stdlib-llama"
FACTOR = 8
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for 95 %, by the number of seeds
ROPES = ("default", "linear", "ntk", "yarn", "resonance_yarn")
FROM_RESONANCE = ("resonance_default", "resonance_yarn")  # for what was trained with rounded wavelengths
CONTEXT = 256  # that mini is trained with
MINI = CONFIG | {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "dtype": "float32", "torch_dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """How a base is trained: rows of text and of passkeys in a step, steps, the highest learning rate."""

    text: int
    keys: int
    steps: int
    learning_rate: float


ROWS = {"mini": Rows(6, 4, 600, 4e-3), "copy": Rows(2, 6, 100, 1e-3)}


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


def key_row(tokenizer, context: int, seed: list[int]) -> list[int]:
    """A passkey prompt with its answer, of a length up to the context, the rest end tokens."""
    rng = np.random.default_rng(seed)
    length, depth, key = int(rng.integers(140, context + 1)), int(rng.integers(0, 101)), int(rng.integers(1, 50001))
    prompt = passkey_prompt(tokenizer, length, depth, key)
    answer = tokenizer.encode(f" {key}.", add_special_tokens=False)[:ANSWER_TOKENS]
    row = prompt + answer + [CONFIG["eos_token_id"]] * (context + 1)
    return row[: context + 1]


def train_rows(model: nn.Module, rows: Rows, context: int, seed: int, checkpoint: Path) -> None:
    """Train on rows of text and of passkeys."""
    _, tokenizer = load(TINY)
    parts = [[*tokenizer.encode(read(path)), CONFIG["eos_token_id"]] for path in source_files()[0]]
    stream = np.concatenate([np.array(part, np.int32) for part in parts])

    def batch(step: int) -> tuple[mx.array]:
        starts = np.random.default_rng((seed, step)).integers(0, len(stream) - context - 1, size=rows.text)
        tokens = [stream[i : i + context + 1] for i in starts]
        tokens += [np.array(key_row(tokenizer, context, [seed, step, i, 1])) for i in range(rows.keys)]
        return (mx.array(np.stack(tokens).astype(np.int32)),)

    def loss(model: nn.Module, rows: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:]).mean()

    def on_step(step: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"{checkpoint.stem} step {step}/{rows.steps} loss {loss:.3f}", file=sys.stderr, flush=True)

    rate = warmup_cosine(rows.learning_rate, rows.steps, rows.steps // 15)
    optimizer = optim.AdamW(rate, betas=[0.9, 0.95], weight_decay=0.0)
    train(model, optimizer, loss, batch, rows.steps, seed=seed, checkpoint=checkpoint, on_step=on_step)


def train_mini(rope: str, seed: int, folder: Path) -> None:
    """Train a model from the start, and write a checkpoint."""
    config = MINI | {"rope_scaling": None if rope == "default" else {"rope_type": rope}}
    model_class, args_class = model_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    train_rows(model, ROWS["mini"], CONTEXT, seed, folder.with_suffix(".safetensors"))
    write_checkpoint(model, config, TINY, folder)


def train_copy(seed: int, source: Path, folder: Path) -> None:
    """Train the package's checkpoint to say passkeys, and write a checkpoint."""
    model, _ = load_model(source)
    train_rows(model, ROWS["copy"], 512, seed, folder.with_suffix(".safetensors"))
    write_checkpoint(model, read_config(source), source, folder)


def write_checkpoint(model: nn.Module, config: dict, source: Path, folder: Path) -> None:
    """A folder with the model's weights and the tokenizer of another; it appears whole."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    others = shutil.ignore_patterns("*.safetensors*", "config.json", "training.json", "conversion.json", "README.md")
    shutil.copytree(source, partial, ignore=others)
    mx.save_safetensors(str(partial / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(folder)


def base_folder(name: str, base: str, seed: int, work: Path) -> Path:
    """The checkpoint to extend, made where it is not there; in float32, the fast type on a CPU."""
    folder = work / {"mini": f"base-{base}-{seed}", "copy": f"copy-{seed}"}.get(name, name)
    if folder.exists():
        return folder
    if name == "mini":
        train_mini(base, seed, folder)
    elif name == "copy":
        train_copy(seed, base_folder("stdlib-llama", base, seed, work), folder)
    else:
        convert(TINY, folder, resonance=False, dtype="float32")
    return folder


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
    protocol = Protocol(setting.contexts, truncate=True, last=setting.context // 2)
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
    marks = [f"{names[figure]}{context}" for figure in figures_of for context in contexts]
    rows = [
        f"| trained with | steps × length | rope | seeds | {' | '.join(marks)} |",
        "| --- " * (4 + len(marks)) + "|",
    ]

    def figures(line: dict) -> np.ndarray:
        return np.concatenate([line[figure] for figure in figures_of])

    for (steps, length, base, rope), seeds in sorted(groups.items(), key=lambda item: item[0][:3]):
        values = np.array([figures(line) for line in seeds.values()])
        cells = [
            f"{m:.2f}" + (f" ± {s:.2f}" if len(values) > 1 else "") for m, s in zip(*_mean_and_std(values), strict=True)
        ]
        trained = f"{steps} × {length}" if steps else "as it is"
        rows.append(f"| {base} | {trained} | `{rope}` | {len(values)} | {' | '.join(cells)} |")
        twin = groups.get((steps, length, base, rope.removeprefix("resonance_")), {})
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
    parser.add_argument("--figure", type=Path, help="draw the perplexity of the last tokens over the context, as it is")
    args = parser.parse_args()
    setting, work = SETTINGS[args.setting], args.work_dir
    length = args.length or setting.context
    work.mkdir(parents=True, exist_ok=True)
    header = {"setting": args.setting, "context": setting.context, "contexts": setting.contexts}
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
        chosen = [line for line in lines if (line["base"], line["steps"], line["seed"]) == ("default", 0, 0)]
        curves = {line["rope"]: line["perplexity_last"] for line in chosen}
        plot_perplexity(setting.contexts, curves, args.figure)
    print(json.dumps({"output": str(args.output), "models": len(lines), **header}))


if __name__ == "__main__":
    main()
