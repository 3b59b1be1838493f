"""Checkpoints that several tests share."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Exact float32 products on every GPU, here and in the processes that tests start. MLX reads this once.
os.environ["MLX_ENABLE_TF32"] = "0" if "mlx.core" not in sys.modules else "too late"

from mlx_resonance import cli  # before anything imports mlx.core: it loads a fast BLAS on Linux
from mlx_resonance.checkpoint import Checkpoint

import mlx.core as mx
import pytest

from .checkpoints import STDLIB_LLAMA, in_float32


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU that this machine lacks."""
    if item.get_closest_marker("metal") and not mx.metal.is_available():
        pytest.skip("no Metal on this machine")
    if item.get_closest_marker("gpu") and not mx.cuda.is_available():
        pytest.skip("no CUDA on this machine")


@pytest.fixture(scope="session", autouse=True)
def processes_without_torch() -> Iterator[None]:
    """Hide torch from the processes that tests start, since users may not have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).with_name("without_torch")), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def stdlib_llama() -> Path:
    """The checkpoint that comes with the package."""
    return STDLIB_LLAMA


@pytest.fixture(scope="session")
def checkpoint(stdlib_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32, which is fast on a CPU."""
    return in_float32(stdlib_llama, tmp_path_factory.mktemp("float32") / "model")


@pytest.fixture(scope="session")
def extended(stdlib_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted with Resonance-YaRN × 8."""
    from mlx_resonance.convert import convert

    folder = tmp_path_factory.mktemp("converted") / "stdlib-llama-8x"
    convert(stdlib_llama, folder, rope="yarn", factor=8, dtype="float32")
    return folder


@pytest.fixture(scope="session")
def tokenizer(stdlib_llama: Path) -> Any:
    """The tokenizer of these three."""
    return Checkpoint.open(stdlib_llama).tokenizer


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer LLaMA with 128 tokens of context as transformers saves it: shards, tokenizer, chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("source") / "random-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STDLIB_LLAMA / name, folder / name)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    )
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A random LLaMA\n")
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Any:
    """copy_of(folder, key=value, …): a copy with these keys of config.json changed; None deletes one."""

    def copy(folder: Path, **changes: Any) -> Path:
        target = tmp_path / "copy"
        shutil.copytree(folder, target)
        config = json.loads((target / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (target / "config.json").write_text(json.dumps(config))
        return target

    return copy


@pytest.fixture
def installed() -> Iterator[None]:
    """mlx-lm after `install()`, which is undone at the end."""
    from mlx_resonance import install, mlx_lm_models

    import mlx_lm.utils
    from mlx_lm.models import rope_utils

    install()
    yield
    steps = sys.modules["mlx_lm.generate"]
    ours = (mlx_lm.utils.load_model, mlx_lm.utils.load_tokenizer, rope_utils.initialize_rope, steps.generate_step)
    ours = (*ours, steps.speculative_generate_step)
    mlx_lm_models._replace({function: function.of_mlx_lm for function in ours})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """run(argument, …) -> exit code, stdout, stderr."""

    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlx-resonance", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capsys.readouterr()
        return done.value.code, out, err

    return run
