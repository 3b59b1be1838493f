"""PosGen's results as the docs show them: tables of all run logs, figures, feature gaps, the first digits past.

    mlx-resonance posgen sweep --preset learned --seeds 10 --output benchmarks/results/posgen-learned.jsonl
    python benchmarks/posgen.py [--weights last] [--learned] [--figure posgen.svg] [--gaps gaps.svg] [RESULTS…]

Reads run logs and trains nothing. The tables are Markdown; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mlx_resonance import feature_gap
from mlx_resonance.errors import UsageError
from mlx_resonance.plots import legend_below, new_figure, plot_posgen, reading_looks
from mlx_resonance.posgen.report import (
    WEIGHTS,
    adjust,
    below_bar,
    figure_of,
    has_learned,
    paired,
    summarize,
    weights_of,
)
from mlx_resonance.posgen.settings import ENCODINGS, Reading, Settings, settings_from
from mlx_resonance.posgen.sweep import read_results
from mlx_resonance.posgen.tasks import Task

import numpy as np
from reporting import exit_with, markdown
from scipy.ndimage import median_filter
from scipy.stats import spearmanr

RESULTS = Path(__file__).parent / "results"
DIGITS = 8  # past the training length, looked at apart
AROUND, DIP = 9, 0.2  # a dip is an accuracy more than DIP below the median of the AROUND accuracies centred on it


def table(name: str, summary: dict[str, Any]) -> list[str]:
    """Markdown rows of one run log, one for each subtask and pair of readings, plain and rounded."""
    rows = []
    for subtask, found in summary["table"].items():
        limits = summary["bounds"][subtask]
        ceilings = [f"{limits[kind]['ceiling']:.1f}" if kind in limits else "" for kind in ("all", "near", "far")]
        rows.append(f"| {name}, {subtask}: ceiling without far tokens | | | | | | {' | '.join(ceilings)} | | | |")
        for reading, row in found.items():
            pair = summary["pairs"][subtask].get(reading.removeprefix("resonance_"), {})
            shown = pair if reading.startswith("resonance_") else {}
            span = (
                f" ({row['trained_least']:.1f} to {row['trained_most']:.1f})"
                if row["seeds"] > 1 and row["trained_most"]
                else ""
            )
            cells = [f"`{reading}`", str(row["seeds"]), _number(row["trained_id"]) + span + "†" * below_bar(row)]
            cells += [_number(row["first"]), _number(row["trained_near"]), _number(row["id"])]
            cells += [_number(row["ood"]) + (f" ± {row['ood_std']:.1f}" if row["ood_std"] is not None else "")]
            cells += [_number(row["near"]), _number(row["far"]), _number(row["paper"])]
            cells += [change(shown) if shown else ""]
            cells += [f"{shown['p_holm']:.3f}" if shown.get("p_holm") is not None else ""]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def gaps(settings: Settings) -> dict[str, dict[str, float]]:
    """Sums of the feature gap over the pairs that turn fully within the training length, and over the others.

    The gap is that between the angles of test and those of training, which may have been unscaled.
    """
    lengths = settings.train_length + 1, settings.test_length + 1
    result = {}
    for reading in settings.readings(ENCODINGS):
        trained = settings.frequencies(reading, scaled=settings.train_scaled)
        gap = feature_gap(settings.frequencies(reading, scaled=True), *lengths, trained=trained)
        critical = trained.wavelengths <= lengths[0]
        result[str(reading)] = {
            "pairs": int(critical.sum()),
            "pre_critical": round(float(gap[critical].sum()), 3),
            "others": round(float(gap[~critical].sum()), 3),
        }
    return result


def against_gap(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By subtask: the feature gap of all pairs and the accuracy in % past the training length of every reading.

    `rank` is Spearman's correlation of the two, None for fewer than three accuracies.
    """
    sums = {name: gap["pre_critical"] + gap["others"] for name, gap in summary["feature_gap"].items()}
    result = {}
    for subtask, found in summary["table"].items():
        points = {reading: (sums[reading], row["ood"]) for reading, row in found.items()}
        ranked = len({accuracy for _, accuracy in points.values()}) > 2
        rank = float(spearmanr(list(points.values())).statistic) if ranked else None
        result[subtask] = {"points": points, "rank": rank}
    return result


