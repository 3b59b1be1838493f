"""verify(): what it notices, and that it reports nothing if nothing is wrong."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_resonance.convert.checkpoint as checkpoint
from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.convert import convert, verify
from mlx_resonance.errors import UsageError

import mlx.core as mx
import numpy as np
import pytest

Q_PROJ = "model.layers.1.self_attn.q_proj"
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "yarn": {"rope": "yarn", "factor": 8},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "4 bit": {"quantize": True},
    "mixed": {"quantize": True, "quant_predicate": "mixed_2_6", "dtype": "bfloat16"},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4", "dtype": "float16"},
    "mxfp8": {"quantize": True, "q_mode": "mxfp8"},
    "portable": {"portable": True, "rope": "yarn", "factor": 8},
    "portable, bfloat16": {"portable": True, "rope": "yarn", "factor": 8, "dtype": "bfloat16"},
    "dynamic": {"rope": "dynamic", "factor": 4},
    "shards": {"max_shard_size": "0.2MB"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_correct_conversion_has_no_problems(random_llama: Path, tmp_path: Path, name: str) -> None:
    options = OPTIONS[name]
    done = convert(random_llama, tmp_path / "out", verify=True, **options)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert done.checks == record["checks"] and record["checks"]["problems"] == []
    later = verify(tmp_path / "out", random_llama)
    assert later.to_dict() == record["checks"]
    assert later.tensors == 21 and later.nan == later.inf == 0
    changed = {"quantize", "dtype", "portable"} & set(options)
    assert later.exact == 21 - len(later.errors) and (later.errors == {}) == (not changed)
    assert max((error or 0 for error in later.errors.values()), default=0) < 0.5
    assert isinstance(later.logits, dict) and later.logits["error"] < 1e-5 and later.logits["layers"] == 2
    assert len(record["rope"]["wavelengths"]) == 8 and record["rope"]["attention_scale"] >= 1
    alone = verify(tmp_path / "out")
    assert (alone.problems, alone.source, alone.exact) == ([], None, 0)


@pytest.fixture(scope="module")
def converted(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "out"
    convert(random_llama, folder, rope="yarn", factor=8, quantize=True, max_shard_size="0.2MB")
    return folder


def test_every_flipped_bit_is_noticed(converted: Path, tmp_path: Path) -> None:
    """In weights, their headers, config.json and the tokenizer."""
    chance = random.Random(0)
    folder = shutil.copytree(converted, tmp_path / "out")
    hashed = [path for path in sorted(folder.iterdir()) if path.name not in ("README.md", "conversion.json")]
    assert len(hashed) > 5
    for path in hashed:
        whole = path.read_bytes()
        for _ in range(6):
            place, bit = chance.randrange(len(whole)), chance.randrange(8)
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert any(path.name in problem for problem in verify(folder).problems), (path.name, place, bit)
        path.write_bytes(whole)
    assert verify(folder).problems == []


def rewrite(folder: Path, name: str, change: Callable[[mx.array], mx.array]) -> None:
    """Change a tensor and the record's hash of its file, so that only comparing tensors can tell."""
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    weights = mx.load(str(folder / file))
    weights[name] = change(weights[name])
    mx.eval(weights)
    mx.save_safetensors(str(folder / file), weights)
    record = json.loads((folder / "conversion.json").read_text())
    record["weights"][file]["sha256"] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / "conversion.json").write_text(json.dumps(record))


def one_more(value: mx.array) -> mx.array:
    """One of its numbers, changed by more than rounding would."""
    flat = np.array(value.astype(mx.float32)).reshape(-1)
    flat[7] += 0.01
    return mx.array(flat).reshape(value.shape).astype(value.dtype)


@pytest.mark.parametrize(
    ("options", "name", "change"),
    [
        ({}, "model.norm.weight", one_more),
        ({}, f"{Q_PROJ}.weight", lambda v: mx.where(mx.abs(v) < 1e-4, 0, v)),
        ({"dtype": "float16"}, f"{Q_PROJ}.weight", lambda v: v * 1.002),
        ({"dtype": "float16"}, f"{Q_PROJ}.weight", mx.transpose),
        ({"dtype": "bfloat16"}, f"{Q_PROJ}.weight", one_more),
        ({"quantize": True}, f"{Q_PROJ}.weight", lambda v: v ^ 0x30),
        ({"quantize": True}, f"{Q_PROJ}.scales", lambda v: v * 1.2),
        ({"quantize": True}, f"{Q_PROJ}.biases", lambda v: v[::-1]),
        ({"quantize": True, "q_mode": "mxfp4"}, f"{Q_PROJ}.scales", lambda v: v + 1),
        ({"quantize": True, "q_mode": "mxfp8"}, f"{Q_PROJ}.weight", lambda v: v ^ 0x40),
        ({"portable": True, "rope": "yarn", "factor": 8}, f"{Q_PROJ}.weight", lambda v: v / 1.0441),
        ({}, f"{Q_PROJ}.weight", lambda v: mx.full(v.shape, mx.nan)),
        ({"dtype": "float16"}, f"{Q_PROJ}.weight", lambda v: mx.full(v.shape, mx.inf, v.dtype)),
    ],
)
def test_a_wrong_tensor_is_noticed(
    random_llama: Path, tmp_path: Path, options: dict[str, Any], name: str, change: Callable[[mx.array], mx.array]
) -> None:
    convert(random_llama, tmp_path / "out", **options)
    rewrite(tmp_path / "out", name, change)
    found = verify(tmp_path / "out", random_llama)
    weight = name.replace("scales", "weight").replace("biases", "weight")
    assert any(weight in problem and "further from the source" in problem for problem in found.problems)


