"""`mlx-resonance eval`: what a checkpoint does with long texts."""

from __future__ import annotations

import typer

from . import eval_harness, eval_passkey, eval_perplexity, eval_tasks

app = typer.Typer(help="Perplexity, passkey and long-text tasks, from local files.", no_args_is_help=True)
app.command("perplexity")(eval_perplexity.command)
app.command("passkey")(eval_passkey.command)
app.command("leval")(eval_tasks.leval)
app.command("longbench")(eval_tasks.longbench)
app.command("ruler")(eval_tasks.ruler)
app.command("harness")(eval_harness.command)
