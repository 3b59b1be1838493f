"""What a conversion will write: what each tensor of the source becomes, and which file it goes into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_resonance.checkpoint import LOADING_ERRORS, Checkpoint
from mlx_resonance.errors import UsageError
from mlx_resonance.files import TensorInfo
from mlx_resonance.rope_config import RopeConfig

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .portable import portable_rope, scaled_by
from .quantization import PARTS, QuantizationArguments, arguments_of, decide
from .source import Source

TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}
PROCESS = 300_000_000  # bytes of Python, MLX and the libraries, without any tensor


@dataclass(frozen=True)
class Recipe:
    """What one tensor of the source becomes.

    Args:
        name: of the tensor.
        dtype: what it is cast to if it is a float; None keeps its own.
        factor: what it is multiplied by before, in float32.
        quantization: arguments of mx.quantize; None for no quantization.
    """

    name: str
    dtype: mx.Dtype | None = None
    factor: float = 1.0
    quantization: QuantizationArguments | None = None

    def cast(self, value: mx.array) -> mx.array:
        """The tensor as it is written, or quantized; lazy."""
        floating = mx.issubdtype(value.dtype, mx.floating)
        dtype = self.dtype if floating and self.dtype is not None else value.dtype
        return (value.astype(mx.float32) * self.factor if self.factor != 1 else value).astype(dtype)

    @property
    def names(self) -> list[str]:
        """The names of the tensors that are written."""
        layer = self.name.removesuffix("weight")
        if self.quantization is None:
            return [self.name]
        parts = PARTS if self.quantization["mode"] == "affine" else PARTS[:2]
        return [layer + part for part in parts]

    def nbytes(self, info: TensorInfo) -> int:
        """Bytes that are written for a tensor of this type and shape."""
        value = self.cast(mx.zeros(info.shape, TYPES[info.dtype]))  # lazy: never made
        parts = [value] if self.quantization is None else mx.quantize(value, **self.quantization)
        return sum(part.nbytes for part in parts)


@dataclass(frozen=True)
class Plan:
    """A conversion before it is made.

    Args:
        config: config.json of the result.
        rope: the rope settings in it.
        factor: what queries and keys are multiplied by, for a portable checkpoint.
        files: the recipes of each weight file, in order.
        sizes: bytes of tensors in each of them.
        memory: bytes that the conversion needs, an estimate.
    """

    config: dict[str, Any]
    rope: RopeConfig
    factor: float
    files: dict[str, list[Recipe]]
    sizes: dict[str, int]
    memory: int

    @property
    def digest(self) -> str:
        """A hash of which tensor goes into which file: finished files are only those of a run with the same one."""
        placed = {name: [recipe.name for recipe in recipes] for name, recipes in self.files.items()}
        return hashlib.sha256(json.dumps(placed).encode()).hexdigest()[:16]


def make_plan(
    source: Source,
    rope: RopeConfig,
    *,
    portable: bool,
    dtype: str | None,
    quantize: tuple[int | None, int | None, str, str | None] | None,
    shard_bytes: int,
) -> Plan:
    """Decide everything about a conversion that can be decided without reading a weight.

    Args:
        source: where from.
        rope: the settings to rotate by.
        portable: write them as `longrope`.
        dtype: of what is not quantized; None keeps each tensor's own.
        quantize: bits, group size, mode and recipe of mlx-lm; None for no quantization.
        shard_bytes: no file is larger unless one tensor is.

    Raises:
        UsageError: config.json and the weights do not fit together, or the settings do not fit them.
    """
    checkpoint = source.checkpoint.with_rope(rope)
    model, tensors, config = check_tensors(checkpoint), checkpoint.tensors, checkpoint.mlx_config
    config = {key: value for key, value in config.items() if value is not None or not key.startswith("quantization")}
    if dtype is not None:
        config |= {"dtype": dtype, "torch_dtype": dtype}
    arguments: dict[str, QuantizationArguments] = {}
    if quantize is not None:
        if config.get("quantization"):
            raise UsageError(f"{checkpoint.name} is quantized already: convert the original checkpoint")
        arguments, config = decide(model, config, *quantize)
    written, factor, scaled = rope, 1.0, set[str]()
    if portable:
        if config.get("quantization"):
            raise UsageError("transformers does not read mlx-lm's quantization", option="portable")
        if config.get("rope_traditional"):
            raise UsageError("mlx-lm's longrope does not read rope_traditional of config.json", option="portable")
        written, factor = portable_rope(rope)
        config |= written.to_hf("4")
        scaled = scaled_by(tensors, model.args)
    target = None if dtype is None else getattr(mx, dtype)
    recipes = [Recipe(name, target, factor if name in scaled else 1.0, arguments.get(name)) for name in tensors]
    sizes = {recipe.name: recipe.nbytes(tensors[recipe.name]) for recipe in recipes}
    files = plan_files(recipes, sizes, shard_bytes)
    totals = {name: sum(sizes[recipe.name] for recipe in file) for name, file in files.items()}
    memory = PROCESS + max(totals.values()) + source.copies * max(info.nbytes for info in tensors.values())
    return Plan(config, written, factor, files, totals, memory)


def plan_files(recipes: list[Recipe], sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[Recipe]]:
    """Which recipes go into which file: in their order, no file larger than `shard_bytes` unless one tensor is."""
    shards: list[list[Recipe]] = []
    room = 0
    for recipe in recipes:
        if not shards or sizes[recipe.name] > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(recipe)
        room -= sizes[recipe.name]
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    return dict(zip(names, shards, strict=True))


def check_tensors(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint without any weights, quantized as config.json says.

    Raises:
        UsageError: config.json does not fit the names, types and shapes of the tensors.
    """
    model, kind, tensors = checkpoint.build(), checkpoint.config["model_type"], checkpoint.tensors
    if own := checkpoint.config.get("quantization"):
        arguments = arguments_of(tensors, own)
        common = {key: own[key] for key in ("group_size", "bits")} | {"mode": own.get("mode", "affine")}
        try:
            nn.quantize(model, **common, class_predicate=lambda path, _: arguments.get(f"{path}.weight", False))
        except LOADING_ERRORS as error:
            raise UsageError(f"mlx-lm cannot build a {kind} model from this config.json: {error!r}") from None
    wanted = dict(tree_flatten(model.parameters()))
    for name in sorted(set(wanted) - set(tensors)):
        raise UsageError(f"{name} is missing, which the {kind} model of config.json has")
    for name, found in sorted(tensors.items()):
        if name not in wanted:
            raise UsageError(f"{name} is in the weights, but not in the {kind} model of config.json")
        asked = wanted[name]
        if asked.shape != found.shape:
            raise UsageError(f"{name} has shape {found.shape}, config.json asks for {tuple(asked.shape)}")
        if mx.issubdtype(asked.dtype, mx.floating) == found.dtype.startswith("U"):
            raise UsageError(f"{name} is of type {found.dtype}, a {kind} model has {asked.dtype} there")
    return model


def disk_needed(plan: Plan, source: Source, consume: bool) -> tuple[int, int]:
    """Bytes of the result, and of the downloads that are on the disk at once."""
    downloads = [file.download for file in source.files]
    headers = 200 * sum(len(recipe.names) for file in plan.files.values() for recipe in file)
    folder = source.checkpoint.folder
    small = sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.suffix == ".json")
    return sum(plan.sizes.values()) + headers + small, max(downloads, default=0) if consume else sum(downloads)
