"""What mac.py measures, section by section, in a process of its own: a crash loses only the section in progress.

mac.py starts it. Each section appends one line to the file of results: a JSON object with its rows. Rows made before a
fault are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import site
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, plan_memory, stream_generate
from mlx_resonance.kernels.trial import current_backend
from mlx_resonance.sizes import format_size

import mlx.core as mx
import mlx_lm
from first_use import Messages
from generate import Run, in_turns, run, second_question
from mac import NEED_MODEL, SECTIONS, Row
from memory import measured
from mlx.utils import tree_flatten
from random_llama import make
from reporting import median_ratio
from rotary import CASES, FAR, angle_errors, times_of

BOUND = 2.5e-7  # of our angles
YARN = {
    "max_position_embeddings": 32768,
    "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
}  # mlx-lm and we read the same angles out of it


class Skip(Exception):
    """A section that is left out, and why."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    shape: tuple[int, int, int, int, int, int]  # hidden, feed-forward, layers, heads, key heads, vocabulary
    dtype: mx.Dtype
    q_bits: int | None
    rotations: tuple[str, ...]  # of rotary.py's cases
    rotation_rounds: int
    calls: int  # rotations evaluated at once: a GPU takes longer to answer than to rotate
    prompt: int  # tokens
    long_prompt: int
    new: int
    rounds: int


BIG, SMALL = (2048, 5632, 20, 16, 4, 8192), (128, 256, 2, 4, 2, 2048)
SIZES = {
    "gpu": Sizes(BIG, mx.float16, 4, ("prefill", "decode", "decode, batch of 32"), 15, 10, 2048, 16384, 64, 3),
    "cpu": Sizes((512, 1536, 8, 8, 4, 8192), mx.float32, None, ("prefill", "decode"), 3, 1, 1024, 4096, 32, 3),
    "quick": Sizes(SMALL, mx.float32, None, ("decode",), 2, 1, 96, 200, 6, 1),
}


class Bench:
    """What sections share: sizes, deadline, folder, and the model, ours and mlx-lm's on the same weights."""

    def __init__(self, sizes: Sizes, folder: Path, model: Path | None, seconds: float) -> None:
        self.sizes, self.folder, self.given, self.deadline = sizes, folder, model, time.monotonic() + seconds

    @property
    def model(self) -> Path:
        """The checkpoint: the given one, or the random one, which the section of this name makes."""
        return self.given or self.folder / "model"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Opened, without rounding: mlx-lm knows no rounded wavelengths."""
        checkpoint = Checkpoint.open(self.model)
        return checkpoint.with_rope(replace(checkpoint.rope, rope_type=checkpoint.rope.base_type))

    @cached_property
    def ours(self) -> Any:
        """The model with our attention."""
        return self.checkpoint.load()

    @cached_property
    def stock(self) -> Any:
        """mlx-lm's own model, on our arrays."""
        config = {"rope_parameters": None, "rope_scaling": None} | self.checkpoint.mlx_config
        model, *_ = mlx_lm.load(str(self.model), model_config=config, lazy=True)
        model.load_weights(tree_flatten(self.ours.parameters()))
        return model

    def answer(self, prompt: int, new: int, **options: Any) -> Run:
        """Answer a prompt with our model."""
        options |= {"prompt_lookup": "off"}  # a token per pass, as on the other side
        return run(stream_generate, self.ours, self.checkpoint.tokenizer, prompt, new, **options)

    def stock_answer(self, prompt: int, new: int) -> Run:
        """Answer it with mlx-lm's."""
        return run(mlx_lm.stream_generate, self.stock, self.checkpoint.tokenizer, prompt, new)

    def fitting(self, prompt: int, new: int) -> int:
        """The prompt's length, or what the model's context has room for."""
        return min(prompt, (self.checkpoint.rope.context_length or prompt + new) - new)


def first_use(bench: Bench) -> Iterator[Row]:
    """The first rotation of two processes that find a new cache folder."""
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"HOME": home, "XDG_CACHE_HOME": home, "PYTHONUSERBASE": site.getuserbase()}
        for start in ("first start", "second start"):
            command = [sys.executable, str(Path(__file__).with_name("first_use.py"))]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
            found = json.loads(done.stdout.splitlines()[-1])
            remarks = f"kernel: {found['kernel'] or 'not used'}{'; '.join(['', *found['messages']])}"
            yield Row(
                f"first rotation, {start}", 1000 * found["first_seconds"], "ms", 1000 * found["second_seconds"],
                "the next rotation", remarks=remarks,
            )  # fmt: skip


