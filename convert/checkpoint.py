"""convert(): read a checkpoint, cast or quantize its weights, write an MLX folder in one rename."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_resonance.config import RopeConfig
from mlx_resonance.loading import (
    INDEX,
    TOKENIZER_PATTERNS,
    check_checkpoint,
    has_tokenizer,
    load_model,
    read_config,
    resolve,
)

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_map
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from .card import write_card
from .rope import largest_shift, new_rope

DTYPES = ("float32", "float16", "bfloat16")
Q_MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
MARK = ".mlx-resonance-unfinished"  # in a folder that a killed run left, and that the next one may delete
NOT_COPIED = {"config.json", INDEX, "pytorch_model.bin.index.json"}

logger = logging.getLogger("mlx_resonance")


@dataclass(frozen=True)
class Conversion:
    """What `convert` made.

    Args:
        path: the MLX folder.
        rope: its rope settings.
        largest_shift: by how much rounding changed the wavelength that it changed most, as a part of that wavelength;
            0 where the source was already resonant or nothing was rounded.
        weights: bytes of the weight files.
        files: number of the weight files.
    """

    path: Path
    rope: RopeConfig
    largest_shift: float
    weights: int
    files: int


def convert(
    src: str | Path,
    mlx_path: str | Path,
    *,
    rope: str | None = None,
    factor: float | None = None,
    original_max_position_embeddings: int | None = None,
    resonance: bool = True,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str | None = None,
    revision: str | None = None,
    max_shard_size: str = "5GB",
) -> Conversion:
    """Convert a Hugging Face checkpoint to an MLX folder. The folder appears whole or not at all.

    Args:
        src: a folder with config.json and safetensors, or the id of a model on the Hugging Face hub.
        mlx_path: the folder to write; it must not exist.
        rope: a new scaling (`linear`, `ntk`, `dynamic`, `yarn`); None keeps that of the checkpoint.
        factor: how many times the context grows; goes with `rope`.
        original_max_position_embeddings: tokens of context before scaling; None for what config.json says.
        resonance: round the wavelengths to whole numbers of tokens.
        dtype: float32, float16 or bfloat16 for what is not quantized; None keeps every tensor's own.
        quantize: quantize the weights with mlx-lm; the `q_…` arguments are its.
        q_bits, q_group_size, q_mode: None for the mode's defaults.
        quant_predicate: one of mlx-lm's mixed recipes, such as `mixed_4_6`.
        revision: branch, tag or commit on the hub.
        max_shard_size: a number of bytes with KB, MB or GB; no weight file is larger unless one tensor is.

    Returns:
        What was made.

    Raises:
        FileNotFoundError: no such source, or a file of it is missing.
        FileExistsError: `mlx_path` exists, or something else than a killed run's work is at `mlx_path`.partial.
        ValueError: an argument or a file of the source is wrong.
    """
    target = Path(mlx_path).expanduser()
    if os.path.lexists(target):
        raise FileExistsError(f"[convert] {target} exists: choose another --mlx-path, or delete it")
    shard_bytes = _parse_size(max_shard_size)
    _check_quantization(quantize, q_bits, q_group_size, q_mode, quant_predicate)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"[convert] dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")

    folder = resolve(src, revision, [*TOKENIZER_PATTERNS, "model*.safetensors", "README.md"])
    _check_not_quantized(folder, quantize)
    before = RopeConfig.from_hf(check_checkpoint(folder))
    after = new_rope(before, rope, factor, original_max_position_embeddings, resonance)
    model, config = load_model(folder, lazy=True, rope=after)
    if dtype is not None:
        _cast(model, getattr(mx, dtype))
        config |= {"dtype": dtype, "torch_dtype": dtype}
    if quantize:
        model, config = _quantize(model, config, q_bits, q_group_size, q_mode, quant_predicate)

    with _whole_or_nothing(target) as partial:
        sizes = _write_weights(model, partial, shard_bytes)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _copy_tokenizer(folder, partial)
        write_card(partial, src, folder / "README.md", after)
    shift = 0.0 if before.is_resonant else largest_shift(after)
    return Conversion(target, after, shift, sum(sizes), len(sizes))


def _check_not_quantized(folder: Path, quantize: bool) -> None:
    config = read_config(folder)
    foreign, own = config.get("quantization_config"), config.get("quantization")
    if foreign and foreign != own:
        method = foreign.get("quant_method") if isinstance(foreign, dict) else foreign
        raise ValueError(f"[convert] {folder} is quantized with {method}: convert the original checkpoint")
    if quantize and own:
        raise ValueError(f"[convert] {folder} is quantized already: convert the original checkpoint")


def _check_quantization(
    quantize: bool, bits: int | None, group_size: int | None, mode: str, predicate: str | None
) -> None:
    if not quantize:
        if bits is not None or group_size is not None or predicate is not None or mode != "affine":
            raise ValueError("[convert] quantization settings need --quantize (-q)")
        return
    if mode not in Q_MODES:
        raise ValueError(f"[convert] q_mode must be one of {', '.join(Q_MODES)}, got {mode!r}")
    if mode != "affine":
        if bits or group_size or predicate:
            raise ValueError(f"[convert] q_mode {mode} has its own bits and group size: leave the others out")
        return
    for name, value, allowed in (("q_bits", bits, AFFINE_BITS), ("q_group_size", group_size, AFFINE_GROUPS)):
        if value is not None and value not in allowed:
            raise ValueError(f"[convert] {name} must be one of {', '.join(map(str, allowed))}, got {value}")
    if predicate is not None and predicate not in QUANT_RECIPES:
        recipes = ", ".join(QUANT_RECIPES)
        raise ValueError(f"[convert] quant_predicate must be one of {recipes}, got {predicate!r}")


def _parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB` …, in powers of ten."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(KB|MB|GB)", text.strip().upper())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"[convert] max_shard_size must be a size such as 500MB or 5GB, got {text!r}")
    return int(float(found[1]) * units[found[2]])


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    def cast(value: mx.array) -> mx.array:
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map(cast, model.parameters()))


def _quantize(
    model: nn.Module, config: dict[str, Any], bits: int | None, group_size: int | None, mode: str, recipe: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    predicate: Callable[..., Any] | None = None
    if recipe is not None:
        predicate = mixed_quant_predicate_builder(recipe, model, group_size or 64)
    with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints its bits per weight
        quantized: tuple[nn.Module, dict[str, Any]] = mlx_lm.utils.quantize_model(
            model, config, group_size, bits, mode=mode, quant_predicate=predicate
        )
    if not any(name.endswith(".scales") for name in dict(tree_flatten(quantized[0].parameters()))):
        raise ValueError(
            f"[convert] no layer is as wide as a multiple of q_group_size {group_size}: nothing to quantize"
        )
    return quantized


@contextlib.contextmanager
def _whole_or_nothing(target: Path) -> Iterator[Path]:
    """A folder beside the target that becomes the target at the end, and is gone after an error."""
    partial = target.with_name(target.name + ".partial")
    if (partial / MARK).is_file():  # of a run that was killed
        shutil.rmtree(partial)
    if os.path.lexists(partial):
        raise FileExistsError(f"[convert] {partial} is in the way: this is where the work is done")
    partial.mkdir(parents=True)
    (partial / MARK).touch()
    try:
        yield partial
        partial.rename(target)
        (target / MARK).unlink()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(model: nn.Module, folder: Path, shard_bytes: int) -> list[int]:
    """Write the weights in files of at most `shard_bytes` and their index. Returns the files' sizes."""
    weights = dict(tree_flatten(model.parameters()))
    shards: list[dict[str, mx.array]] = []
    room = 0
    for name, value in weights.items():
        if not shards or value.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = value
        room -= value.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [(folder / name).stat().st_size for name in names]


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation defaults as they are."""
    files = {file for pattern in TOKENIZER_PATTERNS for file in source.glob(pattern)}
    for file in sorted(files):
        if file.is_file() and file.name not in NOT_COPIED:
            shutil.copyfile(file, target / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)
    if not has_tokenizer(target):
        logger.warning("%s has no tokenizer: the converted model takes token ids only", source)
