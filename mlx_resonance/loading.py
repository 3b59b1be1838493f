"""Where a checkpoint becomes a model: load(), and install() for mlx-lm's own models and commands."""

from __future__ import annotations

import importlib
import json
import logging
import struct
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.models import llama as mlx_lm_llama
from mlx_lm.models import rope_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import llama
from .config import PREFIX, RopeConfig
from .rope import ResonanceRoPE

INDEX = "model.safetensors.index.json"
TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
MLX_LM_IGNORES = {"attention_factor", "truncate", "extrapolation_factor"}  # by its YarnRoPE
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library


def load(
    path_or_hf_repo: str | Path, *, lazy: bool = False, revision: str | None = None, adapter_path: str | None = None
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a checkpoint and its tokenizer, whatever the style of its config.json.

    Args:
        path_or_hf_repo: a folder, or the id of a model on the Hugging Face hub.
        lazy: leave the weights on disk until they are used.
        revision: branch, tag or commit on the hub.
        adapter_path: folder of LoRA adapters made by mlx-lm.

    Returns:
        model, tokenizer: for mlx-lm's generation, caches and samplers. LLaMA and Mistral are `mlx_resonance.llama`,
        other architectures mlx-lm's own.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: a config.json or a weight file that cannot be right.
    """
    folder = resolve(path_or_hf_repo, revision, [*TOKENIZER_PATTERNS, "model*.safetensors"])
    model, config = load_model(folder, lazy=lazy)
    if adapter_path is not None:
        model = mlx_lm.utils.load_adapters(model, adapter_path)
        model.eval()
    return model, load_tokenizer(folder, config)


def load_model(
    folder: Path, *, lazy: bool = False, config_changes: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load the weights of a folder into a model.

    Args:
        folder: with config.json and model*.safetensors.
        lazy: leave the weights on disk until they are used.
        config_changes: keys that replace those of config.json.

    Returns:
        model, config: config.json as mlx-lm needs it, with the changes.

    Raises: as `load`.
    """
    config = read_config(folder) | dict(config_changes or {})
    config = mlx_lm_config(config)
    for file in weight_files(folder):
        check_safetensors(file)
    install()
    return mlx_lm.utils.load_model(folder, lazy=lazy, model_config=config, get_model_classes=model_classes)


def load_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a folder, in mlx-lm's wrapper. Raises FileNotFoundError where there is none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")):
        raise FileNotFoundError(f"[load] {folder} has no tokenizer: expected tokenizer.json or tokenizer.model")
    # It reads config.json too, and would warn of a rope type that it does not know but never uses.
    logging.getLogger("transformers.modeling_rope_utils").setLevel(logging.ERROR)
    return mlx_lm.utils.load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))


def resolve(path_or_hf_repo: str | Path, revision: str | None, patterns: list[str]) -> Path:
    """A local folder as it is; a hub id downloaded, only the files that match.

    Raises:
        FileNotFoundError: neither a folder nor a model that can be downloaded.
    """
    folder = Path(path_or_hf_repo).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hf_repo)
    if folder.exists():
        raise FileNotFoundError(f"[load] {name} is a file: expected a folder with config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"[load] {name}: no such folder, and not a hub id (owner/name)")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise FileNotFoundError(f"[load] {name}: no such folder, and not a hub id: {_first_line(error)}") from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(f"[load] {name}: no such folder, and the hub cannot be reached") from None
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"[load] {name}: no such folder, and the hub says: {_first_line(error)}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the checks every command needs.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is not a JSON object, or has no `model_type`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"[load] {folder} has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[load] {path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"[load] {path} has no model_type")
    return config


def mlx_lm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the keys that mlx-lm's model classes read, with nothing left for it to misread.

    Raises:
        ValueError: a key that the architecture needs is missing, or its rope part is wrong.
    """
    config = dict(config)
    # transformers' default for every architecture here; mlx-lm's LLaMA has the opposite one.
    config.setdefault("tie_word_embeddings", False)
    rope = RopeConfig.from_hf(config)
    config |= rope.to_hf("4") | {"rope_parameters": None}
    model_class, args_class = model_classes(config)
    for entry in fields(args_class):
        required = entry.default is MISSING and entry.default_factory is MISSING and entry.name != "rope"
        if required and config.get(entry.name) is None:
            raise ValueError(f"[load] config.json has no {entry.name}, which a {config['model_type']} model needs")
    ignored = MLX_LM_IGNORES & set(rope.parameters)
    if ignored and not rope.is_resonant and model_class is not llama.Model:
        raise ValueError(f"[load] mlx-lm ignores {', '.join(sorted(ignored))} for {config['model_type']} models")
    return config


def model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    """Model and arguments class by `model_type`: ours where mlx-lm would use its LLaMA. ValueError where unknown."""
    name = mlx_lm.utils.MODEL_REMAPPING.get(config["model_type"], config["model_type"])
    try:
        module = importlib.import_module(f"mlx_lm.models.{name}")
    except ImportError:
        raise ValueError(f"[load] model_type {config['model_type']!r} is not supported by mlx-lm") from None
    return (llama.Model, llama.ModelArgs) if module is mlx_lm_llama else (module.Model, module.ModelArgs)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, as its index names them.

    Raises:
        FileNotFoundError: there is none, or one that the index names is missing.
        ValueError: the index is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise FileNotFoundError(f"[load] {folder} has no model*.safetensors")
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"[load] {index} has no weight_map of tensor and file names: {error}") from None
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"[load] {index} names {name!r}: expected a file of the same folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"[load] {folder / name} is missing: {INDEX} names it")
    return [folder / name for name in names]


def check_safetensors(path: Path) -> None:
    """Compare a safetensors file's header with its size, so that a truncated download is found before it is used.

    Raises:
        ValueError: the header is damaged, or the data is shorter or longer than it says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"[load] {path} is not a whole safetensors file: {size} bytes, header of {length}")
        raw = file.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"[load] {path} has a damaged header: {error!r}") from None
    if end != size:
        raise ValueError(f"[load] {path} has {size} bytes where its header says {end}: download it again")


def install() -> None:
    """Teach every mlx-lm model and command the resonance rope types.

    mlx-lm's models make their rotary modules with `initialize_rope(dims, base, traditional, scaling_config,
    max_position_embeddings)`; after this, that function answers `resonance_…` types with `ResonanceRoPE` and all
    others as before. Calling it again changes nothing.
    """
    original = rope_utils.initialize_rope
    if getattr(original, "resonance", False):
        return

    def initialize_rope(
        dims: int,
        base: float,
        traditional: bool,
        scaling_config: dict[str, Any] | None = None,
        max_position_embeddings: int | None = None,
    ) -> nn.Module:
        scaling = scaling_config or {}
        if not str(scaling.get("rope_type") or scaling.get("type")).startswith(PREFIX):
            return original(dims, base, traditional, scaling_config, max_position_embeddings)
        rope = RopeConfig.from_hf(
            {
                "head_dim": dims,
                "rope_theta": base,
                "rope_scaling": {key: value for key, value in scaling.items() if key != "partial_rotary_factor"},
                "max_position_embeddings": max_position_embeddings,
            }
        )
        return ResonanceRoPE(rope.frequencies if rope.depends_on_length else rope.frequencies(), traditional)

    initialize_rope.resonance = True  # type: ignore[attr-defined]
    rope_utils.initialize_rope = initialize_rope
    for name, module in list(sys.modules.items()):  # model files that imported the name before
        if name.startswith("mlx_lm.models.") and getattr(module, "initialize_rope", None) is original:
            module.initialize_rope = initialize_rope  # type: ignore[attr-defined]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
