"""GGUF files as a source of a conversion: which ones, and config.json and tokenizer made from their metadata."""

from __future__ import annotations

import glob
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_resonance.errors import MissingFileError, UsageError
from mlx_resonance.files import WEIGHTS, hub_errors, resolve, user_path

from huggingface_hub import HfApi, constants, try_to_load_from_cache

from .gguf_config import INTERLEAVED, architecture_of, config_of
from .gguf_file import GgufFile, read_factors
from .gguf_header import GgufHeader, read_gguf_header
from .gguf_rope import rope_problem
from .gguf_tokenizer import write_tokenizer
from .journal import fingerprint
from .source import TORCH_WEIGHTS, Source

SPLIT = re.compile(r"^(.*)-([0-9]{5})-of-([0-9]{5})\.gguf$", re.DOTALL)
CARD = {"license": "license", "license.name": "license_name", "license.link": "license_link", "languages": "language"}


class GgufSource(Source):
    """One GGUF file, or all parts of a split one.

    Args:
        name: file name or hub id.
        commit: of the hub; None for files on disk.
        file: the first one's name in its folder or repository.
        paths: of the files, in order.
        rescaled: as of `Source`.

    Raises:
        UsageError: a file is damaged, or no model here is what the metadata describes.
    """

    dtype = "float16"
    copies = 2  # NumPy's, and MLX's
    files: Sequence[GgufFile]

    def __init__(self, name: str, commit: str | None, file: str, paths: Sequence[Path], rescaled: bool = False) -> None:
        headers = [read_gguf_header(path) for path in paths]
        _check_parts(paths, headers)
        self.file, self.metadata = file, headers[0].metadata
        self.factors: dict[str, list[float]] = {}
        for path, header in zip(paths, headers, strict=True):
            self.factors |= read_factors(path, header.tensors)
        shapes = {key: tensor.shape for header in headers for key, tensor in header.tensors.items()}
        config = config_of(self.metadata, shapes, self.factors)
        heads = (config["num_attention_heads"], config["num_key_value_heads"])
        interleaved = architecture_of(self.metadata) in INTERLEAVED
        files = [
            GgufFile(path, header, heads if interleaved else None) for path, header in zip(paths, headers, strict=True)
        ]
        folder = Path(tempfile.mkdtemp(prefix="mlx-resonance-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_tokenizer(self.metadata, folder)
        _write_card(self.metadata, folder)
        super().__init__(name, commit, folder, files, rescaled)

    def identity(self) -> dict[str, Any]:
        """Of the files alone: everything else is made from them."""
        if self.commit is not None:
            return {"name": self.checkpoint.name, "commit": self.commit, "file": self.file}
        known = {file.name: file.digest for file in self.files}
        found = fingerprint([file.path for file in self.files], known)
        return {"name": self.checkpoint.name, "commit": None, **found}

    def rope_problem(self) -> str | None:
        """Compares the wavelengths with those that llama.cpp computes from the metadata."""
        return rope_problem(self.checkpoint.own_rope, self.metadata, self.factors)


def open_gguf(
    src: str | Path, file: str | None = None, revision: str | None = None, rescaled: bool = False, download: bool = True
) -> GgufSource:
    """A GGUF file, a folder with one, or a repository of the hub with one, which is downloaded into the hub's cache.

    Args:
        src: file, folder or hub id.
        file: its name among several; of a split one, the name of any part.
        revision, rescaled: as of `open_source`.
        download: False to use what the cache has.

    Raises:
        MissingFileError: there is none, or a part is missing.
        UsageError: there are several, or as of `GgufSource`.
    """
    path = user_path(src)
    if path.is_file():
        if file is not None:
            raise UsageError(f"{src} is a file: names are for folders and repositories", option="file")
        file, path = path.name, path.parent
    if path.is_dir():
        if file is not None and (".." in Path(file).parts or Path(file).is_absolute()):
            raise UsageError(f"{str(file)!r:.200} is not in {src}", option="file")
        names = sorted(entry.name for entry in path.glob("[!.]*.gguf"))
        parts = _parts(str(src), names, file, lambda name: (path / name).exists())
        return GgufSource(Path(parts[0]).name, None, parts[0], [path / part for part in parts], rescaled)
    folder = resolve(src, revision, ["README.md", ".gitattributes"])  # which are small, and one is always there
    names = _names(str(src), folder)
    parts = _parts(str(src), names, file, names.__contains__)
    if not download and not all((folder / part).is_file() for part in parts):
        raise UsageError(
            f"{src}/{parts[0]} is not in the hub's cache: a GGUF file has to be there before its header is read, "
            "which a dry run or a source that is consumed cannot do"
        )
    folder = resolve(src, folder.name, [glob.escape(part) for part in parts])
    return GgufSource(str(src), folder.name, parts[0], [folder / part for part in parts], rescaled)


def cached_gguf(name: str, commit: str, file: str) -> GgufSource:
    """A file of a hub model as the cache has it. Raises as `open_gguf`."""

    def path(part: str) -> Path:
        found = try_to_load_from_cache(name, part, revision=commit)
        return Path(found) if isinstance(found, str) else Path()

    parts = _parts(name, [], file, lambda part: path(part).is_file())
    return GgufSource(name, commit, parts[0], [path(part) for part in parts], True)


def _names(repo: str, folder: Path) -> list[str]:
    """The GGUF files of a commit; without the hub, those in the cache."""
    if constants.HF_HUB_OFFLINE:
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf"))
    with hub_errors(repo):
        names = HfApi().list_repo_files(repo, revision=folder.name)
    return sorted(name for name in names if name.endswith(".gguf"))


def _parts(src: str, names: Sequence[str], file: str | None, exists: Callable[[str], bool]) -> list[str]:
    """The names of the chosen file's parts, in order."""
    choices = {SPLIT.sub(r"\1-00001-of-\3.gguf", name) for name in names}
    listed = ", ".join(sorted(choices)[:20]) + (" …" if len(choices) > 20 else "")
    if file is None:
        if len(choices) != 1:
            if not choices:
                raise MissingFileError(f"{src} has no {WEIGHTS}, no {TORCH_WEIGHTS} and no .gguf file")
            raise UsageError(f"{src} has several GGUF files ({listed}): one must be named", remedies=[{"file": None}])
        file = choices.pop()
    elif not file.endswith(".gguf"):
        raise UsageError(f"{file!r:.200} is not the name of a .gguf file; {src} has {listed or 'none'}", option="file")
    elif not exists(file) and SPLIT.fullmatch(file) is None:
        raise MissingFileError(f"{src} has no {file}; it has {listed or 'no .gguf file'}", option="file")
    found = SPLIT.fullmatch(file)
    if found is None:
        return [file]
    count = int(found[3])
    if not 1 <= int(found[2]) <= count:
        raise UsageError(f"{file} is part {int(found[2])} of {count}: expected 1 to {count}")
    parts = [f"{found[1]}-{i + 1:05d}-of-{found[3]}.gguf" for i in range(count)]
    for part in parts:
        if not exists(part):
            raise MissingFileError(f"{src}: {part} is missing, one of the {count} parts of a GGUF file")
    return parts


def _check_parts(paths: Sequence[Path], headers: Sequence[GgufHeader]) -> None:
    """Check that the files are the parts of one model, all of them, in order."""
    for i, (path, header) in enumerate(zip(paths, headers, strict=True)):
        stated = (header.metadata.get("split.no", 0), header.metadata.get("split.count", 0) or 1)
        if stated != (i, len(paths)):
            raise UsageError(
                f"{path} says split.no = {stated[0]!r:.40}, split.count = {stated[1]!r:.40}: by its name it is part "
                f"{i} of {len(paths)}, counted from 0"
            )
    count, total = sum(len(header.tensors) for header in headers), headers[0].metadata.get("split.tensors.count")
    if len(paths) > 1 and total != count:
        raise UsageError(f"{paths[0]} says split.tensors.count = {total!r:.40}, but its parts have {count} tensors")


def _write_card(metadata: dict[str, Any], folder: Path) -> None:
    """Licence and languages as the front matter of a card. JSON is YAML, too."""
    card = {new: value for key, new in CARD.items() if (value := metadata.get(f"general.{key}"))}
    (folder / "README.md").write_text(f"---\n{json.dumps(card, ensure_ascii=False)}\n---\n", encoding="utf-8")
