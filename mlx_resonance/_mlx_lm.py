"""What we use of mlx-lm that its documentation does not promise: each name is reached here, and nowhere else.

A name is looked up when it is imported from here, so that importing this module costs nothing and needs no MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

from .errors import UsageError

TESTED = ("0.31.3", "0.32.2")  # the lowest and the newest mlx-lm that have passed the tests
MODELS = "mlx_lm.models."  # its package of model files


@dataclass(frozen=True)
class Name:
    """A name of mlx-lm.

    Args:
        place: module and name within `mlx_lm`.
        needed_for: what we do with it.
        attributes: of the class, that we use, replace or override.
        of_objects: attributes that its objects alone have; one of two, where versions differ.
    """

    place: str
    needed_for: str
    attributes: tuple[str, ...] = ()
    of_objects: tuple[str, ...] = ()


_BATCH = ("close", "extract_cache", "insert", "insert_segments", "next", "remove")
_BATCH_CACHE = ("extend", "extract", "filter", "finalize", "make_mask", "merge", "prepare", "update_and_fetch")
_CACHE = ("keys", "values", "offset")

NAMES: Mapping[str, Name] = {
    "BatchGenerator": Name("generate.BatchGenerator", "texts written at once", _BATCH, ("prefill_step_size",)),
    "generate_step": Name("generate.generate_step", "token after token; refusing ids without a row"),
    "speculative_generate_step": Name(
        "generate.speculative_generate_step", "refusing ids without a row, with a draft model, too"
    ),
    "generation_stream": Name("generate.generation_stream", "computing on the stream of mlx-lm's own passes"),
    "BatchKVCache": Name("models.cache.BatchKVCache", "quantized caches of a batch", _BATCH_CACHE, _CACHE),
    "KVCache": Name("models.cache.KVCache", "caches allocated once", ("step", "to_quantized", "trim"), _CACHE),
    "QuantizedKVCache": Name(
        "models.cache.QuantizedKVCache", "caches in 8 or 4 bits", ("step", "trim"), (*_CACHE, "group_size", "bits")
    ),
    "initialize_rope": Name("models.rope_utils.initialize_rope", "exact angles in models that `load` does not have"),
    "load_model": Name("utils.load_model", "a model of our classes; exact angles after install()"),
    "load_tokenizer": Name("utils.load_tokenizer", "the tokenizer; the same one after install()"),
    "download": Name("utils._download", "the folder of a name from the hub, after install()"),
    "make_shards": Name("utils.make_shards", "weights in files of mlx-lm's size"),
    "QUANT_RECIPES": Name("convert.QUANT_RECIPES", "the names of its mixed quantizations"),
    "mixed_quant_predicate_builder": Name("convert.mixed_quant_predicate_builder", "its mixed quantizations"),
    "TokenizerWrapper": Name(
        "tokenizer_utils.TokenizerWrapper",
        "our tokenizer, which is one",
        ("detokenizer",),
        ("_tokenizer", "_detokenizer or _detokenizer_class"),
    ),
    "BPEStreamingDetokenizer": Name("tokenizer_utils.BPEStreamingDetokenizer", "text from bytes written as letters"),
    "NaiveStreamingDetokenizer": Name("tokenizer_utils.NaiveStreamingDetokenizer", "text from any other tokenizer"),
    "SPMStreamingDetokenizer": Name("tokenizer_utils.SPMStreamingDetokenizer", "text from sentencepiece's pieces"),
    "grad_checkpoint": Name("tuner.trainer.grad_checkpoint", "activation checkpointing of a layer"),
    "ModelProvider": Name("server.ModelProvider", "what `lm server` refuses", ("load", "load_default")),
}


def __getattr__(name: str) -> Any:
    """Look up a name of `NAMES`. Raises UsageError if this version of mlx-lm does not have it."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place, attribute = NAMES[name].place.rsplit(".", 1)
    found = _look_up(f"mlx_lm.{place}", attribute)
    for part in NAMES[name].attributes:
        if not hasattr(found, part):
            raise _missing(f"{NAMES[name].place}.{part}")
    return found


def original(name: str) -> Any:
    """A function of `NAMES` as mlx-lm has it, whether or not `install()` has replaced it."""
    found = __getattr__(name)
    return getattr(found, "of_mlx_lm", found)


def model_classes(file: str) -> tuple[Any, Any]:
    """The classes `Model` and `ModelArgs` of one of mlx-lm's model files."""
    return _look_up(MODELS + file, "Model"), _look_up(MODELS + file, "ModelArgs")


def wrapped(wrapper: Any) -> Any:
    """transformers' tokenizer in mlx-lm's wrapper."""
    if "_tokenizer" not in vars(wrapper):
        raise _missing("tokenizer_utils.TokenizerWrapper._tokenizer")
    return wrapper._tokenizer


def set_detokenizer(wrapper: Any, make: Any) -> None:
    """Replace a wrapper's streaming detokenizer: mlx-lm 0.31 makes one for every text, later versions copy one."""
    wrapper._detokenizer_class = make
    wrapper._detokenizer = make(wrapped(wrapper))


def _look_up(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    except AttributeError:
        pass
    raise _missing(f"{module.removeprefix('mlx_lm.')}.{name}")


def _missing(name: str) -> UsageError:
    installed, (lowest, newest) = version("mlx-lm"), TESTED
    return UsageError(f"mlx-lm {installed} has no {name}: install a version from {lowest} to {newest}")
