"""`mlx-resonance lm`: mlx-lm's own commands, for checkpoints of the resonance rope types too."""

from __future__ import annotations

import logging
import sys

import typer

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def command(context: typer.Context) -> None:
    """Run a command of mlx-lm: server, chat, lora, …"""
    from mlx_lm import cli

    from ..mlx_lm_models import install

    install()
    # transformers would warn about the rope type of each of our config.json files, which it never uses.
    logging.getLogger("transformers.modeling_rope_utils").setLevel(logging.ERROR)
    if context.args[:1] == ["server"]:
        from .server import harden_server

        harden_server()
    sys.argv = [" ".join(["mlx-resonance lm", *context.args[:1]]), *context.args]
    cli.main()
