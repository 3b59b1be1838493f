"""RopeConfig: the rope part of a Hugging Face config.json, in the keys of transformers 4 and of transformers 5."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from .errors import UsageError
from .frequencies import (
    RotaryFrequencies,
    default_frequencies,
    dynamic_ntk_frequencies,
    linear_frequencies,
    llama3_frequencies,
    longrope_frequencies,
    ntk_frequencies,
    yarn_frequencies,
)

PREFIX = "resonance_"
DEFAULT_BASE = 10000.0  # transformers' default for `rope_theta`; LLaMA 1 and 2 leave the key out

# A type's keys in config.json are its maker's keyword names: to add a type, add its maker here.
MAKERS: Mapping[str, Callable[..., RotaryFrequencies]] = MappingProxyType(
    {
        "default": default_frequencies,
        "linear": linear_frequencies,
        "ntk": ntk_frequencies,
        "dynamic": dynamic_ntk_frequencies,
        "yarn": yarn_frequencies,
        "llama3": llama3_frequencies,
        "longrope": longrope_frequencies,
    }
)
NOT_IN_ROPE_DICT = {"dims", "base", "seq_len", "max_position_embeddings"}  # these are elsewhere in config.json
LONGEST = 2**31  # tokens
WIDEST = 2**16  # features of a head
LARGEST = 1e15  # for any number in config.json; JSON may hold NaN, infinities and 10**400
NO_EFFECT = {"finetuned"}  # written by the YaRN authors' code; changes no angle
# Their files may state the context before or after scaling; only original_max_position_embeddings tells which.
TOLD_APART_BY_ORIGINAL = {"linear", "ntk"}
LISTS, INTEGERS, BOOLEANS = (
    {"short_factor", "long_factor"},
    {"original_max_position_embeddings"},
    {"truncate"},
)


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding that a checkpoint uses. Every value is checked when the object is made.

    Args:
        dims: number of rotated features per head, even.
        rope_type: a key of `MAKERS`, with the prefix `resonance_` if the wavelengths are rounded.
        base: `rope_theta`.
        max_position_embeddings: tokens of context, scaling included; None if config.json does not say.
        parameters: the type's own keys (`factor`, `beta_fast`, …).
        partial_rotary_factor: `dims` as a fraction of a head's features.

    Raises:
        UsageError: the type is unknown, a key is unknown to it or missing, or a value is out of range.
    """

    dims: int
    rope_type: str = "default"
    base: float = DEFAULT_BASE
    max_position_embeddings: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        if not isinstance(self.rope_type, str) or self.base_type not in MAKERS:
            known = ", ".join(MAKERS)
            raise UsageError(
                f"[RopeConfig] unknown rope_type {self.rope_type!r}; known: {known}, each also as {PREFIX}…"
            )
        if self.dims > WIDEST:
            raise UsageError(f"[RopeConfig] dims (head_dim) must be at most {WIDEST}, got {self.dims}")
        arguments = inspect.signature(self._maker).parameters
        keys = [key for key in arguments if key not in NOT_IN_ROPE_DICT]
        for key in keys:
            if arguments[key].default is inspect.Parameter.empty and key not in self.parameters:
                raise UsageError(f"[RopeConfig] rope_type {self.rope_type!r} needs {key}, which is missing")
        for key, value in self.parameters.items():
            if key not in keys:
                takes = ", ".join(keys) or "no keys"
                raise UsageError(
                    f"[RopeConfig] {key} = {value!r} does not apply to rope_type {self.rope_type!r}, "
                    f"which takes {takes}"
                )
            _check_kind(key, value)
        _check_kind("rope_theta", self.base)
        if self.max_position_embeddings is not None:
            _check_kind("max_position_embeddings", self.max_position_embeddings, int)
            if self.max_position_embeddings < 1:
                raise UsageError(
                    f"[RopeConfig] max_position_embeddings must be positive, got {self.max_position_embeddings}"
                )
        original = self.parameters.get("original_max_position_embeddings")
        length = arguments.get("max_position_embeddings")
        if length and length.default is inspect.Parameter.empty and self.max_position_embeddings is None:
            raise UsageError(
                f"[RopeConfig] rope_type {self.rope_type!r} needs max_position_embeddings, which is missing"
            )
        if original and self.max_position_embeddings and original > self.max_position_embeddings:
            raise UsageError(
                f"[RopeConfig] original_max_position_embeddings = {original} is longer than "
                f"max_position_embeddings = {self.max_position_embeddings}; it is the context before scaling"
            )
        for seq_len in (None, LONGEST) if self.depends_on_length else (None,):
            self.frequencies(seq_len)  # the maker checks the ranges

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle, which do not support mappingproxy."""
        values = [getattr(self, entry.name) for entry in fields(self)]
        return RopeConfig, tuple(dict(value) if isinstance(value, Mapping) else value for value in values)

    @property
    def base_type(self) -> str:
        """The rope type without `resonance_`."""
        return self.rope_type.removeprefix(PREFIX)

    @property
    def is_resonant(self) -> bool:
        """Whether the wavelengths are rounded to whole numbers of tokens."""
        return self.rope_type.startswith(PREFIX)

    @property
    def depends_on_length(self) -> bool:
        """Whether the angles change with the length of the sequence (dynamic, longrope)."""
        return "seq_len" in inspect.signature(self._maker).parameters

    @property
    def trained_length(self) -> int | None:
        """Tokens of context before scaling; None if config.json does not state it."""
        unsaid = None if self.base_type in TOLD_APART_BY_ORIGINAL else self.max_position_embeddings
        return self.parameters.get("original_max_position_embeddings", unsaid)

    @property
    def context_length(self) -> int | None:
        """Tokens of context the checkpoint is meant for, scaling included; None if config.json does not state it."""
        lengths = [self.max_position_embeddings]
        # Most files state the scaled length; Qwen's yarn files and all dynamic ones state the length before scaling.
        if self.base_type in ("yarn", "dynamic") and self.trained_length is not None:
            lengths.append(int(self.trained_length * self.parameters["factor"]))
        return max((length for length in lengths if length is not None), default=None)

    @property
    def _maker(self) -> Callable[..., RotaryFrequencies]:
        return MAKERS[self.base_type]

    def frequencies(self, seq_len: int | None = None) -> RotaryFrequencies:
        """The rotary frequencies for a sequence of `seq_len` tokens (None: within the context before scaling)."""
        frequencies = self.unrounded_frequencies(seq_len)
        return frequencies.resonate() if self.is_resonant else frequencies

    def unrounded_frequencies(self, seq_len: int | None = None) -> RotaryFrequencies:
        """The base type's frequencies, before any rounding: what `inspect` compares with."""
        arguments = dict(self.parameters)
        available = {"seq_len": seq_len, "max_position_embeddings": self.max_position_embeddings}
        wanted = inspect.signature(self._maker).parameters
        arguments |= {key: value for key, value in available.items() if key in wanted}
        return self._maker(self.dims, self.base, **arguments)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Read the rope part of a config.json, in either style.

        Args:
            config: the whole object. Style 4 has `rope_theta` and `rope_scaling` (its type under `rope_type` or
                `type`), style 5 has `rope_parameters`; if it has both, they must agree.

        Raises:
            UsageError: a key is missing, unknown, contradictory or out of range.
        """
        scaling = _rope_dict(config)
        rope_type = _agreed("rope_type", scaling.pop("rope_type", None), scaling.pop("type", None)) or "default"
        base = _agreed("rope_theta", config.get("rope_theta"), scaling.pop("rope_theta", None))
        part = _agreed(
            "partial_rotary_factor", config.get("partial_rotary_factor"), scaling.pop("partial_rotary_factor", None)
        )
        part = 1.0 if part is None else part
        _check_kind("partial_rotary_factor", part)
        if not 0 < part <= 1:
            raise UsageError(f"[RopeConfig] partial_rotary_factor must be in (0, 1], got {part}")
        original = "original_max_position_embeddings"
        if config.get(original) is not None and rope_type != "default":  # Phi-3 keeps it beside the dict
            scaling[original] = _agreed(original, config[original], scaling.get(original))
        return cls(
            dims=int(_head_dim(config) * part),
            rope_type=rope_type,
            base=DEFAULT_BASE if base is None else base,
            max_position_embeddings=config.get("max_position_embeddings"),
            parameters={key: value for key, value in scaling.items() if value is not None and key not in NO_EFFECT},
            partial_rotary_factor=part,
        )

    def to_hf(self, style: str = "4") -> dict[str, Any]:
        """The rope part of a config.json.

        A resonance type is written under `rope_scaling` in both styles: that is all stock mlx-lm reads, so it refuses
        the type instead of running with plain angles.

        Args:
            style: "4" for `rope_theta` and `rope_scaling`, "5" for `rope_parameters`.

        Returns:
            The keys to put into the whole object, from which `from_hf` reads an equal RopeConfig.

        Raises:
            UsageError: the style is unknown.
        """
        if style not in ("4", "5"):
            raise UsageError(f'[RopeConfig] style must be "4" or "5", got {style!r}')
        scaling: dict[str, Any] = {"rope_type": self.rope_type, **self.parameters}
        config: dict[str, Any] = {}
        if self.max_position_embeddings is not None:
            config["max_position_embeddings"] = self.max_position_embeddings
        if style == "4":
            if self.partial_rotary_factor != 1:
                config["partial_rotary_factor"] = self.partial_rotary_factor
            plain = self.rope_type == "default"
            return config | {"rope_theta": self.base, "rope_scaling": None if plain else scaling}
        parameters = scaling | {"rope_theta": self.base}
        if self.partial_rotary_factor != 1:
            parameters["partial_rotary_factor"] = self.partial_rotary_factor
        return config | {"rope_parameters": parameters} | ({"rope_scaling": parameters} if self.is_resonant else {})


def _rope_dict(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `rope_scaling` and `rope_parameters`, merged."""
    found = {key: config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, Mapping):
            raise UsageError(f"[RopeConfig] {key} must be an object, got {value!r}")
        if any(isinstance(entry, Mapping) for entry in value.values()):
            raise UsageError(f"[RopeConfig] {key} differs by layer type ({', '.join(value)}); one for all is supported")
    merged: dict[str, Any] = {}
    for value in found.values():
        for key, entry in value.items():
            merged[key] = _agreed(key, merged.get(key), entry)
    return merged


