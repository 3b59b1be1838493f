"""verify(): reads every tensor of a converted checkpoint again and compares it with its source, and more."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_resonance.errors import UsageError
from mlx_resonance.files import WEIGHTS, user_path
from mlx_resonance.rope_config import RopeConfig
from mlx_resonance.storage import sha256
from mlx_resonance.tokenizer import TOKENIZER_PATTERNS, has_tokenizer

import mlx.core as mx
import numpy as np

from .compare import compare
from .journal import NAME as RECORD
from .journal import read_record
from .plan import check_tensors
from .portable import scaled_by
from .quantization import arguments_of, group_parts
from .reference import compare_logits
from .source import Source, cached_source, mlx_folder, open_source
from .weights import Progress

DTYPES = ("float32", "float16", "bfloat16")
COPIED = "copied"
CLOSE = 5e-3  # of the largest logit: transformers' own error with float32 angles


class VerificationError(Exception):
    """A converted checkpoint is not what it should be."""


@dataclass
class Verification:
    """What `verify` found.

    Args:
        path: the checkpoint.
        source: what its tensors were compared with; None where they were only read.
        files: the number of weight and other files whose SHA-256 is as recorded.
        tensors: the number of the model's tensors; a quantized one counts once.
        exact: the number of them whose elements all equal the source's.
        nan, inf: the number of such elements.
        errors: of each of the other tensors, the root mean square of the error over that of the values; None where one
            is not finite.
        left_out: the tensors of the source that the result does not have, and why nothing is lost without them.
        source_tensors: what became of each tensor of the source: copied, rounded to another type, quantized, merged
            into another, or left out and why.
        logits: against transformers: `error`, the largest as a part of the largest logit, over `tokens` and `layers`;
            or why they were not compared.
        problems: one line for each fault; empty if all is well.
    """

    path: Path
    source: str | None
    files: int = 0
    tensors: int = 0
    exact: int = 0
    nan: int = 0
    inf: int = 0
    errors: dict[str, float | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    source_tensors: dict[str, str] = field(default_factory=dict)
    logits: dict[str, Any] | str = ""
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without the path, which changes when the folder gets its name."""
        return {key: value for key, value in vars(self).items() if key != "path"}


def verify(
    path: str | Path,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    file: str | None = None,
    logits: bool = True,
    progress: Progress | None = None,
) -> Verification:
    """Check a converted checkpoint: hashes, shapes, angles, every tensor, and logits where torch is installed.

    Args:
        path: the folder that `convert` has written.
        source: what it was made from, to compare every tensor with; None for the commit on record if it is in the hub's
            cache, otherwise for no comparison.
        revision: of a source on the hub; None for the commit on record, or another repository's latest.
        file: the name of the source's GGUF file among several; None for the one on record, if it is that repository's.
        logits: compare them, too, which takes seconds.
        progress: called with the bytes of tensors done and in all.

    Returns:
        What was found; `problems` is empty if all is well.

    Raises:
        MissingFileError: no such folder, or `convert` has not made it; or the source is missing.
        UsageError: a file of the source cannot be right, or one of its options is given without it.
    """
    folder = user_path(path)
    record = read_finished_record(folder)
    name, commit = record["source"].get("name"), record["source"].get("commit")
    on_record = record["source"].get("file") if isinstance(commit, str) else None
    if not isinstance(on_record, str):
        on_record = None
    opened = None
    for option, value in (("revision", revision), ("file", file)):
        if source is None and value is not None:
            raise UsageError(f"{option} = {value} is of a source, which is not given", remedies=[{"source": None}])
    if source is not None:
        if str(source) == name and not user_path(source).exists():  # another repository has other commits and files
            revision, file = revision or commit, file or on_record
        opened = open_source(source, revision, rescaled=True, file=file)
    elif isinstance(name, str) and isinstance(commit, str):
        opened = cached_source(name, commit, on_record)
    return verify_result(folder, record, opened, logits=logits, progress=progress)


def verify_result(
    folder: Path,
    record: dict[str, Any],
    source: Source | None,
    *,
    result: Source | None = None,
    logits: bool = True,
    progress: Progress | None = None,
) -> Verification:
    """`verify` with a record and a source that are read already, and perhaps the folder. Raises as `verify`."""
    found = Verification(folder, None if source is None else source.checkpoint.name)
    _check_files(folder, record, found)
    try:
        result = result or mlx_folder(folder)
        model = check_tensors(result.checkpoint)
        _check_rope(result.checkpoint.rope, record["rope"], found)
        if has_tokenizer(folder):
            result.checkpoint.tokenizer  # noqa: B018
    except (ValueError, FileNotFoundError) as error:  # there is no model to look into
        found.problems.append(" ".join(str(error).split()))
        return found
    scaled = scaled_by(result.stored, model.args)
    _check_tensors(result, source, record, found, scaled, progress)
    if source is not None and (problem := source.rope_problem()) is not None:
        found.problems.append(problem)
    if not logits:
        found.logits = "not asked for"
        return found
    try:
        found.logits = "the tensors are wrong" if found.problems else compare_logits(result)
    except UsageError as error:
        found.problems.append(error.message)
    if isinstance(found.logits, dict) and not found.logits["error"] <= CLOSE:
        found.problems.append(f"the logits are off those of transformers by {found.logits['error']:.1e} of the largest")
    return found


def rope_table(rope: RopeConfig) -> dict[str, Any]:
    """The wavelengths (tokens per turn) and the attention scale within the context before scaling, for the record."""
    frequencies = rope.frequencies()
    return {"wavelengths": frequencies.wavelengths.tolist(), "attention_scale": frequencies.attention_scale}


