"""The memory plan against what MLX measures, and what is refused because it does not fit."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, load, plan_memory, stream_generate
from mlx_resonance.errors import UsageError
from mlx_resonance.generation import memory
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.memory import require_memory, usable
from mlx_resonance.sizes import format_size

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from .checkpoints import FITTED_HERE, random_checkpoint
from .sparse_checkpoints import sparse

WEIGHTS = "model.safetensors"
KEYS = {
    "context",
    "context_length",
    "weights",
    "kv_per_token",
    "kv",
    "prefill",
    "total",
    "limit",
    "fits",
    "tight",
    "max_context",
}
SHAPES = {
    "stdlib-llama": (256, 576, 5, 4, 2, 2048, mx.float32),
    "wide": (512, 1536, 4, 8, 8, 4096, mx.float32),
    "large vocabulary": (256, 704, 3, 4, 4, 32_000, mx.float32),
    "bfloat16": (256, 704, 4, 8, 4, 2048, mx.bfloat16),
    "qwen3": (256, 576, 5, 4, 2, 2048, mx.float32, qwen3),
}
GB = 10**9


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Metal."""
    monkeypatch.setattr(memory, "working_set", lambda: None)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 1.6 GB in float16, 16 layers of 8 key heads."""
    return sparse(tmp_path_factory.mktemp("big") / "model", 2048, 5632, 16, 16, 8, 32_000)


def peak(model: Any, tokenizer: Any, context: int, step: int, kv_bits: int | str | None) -> int:
    """Peak bytes that MLX held while a prompt of `context` - 2 tokens was read and 2 were generated."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    options: dict[str, Any] = {"max_tokens": 2, "kv_bits": kv_bits, "prefill_step_size": step}
    list(stream_generate(model, tokenizer, [5] * (context - 2), **options))
    return mx.get_peak_memory()


BY_NIGHT = ("wide", "qwen3", "stdlib-llama")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in BY_NIGHT else name for name in SHAPES]
)
def test_the_plan_is_within_a_tenth_of_the_peak(name: str, tmp_path: Path, record_property: Any) -> None:
    """On a CPU, where it was fitted; elsewhere the ratio is only recorded, and the exact part asserted."""
    path = random_checkpoint(tmp_path / "model", *SHAPES[name])
    gc.collect()
    before = mx.get_active_memory()  # of other tests
    model, tokenizer = load(path)
    slow = SHAPES[name][6] == mx.bfloat16 and FITTED_HERE
    sizes = ((512, 256),) if slow else ((768, 512), (1536, 512))
    for context, step in (*sizes, (2048, 1024)) if name == next(iter(SHAPES)) else sizes:
        for kv_bits in (None, 8, "8,4", 4):
            plan = plan_memory(path, context, kv_bits=kv_bits, prefill_step_size=step)
            found = peak(model, tokenizer, context, step, kv_bits) - before
            record_property(f"planned / measured, {context} tokens, {kv_bits or 'all'} bits", plan.total / found)
            assert plan.weights + plan.kv < found
            assert not FITTED_HERE or plan.total == pytest.approx(found, rel=0.1), (context, step, kv_bits)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_keys_and_values_are_exact(name: str, tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "model", *SHAPES[name])
    model, _ = load(path)
    for kv_bits in (None, 8, "8,4", 4):
        plan = plan_memory(path, 300, kv_bits=kv_bits)
        assert plan.weights == sum(value.nbytes for _, value in tree_flatten(model.parameters()))
        cache = make_cache(model, 300, kv_bits)
        mx.eval(model(mx.array([[5, 6]]), cache=cache))
        assert plan.kv == sum(value.nbytes for layer in cache for _, value in tree_flatten([layer.keys, layer.values]))


