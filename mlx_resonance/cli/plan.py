"""`mlx-resonance plan`: what generating with a checkpoint needs of the memory."""

from __future__ import annotations

from typing import Annotated, Any

from rich.table import Table
from typer import Option

from .options import Json, KvBits, Memory, Model, PrefillStep, memory_bytes
from .output import print_json, stdout


def command(
    model: Model,
    context: Annotated[int | None, Option(help="Tokens of prompt and answer. Default: the checkpoint's.")] = None,
    kv_bits: KvBits = None,
    memory: Memory = None,
    prefill_step_size: PrefillStep = 2048,
    json: Json = False,
) -> None:
    """Show whether a context fits into memory.

    Also the largest one that does.
    """
    from ..generation.memory import advice, gigabytes, plan_memory

    size = memory_bytes(memory)
    options: dict[str, Any] = {"kv_bits": kv_bits, "memory": size, "prefill_step_size": prefill_step_size}
    plan = plan_memory(model, context, **options)
    if json:
        print_json(plan.to_dict())
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("weights", gigabytes(plan.weights))
    table.add_row(f"keys and values of {plan.context} tokens", gigabytes(plan.kv))
    table.add_row("reading the prompt", gigabytes(plan.prefill))
    table.add_row("total", gigabytes(plan.total))
    table.add_row("there are, less a reserve", gigabytes(plan.limit))
    stdout.print(table)
    for name, most in plan.max_context.items():
        stdout.print(f"with keys and values in {name}: up to {most} tokens" if most else f"in {name}: nothing fits")
    stdout.print("It fits." if plan.fits else f"It does not fit: {advice(model, plan, **options)}", soft_wrap=True)
