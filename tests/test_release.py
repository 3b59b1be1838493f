"""What is installed, and what is said about it: metadata, links, install lines, the version, a release's archives."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from email import message_from_string
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_resonance import RopeConfig, __version__, release
from mlx_resonance.cli import version
from mlx_resonance.convert import card

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = "https://github.com/someone/something"
BUILD = """
import sys, warnings
warnings.simplefilter("error")
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]), file=sys.stderr)
"""
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")


def build(checkout: Path, what: str, target: Path) -> Path:
    """The result of one of setuptools' hooks; a warning of setuptools is an error."""
    target.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(target)], cwd=checkout, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target / done.stderr.splitlines()[-1]


@pytest.mark.parametrize("address", [None, ADDRESS])
def test_urls_and_links_follow_from_the_address(tmp_path: Path, address: str | None) -> None:
    checkout = tmp_path / "checkout"
    for folder in ("mlx_resonance", "convert"):  # their modules do not matter here
        (checkout / folder).mkdir(parents=True)
        shutil.copy(ROOT / folder / "__init__.py", checkout / folder)
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    text = (ROOT / "mlx_resonance" / "release.py").read_text(encoding="utf-8")
    text, found = re.subn(r"^(REPOSITORY.* = ).*$", rf"\g<1>{address!r}", text, flags=re.M)
    (checkout / "mlx_resonance" / "release.py").write_text(text, encoding="utf-8")
    info = build(checkout, "prepare_metadata_for_build_wheel", tmp_path / "info")
    message = message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert (found, message["Version"], message["Description-Content-Type"]) == (1, __version__, "text/markdown")

    page, readme = message.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]*)\)", page)
    urls = dict(line.split(", ") for line in message.get_all("Project-URL", []))
    if address is None:
        assert page.strip() == readme.strip() and urls == {}
        return
    assert urls["Repository"] == address and all(url.startswith(address) for url in urls.values())
    assert (ROOT / urls["Changelog"].removeprefix(f"{address}/blob/main/")).is_file()
    assert (ROOT / urls["Documentation"].removeprefix(f"{address}/tree/main/")).is_dir()
    assert len(targets) == readme.count("](") > 10 and all(target.startswith("https://") for target in targets)
    kinds = set()
    for target in targets:
        if target.startswith(address):
            kind, ref, path = target.partition("#")[0].removeprefix(f"{address}/").split("/", 2)
            assert ref == f"v{__version__}" and ((ROOT / path).is_dir() if kind == "tree" else (ROOT / path).is_file())
            kinds.add((kind, Path(path).suffix == ".svg"))
    assert kinds == {("raw", True), ("blob", False), ("tree", False)}  # an image as a file, not as GitHub's page of it
    assert re.sub(rf"{address}/(raw|blob|tree)/v{re.escape(__version__)}/", "", page).strip() == readme.strip()


@pytest.mark.parametrize(
    ("extra", "address", "command"),
    [
        ("", None, "pip install ."),
        ("server", None, "pip install '.[server]'"),
        ("", ADDRESS, f"pip install 'mlx-resonance @ git+{ADDRESS}'"),
        ("eval", ADDRESS, f"pip install 'mlx-resonance[eval] @ git+{ADDRESS}'"),
    ],
)
def test_the_command_that_installs(extra: str, address: str | None, command: str) -> None:
    assert release.install_command(extra, address) == command
    assert release.install_hint(extra, address) == command + ("" if address else " in a clone of mlx-resonance")


def test_nothing_says_to_install_from_an_index() -> None:
    """Under this name an index has nothing, or something else, until a release."""
    if release.REPOSITORY is not None:
        pytest.skip("the package has an address")
    folders = ("mlx_resonance", "convert", "docs", "notebooks", "benchmarks", ".github", ".ci")
    suffixes = {".py", ".md", ".ipynb", ".yml", ".toml", ".json", ".h", ""}
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    paths += [path for path in ROOT.iterdir() if path.suffix in (".md", ".py", ".toml") or path.name == "Makefile"]
    files = [path for path in paths if path.is_file() and "results" not in path.parts]
    assert {"README.md", "card.py", "serve.py", "generate.md", "01-resonance-rope.ipynb"} <= {p.name for p in files}
    named = re.compile(r"\b(install|uv add|uvx|pipx)\s[^`]*\bmlx-resonance|mlx-resonance\[")
    allowed = {ROOT / "pyproject.toml", ROOT / "mlx_resonance" / "release.py"}  # extras of extras; the command itself
    wrong = []
    for path in set(files) - allowed:
        for line in path.read_text(encoding="utf-8").splitlines():
            if found := named.search(line):
                wrong.append(f"{path.relative_to(ROOT)}: {found[0]}")
    assert wrong == []


