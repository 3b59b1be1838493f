"""The tokenizer in a GGUF file's metadata, written as the files of a Hugging Face checkpoint."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_resonance.errors import UsageError

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from .gguf_pre_tokenizers import PRE, pre_tokenizer_of

GGML = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType
TYPES = {"gpt2": range(NORMAL, BYTE), "llama": range(NORMAL, BYTE + 1)}
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep", "mask": "mask"}
OF_SENTENCEPIECE = {"unknown": 0, "bos": 1, "eos": 2}  # its defaults, and llama.cpp's
# Files often name only the end of a text (eos), not that of a turn. llama.cpp finds these by their names, too.
ENDS_OF_TURNS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
KINDS = {str: "a string", bool: "true or false", int: "an integer"}

logger = logging.getLogger("mlx_resonance")


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer of a GGUF file: tokenizer.json, its settings, chat templates, and the ids that end a text.

    Args:
        metadata: the file's, as plain Python values. Without `tokenizer.ggml.model`, nothing is written.
        folder: the checkpoint's.

    Raises:
        UsageError: the tokenizer is of another kind than `gpt2` and `llama`, or its parts do not fit each other.
    """
    model = _value(metadata, GGML + "model", str)
    if model is None:
        return
    if model not in TYPES:
        raise UsageError(f"{GGML}model = {model!r:.80} cannot be converted: supported are {' and '.join(TYPES)}")
    vocabulary = Vocabulary.of(metadata, model)
    tokenizer, add_bos = _byte_level(metadata, vocabulary) if model == "gpt2" else _sentencepiece(metadata, vocabulary)
    _add_special_tokens(tokenizer, vocabulary)
    tokenizer.post_processor = _post_processor(metadata, vocabulary, add_bos)
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(_settings(vocabulary), indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(_generation(metadata, vocabulary), indent=2),
        **_chat_templates(metadata),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF file.

    Args:
        tokens: their texts, by id.
        types: of each, a `gguf.TokenType`.
        special: ids by the names that the file has for them, such as `bos` and `padding`.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    special: Mapping[str, int]

    @classmethod
    def of(cls, metadata: Mapping[str, Any], model: str) -> Vocabulary:
        """Read and check them. Raises UsageError for tokens that are missing, not strings, or there twice."""
        tokens = _list(metadata, GGML + "tokens", str)
        types = _list(metadata, GGML + "token_type", int, len(tokens))
        first: dict[str, int] = {}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
            if first.setdefault(token, number) != number:
                raise UsageError(f"{GGML}tokens: {token!r:.80} is both token {first[token]} and token {number}")
            if kind not in TYPES[model]:
                allowed = f"{TYPES[model][0]} to {TYPES[model][-1]}"
                raise UsageError(f"{GGML}token_type: token {number}, {token!r:.80}, has type {kind}, not {allowed}")
        return cls(tokens, types, _special_ids(metadata, model, len(tokens)))

    def name(self, special: str) -> str | None:
        """The text of a special token, if there is one."""
        return self.tokens[self.special[special]] if special in self.special else None

    def ids(self, *kinds: int) -> list[int]:
        """The tokens of these types."""
        return [number for number, kind in enumerate(self.types) if kind in kinds]


def _value(metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    value = metadata.get(key)
    if value is not None and type(value) is not kind:
        raise UsageError(f"{key} must be {KINDS[kind]}, got {value!r:.80}")
    return value


def _list(metadata: Mapping[str, Any], key: str, kind: type, length: int | None = None) -> list[Any]:
    """The list of a key, checked; `length` is the number of tokens, which it must have."""
    values = metadata.get(key)
    if not isinstance(values, list) or not values:
        what = "is missing" if values is None else f"must be a list with entries, got {values!r:.80}"
        raise UsageError(f"{key} {what}")
    for number, value in enumerate(values):
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UsageError(f"{key}[{number}] must be {KINDS.get(kind, 'a number')}, got {value!r:.80}")
    if length is not None and len(values) != length:
        raise UsageError(f"{key} has {len(values)} entries, but there are {length} tokens")
    if kind is str:
        _check_text(key, values)
    return values


def _check_text(key: str, values: Sequence[str]) -> None:
    for number, value in enumerate(values):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UsageError(f"{key}[{number}] = {value!r:.80} is not valid UTF-8")


def _special_ids(metadata: Mapping[str, Any], model: str, rows: int) -> dict[str, int]:
    ids = {name: number for name, number in OF_SENTENCEPIECE.items() if model == "llama" and number < rows}
    for name in (*SPECIAL, "eot", "eom"):
        key = f"{GGML}{name}_token_id"
        number = _value(metadata, key, int)
        if number is not None and not 0 <= number < rows:
            raise UsageError(f"{key} = {number}, but there are {rows} tokens: ids are below {rows}")
        if number is not None:
            ids[name] = number
    return ids


def _byte_level(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """A tokenizer of the kind that GPT-2 introduced, and whether a text begins with BOS by default."""
    rule = pre_tokenizer_of(_value(metadata, PRE, str))
    if _value(metadata, GGML + "add_space_prefix", bool):
        logger.warning("%sadd_space_prefix is ignored, as by llama.cpp: a text begins as it is", GGML)
    known = {token: number for number, token in enumerate(vocabulary.tokens)}
    key = GGML + "merges"
    merges: dict[tuple[str, str], None] = {}  # of equal ones the first counts, as in llama.cpp
    for number, merge in enumerate(_list(metadata, key, str)):
        left, _, right = merge.partition(" ")
        if missing := [token for token in (left, right, left + right) if token not in known]:
            raise UsageError(f"{key}[{number}] = {merge!r:.80} needs {missing[0]!r:.80}, which is not a token")
        merges[left, right] = None
    tokenizer = Tokenizer(BPE(known, list(merges), ignore_merges=rule.ignore_merges))
    tokenizer.normalizer, tokenizer.pre_tokenizer = rule.normalizer, rule.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.add_bos


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """A tokenizer as in LLaMA 1 and 2, in the form that their tokenizer.json has; a text begins with BOS by default."""
    for key in (GGML + "remove_extra_whitespaces", GGML + "precompiled_charsmap"):
        if metadata.get(key):
            raise UsageError(f"{key}: tokenizers that normalize texts cannot be converted")
    found = {vocabulary.tokens[number] for number in vocabulary.ids(BYTE)}
    if found and (wrong := sorted(found ^ BYTES)):
        what = "a byte token is missing" if wrong[0] in BYTES else "not a byte"
        raise UsageError(f"{GGML}tokens: {wrong[0]!r:.80}: {what}, expected <0x00> to <0xFF>")
    known = {token: number for number, token in enumerate(vocabulary.tokens)}
    merges = _merges(vocabulary, _list(metadata, GGML + "scores", float, len(vocabulary.tokens)))
    unknown = vocabulary.name("unknown")
    tokenizer = Tokenizer(BPE(known, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bool(found)))
    prefix = _value(metadata, GGML + "add_space_prefix", bool) is not False
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes up a third one, highest score of the latter first.

    Equal scores are ordered as in transformers' conversion, and so in LLaMA 2's tokenizer.json.
    """
    for number, score in enumerate(scores):
        if not math.isfinite(score):
            raise UsageError(f"{GGML}scores[{number}] must be a finite number, got {score}")
    # A padding token, of type unused, is never the result.
    usable = {vocabulary.tokens[number]: number for number in vocabulary.ids(NORMAL, USER_DEFINED)}
    lengths = sorted({len(token) for token in usable})  # a hostile token of 10⁶ characters is not cut 10⁶ times
    pairs = []
    for token, number in usable.items():
        for cut in lengths:
            if cut >= len(token):
                break
            left, right = usable.get(token[:cut]), usable.get(token[cut:])
            if left is not None and right is not None:
                pairs.append((-scores[number], number, left, right))
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for *_, left, right in sorted(pairs)]


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Make the tokens that a text may contain by name match whole, before it is split or normalized."""
    numbers = vocabulary.ids(UNKNOWN, CONTROL, USER_DEFINED)
    kinds = [(vocabulary.tokens[number], vocabulary.types[number] != USER_DEFINED) for number in numbers]
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in kinds if token])


def _post_processor(metadata: Mapping[str, Any], vocabulary: Vocabulary, add_bos: bool) -> Any:
    """What puts BOS in front of a text and EOS after it, as the file says; None if neither."""
    used = {}
    for name, default in (("bos", add_bos), ("eos", False)):
        stated = _value(metadata, f"{GGML}add_{name}_token", bool)
        if default if stated is None else stated:
            token = vocabulary.name(name)
            if not token:
                raise UsageError(f"texts need the token that {GGML}{name}_token_id names, which is missing or empty")
            used[name] = (token, vocabulary.special[name])
    if not used:
        return None
    first, last = ([used[name][0]] if name in used else [] for name in ("bos", "eos"))
    pair = [*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)]
    return processors.TemplateProcessing([*first, "$A", *last], pair, list(used.values()))


