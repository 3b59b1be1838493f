"""A checkpoint's tokenizer: which files it consists of, how to load it, and token ids that the model has no row for."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import AutoConfig

from . import _mlx_lm
from ._mlx_lm import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    set_detokenizer,
    wrapped,
)
from .errors import MissingFileError, UsageError
from .files import MAX_INDEX, file_of, read_json

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
DECISIVE = {
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "generation_config.json", "chat_template.json",
}  # fmt: skip
TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# On for a tokenizer.model in transformers 4, unless tokenizer_config.json turns them off; transformers 5 puts no BOS in
# front, which LLaMA 1 and 2 were trained with.
OF_SENTENCEPIECE = ("add_bos_token", "legacy")
READS_SENTENCEPIECE = (5, 24)  # of transformers 5, the first that merges by the scores in tokenizer.model
NO_CODE = {"trust_remote_code": False}  # transformers would ask whether to run it

logger = logging.getLogger("mlx_resonance")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def tokenizer_files(folder: Path) -> list[Path]:
    """Tokenizer, chat templates and generation defaults. Raises UsageError for a link out of the folder."""
    patterns = [*TOKENIZER_PATTERNS, "additional_chat_templates/*"]
    names = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    names -= {"config.json", "conversion.json"}  # the latter records how other weights were made
    names = {name for name in names if not name.endswith(".index.json") and (folder / name).is_file()}
    return [file_of(folder, name) for name in sorted(names)]


def decisive_files(folder: Path) -> list[Path]:
    """Those of `tokenizer_files` that decide token ids and prompts: a note in the folder is not one of them."""
    return [path for path in tokenizer_files(folder) if path.suffix == ".jinja" or path.name in DECISIVE]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy `tokenizer_files` to another folder."""
    for file in tokenizer_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


class Tokenizer(TokenizerWrapper):  # type: ignore[misc]  # mypy does not follow mlx-lm
    """mlx-lm's wrapper; it refuses tokens that the model has no row for, and says so if a chat template fails."""

    _rows: int
    _without_row: Mapping[int, str]

    @property
    def without_row(self) -> Mapping[int, str]:
        """The tokens, by id, that the model has no row for."""
        return self._without_row

    @property
    def bos_token_id(self) -> int | None:
        """For those who put it in front of ids. Raises UsageError like `encode`."""
        return self._known([wrapped(self).bos_token_id])[0]

    @property
    def eos_token_id(self) -> int | None:
        """For those who append it to ids. Raises UsageError like `encode`."""
        return self._known([wrapped(self).eos_token_id])[0]

    def encode(self, *args: Any, **options: Any) -> list[int]:
        """transformers' method. Raises UsageError for a token that the model has no row for."""
        return self._known(wrapped(self).encode(*args, **options))

    def apply_chat_template(self, *args: Any, tokenize: bool = True, **options: Any) -> Any:
        """mlx-lm's method, with one BOS where the template and the text begin with one each.

        Raises:
            UsageError: there is no template or it fails, or there is a token that the model has no row for.
        """
        if not self.has_chat_template:
            raise UsageError("the tokenizer has no chat template")
        try:
            result = super().apply_chat_template(*args, tokenize=tokenize, **options)
        except Exception as error:  # a template is a program
            raise template_error(f"fails: {type(error).__name__}: {error}") from None
        if not tokenize:
            return result
        if len(self._known(result)) > 1 and result[0] == result[1] == wrapped(self).bos_token_id:
            return result[1:]
        return result

    def _known(self, ids: list[Any]) -> list[Any]:
        if not self._without_row.keys().isdisjoint(ids):
            number = next(number for number in ids if number in self._without_row)
            raise no_row(number, self._without_row[number], self._rows)
        return ids


def template_error(what: str) -> UsageError:
    """An error of the tokenizer's chat template, with the way to do without it."""
    way = {"ignore_chat_template": True}
    return UsageError(f"the tokenizer's chat template {what}", option="apply_chat_template", remedies=[way])


def no_row(number: Any, token: str | None, rows: int) -> UsageError:
    """The error for a token id outside the model's vocabulary; `token` is its text, if it has one."""
    name = f"token {token!r:.80} has id {number}" if token is not None else f"there is no token id {number!r:.80}"
    return UsageError(f"{name}: the model's vocabulary has {rows} ids, from 0 on")


