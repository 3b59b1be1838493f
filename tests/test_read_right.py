"""Configurations that people have, on every way to open a checkpoint: the right angles, and a line where it is due."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig, checkpoint, mlx_lm_models
from mlx_resonance.errors import UsageError

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from .checkpoints import source
from .parity.angles import of_transformers
from .random_models import MODELS, make
from .test_opened_once import COMMANDS

PLAIN = {"rope_theta": 500000.0, "rope_scaling": None}
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
LONGROPE = {"rope_type": "longrope", **LISTS}
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 500000.0}}
NO_LENGTH = "config.json has no max_position_embeddings: {} is assumed, as in transformers' {}"
WHOLE = "partial_rotary_factor = 0.5 is ignored, as in transformers' {}: whole heads are rotated"


@dataclass(frozen=True)
class Row:
    """A configuration.

    Args:
        keys: of config.json; `...` deletes one.
        same_as: keys of the config.json with which transformers gives the angles; None for the row's own.
        line: the warning, of which `{}` is the model type.
        rounded: whether the wavelengths are whole numbers.
        kinds: the model types.
        context: tokens.
    """

    keys: dict[str, Any]
    same_as: dict[str, Any] | None = None
    line: str | None = None
    rounded: bool = False
    kinds: tuple[str, ...] = ("llama",)
    context: int = 512


FOUR = ("llama", "mistral", "qwen2", "qwen3")
ROWS = {
    "transformers 5": Row({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, kinds=tuple(MODELS)),
    "transformers 5, yarn": Row({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **YARN}}),
    "resonance_rope": Row(PLAIN | {"resonance_rope": True}, rounded=True),
    "resonance_rope, yarn": Row(
        PLAIN | {"rope_scaling": YARN | {"finetuned": True}, "resonance_rope": True}, rounded=True
    ),
    "resonance_rope, transformers 5": Row(
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **YARN}, "resonance_rope": True}, rounded=True
    ),
    "resonance_rope, false": Row(PLAIN | {"rope_scaling": YARN, "resonance_rope": False}),
    "rope_ratio": Row(PLAIN | {"rope_ratio": 8}, line="rope_ratio = 8 is ignored, as in transformers' {}", kinds=FOUR),
    "rotary_pct": Row(PLAIN | {"rotary_pct": 0.25}, line="rotary_pct = 0.25 is ignored, as in transformers' {}"),
    "rotary_dim": Row(PLAIN | {"rotary_dim": 8}, line="rotary_dim = 8 is ignored, as in transformers' {}"),
    "rope_interleaved": Row(
        PLAIN | {"rope_interleaved": True}, line="rope_interleaved = True is ignored, as in transformers' {}"
    ),
    "no_rope_layers": Row(
        PLAIN | {"no_rope_layers": [1, 0, 1, 0]},
        line="no_rope_layers = [1, 0, 1, 0] is ignored, as in transformers' {}", kinds=FOUR,
    ),
    "keys that ask for nothing": Row(
        PLAIN | {"rope_ratio": 1, "rotary_pct": 1.0, "rotary_dim": 16, "rope_interleaved": False, "use_rope": True,
                 "rotary_emb_base": 500000, "no_rope_layers": [1, 1, 1, 1], "use_mrope": False, "rope_foo": None}
    ),
    "a tokenizer's own code": Row(
        PLAIN | {"rotary_pct": 0.25, "auto_map": {"AutoTokenizer": ["t.T", None]}},
        line="rotary_pct = 0.25 is ignored, as in transformers' {}",
    ),
    "two dictionaries that agree": Row(
        {"rope_theta": 1e6, "rope_scaling": YARN, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}}
    ),
    "a layer type without settings": Row(
        {"rope_parameters": NESTED | {"sliding_attention": None}}, {"rope_parameters": NESTED["full_attention"]},
        "rope_parameters has settings for full_attention: they are used in all layers",
    ),
    "ropeRatio, nope, alibi": Row(
        PLAIN | {"position_embedding_type": "alibi"},
        line="position_embedding_type = 'alibi' is ignored, as in transformers' {}",
    ),
    "partial_rotary_factor": Row(PLAIN | {"partial_rotary_factor": 0.5}, line=WHOLE, kinds=tuple(MODELS)),
    "partial_rotary_factor, transformers 5": Row(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}}, line=WHOLE,
    ),
    "no length": Row(
        PLAIN | {"max_position_embeddings": ...}, line=NO_LENGTH.format(2048, "{}"), kinds=("llama", "granite"),
        context=2048,
    ),
    "no length, qwen": Row(
        PLAIN | {"max_position_embeddings": ...}, line=NO_LENGTH.format(32768, "{}"),
        kinds=("qwen2", "qwen3", "smollm3"), context=32768,
    ),
    "no base": Row({"rope_scaling": None}, kinds=tuple(MODELS)),
    "truncate null": Row(
        PLAIN | {"rope_scaling": YARN | {"truncate": None}},
        line="truncate is null: false is assumed, as in transformers",
    ),
    "longrope without factor and lengths": Row(
        PLAIN | {"rope_scaling": LONGROPE, "max_position_embeddings": ...}, line=NO_LENGTH.format(2048, "{}"),
        context=2048,
    ),
    "longrope without original": Row(
        PLAIN | {"rope_scaling": LONGROPE},
        line="the longrope settings have no original_max_position_embeddings: 512 is assumed, max_position_embeddings",
    ),
    "yarn without original": Row(
        PLAIN | {"rope_scaling": {"type": "yarn", "factor": 8.0}},
        line="the yarn settings have no original_max_position_embeddings: 512 is assumed, max_position_embeddings",
        context=4096, kinds=FOUR,
    ),
    "llama3 without original": Row(
        PLAIN | {"rope_scaling": LLAMA3},
        line="the llama3 settings have no original_max_position_embeddings: 512 is assumed, max_position_embeddings",
    ),
    "yarn factor null": Row(
        PLAIN | {"rope_scaling": YARN | {"factor": None}},
        line="the factor of yarn is null: 512 / 64 is assumed, as in transformers",
    ),
    "dynamic and original": Row(
        PLAIN | {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}},
        context=1024,
    ),
    "default and factor": Row(PLAIN | {"rope_scaling": {"rope_type": "default", "factor": 1.0}}),
    "original as a float": Row(PLAIN | {"rope_scaling": YARN | {"original_max_position_embeddings": 64.0}}),
    "one layer type": Row(
        {"rope_parameters": NESTED}, {"rope_parameters": NESTED["full_attention"]},
        "rope_parameters has settings for full_attention: they are used in all layers", kinds=tuple(MODELS),
    ),
    "one layer type, named in layer_types": Row(
        {"rope_parameters": NESTED, "layer_types": ["full_attention"] * 4},
        {"rope_parameters": NESTED["full_attention"]},
        "rope_parameters has settings for full_attention: they are used in all layers",
    ),
    "rope_theta null": Row({"rope_theta": None}, {}, "rope_theta is null: 10000 is assumed"),
    "head_dim missing": Row(PLAIN | {"head_dim": ...}, kinds=("llama", "mistral", "qwen2")),
}  # fmt: skip
CASES = [(name, kind) for name, row in ROWS.items() for kind in row.kinds]


def written(folder: Path, kind: str, keys: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """A random checkpoint with other rope keys in config.json, and that config.json."""
    make(folder, kind, RopeConfig(16, max_position_embeddings=512), "4")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_theta", "rope_scaling"):
        del config[key]
    config = {key: value for key, value in (config | keys).items() if value is not ...}
    path.write_text(json.dumps(config))
    return folder, config


def expected(row: Row, config: dict[str, Any]) -> list[np.ndarray]:
    """transformers' radians per token, and the attention scale, within the trained context and past it; rounded."""
    keys = config if row.same_as is None else {k: v for k, v in config.items() if k not in row.keys} | row.same_as
    found = of_transformers({key: value for key, value in keys.items() if key != "layer_types"})
    if row.rounded:
        for angles in found:
            angles[:-1] = 2 * np.pi / np.rint(2 * np.pi / angles[:-1])
    return found