def _head_dim(config: Mapping[str, Any]) -> int:
    if config.get("head_dim") is not None:
        _check_kind("head_dim", config["head_dim"], int)
        return int(config["head_dim"])
    for key in ("hidden_size", "num_attention_heads"):
        if config.get(key) is None:
            raise UsageError(f"[RopeConfig] config.json has neither head_dim nor {key}")
        _check_kind(key, config[key], int)
    if config["num_attention_heads"] < 1:
        raise UsageError(f"[RopeConfig] num_attention_heads must be positive, got {config['num_attention_heads']}")
    return int(config["hidden_size"] // config["num_attention_heads"])


def _agreed(key: str, one: Any, other: Any) -> Any:
    """The value of a key that config.json may hold in two places."""
    if one is not None and other is not None and one != other:
        raise UsageError(f"[RopeConfig] config.json gives {key} twice, {one!r} and {other!r}; one of them is wrong")
    return other if one is None else one


def _check_kind(key: str, value: Any, kind: type | tuple[type, ...] | None = None) -> None:
    """Raise UsageError if the value is of the wrong kind for its key."""
    if kind is None:
        kind = list if key in LISTS else bool if key in BOOLEANS else int if key in INTEGERS else (int, float)
    wanted = {list: "a list of numbers", bool: "true or false", int: "an integer"}.get(kind, "a number")  # type: ignore[arg-type]
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    numbers = value if kind is list else [value]
    if right and kind is not bool:
        right = all(
            isinstance(number, (int, float)) and not isinstance(number, bool) and -LARGEST < number < LARGEST
            for number in numbers
        )
    if not right:
        raise UsageError(f"[RopeConfig] {key} must be {wanted}, got {value!r}")
