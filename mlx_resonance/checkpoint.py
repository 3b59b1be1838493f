"""An opened checkpoint: config.json, headers, rope settings and tokenizer, read once and checked; load()."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils

from . import _mlx_lm
from .attention import set_rope
from .content_hash import content_hash
from .dimensions import Dimensions
from .errors import MissingFileError, UsageError
from .files import (
    MAX_INDEX,
    WEIGHTS,
    TensorInfo,
    merge_headers,
    read_config,
    read_header,
    read_json,
    resolve,
    same_data,
    user_path,
    weight_files,
)
from .inspection import RECORDS
from .kernels import trial
from .positions import position_map
from .rope_config import RopeConfig
from .rope_reading import LENGTH_IS_UNCLEAR, is_about_rotation
from .rope_types import LONGEST, ORIGINAL, PREFIX
from .scaling import rescale
from .tied_head import EMBEDDING, HEAD, Same, TiedHead, resolve_head
from .tokenizer import TOKENIZER_PATTERNS, decisive_files, load_tokenizer
from .validation import attention_window, check_config, in_a_line, model_classes

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", ORIGINAL)
logger = logging.getLogger("mlx_resonance")
MAX_LENGTH = "model_max_length"  # of a tokenizer
TIED_BY_DEFAULT = {"smollm3": True}  # in transformers, where config.json does not say; else the names of the tensors do
LOADING_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything about a checkpoint except its weights; `open` makes one, and every entry point uses it.

    Args:
        name: as the user gave it: a path or a hub id.
        folder: where its files are.
        config: config.json, with the `tie_word_embeddings` that fits the weights.
        headers: the tensors of each weight file, by file name; empty if only config.json was read.
        rope: the rope settings in use, which `rescaled` and `with_rope` change.
        own_rope: the rope settings in config.json.
        tensors: those of all files, by their names in the model.
        head: what became of a head that config.json ties to the embedding.

    Raises:
        UsageError: config.json, the headers and the rope settings do not fit together.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    headers: Mapping[str, Mapping[str, TensorInfo]]
    rope: RopeConfig
    own_rope: RopeConfig
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    head: TiedHead = field(repr=False)

    @classmethod
    def open(
        cls,
        path_or_hf_repo: str | Path,
        *,
        revision: str | None = None,
        factor: float | None = None,
        extend: str | None = None,
        weights: bool = True,
    ) -> Checkpoint:
        """Open a checkpoint: read config.json and the headers, once and for all, but no weights yet.

        Args:
            path_or_hf_repo: a folder, or the id of a model on the Hugging Face hub, which is downloaded.
            revision: branch, tag or commit on the hub.
            factor: multiple of the context before scaling; None for what config.json says.
            extend: a position map for longer texts, as in `extended`; None for every token's own position.
            weights: False to download no weight files from the hub; the headers are then not checked.

        Raises:
            MissingFileError: there is no such folder or model, or one of its files is missing.
            UsageError: config.json or a weight file cannot be right, or `factor` does not fit it.
        """
        files = [*TOKENIZER_PATTERNS, WEIGHTS] if weights else ["config.json", "tokenizer_config.json", *RECORDS]
        folder = resolve(path_or_hf_repo, revision, files)
        is_folder = user_path(path_or_hf_repo).is_dir()
        if not is_folder and weights and not any(folder.glob(WEIGHTS)):
            raise MissingFileError(
                f"{path_or_hf_repo} has no {WEIGHTS}; convert reads other formats, such as .bin files"
            )
        checkpoint = cls.of_folder(str(path_or_hf_repo), folder, read_config(folder), weights=weights or is_folder)
        checkpoint = checkpoint if factor is None else checkpoint.rescaled(factor)
        return checkpoint.extended(extend)

    @classmethod
    def of_folder(cls, name: str, folder: Path, config: dict[str, Any], weights: bool = True) -> Checkpoint:
        """Make a checkpoint from a folder whose config.json has been read. `weights`: whether it has weight files."""
        headers = {path.name: read_header(path) for path in weight_files(folder)} if weights else {}
        place = {tensor: folder / file for file, tensors in headers.items() for tensor in tensors}

        def same(one: str, other: str) -> bool:
            return same_data((place[one], one), (place[other], other))

        return cls.of(name, folder, config, headers, same)

    @classmethod
    def of(
        cls,
        name: str,
        folder: Path,
        config: dict[str, Any],
        headers: Mapping[str, Mapping[str, TensorInfo]],
        same: Same | None = None,
    ) -> Checkpoint:
        """Make a checkpoint from config.json and headers that were read elsewhere, e.g. from a converter's source.

        Args:
            name, folder, config, headers: as of the class, config.json as it was read.
            same: compares an embedding in the files with the head that is tied to it.
        """
        tensors = merge_headers(headers)
        config = check_config(config, tensors if headers else None)
        tied = config.get("tie_word_embeddings", TIED_BY_DEFAULT.get(config["model_type"]))
        head = resolve_head(tied, tensors, same)
        if headers:
            config = config | {"tie_word_embeddings": head.tied}
        config = _with_renamed_settings(config, head)
        rope = RopeConfig.from_hf(_with_tokenizer_length(config, folder))
        rope = _within_window(rope, attention_window(config), config["model_type"])
        return cls(name, folder, config, headers, rope, rope, head.apply(tensors), head)

    def with_rope(self, rope: RopeConfig) -> Checkpoint:
        """The checkpoint with other rope settings.

        Raises:
            UsageError: they lengthen the context beyond the window of its attention.
        """
        window, own = attention_window(self.config), replace(self.own_rope, window=None).own_context
        context = replace(rope, window=None).own_context or 0
        if window is not None and context > max(window, own or 0):
            raise UsageError(
                f"sliding_window = {window} is shorter than the context of {context} tokens: "
                f"a {self.config['model_type']} model here attends to all of it"
            )
        return replace(self, rope=replace(rope, window=window if window is not None and window < context else None))

    def rescaled(self, factor: float) -> Checkpoint:
        """The checkpoint with `factor` times the context before scaling. Raises UsageError like `scaling.rescale`."""
        return self.with_rope(rescale(self.own_rope, factor))

    def extended(self, extend: str | None, length: int | None = None) -> Checkpoint:
        """The checkpoint with a position map for texts past its context; every wavelength stays as it is.

        Args:
            extend: as in `position_map`; None for every token's own position.
            length: tokens of the longest text; None for eight times the context.

        Raises:
            UsageError: as of `position_map`.
        """
        positions = None if extend is None else position_map(extend, self.rope.own_context, length)
        return replace(self, rope=replace(self.rope, positions=positions))

    @cached_property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer, in mlx-lm's wrapper. Raises MissingFileError if there is none."""
        return load_tokenizer(self.folder, self.config)

    @cached_property
    def dimensions(self) -> Dimensions:
        """The sizes that determine the model's memory."""
        return Dimensions.of(self.config, self.tensors)

    @cached_property
    def digest(self) -> str:
        """A hash of the content: config.json, weights and tokenizer, whatever the folder's path, name and times."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        files = [*(self.folder / name for name in sorted(self.headers)), *decisive_files(self.folder)]
        for path in files:
            digest.update(f"\n{path.relative_to(self.folder).as_posix()} {content_hash(path)}".encode())
        return digest.hexdigest()[:16]

    def results_digest(self, kv_bits: int | str | None = None) -> str:
        """A hash of what results depend on besides the prompt: the content, the rope settings, a KV format's value."""
        rope = json.loads(json.dumps(self.rope_settings), parse_float=_as_integer)  # a factor of 8.0 is one of 8
        parts = [self.digest, rope, kv_bits]
        if kv_bits is not None:
            parts.append("scales in 16 bits")  # before, a float32 model's had 32
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def settings(self, kv_bits: int | str | None = None) -> dict[str, Any]:
        """The same, item by item, for the header of a run log: an error can then name what differs."""
        return {"digest": self.digest, "rope": self.rope_settings, "kv_bits": kv_bits}

    @property
    def rope_settings(self) -> dict[str, Any]:
        """The rope settings in use, as JSON: in transformers 4 keys, and a position map that no config.json has."""
        positions, extend = self.rope.positions, {}
        if positions is not None:
            # What a user wrote does not say how `dynamic` chooses its groups: results of another rule are not the same.
            extend = {"extend": positions.extend} | ({"kept": positions.kept} if positions.method == "dynamic" else {})
        return self.rope.to_hf("4") | extend

    @property
    def mlx_config(self) -> dict[str, Any]:
        """config.json with the rope settings in use, in transformers 4 keys only, so that mlx-lm reads them right."""
        kind = self.config["model_type"]
        ours = {key for key in self.config if key in ROPE_KEYS or is_about_rotation(key, kind)}
        return {key: value for key, value in self.config.items() if key not in ours} | self.rope.to_hf("4")

    @property
    def plain_config(self) -> dict[str, Any]:
        """The config that mlx-lm builds its model from: without a scaling, since `set_rope` replaces the module."""
        config = dict.fromkeys(ROPE_KEYS) | self.mlx_config | {"rope_scaling": None}
        return config | {"text_config": config.get("text_config") or {}}  # mlx-lm looks into it, null or not

    def load(self, *, lazy: bool = False, adapter_path: str | None = None) -> nn.Module:
        """Load the model with its weights; it rotates by the rope settings in use.

        Args:
            lazy: leave the weights on disk until they are used.
            adapter_path: folder of LoRA adapters made by mlx-lm.

        Raises:
            UsageError: the weights do not fit config.json.
        """
        if glob.escape(str(self.folder)) != str(self.folder):
            raise UsageError(f"{self.folder}: mlx-lm finds no files in a folder with any of *?[ in its name")
        try:
            model, _ = _mlx_lm.original("load_model")(
                self.folder, lazy=lazy, model_config=self.plain_config, get_model_classes=self.model_classes
            )
        except (ValueError, *LOADING_ERRORS) as error:
            raise UsageError(f"{self.folder} cannot be loaded: {in_a_line(error)}") from None
        set_rope(model, self.rope)
        trial.current_backend()  # if there is no GPU, say so now, not within a text
        if adapter_path is not None:
            model = mlx_lm.utils.load_adapters(model, adapter_path)
            model.eval()
        return model

    def model_classes(self, config: Mapping[str, Any]) -> tuple[Any, Any]:
        """mlx-lm's classes for `load_model`; the model names its weights as the checkpoint's `tensors` are named."""
        model_class: Any
        model_class, args_class = model_classes(config)

        def build(args: Any) -> nn.Module:
            model: nn.Module = model_class(args)

            def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
                del model.sanitize  # mlx-lm calls it once; kept, it would keep the model alive
                own = getattr(model, "sanitize", None)  # Granite's has none in mlx-lm 0.31
                weights = self.head.apply(weights)
                return weights if own is None else own(weights)

            model.sanitize = sanitize
            return model

        return build, SimpleNamespace(from_dict=lambda _: self._arguments(args_class))

    def _arguments(self, args_class: Any) -> Any:
        """mlx-lm's arguments of the model. A key that is null counts as absent, as in transformers."""
        return args_class.from_dict({key: value for key, value in self.plain_config.items() if value is not None})

    def build(self) -> nn.Module:
        """Build the model without loading weights. Raises UsageError if mlx-lm cannot build it."""
        model_class, args_class = model_classes(self.config)
        try:
            model: nn.Module = model_class(self._arguments(args_class))  # type: ignore[call-arg]
        except LOADING_ERRORS as error:
            kind = self.config["model_type"]
            raise UsageError(f"mlx-lm cannot build a {kind} model from this config.json: {in_a_line(error)}") from None
        set_rope(model, self.rope)
        return model


