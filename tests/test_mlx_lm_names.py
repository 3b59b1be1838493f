"""The undocumented names of mlx-lm: `_mlx_lm.py` lists them, this version has them, and no other file reaches one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_resonance import _mlx_lm
from mlx_resonance.attention import ADAPTED_FILES
from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.errors import UsageError
from mlx_resonance.validation import SUPPORTED

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("mlx_resonance", "convert") for path in sorted((ROOT / folder).rglob("*.py"))]
# What mlx-lm's README and its own examples use, what every one of its model files imports, and its command.
PUBLIC = {
    "cli", "generate.GenerationResponse", "models.base.scaled_dot_product_attention",
    "models.cache.can_trim_prompt_cache", "models.cache.make_prompt_cache", "models.cache.trim_prompt_cache",
    "sample_utils.make_logits_processors", "sample_utils.make_sampler", "tokenizer_utils.TokenizerWrapper",
    "tuner.utils.linear_to_lora_layers", "utils.load_adapters", "utils.load_config", "utils.quantize_model",
}  # fmt: skip
OF_OBJECTS = {
    attribute for name in _mlx_lm.NAMES.values() for entry in name.of_objects for attribute in entry.split(" or ")
}
PRIVATE_ATTRIBUTES = {attribute for attribute in OF_OBJECTS if attribute.startswith("_")}
WRAPPER = "mlx_lm.tokenizer_utils.TokenizerWrapper"


def has(found: Any, entry: str) -> bool:
    """Whether an object has an attribute, or one of two."""
    return any(name in vars(found) or hasattr(type(found), name) for name in entry.split(" or "))


def objects(checkpoint: Path) -> dict[str, Any]:
    """An object of each class of which `NAMES` lists attributes that only objects have."""
    opened = Checkpoint.open(checkpoint)
    cache = _mlx_lm.KVCache()
    return {
        "BatchGenerator": _mlx_lm.BatchGenerator(opened.load()),
        "BatchKVCache": _mlx_lm.BatchKVCache([0]),
        "KVCache": cache,
        "QuantizedKVCache": cache.to_quantized(),
        "TokenizerWrapper": opened.tokenizer,
    }


def test_this_version_has_every_name(checkpoint: Path) -> None:
    missing = []
    for name, entry in _mlx_lm.NAMES.items():
        place, attribute = entry.place.rsplit(".", 1)
        found = getattr(import_module(f"mlx_lm.{place}"), attribute, None)
        missing += [entry.place] * (found is None)
        missing += [f"{entry.place}.{part}" for part in entry.attributes if not hasattr(found, part)]
        assert found is None or getattr(_mlx_lm, name) is found
    made = objects(checkpoint)
    assert made.keys() == {name for name, entry in _mlx_lm.NAMES.items() if entry.of_objects}
    for name, one in made.items():
        missing += [f"{name}().{entry}" for entry in _mlx_lm.NAMES[name].of_objects if not has(one, entry)]
    assert not missing, f"this mlx-lm lacks {', '.join(missing)}"


@pytest.mark.parametrize("file", sorted({*SUPPORTED.values(), *ADAPTED_FILES}))
def test_this_version_has_every_model_file(file: str) -> None:
    model, arguments = _mlx_lm.model_classes(file)
    assert model.__module__ == arguments.__module__ == _mlx_lm.MODELS + file


@pytest.mark.parametrize(
    ("where", "name"),
    [("utils", "make_shards"), ("generate", "BatchGenerator"), ("models.rope_utils", "initialize_rope")],
)
def test_a_missing_name_is_an_error_in_a_line(where: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(import_module(f"mlx_lm.{where}"), name)
    monkeypatch.setattr(_mlx_lm, "version", lambda _: "9.9")
    with pytest.raises(UsageError) as error:
        getattr(_mlx_lm, name)
    assert str(error.value) == f"mlx-lm 9.9 has no {where}.{name}: install a version from 0.31.3 to 0.32.2"


def test_a_missing_method_file_and_attribute_are_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_mlx_lm.BatchGenerator, "extract_cache")
    with pytest.raises(UsageError, match=r"has no generate\.BatchGenerator\.extract_cache: install"):
        _ = _mlx_lm.BatchGenerator
    with pytest.raises(UsageError, match=r"has no models\.no_such_file\.Model: install"):
        _mlx_lm.model_classes("no_such_file")
    with pytest.raises(UsageError, match=r"has no tokenizer_utils\.TokenizerWrapper\._tokenizer: install"):
        _mlx_lm.wrapped(_mlx_lm)
    with pytest.raises(AttributeError):
        _ = _mlx_lm.of_another_name


def test_a_command_says_so_in_a_line(checkpoint: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mlx_resonance.posgen.evaluate", raising=False)
    monkeypatch.setattr(_mlx_lm, "model_classes", lambda file: _mlx_lm._look_up(_mlx_lm.MODELS + file, "NoModel"))
    code, out, err = run("generate", checkpoint, "-p", "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(r"mlx-lm \d\S+ has no models\.llama\.NoModel: install a version from", err)


def test_importing_the_module_imports_no_mlx() -> None:
    code = "import sys; from mlx_resonance import _mlx_lm; print([name for name in sys.modules if 'mlx' in name[:6]])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"'mlx\.|'mlx_lm", out)


def test_the_lowest_version_is_the_floor_of_the_package() -> None:
    found = re.findall(r'"mlx-lm>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found == [_mlx_lm.TESTED[0]]


def private_uses(source: str) -> Iterator[str]:
    """What of mlx-lm, beyond `PUBLIC`, a module reaches."""
    nodes = list(ast.walk(ast.parse(source)))
    known = {"mlx_lm": "mlx_lm"}  # names in the module, and what of mlx-lm they are
    for node in nodes:
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    known = {name: place for name, place in known.items() if place.split(".")[0] == "mlx_lm"}
    attributes = {id(node): node for node in nodes if isinstance(node, ast.Attribute)}
    own = {ast.unparse(node) for node in attributes.values() if isinstance(node.ctx, ast.Store)}
    reached = list(known.values())
    for node in attributes.values():
        first, _, rest = (text := ast.unparse(node)).partition(".")
        if first in known:
            reached.append(f"{known[first]}.{rest}")
        if node.attr in PRIVATE_ATTRIBUTES and not (first == "self" and text in own):
            yield text
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    reached += [text for text in texts if re.fullmatch(r"mlx_lm\.[\w.]+", text)]  # for import_module, sys.modules
    yield from sorted({place for place in reached if not is_public(place)})


def is_public(place: str) -> bool:
    """Whether it is one of `PUBLIC`, a part of one, or a module that has one."""
    beginnings = {public.rpartition(".")[0] for public in PUBLIC} | {"mlx_lm"}
    name = place.removeprefix("mlx_lm.")
    known = name in beginnings | {"models", "tuner"} or any(f"{name}.".startswith(f"{public}.") for public in PUBLIC)
    return known and "._" not in place


def test_no_other_file_reaches_one() -> None:
    found = {path: list(private_uses(path.read_text())) for path in FILES if path != Path(_mlx_lm.__file__)}
    # transformers has an attribute of this name, too.
    found = {path: [use for use in uses if use != "tokenizer._tokenizer"] for path, uses in found.items()}
    assert {str(path): uses for path, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from mlx_lm.utils import _download", "mlx_lm.utils._download"),
        ("from mlx_lm.utils import make_shards as shards", "mlx_lm.utils.make_shards"),
        ("import mlx_lm.utils\nx = mlx_lm.utils._download(1)", "mlx_lm.utils._download"),
        ("import mlx_lm.utils as u\nu.load_model", "mlx_lm.utils.load_model"),
        ("from mlx_lm import utils\nutils.load_model", "mlx_lm.utils.load_model"),
        ("def f():\n    from mlx_lm import server", "mlx_lm.server"),
        ("def f(w):\n    return w._tokenizer.encode('')", "w._tokenizer"),
        ("class A(T):\n    def f(self):\n        return self._tokenizer", "self._tokenizer"),
        ("class A:\n    def f(self):\n        self._tokenizer = 0\n        return self._tokenizer", None),
        (
            "from mlx_lm.tokenizer_utils import TokenizerWrapper as T\nT._x",
            "mlx_lm.tokenizer_utils.TokenizerWrapper._x",
        ),
        ("import sys\nsys.modules['mlx_lm.server'].ModelProvider", "mlx_lm.server"),
        ("from mlx_lm.sample_utils import make_sampler\nimport mlx_lm.utils\nmlx_lm.utils.load_config", None),
    ],
)
def test_the_check_finds_them(source: str, found: str | None) -> None:
    assert list(private_uses(source)) == ([] if found is None else [found])
