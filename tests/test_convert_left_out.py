"""What a result lacks of its source: named with a reason, or refused; and every file is opened once."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_resonance.convert.checkpoint as checkpoint
from mlx_resonance import Checkpoint, files
from mlx_resonance.convert import VerificationError, convert, verify
from mlx_resonance.convert.source import SafetensorsFile, Source
from mlx_resonance.errors import UsageError

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from .checkpoints import weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"
TIED = f"{HEAD} (equal to {EMBEDDING}, to which it is tied)"
BUFFERS = f"{INV_FREQ.format(0)} and 1 more (computed from config.json)"


@pytest.fixture
def source(random_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """source(change, key=value, …): a copy in one file, with changed tensors and keys of config.json."""

    def make(change: Callable[[dict[str, mx.array]], object], name: str = "source", **keys: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(random_llama, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        tensors: dict[str, mx.array] = {}
        for file in sorted(random_llama.glob("*.safetensors")):
            tensors |= mx.load(str(file))
        change(tensors)
        mx.eval(tensors)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        config = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def tied(tensors: dict[str, mx.array]) -> None:
    tensors[HEAD] = tensors[EMBEDDING]


def almost_tied(tensors: dict[str, mx.array]) -> None:
    """Change one number of the head."""
    tensors[HEAD] = mx.where(mx.arange(tensors[EMBEDDING].size).reshape(-1, 64) == 77, 1, tensors[EMBEDDING])


def buffers(tensors: dict[str, mx.array]) -> None:
    """The `inv_freq` buffers of old checkpoints."""
    for i in range(2):
        tensors[INV_FREQ.format(i)] = mx.ones(8)


@pytest.mark.parametrize("options", [{}, {"quantize": True}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize(
    ("change", "tie", "line"),
    [
        (tied, True, TIED),
        (buffers, False, BUFFERS),
        (lambda t: (tied(t), buffers(t)), True, f"{TIED}, {BUFFERS}"),
    ],
    ids=["head", "buffers", "both"],
)
def test_what_is_left_out_is_named_with_the_reason(
    run: Any,
    source: Callable[..., Path],
    tmp_path: Path,
    change: Callable[[dict[str, mx.array]], object],
    tie: bool,
    line: str,
    options: dict[str, Any],
) -> None:
    folder, out = source(change, tie_word_embeddings=tie), tmp_path / "out"
    flags = {"quantize": ["-q"], "dtype": ["--dtype", "bfloat16"]}
    more = [flag for name in options for flag in flags[name]]
    code, stdout, stderr = run("convert", folder, "--mlx-path", out, "--verify", "--json", *more)
    assert code == 0, stderr
    assert f"left out of the source: {line}\n" in stderr
    done = json.loads(stdout)
    assert done["checks"]["left_out"] == done["left_out"] != {}
    assert not set(done["left_out"]) & set(weights(out))
    again = verify(out, folder)
    assert again.problems == [] and again.left_out == done["left_out"]
    code, _, stderr = run("convert", folder, "--mlx-path", tmp_path / "other", "--dry-run", *more)
    assert code == 0 and line in stderr


def logits(folder: Path) -> np.ndarray:
    return np.array(Checkpoint.open(folder).load()(mx.arange(40)[None]))


def of_transformers(folder: Path) -> np.ndarray:
    """What transformers reads: it does not tie a head that differs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits.numpy()


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_untied(
    run: Any, source: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, installed: None
) -> None:
    folder = source(almost_tied, tie_word_embeddings=True)
    expected = of_transformers(folder)
    caplog.clear()
    line = f"{HEAD} differs from {EMBEDDING}, to which config.json ties it: both are used, untied"
    np.testing.assert_allclose(logits(folder), expected, atol=1e-5 * np.abs(expected).max())
    assert [record.message for record in caplog.records] == [line]
    code, stdout, stderr = run(
        "convert", folder, "--mlx-path", tmp_path / "out", "--no-resonance", "--verify", "--json"
    )
    assert code == 0 and stderr.count(f"warning: {line}\n") == 1, stderr
    checks = json.loads(stdout)["checks"]
    assert checks["source_tensors"][HEAD] == checks["source_tensors"][EMBEDDING] == "copied"
    assert checks["logits"]["error"] < 1e-4
    caplog.clear()
    assert np.array_equal(logits(tmp_path / "out"), logits(folder))
    assert mlx_lm.load(str(folder), tokenizer_config={})[0].args.tie_word_embeddings is False
    model = mlx_lm.utils.load_model(folder)[0]
    assert np.array_equal(np.array(model(mx.arange(40)[None])), logits(folder))
    convert(source(tied, "other", tie_word_embeddings=True), tmp_path / "result")
    assert f"{HEAD} is in the source only" in verify(tmp_path / "result", folder).problems


