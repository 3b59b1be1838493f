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
from .tokenizer import TOKENIZER_PATTERNS, load_tokenizer, tokenizer_files
from .validation import check_config, check_windows, model_classes

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
LOADING_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything of a checkpoint but its weights. `open` makes one; every entry point goes through it.

    Args:
        name: as the user gave it: a path or a hub id.
        folder: where its files are.
        config: config.json; `tie_word_embeddings` is as the weights have it where the file does not say.
        headers: the tensors of each weight file, by the file's name; empty where only config.json was opened.
        rope: the rope settings in use, which `rescaled` and `with_rope` change.
        own_rope: those of config.json.

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
        """Open a checkpoint: nothing of it is read again by our code, and no weight is read yet.

        Args:
            path_or_hf_repo: a folder, or the id of a model on the Hugging Face hub, which is downloaded.
            revision: branch, tag or commit on the hub.
            factor: how many times the context before scaling, instead of what config.json says.
            weights: False to fetch no weight file of a model on the hub; the headers are then not checked.

        Raises:
            MissingFileError: no such folder or model, or a file of it is missing.
            UsageError: a config.json or a weight file that cannot be right, or a factor that does not fit it.
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
        """A checkpoint whose config.json and headers were read elsewhere, such as the converter's sources."""
        tensors = merge_headers(headers)
        config = check_config(config, tensors if headers else None)
        rope = RopeConfig.from_hf(config)
        check_windows(config, rope)
        return cls(name, folder, config, headers, rope, rope, tensors)

    def with_rope(self, rope: RopeConfig) -> Checkpoint:
        """The checkpoint with other rope settings. Raises UsageError where its windows do not fit their context."""
        check_windows(self.config, rope)
        return replace(self, rope=rope)

    def rescaled(self, factor: float) -> Checkpoint:
        """The checkpoint with `factor` times the context before scaling. Raises UsageError as `scaling.rescale`."""
        return self.with_rope(rescale(self.own_rope, factor))

    @cached_property
    def tokenizer(self) -> TokenizerWrapper:
        """In mlx-lm's wrapper. Raises MissingFileError where there is none."""
        return load_tokenizer(self.folder, self.config)

    @cached_property
    def dimensions(self) -> Dimensions:
        """What of the model decides its memory."""
        return Dimensions.of(self.config, self.tensors)

    @cached_property
    def digest(self) -> str:
        """Of the content: config.json, weights and tokenizer. The folder's path, name and times do not count."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        files = [*(self.folder / name for name in sorted(self.headers)), *tokenizer_files(self.folder)]
        for path in files:
            digest.update(f"\n{path.relative_to(self.folder).as_posix()} {content_hash(path)}".encode())
        return digest.hexdigest()[:16]

    def results_digest(self, kv_bits: int | None = None) -> str:
        """Of what its results depend on besides the prompt: the content, the rope settings, the KV format."""
        parts = [self.digest, self.rope.to_hf("4"), kv_bits]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def settings(self, kv_bits: int | None = None) -> dict[str, Any]:
        """The same for the header of a run log, where a difference is named."""
        return {"digest": self.digest, "rope": self.rope.to_hf("4"), "kv_bits": kv_bits}

    @property
    def mlx_config(self) -> dict[str, Any]:
        """config.json with the rope settings in use, in the keys of transformers 4; nothing for mlx-lm to misread."""
        return {key: value for key, value in self.config.items() if key not in ROPE_KEYS} | self.rope.to_hf("4")

    @property
    def plain_config(self) -> dict[str, Any]:
        """What mlx-lm's model is built from: rope keys without a scaling, since `set_rope` replaces its module."""
        return dict.fromkeys(ROPE_KEYS) | self.mlx_config | {"rope_scaling": None}

    def load(self, *, lazy: bool = False, adapter_path: str | None = None) -> nn.Module:
        """The model with its weights, rotating by the rope settings in use.

        Args:
            lazy: leave the weights on disk until they are used.
            adapter_path: folder of LoRA adapters made by mlx-lm.

        Raises:
            UsageError: the weights do not fit config.json.
        """
        if glob.escape(str(self.folder)) != str(self.folder):
            raise UsageError(f"{self.folder}: mlx-lm does not find files in a folder with any of *?[ in its name")
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
        """The model without any weights. Raises UsageError where there is no such model."""
        model_class, args_class = model_classes(self.config)
        try:
            model: nn.Module = model_class(args_class.from_dict(self.plain_config))  # type: ignore[call-arg]
        except LOADING_ERRORS as error:
            raise UsageError(f"no {self.config['model_type']} model is like this config.json: {error!r}") from None
        set_rope(model, self.rope)
        return model


@dataclass(frozen=True)
class Dimensions:
    """What of a model decides its memory.

    Args:
        weights: bytes.
        layers, heads, head_dim, hidden, feed_forward, vocabulary: of the model.
        keys: features of the keys of one token in one layer.
        item_size: bytes of a number that the model computes with.
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
    """Load a checkpoint and its tokenizer, whatever the style of its config.json.

    Args:
        path_or_hf_repo, revision, factor: as in `Checkpoint.open`.
        lazy, adapter_path: as in `Checkpoint.load`.

    Returns:
        model, tokenizer: mlx-lm's, for its generation, caches and samplers; the model rotates by exact angles.

    Raises:
        MissingFileError: no such folder, or no weights in it.
        UsageError: a config.json or a weight file that cannot be right.
    """
    checkpoint = Checkpoint.open(path_or_hf_repo, revision=revision, factor=factor)
    return checkpoint.load(lazy=lazy, adapter_path=adapter_path), checkpoint.tokenizer
