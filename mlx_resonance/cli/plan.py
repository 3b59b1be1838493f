"""`mlx-resonance plan`: the memory that generating with a checkpoint needs."""

from __future__ import annotations

from typing import Annotated, Any

from rich.table import Table
from typer import Context as Invocation
from typer import Option

from .options import Extend, Factor, Json, KvBits, KvRotate, Memory, Model, PrefillStep, kv_format
from .output import print_json, stdout


def command(
    invocation: Invocation,
    model: Model,
    context: Annotated[
        int | None, Option(min=1, max=2**31, help="Tokens of prompt and answer. Default: the whole context.")
    ] = None,
    factor: Factor = None,
    extend: Extend = None,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    memory: Memory = None,
    prefill_step_size: PrefillStep = 2048,
    json: Json = False,
) -> None:
    """Show whether a context fits into memory.

    Also show the largest one that does.
    """
    from ..checkpoint import Checkpoint
    from ..errors import UsageError
    from ..generation.kv_format import LOSSES
    from ..generation.memory import complaint, plan_memory
    from ..rope_types import LONGEST
    from ..scaling import check_context
    from ..sizes import format_size
    from .errors import in_words

    options: dict[str, Any] = {"memory": memory, "prefill_step_size": prefill_step_size}
    options["kv_bits"] = kv_format(kv_bits, kv_rotate)
    checkpoint = Checkpoint.open(model, factor=factor).extended(extend, context)
    plan = plan_memory(checkpoint, context, **options)
    if json:
        print_json(plan.to_dict())
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("weights", format_size(plan.weights))
    table.add_row(f"KV cache of {plan.context:,} tokens", format_size(plan.kv))
    table.add_row("reading the prompt", format_size(plan.prefill))
    table.add_row("total", format_size(plan.total))
    table.add_row("limit", format_size(plan.limit))
    stdout.print(table)
    context_length = plan.context_length or LONGEST
    for name, most in plan.max_context.items():
        past = ", past the checkpoint's context" if most > context_length else ""
        loss = LOSSES.get(f"{name}, rotated" if kv_rotate else name)
        past += "" if loss is None else f"; costs {loss:g} % perplexity in SmolLM2-135M"
        stdout.print(f"with a KV cache in {name}: up to {most:,} tokens{past}" if most else f"in {name}: nothing fits")
    try:
        beyond = [] if context else [most for most in plan.max_context.values() if most > context_length]
        check_context(checkpoint.rope, max(plan.context, min(beyond, default=0)))
    except UsageError as error:  # memory is not all that a context needs
        stdout.print(in_words(error, invocation.command), soft_wrap=True)
    doubt = complaint(checkpoint, plan, **options)
    if doubt is None:
        stdout.print("It fits.")
    else:
        verdict = "may" if plan.fits else "does"
        stdout.print(f"It {verdict} not fit: {in_words(doubt, invocation.command)}", soft_wrap=True)
