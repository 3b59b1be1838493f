"""The memory plan on Metal: its limit, what it refuses and what it warns of, and what Metal's attention stores."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, plan_memory
from mlx_resonance.errors import UsageError
from mlx_resonance.generation import memory
from mlx_resonance.generation.memory import FUSED_DIMS, complaint, fused_dims, require_memory, usable
from mlx_resonance.sizes import format_size

import mlx.core as mx
import pytest

from .sparse_checkpoints import sparse

GB = 10**9
LLAMAS = {  # hidden, feed-forward, layers, heads, key heads, vocabulary, bits, tied
    "3B": (3072, 8192, 28, 24, 8, 128_256, 4, True),
    "8B": (4096, 14336, 32, 32, 8, 128_256, 8, False),
}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Any:
    """mac(bytes): a Mac with this recommended working set."""
    return lambda size: monkeypatch.setattr(memory, "working_set", lambda: int(size))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Checkpoints with the sizes of Llama 3's, quantized."""
    folder = tmp_path_factory.mktemp("quantized")
    return {name: Checkpoint.open(sparse(folder / name, *shape)) for name, shape in LLAMAS.items()}


def test_a_mac_needs_no_reserve(quantized: dict[str, Checkpoint], mac: Any) -> None:
    """Metal's working set is without the system's share, and a budget is taken as given."""
    mac(5.73 * GB)
    assert plan_memory(quantized["3B"], 1).limit == usable() == 5_730_000_000
    assert plan_memory(quantized["3B"], 1, memory=4 * GB).limit == usable(4 * GB) == 4 * GB


@pytest.mark.parametrize(
    ("name", "working_set", "context", "verdict"),
    [  # a Mac with 8 GB has 5.73 GB for Metal, one with 16 GB has 11.45 GB
        ("3B", 5.73, 4096, "fits"),
        ("8B", 11.45, 4096, "fits"),
        ("3B", 5.73, 34_000, "tight"),
        ("8B", 11.45, 22_000, "tight"),
        ("8B", 5.73, 1, "refused"),
        ("3B", 5.73, 40_000, "refused"),
        ("8B", 11.45, 24_000, "refused"),
    ],
)
def test_a_mac_refuses_only_what_is_certain(
    quantized: dict[str, Checkpoint], mac: Any, name: str, working_set: float, context: int, verdict: str,
    caplog: pytest.LogCaptureFixture, run: Any,
) -> None:  # fmt: skip
    mac(working_set * GB)
    checkpoint = quantized[name]
    plan = plan_memory(checkpoint, context)
    exact = plan.weights + plan.kv
    assert plan.weights == pytest.approx({"3B": 1.81e9, "8B": 8.53e9}[name], rel=0.01)
    assert verdict == ("refused" if exact > plan.limit else "tight" if plan.total > plan.limit else "fits")
    assert (plan.fits, plan.tight) == (verdict != "refused", verdict == "tight")
    plan_command = ("plan", "-m", checkpoint.folder, "--context", context)
    out = run(*plan_command)[1]
    assert {"fits": "It fits.", "tight": "It may not fit: ", "refused": "It does not fit: "}[verdict] in out
    if verdict == "refused":
        with pytest.raises(UsageError, match=f"^{context:,} tokens need .* the limit is ") as error:
            require_memory(checkpoint, context)
        assert error.value.remedies[-1] == {"force": True}
        return
    with caplog.at_level(logging.WARNING, "mlx_resonance"):
        require_memory(checkpoint, context)
    assert len(caplog.records) == (verdict == "tight")
    for record in caplog.records:
        assert all(format_size(size) in record.message for size in (plan.total, plan.weights, plan.kv, plan.limit))
        assert record.remedies and "\n" not in record.message
        for way in record.remedies:
            better = plan_memory(checkpoint, context, **way)
            assert better.fits and not better.tight
        assert run(*plan_command)[2] == ""  # said on stdout, once