def test_the_parts_of_the_plan(big: Path) -> None:
    plan = plan_memory(big, 10_000, memory=100 * 10**9)
    assert plan.weights == pytest.approx(1.64e9, rel=0.01)
    assert plan.kv_per_token == 2 * 16 * 8 * 128 * 2 and plan.kv == 10_000 * plan.kv_per_token
    assert plan.total == plan.weights + plan.kv + plan.prefill and plan.fits
    assert plan_memory(big, memory=100 * 10**9).context == 2**20
    # 8 bits, and 16 of scale and 16 of bias for 64 of them
    assert plan_memory(big, 1, kv_bits=8).kv_per_token / plan.kv_per_token == (8 + 32 / 64) / 16
    assert plan_memory(big, 1, kv_bits=4).kv_per_token / plan.kv_per_token == (4 + 32 / 64) / 16
    rotated = plan_memory(big, 1, kv_bits=(8, 4), kv_rotate=True)
    assert rotated.kv_per_token / plan.kv_per_token == (6 + 32 / 64) / 16 == 0.40625


@pytest.mark.parametrize(("there", "reserve"), [(16 * GB, 3 * 2**30), (200 * GB, 10 * GB)])
def test_the_reserve(big: Path, there: int, reserve: int, elsewhere: None) -> None:
    assert plan_memory(big, 1, memory=there).limit == usable(there) == there - reserve


@pytest.mark.parametrize("there", [8, 12, 64])
def test_the_largest_context_is_exactly_the_largest(big: Path, there: int, elsewhere: None) -> None:
    there = there * 10**9
    for name, kv_bits in (("16 bit", None), ("8 bit", 8), ("8,4 bit", "8,4"), ("4 bit", 4)):
        most = plan_memory(big, 1, memory=there).max_context[name]
        assert most > 1
        assert plan_memory(big, most, kv_bits=kv_bits, memory=there).fits
        assert not plan_memory(big, most + 1, kv_bits=kv_bits, memory=there).fits
    plan = plan_memory(big, 1, memory=there)
    assert list(plan.max_context.values()) == sorted(plan.max_context.values())
    assert len(set(plan.max_context.values())) == 4
    assert set(plan_memory(big, 1, memory=4 * 10**9).max_context.values()) == {0}


def refusal(folder: Path, context: int, **options: Any) -> UsageError:
    with pytest.raises(UsageError, match=f"^{context:,} tokens need .* the limit is ") as error:
        require_memory(Checkpoint.open(folder), context, **options)
    assert error.value.remedies[-1] == {"force": True}
    return error.value


@pytest.mark.parametrize("there", [5.2, 6, 8, 16, 32])
@pytest.mark.parametrize("kv_bits", [None, 8, "8,4", 4])
@pytest.mark.parametrize("step", [128, 2048, 8192])
def test_the_remedies_fit(big: Path, there: float, kv_bits: int | str | None, step: int, elsewhere: None) -> None:
    """Each of the remedies, for contexts around and far past what fits."""
    options: dict[str, Any] = {"kv_bits": kv_bits, "memory": int(there * 10**9), "prefill_step_size": step}
    most = plan_memory(big, 1, **options).max_context
    name = "16 bit" if kv_bits is None else f"{kv_bits} bit"
    if most[name]:
        require_memory(Checkpoint.open(big), most[name], **options)
    for context in {most[name] + 1, most["8 bit"] + 1, most["4 bit"], most["4 bit"] + 1, 3 * most["4 bit"] + 10}:
        if context <= most[name]:
            continue
        error = refusal(big, context, **options)
        plan = plan_memory(big, context, **options)
        for size in (plan.total, plan.weights, plan.kv, plan.prefill, plan.limit):
            assert format_size(size) in error.message
        for way in error.remedies[:-1]:
            assert way and plan_memory(big, context, **options | dict(way)).fits
        if found := re.search(r"up to ([\d,]+) tokens fit with keys and values in ([\d,]+) bit", error.message):
            bits = None if found[2] == "16" else found[2]
            assert plan_memory(big, int(found[1].replace(",", "")), **options | {"kv_bits": bits}).fits
        else:
            assert "only a smaller model" in error.message
            assert not plan_memory(big, 1, **options | {"kv_bits": 4}).fits


