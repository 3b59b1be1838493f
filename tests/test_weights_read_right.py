"""Weights and files that people have: read right, or refused in a line that names the thing; verify misses nothing."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_resonance.convert.checkpoint as checkpoint
from mlx_resonance import Checkpoint, RopeConfig
from mlx_resonance.convert import VerificationError, convert, plan, source, verify, weights
from mlx_resonance.errors import MissingFileError, UsageError

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch

from .random_models import make

ROPE = RopeConfig(16, max_position_embeddings=512)
NORM = "model.layers.1.input_layernorm.weight"
COMMANDS: dict[str, tuple[Any, ...]] = {
    "generate": ("generate", "-m", "{model}", "--prompt", "import os", "--max-tokens", 2),
    "plan": ("plan", "-m", "{model}"),
    "inspect": ("inspect", "{model}"),
    "finetune": ("finetune", "-m", "{model}", "--data", "{text}", "--mlx-path", "{new}", "--length", 64, "--steps", 1),
    "perplexity": (
        "eval",
        "perplexity",
        "-m",
        "{model}",
        "--data",
        "{text}",
        "--contexts",
        32,
        "--stride",
        16,
        "--output",
        "{new}",
    ),
    "lm generate": ("lm", "generate", "--model", "{model}", "--prompt", "import os", "--max-tokens", 2),
}
CONVERT = ("convert", "{model}", "--mlx-path", "{new}", "--verify")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make(tmp_path / "model", "llama", ROPE, "4")


def change(folder: Path, edit: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> None:
    path = str(folder / "model.safetensors")
    tensors = edit(dict(mx.load(path)))
    mx.eval(tensors)
    mx.save_safetensors(path, tensors, {"format": "mlx"})


def config_of(folder: Path, **keys: Any) -> dict[str, Any]:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps(config))
    return config


def filled(command: tuple[Any, ...], model: Path) -> list[str]:
    text = model.parent / "text.txt"
    text.write_text("import os\n" * 200)
    return [str(part).format(model=model, text=text, new=model.parent / "new") for part in command]


@pytest.mark.parametrize("command", [*COMMANDS.values(), CONVERT], ids=[*COMMANDS, "convert"])
@pytest.mark.parametrize(
    ("prefix", "named"),
    [
        ("language_model.model.", "begin with 'language_model.model.'"),
        ("transformer.", "begin with 'transformer.'"),
        ("", "have no prefix, as layers.0."),
    ],
)
def test_another_prefix_is_named(
    model: Path, run: Any, prefix: str, named: str, command: tuple[Any, ...], installed: None
) -> None:
    change(model, lambda tensors: {prefix + name.removeprefix("model."): value for name, value in tensors.items()})
    code, out, err = run(*filled(command, model))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert named in err and "expected 'model.', as in model.layers.0" in err and not (model.parent / "new").exists()


@pytest.mark.parametrize("command", [c for n, c in COMMANDS.items() if n != "lm generate"])
def test_torch_files_are_for_convert(model: Path, run: Any, command: tuple[Any, ...]) -> None:
    tensors = {
        name: torch.from_numpy(np.array(value)) for name, value in mx.load(str(model / "model.safetensors")).items()
    }
    torch.save(tensors, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    code, out, err = run(*filled(command, model))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "has no model*.safetensors but .bin files: convert reads them" in err
    assert run(*filled(CONVERT, model))[0] == 0
    with pytest.raises(MissingFileError, match="convert reads them"):
        Checkpoint.open(model)


@pytest.mark.parametrize("method", [{}, {"quant_method": "bitsandbytes"}])
@pytest.mark.parametrize("command", [*COMMANDS.values(), CONVERT], ids=[*COMMANDS, "convert"])
def test_a_leftover_quantization_config_is_ignored(
    model: Path, run: Any, method: dict[str, str], command: tuple[Any, ...], installed: None
) -> None:
    config_of(model, quantization_config=method | {"load_in_4bit": False, "load_in_8bit": False})
    parts = [*filled(command, model), *(["--rope", "default"] if command[0] == "finetune" else [])]
    code, _, err = run(*parts)
    assert code == 0, err


def test_one_that_says_quantized_is_refused(model: Path, installed: None) -> None:
    config_of(model, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UsageError, match="quantized with bitsandbytes"):
        convert(model, model.parent / "out")
    for found in ({"load_in_4bit": True}, {}, {"quant_method": 3}, "fp8"):
        config_of(model, quantization_config=found or {"bits": 4})
        with pytest.raises(UsageError, match="quantization_config must be an object with a quant_method"):
            Checkpoint.open(model)
        with pytest.raises(UsageError, match="quantization_config must be an object with a quant_method"):
            mlx_lm.utils.load_model(model)


def test_a_dynamic_yarn_is_converted_with_another_scaling(model: Path, run: Any) -> None:
    """Nothing was trained with it: up to the context before scaling it is plain RoPE."""
    scaling = {"type": "dynamic-yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config_of(model, rope_scaling=scaling)
    code, _, err = run("convert", model, "--mlx-path", model.parent / "new")
    assert code == 2 and "convert the checkpoint with the scaling yarn" in err
    options = ("--rope", "yarn", "--factor", 8, "--verify")
    code, _, err = run("convert", model, "--mlx-path", model.parent / "new", *options)
    assert code == 0, err
    rope = Checkpoint.open(model.parent / "new").rope
    assert (rope.rope_type, rope.trained_length, rope.context_length) == ("resonance_yarn", 128, 1024)
    assert verify(model.parent / "new", model).problems == []
    config_of(model, rope_scaling=scaling | {"finetuned": True})  # trained with YaRN: which factor is not said
    code, _, err = run("convert", model, "--mlx-path", model.parent / "other", *options[:-1])
    assert code == 2 and "trained with a dynamic YaRN, whose factor config.json does not state" in err


def without(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if name != NORM}


def drop_in_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of headers misses it."""
    read = source.SafetensorsFile.__init__

    def init(self: Any, path: Path) -> None:
        read(self, path)
        self.tensors = without(self.tensors)

    monkeypatch.setattr(source.SafetensorsFile, "__init__", init)


def leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source believes that nothing is lost without it."""
    init = source.Source.__init__

    def with_reason(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.left_out = {**self.left_out, NORM: "not needed"}
        self.checkpoint.tensors.pop(NORM, None)

    monkeypatch.setattr(source.Source, "__init__", with_reason)


def drop_in_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is planned to have it."""
    files = plan.plan_files
    monkeypatch.setattr(plan, "plan_files", lambda recipes, *rest: files([r for r in recipes if r.name != NORM], *rest))


def drop_when_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not among the tensors that are computed."""
    make_tensors = weights._make
    monkeypatch.setattr(weights, "_make", lambda *args: without(make_tensors(*args)))


def drop_when_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer leaves it out of the file."""
    save = mx.save_safetensors
    monkeypatch.setattr(
        weights.mx,
        "save_safetensors",
        lambda path, tensors, *args, **options: save(path, without(tensors), *args, **options),
    )


def zero_when_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, but not with its values."""
    make_tensors = weights._make

    def zeroed(*args: Any) -> dict[str, mx.array]:
        return {name: mx.zeros_like(value) if name == NORM else value for name, value in make_tensors(*args).items()}

    monkeypatch.setattr(weights, "_make", zeroed)


STEPS = [drop_in_header, leave_out, drop_in_plan, drop_when_made, drop_when_written, zero_when_made]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_verify_fails_if_a_step_drops_a_tensor(
    model: Path, run: Any, step: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the check of names against the model, which would stop a conversion before it begins.
    monkeypatch.setattr(plan, "check_tensors", lambda checkpoint: checkpoint.build())
    monkeypatch.setattr(
        sys.modules["mlx_resonance.convert.verify"], "check_tensors", lambda checkpoint: checkpoint.build()
    )
    with monkeypatch.context() as patch:
        step(patch)
        with pytest.raises(VerificationError, match=NORM.replace(".", r"\.")):
            convert(model, model.parent / "out", verify=True)
    assert not (model.parent / "out").exists()


def test_verify_names_every_tensor_of_the_source(model: Path, run: Any) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def edit(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        return tensors | {buffer: mx.ones(8), "lm_head.weight": tensors["model.embed_tokens.weight"]}

    change(model, edit)
    names = set(mx.load(str(model / "model.safetensors")))
    for options, kinds in (
        ((), {"copied"}),
        (("--dtype", "bfloat16"), {"rounded"}),
        (("-q",), {"quantized", "copied"}),
        (("--rope", "yarn", "--factor", 8, "--portable"), {"copied"}),
    ):
        new = model.parent / "-".join(["new", *map(str, options)])
        code, out, err = run("convert", model, "--mlx-path", new, "--verify", "--json", *options)
        assert code == 0, err
        fates = json.loads(out)["checks"]["source_tensors"]
        assert set(fates) == names
        assert fates.pop(buffer) == "left out: computed from config.json"
        assert fates.pop("lm_head.weight") == "left out: equal to model.embed_tokens.weight, to which it is tied"
        assert set(fates.values()) >= kinds and set(fates.values()) <= {"copied", "rounded", "quantized"}
        assert "of the source " in err and "2 left out" in err
        record = json.loads((new / "conversion.json").read_text())
        assert set(record["checks"]["source_tensors"]) == names
    shutil.rmtree(new)


def test_a_left_out_head_is_compared_again(model: Path) -> None:
    """What made the source believe that the head equals the embedding is not trusted."""
    change(model, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    opened = source.open_source(model)
    assert opened.left_out == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source.Source, "_same", lambda self, one, other: True)
        with pytest.raises(VerificationError, match=r"model\.embed_tokens\.weight: \d+ elements"):
            checkpoint.convert(model, model.parent / "out", verify=True)


def quantized(model: Path, edit: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Path:
    """A 4-bit checkpoint, tied, with a head that was made from the embedding's parts."""
    made = convert(model, model.parent / "quantized", resonance=False, quantize=True).path
    config_of(made, tie_word_embeddings=True)

    def with_head(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        parts = {part: tensors[f"model.embed_tokens.{part}"] for part in ("weight", "scales", "biases")}
        return tensors | {f"lm_head.{part}": value for part, value in edit(parts).items()}

    change(made, with_head)
    return made


def test_a_quantized_head_is_compared_part_by_part(model: Path, installed: None) -> None:
    same = quantized(model, lambda parts: parts)
    opened = Checkpoint.open(same)
    assert opened.config["tie_word_embeddings"] is True and len(opened.head.left_out) == 3
    expected = np.array(opened.load()(mx.arange(30)[None]))
    assert np.array_equal(expected, np.array(mlx_lm.utils.load_model(same)[0](mx.arange(30)[None])))
    assert convert(same, model.parent / "again", resonance=False, verify=True).checks is not None
    shutil.rmtree(same)
    other = quantized(model, lambda parts: parts | {"scales": 2 * parts["scales"], "biases": 2 * parts["biases"]})
    opened = Checkpoint.open(other)
    assert opened.config["tie_word_embeddings"] is False
    twice = np.array(opened.load()(mx.arange(30)[None]))
    np.testing.assert_allclose(twice, 2 * expected, rtol=1e-3, atol=1e-3)
    loaded, config = mlx_lm.utils.load_model(other)
    assert config["tie_word_embeddings"] is False  # which mlx-lm's own converter writes
    assert np.array_equal(twice, np.array(loaded(mx.arange(30)[None])))
    done = convert(other, model.parent / "untied", resonance=False, verify=True)
    assert np.array_equal(twice, np.array(Checkpoint.open(done.path).load()(mx.arange(30)[None])))
    with pytest.MonkeyPatch.context() as patch:  # the scales alone differ
        patch.setattr(source.Source, "_same", lambda self, one, name: True)
        with pytest.raises(VerificationError, match=r"embed_tokens\.(scales|biases)"):
            convert(other, model.parent / "dropped", resonance=False, verify=True)


def test_a_head_alone_keeps_its_quantization(model: Path) -> None:
    made = convert(model, model.parent / "quantized", resonance=False, quantize=True).path
    expected = np.array(Checkpoint.open(made).load()(mx.arange(30)[None]))
    settings = {"group_size": 64, "bits": 4, "mode": "affine", "lm_head": {"group_size": 64, "bits": 4}}
    names = {f"model.embed_tokens.{part}": f"lm_head.{part}" for part in ("weight", "scales", "biases")}
    change(made, lambda tensors: {names.get(name, name): value for name, value in tensors.items()})
    config_of(made, tie_word_embeddings=True, quantization=settings, quantization_config=settings)
    assert np.array_equal(expected, np.array(Checkpoint.open(made).load()(mx.arange(30)[None])))
    done = convert(made, model.parent / "again", resonance=False, verify=True)
    assert "model.embed_tokens" in json.loads((done.path / "config.json").read_text())["quantization"]


def test_smollm3_is_tied_by_default(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "smollm3", ROPE, "4")
    expected = np.array(Checkpoint.open(folder).load()(mx.arange(30)[None]))
    change(folder, lambda tensors: {n.replace("model.embed_tokens", "lm_head"): v for n, v in tensors.items()})
    config = config_of(folder)
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert np.array_equal(expected, np.array(Checkpoint.open(folder).load()(mx.arange(30)[None])))


def test_a_type_that_mlx_lacks_does_not_stop_the_comparison(model: Path, run: Any) -> None:
    """inspect and plan read no weights otherwise."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(model / "model.safetensors"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8, dtype=torch.float64)
    save_file(tensors, str(model / "model.safetensors"))
    for command in ("plan", "inspect"):
        code, _, err = run(*filled(COMMANDS[command], model))
        assert code == 0, err


@pytest.mark.parametrize("key", ["rms_norm_eps", "num_key_value_heads"])
def test_absent_keys_are_transformers_defaults_or_refused(
    model: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(model)
    del config[key]
    (model / "config.json").write_text(json.dumps(config))
    if key == "num_key_value_heads":  # in transformers all heads, which are more than the weights have
        with pytest.raises(UsageError, match=r"k_proj\.weight has shape \(32, 64\), config\.json asks for \(64, 64\)"):
            Checkpoint.open(model).load()
        return
    assert Checkpoint.open(model).load().args.rms_norm_eps == 1e-6
    assert "config.json has no rms_norm_eps: 1e-06 is assumed, as in transformers' llama" in caplog.text


def test_part_of_a_model_can_be_loaded_without_the_other_files(model: Path, installed: None) -> None:
    """mlx-lm does that where several processes share the layers."""
    tensors = mx.load(str(model / "model.safetensors"))
    mx.save_safetensors(str(model / "model-00001-of-00002.safetensors"), dict(tensors))
    (model / "model.safetensors").unlink()
    names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    names |= {NORM: "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    loaded, _ = mlx_lm.utils.load_model(model, lazy=True, strict=False)
    assert loaded.args.rope.dims == 16
    with pytest.raises(MissingFileError, match="model-00002"):
        mlx_lm.utils.load_model(model)
