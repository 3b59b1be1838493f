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
from mlx_resonance.errors import MissingFileError, UsageError
from mlx_resonance.files import user_path
from mlx_resonance.rope_config import RopeConfig
from mlx_resonance.scaling import largest_shift, new_rope
from mlx_resonance.sizes import parse_size
from mlx_resonance.storage import check_new_folder, sha256
from mlx_resonance.tokenizer import TOKENIZERS, copy_tokenizer, has_tokenizer, tokenizer_files

from .card import read_card, write_card
from .journal import NAME as RECORD
from .journal import Journal, fingerprint, workspace
from .plan import Plan, disk_needed, make_plan
from .quantization import check_arguments
from .report import quantization_report, read_text
from .source import Source, open_source
from .verify import DTYPES, VerificationError, rope_table
from .verify import verify as verify_result
from .weights import Progress, write_weights

UNHASHED = {RECORD, "README.md"}  # one holds the hashes, the other is for its reader to write in
DOWNLOADS = "source"  # in OUT.partial: weight files that are deleted as they are consumed

logger = logging.getLogger("mlx_resonance")


@dataclass(frozen=True)
class Conversion:
    """What `convert` made, or would make.

    Args:
        path: the MLX folder.
        rope: its rope settings; for a portable checkpoint those that its `longrope` stands for.
        largest_shift: by how much rounding changed the wavelength that it changed most, as a part of that wavelength;
            0 where the source was already resonant or nothing was rounded.
        sizes: bytes of each weight file; where it is not made yet, of its tensors.
        memory, disk, download: bytes of memory and of disk that it takes, and that are downloaded to be on the disk at
            once besides; estimates.
        quantization_error: of each quantized tensor, the root mean square of its error over that of its values.
        quant_report: what quantization costs on a text, where it was asked for.
        checks: what `verify` found, where it was asked for.
    """

    path: Path
    rope: RopeConfig
    largest_shift: float
    sizes: dict[str, int]
    memory: int
    disk: int
    download: int
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
    max_shard_size: str = "5GB",
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
    """Convert a Hugging Face checkpoint to an MLX folder. The folder appears whole or not at all.

    The work is done in `mlx_path`.partial, a file of weights at a time; no more than one is in memory. A run that was
    killed or failed is gone on with by the same call.

    Args:
        src: a folder with config.json and safetensors or PyTorch's .bin files, or the id of a model on the Hugging
            Face hub.
        mlx_path: the folder to write; it must not exist.
        rope: a new scaling (`linear`, `ntk`, `dynamic`, `yarn`); None keeps that of the checkpoint.
        factor: how many times the context grows; goes with `rope`.
        original_max_position_embeddings: tokens of context before scaling; None for what config.json says.
        resonance: round the wavelengths to whole numbers of tokens.
        dtype: float32, float16 or bfloat16 for what is not quantized; None keeps every tensor's own.
        quantize: quantize the weights as mlx-lm does; the `q_…` arguments are its.
        q_bits, q_group_size, q_mode: None for the mode's defaults.
        quant_predicate: one of mlx-lm's mixed recipes, such as `mixed_4_6`.
        revision: branch, tag or commit on the hub.
        max_shard_size: a number of bytes with KB, MB or GB; no weight file is larger unless one tensor is.
        portable: write the rope settings as `longrope`, which stock transformers and mlx-lm run; not with `quantize`.
        tokenizer: refuse a source that has no tokenizer.
        allow_nan: convert a tensor of nothing but NaN.
        consume_source: download a weight file of the hub when it is needed, and delete it when what was made of it is
            on the disk. Neither a folder nor what is in the hub's cache is touched.
        verify: check the result as `verify` does before it gets its name.
        quant_report: a text file; the perplexity of the quantized model on it, and its divergence from the source, go
            into the record. A layer is in memory at a time.
        dry_run: write nothing; of a model on the hub only the headers of the weight files are fetched.
        restart: drop what an earlier run has left in `mlx_path`.partial.
        progress: called with the bytes of weights done and in all.

    Returns:
        What was made.

    Raises:
        MissingFileError: no such source, or a file of it is missing.
        FileExistsError: `mlx_path` exists, another run is at it, or `mlx_path`.partial is none of ours.
        OSError: the disk is full, or the connection broke.
        UsageError: an argument or a file of the source is wrong, or an earlier run had other ones.
        VerificationError: the result is not what it should be; it stays in `mlx_path`.partial.
    """
    target = user_path(mlx_path)
    check_new_folder(target)
    shard_bytes = parse_size(max_shard_size, "max_shard_size")
    check_arguments(quantize, q_bits, q_group_size, q_mode, quant_predicate)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if portable and quantize:
        raise UsageError("--portable is for transformers too, which does not read mlx-lm's quantization")
    if verify and consume_source:
        raise UsageError("--verify reads the source again, which --consume-source deletes: choose one")
    if quant_report is not None and (not quantize or consume_source):
        raise UsageError("--quant-report compares with the source: it needs --quantize, not --consume-source")

    partial = target.with_name(target.name + ".partial")
    source = open_source(src, revision, partial / DOWNLOADS if consume_source or dry_run else None)
    if consume_source and source.commit is None:
        raise UsageError(f"--consume-source deletes what it has downloaded: {src} is a folder of yours")
    if tokenizer and not has_tokenizer(source.folder):
        names = ", ".join(TOKENIZERS)
        raise MissingFileError(f"{src} has no tokenizer: expected one of {names} (--no-tokenizer goes on)")
    ids = None if quant_report is None else read_text(user_path(quant_report), source.checkpoint)
    card = read_card(source.folder)
    before = source.checkpoint.rope
    after = new_rope(before, rope, factor, original_max_position_embeddings, resonance)
    quantization = (q_bits, q_group_size, q_mode, quant_predicate) if quantize else None
    plan = make_plan(source, after, portable=portable, dtype=dtype, quantize=quantization, shard_bytes=shard_bytes)
    shift = 0.0 if before.is_resonant else largest_shift(after)
    disk, download = disk_needed(plan, source, consume_source)
    made = Conversion(target, after, shift, plan.sizes, plan.memory, disk, download, {})
    if dry_run:
        return made

    settings = {
        "rope": plan.rope.to_hf("4"), "dtype": dtype, "quantization": plan.config.get("quantization"),
        "query_key_factor": plan.factor, "max_shard_size": shard_bytes, "versions": _versions(),
    }  # fmt: skip
    kept = DOWNLOADS if consume_source else None
    with workspace(target, _identity(source), settings, restart, keep=kept) as journal:
        write_weights(source, plan, journal, allow_nan, progress)
        if kept is not None and (journal.folder / kept).exists():
            shutil.rmtree(journal.folder / kept)
        _write_small_files(source, plan, journal.folder, src, card)
        _record(journal, plan)
        errors = {k: v for entry in journal.finished.values() for k, v in entry.get("quantization_error", {}).items()}
        sizes = {name: entry["bytes"] for name, entry in sorted(journal.finished.items())}
        made = replace(made, sizes=sizes, quantization_error=errors)
        if ids is not None:
            made = replace(made, quant_report=quantization_report(journal.folder, source, ids))
            journal.record["quant_report"] = made.quant_report
        if verify:
            made = replace(made, checks=_verify(journal, source, progress))
        journal.write()
    return made


