"""PosGen's results as the docs show them: tables, figure, feature gaps, and the shortcut that the models learned.

    mlx-resonance posgen sweep --preset laptop --seeds 5 --output benchmarks/results/posgen-laptop.jsonl
    python benchmarks/posgen.py [--figure posgen.svg] [benchmarks/results/posgen-*.jsonl]

Reads run logs and trains nothing. The tables are Markdown; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mlx_resonance import feature_gap
from mlx_resonance.plots import plot_posgen
from mlx_resonance.posgen.report import PAPER, accuracy_curves, summarize
from mlx_resonance.posgen.settings import BASES, Settings, settings_from
from mlx_resonance.posgen.sweep import read_results

import numpy as np

RESULTS = Path(__file__).parent / "results"


def table(summary: dict[str, Any]) -> str:
    """Accuracy past the training length, mean ± standard deviation over seeds, and the paper's means."""
    rows = ["| | " + " | ".join(f"{subtask} | paper" for subtask in summary["table"]) + " |"]
    rows.append("| --- " * (1 + 2 * len(summary["table"])) + "|")
    encodings = [name for base in BASES for name in (base, f"resonance_{base}")]
    for encoding in encodings:
        cells = [f"`{encoding}`"]
        for subtask, found in summary["table"].items():
            row = found.get(encoding)
            spread = "" if row is None or row["ood_std"] is None else f" ± {row['ood_std']:.1f}"
            paper = PAPER[subtask].get(encoding)
            cells += ["" if row is None else f"{row['ood']:.1f}{spread}", "" if paper is None else str(paper)]
        if any(cells[1::2]):
            rows.append("| " + " | ".join(cells) + " |")
    for base in BASES:
        cells = [f"resonance - plain, {base}"]
        for found in summary["pairs"].values():
            pair = found.get(base)
            interval = "" if not pair or pair["low"] is None else f" [{pair['low']:+.1f}, {pair['high']:+.1f}]"
            cells += [f"{pair['difference']:+.1f}{interval}" if pair else "", ""]
        if any(cells[1:]):
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def gaps(settings: Settings) -> dict[str, dict[str, float]]:
    """Sums of the feature gap over the pairs that turn fully within the training length, and over the others.

    The gap is that between the angles of test and those of training, which may have been unscaled.
    """
    lengths = settings.train_length + 1, settings.test_length + 1
    result = {}
    for encoding in (name for base in BASES for name in (base, f"resonance_{base}")):
        trained = settings.frequencies(encoding, scaled=settings.train_scaled)
        gap = feature_gap(settings.frequencies(encoding, scaled=True), *lengths, trained=trained)
        critical = trained.wavelengths <= lengths[0]
        result[encoding] = {
            "pairs": int(critical.sum()),
            "pre_critical": round(float(gap[critical].sum()), 3),
            "others": round(float(gap[~critical].sum()), 3),
        }
    return result


def shortcut(lines: list[dict[str, Any]], inside: int) -> dict[str, dict[str, float]]:
    """In-distribution accuracy (%) of plain and resonance RoPE at the first predicted token and at the even and odd
    ones after it. `tests/test_posgen_rules.py` shows the rule of two terms that holds for all but the first.
    """
    result = {}
    for subtask in dict.fromkeys(line["subtask"] for line in lines):
        some = [line for line in lines if line["subtask"] == subtask and line["encoding"] in ("rope", "resonance_rope")]
        if not some:
            continue
        right = 100 * np.array([np.array(line["correct"][:inside]) / line["rows"] for line in some]).mean(axis=0)
        parts = {"first": right[0], "second_fourth": right[1::2].mean(), "third_fifth": right[2::2].mean()}
        result[subtask] = {name: round(float(value), 2) for name, value in parts.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=sorted(RESULTS.glob("posgen-*.jsonl")))
    parser.add_argument("--figure", help="draw accuracy over the position, from the first file")
    arguments = parser.parse_args()
    report: dict[str, Any] = {}
    for path in arguments.files:
        header, lines = read_results(path)
        settings = settings_from(header["settings"])
        seed_length = header["task"]["near"] + header["task"]["far"]
        summary = summarize(lines)
        trainings = {  # encodings that share a training all have its seconds
            (line["subtask"], line["seed"], settings.training_encoding(line["encoding"]), line["seconds"])
            for line in lines
        }
        report[path.stem] = {
            **summary,
            "feature_gap": gaps(settings),
            "shortcut": shortcut(lines, settings.train_length - seed_length),
            "minutes": round(sum(seconds for *_, seconds in trainings) / 60, 1),
        }
        print(f"{path.name}: {len(lines)} results\n\n{table(summary)}\n")
        print("feature gap", report[path.stem]["feature_gap"])
        print("shortcut", report[path.stem]["shortcut"], "\n")
        if arguments.figure and path == arguments.files[0]:
            plot_posgen(accuracy_curves(lines), seed_length, settings.train_length, arguments.figure)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
