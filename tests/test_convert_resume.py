"""A conversion that is killed, refused or out of space: no partial result, nothing lost, the same bytes in the end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx_resonance.convert.checkpoint as checkpoint
from mlx_resonance import load
from mlx_resonance.convert import VerificationError, convert

import pytest

from .checkpoints import PEAK, contents

OPTIONS: dict[str, Any] = {"rope": "yarn", "factor": 8, "quantize": True, "max_shard_size": "0.1MB"}
# Forks children that convert and are killed: at the Nth file system event in OUT.partial, or after N seconds.
# Each time another one resumes and must make the same files. Prints the numbers of events and files.
KILLER = """
import json, os, random, shutil, signal, sys, threading, time
from pathlib import Path
from mlx_resonance.convert import convert
source, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def child(out, arm):
    if (pid := os.fork()) == 0:
        code = 1
        try:
            arm()
            convert(source, out, **options)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]

def at_event(n):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if ".partial" in str(arguments[:2]):
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
    return lambda: sys.addaudithook(hook)

def after(seconds):
    return lambda: signal.setitimer(signal.ITIMER_REAL, seconds) and None

def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}

start = time.perf_counter()
assert child(folder / "whole" / "out", lambda: None) == 0
seconds = time.perf_counter() - start
expected = files(folder / "whole" / "out")
signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process without a word, in the middle of whatever it does
random.seed(0)
arms = [after(random.uniform(0.05, 1) * seconds) for _ in range(6)]
n, finished = 1, False
while not finished:
    out = folder / f"event-{n}" / "out"
    finished = child(out, at_event(n)) == 0
    assert out.exists() or child(out, lambda: None) == 0, n
    assert files(out) == expected and [p.name for p in out.parent.iterdir()] == ["out"], n
    shutil.rmtree(out.parent)
    n += 1
for i, arm in enumerate(arms):
    out = folder / f"time-{i}" / "out"
    killed = 0
    while killed < 3 and child(out, arm) != 0:
        killed += 1
    assert out.exists() or child(out, lambda: None) == 0, i
    assert files(out) == expected and [p.name for p in out.parent.iterdir()] == ["out"], i
    shutil.rmtree(out.parent)