def test_two_changes_are_advised_if_one_is_not_enough(big: Path, elsewhere: None) -> None:
    options: dict[str, Any] = {"kv_bits": None, "memory": 8 * 10**9, "prefill_step_size": 8192}
    context = plan_memory(big, 1, **options | {"prefill_step_size": 128}).max_context["4 bit"]
    assert refusal(big, context, **options).remedies[0] == {"kv_bits": 4, "prefill_step_size": 128}


def test_the_command(random_llama: Path, run: Any, elsewhere: None) -> None:
    common = ["generate", "--model", random_llama, "--prompt", "import os", "--max-tokens", 4, "--json"]
    code, out, err = run(*common, "--memory", "3GB")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "need" in err and "--force" in err and "smaller model" in err
    code, out, err = run(*common, "--memory", "3GB", "--force")
    assert code == 0 and json.loads(out)["generation_tokens"] == 4, err
    assert run(*common, "--memory", "3.3GB")[0] == 0
    assert run(*common, "--memory", "4000 mb")[0] == 0


def test_plan_prints_what_the_design_says(random_llama: Path, run: Any, elsewhere: None) -> None:
    code, out, err = run("plan", "--model", random_llama, "--context", 100, "--json")
    plan = json.loads(out)
    assert code == 0 and out.count("\n") == 1, err
    assert set(plan) == KEYS and plan["context"] == 100 and plan["fits"] is True
    assert set(plan["max_context"]) == {"32 bit"}  # its type; its heads of 16 have no quantized form
    assert plan["context_length"] == 128
    code, out, _ = run("plan", "--model", random_llama)
    assert code == 0 and "128 tokens" in out and "It fits." in out
    code, out, _ = run("plan", "--model", random_llama, "--memory", "3GB")
    assert (
        code == 0
        and "only a smaller model, or one with fewer bits, would fit" in " ".join(out.split())
        and "nothing fits" in out
    )


def test_plan_names_the_largest_context_of_every_format(big: Path, run: Any, elsewhere: None) -> None:
    most = plan_memory(big, 1, memory=12 * 10**9).max_context
    code, out, _ = run("plan", "--model", big, "--context", most["8 bit"], "--memory", "12GB")
    assert code == 0 and all(
        re.search(f"in {name}: up to {count:,} tokens(;.*)?\n", out) for name, count in most.items()
    )
    assert "It does not fit: " in out and " ".join(out.split()).endswith(
        "in 4 bit: give --kv-bits 8 or --prefill-step-size 512"
    )


def test_plan_says_what_is_past_the_context(stdlib_llama: Path, copy_of: Any, run: Any, elsewhere: None) -> None:
    """Memory is not all that a context needs."""
    common = ["plan", "--model", stdlib_llama, "--memory", "3.3GB"]
    code, out, _ = run(*common)
    most = plan_memory(stdlib_llama, memory=33 * 10**8).max_context
    assert code == 0 and min(most.values()) > 512
    assert all(
        f"in {name}: up to {count:,} tokens, past the checkpoint's context" in out for name, count in most.items()
    )
    least, factor = min(most.values()), math.ceil(min(most.values()) / 512)
    assert f"{least:,} tokens exceed the checkpoint's context of 512 tokens: give --factor {factor} (which" in out
    assert "past" in run(*common, "--factor", factor - 1)[1]
    code, out, _ = run(*common, "--factor", 2**20)
    assert code == 0 and "past" not in out and "exceed" not in out
    assert least > 1024  # what is asked about counts, not all that fits
    out = run(*common, "--context", 600)[1]
    assert "600 tokens exceed the checkpoint's context of 512 tokens: give --factor 2 (which" in out
    code, out, _ = run(*common, "--context", 9 * least)
    factor = math.ceil(9 * least / 512)
    assert f"{9 * least:,} tokens exceed the checkpoint's context of 512 tokens: give --factor {factor} (which" in out
    windowed = copy_of(stdlib_llama, model_type="mistral", sliding_window=256, architectures=["MistralForCausalLM"])
    assert "the window of its attention" in run("plan", "--model", windowed, "--memory", "3.3GB")[1]
    error = refusal(stdlib_llama, 10**9, memory=33 * 10**8).message
    assert error.endswith(" bit, past the checkpoint's context of 512")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_format_is_named_after_what_it_is_computed_in(dtype: str, stdlib_llama: Path, tmp_path: Path) -> None:
    weights = {name: value.astype(getattr(mx, dtype)) for name, value in mx.load(str(stdlib_llama / WEIGHTS)).items()}
    shutil.copytree(stdlib_llama, tmp_path / "model")
    mx.save_safetensors(str(tmp_path / "model" / WEIGHTS), weights)
    assert list(plan_memory(tmp_path / "model", 8).max_context) == [
        "32 bit" if dtype == "float32" else "16 bit", "8 bit", "8,4 bit", "4 bit"
    ]  # fmt: skip


