"""The values of config.json, one by one: of the right kind for their keys, and of sizes that a model can have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .errors import UsageError
from .rope_types import is_number


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 2**31


def _is_list(value: Any, kind: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(kind(entry) for entry in value)


# Of each key: what its value must be, in words and as a test. A key that is null counts as absent.
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "head_dim", "sliding_window", "no_rope_layer_interval",
        ),
        ("a positive integer", _is_count),
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "logits_scaling"), ("a positive number", lambda value: is_number(value) and value > 0)
    ),
    **dict.fromkeys(
        ("attention_multiplier", "embedding_multiplier", "residual_multiplier"), ("a number", is_number)
    ),
    **dict.fromkeys(
        (
            "attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "rope_traditional",
            "use_cache",
        ),
        ("true or false", lambda value: isinstance(value, bool)),
    ),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), ("a token id", _is_token)),
    "eos_token_id": ("a token id or a list of them", lambda value: _is_token(value) or _is_list(value, _is_token)),
    "max_window_layers": ("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "hidden_act": ("silu", lambda value: value in ("silu", "swish")),  # two names for one function
    "layer_types": ("a list of names", lambda value: _is_list(value, lambda name: isinstance(name, str))),
    "architectures": ("a list of names", lambda value: _is_list(value, lambda name: isinstance(name, str))),
    **dict.fromkeys(("auto_map", "text_config"), ("an object", lambda value: isinstance(value, Mapping))),
}  # fmt: skip


def check_values(config: Mapping[str, Any]) -> None:
    """Refuse values of the wrong kind, and sizes that no model can have, before one is built.

    Raises:
        UsageError: the key, its value, and what would be right.
    """
    for key in sorted(KINDS.keys() & config.keys()):
        wanted, is_right = KINDS[key]
        if config[key] is not None and not is_right(config[key]):
            raise UsageError(f"{key} must be {wanted}, got {config[key]!r:.80}")
    if config.get("model_file") is not None:
        raise UsageError(f"model_file = {config['model_file']!r:.80} is code of the checkpoint, which is not run here")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UsageError(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    if config.get("head_dim") is None and width % heads:
        raise UsageError(f"hidden_size = {width} is not a multiple of num_attention_heads = {heads}")
