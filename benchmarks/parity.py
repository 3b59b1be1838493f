"""Compare our logits and stock mlx-lm's with those of transformers, for every rope type and both styles of config.json.

    python benchmarks/parity.py

The checkpoints are those of tests/parity/cases.py, loaded as they are; needs torch. Per runtime: the largest error as
a part of the largest logit, and the part of positions with the same arg max; or what it raises. For one case also
the errors of all three against a float64 forward pass written from the papers. Last line: one JSON object.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "parity"))
import cases
import oracle

EXACT_CASE = "yarn"

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


def exact_errors(folder: Path, reference: np.ndarray) -> dict[str, float]:
    """Largest errors against float64 logits, as parts of the largest logit; config.json in style 4, which all read."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: np.array(value) for name, value in mx.load(str(folder / "model.safetensors")).items()}
    scaling = config["rope_scaling"]
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    wavelengths = oracle.yarn_wavelengths(config["head_dim"], config["rope_theta"], factor, original)
    scale = oracle.yarn_attention_scale(factor)
    exact = oracle.llama_logits(cases.tokens(), weights, config, wavelengths, scale)
    logits = {name: np.array(load(folder)[0](mx.array(cases.tokens())[None])[0]) for name, load in RUNTIMES.items()}
    logits["transformers"] = reference
    return {name: float(f"{cases.compare(value, exact)[0]:.3g}") for name, value in logits.items()}


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
            if case.name == EXACT_CASE:
                exact = exact_errors(folder, reference)
    Console().print(table)
    print(f"{EXACT_CASE}, against float64:", ", ".join(f"{name} {error:.1e}" for name, error in exact.items()))
    versions = {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "transformers": transformers.__version__}
    print(json.dumps({"positions": cases.LENGTH, "versions": versions, "rows": rows, "against_float64": exact}))


if __name__ == "__main__":
    main()