def check_ids(tokenizer: TokenizerWrapper, ids: Sequence[Any], rows: int) -> None:
    """Raise UsageError if one of the ids is not in [0, rows), the model's vocabulary."""
    for number in ids:
        if not isinstance(number, Integral) or not 0 <= int(number) < rows:
            token = next((token for token, known in tokenizer.get_vocab().items() if known == number), None)
            raise no_row(number, token, rows)


def load_tokenizer(
    folder: Path, config: Mapping[str, Any], options: Mapping[str, Any] = NO_CODE, eos_token_ids: Any = None
) -> TokenizerWrapper:
    """Load the tokenizer of a folder, in mlx-lm's wrapper.

    Args:
        folder: the checkpoint's.
        config: config.json; its `vocab_size` is the number of the model's rows.
        options: for transformers' `from_pretrained`.
        eos_token_ids: ids that end a text; None for what the checkpoint says.

    Returns:
        The tokenizer; the token ids of a text are those of tokenizer.json, if there is one.

    Raises:
        MissingFileError: there is none.
        UsageError: it cannot be loaded.
    """
    if not has_tokenizer(folder):
        raise MissingFileError(f"{folder} has no tokenizer: expected one of {', '.join(TOKENIZERS)}")
    eos = end_tokens(folder, config) if eos_token_ids is None else eos_token_ids
    settings = {name: read_json(folder / name, MAX_INDEX) for name in SETTINGS if (folder / name).is_file()}
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        _check_packages(folder / "tokenizer.model")
        stated = settings.get(SETTINGS[0], {})
        options = {key: True for key in OF_SENTENCEPIECE if stated.get(key) is None} | dict(options)
    # Of config.json, transformers would use only these two, but check all of it: its rope type, for one.
    model = AutoConfig.for_model(config["model_type"], tokenizer_class=config.get("tokenizer_class"))
    try:
        wrapper = _read(folder, settings, {"config": model, **options}, eos)
        if (folder / "tokenizer.json").is_file():
            _use_file(wrapper, folder / "tokenizer.json", settings)
        elif (folder / "tokenizer.model").is_file() and b'"ByteFallback"' in _state(wrapper):
            # mlx-lm looks for the kind of a decoder in tokenizer.json. The one it takes without repeats bytes, and
            # drops a space at the beginning of each line.
            set_detokenizer(wrapper, SPMStreamingDetokenizer)
        _decode_bytes(wrapper)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UsageError(f"the tokenizer of {folder} cannot be loaded: {error}") from None
    rows = config["vocab_size"]
    without_row = {number: token for token, number in wrapper.get_vocab().items() if number >= rows}
    wrapper.__class__ = Tokenizer
    wrapper._rows, wrapper._without_row = rows, without_row
    ends = {*wrapper.eos_token_ids, wrapped(wrapper).eos_token_id}  # mlx-lm 0.31 leaves out the latter
    wrapper.eos_token_ids = [number for number in ends if number is not None and number < rows]
    if without_row:
        first = ", ".join(f"{token!r:.80} ({number})" for number, token in sorted(without_row.items())[:5])
        more = f" and {len(without_row) - 5} more" if len(without_row) > 5 else ""
        what = "texts with these tokens are refused, since the model has no rows for them"
        logger.warning("%s: %s: %s%s; config.json says vocab_size = %d", folder, what, first, more, rows)
    return wrapper


def end_tokens(folder: Path, config: Mapping[str, Any]) -> list[int] | None:
    """The ids that end a text: `eos_token_id` of generation_config.json or else of config.json; None if neither has it.

    Raises:
        UsageError: one is not the id of a token in the vocabulary.
    """
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    for name, source in ((path.name, generation), ("config.json", config)):
        value, rows = source.get("eos_token_id"), config["vocab_size"]
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(number) is not int or not 0 <= number < rows for number in ids):
            raise UsageError(f"eos_token_id in {name} must be one or more ids in [0, {rows}), got {value!r:.80}")
        if ids:
            return ids
    return None


