"""Compare our logits and stock mlx-lm's with those of transformers, for every rope type and both styles of config.json.

    python benchmarks/parity.py

One random two-layer LLaMA per rope type, saved by transformers; needs torch. Per runtime: the largest error as a part
of the largest logit, and the share of positions with the same arg max; or the error that it raises. For one case also
the errors of all three against transformers' model in float64 with exact angles. Last line: one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # before MLX is loaded: on an M5 it would round factors to 10 bits

from mlx_resonance import Checkpoint, RopeConfig

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

LENGTH, VOCABULARY = 6000, 128
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH)
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
WIDE_HEADS, TIED, BIAS = {"head_dim": 48}, {"tie_word_embeddings": True}, {"attention_bias": True}
ORIGINAL = {"factor": 8.0, "original_max_position_embeddings": 1024}
YARN = {"rope_type": "yarn"} | ORIGINAL
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL
LONGROPE = {"short_factor": [1.0 + i / 32 for i in range(16)], "long_factor": [1.0 + i / 2 for i in range(16)]}
# By name: `rope_parameters` of transformers 5, base 10000 where they do not say; and other keys of config.json.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default, base 10000": ({"rope_type": "default"}, {}),
    "default, base 500000": ({"rope_type": "default", "rope_theta": 500000.0}, GQA),
    "linear": ({"rope_type": "linear", "factor": 4.0}, TIED),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, BIAS | {"max_position_embeddings": 2048}),
    "yarn": (YARN, GQA | TIED),
    "yarn, attention_factor": (YARN | {"attention_factor": 0.8}, WIDE_HEADS),
    "yarn, truncate false": (YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2}, BIAS),
    "yarn, mscale": (YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, TIED | BIAS),
    "llama3": (LLAMA3, WIDE_HEADS | BIAS),
    "longrope": ({"rope_type": "longrope"} | LONGROPE | ORIGINAL, {}),
}
EXACT_CASE = "yarn"


def save(folder: Path, rope: dict[str, Any], shape: dict[str, Any]) -> None:
    """Save a random model in the style of transformers 5.

    Weights are ten times larger than a new model's, so that attention is sharp and the logits depend on positions.
    """
    torch.manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": None}
    rope = {"rope_theta": 10000.0} | rope
    model = LlamaForCausalLM(LlamaConfig(rope_parameters=rope, initializer_range=0.2, **SHAPE | tokens | shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # new ones are 0
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)


def use_style_4(folder: Path) -> None:
    """Rewrite config.json in the keys of transformers 4."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    path.write_text(json.dumps(config))


def logits_of_transformers(folder: Path) -> np.ndarray:
    """In float32, shape (LENGTH, VOCABULARY)."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None], use_cache=False).logits[0].numpy()


def exact_logits(folder: Path) -> np.ndarray:
    """Of transformers' model in float64, with norms and angles that it would compute in float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    frequencies = RopeConfig.from_hf(json.loads((folder / "config.json").read_text())).frequencies()
    wavelengths = frequencies.wavelengths
    theta = 2 * np.pi * np.fmod(np.arange(LENGTH)[:, None], wavelengths) / wavelengths
    theta = np.concatenate([theta, theta], axis=-1)[None]
    angles = tuple(torch.from_numpy(frequencies.attention_scale * f(theta)) for f in (np.cos, np.sin))
    model.model.rotary_emb.forward = lambda *_, **__: angles
    for norm in (module for module in model.modules() if isinstance(module, LlamaRMSNorm)):
        shape, eps = norm.weight.shape, norm.variance_epsilon
        norm.forward = partial(torch.nn.functional.rms_norm, normalized_shape=shape, weight=norm.weight, eps=eps)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None], use_cache=False).logits[0].numpy()


Load = Callable[[Path], nn.Module]
RUNTIMES: dict[str, Load] = {
    "ours": lambda folder: Checkpoint.open(folder).load(),
    "mlx_lm": lambda folder: mlx_lm.utils.load_model(folder)[0],
}


def logits_of(load: Load, folder: Path) -> np.ndarray:
    return np.array(load(folder)(mx.array(TOKENS)[None])[0])


def compare(logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The largest error as a part of the largest logit, and the share of positions with the same arg max."""
    error = np.abs(logits - reference).max() / np.abs(reference).max()
    agreement = np.mean(logits.argmax(-1) == reference.argmax(-1))
    return {"error": float(f"{error:.3g}"), "agreement": round(float(agreement), 5)}


def measure(load: Load, folder: Path, reference: np.ndarray) -> dict[str, Any]:
    try:
        return compare(logits_of(load, folder), reference)
    except Exception as error:  # the error of another runtime is its result
        return {"raises": f"{type(error).__name__}: {error}"}


def as_text(result: dict[str, Any]) -> list[str]:
    if "raises" in result:
        return [result["raises"], ""]
    return [f"{result['error']:.1e}", f"{100 * result['agreement']:.2f} %"]


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    table = Table("rope", "config.json", "ours: error", "same arg max", "mlx-lm: error", "same arg max")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, case in CASES.items():
            folder = Path(temporary) / name
            save(folder, *case)
            reference = logits_of_transformers(folder)
            for style in ("5", "4"):
                if style == "4":
                    use_style_4(folder)
                results = {runtime: measure(load, folder, reference) for runtime, load in RUNTIMES.items()}
                rows.append({"case": name, "style": style, **results})
                table.add_row(name, style, *as_text(results["ours"]), *as_text(results["mlx_lm"]))
                print(f"{name}, style {style}", file=sys.stderr)
            if name == EXACT_CASE:  # config.json is in style 4, which all read
                logits = {runtime: logits_of(load, folder) for runtime, load in RUNTIMES.items()}
                logits["transformers"] = reference
                wanted = exact_logits(folder)
                exact = {runtime: compare(found, wanted)["error"] for runtime, found in logits.items()}
    Console().print(table)
    print(f"{EXACT_CASE}, against float64:", ", ".join(f"{name} {error:.1e}" for name, error in exact.items()))
    versions = {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "transformers": transformers.__version__}
    print(json.dumps({"positions": LENGTH, "versions": versions, "rows": rows, "against_float64": exact}))


if __name__ == "__main__":
    main()
