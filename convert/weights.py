"""The weights of a conversion, one tensor at a time: never more than one output file's in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlx_resonance.loading import INDEX

import mlx.core as mx

from .journal import TEMPORARY, Journal

Progress = Callable[[int, int], None]


def plan_shards(weights: dict[str, mx.array], shard_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file: in their order, no file of more than `shard_bytes` unless one tensor is.

    Args:
        weights: under their names; shapes and types are enough, they need not be computed.
        shard_bytes: the most tensor data of a file.
    """
    shards: list[list[str]] = []
    room = 0
    for name, value in weights.items():
        if not shards or value.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= value.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    return dict(zip(names, shards, strict=True))


def write_weights(
    weights: dict[str, mx.array], journal: Journal, shard_bytes: int, progress: Progress | None = None
) -> None:
    """Write the files that the journal does not have yet, and the index.

    Args:
        weights: lazy arrays; every one is taken out of the dictionary when it is computed, and freed with its file.
        journal: of the folder to write to.
        shard_bytes: the most tensor data of a file.
        progress: called with the bytes of tensors done and in all.

    Raises:
        OSError: a file cannot be written; those that are whole stay.
    """
    shards = plan_shards(weights, shard_bytes)
    total = sum(value.nbytes for value in weights.values())
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    done = 0
    pending: dict[str, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(1) as pool:
        try:
            for name, keys in shards.items():
                shard = {key: weights.pop(key) for key in keys}
                if name not in journal.finished:
                    for value in shard.values():
                        mx.eval(value)  # one at a time: its source is freed before the next is read
                        mx.clear_cache()
                    _save(journal.folder / name, shard)
                    _note(journal, pending)
                    # A file is synced to the disk and hashed while the next one is computed.
                    pending[name] = pool.submit(_settle, journal.folder / name)
                done += sum(value.nbytes for value in shard.values())
                if progress is not None:
                    progress(done, total)
        finally:
            _note(journal, pending)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (journal.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _note(journal: Journal, pending: dict[str, Future[dict[str, Any]]]) -> None:
    """Wait for the files that are being settled, and note them."""
    while pending:
        name, settled = pending.popitem()
        journal.finish(name, settled.result())


def _save(path: Path, shard: dict[str, mx.array]) -> None:
    temporary = path.with_name(f"{path.stem}{TEMPORARY}.safetensors")  # MLX would add the suffix
    try:
        mx.save_safetensors(str(temporary), shard, metadata={"format": "mlx"})
    except RuntimeError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"[convert] {temporary} cannot be written ({error}), {free / 1e6:.0f} MB are free: the same command goes "
            "on from here"
        ) from None
    temporary.replace(path)


def _settle(path: Path) -> dict[str, Any]:
    """Have a file on the disk. Returns its bytes and SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(2**22):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