@pytest.mark.parametrize("address", [None, ADDRESS])
def test_the_card_of_a_converted_model_says_what_works(
    tmp_path: Path, stdlib_llama: Path, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "REPOSITORY", address)
    rope = RopeConfig.from_hf(json.loads((stdlib_llama / "config.json").read_text()))
    card.write_card(tmp_path, "owner/name", True, {}, rope)
    text = (tmp_path / "README.md").read_text()
    said = [release.install_command("", address)] if address else []
    assert re.findall("^(.*install.*)$", text, flags=re.M) == said
    assert (f"with [mlx-resonance]({address})." in text) == (address is not None) and "{" not in text


def test_extras_that_messages_name_exist() -> None:
    extras = set(metadata.metadata("mlx-resonance").get_all("Provides-Extra"))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "mlx_resonance").rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    named = set(re.findall(r"pip install '\.\[([a-z,]+)\]'|install_hint\('([a-z]+)'\)", text))
    assert {"".join(names) for names in named} >= {"server", "eval", "cuda"}
    assert {"".join(names) for names in named} <= extras


def line(run: Any) -> str:
    """What --version prints: one line, nothing on stderr."""
    code, out, err = run("--version")
    assert (code, err, out.count("\n")) == (0, "", 1)
    return out.strip()


def test_the_version_names_what_a_report_needs(run: Any) -> None:
    found = re.fullmatch(r"mlx-resonance (\S+) \(MLX (\S+), mlx-lm (\S+), Python (\S+), ([^,]+), ([^,]+)\)", line(run))
    assert found is not None
    assert found.groups()[:3] == (__version__, metadata.version("mlx"), metadata.version("mlx-lm"))
    assert found[4] == ".".join(map(str, sys.version_info[:3]))
    assert (found[6] == "CPU") == (mx.default_device().type == mx.cpu)


def test_the_version_names_the_gpu(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M3 Max", "memory_size": 2**36})
    monkeypatch.setattr(version.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(version.platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    assert line(run).endswith(", macOS 15.5, Apple M3 Max)")


def test_the_version_of_a_broken_environment(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlx_lm.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.delitem(sys.modules, "mlx_lm")
    monkeypatch.syspath_prepend(tmp_path)
    assert f"mlx-lm {metadata.version('mlx-lm')} cannot be imported: two lines, Python" in line(run)
    (tmp_path / "mlx_lm.py").write_text("import a_dependency_of_it\n")
    assert "cannot be imported: No module named 'a_dependency_of_it', Python" in line(run)

    imported = version.importlib.import_module

    def missing(name: str) -> Any:
        if name.startswith("mlx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return imported(name)

    monkeypatch.setattr(version.importlib, "import_module", missing)
    assert "(MLX is not installed, mlx-lm is not installed, Python" in line(run)
    monkeypatch.setattr(version.importlib, "import_module", lambda name: SimpleNamespace())  # without mlx.core's names
    assert "no device: " in line(run)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--version", "plan"), "--version takes no command, got plan"),
        (("--version", "frobnicate"), "No such command 'frobnicate'."),
        (("--version", "--json"), "No such option: --json"),
        (("plan", "--version"), "No such option: --version"),
        (("--",), "no command: --help lists them"),
    ],
)
def test_a_wrong_request_for_the_version(run: Any, arguments: tuple[str, ...], error: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {error}")


def check_dist() -> Any:
    """The script that checks a release."""
    spec = importlib.util.spec_from_file_location("check_dist", ROOT / ".ci" / "check_dist.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.mark.long
def test_the_wheel_and_the_sdist_hold_the_package_alone(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in ("mlx_resonance", "convert", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "*.json*", ".*")
        shutil.copytree(ROOT / folder, checkout / folder, ignore=ignored if folder[0] in "tb" else None)
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    wheel = build(checkout, "build_wheel", tmp_path / "wheel")
    sdist = build(checkout, "build_sdist", tmp_path / "sdist")
    check_dist().check_contents(wheel, sdist)

    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build(unpacked, "build_wheel", tmp_path / "again")
    assert again.name == wheel.name and again.stat().st_size == wheel.stat().st_size

    (checkout / "mlx_resonance" / "tests").mkdir()  # a package that does not belong there
    (checkout / "mlx_resonance" / "tests" / "__init__.py").touch()
    wheel = build(checkout, "build_wheel", tmp_path / "wrong")
    with pytest.raises(SystemExit, match=r"the wheel should not have mlx_resonance/tests/__init__.py"):
        check_dist().check_contents(wheel, sdist)