def test_a_warning_on_a_mac_names_the_flags(random_llama: Path, mac: Any, run: Any) -> None:
    """The run is not refused, and the line is on stderr."""
    plan = plan_memory(random_llama, 128)
    mac(plan.weights + plan_memory(random_llama, 10).kv)
    common = ("generate", "--model", random_llama, "--prompt", "import os", "--ignore-chat-template", "--temp", 0)
    code, _, err = run(*common, "--max-tokens", 2)
    assert code == 0 and err.count("tokens may need") == 1
    assert "warning: " in err and "the limit is" in err
    code, _, err = run(*common, "--max-tokens", 100)
    assert code == 2 and "tokens need" in err


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_the_largest_context_on_a_mac(quantized: dict[str, Checkpoint], mac: Any, kv_bits: int | None) -> None:
    """It is the largest that is not refused: what advice after a refusal gets past the check, if anything does."""
    mac(11.45 * GB)
    checkpoint, options = quantized["8B"], {"kv_bits": kv_bits}
    most = plan_memory(checkpoint, 1, **options).max_context
    own = most[f"{kv_bits or 16} bit"]
    assert plan_memory(checkpoint, own, **options).fits and not plan_memory(checkpoint, own + 1, **options).fits
    for context in {own + 1, most["8 bit"], most["4 bit"], most["4 bit"] + 1} - {own}:
        plan = plan_memory(checkpoint, context, **options)
        if plan.fits:
            continue
        error = complaint(checkpoint, plan, **options)
        assert error is not None and bool(error.remedies[:-1]) == (context <= most["4 bit"])
        for way in error.remedies[:-1]:
            assert plan_memory(checkpoint, context, **options | dict(way)).fits


def test_the_table_of_fused_head_sizes() -> None:
    assert list(FUSED_DIMS) == sorted(FUSED_DIMS)
    first = ".".join(map(str, next(iter(FUSED_DIMS))))
    assert fused_dims("0.25.9") == () and fused_dims(first) == next(iter(FUSED_DIMS.values()))
    assert fused_dims("0.32.0") == (64, 80, 128) and fused_dims("0.9.1000") == ()
    assert fused_dims("0.32.1") == fused_dims("0.32.10.dev20260822+abc") == fused_dims("1.0") == (64, 72, 80, 96, 128)
    for later, dims in FUSED_DIMS.items():
        assert fused_dims(".".join(map(str, later))) == dims


@pytest.mark.metal
@pytest.mark.parametrize("dims", [64, 72, 80, 96, 112, 128, 160, 192])
@pytest.mark.parametrize("mask", ["causal", "array"])
def test_the_table_is_what_metal_does(dims: int, mask: str) -> None:
    """Attention that stores its scores takes at least their size."""
    heads, length, total = 8, 512, 4096
    queries, keys = mx.zeros((1, heads, length, dims), mx.float16), mx.zeros((1, heads, total, dims), mx.float16)
    array = mx.ones((1, 1, length, total), mx.bool_)
    mx.eval(queries, keys, array)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    chosen = mask if mask == "causal" else array
    mx.eval(mx.fast.scaled_dot_product_attention(queries, keys, keys, scale=1.0, mask=chosen))
    stored = mx.get_peak_memory() - before >= 2 * heads * length * total
    assert stored == (dims not in fused_dims())


def test_what_metal_does_not_store(quantized: dict[str, Checkpoint], mac: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of one prompt go; a batch keeps its mask, a byte per query and key; a copied layer counts at last."""
    checkpoint, context = quantized["8B"], 2048 * 16
    mac(100 * GB)
    one = plan_memory(checkpoint, context).prefill
    batch = plan_memory(checkpoint, context, sequences=4).prefill
    assert batch == pytest.approx(4 * one + 4 * 2048 * context, abs=4)
    monkeypatch.setattr(memory, "FUSED_DIMS", {(0, 26, 0): (64,)})
    assert plan_memory(checkpoint, context).prefill == pytest.approx(one + 2048 * context * (32 * 2 + 1), abs=1)
    monkeypatch.undo()
    mac(100 * GB)
    plan = plan_memory(checkpoint, 2**20)
    assert plan.prefill == plan.kv // 32  # layers
