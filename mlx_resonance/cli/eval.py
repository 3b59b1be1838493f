"""`mlx-resonance eval`: what a checkpoint does with long texts."""

from __future__ import annotations

import typer

from . import eval_harness, eval_passkey, eval_perplexity, eval_tasks
from .errors import Command

app = typer.Typer(help="Perplexity, passkeys and long-text tasks, on local files.", no_args_is_help=True)
app.command("perplexity", cls=Command)(eval_perplexity.command)
app.command("passkey", cls=Command)(eval_passkey.command)
app.command("leval", cls=Command)(eval_tasks.leval)
app.command("longbench", cls=Command)(eval_tasks.longbench)
app.command("ruler", cls=Command)(eval_tasks.ruler)
app.command("harness", cls=Command)(eval_harness.command)
