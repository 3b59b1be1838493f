"""Compare our logits and stock mlx-lm's with those of transformers, for every rope type and both styles of config.json.

    python benchmarks/parity.py

The checkpoints are those of tests/parity/cases.py, loaded as they are; needs torch. Per runtime: the largest error as
a part of the largest logit, and the part of positions with the same arg max; or what it raises. Last line: one JSON
object.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_resonance  # noqa: F401  (loads a fast BLAS on Linux, before MLX)
from mlx_resonance.loading import load_model

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "parity"))
import cases

Load = Callable[[Path], tuple[nn.Module, dict[str, Any]]]
RUNTIMES: dict[str, Load] = {"ours": load_model, "mlx_lm": mlx_lm.utils.load_model}


def measure(load: Load, folder: Path, reference: np.ndarray) -> dict[str, Any]:
    try:
        model, _ = load(folder)
        logits = np.array(model(mx.array(cases.tokens())[None])[0])
    except Exception as error:  # whatever another runtime raises is its result
        return {"raises": f"{type(error).__name__}: {error}"}
    error, agreement = cases.compare(logits, reference)
    return {"error": float(f"{error:.3g}"), "agreement": round(agreement, 5)}


def as_text(result: dict[str, Any]) -> list[str]:
    if "raises" in result:
        return [result["raises"], ""]
    return [f"{result['error']:.1e}", f"{100 * result['agreement']:.2f} %"]


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    table = Table("rope", "config.json", "ours: error", "same arg max", "mlx-lm: error", "same arg max")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases.CASES:
            folder = Path(temporary) / case.name
            cases.save_with_transformers(case, folder)
            reference = cases.transformers_logits(folder)
            for style in reversed(cases.STYLES):  # transformers saves style 5
                cases.use_style(folder, style)
                results = {name: measure(load, folder, reference) for name, load in RUNTIMES.items()}
                rows.append({"case": case.name, "style": style, **results})
                table.add_row(case.name, style, *as_text(results["ours"]), *as_text(results["mlx_lm"]))
                print(f"{case.name}, style {style}", file=sys.stderr)
    Console().print(table)
    versions = {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "transformers": transformers.__version__}
    print(json.dumps({"positions": cases.LENGTH, "versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