print(json.dumps({"events": n - 2, "files": len(expected)}))
"""


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Leave behind a run that failed after all weights were written."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_card", fail)
        with pytest.raises(OSError, match="No space left"):
            convert(source, out, **OPTIONS | options)
    assert [path.name for path in out.parent.iterdir()] == [f"{out.name}.partial"]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="a forked process cannot use a Mac's GPU")
def test_killed_at_any_moment_the_next_run_makes_the_same_files(random_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER, str(random_llama), str(tmp_path), json.dumps(OPTIONS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["events"] >= 20 and result["files"] >= 10


def test_killed_before_the_last_files_the_next_run_makes_the_same_ones(random_llama: Path, tmp_path: Path) -> None:
    code = (
        "import json, os, signal, sys, mlx_resonance.convert.checkpoint as c;"
        "c.write_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "c.convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))"
    )
    killed = run_code(code, random_llama, tmp_path / "out", json.dumps(OPTIONS))
    assert killed.returncode == -9 and [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    convert(random_llama, tmp_path / "out", **OPTIONS)
    convert(random_llama, tmp_path / "whole" / "out", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_finished_work_is_not_repeated(random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(random_llama, tmp_path / "out", monkeypatch)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    steps: list[tuple[int, int]] = []
    convert(random_llama, tmp_path / "out", **OPTIONS, progress=lambda *step: steps.append(step))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")} == before
    assert len(steps) == len(before) > 1 and steps[-1][0] == steps[-1][1]
    load(tmp_path / "out")


def test_the_record_names_settings_and_hashes(random_llama: Path, tmp_path: Path) -> None:
    convert(random_llama, tmp_path / "out", **OPTIONS)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source"]["name"] == "random-llama" and str(random_llama.parent) not in json.dumps(record)
    assert record["settings"]["rope"]["rope_scaling"]["rope_type"] == "resonance_yarn"
    assert set(record["settings"]["versions"]) == {"mlx_resonance", "mlx", "mlx_lm"}
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert {name: entry["sha256"] for name, entry in record["weights"].items()} == hashes
    assert {name: entry["bytes"] for name, entry in record["weights"].items()} == {k: len(v) for k, v in files.items()}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"dtype": "float16"}, r'settings dtype = null, now it is "float16"'),
        ({"factor": 4}, r'"factor": 8.*now it is .*"factor": 4'),
        ({"max_shard_size": "0.2MB"}, "max_shard_size = 100000, now it is 200000"),
        ({"q_bits": 8}, r'"bits": 4.*now it is .*"bits": 8'),
    ],
)
def test_other_settings_are_refused_with_both_values(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], named: str
) -> None:
    interrupted(random_llama, tmp_path / "out", monkeypatch)
    before = contents(tmp_path / "out.partial")
    with pytest.raises(ValueError, match=named):
        convert(random_llama, tmp_path / "out", **OPTIONS | other)
    assert contents(tmp_path / "out.partial") == before and not (tmp_path / "out").exists()
    convert(random_llama, tmp_path / "out", **OPTIONS | other, restart=True)
    convert(random_llama, tmp_path / "fresh", **OPTIONS | other)
    ours, fresh = contents(tmp_path / "out"), contents(tmp_path / "fresh")
    assert {name for name in ours if ours[name] != fresh[name]} == {"README.md"}  # the title


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_changed_source_is_refused(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(random_llama, source)
    (tmp_path / "work").mkdir()
    interrupted(source, tmp_path / "work" / "out", monkeypatch)
    changed = sorted(source.glob("model*.safetensors"))[0] if name == "model.safetensors" else source / name
    os.utime(changed, (1, 1))
    with pytest.raises(ValueError, match=rf"source {changed.name} = .*now it is .*1970"):
        convert(source, tmp_path / "work" / "out", **OPTIONS)
    convert(source, tmp_path / "work" / "out", **OPTIONS, restart=True)


def run_code(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.long
def test_a_full_disk_is_one_line_and_what_is_done_stays(stdlib_llama: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk: the first weight file fits, a later one does not."""
    options: dict[str, Any] = {"max_shard_size": "1.8MB"}
    convert(stdlib_llama, tmp_path / "whole" / "out", **options)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "whole" / "out").glob("*.safetensors"))]
    assert sizes[0] < max(sizes)
    code = (
        "import resource, signal, sys; from mlx_resonance import cli; limit = int(sys.argv.pop(1));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit));"
        "sys.argv[0] = 'mlx-resonance'; cli.main()"
    )
    flags = ["--max-shard-size", "1.8MB"]
    done = run_code(code, max(sizes) - 1, "convert", stdlib_llama, "--mlx-path", tmp_path / "out", *flags)
    lines = [line for line in done.stderr.splitlines() if "OpenBLAS" not in line]
    assert done.returncode == 1 and done.stdout == ""
    assert len(lines) == 1 and "cannot be written" in lines[0] and "the same command resumes" in lines[0]
    left = json.loads((tmp_path / "out.partial" / "conversion.json").read_text())["weights"]
    assert 0 < len(left) < len(sizes) and not (tmp_path / "out").exists()
    convert(stdlib_llama, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_size_of_a_weight_file(random_llama: Path, tmp_path: Path) -> None:
    """1.3 times the size of a weight file and 400 MB, for 640 MB of weights in float32 and half of that written."""
    source = tmp_path / "source"
    shutil.copytree(random_llama, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 8}
    config |= {"vocab_size": 2048, "num_key_value_heads": 8, "head_dim": 64}
    (source / "config.json").write_text(json.dumps(config))
    make = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
folder = Path(sys.argv[1])
model = Model(ModelArgs.from_dict(json.loads((folder / "config.json").read_text())))
mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
"""
    assert run_code(make, source).returncode == 0
    assert (source / "model.safetensors").stat().st_size > 600e6
    code = """
import sys
from mlx_resonance.convert import convert
convert(sys.argv[1], sys.argv[2], dtype="float16", max_shard_size="40MB", quantize=sys.argv[3] == "q")
print(peak())
"""
    for kind in ("plain", "q"):
        done = run_code(PEAK + code, source, tmp_path / kind, kind)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) <= 1.3 * 40e6 + 400e6


def test_a_finished_file_that_was_damaged_is_made_again(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(random_llama, tmp_path / "out", monkeypatch)
    path = sorted((tmp_path / "out.partial").glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    convert(random_llama, tmp_path / "out", **OPTIONS)
    convert(random_llama, tmp_path / "whole" / "out", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_what_verification_has_refused_is_not_published_by_another_run(
    run: Any, random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("convert", random_llama, "--mlx-path", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["mlx_resonance.convert.verify"], "CLOSE", -1)
        with pytest.raises(VerificationError, match="is not right: the logits") as failed:
            convert(random_llama, tmp_path / "out", verify=True)
        assert "--" not in str(failed.value)
        code, _, stderr = run(*command, "--verify", "--restart")
        assert code == 1 and "is not right: the logits" in stderr and "--restart" in stderr
    for flags in ((), ("--verify",)):
        code, _, stderr = run(*command, *flags)
        assert code == 2 and "failed its verification (the logits" in stderr and "give --restart" in stderr
    convert(random_llama, tmp_path / "out", verify=True, restart=True)
