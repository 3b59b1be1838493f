"""Check what a wheel and an sdist hold, and that they install and work: python .ci/check_dist.py dist [v0.1.0]

With a tag as second argument, it must be that of the version. Both are installed into one fresh environment, in turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"mlx_resonance": "mlx_resonance", "convert": "mlx_resonance/convert"}  # here, and as installed
ROOT_FILES = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}  # that a build needs, or ships
MADE = {"PKG-INFO", "setup.cfg"}  # by the build, in an sdist


def sources() -> dict[str, str]:
    """The files of the packages, as they are called here and as they are installed."""
    found = {}
    for here, installed in PACKAGES.items():
        for path in (ROOT / here).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store":
                found[str(path.relative_to(ROOT))] = f"{installed}/{path.relative_to(ROOT / here)}"
    return found


def check_names(kind: str, found: set[str], expected: set[str]) -> None:
    """Fail unless an archive holds what it should and nothing else, such as tests or benchmarks."""
    for what, names in (("lacks", expected - found), ("should not have", found - expected)):
        if names:
            sys.exit(f"error: the {kind} {what} {', '.join(sorted(names)[:10])}")
    print(f"{kind}: {len(found)} files, as expected")


def check_contents(wheel: Path, sdist: Path) -> None:
    """Compare the names in both archives with the sources."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    check_names("wheel", names, set(sources().values()))
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    check_names("sdist", names, set(sources()) | ROOT_FILES | MADE)


def check_installed(*archives: Path) -> str:
    """Install each archive, one after the other, and run its command. Returns the version that they print."""
    # Away from the checkout, whose folder would be imported instead.
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "venv", with_pip=True)
        python, command = (Path(folder) / "venv" / "bin" / name for name in ("python", "mlx-resonance"))
        for number, archive in enumerate(archives):
            again = ["--force-reinstall", "--no-deps"] if number else []
            _run(python, "-m", "pip", "install", "--quiet", *again, archive.resolve(), cwd=folder)
            line = _run(command, "--version", cwd=folder).strip()
            answer = json.loads(_run(command, "demo", "--json", cwd=folder))
            if answer["prompt_tokens"] <= 512 or not answer["text"]:
                sys.exit(f"error: {archive.name}: the demo answered {answer}")
            print(f"{archive.name}: {line}; demo: {answer['generation_tokens']} tokens")
    return line.split()[1]


def _run(*command: str | Path, cwd: str) -> str:
    """What a command prints on stdout; its failure is ours."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main(folder: Path, tag: str | None) -> None:
    """Run all checks."""
    archives = sorted(folder.glob("*.whl")) + sorted(folder.glob("*.tar.gz"))
    if [path.suffix for path in archives] != [".whl", ".gz"]:
        sys.exit(f"error: {folder} must have one wheel and one sdist, has {[path.name for path in archives]}")
    check_contents(*archives)
    version = check_installed(*archives)
    if tag is not None and tag != f"v{version}":
        sys.exit(f"error: the tag is {tag}, the version {version}: tag v{version}, or change the version")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
