"""What config.json says about rotation, read as transformers' model of that type reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import UsageError
from .rope_types import DEFAULT_BASE, ORIGINAL, PREFIX, check_kind, check_type, is_number, type_keys


class Defaults(NamedTuple):
    """What transformers assumes where config.json is silent: tokens of context, `rope_theta`, `head_dim`."""

    length: int
    base: float = DEFAULT_BASE
    head_dim: int | None = None


DEFAULTS: Mapping[str, Defaults] = {
    "llama": Defaults(2048),
    "mistral": Defaults(131072),
    "qwen2": Defaults(32768),
    "qwen3": Defaults(32768, head_dim=128),
    "granite": Defaults(2048),
    "smollm3": Defaults(32768, 2000000.0),
}
NO_EFFECT = {"finetuned"}  # written by the YaRN authors' code; changes no angle
# Rope types that the paper's fine-tuning code, a LLaMA's, rounds where `resonance_rope` is true. It has a class for
# rounded NTK scaling, but looks for the flag in the wrong place; it has none for linear scaling.
ROUNDED_BY_FLAG = {"default", "yarn", "dynamic"}
# Their files may state the context before or after scaling; another length, where there is one, tells which: Vicuna's
# config.json has max_sequence_length, LongLoRA's tokenizer has model_max_length.
LENGTH_IS_UNCLEAR = {"linear", "ntk"}
OTHER_LENGTHS = ("max_sequence_length", "model_max_length")
PART = "partial_rotary_factor"
READ_HERE = {"rope_theta", "rope_scaling", "rope_parameters", PART, "resonance_rope"}
LAYER_TYPE = "_attention"  # how the names of layer types end
# Keys that the model files honour. mlx-lm's `rope_traditional` has no counterpart in transformers.
READ_BY_MODEL: Mapping[str, set[str]] = {
    "llama": {"rope_traditional"},
    "mistral": {"rope_traditional"},
    "qwen2": {"rope_traditional"},
    "smollm3": {"rope_traditional", "no_rope_layers", "no_rope_layer_interval"},
}
ABOUT_ROTATION = re.compile(
    r"(?i:(^|[_-])(m?rope|nope|rotary|alibi|ntk|yarn|xpos)([_-]|$)|^pos(ition)?_emb|^(compress_pos_emb|alpha_value)$)"
    r"|[rR]ope[A-Z]"
)
SWITCHES = {"use_rope", "use_rotary", "use_rotary_embedding", "rope", "rotary"}  # true means an ordinary rotation


def read_rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Read the rope part of a config.json, in the keys of transformers 4 or 5.

    Args:
        config: the whole object.

    Returns:
        The arguments of RopeConfig, and one line for each key that was ignored and each value that was assumed.

    Raises:
        UsageError: a key is contradictory or out of range, or the angles that it asks for cannot be known.
    """
    notes: list[str] = []
    kind = config.get("model_type")
    defaults = DEFAULTS.get(kind) if isinstance(kind, str) else None
    scaling = _rope_dict(config, notes)
    rope_type = scaling.pop("rope_type", None)
    rope_type = "default" if rope_type is None else rope_type
    check_type(rope_type)
    rope_type = _rounded_by_flag(config, rope_type)
    base_type = rope_type.removeprefix(PREFIX)
    is_given = "rope_theta" in config or "rope_theta" in scaling
    base = _agreed("rope_theta", config.get("rope_theta"), scaling.pop("rope_theta", None))
    part = _partial_rotary_factor(config, scaling, base_type, defaults, notes)
    length = config.get("max_position_embeddings")
    if length is None and defaults is not None:
        length = defaults.length
        notes.append(f"config.json has no max_position_embeddings: {length} is assumed, as in transformers' {kind}")
    if length is not None:
        check_kind("max_position_embeddings", length, int)
    length = _lengths(config, scaling, base_type, length, notes)
    _nulls(scaling, base_type, length, notes)
    neutral = {"factor": 1, "attention_factor": 1, ORIGINAL: length}
    keys, _ = type_keys(base_type)
    parameters = {
        key: value
        for key, value in scaling.items()
        if value is not None and key not in NO_EFFECT and (key in keys or not _same(value, neutral.get(key)))
    }
    if base is None:
        base = DEFAULT_BASE if defaults is None else defaults.base
        if is_given:
            notes.append(f"rope_theta is null: {base:g} is assumed")
    dims = int(_head_dim(config, defaults) * part)
    if defaults is not None:
        _ignore_others(config, str(kind), {"base": base, "dim": dims}, notes)
    return {
        "dims": dims, "rope_type": rope_type, "base": base, "max_position_embeddings": length,
        "parameters": parameters, PART: part,
    }, notes  # fmt: skip


