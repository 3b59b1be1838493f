"""install(): every entry point of mlx-lm computes the same angles as `load`, or refuses the checkpoint."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import _mlx_lm, tokenizer
from ._mlx_lm import MODELS, BatchGenerator
from .attention import ADAPTED_FILES, Inference, set_rope
from .checkpoint import Checkpoint
from .errors import MissingFileError, UsageError
from .files import WEIGHTS, read_json, weight_files
from .rope import ResonanceRoPE
from .rope_config import RopeConfig
from .rope_reading import NO_EFFECT
from .rope_types import MAKERS, ORIGINAL, PREFIX
from .tokenizer import TOKENIZER_PATTERNS
from .validation import SUPPORTED

SHARED_FILES = {"base", "cache", "rope_utils", "activations", "switch_layers", "pipeline"}  # not models
PLAIN_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}  # in a rope dictionary without a scaling
STYLE_4 = ("rope_theta", "rope_scaling", "partial_rotary_factor")
PLAIN = {"rope_theta": 10000, "partial_rotary_factor": 1}
UNSCALED_TYPES = {"default", "mrope"}
OF_MLX_LM = {"default", "dynamic", "longrope"}  # mlx-lm's modules do not need to know a text's length beforehand
OF_MLX_LM_ALONE = {"deepseek_yarn", "telechat3-yarn"}  # mlx-lm's names for yarn with other softmax scales


def install() -> None:
    """Make every model that mlx-lm loads rotate by exact angles as its config.json, in either style, says.

    LLaMA, Mistral, Qwen 2 and 3, Granite and SmolLM 3 get the same attention as from `load`. Other architectures get
    `ResonanceRoPE` for every scaling that their file requests from mlx-lm's `initialize_rope`. A config.json that asks
    for angles that the file would not compute is refused; one that asks for nothing special is left alone.

    The tokenizers of these six are loaded as by `load` too.

    Token ids that a model has no row for are refused before its first pass.

    This replaces functions of mlx-lm, wherever they have been imported: `load_model`, `load_tokenizer`,
    `initialize_rope`, `generate_step`, `speculative_generate_step`, and two methods of `BatchGenerator`: the one that
    makes it, and the one that takes prompts. Calling it again changes nothing.
    """
    if hasattr(_mlx_lm.load_model, "of_mlx_lm"):
        return
    changes: dict[Callable[..., Any], Any] = {
        _mlx_lm.load_model: _load_model,
        _mlx_lm.load_tokenizer: _load_tokenizer,
        _mlx_lm.initialize_rope: _initialize_rope,
        _mlx_lm.generate_step: _generate_step,
        _mlx_lm.speculative_generate_step: _speculative_generate_step,
    }
    for original, make in changes.items():
        changes[original] = make(original)
        changes[original].of_mlx_lm = original
    _replace(changes)
    if not hasattr(BatchGenerator.insert_segments, "of_mlx_lm"):
        BatchGenerator.insert_segments = _insert_segments(BatchGenerator.insert_segments)
        BatchGenerator.__init__ = _batch_generator(BatchGenerator.__init__)


def _replace(changes: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
    """Put functions in the place of others, under every name that any module has for them."""
    found = {id(original): ours for original, ours in changes.items()}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if not found.keys().isdisjoint(map(id, names.values())):  # quick: a program may have thousands of modules
            for name, value in list(names.items()):
                if id(value) in found:
                    setattr(module, name, found[id(value)])


def _check_ids(model: Any, ids: Iterable[Any]) -> None:
    """Refuse ids without a row in one of our models: MLX would read whatever is in memory behind the embedding."""
    args: Any = getattr(model, "args", None)
    if isinstance(getattr(args, "rope", None), RopeConfig):
        for number in ids:
            if not 0 <= number < args.vocab_size:
                raise tokenizer.no_row(number, None, args.vocab_size)


def _generate_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def generate_step(prompt: Any, model: Any, *args: Any, **options: Any) -> Any:
        _check_ids(model, prompt.tolist())
        if options.get("input_embeddings") is None:  # mlx-lm looks at the model's signature for them
            model = _for_inference(model)
        return original(prompt, model, *args, **options)

    return generate_step


def _speculative_generate_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def speculative_generate_step(prompt: Any, model: Any, draft_model: Any, *args: Any, **options: Any) -> Any:
        for reader in (model, draft_model):
            _check_ids(reader, prompt.tolist())
        return original(prompt, _for_inference(model), _for_inference(draft_model), *args, **options)

    return speculative_generate_step


def _for_inference(model: Any) -> Any:
    """One of our models as a loop that generates needs it; any other as it is."""
    ours = isinstance(getattr(getattr(model, "args", None), "rope", None), RopeConfig)
    return Inference(model) if ours and not isinstance(model, Inference) else model


def _batch_generator(original: Callable[..., None]) -> Any:
    @wraps(original)
    def __init__(self: Any, model: Any, *args: Any, **options: Any) -> None:
        original(self, _for_inference(model), *args, **options)

    return __init__


def _insert_segments(original: Callable[..., Any]) -> Any:
    @wraps(original)
    def insert_segments(self: Any, segments: Any, *args: Any, **options: Any) -> Any:
        for prompt in segments:
            for segment in prompt:
                _check_ids(self.model, segment)
        return original(self, segments, *args, **options)

    insert_segments.of_mlx_lm = original  # type: ignore[attr-defined]
    return insert_segments


def _load_tokenizer(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_tokenizer(
        model_path: str | Path, tokenizer_config_extra: dict[str, Any] | None = None, eos_token_ids: Any = None
    ) -> TokenizerWrapper:
        """mlx-lm's; for the supported types, that of `load`. Raises UsageError if the tokenizer cannot be used."""
        folder = Path(_mlx_lm.download(model_path, allow_patterns=TOKENIZER_PATTERNS))
        config = mlx_lm.utils.load_config(folder) if (folder / "config.json").is_file() else {}
        if config.get("model_type") not in SUPPORTED or type(config.get("vocab_size")) is not int:
            return original(model_path, tokenizer_config_extra, eos_token_ids=eos_token_ids)
        if eos_token_ids == config.get("eos_token_id"):  # from the files, of which mlx-lm ignores a 0
            eos_token_ids = None
        return tokenizer.load_tokenizer(folder, config, tokenizer_config_extra or {}, eos_token_ids)

    return load_tokenizer


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load_model(*args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
        """mlx-lm's, with the angles of config.json. Raises UsageError if the model's file cannot compute them."""
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        get_model_classes = bound.arguments["get_model_classes"]
        rope: RopeConfig | None = None

        def classes(config: dict[str, Any]) -> tuple[type[nn.Module], Any]:
            nonlocal rope
            model_class, args_class = get_model_classes(config=config)
            file = model_class.__module__.removeprefix(MODELS)
            adapted = file in ADAPTED_FILES and model_class.__module__.startswith(MODELS)
            if adapted and config.get("model_type") in SUPPORTED:
                # Not strict: a model without weights, or a process's part of a model with only some of the files.
                all_there = bound.arguments["strict"] or _has_all_weights(folder)
                checkpoint = Checkpoint.of_folder(str(folder), folder, dict(config), all_there)
                if all_there and "tie_word_embeddings" in config:
                    config["tie_word_embeddings"] = checkpoint.config["tie_word_embeddings"]
                if checkpoint.config.get("quantization_config") is None:
                    config.pop("quantization_config", None)
                rope = checkpoint.rope
                return checkpoint.model_classes(config)
            if adapted:  # another name for the same model
                rope = RopeConfig.from_hf(config)
                plain = {"rope_theta": rope.base, "rope_scaling": None, "rope_parameters": None}
                return model_class, SimpleNamespace(from_dict=lambda config: args_class.from_dict(config | plain))
            honoured = honoured_config(config, model_class, args_class)
            return model_class, SimpleNamespace(from_dict=lambda config: _arguments(args_class, config | honoured))

        folder = Path(bound.arguments["model_path"])
        if (folder / "generation_config.json").is_file():
            read_json(folder / "generation_config.json")  # mlx-lm takes for granted that it is an object
        if bound.arguments["strict"] and folder.is_dir() and not any(folder.glob(WEIGHTS)):
            weight_files(folder)  # says what the folder has instead
        bound.arguments["get_model_classes"] = classes
        model, config = original(*bound.args, **bound.kwargs)
        if rope is not None:
            set_rope(model, rope)
        elif type(model).__module__.startswith(MODELS):
            check_built(model, config)
        return model, config

    return load_model


def _has_all_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except MissingFileError:
        return False


def _arguments(args_class: Any, config: dict[str, Any]) -> Any:
    try:
        return args_class.from_dict(config)
    except TypeError as error:  # a key that the file needs is in another style
        kind = config.get("model_type")
        raise UsageError(f"mlx-lm cannot build a {kind} model from this config.json: {error}") from None


def check_built(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse a model whose rotary modules do not have the scaling, or the base, that its config.json asks for.

    Args:
        model: built by a file of mlx-lm that is not adapted.
        config: the whole object.

    Raises:
        UsageError: every rotary module is plain RoPE though a scaling is asked for, or none has the base asked for.
    """
    kind, names = str(config.get("model_type")), ("rope", "rotary")
    rotary = [part for _, part in model.named_modules() if any(name in type(part).__name__.lower() for name in names)]
    plain = [part for part in rotary if isinstance(part, nn.RoPE) and part.scale == 1]
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        dictionaries = _rope_dictionaries(part)
        types = {str(asked.get("rope_type") or asked.get("type") or "default") for asked in dictionaries}
        for rope_type in types - UNSCALED_TYPES:
            if len(plain) == len(rotary):
                raise UsageError(f"mlx-lm's {kind} model does not compute the angles of rope type {rope_type}")
        bases = {asked.get("rope_theta") for asked in (part, *dictionaries)} - {None}
        if rotary and all(isinstance(module, nn.RoPE) for module in rotary):
            for base in bases - {module.base for module in rotary}:
                raise UsageError(f"mlx-lm's {kind} model does not read rope_theta, which config.json sets to {base}")


def _rope_dictionaries(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rope dictionaries of a config.json, those of single layer types too. Raises UsageError for other values."""
    found: list[Mapping[str, Any]] = []
    for asked in filter(None, (part.get(key) for key in ("rope_scaling", "rope_parameters"))):
        if not isinstance(asked, Mapping):
            raise UsageError(f"rope_scaling must be an object, got {asked!r:.80}")
        found += [value for value in asked.values() if isinstance(value, Mapping)] or [asked]
    return found


def honoured_config(config: Mapping[str, Any], model_class: type, args_class: Any) -> dict[str, Any]:
    """Changes to a config.json that make an mlx-lm file that is not adapted compute the angles it asks for.

    Args:
        config: the whole object.
        model_class, args_class: the file's classes.

    Returns:
        Keys in the style that the file reads; empty if it reads config.json as it is.

    Raises:
        UsageError: the file would compute other angles.
    """
    kind, source = str(config.get("model_type")), _source(sys.modules[model_class.__module__])
    known = {entry.name for entry in fields(args_class)} if is_dataclass(args_class) else set()
    changes = _honoured_part(kind, config, known, source)
    if isinstance(text := config.get("text_config"), Mapping):  # a vision model's language part
        read = {key for key in STYLE_4 if key in source}
        changes["text_config"] = {**text, **_honoured_part(kind, text, read, source)}
    return changes


def _honoured_part(kind: str, part: Mapping[str, Any], known: set[str], source: str) -> dict[str, Any]:
    for asked in _rope_dictionaries(part):
        _check_honoured(kind, asked, source)
    asked = part.get("rope_parameters") or {}
    reads_it = "rope_parameters" in known or any(isinstance(value, Mapping) for value in asked.values())
    return {} if reads_it else _in_style_4(kind, asked, known)


def _source(module: ModuleType) -> str:
    """The source of a model file, and of the mlx-lm files that it imports models from."""
    names = {module.__name__}
    for value in vars(module).values():
        names.add(value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", "")))
    found = (name for name in names if name.startswith(MODELS) and name.removeprefix(MODELS) not in SHARED_FILES)
    return "".join(inspect.getsource(sys.modules[name]) for name in sorted({module.__name__, *found}))


def _check_honoured(kind: str, asked: Mapping[str, Any], source: str) -> None:
    """Refuse a rope dictionary that a file with this source cannot honour, before the model is built.

    A file that neither names a scaling, as phi3 does with "longrope", nor passes it to `initialize_rope` may have a
    rotary module of its own for it, as deepseek_v2 does: `check_built` sees that.
    """
    rope_type = str(asked.get("rope_type") or asked.get("type") or "default")
    named = any(f"{quote}{rope_type}{quote}" in source for quote in "\"'")
    handed_on = "initialize_rope(" in source and ("rope_scaling" in source or "rope_parameters" in source)
    is_ours, is_resonant = rope_type.removeprefix(PREFIX) in MAKERS, rope_type.startswith(PREFIX)
    known_here = handed_on and (is_ours or rope_type in OF_MLX_LM_ALONE)
    if not (rope_type == "default" or known_here or (not is_resonant and (named or is_ours))):
        raise UsageError(f"mlx-lm's {kind} model does not compute the angles of rope type {rope_type}")
    takes: Iterable[str] = ()
    if known_here and not named:
        takes = inspect.signature(MAKERS[rope_type.removeprefix(PREFIX)]).parameters if is_ours else asked
    if (known_here and not named) or rope_type == "default":
        unknown = [key for key in set(asked) - PLAIN_KEYS - NO_EFFECT if key not in takes and key not in source]
        if unknown:
            names = ", ".join(sorted(unknown))
            raise UsageError(f"mlx-lm's {kind} model does not compute the angles that {names} in config.json asks for")


def _in_style_4(kind: str, asked: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Translate `rope_parameters` into the keys of transformers 4, for a file that reads no others."""
    scaling = {key: value for key, value in asked.items() if key not in ("rope_theta", "partial_rotary_factor")}
    rope_type = str(scaling.pop("rope_type", None) or scaling.pop("type", None) or "default")
    changes = {key: asked[key] for key in ("rope_theta", "partial_rotary_factor") if asked.get(key) is not None}
    if rope_type != "default":
        changes["rope_scaling"] = scaling | {"rope_type": rope_type, "type": rope_type}
    if ORIGINAL in known and scaling.get(ORIGINAL) is not None:  # Phi 3 reads it there
        changes[ORIGINAL] = scaling[ORIGINAL]
    for key, value in changes.items():
        if key not in known and value != PLAIN.get(key):
            raise UsageError(f"mlx-lm's {kind} model does not read {key}, which config.json sets to {value!r:.80}")
    return {key: value for key, value in changes.items() if key in known}


def _initialize_rope(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    read: dict[str, RopeConfig] = {}  # every layer asks for the same

    def initialize_rope(
        dims: int,
        base: float,
        traditional: bool,
        scaling_config: dict[str, Any] | None = None,
        max_position_embeddings: int | None = None,
    ) -> nn.Module:
        """mlx-lm's, with exact angles for every scaling known here."""
        asked = scaling_config or {}
        rope_type = str(asked.get("rope_type") or asked.get("type") or "default")
        base_type = rope_type.removeprefix(PREFIX)
        if base_type not in MAKERS or rope_type in OF_MLX_LM:
            return original(dims, base, traditional, scaling_config, max_position_embeddings)
        takes = inspect.signature(MAKERS[base_type]).parameters  # a file may read other keys itself
        scaling = {key: value for key, value in asked.items() if key in takes} | {"rope_type": rope_type}
        config = {
            "head_dim": dims, "rope_theta": base, "rope_scaling": scaling,
            "max_position_embeddings": max_position_embeddings,
        }  # fmt: skip
        key = repr(config)
        rope = read[key] = read.get(key) or RopeConfig.from_hf(config)
        return ResonanceRoPE(rope.frequencies if rope.depends_on_length else rope.frequencies(), traditional)

    return initialize_rope
