"""`mlx-resonance demo`: the main workflow on the tiny checkpoint that comes with the package."""

from __future__ import annotations

import json
import sys
import sysconfig
import tempfile
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from .options import LARGEST, Json
from .output import print_json, stdout

FACTOR, PROMPT_TOKENS, NEW_TOKENS, PREFILL = 8, 640, 256, 128


def command(
    max_tokens: Annotated[int, Option(min=1, max=LARGEST, help="Maximum number of tokens to generate.")] = NEW_TOKENS,
    temp: Annotated[float, Option(min=0, max=100, help="Sampling temperature.")] = 0.6,
    seed: Annotated[int, Option(min=0, max=2**64 - 1, help="Sampling seed.")] = 1,
    json: Json = False,
) -> None:
    """Convert, inspect and run a tiny LLaMA past its context."""
    with redirect_stdout(sys.stderr) if json else nullcontext():
        result = _demo(max_tokens, temp, seed)
    print_json(result)


def _demo(max_tokens: int, temp: float, seed: int) -> dict[str, Any]:
    """The steps, each after its command line; returns the figures of the text."""
    import mlx.core as mx

    from ..checkpoint import Checkpoint
    from ..convert import convert
    from ..generation import Engine, Sampling, prompt_tokens
    from ..inspection import inspect_rope, training_of
    from .convert import report
    from .generate import run
    from .inspect import print_schedule

    # 16-bit matrix products are slow on a CPU.
    dtype = "float32" if mx.default_device() == mx.cpu else None
    with as_file(files("mlx_resonance") / "assets" / "stdlib-llama") as source, tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stdlib-llama-8x"
        cast = f" --dtype {dtype}" if dtype else ""
        _say(f"mlx-resonance convert stdlib-llama --rope yarn --factor {FACTOR}{cast} --mlx-path {target.name}")
        report(replace(convert(source, target, rope="yarn", factor=FACTOR, dtype=dtype), path=Path(target.name)))

        _say(f"mlx-resonance inspect {target.name}")
        converted = Checkpoint.open(target)
        print_schedule(inspect_rope(converted.rope, training=training_of(target, converted.rope)))

        settings = f"--temp {temp} --seed {seed} --max-tokens {max_tokens} --prefill-step-size {PREFILL}"
        _say(f"mlx-resonance generate --model {target.name} {settings} < unseen.py")
        tokenizer = converted.tokenizer
        engine = Engine(converted.load(), tokenizer, prefill_step_size=PREFILL)
        name, text = _unseen_module(source)
        tokens = prompt_tokens(tokenizer, text)[:PROMPT_TOKENS]
        stdout.print(f"… {name}, {len(tokens)} tokens of it; the checkpoint was trained on 512", style="dim")
        stdout.print(tokenizer.decode(tokens[-60:]), style="dim", end="")
        return run(engine, tokens, max_tokens, Sampling(temp=temp, seed=seed))


def _say(line: str) -> None:
    stdout.print(f"\n$ {line}", style="bold", soft_wrap=True)


def _unseen_module(checkpoint: Path) -> tuple[str, str]:
    """A module of this machine's standard library that was held out from training."""
    held_out = json.loads((checkpoint / "training.json").read_text())["held_out_files"]
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in held_out:
        path = root / name
        if path.is_file() and path.stat().st_size > 8 * PROMPT_TOKENS:
            return name, path.read_text(encoding="utf-8")
    raise FileNotFoundError(f"none of the held-out modules is under {root}")
