"""convert(): a checkpoint with other rope settings, cast or quantized, as an MLX folder."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_resonance import __version__
from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.errors import MissingFileError, UsageError, check_option
from mlx_resonance.files import user_path
from mlx_resonance.inspection import Training, training_of
from mlx_resonance.rope_config import RopeConfig
from mlx_resonance.scaling import largest_shift, new_rope
from mlx_resonance.sizes import parse_size
from mlx_resonance.storage import check_new_folder, sha256
from mlx_resonance.tokenizer import TOKENIZERS, copy_tokenizer, has_tokenizer

from .card import read_card, write_card
from .journal import NAME as RECORD
from .journal import Journal, workspace
from .plan import Plan, disk_needed, make_plan
from .quantization import check_arguments
from .report import quantization_report, tokens_of
from .source import Source, mlx_folder, open_source
from .verify import DTYPES, VerificationError, read_finished_record, rope_table, verify_result
from .weights import Progress, write_weights

UNHASHED = {RECORD, "README.md"}  # one holds the hashes, the other is for people to edit
DOWNLOADS = "source"  # in OUT.partial: weight files, deleted as they are consumed

logger = logging.getLogger("mlx_resonance")


@dataclass(frozen=True)
class Conversion:
    """What `convert` made, or would make.

    Args:
        path: the MLX folder.
        rope: its rope settings; for a portable checkpoint those that its `longrope` stands for.
        largest_shift: the largest change of a wavelength by rounding, as a part of that wavelength; 0 where the source
            was already resonant or nothing was rounded.
        sizes: bytes of each weight file; after a dry run, of its tensors.
        memory, disk, download: bytes of memory and of disk that it takes, and of the downloads that are on the disk at
            once besides; estimates.
        left_out: tensors of the source that the result does not have, and why nothing is lost without them.
        quantization_error: of each quantized tensor, the root mean square of its error over that of its values.
        quant_report: what quantization costs on a text, if it was asked for.
        checks: what `verify` found, if it was asked for.
    """

    path: Path
    rope: RopeConfig
    largest_shift: float
    sizes: dict[str, int]
    memory: int
    disk: int
    download: int
    left_out: dict[str, str]
    quantization_error: dict[str, float | None]
    quant_report: dict[str, Any] | None = None
    checks: dict[str, Any] | None = None

    @property
    def weights(self) -> int:
        """Bytes of the weight files."""
        return sum(self.sizes.values())

    @property
    def files(self) -> int:
        """Number of the weight files."""
        return len(self.sizes)


def convert(
    src: str | Path,
    mlx_path: str | Path,
    *,
    rope: str | None = None,
    factor: float | None = None,
    original_max_position_embeddings: int | None = None,
    resonance: bool = True,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str | None = None,
    revision: str | None = None,
    file: str | None = None,
    max_shard_size: int | str = "5GB",
    portable: bool = False,
    tokenizer: bool = True,
    allow_nan: bool = False,
    consume_source: bool = False,
    verify: bool = False,
    quant_report: str | Path | None = None,
    dry_run: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a Hugging Face checkpoint to an MLX folder.

    The work is done in `mlx_path`.partial, one weight file at a time, which is all that memory holds; the last step is
    a rename. The same call resumes a run that was killed or failed.

    Args:
        src: a folder with config.json and safetensors or PyTorch's .bin files, a .gguf file or a folder with one, or
            the id of a model on the Hugging Face hub.
        mlx_path: the folder to write; it must not exist.
        rope: a new scaling (`linear`, `ntk`, `dynamic`, `yarn`); None keeps the checkpoint's.
        factor: how many times the context grows; goes with `rope`.
        original_max_position_embeddings: tokens of context before scaling; None for what config.json says.
        resonance: round the wavelengths to whole numbers of tokens.
        dtype: float32, float16 or bfloat16 for what is not quantized; None keeps every tensor's own, and is float16 for
            GGUF.
        quantize: quantize the weights as mlx-lm does, whose names the `q_…` arguments have.
        q_bits, q_group_size, q_mode: None for the mode's defaults.
        quant_predicate: one of mlx-lm's mixed recipes, such as `mixed_4_6`.
        revision: branch, tag or commit on the hub.
        file: the name of a GGUF file in the folder or repository, of a split one that of any part.
        max_shard_size: bytes, or a number with KB, MB or GB; no weight file is larger unless one tensor is.
        portable: write the rope settings as `longrope`, which stock transformers and mlx-lm run; not with `quantize`.
        tokenizer: refuse a source that has no tokenizer.
        allow_nan: convert a tensor whose elements are all NaN.
        consume_source: download each weight file of the hub when it is needed, and delete it when all that was made of
            it is on the disk. Your folders and the hub's cache stay as they are.
        verify: check the result as `verify` does before it gets its name.
        quant_report: a text file; the record gets the quantized model's perplexity on it, and its divergence from the
            source. At most one layer is in memory.
        dry_run: write nothing; of a model on the hub only the headers of the weight files are fetched.
        restart: delete what an earlier run has left in `mlx_path`.partial.
        progress: called with the bytes of weights done and in all.

    Returns:
        What was made.

    Raises:
        MissingFileError: no such source, or a file of it is missing.
        FileInTheWayError: `mlx_path` exists, another run is writing it, or `mlx_path`.partial is not a conversion's.
        OSError: the disk is full, or the connection broke.
        UsageError: an argument or a file of the source is wrong, or an earlier run had other ones.
        VerificationError: the result is not what it should be; it stays in `mlx_path`.partial.
    """
    target = user_path(mlx_path)
    check_new_folder(target)
    shard_bytes = parse_size(max_shard_size, "max_shard_size") if isinstance(max_shard_size, str) else max_shard_size
    check_option("max_shard_size", shard_bytes > 0, "positive", shard_bytes)
    check_arguments(quantize, q_bits, q_group_size, q_mode, quant_predicate)
    check_option("dtype", dtype in (None, *DTYPES), f"one of {', '.join(DTYPES)}", repr(dtype))
    if portable and quantize:
        raise UsageError("transformers does not read mlx-lm's quantization", option="portable")
    if quant_report is not None and not quantize:
        raise UsageError("the report is on what quantization costs", remedies=[{"quantize": True}])
    for reader, wanted in (("verification", verify), ("the report", quant_report is not None)):
        if wanted and consume_source:
            why = "reads the source again: it cannot be deleted meanwhile"
            raise UsageError(f"{reader} {why}", option="consume_source")

    partial = target.with_name(target.name + ".partial")
    downloads = partial / DOWNLOADS if consume_source or dry_run else None
    source = open_source(src, revision, downloads, rescaled=rope is not None, file=file)
    checkpoint, dtype = source.checkpoint, dtype or source.dtype
    if consume_source and source.commit is None:
        kind = "folder" if user_path(src).is_dir() else "file"
        raise UsageError(f"{src} is a {kind}: only what was downloaded is deleted", option="consume_source")
    if tokenizer and not has_tokenizer(checkpoint.folder):
        names = ", ".join(TOKENIZERS)
        raise MissingFileError(f"{src} has no tokenizer, expected one of {names}", remedies=[{"tokenizer": False}])
    ids = None if quant_report is None else tokens_of(user_path(quant_report), checkpoint)
    card = read_card(checkpoint.folder)
    after = new_rope(checkpoint.rope, rope, factor, original_max_position_embeddings, resonance)
    quantization = (q_bits, q_group_size, q_mode, quant_predicate) if quantize else None
    plan = make_plan(source, after, portable=portable, dtype=dtype, quantize=quantization, shard_bytes=shard_bytes)
    shift = 0.0 if checkpoint.rope.is_resonant else largest_shift(after)
    disk, download = disk_needed(plan, source, consume_source)
    made = Conversion(target, after, shift, plan.sizes, plan.memory, disk, download, source.left_out, {})
    if dry_run:
        return made

    settings = {
        "rope": plan.rope.to_hf("4"), "dtype": dtype, "quantization": plan.config.get("quantization"),
        "query_key_factor": plan.factor, "max_shard_size": shard_bytes, "files": plan.digest, "versions": _versions(),
    }  # fmt: skip
    kept = DOWNLOADS if consume_source else None
    with workspace(target, source.identity(), settings, restart, keep=kept) as journal:
        write_weights(source, plan, journal, allow_nan, progress)
        if kept is not None and (journal.folder / kept).exists():
            shutil.rmtree(journal.folder / kept)
        _write_small_files(source, plan, journal.folder, src, card)
        _record(journal, plan, checkpoint)
        errors = {k: v for entry in journal.finished.values() for k, v in entry.get("quantization_error", {}).items()}
        sizes = {name: entry["bytes"] for name, entry in sorted(journal.finished.items())}
        made, result = replace(made, sizes=sizes, quantization_error=errors), None
        if ids is not None:
            result = mlx_folder(journal.folder)
            made = replace(made, quant_report=quantization_report(result, source, ids))
            journal.record["quant_report"] = made.quant_report
        if verify:
            made = replace(made, checks=_verify(journal, source, result, progress))
        journal.write()
    return made