def _check_packages(path: Path) -> None:
    """Raise UsageError if this tokenizer.model, which is sentencepiece's or tiktoken's, cannot be read.

    A package that reads it is missing, or transformers would give a text other token ids than sentencepiece does.
    """
    from transformers import __version__ as version
    from transformers.utils import is_protobuf_available, is_sentencepiece_available, is_tiktoken_available

    with path.open("rb") as file:
        is_text = file.read(1).isalnum()  # base64; sentencepiece's first byte is the number of a field
    needed = {"tiktoken": is_tiktoken_available()} if is_text else {}
    needed = needed or {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    if missing := [package for package, is_there in needed.items() if not is_there]:
        raise UsageError(f"{path} cannot be read without {' and '.join(missing)}: install {' '.join(missing)}")
    if not is_text and tuple(map(int, version.split(".")[:2])) < READS_SENTENCEPIECE:
        raise UsageError(
            f"{path} has no tokenizer.json beside it, and transformers {version} reads it wrongly: install "
            "transformers 5.24 or later, which needs Python 3.11"
        )


def _read(folder: Path, settings: Mapping[str, dict[str, Any]], options: dict[str, Any], eos: Any) -> TokenizerWrapper:
    """What mlx-lm makes of a folder, or of a copy with corrected settings: transformers reads nothing but files."""
    load = _mlx_lm.original("load_tokenizer")
    right = {name: _corrected(values) for name, values in settings.items()}
    if right == settings:
        return load(folder, options, eos_token_ids=eos)
    with tempfile.TemporaryDirectory() as name:
        for path in [folder / "config.json", *tokenizer_files(folder)]:
            link = Path(name) / path.relative_to(folder)
            link.parent.mkdir(exist_ok=True)
            if link.name in right:
                link.write_text(json.dumps(right[link.name]), encoding="utf-8")
            elif path.is_file():
                link.symlink_to(path.resolve())
        return load(Path(name), options, eos_token_ids=eos)


def _corrected(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without special tokens that are empty; with a list of chat templates only if it is one.

    transformers looks up an empty token as an unknown one, which may be empty too, and so on without end.
    """
    right = {}
    for key, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if not (key.endswith("_token") and content == ""):
            right[key] = value
    templates = right.get("chat_template")
    if isinstance(templates, list) and not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and "template" in entry for entry in templates
    ):
        right["chat_template"] = {"default": templates}  # an error only where it is used
    return right


def _use_file(wrapper: TokenizerWrapper, path: Path, settings: Mapping[str, Any]) -> None:
    """Make the token ids those of tokenizer.json, as in transformers 4.

    Most tokenizer classes of transformers 5 take only the vocabulary from the file. They split texts by rules of their
    own, and add tokens of their own: here, only those that the settings name are added.
    """
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    tokenizer = wrapped(wrapper)
    rebuilt = isinstance(tokenizer, PreTrainedTokenizerFast) and "__init__" in vars(type(tokenizer))
    if not rebuilt or type(tokenizer) is PreTrainedTokenizerFast:
        return
    backend, named, before = Backend.from_file(str(path)), json.dumps(settings), tokenizer.added_tokens_encoder
    backend.post_processor = tokenizer.backend_tokenizer.post_processor
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        if backend.token_to_id(token.content) is None and json.dumps(token.content) in named:
            backend.add_tokens([token])
    tokenizer._tokenizer = backend
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(tokenizer, name, None)
        if isinstance(token, str) and backend.token_to_id(token) is None:
            setattr(tokenizer, name, None)
    if not tokenizer.added_tokens_encoder.items() <= before.items():  # mlx-lm's detokenizer lists the tokens
        set_detokenizer(wrapper, BPEStreamingDetokenizer if _encodes_bytes(backend) else NaiveStreamingDetokenizer)


def _decode_bytes(wrapper: TokenizerWrapper) -> None:
    """Give a tokenizer that encodes bytes as letters the decoder that undoes it, if it has another or none."""
    from tokenizers import decoders

    backend = getattr(wrapped(wrapper), "backend_tokenizer", None)
    if backend is not None and _encodes_bytes(backend) and not _is_byte_level(backend.decoder):
        backend.decoder = decoders.ByteLevel()
        set_detokenizer(wrapper, BPEStreamingDetokenizer)


def _state(wrapper: TokenizerWrapper) -> bytes:
    backend = getattr(wrapped(wrapper), "backend_tokenizer", None)
    return b"" if backend is None or backend.decoder is None else bytes(backend.decoder.__getstate__())


def _encodes_bytes(backend: Any) -> bool:
    """Whether a tokenizers.Tokenizer writes bytes as letters, such as Ġ for a space."""
    return _is_byte_level(backend.normalizer) or _is_byte_level(backend.pre_tokenizer)


def _is_byte_level(part: Any) -> bool:
    return part is not None and b'"ByteLevel"' in part.__getstate__()
