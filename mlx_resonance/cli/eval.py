"""`mlx-resonance eval`: what a checkpoint does with long texts."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from . import eval_harness, eval_leval, eval_passkey, eval_perplexity
from .errors import Command, fail


class _Commands(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is meant; two that there were say what takes their place."""
        if args[0] in ("longbench", "ruler"):
            fail(f"eval {args[0]} is now: mlx-resonance eval harness --suite {args[0]}", 2)
        return super().resolve_command(ctx, args)


app = typer.Typer(help="Perplexity, passkeys and long-text tasks.", no_args_is_help=True, cls=_Commands)
app.command("perplexity", cls=Command)(eval_perplexity.command)
app.command("passkey", cls=Command)(eval_passkey.command)
app.command("leval", cls=Command)(eval_leval.command)
app.command("harness", cls=Command)(eval_harness.command)
