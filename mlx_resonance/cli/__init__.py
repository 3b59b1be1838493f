"""The command `mlx-resonance`: one module per subcommand, errors in one line."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import cache, chat, convert, demo, eval, finetune, generate, inspect, lm, plan, posgen, serve, verify
from .errors import Command, fail

app = typer.Typer(
    name="mlx-resonance",
    help="Run LLaMA-family models far past the context they were trained on: Resonance-YaRN for MLX.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert", cls=Command)(convert.command)
app.command("verify", cls=Command)(verify.command)
app.command("inspect", cls=Command)(inspect.command)
app.command("plan", cls=Command)(plan.command)
app.command("generate", cls=Command)(generate.command)
app.command("chat", cls=Command)(chat.command)
app.add_typer(cache.app, name="cache")
app.add_typer(posgen.app, name="posgen")
app.add_typer(eval.app, name="eval")
app.command("finetune", cls=Command)(finetune.command)
app.command("demo", cls=Command)(demo.command)
app.command("server", cls=Command)(serve.command)
app.command("lm", cls=Command, context_settings=lm.CONTEXT, options_metavar="COMMAND [ARGS]…")(lm.command)

WRONG_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the versions and the device, and exit.")] = False,
) -> None:
    if version and context.invoked_subcommand:
        fail(f"--version takes no command, got {context.invoked_subcommand}", 2)
    if version:
        from .version import version_line

        print(version_line())
    elif not context.invoked_subcommand:
        fail("no command: --help lists them", 2)


def main() -> None:
    """Entry point. Exit code 0: done; 1: the work failed; 2: the request was wrong; 130: interrupted."""
    arguments = sys.argv[1:] or ["--help"]
    try:
        code = app(arguments, prog_name="mlx-resonance", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (ValueError, *WRONG_PATHS) as error:
        fail(error, 2)
    except (OSError, FloatingPointError) as error:  # the latter from training: the loss is not a number
        fail(error, 1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a wrong command line but a bug of ours: show where
            raise
        fail(error.format_message(), 2)
    if code == 130:
        fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)