def of_rope(rope: RopeConfig) -> list[np.ndarray]:
    lengths = (16, 3000) if rope.depends_on_length else (None, None)
    return [np.append(f.inv_freq, f.attention_scale) for f in map(rope.frequencies, lengths)]


def same(mine: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_angles_are_those_of_transformers_and_the_line_is_said(
    name: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = ROWS[name]
    folder, config = written(tmp_path / "model", kind, row.keys)
    theirs = expected(row, config)
    caplog.clear()
    opened = Checkpoint.open(folder)
    lines = [] if row.line is None else [row.line.format(kind)]
    said = [record.message for record in caplog.records if record.name == "mlx_resonance"]
    assert [line for line in said if line in lines] == lines and (lines or not said)
    same(of_rope(opened.rope), theirs)
    assert opened.rope.is_resonant == row.rounded and opened.rope.context_length == row.context
    # What is written for it reads the same, without a word.
    caplog.clear()
    again = RopeConfig.from_hf(opened.mlx_config)
    assert again == opened.rope and caplog.records == []


LM_GENERATE = ("lm", "generate", "--model", "{model}", "--prompt", "import os", "--max-tokens", 2)
WAYS = {**COMMANDS, "lm generate": LM_GENERATE}
OTHER_ROPES = ("--rope", "--factor")  # options after which a command uses other settings than the checkpoint's


def arguments(command: str, places: dict[str, Path], rope_type: str) -> list[str]:
    """Of a command that uses the checkpoint's own rope settings."""
    parts = [str(part).format(**places) for part in WAYS[command]]
    parts = [part for i, part in enumerate(parts) if not {part, *parts[max(0, i - 1) : i]} & set(OTHER_ROPES)]
    if command == "convert":
        parts += ["--json", *([] if "resonance" in rope_type else ["--no-resonance"])]
    return [*parts, "--rope", rope_type] if command == "finetune" and "default" in rope_type else parts


@pytest.mark.parametrize("command", WAYS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resonance_rope, yarn", "llama"),
        ("partial_rotary_factor", "qwen3"),
        ("one layer type", "qwen2"),
        ("truncate null", "llama"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in CASES),
    ],
)
def test_on_every_way_to_open_it(
    name: str, kind: str, command: str, tmp_path: Path, run: Any, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model that a command builds rotates by these angles, and the line comes once."""
    row = ROWS[name]
    folder, config = written(tmp_path / "model", kind, row.keys)
    ropes: list[RopeConfig] = []
    for module in (checkpoint, mlx_lm_models):
        of_module = module.set_rope

        def set_rope(model: Any, rope: RopeConfig, of_module: Any = of_module) -> None:
            ropes.append(rope)
            of_module(model, rope)

        monkeypatch.setattr(module, "set_rope", set_rope)
    (tmp_path / "text.txt").write_text(source()[:2000])
    (tmp_path / "prompts.jsonl").write_text('{"id": 1, "prompt": "import os"}\n')
    places = {"model": folder, "new": tmp_path / "new"}
    places |= {"text": tmp_path / "text.txt", "prompts": tmp_path / "prompts.jsonl"}
    parts = arguments(command, places, RopeConfig.from_hf(config).rope_type)
    changing = RopeConfig.from_hf(config).depends_on_length
    code, out, err = run(*parts)
    if changing and command in ("generate with a cache", "generate for a file"):
        assert code == 2 and "change with the length of a text" in err, err
        return
    assert code == 0, err
    lines = [] if row.line is None else [row.line.format(kind)]
    assert all(err.count(f"warning: {line}\n") == 1 for line in lines), err
    theirs = expected(row, config)
    assert ropes or command in ("inspect", "plan")
    for rope in ropes:
        same(of_rope(rope), theirs)
    if command == "inspect" and not changing:
        wavelengths = np.array(json.loads(run(*parts, "--json")[1])["wavelengths"])
        np.testing.assert_allclose(2 * np.pi / wavelengths, theirs[1][:-1], rtol=2e-5)
    if command == "convert":
        assert json.loads(out)["checks"]["logits"]["error"] < 1e-4


REFUSED = {
    "partial and scaled": (PLAIN | {"rope_scaling": YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "a flag that its code ignores": (
        PLAIN | {"rope_scaling": {"type": "linear", "factor": 4.0}, "resonance_rope": True}, "resonance_linear",
    ),
    "a flag that is no flag": (PLAIN | {"resonance_rope": "yes"}, "resonance_rope must be true or false"),
    "its own code": (PLAIN | {"rope_ratio": 8, "auto_map": {"AutoModelForCausalLM": "m.M"}}, "own code (auto_map)"),
    "two layer types": (
        {"rope_parameters": NESTED | {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        "differs by layer type",
    ),
    "dynamic and another original": (
        PLAIN | {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
        "which counts from max_position_embeddings = 512",
    ),
    "su": (PLAIN | {"rope_scaling": LONGROPE | {"rope_type": "su"}}, "it is called longrope now"),
    "dynamic-yarn": (PLAIN | {"rope_scaling": YARN | {"type": "dynamic-yarn"}}, "with the scaling yarn"),
    "two dictionaries": (
        {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}}, "rope_parameters has rope_theta = 1000000.0",
    ),
    "an object as a number": (PLAIN | {"rope_scaling": YARN | {"factor": {"a": 1}}}, "factor must be a number"),
    "a default with a factor": (PLAIN | {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor = 2.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", ["generate", "inspect", "plan", "finetune", "convert", "lm generate", "perplexity"])
def test_other_angles_are_refused_everywhere(
    name: str, command: str, tmp_path: Path, run: Any, installed: None
) -> None:
    keys, message = REFUSED[name]
    folder, _ = written(tmp_path / "model", "llama", keys)
    (tmp_path / "text.txt").write_text(source()[:2000])
    places = {"model": folder, "new": tmp_path / "new", "text": tmp_path / "text.txt", "prompts": ""}
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*(str(part).format(**places) for part in WAYS[command]))
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UsageError, match="RopeConfig"):
        mlx_lm.load(str(folder))


def test_a_layer_without_rope_is_one_in_transformers_too(tmp_path: Path) -> None:
    """SmolLM 3's `no_rope_layers` and `no_rope_layer_interval` are honoured."""
    for i, keys in enumerate(({"no_rope_layers": [0, 1, 1, 0]}, {"no_rope_layer_interval": 2}, {})):
        folder, _ = written(tmp_path / str(i), "smollm3", PLAIN | {"pad_token_id": None} | keys)
        model = Checkpoint.open(folder).load()
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = theirs(torch.arange(60)[None]).logits.numpy()
        ours = np.array(model(mx.arange(60)[None]))
        assert np.abs(ours - logits).max() < 1e-4 * np.abs(logits).max()
