"""Where a checkpoint becomes a model: load(), and install() for mlx-lm's own models and commands."""

from __future__ import annotations

import importlib
import json
import logging
import math
import struct
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.models import rope_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import llama
from .config import PREFIX, RopeConfig
from .rope import ResonanceRoPE

INDEX = "model.safetensors.index.json"
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
COUNTS = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "head_dim",
}  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
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


def load_model(folder: Path, *, lazy: bool = False, rope: RopeConfig | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Load the weights of a folder into a model that rotates as config.json says.

    Args:
        folder: with config.json and model*.safetensors.
        lazy: leave the weights on disk until they are used.
        rope: other rope settings than those of config.json.

    Returns:
        model, config: config.json with the rope keys of transformers 4, nothing left for mlx-lm to misread.

    Raises: as `load`.
    """
    config = check_checkpoint(folder)
    rope = rope or RopeConfig.from_hf(config)
    config = {key: value for key, value in config.items() if key not in ROPE_KEYS} | rope.to_hf("4")
    # mlx-lm's own classes get no scaling to interpret: the module they make is replaced below.
    for_mlx_lm = config if is_ours(config) else config | {"rope_scaling": None}
    cleared = dict.fromkeys(ROPE_KEYS)  # mlx-lm reads the file again: these must not come back
    try:
        model, _ = mlx_lm.utils.load_model(
            folder, lazy=lazy, model_config=cleared | for_mlx_lm, get_model_classes=model_classes
        )
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"[load] {folder} cannot be loaded: {type(error).__name__}: {error}") from None
    if not is_ours(config):
        frequencies = rope.frequencies if rope.depends_on_length else rope.frequencies()
        module = ResonanceRoPE(frequencies, bool(config.get("rope_traditional", False)))
        for layer in model.layers:
            layer.self_attn.rope = module
    model.args.rope = rope
    return model, config


def load_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a folder, in mlx-lm's wrapper. Raises FileNotFoundError where there is none."""
    if not has_tokenizer(folder):
        raise FileNotFoundError(f"[load] {folder} has no tokenizer: expected one of {', '.join(TOKENIZERS)}")
    # It reads config.json too, and would warn of a rope type that it does not know but never uses.
    logging.getLogger("transformers.modeling_rope_utils").setLevel(logging.ERROR)
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    eos = generation.get("eos_token_id") or config.get("eos_token_id")
    try:
        return mlx_lm.utils.load_tokenizer(folder, eos_token_ids=eos)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"[load] the tokenizer of {folder} cannot be loaded: {error}") from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


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


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Everything about a checkpoint that can be checked without reading its weights.

    Returns:
        config.json, with `tie_word_embeddings` as the weights have it where the file does not say.

    Raises:
        FileNotFoundError: config.json or a weight file is missing.
        ValueError: one of them cannot be right.
    """
    config = read_config(folder)
    if config["model_type"] not in SUPPORTED:
        raise ValueError(f"[load] model_type {config['model_type']!r}: supported are {', '.join(SUPPORTED)}")
    _, args_class = model_classes(config)
    for entry in fields(args_class):
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and entry.name not in ("rope", "rope_theta") and config.get(entry.name) is None:
            raise ValueError(f"[load] config.json has no {entry.name}, which a {config['model_type']} model needs")
    for key in COUNTS & set(config):
        value = config[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"[load] {key} must be a positive integer, got {value!r}")
    rope = RopeConfig.from_hf(config)
    _check_window(config, rope)
    names = {name for file in weight_files(folder) for name in check_safetensors(file)}
    return {"tie_word_embeddings": "lm_head.weight" not in names} | config


def _check_window(config: Mapping[str, Any], rope: RopeConfig) -> None:
    """Refuse attention windows that the model would not keep to."""
    window, kinds = config.get("sliding_window"), set(config.get("layer_types") or ())
    if config["model_type"].startswith("qwen") and not config.get("use_sliding_window"):
        window, kinds = None, set()
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"[load] layer_types {', '.join(sorted(map(str, kinds)))}: only full and sliding attention")
    windows_kept = is_ours(config) and kinds == {"full_attention", "sliding_attention"}
    if window and not windows_kept and window < (rope.context_length or 0):
        raise ValueError(
            f"[load] sliding_window = {window} is shorter than the context of {rope.context_length} tokens: "
            f"a {config['model_type']} model here attends to all of it"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises FileNotFoundError where it is missing, ValueError where it has no `model_type`."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"[load] {folder} has no config.json")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"[load] {path} has no model_type")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError where the file holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"[load] {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"[load] {path} is not a JSON object")
    return value


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether the architecture is that of `mlx_resonance.llama`."""
    return config["model_type"] in ("llama", "mistral")


def model_classes(config: Mapping[str, Any]) -> tuple[type[nn.Module], type]:
    """Model and arguments class of a supported `model_type`: ours, or mlx-lm's."""
    if is_ours(config):
        return llama.Model, llama.ModelArgs
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    return module.Model, module.ModelArgs


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
    files = [folder / name for name in names]
    for stray in sorted(set(folder.glob("model*.safetensors")) - set(files)):  # mlx-lm would load it too
        raise ValueError(f"[load] {stray} is not named by {INDEX}: remove one of the two")
    return files


def check_safetensors(path: Path) -> list[str]:
    """Compare a safetensors file's header with its size, so that a truncated download is found before it is used.

    Returns:
        The names of its tensors.

    Raises:
        ValueError: the header is damaged, or the tensors do not fill the file from end to end.
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
        spans = sorted(
            (*entry["data_offsets"], BYTES[entry["dtype"]] * math.prod(entry["shape"])) for entry in entries.values()
        )
        whole = all(end - start == nbytes for start, end, nbytes in spans)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"[load] {path} has a damaged header: {error!r}") from None
    ends = [0, *(end for _, end, _ in spans)]
    if not whole or any(start != end for (start, _, _), end in zip(spans, ends, strict=False)):
        raise ValueError(f"[load] {path} has a damaged header: its tensors do not follow each other")
    if 8 + length + ends[-1] != size:
        raise ValueError(f"[load] {path} is truncated: {size} bytes where its header says {8 + length + ends[-1]}")
    return list(entries)


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