def test_a_tied_model_may_have_its_head_alone(
    run: Any, source: Callable[..., Path], tmp_path: Path, installed: None
) -> None:
    """The embedding is then the head."""
    both = source(tied, tie_word_embeddings=True)
    folder = source(lambda t: t.update({HEAD: t.pop(EMBEDDING)}), "head", tie_word_embeddings=True)
    assert np.array_equal(logits(folder), logits(both))
    assert np.array_equal(np.array(mlx_lm.utils.load_model(folder)[0](mx.arange(40)[None])), logits(both))
    code, stdout, stderr = run("convert", folder, "--mlx-path", tmp_path / "out", "--verify", "--json")
    assert code == 0 and f"warning: {EMBEDDING} is not in the weights" in stderr
    assert json.loads(stdout)["checks"]["source_tensors"][HEAD] == f"merged into {EMBEDDING}"
    assert EMBEDDING in weights(tmp_path / "out") and HEAD not in weights(tmp_path / "out")
    assert verify(tmp_path / "out", folder).problems == []


def test_the_file_of_a_tied_head_is_kept_until_the_embedding_is_done(source: Callable[..., Path]) -> None:
    """It is compared with the embedding, and not downloaded a second time for that."""
    folder = source(tied, tie_word_embeddings=True)
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(str(folder / "model-1.safetensors"), {HEAD: tensors.pop(HEAD)})
    mx.save_safetensors(str(folder / "model-2.safetensors"), tensors)
    released: list[str] = []

    class Watched(SafetensorsFile):
        def release(self) -> None:
            released.append(self.name)

    opened = Source("name", None, folder, [Watched(folder / f"model-{i}.safetensors") for i in (1, 2)])
    opened.release(name for name in opened.checkpoint.tensors if name != EMBEDDING)
    assert released == []
    opened.release([EMBEDDING])
    assert sorted(released) == ["model-1.safetensors", "model-2.safetensors"]


def test_a_head_that_config_json_does_not_tie_is_kept(source: Callable[..., Path], tmp_path: Path) -> None:
    done = convert(source(almost_tied, tie_word_embeddings=False), tmp_path / "out", verify=True)
    assert done.left_out == {} and HEAD in weights(tmp_path / "out")


def test_verification_reads_the_names_from_the_sources_headers(
    source: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that a conversion drops silently, as mlx-lm's `sanitize` does, is a problem."""
    bias = "model.layers.1.self_attn.q_proj.bias"
    folder = source(lambda tensors: tensors.update({bias: mx.ones(64)}))
    with pytest.raises(UsageError, match=f"{bias} is in the weights, but not in the llama model"):
        convert(folder, tmp_path / "out")
    plain = source(lambda tensors: None, "plain")
    convert(plain, tmp_path / "out")
    assert verify(tmp_path / "out", folder).problems == [f"{bias} is in the source only"]
    assert verify(tmp_path / "out", plain).problems == []

    def forgetful(*arguments: Any, **options: Any) -> Any:
        opened = open_source(*arguments, **options)
        del opened.checkpoint.tensors[bias], opened.checkpoint.headers["model.safetensors"][bias]
        return opened

    open_source = checkpoint.open_source
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "open_source", forgetful)
        with pytest.raises(VerificationError, match=f"{bias} is in the source only"):
            convert(folder, tmp_path / "forgetful", verify=True)


@pytest.mark.parametrize("report", [False, True])
def test_every_config_and_header_is_read_once(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: bool
) -> None:
    reads: Counter[Path] = Counter()
    for name in ("read_config", "read_header"):
        original = getattr(files, name)

        def counted(path: Path, original: Any = original) -> Any:
            reads[path] += 1
            return original(path)

        for module in [module for key, module in sys.modules.items() if key.startswith("mlx_resonance")]:
            if getattr(module, name, None) is original:
                monkeypatch.setattr(module, name, counted)
    text = tmp_path / "text"
    text.write_text("import os\n" * 20)
    options: dict[str, Any] = {"quantize": True, "quant_report": text} if report else {}
    convert(random_llama, tmp_path / "out", verify=True, max_shard_size="0.1MB", **options)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    opened = [random_llama, *random_llama.glob("*.safetensors")]
    made = [Path(), *map(Path, shards)]
    assert len(shards) > 1
    assert reads == Counter([*opened, *(tmp_path / "out.partial" / name for name in made)])
    reads.clear()
    verify(tmp_path / "out", random_llama)
    assert reads == Counter([*opened, *(tmp_path / "out" / name for name in made)])
