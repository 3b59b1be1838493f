"""convert(): a checkpoint with other rope settings, cast or quantized, as an MLX folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_resonance import __version__
from mlx_resonance.config import RopeConfig
from mlx_resonance.loading import (
    INDEX,
    TOKENIZER_PATTERNS,
    check_checkpoint,
    has_tokenizer,
    load_model,
    read_config,
    resolve,
    weight_files,
)

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_map
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from .card import write_card
from .journal import NAME as RECORD
from .journal import fingerprint, workspace
from .portable import portable_rope, scale_queries_and_keys
from .rope import largest_shift, new_rope
from .weights import Progress, write_weights

DTYPES = ("float32", "float16", "bfloat16")
Q_MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
NOT_COPIED = {"config.json", INDEX, "pytorch_model.bin.index.json", RECORD}

logger = logging.getLogger("mlx_resonance")


@dataclass(frozen=True)
class Conversion:
    """What `convert` made.

    Args:
        path: the MLX folder.
        rope: its rope settings; for a portable checkpoint those that its `longrope` stands for.
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
    portable: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a Hugging Face checkpoint to an MLX folder. The folder appears whole or not at all.

    The work is done in `mlx_path`.partial, a file of weights at a time; no more than one is in memory. A run that was
    killed or failed is gone on with by the same call.

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
        portable: write the rope settings as `longrope`, which stock transformers and mlx-lm run; not with `quantize`.
        restart: drop what an earlier run has left in `mlx_path`.partial.
        progress: called with the bytes of weights done and in all.

    Returns:
        What was made.

    Raises:
        FileNotFoundError: no such source, or a file of it is missing.
        FileExistsError: `mlx_path` exists, another run is at it, or `mlx_path`.partial is none of ours.
        OSError: the disk is full.
        ValueError: an argument or a file of the source is wrong, or an earlier run had other ones.
    """
    target = Path(mlx_path).expanduser()
    if os.path.lexists(target):
        raise FileExistsError(f"[convert] {target} exists: choose another --mlx-path, or delete it")
    shard_bytes = _parse_size(max_shard_size)
    _check_quantization(quantize, q_bits, q_group_size, q_mode, quant_predicate)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"[convert] dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if portable and quantize:
        raise ValueError("[convert] --portable is for transformers too, which does not read mlx-lm's quantization")

    folder = resolve(src, revision, [*TOKENIZER_PATTERNS, "model*.safetensors", "README.md"])
    _check_not_quantized(folder, quantize)
    before = RopeConfig.from_hf(check_checkpoint(folder))
    after = new_rope(before, rope, factor, original_max_position_embeddings, resonance)
    quantization = (q_bits, q_group_size, q_mode, quant_predicate) if quantize else None
    weights, config = _lazy_weights(folder, after, dtype, quantization)
    written = after
    if portable:
        if config.get("rope_traditional"):
            raise ValueError("[convert] --portable: mlx-lm's longrope does not read rope_traditional")
        written, scale = portable_rope(after)
        config |= written.to_hf("4")
        weights = scale_queries_and_keys(weights, scale)

    settings = {
        "rope": written.to_hf("4"), "dtype": dtype, "quantization": config.get("quantization"),
        "max_shard_size": shard_bytes, "versions": _versions(),
    }  # fmt: skip
    files = [folder / "config.json", *weight_files(folder), *_tokenizer_files(folder)]
    # A folder of the hub's cache is named by its commit.
    name, commit = (folder.name, None) if Path(src).expanduser().exists() else (str(src), folder.name)
    source = {"name": name, "commit": commit, **fingerprint(files)}
    with workspace(target, source, settings, restart) as journal:
        write_weights(weights, journal, shard_bytes, progress)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (journal.folder / "config.json").write_text(text, encoding="utf-8")
        _copy_tokenizer(folder, journal.folder)
        write_card(journal.folder, src, folder / "README.md", written)
    shift = 0.0 if before.is_resonant else largest_shift(after)
    sizes = [entry["bytes"] for entry in journal.finished.values()]
    return Conversion(target, after, shift, sum(sizes), len(sizes))


def _lazy_weights(
    folder: Path, rope: RopeConfig, dtype: str | None, quantization: tuple[Any, ...] | None
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The output's tensors, not computed yet, and its config.json. Nothing else refers to them: each can be freed."""
    model, config = load_model(folder, lazy=True, rope=rope)
    if dtype is not None:
        _cast(model, getattr(mx, dtype))
        config |= {"dtype": dtype, "torch_dtype": dtype}
    if quantization is not None:
        model, config = _quantize(model, config, *quantization)
    return dict(tree_flatten(model.parameters())), config


def _versions() -> dict[str, str]:
    return {"mlx_resonance": __version__, "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}


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


def _tokenizer_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template and generation defaults."""
    files = {file for pattern in TOKENIZER_PATTERNS for file in folder.glob(pattern)}
    return sorted(file for file in files if file.is_file() and file.name not in NOT_COPIED)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy them as they are."""
    for file in _tokenizer_files(source):
        shutil.copyfile(file, target / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)
    if not has_tokenizer(target):
        logger.warning("%s has no tokenizer: the converted model takes token ids only", source)