@pytest.mark.parametrize("there", [1, 10**6, 3 * 2**30 - 1, 3 * 2**30 + 1])
def test_memory_is_never_negative(there: int, big: Path, elsewhere: None) -> None:
    plan = plan_memory(big, 1000, memory=there).to_dict()
    assert all(value >= 0 for value in plan.values() if isinstance(value, int)) and not plan["fits"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 MB"), (118_449_999, "118.4 MB"), (999_949_999, "999.9 MB"), (999_950_000, "1.00 GB"),
        (16_345_678_901, "16.35 GB"), (1_203_254_000_000, "1,203.25 GB"),
    ],
)  # fmt: skip
def test_sizes_as_people_read_them(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", 0], "'--context'"),
        (["--context", -5], "'--context'"),
        (["--context", 2**31 + 1], "'--context'"),
        (["--kv-bits", 3], "'--kv-bits': '3' is not one of 8, 4"),
        (["--kv-bits", "8,4,4"], "'--kv-bits': '8,4,4' is not one of 8, 4, or two of them"),
        (["--kv-bits", "8,"], "'--kv-bits': '8,' is not one of 8, 4"),
        (["--kv-bits", 8], "multiple of 32, got 16"),
        (["--kv-rotate"], "rotation is for a quantized KV cache: give --kv-bits 4"),
        (["--memory", "lots"], "'--memory': it must be a size such as 500MB or 5GB, got 'lots'"),
        (["--memory", "-1GB"], "'--memory': it must be a size"),
        (["--prefill-step-size", 0], "'--prefill-step-size'"),
    ],
)
def test_a_wrong_argument_of_plan_is_one_line(random_llama: Path, run: Any, options: list[Any], message: str) -> None:
    code, out, err = run("plan", "--model", random_llama, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and re.search(message, err), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-bits", 5], "'--kv-bits': '5' is not one of 8, 4"),
        (["--kv-bits", 4], "multiple of 32, got 16"),
        (["--memory", "16"], "'--memory': it must be a size"),
        (["--prefill-step-size", 0], "'--prefill-step-size'"),
        (["--max-tokens", 500], "exceed the checkpoint's context of 128 tokens: .*--factor 4"),
    ],
)
def test_a_wrong_argument_of_generate_is_one_line(
    random_llama: Path, run: Any, options: list[Any], message: str
) -> None:
    common = ["--model", random_llama, "--prompt", "import os", "--max-tokens", 4]
    code, out, err = run("generate", *common, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and re.search(message, err), err


def test_the_named_factor_is_enough(random_llama: Path, run: Any) -> None:
    common = ["generate", "--model", random_llama, "--prompt", "import os\n" * 60, "--max-tokens", 4]
    code, _, err = run(*common)
    factor = re.search(r"--factor (\d+)", err)
    assert code == 2 and factor is not None
    assert run(*common, "--factor", factor[1])[0] == 0
    assert run(*common, "--factor", int(factor[1]) - 1)[0] == 2
