"""Reading a prompt: chunk sizes, the same text whatever they are, interrupts, and quantized keys and values."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_resonance import load, stream_generate
from mlx_resonance.generation import PromptCache
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.prefill import BUDGET, STEP, chunk_size, prefill

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .checkpoints import COMMAND, prompt, source


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint, factor=16)


def greedy(loaded: Any, tokens: list[int], **options: Any) -> list[int]:
    """The tokens of a greedy answer."""
    options = {"max_tokens": 24} | options
    return [response.token for response in stream_generate(*loaded, tokens, **options)]


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**16), st.integers(1, 2**30))
def test_a_chunk_keeps_to_the_step_and_the_budget(done: int, step: int, budget: int) -> None:
    size = chunk_size(done, step, budget)
    assert 1 <= size <= step
    assert size == 1 or size * (done + size) <= budget
    assert size == step or (size + 1) * (done + size + 1) > budget  # and is no smaller than it must be


def test_chunks_shrink_as_the_keys_grow() -> None:
    sizes = [chunk_size(done) for done in range(0, 2**21, 2**12)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == STEP and sizes[-1] == math.floor(BUDGET / 2**21)


def test_a_launch_never_exceeds_the_budget(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where attention is: queries × keys, and the caches as in one pass."""
    model, tokenizer = loaded
    tokens = prompt(tokenizer, 700)
    whole, parts = make_cache(model, 700), make_cache(model, 700)
    prefill(model, tokens, whole)
    launches = []
    attend = mx.fast.scaled_dot_product_attention

    def counted(queries: mx.array, keys: mx.array, *arguments: Any, **options: Any) -> mx.array:
        launches.append(queries.shape[2] * keys.shape[2])
        return attend(queries, keys, *arguments, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    prefill(model, tokens, parts, step=256, budget=20_000)
    assert len(launches) > 5 * 12 and max(launches) <= 20_000
    for one, other in zip(whole, parts, strict=True):
        assert one.offset == other.offset == 699
        assert mx.allclose(one.keys[..., :699, :], other.keys[..., :699, :], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_the_same_text_whatever_the_chunks(loaded: Any, kv_bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(loaded[1], 300, start=500)
    expected = greedy(loaded, tokens, kv_bits=kv_bits)
    assert len(expected) == 24
    for step in (1, 7, 64, 2048):
        assert greedy(loaded, tokens, kv_bits=kv_bits, prefill_step_size=step) == expected, step
    monkeypatch.setitem(prefill.__kwdefaults__, "budget", 9_000)
    assert greedy(loaded, tokens, kv_bits=kv_bits) == expected


def test_an_interrupt_keeps_whole_chunks(loaded: Any, tmp_path: Path) -> None:
    tokens = prompt(loaded[1], 800)
    expected = greedy(loaded, tokens)

    def interrupt(done: int, _: int) -> None:
        if done >= 256:
            raise KeyboardInterrupt

    kept = PromptCache(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        greedy(loaded, tokens, prefill_step_size=128, disk_cache=kept, prompt_progress_callback=interrupt)
    assert len(list(tmp_path.iterdir())) == 1
    seen: list[int] = []
    options = {"prefill_step_size": 128, "disk_cache": PromptCache(tmp_path, "key")}
    options["prompt_progress_callback"] = lambda done, _: seen.append(done)
    assert greedy(loaded, tokens, **options) == expected
    assert seen[:2] == [256, 384]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_an_interrupt_within_a_chunk_keeps_what_every_layer_has(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], layer: int
) -> None:
    """Between two layers, some have counted a chunk that the others have not seen."""
    tokens = prompt(loaded[1], 400)
    expected = greedy(loaded, tokens)
    block = type(loaded[0].layers[0])
    call, count = block.__call__, 0

    def fail(self: nn.Module, *arguments: Any, **options: Any) -> mx.array:
        nonlocal count
        count += 1
        result = call(self, *arguments, **options)
        if count == 2 * 5 + layer + 1:  # in the third chunk
            raise error
        return result

    with monkeypatch.context() as patch:
        patch.setattr(block, "__call__", fail)
        with pytest.raises(error):
            greedy(loaded, tokens, prefill_step_size=100, disk_cache=PromptCache(tmp_path, "key"))
    seen: list[int] = []
    progress = {"prompt_progress_callback": lambda done, _: seen.append(done)}
    assert greedy(loaded, tokens, disk_cache=PromptCache(tmp_path, "key"), **progress) == expected
    assert seen[0] == 200


WAITING = """
import signal, time
from mlx_resonance import cli
from mlx_resonance.generation import stream
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & has it ignored
prefill = stream.prefill
def waiting(*arguments, prompt_progress_callback, **options):
    def shown(done, total):
        prompt_progress_callback(done, total)
        if done >= 128:
            time.sleep(300)  # until Ctrl-C, however late it comes
    return prefill(*arguments, prompt_progress_callback=shown, **options)
stream.prefill = waiting
cli.main()
"""


def test_ctrl_c_in_a_prompt_and_the_next_run_resumes(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    (tmp_path / "prompt.txt").write_text(source()[:6000])
    command = [*COMMAND, "--model", checkpoint, "--prompt-file", tmp_path / "prompt.txt", "--factor", "64", "--json"]
    command += ["--max-tokens", "8", "--prefill-step-size", "64"]
    expected = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert expected["prompt_tokens"] > 1024
    command += ["--prompt-cache", folder]
    terminal, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *command[1:]],
        stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)

    def read() -> bytes:
        """What the terminal shows next; empty at its end, which is an OSError on Linux."""
        assert select.select([terminal], [], [], 120)[0], shown
        with contextlib.suppress(OSError):
            return os.read(terminal, 4096)
        return b""

    shown = b""
    while b"128/%d" % expected["prompt_tokens"] not in shown:
        piece = read()
        assert piece, shown
        shown += piece
    process.send_signal(signal.SIGINT)
    while piece := read():
        shown += piece
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert (process.returncode, out) == (130, b""), shown
    assert shown.rpartition(b"error:")[2].strip() == b"interrupted"
    (entry,) = folder.iterdir()
    assert mx.load(str(entry))["tokens"].size == 128
    again = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert again["text"] == expected["text"] and again["prompt_tokens"] == expected["prompt_tokens"]
    (longer,) = folder.iterdir()
    assert longer != entry and mx.load(str(longer))["tokens"].size > expected["prompt_tokens"]


def test_quantized_caches_are_small_from_the_first_chunk_on(stdlib_llama: Path) -> None:
    model, tokenizer = load(stdlib_llama)  # in float16
    tokens = prompt(tokenizer, 301)
    sizes = {}
    for kv_bits in (None, 8, 4):
        cache = make_cache(model, 300, kv_bits)
        first = list[int]()
        for at in range(2):
            prefill(model, tokens[: 100 * at + 101], cache)
            first.append(sum(layer.nbytes for layer in cache))
        assert first[0] == first[1]  # allocated once, for all of it
        sizes[kv_bits] = first[0]
    assert sizes[None] == 2 * 5 * 2 * 64 * 2 * 300
    assert sizes[8] <= 0.56 * sizes[None] and sizes[4] <= 0.32 * sizes[None]


@pytest.mark.parametrize("length", [2048, pytest.param(4096, marks=pytest.mark.long)])
def test_quantized_caches_lower_the_peak(checkpoint: Path, length: int) -> None:
    """The peak above the weights. The step is small: its work is the same whatever the format."""
    model, tokenizer = load(checkpoint, factor=16)
    tokens, peaks = prompt(tokenizer, length), {}
    for kv_bits in (None, 8, 4):
        gc.collect()
        mx.clear_cache()
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in stream_generate(model, tokenizer, tokens, max_tokens=2, kv_bits=kv_bits, prefill_step_size=128):
            pass
        peaks[kv_bits] = mx.get_peak_memory() - start
    assert peaks[4] < peaks[8] < peaks[None], peaks


def test_8_bits_cost_less_than_a_percent_of_the_loss(loaded: Any) -> None:
    model, tokenizer = loaded
    losses = {}
    tokens = prompt(tokenizer, 1025, start=3000)
    for kv_bits in (None, 8, 4):
        cache = make_cache(model, 1024, kv_bits)
        logits = mx.concatenate(
            [model(mx.array(tokens[at : at + 256])[None], cache=cache)[0] for at in range(0, 1024, 256)]
        )
        losses[kv_bits] = nn.losses.cross_entropy(logits, mx.array(tokens[1:]), reduction="mean").item()
    assert losses[None] < 5
    assert losses[8] != losses[None] and losses[8] == pytest.approx(losses[None], rel=0.01)
    assert losses[4] != losses[8] and losses[4] == pytest.approx(losses[None], rel=0.1)
