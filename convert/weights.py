"""The weights of a conversion, one tensor at a time; at most one output file's are in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlx_resonance.errors import UsageError
from mlx_resonance.files import INDEX
from mlx_resonance.storage import atomic_file, disk_errors, sha256

import mlx.core as mx

from .journal import Journal
from .plan import Plan, Recipe
from .quantization import quantize
from .source import Source

Progress = Callable[[int, int], None]


def write_weights(
    source: Source, plan: Plan, journal: Journal, allow_nan: bool = False, progress: Progress | None = None
) -> None:
    """Write the files that the journal does not have yet, and the index.

    Args:
        source: of the tensors. A file of it is released once all that was made of it is on the disk.
        plan: what the tensors become.
        journal: of the folder to write to. Each file's entry has its bytes, SHA-256 and, by the name of each quantized
            tensor, the root mean square of its error over that of its values.
        allow_nan: write a tensor whose elements are all NaN.
        progress: called with the bytes of tensors done and in all.

    Raises:
        OSError: a file cannot be written or downloaded; finished files stay.
        UsageError: a tensor is all NaN, or the embedding is not the head that it is tied to.
    """
    total, done = sum(plan.sizes.values()), 0
    with ThreadPoolExecutor(1) as pool:
        syncing: list[tuple[str, Future[dict[str, Any]]]] = []
        try:
            for name, recipes in plan.files.items():
                if name in journal.finished:
                    source.release(recipe.name for recipe in recipes)
                else:
                    shard: dict[str, mx.array] = {}
                    errors: dict[str, float | None] = {}
                    for recipe in recipes:
                        shard |= _make(source, recipe, errors, allow_nan)
                        if progress is not None:
                            progress(done + sum(value.nbytes for value in shard.values()), total)
                    path = journal.folder / name
                    with atomic_file(path) as partial, disk_errors(path):
                        mx.save_safetensors(str(partial), shard, metadata={"format": "mlx"})
                    _finish(journal, syncing, source, plan)
                    # A file is synced to the disk and hashed while the next one is computed.
                    syncing.append((name, pool.submit(_sync, path, errors)))
                done += plan.sizes[name]
                if progress is not None:
                    progress(done, total)
        finally:
            _finish(journal, syncing, source, plan)
    weight_map = {part: name for name, recipes in plan.files.items() for recipe in recipes for part in recipe.names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (journal.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _make(source: Source, recipe: Recipe, errors: dict[str, float | None], allow_nan: bool) -> dict[str, mx.array]:
    """The tensors that are written for one of the source, computed; nothing refers to the latter any more."""
    value = source.read(recipe.name)
    mx.eval(value)
    if not allow_nan and value.size and mx.isnan(value.reshape(-1)[0]).item() and mx.all(mx.isnan(value)).item():
        raise UsageError(f"{recipe.name} is all NaN: the checkpoint is damaged", remedies=[{"allow_nan": True}])
    before, value = value, recipe.cast(value)
    mx.eval(value)
    if value.dtype == mx.float16 and mx.any(mx.isinf(value)).item() and not mx.any(mx.isinf(before)).item():
        raise UsageError(
            f"{recipe.name} has a value of {mx.max(mx.abs(before)).item():.6g}, beyond the range of float16",
            remedies=[{"dtype": "float32"}, {"dtype": "bfloat16"}],
        )
    del before
    parts = [value]
    if recipe.quantization is not None:
        parts, errors[recipe.name] = quantize(value, recipe.quantization)
    mx.clear_cache()
    return dict(zip(recipe.names, parts, strict=True))


def _finish(journal: Journal, syncing: list[tuple[str, Future[dict[str, Any]]]], source: Source, plan: Plan) -> None:
    """Wait for the files that are being synced, record them, and release their sources."""
    while syncing:
        name, synced = syncing.pop()
        journal.finished[name] = synced.result()
        journal.write()
        source.release(recipe.name for recipe in plan.files[name])


def _sync(path: Path, errors: dict[str, float | None]) -> dict[str, Any]:
    """Sync a file to the disk. Returns its entry of the journal."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return entry | ({"quantization_error": errors} if errors else {})
