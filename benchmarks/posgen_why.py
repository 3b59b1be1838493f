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
from mlx_resonance.plots import gap_panel, legend_below, new_figure
from mlx_resonance.posgen.data import Splits
from mlx_resonance.posgen.evaluate import teacher_forced
from mlx_resonance.posgen.report import paired
from mlx_resonance.posgen.settings import PRESETS, Reading, sweep_seeds
from mlx_resonance.posgen.tasks import Task
from mlx_resonance.posgen.train import Run, run_training
from mlx_resonance.rope import ResonanceRoPE
from mlx_resonance.run_log import RunLog

import numpy as np
from reporting import exit_with, markdown

ROUNDINGS = ("none", "pre-critical", "others", "all", "quarters")
DIFFERENT = 2380  # sequences, as many as the official split's training rows have
ENCODINGS = ("rope", "ntk", "yarn")
KEY = ("trained", "read", "different", "encoding", "ramp", "seed")
COLORS = ("#888888", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7")


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

    def training_rope(self) -> ResonanceRoPE:
        """The rotary op of the training."""
        scaled = self.settings.train_scaled
        return ResonanceRoPE(self.frequencies(self.readings[0], scaled, self.rounding), traditional=True)


def variants(seeds: int) -> Iterator[Variant]:
    """Every training, seed by seed."""
    settings = PRESETS["shortcut"]
    readings = settings.readings(ENCODINGS)
    for seed in sweep_seeds(seeds):
        for rounding in ROUNDINGS:
            yield Variant(Task("semi-recursive"), settings, readings, seed, rounding)
        for rounding in ("none", "all"):
            yield Variant(Task("semi-recursive"), settings, readings, seed, rounding, DIFFERENT)


def measure(run: Variant, log: RunLog, folder: Path) -> None:
    """Train what has no results yet, and test the weights of the last step."""
    reads = [run.rounding, "all"] if run.rounding == "none" and not run.different else [run.rounding]
    common: dict[str, Any] = {"trained": run.rounding, "different": run.different, "seed": run.seed}
    cells = [common | {"read": read} | reading._asdict() for read in reads for reading in run.readings]
    if all(tuple(cell[name] for name in KEY) in log for cell in cells):
        return
    checkpoint = folder / f"{run.rounding}-{run.different}-{run.seed}.safetensors"

    def on_step(step: int, loss: float, *_: float) -> None:
        if step % 100 == 0:
            print(f"{checkpoint.stem} step {step}/{run.settings.steps} loss {loss:.3f}", file=sys.stderr, flush=True)

    model, _ = run_training(run, checkpoint, on_step)
    splits, inside = run.splits(), run.settings.train_length
    rope = run.training_rope()
    unseen = teacher_forced(model, rope, splits.test[:, :inside], run.task)
    seen = teacher_forced(model, rope, splits.train[: len(splits.test)], run.task)
    for cell in cells:
        if tuple(cell[name] for name in KEY) in log:
            continue  # an earlier run was killed between two of them
        reading = Reading(cell["encoding"], cell["ramp"])
        correct = teacher_forced(model, run.rope(reading, cell["read"]), splits.test, run.task)
        counts = {"correct": correct, "unseen": unseen, "seen": seen}
        log.append(cell | {"rows": len(splits.test)} | {name: count.tolist() for name, count in counts.items()})
    checkpoint.unlink(missing_ok=True)


def name_of(trained: str, read: str, different: int) -> str:
    """What is shown of a variant."""
    name = trained if trained == read else f"{read}, after training"
    return name + (f", {different} sequences" if different else "")


def summarize(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By variant and reading: near and far accuracy in %, seen, unseen and past the length; change from no rounding."""
    settings, task = PRESETS["shortcut"], Task("semi-recursive")
    kinds = task.kinds(settings.test_length)
    inside = settings.train_length - task.seed_length
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for line in lines:
        variant = name_of(line["trained"], line["read"], line["different"])
        groups.setdefault((variant, str(Reading(line["encoding"], line["ramp"]))), {})[line["seed"]] = line

    def near(line: dict[str, Any], name: str, kind: str = "near") -> float:
        counts = np.array(line[name][inside:] if name == "correct" else line[name])
        at = kinds[inside:] if name == "correct" else kinds[:inside]
        return 100 * float(counts[at == kind].mean()) / line["rows"]

    result: dict[str, dict[str, Any]] = {}
    for (variant, reading), seeds in groups.items():
        cell: dict[str, Any] = {"seeds": len(seeds)}
        for name in ("seen", "unseen", "correct"):
            for kind in ("near", "far"):
                cell[f"{name}_{kind}"] = float(np.mean([near(line, name, kind) for line in seeds.values()]))
        plain = groups.get((name_of("none", "none", next(iter(seeds.values()))["different"]), reading), {})
        both = [seed for seed in seeds if seed in plain]
        if both and seeds is not plain:
            changes = [near(seeds[seed], "correct") - near(plain[seed], "correct") for seed in both]
            cell["change"] = paired(np.array(changes))
        result.setdefault(variant, {})[reading] = cell
    return result


def table(result: dict[str, dict[str, Any]]) -> str:
    """In Markdown, one row per variant and reading."""
    rows = []
    for variant, of in result.items():
        for reading, cell in of.items():
            change = cell.get("change")
            shown = f"{change['difference']:+.1f}" if change else ""
            if change and change["low"] is not None:
                shown += f" [{change['low']:+.1f}, {change['high']:+.1f}]"
            numbers = [cell[name] for name in ("seen_near", "unseen_near", "seen_far", "unseen_far", "correct_near")]
            rows.append((variant, f"`{reading}`", cell["seeds"], *(f"{number:.1f}" for number in numbers), shown))
    columns = ("rounded", "read", "seeds", "near: seen", "unseen", "far: seen", "unseen", "near, past", "change")
    return markdown(columns, rows)


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
            for (name, curves), color in zip(groups.items(), COLORS, strict=False):
                axis.plot(1 + task.seed_length + chosen, 100 * np.mean(curves, axis=0), label=name, color=color)
            axis.axvline(settings.train_length + 0.5, color="black", linewidth=0.8, linestyle=":")
            axis.set(title=str(reading), xlabel="position", ylim=(0, 103))
        axes[0].set_ylabel("accuracy of near tokens, %")
        lengths = settings.train_length + 1, settings.test_length + 1
        gaps = {name: run.frequencies(shown[0], False, name) for name in ("none", "all", "quarters")}
        gap_panel(axes[3], {name: feature_gap(found, *lengths) for name, found in gaps.items()})
        axes[3].set_title("rope, unseen angles")
        legend_below(figure, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "posgen_why.jsonl")
    parser.add_argument("--figure", type=Path, help="draw accuracy over the position, and the feature gaps")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    runs = list(variants(args.seeds))
    log = RunLog(args.output, "posgen-why", json.loads(json.dumps(asdict(runs[0].settings))), key=KEY)
    for run in runs if not args.report else ():
        measure(run, log, args.output.parent)
    result = summarize(log.records)
    if args.figure:
        draw(log.records, args.figure)
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    exit_with(main)
