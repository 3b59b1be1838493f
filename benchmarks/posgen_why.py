"""Why rounding helps in PosGen, or does not: models with some wavelengths rounded, or few training sequences.

    python benchmarks/posgen_why.py [--seeds 3] [--figure benchmarks/figures/posgen-why.svg]

Semi-recursive sequences, trained unscaled with the preset `shortcut`. Rounded are: no wavelength, those of the pairs
that turn fully within the training length (pre-critical), those of the others, all; all to a multiple of a quarter
token; or all, but only after a training without. The last two variants are plain and rounded models that see 2380
different sequences instead of 10 000. Each is read with RoPE, NTK and YaRN. The output is a run log: a killed run
resumes. --report trains nothing. The table is Markdown; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_resonance import feature_gap
from mlx_resonance.frequencies import RotaryFrequencies, default_frequencies
from mlx_resonance.plots import gap_panel, new_figure
from mlx_resonance.posgen.data import Splits
from mlx_resonance.posgen.evaluate import teacher_forced
from mlx_resonance.posgen.report import adjust, paired
from mlx_resonance.posgen.settings import PRESETS, Reading, sweep_seeds
from mlx_resonance.posgen.sweep import checkpoint_of
from mlx_resonance.posgen.tasks import Task
from mlx_resonance.posgen.train import Run, run_training
from mlx_resonance.rope import ResonanceRoPE
from mlx_resonance.run_log import RunLog, read_run_log

import numpy as np
from posgen import change, dips
from reporting import exit_with, markdown

ROUNDINGS = ("none", "pre-critical", "others", "all", "quarters")
DIFFERENT = 2380  # sequences, as many as the official split's training rows have
ENCODINGS = ("rope", "ntk", "yarn")
PAIRS = {"change": "", "memory": "from all "}  # of `summarize`, and what a table puts before them
KEY = ("trained", "read", "different", "encoding", "ramp", "seed")
AFTER = "all, after training"
COLORS = dict(zip((*ROUNDINGS, AFTER), ("#888888", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7"), strict=True))


def rounded(frequencies: RotaryFrequencies, rounding: str, critical: np.ndarray) -> RotaryFrequencies:
    """The same with some wavelengths rounded; `critical` says which pairs are pre-critical in training."""
    own, whole = frequencies.wavelengths, frequencies.resonate().wavelengths
    chosen = {
        "none": own,
        "pre-critical": np.where(critical, whole, own),
        "others": np.where(critical, own, whole),
        "all": whole,
        "quarters": np.rint(4 * own) / 4,
    }
    return replace(frequencies, wavelengths=chosen[rounding])


@dataclass(frozen=True)
class Variant(Run):
    """A training with some wavelengths rounded, on fewer different sequences or on all.

    Args:
        rounding: one of `ROUNDINGS`.
        different: number of different training sequences; 0 for all.
    """

    rounding: str = "none"
    different: int = 0

    def splits(self) -> Splits:
        """The rows, those of the training from fewer sequences repeated to the same number."""
        splits = super().splits()
        if not self.different:
            return splits
        return replace(splits, train=np.resize(splits.train[: self.different], splits.train.shape))

    def frequencies(self, reading: Reading, scaled: bool, rounding: str) -> RotaryFrequencies:
        """Those of a reading, with some wavelengths rounded."""
        settings = self.settings
        plain = default_frequencies(settings.model.head_dim, settings.base).wavelengths
        found = settings.frequencies(reading, scaled)
        return rounded(found, rounding, plain <= settings.train_length + 1)

    def rope(self, reading: Reading, rounding: str | None = None) -> ResonanceRoPE:
        """The rotary op of a reading, scaled."""
        return ResonanceRoPE(self.frequencies(reading, True, rounding or self.rounding), traditional=True)

    def training_rope(self, rounding: str | None = None) -> ResonanceRoPE:
        """The rotary op of the training, or the same with another rounding."""
        frequencies = self.frequencies(self.readings[0], self.settings.train_scaled, rounding or self.rounding)
        return ResonanceRoPE(frequencies, traditional=True)


def variants(seeds: int) -> Iterator[Variant]:
    """Every training, seed by seed."""
    settings = PRESETS["shortcut"]
    readings = settings.readings(ENCODINGS)
    for seed in sweep_seeds(seeds):
        for rounding in ROUNDINGS:
            yield Variant(Task("semi-recursive"), settings, readings, seed, rounding)
        for rounding in ("none", "all"):
            yield Variant(Task("semi-recursive"), settings, readings, seed, rounding, DIFFERENT)


def measure(run: Variant, log: RunLog) -> None:
    """Train what has no results yet, and test the weights of the last step.

    A cell has the right predictions within the training length, of sequences that were not trained (`unseen`) and that
    were (`seen`), read unscaled with its rounding, and those of `correct`, read with its encoding.
    """
    reads = [run.rounding, "all"] if run.rounding == "none" and not run.different else [run.rounding]
    common: dict[str, Any] = {"trained": run.rounding, "different": run.different, "seed": run.seed}
    cells = [common | {"read": read} | reading._asdict() for read in reads for reading in run.readings]
    checkpoint = checkpoint_of(log.path, run, run.rounding, run.different)
    log.reload()  # another process may have added some
    left = [cell for cell in cells if tuple(cell[name] for name in KEY) not in log]
    if not left:
        checkpoint.unlink(missing_ok=True)
        return

    def on_step(step: int, loss: float, *_: float) -> None:
        if step % 100 == 0:
            print(f"{common} step {step}/{run.settings.steps} loss {loss:.3f}", file=sys.stderr, flush=True)

    model, _ = run_training(run, checkpoint, on_step)
    splits, inside = run.splits(), run.settings.train_length
    lines = []
    for read in reads:
        rope = run.training_rope(read)
        within = {
            "unseen": teacher_forced(model, rope, splits.test[:, :inside], run.task),
            "seen": teacher_forced(model, rope, splits.train[: len(splits.test)], run.task),
        }
        for cell in (cell for cell in left if cell["read"] == read):
            reading = Reading(cell["encoding"], cell["ramp"])
            correct = teacher_forced(model, run.rope(reading, read), splits.test, run.task)
            counts = within | {"correct": correct}
            lines.append(cell | {"rows": len(splits.test)} | {name: count.tolist() for name, count in counts.items()})
    log.append(*lines)
    checkpoint.unlink(missing_ok=True)


def name_of(trained: str, read: str, different: int) -> str:
    """What is shown of a variant."""
    name = trained if trained == read else f"{read}, after training"
    return name + (f", {different} sequences" if different else "")


def summarize(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By variant and reading: near and far accuracy in %, seen, unseen and past the length, and its dips there.

    `change` is that of the near tokens past it, from no rounding on as many sequences, `memory` that from the same
    rounding on all sequences; paired by seed, with p-values adjusted for all of them.
    """
    settings, task = PRESETS["shortcut"], Task("semi-recursive")
    kinds = task.kinds(settings.test_length)
    inside = settings.train_length - task.seed_length
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for line in lines:
        variant = name_of(line["trained"], line["read"], line["different"])
        groups.setdefault((variant, str(Reading(line["encoding"], line["ramp"]))), {})[line["seed"]] = line

    def accuracy(line: dict[str, Any], name: str, kind: str = "near") -> float:
        counts = np.array(line[name][inside:] if name == "correct" else line[name])
        at = kinds[inside:] if name == "correct" else kinds[:inside]
        return 100 * float(counts[at == kind].mean()) / line["rows"]

    result: dict[str, dict[str, Any]] = {}
    for (variant, reading), seeds in groups.items():
        cell: dict[str, Any] = {"seeds": len(seeds)}
        for name in ("seen", "unseen", "correct"):
            for kind in ("near", "far"):
                cell[f"{name}_{kind}"] = float(np.mean([accuracy(line, name, kind) for line in seeds.values()]))
        curves = [
            np.array(line["correct"][inside:])[kinds[inside:] == "near"] / line["rows"] for line in seeds.values()
        ]
        cell["dips"] = 100 * float(np.mean([dips(curve) > 0 for curve in curves]))
        line = next(iter(seeds.values()))
        others = {"change": name_of("none", "none", line["different"])}
        if line["different"]:
            others["memory"] = name_of(line["trained"], line["read"], 0)
        for name, other in others.items():
            before = groups.get((other, reading), {})
            both = [seed for seed in seeds if seed in before] if other != variant else []
            if both:
                changes = [accuracy(seeds[seed], "correct") - accuracy(before[seed], "correct") for seed in both]
                cell[name] = paired(np.array(changes))
        result.setdefault(variant, {})[reading] = cell
    adjust([cell[name] for of in result.values() for cell in of.values() for name in PAIRS if name in cell])
    return result