def draw_gaps(report: dict[str, dict[str, Any]], path: str) -> None:
    """Accuracy past the training length over the feature gap: a panel for each subtask of a run log."""
    panels = [
        (f"{name}\n{subtask}", found)
        for name, summary in report.items()
        for subtask, found in summary["against_gap"].items()
        if found["rank"] is not None
    ]
    if not panels:
        raise UsageError("no subtask has three readings to draw", option="gaps")
    with new_figure(path, 1 + 1.8 * len(panels), 3.2) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, found) in zip(axes, panels, strict=True):
            for reading, style in reading_looks(found["points"]).items():
                axis.plot(*found["points"][reading], label=reading, linestyle="", **style)
            axis.set(xscale="log", ylim=(0, 103), xlabel="feature gap of all pairs")
            axis.set_title(f"{title}, rank corr. {found['rank']:.2f}", fontsize=8)
        axes[0].set_ylabel("accuracy past the\ntraining length, %")
        legend_below(figure, 8)


def just_past(header: dict[str, Any], lines: list[dict[str, Any]], weights: str) -> dict[str, dict[str, Any]]:
    """Mean accuracy in % of the first digits past the training length, by subtask, reading and kind of token."""
    curves, kinds, _, start, train_length = figure_of(header, lines, weights)
    first = slice(train_length - start, train_length - start + DIGITS)
    return {
        subtask: {
            reading: {
                str(kind): round(100 * float(curve[first][kinds[subtask][first] == kind].mean()), 1)
                for kind in sorted(set(kinds[subtask][first]))
            }
            for reading, curve in found.items()
        }
        for subtask, found in curves.items()
    }


def dips(accuracies: np.ndarray) -> np.ndarray:
    """How deep each dip is among accuracies in [0, 1], in the order of their positions; 0 for what is none."""
    depths = median_filter(accuracies, AROUND, mode="nearest") - accuracies
    return np.where(depths > DIP, depths, 0)


def pairs_of_dips(header: dict[str, Any], lines: list[dict[str, Any]], weights: str) -> dict[str, dict[str, Any]]:
    """By subtask and plain reading: dips among near tokens past the training length.

    Their share in %, `plain` and `rounded`, and the change; `with_any`, the number of plain and of rounded models that
    have one; `worth`, points of the near tokens that plain models would gain without them; `positions`, from 1, of
    plain ones in half of the seeds or more.
    """
    settings = settings_from(header["settings"])
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    positions: dict[str, np.ndarray] = {}
    for line in lines:
        task = Task(line["subtask"], **header["task"])
        past = np.arange(settings.test_length - task.seed_length) >= settings.train_length - task.seed_length
        near = past & (task.kinds(settings.test_length) == "near")
        right = np.array(weights_of(line, weights)["correct"]) / line["rows"]
        name = str(Reading(line["encoding"], line["ramp"]))
        found.setdefault((line["subtask"], name), {})[line["seed"]] = dips(right[near])
        positions[line["subtask"]] = 1 + task.seed_length + np.flatnonzero(near)
    result: dict[str, dict[str, Any]] = {}
    for (subtask, name), plain in found.items():
        rounded = found.get((subtask, f"resonance_{name}"), {})
        seeds = sorted(set(plain) & set(rounded))
        if seeds:
            before, after = (np.array([of[seed] for seed in seeds]) for of in (plain, rounded))
            shares = [100 * (depths > 0).mean(1) for depths in (before, after)]
            row: dict[str, Any] = {"plain": float(shares[0].mean()), "rounded": float(shares[1].mean())}
            row["with_any"] = [int((share > 0).sum()) for share in shares]
            row["worth"] = 100 * float(before.mean())
            row["positions"] = positions[subtask][(before > 0).mean(0) >= 0.5].tolist()
            result.setdefault(subtask, {})[name] = row | paired(shares[1] - shares[0])
    return result