def kernel(bench: Bench) -> Iterator[Row]:
    """Whether the kernel is used: on a GPU it is a fault if it is not."""
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        times_of("small heads", dtype, 1)
    backend = current_backend()
    if backend is None and mx.default_device() != mx.cpu:
        raise RuntimeError("the kernel was not used")
    yield Row("kernel", remarks=backend or "none: MLX runs on the CPU")


def rotation(bench: Bench) -> Iterator[Row]:
    """Queries and keys rotated: against mlx-lm's YarnRoPE and mx.fast.rope."""
    for case in bench.sizes.rotations:
        for dtype in (mx.float16, mx.bfloat16):
            times = times_of(case, dtype, bench.sizes.rotation_rounds, bench.sizes.calls)
            ours, floor = (1000 * statistics.median(times[name]) for name in ("ours", "add_one"))
            for other, words in (("mlx_lm_yarn", "mlx-lm's YarnRoPE"), ("mx_fast_rope", "mx.fast.rope")):
                name = f"rotation, {case}, {str(dtype).removeprefix('mlx.core.')}"
                ratio, theirs = median_ratio(times["ours"], times[other]), 1000 * statistics.median(times[other])
                shape = "{} × {} tokens, {} and {} heads × {}".format(*CASES[case])
                yield Row(name, ours, "ms", theirs, words, ratio, f"{shape}; x + 1: {floor:.3g} ms")


def angles(bench: Bench) -> Iterator[Row]:
    """The largest error of cosine and sine at far positions, against float64."""
    errors = angle_errors(list(FAR))
    for position, ours, other in zip(FAR, errors["ours"], errors["mx_fast_rope"], strict=True):
        yield Row(f"error of cos and sin at {position:,}", ours, "", other, "mx.fast.rope")
    if not max(errors["ours"] + errors["ours_yarn"]) <= BOUND:
        raise RuntimeError(f"our angles are off by more than {BOUND}: {errors}")


def model(bench: Bench) -> Iterator[Row]:
    """Make the random model, if none is given, and load it twice."""
    start = time.monotonic()
    if bench.given is None:
        part = bench.folder / "unfinished"
        make(part, *bench.sizes.shape, bench.sizes.dtype, q_bits=bench.sizes.q_bits, **YARN).rename(bench.model)
    checkpoint, dims = bench.checkpoint, bench.checkpoint.dimensions
    mx.eval(bench.ours.parameters(), bench.stock.parameters())
    text = f"{checkpoint.config['model_type']}, {format_size(dims.weights)}, {dims.layers} layers, "
    text += f"{dims.heads} heads × {dims.head_dim}, rope {checkpoint.rope.rope_type}"
    yield Row("model", time.monotonic() - start, "s", remarks=f"{text}{'' if bench.given else ', random weights'}")


def speed(bench: Bench) -> Iterator[Row]:
    """Prefill and decode, ours and mlx-lm's in turns."""
    sizes = bench.sizes
    yield from compare(bench, bench.fitting(sizes.prompt, sizes.new), sizes.rounds, True)


def long_prompt(bench: Bench) -> Iterator[Row]:
    """The same for a long prompt, if there is time for it."""
    prompt, probe = bench.fitting(bench.sizes.long_prompt, bench.sizes.new), 256
    bench.answer(probe, 2)
    seconds = 2 * prompt / bench.answer(probe, 2).prompt
    if seconds > (left := bench.deadline - time.monotonic()):
        raise Skip(f"{prompt:,} tokens would take more than {seconds:.0f} s, {left:.0f} s are left")
    yield from compare(bench, prompt, 2, False)


def compare(bench: Bench, prompt: int, rounds: int, warm_up: bool) -> Iterator[Row]:
    """Tokens per second of prompt and answer, ours and mlx-lm's in turns, and whether the answers agree."""
    new = bench.sizes.new
    sides = {"ours": lambda: bench.answer(prompt, new), "mlx_lm": lambda: bench.stock_answer(prompt, new)}
    runs = in_turns(sides, rounds, warm_up, bench.deadline)
    ours, others = runs["ours"], runs["mlx_lm"]
    counted = f"rounds: {len(ours)}"
    yield against(f"prefill, {prompt:,} tokens", [r.prompt for r in ours], [r.prompt for r in others], counted)
    different = (
        i for i, tokens in enumerate(zip(*(r.tokens for r in ours + others), strict=True)) if len({*tokens}) > 1
    )
    counted += f"; greedy tokens that agree: {next(different, new)} of {new}"
    yield against(f"decode after {prompt:,} tokens", [r.answer for r in ours], [r.answer for r in others], counted)