def table(result: dict[str, dict[str, Any]]) -> str:
    """In Markdown, one row per variant: its near tokens within the training length and, per reading, past it.

    After the accuracy, the change from no rounding, and with fewer sequences that from all of them.
    """
    names = list(dict.fromkeys(reading for of in result.values() for reading in of))
    rows = []
    for variant, of in result.items():
        cell = next(iter(of.values()))
        row = [variant, str(cell["seeds"]), f"{cell['seen_near']:.1f}, {cell['unseen_near']:.1f}"]
        for name in names:
            found = of.get(name, {})
            changes = [start + change(found[pair]) for pair, start in PAIRS.items() if pair in found]
            row.append("; ".join([f"{found['correct_near']:.1f}", *changes]) if found else "")
        rows.append((*row, f"{np.mean([cell['dips'] for cell in of.values()]):.1f}"))
    return markdown(("rounded", "seeds", "within: seen, unseen", *(f"past: `{name}`" for name in names), "dips"), rows)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Near tokens over the position by what is rounded, for three readings, and the feature gaps of RoPE."""
    settings, task = PRESETS["shortcut"], Task("semi-recursive")
    chosen = np.flatnonzero(task.kinds(settings.test_length) == "near")
    shown = [Reading("rope"), Reading("ntk"), Reading("yarn", settings.ramps[-1])]
    run = next(variants(1))
    with new_figure(path, 10, 3.6) as figure:
        axes = figure.subplots(1, 4)
        for axis, reading in zip(axes, shown, strict=False):
            groups: dict[str, list[np.ndarray]] = {}
            for line in lines:
                if (line["encoding"], line["ramp"]) == reading and not line["different"]:
                    curve = np.array(line["correct"])[chosen] / line["rows"]
                    groups.setdefault(name_of(line["trained"], line["read"], 0), []).append(curve)
            for name in (name for name in COLORS if name in groups):
                curve = 100 * np.mean(groups[name], axis=0)
                axis.plot(1 + task.seed_length + chosen, curve, label=name, color=COLORS[name])
            axis.axvline(settings.train_length + 0.5, color="black", linewidth=0.8, linestyle=":")
            axis.set(title=str(reading), xlabel="position", ylim=(0, 103))
        axes[0].set_ylabel("accuracy of near tokens, %")
        lengths = settings.train_length + 1, settings.test_length + 1
        gaps = {name: run.frequencies(shown[0], False, name) for name in ("none", "all", "quarters")}
        gap_panel(axes[3], {name: feature_gap(found, *lengths) for name, found in gaps.items()})
        for points, name in zip(axes[3].lines, gaps, strict=True):
            points.set_color(COLORS[name])
        axes[3].legend(loc="best")
        axes[3].set_title("rope, unseen angles")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "posgen_why.jsonl")
    parser.add_argument("--figure", type=Path, help="draw accuracy over the position, and the feature gaps")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    runs = list(variants(args.seeds))
    if args.report:
        _, lines = read_run_log(args.output, "posgen-why")
    else:
        log = RunLog(args.output, "posgen-why", asdict(runs[0].settings), key=KEY)
        for run in runs:
            measure(run, log)
        log.reload()
        lines = log.records
    result = summarize(lines)
    if args.figure:
        draw(lines, args.figure)
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    exit_with(main)
