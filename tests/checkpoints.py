"""What several tests share: the tiny checkpoint in float32, texts, what a folder holds, code for other processes."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

COMMAND = [str(Path(sys.executable).with_name("mlx-resonance")), "generate"]

# Code for a process of its own: the most memory that it has held, in bytes.
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