def test_a_number_too_large_for_the_type_is_refused(random_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "source")
    file = folder / "model-00003-of-00003.safetensors"
    weights = mx.load(str(file))
    name = next(iter(sorted(weights)))
    weights[name] = weights[name] + 1e6
    mx.eval(weights)
    mx.save_safetensors(str(file), weights)
    with pytest.raises(UsageError, match=f"{name} has a value of 1e.06, beyond the range of float16"):
        convert(folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    convert(folder, tmp_path / "out", dtype="bfloat16", restart=True, verify=True)


def test_other_angles_are_noticed(converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"]["factor"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    assert any("other wavelengths" in problem for problem in verify(folder).problems)


def test_wrong_logits_are_noticed(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Checkpoint.load

    def negated(self: Checkpoint, **options: Any) -> Any:
        model = load(self, **options)
        model.model.norm.weight = -model.model.norm.weight
        return model

    monkeypatch.setattr(Checkpoint, "load", negated)
    assert any("logits" in problem for problem in verify(converted).problems)


def test_a_model_too_large_for_memory_is_compared_by_its_first_layers(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx_resonance.convert.reference as reference

    convert(random_llama, tmp_path / "out")
    sizes = {"one layer": 1.25e6, "none": 1e6}
    monkeypatch.setattr(reference, "MEMORY", sizes["one layer"])
    found = verify(tmp_path / "out")
    assert found.problems == [] and found.logits == {**found.logits, "layers": 1}  # type: ignore[dict-item]
    monkeypatch.setattr(reference, "MEMORY", sizes["none"])
    assert isinstance(logits := verify(tmp_path / "out").logits, str) and "GB" in logits


@pytest.mark.parametrize("pattern", ["model-00002-*.safetensors", "tokenizer.json", "config.json"])
def test_a_missing_file_is_noticed(converted: Path, tmp_path: Path, pattern: str) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    name = next(folder.glob(pattern)).name
    (folder / name).unlink()
    assert any(name in problem for problem in verify(folder).problems)


def test_a_source_of_another_model_is_noticed(random_llama: Path, converted: Path, tmp_path: Path) -> None:
    other = shutil.copytree(random_llama, tmp_path / "other")
    for file in other.glob("*.safetensors"):
        weights = {name: value + 0.05 for name, value in mx.load(str(file)).items()}
        mx.eval(weights)
        mx.save_safetensors(str(file), weights)
    assert len(verify(converted, other).problems) > 15


@pytest.mark.parametrize("record", [None, "{", "[]", "{}", '{"weights": {}}', '{"weights": 1}'])
def test_what_convert_has_not_written_is_refused(run: Any, converted: Path, tmp_path: Path, record: str | None) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    (folder / "conversion.json").unlink()
    if record is not None:
        (folder / "conversion.json").write_text(record)
    code, stdout, stderr = run("verify", folder)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and "conversion.json" in stderr


def test_a_record_that_names_other_folders_is_refused(run: Any, converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    record = json.loads((folder / "conversion.json").read_text())
    record["files"]["../../etc/passwd"] = ""
    (folder / "conversion.json").write_text(json.dumps(record))
    code, _, stderr = run("verify", folder)
    assert code == 2 and "same folder" in stderr


def test_the_command(run: Any, random_llama: Path, converted: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run("verify", converted, "--source", random_llama, "--json")
    found = json.loads(stdout)
    assert code == 0 and found["problems"] == [] and found["source"] == "random-llama"
    assert "verified: " in stderr and "equal to the source" in stderr
    folder = shutil.copytree(converted, tmp_path / "out")
    (folder / "tokenizer.json").write_text("{}")
    code, stdout, stderr = run("verify", folder, "--json")
    assert code == 1 and len(json.loads(stdout)["problems"]) == 2
    assert stderr.count("problem: ") == 2 and "verified" not in stderr


@pytest.mark.parametrize("option", ["revision", "file"])
def test_an_option_of_a_source_needs_the_source(run: Any, converted: Path, option: str) -> None:
    code, out, err = run("verify", converted, f"--{option}", "main")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{option} = main is of a source, which is not given" in err and "give --source" in err


@pytest.mark.parametrize(
    ("source", "options", "revision", "file"),
    [
        ("someone/llama", {}, "c0ffee", "q4.gguf"),
        ("someone/llama", {"revision": "main", "file": "q8.gguf"}, "main", "q8.gguf"),
        ("another/llama", {}, None, None),
        ("another/llama", {"revision": "main", "file": "q8.gguf"}, "main", "q8.gguf"),
    ],
)
def test_the_commit_and_the_file_on_record_are_of_that_repository(
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    options: dict[str, str],
    revision: str | None,
    file: str | None,
) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    record = json.loads((folder / "conversion.json").read_text())
    record["source"] = {"name": "someone/llama", "commit": "c0ffee", "file": "q4.gguf"}
    (folder / "conversion.json").write_text(json.dumps(record))

    def opened(*arguments: Any, rescaled: bool, file: str | None) -> None:
        raise UsageError(repr((*arguments, file)))

    # `mlx_resonance.convert.verify` is the function.
    monkeypatch.setattr(sys.modules[verify.__module__], "open_source", opened)
    with pytest.raises(UsageError) as raised:
        verify(folder, source, **options)
    assert raised.value.message == repr((source, revision, file))


def test_a_failed_verification_is_1_and_leaves_no_result(
    run: Any, random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_weights

    def damaged(source: Any, plan: Any, journal: Any, *arguments: Any) -> None:
        write(source, plan, journal, *arguments)
        path = journal.folder / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(checkpoint, "write_weights", damaged)
    code, stdout, stderr = run("convert", random_llama, "--mlx-path", tmp_path / "out", "--verify")
    assert (code, stdout) == (1, "") and "SHA-256" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.parametrize("kind", ["one NaN", "infinities", "no head", "all NaN"])
def test_a_source_that_is_not_finite_is_converted_correctly(random_llama: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "source")
    for file in folder.glob("*.safetensors"):
        weights = mx.load(str(file))
        if "model.norm.weight" in weights and kind in ("one NaN", "all NaN"):
            weights["model.norm.weight"] = mx.array([mx.nan] * (64 if kind == "all NaN" else 1) + [1.0] * 64)[:64]
        if f"{Q_PROJ}.weight" in weights and kind == "infinities":
            weights[f"{Q_PROJ}.weight"] = mx.where(weights[f"{Q_PROJ}.weight"] > 0.05, mx.inf, 0.01)
        if "lm_head.weight" in weights and kind == "no head":
            weights["lm_head.weight"] = mx.zeros_like(weights["lm_head.weight"])
        mx.eval(weights)
        mx.save_safetensors(str(file), weights)
    text = tmp_path / "text"
    text.write_text("import os\n" * 20)
    done = convert(folder, tmp_path / "out", verify=True, allow_nan=kind == "all NaN")
    assert done.checks is not None and done.checks["problems"] == []
    assert (done.checks["nan"] + done.checks["inf"] > 0) == (kind != "no head")
    convert(folder, tmp_path / "q", quantize=True, quant_report=text, allow_nan=kind == "all NaN")
    json.loads((tmp_path / "q" / "conversion.json").read_text(), parse_constant=pytest.fail)


NO_RECORD = "conversion.json is not the record of a finished conversion"


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("rope", {"wavelengths": None, "attention_scale": 1}, NO_RECORD),
        ("rope", {"wavelengths": ["a"], "attention_scale": 1}, NO_RECORD),
        ("rope", {"wavelengths": [], "attention_scale": None}, NO_RECORD),
        ("settings", {"dtype": "load", "query_key_factor": 1.0}, NO_RECORD),
        ("settings", {"dtype": None, "query_key_factor": None}, NO_RECORD),
        ("files", {"additional_chat_templates/../../x": ""}, "templates/../../x': expected files of the same folder"),
        ("files", {"..": ""}, "conversion.json names '..': expected files of the same folder"),
        ("files", 3, NO_RECORD),
    ],
)
def test_an_edited_record_is_one_line(
    run: Any, converted: Path, tmp_path: Path, part: str, value: Any, named: str
) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    record = json.loads((folder / "conversion.json").read_text()) | {part: value}
    (folder / "conversion.json").write_text(json.dumps(record))
    code, stdout, stderr = run("verify", folder)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and named in stderr, stderr


def test_hashes_taken_out_of_the_record_are_noticed(converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    record = json.loads((folder / "conversion.json").read_text()) | {"files": {}}
    (folder / "conversion.json").write_text(json.dumps(record))
    assert any("config.json is not on record" in problem for problem in verify(folder).problems)


def test_chat_templates_in_a_folder_are_copied_and_hashed(random_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "source")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    convert(folder, tmp_path / "out")
    assert verify(tmp_path / "out", folder).problems == []
    (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").write_text("{{ other }}")
    assert any("tools.jinja has changed" in problem for problem in verify(tmp_path / "out").problems)


def test_a_config_that_transformers_refuses_is_reported(random_llama: Path, tmp_path: Path, copy_of: Any) -> None:
    done = convert(copy_of(random_llama, initializer_range="wide"), tmp_path / "out", verify=True)
    assert done.checks is not None and "transformers cannot build it" in done.checks["logits"]