def _record(journal: Journal, plan: Plan, source: Checkpoint) -> None:
    """Put the wavelengths, those of the source's training and the hashes of the small files into the record."""
    folder = journal.folder
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    small = sorted(names - UNHASHED - set(journal.finished))
    journal.record |= {"rope": rope_table(plan.rope), "files": {name: sha256(folder / name) for name in small}}
    journal.record |= _training(plan, source)
    journal.write()


def _training(plan: Plan, source: Checkpoint) -> dict[str, Any]:
    """What the source was trained with; in a chain of conversions, what the record of the first one says."""
    training = training_of(source.folder, source.rope)
    if training.on_record:
        return training.to_record()
    if source.rope.is_resonant or (source.folder / RECORD).is_file():  # was made by us: its record is lost
        return {}
    # LongRoPE's authors fine-tune on the whole context, with the factors of long texts.
    of_context = source.rope.base_type == "longrope"
    return Training(source.rope, source.rope.context_length if of_context else plan.rope.trained_length).to_record()


def _verify(journal: Journal, source: Source, result: Source | None, progress: Progress | None) -> dict[str, Any]:
    """What verification finds, which goes into the record. Raises VerificationError where it finds a problem."""
    record = read_finished_record(journal.folder)
    checks = verify_result(journal.folder, record, source, result=result, progress=progress)
    if checks.problems:
        journal.record["refused"] = checks.problems[0]  # no later run may publish it
        journal.write()
        raise VerificationError(f"{journal.folder} is not right: {checks.problems[0]}")
    journal.record["checks"] = checks.to_dict()
    return checks.to_dict()


def _write_small_files(source: Source, plan: Plan, folder: Path, src: str | Path, card: dict[str, Any]) -> None:
    """Write config.json, tokenizer and card."""
    text = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    copy_tokenizer(source.checkpoint.folder, folder)
    if not has_tokenizer(folder):
        logger.warning("%s has no tokenizer: the converted model takes token ids only", src)
    write_card(folder, source.checkpoint.name, source.commit is not None, card, plan.rope)


def _versions() -> dict[str, str]:
    return {"mlx_resonance": __version__, "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