def table_of_dips(report: dict[str, dict[str, Any]]) -> str:
    """In Markdown, one row for each subtask and pair of readings of a run log."""
    rows = []
    for name, summary in report.items():
        for subtask, pairs in summary["dips"].items():
            for reading, pair in pairs.items():
                shares = _number(pair["plain"]), _number(pair["rounded"]), change(pair)
                models = "{} and {}".format(*pair["with_any"])
                positions = ", ".join(map(str, pair["positions"]))
                rows.append(
                    (name, subtask, f"`{reading}`", pair["seeds"], *shares, models, _number(pair["worth"]), positions)
                )
    names = ("seeds", "plain", "rounded", "change", "models with any", "worth", "plain in half of the seeds at")
    return markdown(("", "", "", *names), rows)


def of_learned(lines: list[dict[str, Any]], weights: str) -> list[dict[str, Any]]:
    """The lines of those seeds whose models have all learned the subtask."""
    missed = {(line["subtask"], line["seed"]) for line in lines if not has_learned(weights_of(line, weights))}
    return [line for line in lines if (line["subtask"], line["seed"]) not in missed]


def minutes(settings: Settings, lines: list[dict[str, Any]]) -> float:
    """Time of all trainings: readings that share one all have its seconds."""
    trainings = {
        (line["subtask"], line["seed"], settings.training(Reading(line["encoding"], line["ramp"]))): line["seconds"]
        for line in lines
    }
    return round(sum(trainings.values()) / 60, 1)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def change(pair: dict[str, Any]) -> str:
    """A difference, with its interval if there is one."""
    interval = "" if pair["low"] is None else f" [{pair['low']:+.1f}, {pair['high']:+.1f}]"
    return f"{pair['difference']:+.1f}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=sorted(RESULTS.glob("posgen-*.jsonl")))
    parser.add_argument("--weights", choices=WEIGHTS, default="best", help="best on validation, or of the last step")
    parser.add_argument("--learned", action="store_true", help="only seeds whose models have all learned the subtask")
    parser.add_argument("--figure", help="draw accuracy over the position, from the first file")
    parser.add_argument("--gaps", help="draw accuracy past the training length over the feature gap, from all files")
    arguments = parser.parse_args()
    report: dict[str, Any] = {}
    for path in arguments.files:
        header, lines = read_results(path)
        if not lines:
            raise UsageError(f"{path} has no results yet", option="files")
        if arguments.learned and not (lines := of_learned(lines, arguments.weights)):
            raise UsageError(f"{path}: with no seed have all models learned their subtask", option="learned")
        settings = settings_from(header["settings"])
        name = path.stem if [other.stem for other in arguments.files].count(path.stem) == 1 else str(path)
        report[name] = summarize(header, lines, arguments.weights) | {
            "feature_gap": gaps(settings),
            "just_past": just_past(header, lines, arguments.weights),
            "dips": pairs_of_dips(header, lines, arguments.weights),
            "minutes": minutes(settings, lines),
        }
        report[name]["against_gap"] = against_gap(report[name])
        if arguments.figure and path == arguments.files[0]:
            plot_posgen(*figure_of(header, lines, arguments.weights), arguments.figure)
    # Holm's adjustment is for all that is shown, not for each file.
    adjust([pair for found in report.values() for pairs in found["pairs"].values() for pair in pairs.values()])
    if arguments.gaps:
        draw_gaps(report, arguments.gaps)
    columns = (
        "",
        "seeds",
        "within",
        "first",
        "near",
        "scaled",
        "past",
        "near",
        "far",
        "paper",
        "resonance - plain",
        "p",
    )
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for name, summary in report.items():
        print("\n".join(table(name, summary)))
    print("\n† a seed below 99 % within the training length, or not known")
    print(f"\nDips, % of near tokens past the training length: {100 * DIP:.0f} points below the median of {AROUND}")
    print(table_of_dips(report) + "\n")
    for name, summary in report.items():
        print(name, "feature gap", summary["feature_gap"])
        ranks = {subtask: found["rank"] for subtask, found in summary["against_gap"].items()}
        print(name, "rank correlation of the gap of all pairs and the accuracy past the length", ranks)
        print(name, f"first {DIGITS} digits past the training length, %", summary["just_past"])
    print(json.dumps(report))


if __name__ == "__main__":
    exit_with(main)
