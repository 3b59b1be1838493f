"""`mlx-resonance lm`: mlx-lm's own commands, for checkpoints of the resonance rope types too."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from ..errors import UsageError

# Options of mlx-lm that may be empty; of all others, an empty value would be taken for the current folder.
TEXTS = {"--prompt", "-p", "--system-prompt", "--prefill-response", "--chat-template", "--chat-template-config"}
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def command(context: typer.Context) -> None:
    """Run a command of mlx-lm: server, chat, lora, …"""
    refuse_empty(context.args)

    from mlx_lm import cli

    from ..mlx_lm_models import install

    install()
    # transformers would warn about the rope type of each of our config.json files, which it never uses.
    logging.getLogger("transformers.modeling_rope_utils").setLevel(logging.ERROR)
    if context.args[:1] == ["server"]:
        refuse_batches()
    sys.argv = [" ".join(["mlx-resonance lm", *context.args[:1]]), *context.args]
    try:
        cli.main()
    except NotImplementedError as error:  # --kv-bits cannot quantize the keys of layers with a sliding window
        raise UsageError(str(error)) from None
    except RuntimeError as error:  # from MLX, where a file cannot be written
        if "[write]" in str(error) or "[save" in str(error):
            raise OSError(f"the result cannot be written, is the disk full? {error}") from None
        raise


def refuse_batches() -> None:
    """Make mlx-lm's server, which answers several texts at once, refuse angles that change with a text's length.

    It loads its model on a thread: if that fails, end the process, which would answer nothing.
    """
    from .._mlx_lm import ModelProvider
    from ..generation.prompt_cache import refuse_changing_angles

    load, load_default = ModelProvider.load, ModelProvider.load_default

    def checked(self: Any, *args: Any, **options: Any) -> Any:
        model, tokenizer = load(self, *args, **options)
        rope = getattr(getattr(model, "args", None), "rope", None)
        if rope is not None:
            refuse_changing_angles(rope, "a server that answers several at once cannot use them")
        return model, tokenizer

    def checked_default(self: Any) -> None:
        try:
            load_default(self)
        except Exception as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            sys.stderr.flush()
            os._exit(2)

    ModelProvider.load, ModelProvider.load_default = checked, checked_default


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raise UsageError if an option that is no text has an empty value."""
    for before, value in zip(arguments, [*arguments[1:], "x"], strict=False):
        name, is_joined, joined = before.partition("=")
        empty = before.startswith("-") and not (joined if is_joined else value).strip()
        if empty and name not in TEXTS:
            raise UsageError(f"the value of {name} is empty")
