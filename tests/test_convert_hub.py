"""Models on the hub: only needed files, connections that break, revisions that move, one weight file at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlx_resonance.convert import convert

import mlx.core as mx
import pytest

from .checkpoints import contents
from .hub import CHUNK, COMMIT, OTHER, Hub, serve

REPO = "someone/random-llama"
FIRST = "model-00001-of-00003.safetensors"
SMALL = ("--max-shard-size", "0.3MB", "--rope", "yarn", "--factor", 8)


@pytest.fixture(scope="module")
def model(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub has."""
    folder = shutil.copytree(random_llama, tmp_path_factory.mktemp("hub") / "model")
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    (folder / "model.gguf").write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with serve(REPO, model) as hub:
        yield hub


class First(NamedTuple):
    """A first conversion: the cache that it filled, its result, and what it downloaded."""

    cache: Path
    out: Path
    downloaded: list[str]


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> First:
    folder = tmp_path_factory.mktemp("first")
    with serve(REPO, model) as hub:
        done = hub.command(folder / "cache", "convert", REPO, "--mlx-path", folder / "out")
    assert done.returncode == 0, done.stderr
    return First(folder / "cache", folder / "out", hub.downloaded)


@pytest.fixture
def warm(first: First, tmp_path: Path) -> Path:
    """A copy of the cache that the first conversion filled; its links are relative."""
    return shutil.copytree(first.cache, tmp_path / "cache", symlinks=True)


def test_a_model_is_downloaded_once_and_only_what_is_needed(hub: Hub, first: First, warm: Path, tmp_path: Path) -> None:
    assert FIRST in first.downloaded and not {"pytorch_model.bin", "model.gguf"} & set(first.downloaded)
    second = hub.command(warm, "convert", REPO, "--mlx-path", tmp_path / "out")
    assert second.returncode == 0, second.stderr
    assert hub.downloaded == []
    assert contents(first.out) == contents(tmp_path / "out")
    assert f"base_model: {REPO}" in (first.out / "README.md").read_text()
    record = json.loads((first.out / "conversion.json").read_text())
    assert record["source"] == {"name": REPO, "commit": COMMIT}


@pytest.mark.parametrize("how", ["offline", pytest.param("gone", marks=pytest.mark.long)])
def test_without_the_hub_the_cache_is_used(hub: Hub, first: First, warm: Path, tmp_path: Path, how: str) -> None:
    environment = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for flags in ((), ("--dry-run",)) if how == "offline" else ((),):
        done = hub.command(warm, "convert", REPO, "--mlx-path", tmp_path / "out", *flags, **environment)
        assert done.returncode == (0 if not flags else 2), done.stderr
    assert hub.downloaded == []
    assert contents(first.out) == contents(tmp_path / "out")


@pytest.mark.long
def test_a_token_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    arguments = ("convert", REPO, "--mlx-path", tmp_path / "out")
    refused = hub.command(tmp_path / "cache", *arguments)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and REPO in refused.stderr
    done = hub.command(tmp_path / "cache", *arguments, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))


