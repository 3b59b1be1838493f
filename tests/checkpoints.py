"""What the tests of generation share: the tiny checkpoint in float32, texts, and a command in a process of its own."""

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


def in_float32(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint with weights in float32: a CPU multiplies 16-bit matrices slowly."""
    shutil.copytree(folder, target)
    weights = mx.load(str(folder / "model.safetensors"))
    weights = {name: value.astype(mx.float32) for name, value in weights.items()}
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    config = json.loads((target / "config.json").read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config))
    return target


@cache
def source() -> str:
    """Python to read, about 90 000 tokens."""
    return inspect.getsource(argparse) + inspect.getsource(difflib)


def prompt(tokenizer: Any, length: int, start: int = 0) -> list[int]:
    """Token ids of a text: the start token, then `length` - 1 of the source from `start` on."""
    ids = tokenizer.encode(source()[: 8 * (start + length)], add_special_tokens=False)
    return [tokenizer.bos_token_id, *ids[start : start + length - 1]]
