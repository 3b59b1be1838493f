"""RopeConfig: the rope part of a Hugging Face config.json, in the keys of transformers 4 and of transformers 5."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from .errors import UsageError
from .frequencies import RotaryFrequencies
from .positions import PositionMap
from .rope_reading import LENGTH_IS_UNCLEAR, read_rope
from .rope_types import DEFAULT_BASE, LONGEST, MAKERS, PREFIX, WIDEST, check_kind, check_type, type_keys

logger = logging.getLogger("mlx_resonance")


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
        window: tokens that the model was made to attend to, where the one here attends to all; None for no limit.
        positions: for texts longer than the context; None for every token's own position. No config.json has it.

    Raises:
        UsageError: the type is unknown, a key is unknown to it or missing, or a value is out of range.
    """

    dims: int
    rope_type: str = "default"
    base: float = DEFAULT_BASE
    max_position_embeddings: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    partial_rotary_factor: float = 1.0
    window: int | None = None
    positions: PositionMap | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        check_type(self.rope_type)
        if self.dims > WIDEST:
            raise UsageError(f"[RopeConfig] dims (head_dim) must be at most {WIDEST}, got {self.dims}")
        arguments = inspect.signature(self._maker).parameters
        keys, needed = type_keys(self.base_type)
        for key in sorted(needed - set(self.parameters)):
            raise UsageError(f"[RopeConfig] rope_type {self.rope_type!r} needs {key}, which is missing")
        for key, value in self.parameters.items():
            if key not in keys:
                takes = ", ".join(keys) or "no keys"
                raise UsageError(
                    f"[RopeConfig] {key} = {value!r} does not apply to rope_type {self.rope_type!r}, "
                    f"which takes {takes}"
                )
            check_kind(key, value)
        check_kind("rope_theta", self.base)
        if self.max_position_embeddings is not None:
            check_kind("max_position_embeddings", self.max_position_embeddings, int)
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
    def name(self) -> str:
        """The rope type, and the position map if there is one, in words."""
        return self.rope_type if self.positions is None else f"{self.rope_type}, {self.positions.extend}"

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
        unsaid = None if self.base_type in LENGTH_IS_UNCLEAR else self.max_position_embeddings
        return self.parameters.get("original_max_position_embeddings", unsaid)

    @property
    def context_length(self) -> int | None:
        """Tokens of context in use: `own_context`, or those that a position map serves."""
        return self.own_context if self.positions is None else self.positions.longest

    @property
    def own_context(self) -> int | None:
        """Tokens of context the checkpoint is meant for, scaling included; None if config.json does not state it."""
        lengths = [self.max_position_embeddings]
        # Most files state the scaled length; Qwen's yarn files and all dynamic ones state the length before scaling.
        if self.base_type in ("yarn", "dynamic", *LENGTH_IS_UNCLEAR) and self.trained_length is not None:
            lengths.append(int(self.trained_length * self.parameters["factor"]))
        longest = max((length for length in lengths if length is not None), default=None)
        return longest if longest is None or self.window is None else min(longest, self.window)

    @property
    def length_if_unscaled(self) -> int | None:
        """Tokens of context if `max_position_embeddings` is the length before scaling; None if it is known not to be.

        A file of a linear or NTK scaling may state either.
        """
        if self.trained_length is not None or self.max_position_embeddings is None or self.window is not None:
            return None
        return int(self.max_position_embeddings * self.parameters["factor"])

    @property
    def _maker(self) -> Callable[..., RotaryFrequencies]:
        return MAKERS[self.base_type]

    def frequencies(self, seq_len: int | None = None) -> RotaryFrequencies:
        """The rotary frequencies for a sequence of `seq_len` tokens (None: within the context before scaling).

        With a position map no token counts as further than the context: neither do they.
        """
        frequencies = self.unrounded_frequencies(seq_len)
        return frequencies.resonate() if self.is_resonant else frequencies

    def unrounded_frequencies(self, seq_len: int | None = None) -> RotaryFrequencies:
        """The base type's frequencies, before any rounding: what `inspect` compares with."""
        if seq_len is not None and self.positions is not None:
            seq_len = min(seq_len, self.positions.trained)
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
            UsageError: a key is missing, unknown, contradictory or out of range, or the angles that it asks for cannot
                be known.

        One warning in the log for each key about rotation that is ignored, and each value that is assumed, both as in
        transformers' model of that type.
        """
        arguments, notes = read_rope(config)
        rope = cls(**arguments)
        for note in notes:
            logger.warning(note)
        return rope

    def to_hf(self, style: str = "4") -> dict[str, Any]:
        """The rope part of a config.json.

        A resonance type is written under `rope_scaling` in both styles: that is all stock mlx-lm reads, so it refuses
        the type instead of running with plain angles.

        Args:
            style: "4" for `rope_theta` and `rope_scaling`, "5" for `rope_parameters`.

        Returns:
            The keys to put into the whole object, from which `from_hf` reads an equal RopeConfig; of a longrope whose
            `factor` is not the ratio of its two lengths, one with the attention scale written out.

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
            if self.rope_type == "longrope":
                # transformers 4 reads it only here, and the factor only from the ratio of the two lengths.
                original = self.parameters["original_max_position_embeddings"]
                config["original_max_position_embeddings"] = original
                ratio = (self.max_position_embeddings or 0) / original
                if self.parameters.get("factor", ratio) != ratio:
                    scaling.setdefault("attention_factor", self.frequencies().attention_scale)
            if self.partial_rotary_factor != 1:
                config["partial_rotary_factor"] = self.partial_rotary_factor
            plain = self.rope_type == "default"
            return config | {"rope_theta": self.base, "rope_scaling": None if plain else scaling}
        parameters = scaling | {"rope_theta": self.base}
        if self.partial_rotary_factor != 1:
            parameters["partial_rotary_factor"] = self.partial_rotary_factor
        return config | {"rope_parameters": parameters} | ({"rope_scaling": parameters} if self.is_resonant else {})