def test_a_dropped_connection_resumes_where_it_broke(hub: Hub, random_llama: Path, tmp_path: Path) -> None:
    half = 4 * CHUNK
    assert half < (random_llama / FIRST).stat().st_size
    hub.drop, hub.drops = {FIRST: half}, 1
    done = hub.command(tmp_path / "cache", "convert", REPO, "--mlx-path", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [asked for name, asked in hub.ranges if name == FIRST] == [None, f"bytes={half}-"]
    convert(random_llama, tmp_path / "local")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()


@pytest.mark.long
def test_a_connection_that_does_not_come_back_is_one_line_and_the_next_run_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.drop, hub.drops = {FIRST: 4 * CHUNK}, 1000
    arguments = ("convert", REPO, "--mlx-path", tmp_path / "out")
    broken = hub.command(tmp_path / "cache", *arguments)
    assert broken.returncode == 1 and broken.stdout == "" and not (tmp_path / "out").exists()
    last = broken.stderr.splitlines()[-1]
    assert last.startswith("error:") and REPO in last and "Traceback" not in broken.stderr
    hub.drops = 0
    done = hub.command(tmp_path / "cache", *arguments)
    assert done.returncode == 0, done.stderr
    assert {name for name in hub.downloaded if hub.downloaded.count(name) > 1} == {FIRST}  # whole files are kept


@pytest.mark.long
def test_a_revision_that_moved_between_two_runs_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.commits[OTHER] = shutil.copytree(hub.commits[COMMIT], tmp_path / "other")
    (hub.commits[OTHER] / "README.md").write_text("# another\n")
    stop = """
import sys, mlx_resonance.convert.checkpoint as c
def fail(*_): raise OSError("stopped")
c.write_card = fail
c.convert(*sys.argv[1:])
"""
    stopped = hub.run(tmp_path / "cache", stop, REPO, tmp_path / "out")
    assert "stopped" in stopped.stderr and (tmp_path / "out.partial").is_dir()
    hub.main = OTHER
    arguments = ("convert", REPO, "--mlx-path", tmp_path / "out")
    refused = hub.command(tmp_path / "cache", *arguments)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1), refused.stderr
    assert COMMIT in refused.stderr and OTHER in refused.stderr and "--restart" in refused.stderr
    done = hub.command(tmp_path / "cache", *arguments, "--revision", COMMIT)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["commit"] == COMMIT


@pytest.mark.long
def test_a_dry_run_fetches_headers_only(hub: Hub, random_llama: Path, tmp_path: Path) -> None:
    arguments = ("convert", REPO, "--mlx-path", tmp_path / "out", *SMALL, "--dry-run", "--json")
    done = hub.command(tmp_path / "cache", *arguments)
    assert done.returncode == 0, done.stderr
    assert not [name for name in hub.downloaded if name.endswith(".safetensors")]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    planned = json.loads(done.stdout)
    weights = sum(path.stat().st_size for path in random_llama.glob("*.safetensors"))
    assert planned["download"] == pytest.approx(weights, rel=0.02)
    real = convert(random_llama, tmp_path / "real", max_shard_size="0.3MB")
    assert (planned["files"], real.files) == (real.files, len(list((tmp_path / "real").glob("*.safetensors"))))
    assert planned["weights"] == pytest.approx(real.weights, rel=0.02)
    assert planned["disk"] == pytest.approx(sum(p.stat().st_size for p in (tmp_path / "real").iterdir()), rel=0.02)
    consumed = json.loads(hub.command(tmp_path / "cache", *arguments, "--consume-source").stdout)
    assert consumed["download"] < 0.6 * planned["download"]


@pytest.mark.long
def test_a_consumed_source_is_on_disk_one_file_at_a_time(hub: Hub, tmp_path: Path) -> None:
    present: list[list[str]] = []
    folder = tmp_path / "work" / "out.partial" / "source"
    hub.on_download = lambda name: present.append([path.name for path in folder.glob("*.safetensors")])
    arguments = ("convert", REPO, "--mlx-path", tmp_path / "work" / "out", *SMALL, "--consume-source")
    done = hub.command(tmp_path / "cache", *arguments)
    assert done.returncode == 0, done.stderr
    # A file is deleted once everything made from it is on disk: while the next one arrives, it may still be there.
    assert max(map(len, present)) <= 1 and sum(name.endswith(".safetensors") for name in hub.downloaded) == 3
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not (tmp_path / "work" / "out" / "source").exists()
    plain = hub.command(tmp_path / "cache", "convert", REPO, "--mlx-path", tmp_path / "plain" / "out", *SMALL)
    assert plain.returncode == 0, plain.stderr
    assert contents(tmp_path / "work" / "out") == contents(tmp_path / "plain" / "out")


@pytest.mark.long
def test_what_was_in_the_cache_is_used_and_stays(hub: Hub, warm: Path, tmp_path: Path) -> None:
    before = files_below(warm)
    done = hub.command(warm, "convert", REPO, "--mlx-path", tmp_path / "out", "--consume-source")
    assert done.returncode == 0, done.stderr
    assert files_below(warm) == before and hub.downloaded == []


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and "log" not in path.parts and path.suffix != ".lock"}