def _as_integer(text: str) -> float:
    """A number of a JSON text, an integer if it is one."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _with_renamed_settings(config: dict[str, Any], head: TiedHead) -> dict[str, Any]:
    """config.json with the quantization of a head that is the embedding, too, under the embedding's name."""
    name, new = (tensor.removesuffix(".weight") for tensor in (HEAD, EMBEDDING))
    changes = {}
    for key in ("quantization", "quantization_config") if head.renamed else ():  # mlx-lm writes both
        if isinstance(settings := config.get(key), dict):
            changes[key] = {new if layer == name else layer: value for layer, value in settings.items()}
    return config | changes


def _with_tokenizer_length(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """config.json with the tokenizer's `model_max_length`, where only that tells which length config.json states."""
    dictionaries = [value for key in ROPE_KEYS if isinstance(value := config.get(key), Mapping)]
    types = {str(value.get("rope_type") or value.get("type")).removeprefix(PREFIX) for value in dictionaries}
    path = folder / "tokenizer_config.json"
    if not types & LENGTH_IS_UNCLEAR or config.get(MAX_LENGTH) is not None or not path.is_file():
        return config
    return {**config, MAX_LENGTH: read_json(path, MAX_INDEX).get(MAX_LENGTH)}


def _within_window(rope: RopeConfig, window: int | None, kind: str) -> RopeConfig:
    """The rope settings of a model that attends to everything here, with the window that it was made for."""
    if window is None or window >= (rope.context_length or LONGEST):
        return rope
    logger.warning(
        f"sliding_window = {window}: a {kind} model here attends to all tokens, so its context is {window} tokens, "
        f"not {rope.context_length}"
    )
    return replace(rope, window=window)


def load(
    path_or_hf_repo: str | Path,
    *,
    lazy: bool = False,
    revision: str | None = None,
    adapter_path: str | None = None,
    factor: float | None = None,
    extend: str | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a checkpoint and its tokenizer, in either style of config.json.

    Args:
        path_or_hf_repo, revision, factor, extend: as in `Checkpoint.open`.
        lazy, adapter_path: as in `Checkpoint.load`.

    Returns:
        model, tokenizer: mlx-lm's, for its generation, caches and samplers; the model rotates by exact angles.

    Raises:
        MissingFileError: there is no such folder, or it has no weights.
        UsageError: config.json or a weight file cannot be right.
    """
    checkpoint = Checkpoint.open(path_or_hf_repo, revision=revision, factor=factor, extend=extend)
    return checkpoint.load(lazy=lazy, adapter_path=adapter_path), checkpoint.tokenizer
