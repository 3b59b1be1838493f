"""The engine of `chat` and `server`: opened with a context that memory holds, and with the on-disk KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .options import LARGEST_CACHE
from .output import stderr

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..checkpoint import Checkpoint
    from ..generation import Engine, PromptCache
    from ..rope_config import RopeConfig

LEAST = 1024  # new tokens of a text that is worth the wear of writing it to disk


@dataclass(frozen=True)
class PlannedEngine:
    """An engine whose weights are not read yet: what is known of it before, for checks, and how to make it.

    Args:
        checkpoint: an opened one.
        draft: a draft model's; None for none.
        context: maximum tokens of prompt and answer; None for no limit.
        options: of the engine.
    """

    checkpoint: Checkpoint
    draft: Checkpoint | None
    context: int | None
    options: dict[str, Any]

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """As of the engine."""
        return self.checkpoint.tokenizer

    @property
    def rope(self) -> RopeConfig:
        """As of the engine."""
        return self.checkpoint.rope

    @property
    def vocabulary(self) -> int:
        """As of the engine."""
        return self.checkpoint.dimensions.vocabulary

    def load(self) -> Engine:
        """Read the weights."""
        from ..generation import Engine

        model, draft = self.checkpoint.load(), None if self.draft is None else self.draft.load()
        return Engine(model, self.tokenizer, context=self.context, draft_model=draft, **self.options)


def plan_engine(
    checkpoint: Checkpoint,
    *,
    context: int | None,
    kv_bits: Any,
    prefill_step_size: int,
    memory: int | None,
    force: bool,
    prompt_cache: Path | None,
    prompt_cache_size: int | None,
    no_prompt_cache: bool,
    prompt_lookup: Any = "auto",
    draft_model: str | None = None,
) -> PlannedEngine:
    """Plan the memory, and say what was planned.

    Args:
        checkpoint: an opened one.
        context: maximum tokens of prompt and answer; None for the checkpoint's, or as many as memory holds.
        kv_bits, prefill_step_size: as of the engine.
        memory, force: as in `plan_context`.
        prompt_cache: folder of the on-disk KV cache; None for one in the user's cache folder.
        prompt_cache_size: its maximum size in bytes; None for `LARGEST_CACHE`.
        no_prompt_cache: keep none on disk.
        prompt_lookup: as of the engine.
        draft_model: folder or hub id of a draft model.

    Raises:
        UsageError: the options contradict each other or the checkpoint, or the memory holds no context.
    """
    from ..generation.draft import check_proposers, open_draft
    from ..generation.engine import plan_context

    for what, option, value in (
        ("folder", "prompt_cache", prompt_cache),
        ("size", "prompt_cache_size", prompt_cache_size),
    ):
        if no_prompt_cache and value is not None:
            raise UsageError(f"a {what} for the KV cache contradicts keeping none on disk", option=option)
    check_proposers(prompt_lookup, draft_model)
    draft = open_draft(checkpoint, draft_model)
    kept = None
    if not no_prompt_cache:
        kept = open_cache(checkpoint, kv_bits, prompt_cache, prompt_cache_size or LARGEST_CACHE)
    options = {"kv_bits": kv_bits, "prefill_step_size": prefill_step_size}
    tokens, plan = plan_context(checkpoint, context, force, memory=memory, draft=draft, **options)
    if plan is not None:
        stderr.print(_planned(checkpoint, plan.context, plan.total, plan.limit), soft_wrap=not stderr.is_terminal)
    return PlannedEngine(checkpoint, draft, tokens, options | {"disk_cache": kept, "prompt_lookup": prompt_lookup})


def open_cache(checkpoint: Checkpoint, kv_bits: Any, folder: Path | None, size: int) -> PromptCache | None:
    """The on-disk KV cache; None, said in a line, if the angles change with the length of a text."""
    from ..generation import PromptCache
    from ..generation.prompt_cache import cache_identity, default_folder

    if checkpoint.rope.depends_on_length:
        why = f"the angles of {checkpoint.rope.rope_type} change with the length of a text"
        stderr.print(f"no KV cache on disk: {why}", soft_wrap=not stderr.is_terminal)
        return None
    identity = cache_identity(checkpoint, kv_bits)
    return PromptCache(folder or default_folder(), max_bytes=size, least=LEAST, **identity)


def _planned(checkpoint: Checkpoint, context: int, total: int, limit: int) -> str:
    from ..rope_types import LONGEST
    from ..sizes import format_size

    own, fewer = checkpoint.rope.context_length, ""
    if own is not None and context < own:
        fewer = f" of the checkpoint's {own:,}, as many as fit" if own < LONGEST else ", as many as fit"
    return (
        f"{checkpoint.name}: {context:,} tokens of context{fewer}; "
        f"{format_size(total)} of {format_size(limit)} of memory"
    )
