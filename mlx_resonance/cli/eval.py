"""`mlx-resonance eval`: what a checkpoint does with long texts."""

from __future__ import annotations

import typer

from . import eval_passkey

app = typer.Typer(help="Perplexity, passkey and long-text tasks, from local files.", no_args_is_help=True)
app.command("passkey")(eval_passkey.command)