def _settings(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer_config.json. BOS and EOS around a text are in tokenizer.json."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, short in SPECIAL.items():
        token = vocabulary.name(name)
        if not token:
            continue
        if vocabulary.types[vocabulary.special[name]] in (NORMAL, UNUSED, BYTE):
            # transformers would cut texts at it, and leave it out of answers: often it is token 0, "!", for padding.
            logger.warning("%s%s_token_id names %r, an ordinary token: it is not used as such", GGML, name, token)
            continue
        settings[f"{short}_token"] = token
    return settings


def _generation(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """generation_config.json: the ids that end a text or a turn."""
    named = [vocabulary.special[name] for name in ("eos", "eot", "eom") if name in vocabulary.special]
    turns = [number for number in vocabulary.ids(CONTROL) if vocabulary.tokens[number] in ENDS_OF_TURNS]
    ends = list(dict.fromkeys([*named, *turns]))
    values = {"bos_token_id": vocabulary.special.get("bos"), "eos_token_id": ends or None}
    return {key: value for key, value in values.items() if value is not None}


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The files with chat templates: the default one, and those that have names."""
    files = {}
    for key in metadata:
        if key != TEMPLATE and not key.startswith(TEMPLATE + "."):
            continue
        name = key[len(TEMPLATE) + 1 :]
        if key != TEMPLATE and not re.fullmatch(r"(?!default$)[A-Za-z0-9_-]+", name):
            what = "the name of a chat template must consist of letters, digits, _ and -, and not be default"
            raise UsageError(f"{key!r:.120}: {what}")
        text = _value(metadata, key, str)
        _check_text(key, [text])
        files[f"additional_chat_templates/{name}.jinja" if name else "chat_template.jinja"] = text
    return files
