"""`mlx-resonance chat`: a conversation on a terminal, or a question per line from a pipe."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from signal import SIGHUP, SIGTERM
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from typer import Context as Invocation
from typer import Option

from ..errors import UsageError
from ..storage import check_output_folder
from . import options as shared
from .options import (
    LARGEST,
    Extend,
    Factor,
    Force,
    KvBits,
    KvRotate,
    Memory,
    MinP,
    Model,
    Penalty,
    PrefillStep,
    Seed,
    Temp,
    TopK,
    TopP,
)
from .processes import processes, together
from .prompts import STDIN, read_text
from .signals import ended_by

if TYPE_CHECKING:
    from ..generation import Engine


@together
def command(
    invocation: Invocation,
    model: Model,
    prompt_file: shared.Files = None,
    system_prompt: shared.SystemPrompt = None,
    overflow: Annotated[
        Literal["stop", "drop-oldest"],
        Option(help="When the context is full: answer no more, or drop the oldest turns; files stay."),
    ] = "stop",
    max_tokens: Annotated[
        int | None,
        Option(min=1, max=LARGEST, help="Maximum tokens of an answer. Default: what the context has room for."),
    ] = None,
    temp: Temp = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: shared.Stop = None,
    factor: Factor = None,
    extend: Extend = None,
    context: shared.Context = None,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    prefill_step_size: PrefillStep = 2048,
    memory: Memory = None,
    force: Force = False,
    prompt_cache: shared.CacheFolder = None,
    prompt_cache_size: shared.CacheSize = None,
    no_prompt_cache: shared.NoCache = False,
    prompt_lookup: shared.PromptLookup = "auto",
    draft_model: shared.DraftModel = None,
) -> None:
    """Talk with a model, also about files.

    Without a terminal, answer a question per line.
    """
    if processes().size > 1:
        raise UsageError("a chat reads the terminal of one process, and there are several")
    if STDIN in (files := prompt_file or []):
        raise UsageError("questions come from standard input: a text before them needs a file", option="prompt_file")
    if prompt_cache is not None:
        check_output_folder(prompt_cache, "prompt_cache")
    texts = [read_text(path) for path in files]

    from ..checkpoint import Checkpoint
    from ..generation.conversation import Conversation
    from ..generation.sampling import sampling_for
    from .dialogue import Dialogue
    from .engine import plan_engine

    checkpoint = Checkpoint.open(model, factor=factor).extended(extend, context)
    given = {"temp": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    sampling, defaults = sampling_for(checkpoint, **given, repetition_penalty=repetition_penalty)
    kept: dict[str, Any] = {"prompt_cache": prompt_cache, "prompt_cache_size": prompt_cache_size}
    kept["kv_bits"] = shared.kv_format(kv_bits, kv_rotate)
    kept |= {"no_prompt_cache": no_prompt_cache, "memory": memory, "force": force}
    kept |= {"prompt_lookup": prompt_lookup, "draft_model": draft_model}
    planned = plan_engine(checkpoint, context=context, prefill_step_size=prefill_step_size, **kept)
    how: dict[str, Any] = {"overflow": overflow, "max_tokens": max_tokens, "sampling": sampling, "stop": stop or ()}
    conversation = Conversation(cast("Engine", planned), system_prompt=system_prompt, **how)
    conversation.check(*texts)  # like the other options: before the weights are read
    conversation.engine = planned.load()
    out = sys.stdout
    with redirect_stdout(sys.stderr), ended_by(SIGTERM, SIGHUP):  # mlx-lm prints warnings
        chat = Dialogue(conversation, out, invocation.command, defaults)
        chat.start(checkpoint.name, [str(path) for path in files], texts)
        chat.run()