def against(name: str, ours: list[float], others: list[float], remarks: str, words: str = "mlx-lm") -> Row:
    """A row of speeds."""
    medians = statistics.median(ours), statistics.median(others)
    return Row(name, medians[0], "tokens/s", medians[1], words, median_ratio(ours, others), remarks)


def kv_formats(bench: Bench) -> Iterator[Row]:
    """Quantized keys and values against those in the model's type: speed and bytes."""
    new, prompt = bench.sizes.new, bench.fitting(bench.sizes.prompt, bench.sizes.new)
    formats: dict[str, int | None] = {f"{8 * bench.checkpoint.dimensions.item_size} bit": None, "8 bit": 8, "4 bit": 4}
    sides = {name: lambda bits=bits: bench.answer(prompt, new, kv_bits=bits) for name, bits in formats.items()}
    runs = in_turns(sides, max(1, bench.sizes.rounds - 1), True, bench.deadline)
    own, *quantized = formats
    per_token = {
        name: plan_memory(bench.checkpoint, prompt + new, kv_bits=bits).kv_per_token for name, bits in formats.items()
    }
    for name in quantized:
        words, counted = f"ours, KV {own}", f"rounds: {len(runs[own])}"
        for i, kind in enumerate((f"prefill, {prompt:,} tokens", f"decode after {prompt:,} tokens")):
            speeds = ([found[i] for found in runs[side]] for side in (name, own))
            yield against(f"{kind}, KV {name}", *speeds, counted, words)  # type: ignore[arg-type]
        size, whole = per_token[name], per_token[own]
        yield Row(f"KV {name}, per token", size / 1e3, "kB", whole / 1e3, words, round(size / whole, 3))


def prompt_cache(bench: Bench) -> Iterator[Row]:
    """The first token of a second question, with the on-disk KV cache and without."""
    length = bench.fitting(2 * bench.sizes.prompt, 64)
    found = second_question(bench.ours, bench.checkpoint.tokenizer, length, max(1, bench.sizes.rounds - 1))
    name, written = f"first token of a question on {length:,} tokens, on-disk cache", found["first_written_mb"]
    cached, without, ratio = found["cached_seconds"], found["uncached_seconds"], round(1 / found["times_sooner"], 3)
    yield Row(name, cached, "s", without, "ours, without the cache", ratio, f"{written} MB written once")


def memory(bench: Bench) -> Iterator[Row]:
    """The memory plan against MLX's peak."""
    context, step = bench.fitting(2 * bench.sizes.prompt, 2), min(2048, bench.sizes.prompt)
    for bits in (None, 4):
        planned = plan_memory(bench.checkpoint, context, kv_bits=bits, prefill_step_size=step).total
        found = measured(bench.ours, bench.checkpoint.tokenizer, context, step, bits)
        name = f"memory plan, {context:,} tokens, KV {bits or 8 * bench.checkpoint.dimensions.item_size} bit"
        yield Row(name, planned / 1e6, "MB", found / 1e6, "MLX's peak", round(planned / found, 3))


def measure(name: str, bench: Bench) -> dict[str, Any]:
    """Measure a section: its rows, and what happened."""
    start, messages = time.monotonic(), Messages()
    rows: list[dict[str, Any]] = []
    logger = logging.getLogger("mlx_resonance")
    logger.addHandler(messages)
    state, reason = "measured", ""
    try:
        if start > bench.deadline:
            raise Skip("the time is over")
        if name in NEED_MODEL and not bench.model.exists():
            raise Skip("there is no model")
        section: Callable[[Bench], Iterator[Row]] = globals()[name]
        for row in section(bench):
            rows.append({key: float(f"{x:.5g}") if isinstance(x, float) else x for key, x in asdict(row).items()})
    except Skip as error:
        state, reason = "skipped", str(error)
    except Exception as error:  # whatever it is, the other sections are measured
        traceback.print_exc()
        state, reason = "failed", f"{type(error).__name__}: {error}"
    finally:
        logger.removeHandler(messages)
    seconds = round(time.monotonic() - start, 2)
    return {"state": state, "reason": reason, "seconds": seconds, "rows": rows, "messages": messages.texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=SIZES, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the model")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of random weights")
    parser.add_argument("--seconds", type=float, required=True, help="time that is left")
    parser.add_argument("--results", type=Path, required=True, help="file to append to")
    parser.add_argument("sections", nargs="+", choices=SECTIONS, metavar="SECTION")
    args = parser.parse_args()
    bench = Bench(SIZES[args.sizes], args.folder, args.model, args.seconds)
    for name in args.sections:
        print(f"{name} …", flush=True)
        result = measure(name, bench)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"section": name} | result) + "\n")


if __name__ == "__main__":
    main()