def _record(journal: Journal, plan: Plan) -> None:
    """Put the wavelengths and the hashes of the small files into the record."""
    names = [
        path.relative_to(journal.folder).as_posix() for path in sorted(journal.folder.rglob("*")) if path.is_file()
    ]
    names = [name for name in names if name not in UNHASHED and name not in journal.finished]
    files = {name: sha256(journal.folder / name) for name in names}
    journal.record |= {"rope": rope_table(plan.rope), "files": files}
    journal.write()


def _verify(journal: Journal, source: Source, progress: Progress | None) -> dict[str, Any]:
    """What verification finds, which goes into the record. Raises VerificationError where it finds a problem."""
    checks = verify_result(journal.folder, source, progress=progress)
    if checks.problems:
        journal.record["refused"] = checks.problems[0]  # no later run may publish it
        journal.write()
        raise VerificationError(f"{journal.folder} is not right (--restart): {checks.problems[0]}")
    journal.record["checks"] = checks.to_dict()
    return checks.to_dict()


def _identity(source: Source) -> dict[str, Any]:
    """What the record says of the source, and what tells whether it has changed: a commit of the hub, or the files."""
    if source.commit is not None:
        return {"name": source.name, "commit": source.commit}
    files = [source.folder / name for name in ("config.json", *(file.name for file in source.files))]
    return {"name": source.name, "commit": None, **fingerprint([*files, *tokenizer_files(source.folder)])}


def _write_small_files(source: Source, plan: Plan, folder: Path, src: str | Path, card: dict[str, Any]) -> None:
    """config.json, tokenizer and card."""
    text = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    copy_tokenizer(source.folder, folder)
    if not has_tokenizer(folder):
        logger.warning("%s has no tokenizer: the converted model takes token ids only", src)
    write_card(folder, source.name, source.commit is not None, card, plan.rope)


def _versions() -> dict[str, str]:
    return {"mlx_resonance": __version__, "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
