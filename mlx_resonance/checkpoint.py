"""An opened checkpoint: config.json, headers, rope settings and tokenizer, read once and checked; load()."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn
import mlx_lm.utils

from .attention import set_rope
from .content_hash import content_hash
from .errors import UsageError
from .files import (
    ITEM_SIZES,
    WEIGHTS,
    TensorInfo,
    merge_headers,
    read_config,
    read_header,
    resolve,
    weight_files,
)
from .rope_config import RopeConfig
from .scaling import rescale
from .tokenizer import TOKENIZER_PATTERNS, decisive_files, load_tokenizer
from .validation import check_config, check_windows, model_classes

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
LOADING_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything about a checkpoint except its weights; `open` makes one, and every entry point uses it.

    Args:
        name: as the user gave it: a path or a hub id.
        folder: where its files are.
        config: config.json, with `tie_word_embeddings` taken from the weights if the file does not set it.
        headers: the tensors of each weight file, by file name; empty if only config.json was read.
        rope: the rope settings in use, which `rescaled` and `with_rope` change.
        own_rope: the rope settings in config.json.

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

    @classmethod
    def open(
        cls,
        path_or_hf_repo: str | Path,
        *,
        revision: str | None = None,
        factor: float | None = None,
        weights: bool = True,
    ) -> Checkpoint:
        """Open a checkpoint: read config.json and the headers, once and for all, but no weights yet.

        Args:
            path_or_hf_repo: a folder, or the id of a model on the Hugging Face hub, which is downloaded.
            revision: branch, tag or commit on the hub.
            factor: multiple of the context before scaling; None for what config.json says.
            weights: False to download no weight files from the hub; the headers are then not checked.

        Raises:
            MissingFileError: there is no such folder or model, or one of its files is missing.
            UsageError: config.json or a weight file cannot be right, or `factor` does not fit it.
        """
        folder = resolve(path_or_hf_repo, revision, [*TOKENIZER_PATTERNS, WEIGHTS] if weights else ["config.json"])
        config = read_config(folder)
        here = weights or Path(path_or_hf_repo).expanduser().is_dir()
        headers = {path.name: read_header(path) for path in weight_files(folder)} if here else {}
        checkpoint = cls.of(str(path_or_hf_repo), folder, config, headers)
        return checkpoint if factor is None else checkpoint.rescaled(factor)

    @classmethod
    def of(
        cls, name: str, folder: Path, config: dict[str, Any], headers: Mapping[str, Mapping[str, TensorInfo]]
    ) -> Checkpoint:
        """Make a checkpoint from config.json and headers that were read elsewhere, e.g. from a converter's source."""
        tensors = merge_headers(headers)
        config = check_config(config, tensors if headers else None)
        rope = RopeConfig.from_hf(config)
        check_windows(config, rope)
        return cls(name, folder, config, headers, rope, rope, tensors)

    def with_rope(self, rope: RopeConfig) -> Checkpoint:
        """The checkpoint with other rope settings. Raises UsageError if its windows do not fit their context."""
        check_windows(self.config, rope)
        return replace(self, rope=rope)

    def rescaled(self, factor: float) -> Checkpoint:
        """The checkpoint with `factor` times the context before scaling. Raises UsageError like `scaling.rescale`."""
        return self.with_rope(rescale(self.own_rope, factor))

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

    def results_digest(self, kv_bits: int | None = None) -> str:
        """A hash of what results depend on besides the prompt: the content, the rope settings, the KV format."""
        parts = [self.digest, self.rope.to_hf("4"), kv_bits]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def settings(self, kv_bits: int | None = None) -> dict[str, Any]:
        """The same, item by item, for the header of a run log: an error can then name what differs."""
        return {"digest": self.digest, "rope": self.rope.to_hf("4"), "kv_bits": kv_bits}

    @property
    def mlx_config(self) -> dict[str, Any]:
        """config.json with the rope settings in use, in transformers 4 keys only, so that mlx-lm reads them right."""
        return {key: value for key, value in self.config.items() if key not in ROPE_KEYS} | self.rope.to_hf("4")

    @property
    def plain_config(self) -> dict[str, Any]:
        """The config that mlx-lm builds its model from: without a scaling, since `set_rope` replaces the module."""
        return dict.fromkeys(ROPE_KEYS) | self.mlx_config | {"rope_scaling": None}

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
            model, _ = mlx_lm.utils.load_model(
                self.folder, lazy=lazy, model_config=self.plain_config, get_model_classes=model_classes
            )
        except LOADING_ERRORS as error:
            raise UsageError(f"{self.folder} cannot be loaded: {type(error).__name__}: {error}") from None
        set_rope(model, self.rope)
        if adapter_path is not None:
            model = mlx_lm.utils.load_adapters(model, adapter_path)
            model.eval()
        return model

    def build(self) -> nn.Module:
        """Build the model without loading weights. Raises UsageError if mlx-lm cannot build it."""
        model_class, args_class = model_classes(self.config)
        try:
            model: nn.Module = model_class(args_class.from_dict(self.plain_config))  # type: ignore[call-arg]
        except LOADING_ERRORS as error:
            raise UsageError(
                f"mlx-lm cannot build a {self.config['model_type']} model from this config.json: {error!r}"
            ) from None
        set_rope(model, self.rope)
        return model


@dataclass(frozen=True)
class Dimensions:
    """The sizes that determine a model's memory.

    Args:
        weights: their bytes.
        layers, heads, head_dim, hidden, feed_forward, vocabulary: the model's.
        keys: number of key features per token and layer.
        item_size: bytes per number in the type that the model computes in.
    """

    weights: int
    layers: int
    heads: int
    head_dim: int
    hidden: int
    feed_forward: int
    vocabulary: int
    keys: int
    item_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Dimensions:
        """From config.json and the headers of the weight files."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            weights=sum(info.nbytes for info in tensors.values()),
            layers=config["num_hidden_layers"],
            heads=heads,
            head_dim=head_dim,
            hidden=config["hidden_size"],
            feed_forward=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            keys=head_dim * (config.get("num_key_value_heads") or heads),
            item_size=ITEM_SIZES[tensors["model.norm.weight"].dtype],
        )


def load(
    path_or_hf_repo: str | Path,
    *,
    lazy: bool = False,
    revision: str | None = None,
    adapter_path: str | None = None,
    factor: float | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a checkpoint and its tokenizer, in either style of config.json.

    Args:
        path_or_hf_repo, revision, factor: as in `Checkpoint.open`.
        lazy, adapter_path: as in `Checkpoint.load`.

    Returns:
        model, tokenizer: mlx-lm's, for its generation, caches and samplers; the model rotates by exact angles.

    Raises:
        MissingFileError: there is no such folder, or it has no weights.
        UsageError: config.json or a weight file cannot be right.
    """
    checkpoint = Checkpoint.open(path_or_hf_repo, revision=revision, factor=factor)
    return checkpoint.load(lazy=lazy, adapter_path=adapter_path), checkpoint.tokenizer