@pytest.mark.long
def test_consuming_resumes_after_a_kill_without_what_is_done(hub: Hub, tmp_path: Path) -> None:
    arguments = ("convert", REPO, "--mlx-path", tmp_path / "out", *SMALL, "--consume-source")
    kill = """
import os, signal, sys, mlx_resonance.convert.source as s
read = s.HubFile.read
def kill(self, tensor):
    if self.name == "model-00003-of-00003.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, tensor)
s.HubFile.read = kill
sys.argv[0] = "mlx-resonance"
from mlx_resonance.cli import main; main()
"""
    killed = hub.run(tmp_path / "cache", kill, *arguments)
    assert killed.returncode == -9 and (tmp_path / "out.partial").is_dir()
    hub.downloaded.clear()
    done = hub.command(tmp_path / "cache", *arguments)
    assert done.returncode == 0, done.stderr
    assert FIRST not in hub.downloaded and "model-00003-of-00003.safetensors" in hub.downloaded
    whole = hub.command(tmp_path / "cache", "convert", REPO, "--mlx-path", tmp_path / "whole" / "out", *SMALL)
    assert whole.returncode == 0, whole.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_head_that_is_consumed_is_compared_part_by_part(
    random_llama: Path, tmp_path: Path, differs: bool
) -> None:
    """Its codes may be the embedding's while its scales differ."""
    folder = convert(random_llama, tmp_path / "model", resonance=False, quantize=True).path
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    for part in ("weight", "scales", "biases"):
        factor = 2 if differs and part != "weight" else 1
        tensors[f"lm_head.{part}"] = tensors[f"model.embed_tokens.{part}"] * factor
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("conversion.json", "model.safetensors.index.json"):
        (folder / name).unlink()
    options = ("--mlx-path", tmp_path / "out", "--no-resonance", "--consume-source")
    with serve(REPO, folder) as hub:
        done = hub.command(tmp_path / "cache", "convert", REPO, *options)
    if differs:
        assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
        assert " differs from model.embed_tokens." in done.stderr
        assert done.stderr.rstrip().endswith("give no --consume-source")
    else:
        assert done.returncode == 0, done.stderr
        assert "lm_head.weight (equal to model.embed_tokens.weight, to which it is tied)" in done.stderr


def test_a_folder_of_the_user_is_not_consumed(run: Any, random_llama: Path, tmp_path: Path) -> None:
    code, _, stderr = run("convert", random_llama, "--mlx-path", tmp_path / "out", "--consume-source")
    assert code == 2 and "is a folder: only what was downloaded is deleted (--consume-source)" in stderr
    assert list(tmp_path.iterdir()) == []


def test_files_that_mlx_wrote_are_divided_alike_whether_they_are_consumed(random_llama: Path, tmp_path: Path) -> None:
    """Their headers name tensors in another order than that of the data: a run may begin in one way, and resume so."""
    model = convert(random_llama, tmp_path / "model", resonance=False, max_shard_size="0.6MB").path
    with serve(REPO, model) as hub:
        for name, flags in (("plain", ()), ("consumed", ("--consume-source",))):
            done = hub.command(
                tmp_path / f"{name}-cache", "convert", REPO, "--mlx-path", tmp_path / name / "out", *SMALL, *flags
            )
            assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "plain" / "out") == contents(tmp_path / "consumed" / "out")
    records = [json.loads((tmp_path / name / "out" / "conversion.json").read_text()) for name in ("plain", "consumed")]
    assert records[0]["settings"] == records[1]["settings"] and len(records[0]["weights"]) > 2


def test_a_dynamic_yarn_on_the_hub_is_verified_without_naming_it(random_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(random_llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 10000.0, "max_position_embeddings": 512}
    config["rope_scaling"] = {"type": "dynamic-yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    (model / "config.json").write_text(json.dumps(config))
    cache, out = tmp_path / "cache", tmp_path / "out"
    with serve(REPO, model) as hub:
        done = hub.command(cache, "convert", REPO, "--mlx-path", out, "--rope", "yarn", "--factor", 8)
        assert done.returncode == 0, done.stderr
        done = hub.command(cache, "verify", out, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["source"] == REPO, done.stderr