def is_about_rotation(key: str, kind: str) -> bool:
    """Whether a top-level key of config.json is about rotation, and no model file reads it."""
    return key in READ_HERE or (bool(ABOUT_ROTATION.search(key)) and key not in READ_BY_MODEL.get(kind, ()))


def _rope_dict(config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """A copy of `rope_scaling` or `rope_parameters`; if config.json has both, they must not differ.

    transformers would take `rope_scaling` alone.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise UsageError(f"[RopeConfig] {key} must be an object, got {value!r:.80}")
        if value:
            found[key] = _for_all_layers(key, value, config.get("layer_types"), notes)
            kinds = (found[key].pop("rope_type", None), found[key].pop("type", None))
            found[key]["rope_type"] = _agreed("rope_type", *kinds)
    if not found:
        return {}
    taken, *others = found.values()
    for name, entry in others[0].items() if others else ():
        known = taken.get(name) if taken.get(name) is not None else config.get(name)
        if entry is not None and _agreed(name, known, entry) != known:
            raise UsageError(
                f"[RopeConfig] rope_parameters has {name} = {entry!r:.60}, and rope_scaling, which transformers takes "
                "instead, does not: write all settings into one of them"
            )
    return taken


def _for_all_layers(key: str, value: Mapping[str, Any], kinds: Any, notes: list[str]) -> dict[str, Any]:
    """The settings of a dictionary that may hold them by layer type, where they are the same for all layers."""
    kinds = {kind for kind in kinds if isinstance(kind, str)} if isinstance(kinds, list) else set()
    named = {name for name in value if name in kinds or name.endswith(LAYER_TYPE)}
    nested = {name for name in named if isinstance(value[name], Mapping)}
    if not nested:
        return dict(value)
    first, *others = (value[name] for name in sorted(nested))
    without = {name for name in named - nested if name in (kinds or {"full_attention"})}
    if without or kinds - nested or any(other != first for other in others):
        raise UsageError(f"[RopeConfig] {key} differs by layer type ({', '.join(value)}); one for all is supported")
    for name in sorted(set(value) - named):
        if value[name] is not None and first.get(name) != value[name]:
            raise UsageError(
                f"[RopeConfig] {key} has settings by layer type, and {name} = {value[name]!r:.60} beside them"
            )
    notes.append(f"{key} has settings for {' and '.join(sorted(nested))}: they are used in all layers")
    return dict(first)


def _rounded_by_flag(config: Mapping[str, Any], rope_type: str) -> str:
    """The rope type, with the prefix if the paper's fine-tuning code has rounded its wavelengths."""
    flag = config.get("resonance_rope")
    if flag is not None:
        check_kind("resonance_rope", flag, bool)
    if not flag or rope_type.startswith(PREFIX):
        return rope_type
    if config.get("model_type", "llama") != "llama" or rope_type not in ROUNDED_BY_FLAG:
        raise UsageError(
            f"[RopeConfig] resonance_rope = true beside rope_type {rope_type!r} of a {config.get('model_type')} model: "
            "the code that writes this flag does not round there; remove it, or write the rope_type "
            f"{PREFIX}{rope_type}"
        )
    return PREFIX + rope_type


def _partial_rotary_factor(
    config: Mapping[str, Any], scaling: dict[str, Any], base_type: str, defaults: Defaults | None, notes: list[str]
) -> float:
    """How much of a head is rotated. None of the supported models leaves out a part."""
    part = _agreed(PART, config.get(PART), scaling.pop(PART, None))
    part = 1.0 if part is None else part
    check_kind(PART, part)
    if not 0 < part <= 1:
        raise UsageError(f"[RopeConfig] {PART} must be in (0, 1], got {part}")
    if defaults is None or part == 1:
        return float(part)
    kind = config["model_type"]
    _check_own_code(config, PART, part)
    if base_type != "default":
        raise UsageError(
            f"[RopeConfig] {PART} = {part} does not apply to rope_type {base_type!r} of a {kind} model, which rotates "
            "whole heads"
        )
    notes.append(f"{PART} = {part} is ignored, as in transformers' {kind}: whole heads are rotated")
    return 1.0


def _lengths(
    config: Mapping[str, Any], scaling: dict[str, Any], base_type: str, length: int | None, notes: list[str]
) -> int | None:
    """Complete the context before scaling in the dictionary. Returns `max_position_embeddings`, after scaling."""
    beside = config.get(ORIGINAL)
    if beside is not None and base_type != "default":  # Phi-3 keeps it beside the dict
        scaling[ORIGINAL] = _agreed(ORIGINAL, beside, scaling.get(ORIGINAL))
    original = scaling.get(ORIGINAL)
    if isinstance(original, float) and original.is_integer():
        original = scaling[ORIGINAL] = int(original)
    if base_type == "dynamic" and original is not None and original != length:
        raise UsageError(
            f"[RopeConfig] {ORIGINAL} = {original!r:.60} does not apply to rope_type 'dynamic', which counts from "
            f"max_position_embeddings = {length}"
        )
    if original is None and ORIGINAL in type_keys(base_type)[1] and length is not None:
        scaling[ORIGINAL] = length
        notes.append(f"the {base_type} settings have no {ORIGINAL}: {length} is assumed, max_position_embeddings")
    factor = scaling.get("factor")
    if base_type in LENGTH_IS_UNCLEAR and original is None and length and is_number(factor) and factor > 1:
        others = [config[key] for key in OTHER_LENGTHS if is_number(config.get(key))]
        if any(abs(other - length * factor) < 1 for other in others):
            scaling[ORIGINAL], length = length, int(length * factor)
    return length


def _nulls(scaling: dict[str, Any], base_type: str, length: int | None, notes: list[str]) -> None:
    """Values that transformers takes from a key of YaRN's that is null."""
    if base_type != "yarn":
        return
    if "truncate" in scaling and scaling["truncate"] is None:
        scaling["truncate"] = False
        notes.append("truncate is null: false is assumed, as in transformers")
    original = scaling.get(ORIGINAL)
    if "factor" in scaling and scaling["factor"] is None and length and is_number(original) and original > 0:
        scaling["factor"] = length / original
        notes.append(f"the factor of yarn is null: {length} / {original} is assumed, as in transformers")


def _ignore_others(config: Mapping[str, Any], kind: str, in_use: Mapping[str, Any], notes: list[str]) -> None:
    """Note the keys about rotation that a model of this type does not read."""
    for key, value in config.items():
        if key in READ_HERE or not is_about_rotation(key, kind) or _changes_nothing(key, value, in_use):
            continue
        _check_own_code(config, key, value)
        notes.append(f"{key} = {value!r:.60} is ignored, as in transformers' {kind}")


def _changes_nothing(key: str, value: Any, in_use: Mapping[str, Any]) -> bool:
    """Whether a key about rotation asks for the ordinary one."""
    if isinstance(value, bool):
        return value == (key in SWITCHES)
    if isinstance(value, list):
        return all(_same(entry, 1) for entry in value)
    named = next((in_use[name] for name in in_use if name in key), 1)
    return not value or value in ("rope", "rotary", "default") or _same(value, 1) or _same(value, named)


def _check_own_code(config: Mapping[str, Any], key: str, value: Any) -> None:
    """Refuse a key about rotation that code which comes with the checkpoint may read."""
    own = config.get("auto_map")
    if isinstance(own, Mapping) and any(name.startswith("AutoModel") for name in own):
        raise UsageError(
            f"[RopeConfig] {key} = {value!r:.60} may change the angles in the checkpoint's own code (auto_map), which "
            "is not run here: convert it to a model that transformers has"
        )


def _head_dim(config: Mapping[str, Any], defaults: Defaults | None) -> int:
    if defaults is not None and defaults.head_dim is not None and "head_dim" not in config:
        return defaults.head_dim
    if config.get("head_dim") is not None:
        check_kind("head_dim", config["head_dim"], int)
        return int(config["head_dim"])
    for key in ("hidden_size", "num_attention_heads"):
        if config.get(key) is None:
            raise UsageError(f"[RopeConfig] config.json has neither head_dim nor {key}")
        check_kind(key, config[key], int)
    if config["num_attention_heads"] < 1:
        raise UsageError(f"[RopeConfig] num_attention_heads must be positive, got {config['num_attention_heads']}")
    return int(config["hidden_size"] // config["num_attention_heads"])


def _agreed(key: str, one: Any, other: Any) -> Any:
    """The value of a key that config.json may hold in two places."""
    if one is not None and other is not None and one != other:
        raise UsageError(
            f"[RopeConfig] config.json gives {key} twice, {one!r:.60} and {other!r:.60}; one of them is wrong"
        )
    return other if one is None else one


def _same(value: Any, other: Any) -> bool:
    return is_number(value) and is_number(other) and value == other
