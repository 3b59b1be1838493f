"""`mlx-resonance cache`: documents read beforehand, and what the on-disk KV cache holds."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from ..errors import UsageError
from ..files import user_path
from ..sizes import format_size
from ..storage import check_output_folder
from .errors import Command
from .options import (
    LARGEST_CACHE,
    CacheFolder,
    CacheSize,
    Extend,
    Factor,
    Force,
    Json,
    KvBits,
    KvRotate,
    Memory,
    Model,
    PrefillStep,
    SystemPrompt,
    kv_format,
)  # fmt: skip
from .options import file as file_option
from .options import model as model_option
from .options import path as path_option
from .output import print_json, progress_bar, stderr, stdout
from .prompts import read_text

app = typer.Typer(help="On-disk KV cache of prompts: read documents beforehand, list, clear.", no_args_is_help=True)

ROOM = 512  # tokens of context for a question and its answer, or an eighth of a small context
Folder = Annotated[
    Path | None,
    Option("--folder", "--prompt-cache", **path_option, metavar="DIR", help="Default: in the user's cache folder."),
]


@app.command(cls=Command)
def add(
    files: Annotated[list[Path], Argument(**file_option, metavar="FILE...", help="Documents, each on its own.")],
    model: Model,
    system_prompt: SystemPrompt = None,
    factor: Factor = None,
    extend: Extend = None,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    prefill_step_size: PrefillStep = 2048,
    memory: Memory = None,
    force: Force = False,
    prompt_cache: CacheFolder = None,
    prompt_cache_size: CacheSize = None,
    json: Json = False,
) -> None:
    """Read documents beforehand: questions about them then start at once. A run that was killed resumes."""
    from ..checkpoint import Checkpoint
    from ..generation import PromptCache, require_memory
    from ..generation.documents import read_document
    from ..generation.memory import kv_per_token
    from ..generation.messages import document_tokens
    from ..generation.prompt_cache import cache_identity, default_folder
    from ..scaling import check_context

    folder, kv_bits = prompt_cache or default_folder(), kv_format(kv_bits, kv_rotate)
    most = prompt_cache_size or LARGEST_CACHE
    check_output_folder(folder, "prompt_cache")
    texts = [read_text(path) for path in files]
    checkpoint = Checkpoint.open(model, factor=factor, extend=extend)
    documents = [document_tokens(checkpoint.tokenizer, [text], system_prompt, True) for text in texts]
    lengths = [len(tokens) for tokens in documents]
    room = min(ROOM, (checkpoint.rope.context_length or ROOM * 8) // 8)
    longest = max(lengths) + room
    checkpoint = checkpoint.extended(extend, longest)
    check_context(checkpoint.rope, longest, f"{max(lengths):,} tokens and room for a question of {room:,}")
    identities = [cache_identity(checkpoint, kv_bits, length) for length in lengths]
    if (size := sum(lengths) * kv_per_token(checkpoint.dimensions, kv_bits)) > most:
        raise UsageError(
            f"{sum(lengths):,} tokens take {format_size(size)}, the limit is {format_size(most)}",
            remedies=[{"prompt_cache_size": None}],
        )
    options: dict[str, Any] = {"kv_bits": kv_bits, "memory": memory, "prefill_step_size": prefill_step_size}
    require_memory(checkpoint, longest, force, **options)
    results, loaded = [], None
    for path, tokens, identity in zip(files, documents, identities, strict=True):
        kept, new = PromptCache(folder, max_bytes=most, **identity), 0
        if kept.known([*tokens, 0]) < len(tokens):
            loaded = checkpoint.load() if loaded is None else loaded
            with progress_bar() as bar:
                task = bar.add_task("reading", total=len(tokens))
                new = read_document(
                    loaded, tokens, kept, kv_bits=kv_bits, prefill_step_size=prefill_step_size,
                    progress=lambda done, _, bar=bar, task=task: bar.update(task, completed=done),  # type: ignore[misc]
                )  # fmt: skip
            if (stored := kept.known([*tokens, 0])) < len(tokens):
                raise OSError(f"{path}: {folder} has only {stored:,} of its {len(tokens):,} tokens")
        results.append({"file": str(path), "tokens": len(tokens), "new": new})
        stderr.print(f"{path}: {len(tokens):,} tokens, {new:,} of them read now", soft_wrap=True)
    if json:
        print_json({"folder": str(folder), "files": results})


@app.command("list", cls=Command)
def list_entries(folder: Folder = None, json: Json = False) -> None:
    """List the texts whose keys and values are on disk, the last used first."""
    from ..generation.prompt_cache import default_folder
    from ..generation.prompt_folder import PromptFolder

    files = PromptFolder(folder or default_folder())
    texts, total = files.entries(), sum(size for _, size in files.sizes().values())
    if json:
        rows = [{**vars(text), "used": _time(text.used).isoformat(timespec="seconds")} for text in texts]
        print_json({"folder": str(files.folder), "bytes": total, "entries": rows})
        return
    if texts:
        table = Table("model", box=None, pad_edge=False)
        for name in ("tokens", "size", "shared", "last used (UTC)"):
            table.add_column(name, justify="right")
        for text in texts:
            sizes = (format_size(size) if size else "" for size in (text.bytes, text.shared))
            table.add_row(text.name or text.key, f"{text.tokens:,}", *sizes, f"{_time(text.used):%Y-%m-%d %H:%M}")
        stdout.print(table)
    stdout.print(f"{files.folder}: {len(texts)} texts, {format_size(total)}", soft_wrap=True)


@app.command("clear", cls=Command)
def clear_entries(
    folder: Folder = None,
    model: Annotated[
        str | None, Option("-m", "--model", **model_option, help="Delete only the texts that this model read.")
    ] = None,
    json: Json = False,
) -> None:
    """Delete keys and values from disk; other files in the folder stay."""
    from ..generation.prompt_cache import clear, default_folder

    place = folder or default_folder()
    names = () if model is None else (model, str(user_path(model)), str(user_path(model).resolve()))
    files, size = clear(place, names=names)
    if json:
        print_json({"folder": str(place), "files": files, "bytes": size})
    else:
        stdout.print(f"deleted {files} files, {format_size(size)}, from {place}", soft_wrap=True)


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)