def read_finished_record(folder: Path) -> dict[str, Any]:
    """The record of a finished conversion. Raises as `read_record`, and where only an unfinished one is like this."""
    record = read_record(folder)
    files, rope, settings = record.get("files"), record.get("rope"), record["settings"]
    unfinished = UsageError(f"{folder / RECORD} is not the record of a finished conversion")
    if not isinstance(files, dict) or not isinstance(rope, dict) or not isinstance(rope.get("wavelengths"), list):
        raise unfinished
    numbers = [*rope["wavelengths"], rope.get("attention_scale"), settings.get("query_key_factor")]
    right = all(type(number) in (int, float) for number in numbers)
    if not right or settings.get("dtype") not in (None, *DTYPES):
        raise unfinished
    for name, digest in files.items():
        parts = PurePosixPath(name).parts
        if len(parts) not in (1, 2) or not {"..", "/"}.isdisjoint(parts) or not isinstance(digest, str):
            raise UsageError(f"{folder / RECORD} names {name!r}: expected files of the same folder")
    return record


def _check_files(folder: Path, record: dict[str, Any], found: Verification) -> None:
    expected = {name: entry["sha256"] for name, entry in record["weights"].items()} | record["files"]
    for name, digest in expected.items():
        if not (folder / name).is_file():
            found.problems.append(f"{name} is missing")
        elif sha256(folder / name) != digest:
            found.problems.append(f"{name} has changed: its SHA-256 is not the recorded one")
        else:
            found.files += 1
    for path in sorted({path for pattern in (WEIGHTS, *TOKENIZER_PATTERNS) for path in folder.glob(pattern)}):
        if path.name not in expected and path.name != RECORD:
            found.problems.append(f"{path.name} is not on record")


def _check_rope(rope: RopeConfig, table: dict[str, Any], found: Verification) -> None:
    now = rope_table(rope)
    same = len(table.get("wavelengths", ())) == len(now["wavelengths"]) and all(
        np.allclose(table[key], now[key], rtol=1e-9, atol=0) for key in now
    )
    if not same:
        found.problems.append(f"config.json has other wavelengths ({rope.rope_type}) than those on record")


def _check_tensors(
    result: Source, source: Source | None, record: dict[str, Any], found: Verification, scaled: Collection[str],
    progress: Progress | None,
) -> None:  # fmt: skip
    """Read every tensor, and compare it with the source's. The names of both are those in the files' headers.

    `scaled`: those that the record's factor of queries and keys is for.
    """
    settings, names = record["settings"], list(result.stored)
    was_quantized = source is not None and source.checkpoint.config.get("quantization")
    quantized = arguments_of(names, result.checkpoint.config.get("quantization"))
    groups = {name: [name] for name in names} if was_quantized else group_parts(names, quantized)
    made = _fates(source, groups, found) if source is not None else {}
    dtype = None if settings.get("dtype") is None else getattr(mx, str(settings["dtype"]))
    total, done = sum(info.nbytes for info in result.stored.values()), 0
    for name, parts in groups.items():
        arrays = [result.read(part) for part in parts]
        factor = settings.get("query_key_factor", 1.0) if name in scaled else 1.0
        arguments = quantized.get(name) if len(parts) > 1 else None
        found.tensors += 1
        for stored in made.get(name, [None]):
            original = None if source is None or stored is None else source.read_again(stored)
            if original is not None and arguments is None and original.shape != arrays[0].shape:
                found.problems.append(f"{name} has shape {arrays[0].shape}, in the source {original.shape}")
                original = None
            same = compare(arrays, arguments, original, factor, dtype)
            if same.wrong:
                found.problems.append(f"{name}: {same.wrong} elements are further from the source than rounding may be")
            if stored is None or stored == made[name][0]:
                found.exact += original is not None and same.exact
                found.nan, found.inf = found.nan + same.nan, found.inf + same.inf
                if not same.exact:
                    found.errors[name] = same.error
            if stored is not None and found.source_tensors[stored] == COPIED and not same.exact:
                found.source_tensors[stored] = "quantized" if arguments is not None else "rounded"
            del original
        done += sum(array.nbytes for array in arrays)
        del arrays
        mx.clear_cache()
        if progress is not None:
            progress(done, total)


def _fates(source: Source, groups: Collection[str], found: Verification) -> dict[str, list[str]]:
    """Note what became of every tensor in the source's files, whose headers are read anew.

    Returns:
        By each tensor of the result, those of the source that it is compared with.
    """
    merged = {scale: weight for weight, scale in source.scale_of.items()}
    names = {renamed: name for name, renamed in source.renamed.items()}
    made: dict[str, list[str]] = {}
    for stored in sorted(name for file in source.files for name in file.names()):
        name = names.get(stored, stored)
        if name in groups:
            found.source_tensors[stored] = COPIED if name == stored else f"merged into {name}"
            made.setdefault(name, []).insert(0, stored)
        elif stored in merged:
            found.source_tensors[stored] = f"merged into {merged[stored]}"
        elif (reason := source.left_out.get(stored)) is not None:
            found.source_tensors[stored] = f"left out: {reason}"
            found.left_out[stored] = reason
            if (equal := source.checkpoint.head.left_out.get(stored, "")) in groups:  # it is compared again
                made.setdefault(equal, []).append(stored)
        else:
            found.source_tensors[stored] = "missing"
            found.problems.append(f"{stored} is in the source only")
    for name in sorted(set(groups) - set(made)):
        found.problems.append(f"{name} is in the result only")
    return made
