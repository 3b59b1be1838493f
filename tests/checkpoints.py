"""Shared by several tests: the tiny checkpoint in float32, texts, what a folder holds, code for other processes."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import shutil
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama

STDLIB_LLAMA = Path(str(files("mlx_resonance") / "assets" / "stdlib-llama"))
COMMAND = [str(Path(sys.executable).with_name("mlx-resonance")), "generate"]

# Memory plans are fitted to what MLX holds on a CPU under Linux; elsewhere only what is exact is asserted.
FITTED_HERE = sys.platform == "linux" and mx.default_device() == mx.cpu

# Code for a separate process: its peak memory in bytes.
PEAK = r"""
import re
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


def in_float32(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint with weights in float32: a CPU multiplies 16-bit matrices slowly."""
    shutil.copytree(folder, target)
    weights = mx.load(str(folder / "model.safetensors"))
    weights = {name: value.astype(mx.float32) for name, value in weights.items()}
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    config = json.loads((target / "config.json").read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config))
    return target


def random_checkpoint(
    folder: Path,
    hidden: int,
    feed_forward: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    dtype: Any,
    file: Any = llama,
    context: int = 16384,
) -> Path:
    """A random model for one of mlx-lm's files, with stdlib-llama's tokenizer."""
    config = {
        "model_type": file.__name__.split(".")[-1], "head_dim": hidden // heads, "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": context, "tie_word_embeddings": True,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STDLIB_LLAMA / name, folder / name)
    model = file.Model(file.ModelArgs.from_dict(config))
    weights = {name: value.astype(dtype) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def weights(folder: Path) -> dict[str, mx.array]:
    """The tensors of a checkpoint in one file."""
    return mx.load(str(folder / "model.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@cache
def source() -> str:
    """Python to read, about 54 000 tokens."""
    return inspect.getsource(argparse) + inspect.getsource(difflib)


def prompt(tokenizer: Any, length: int, start: int = 0) -> list[int]:
    """Token ids of a text: the start token, then `length` - 1 of the source from `start` on."""
    ids = tokenizer.encode(source()[: 8 * (start + length)], add_special_tokens=False)
    return [tokenizer.bos_token_id, *ids[start : start + length - 1]]
