"""The README.md of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_resonance.files import file_of
from mlx_resonance.release import REPOSITORY, install_command
from mlx_resonance.rope_config import RopeConfig

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError  # type: ignore[import-untyped]

KEPT = ("license", "license_name", "license_link", "language", "tags", "base_model")
MAX_CARD = 2**20  # bytes
TEXT = """
# {name}

{source} converted to MLX with {tool}.

| rope type | base | factor | context before scaling | context |
| --- | --- | --- | --- | --- |
| `{rope_type}` | {base:g} | {factor:g} | {trained} | {context} |

```
{install}mlx-resonance generate --model {name} --prompt "…"
```
{resonance}"""

RESONANCE = """
The rotary wavelengths are whole numbers of tokens (arXiv 2403.00071). A runtime without the rope type
`{rope_type}` refuses this checkpoint: with other angles it would write noise.
"""


def read_card(folder: Path) -> dict[str, Any]:
    """Licence, language, tags and base models that a checkpoint's card has: texts, or lists of texts.

    Raises:
        UsageError: README.md is a link out of the folder.
    """
    path = file_of(folder, "README.md")
    if not path.is_file() or path.stat().st_size > MAX_CARD:
        return {}
    try:
        content = path.read_text(encoding="utf-8")
        if not content.startswith("---"):  # no front matter: huggingface_hub would warn
            return {}
        data = ModelCard(content).data
    except (ValueError, TypeError, YAMLError):  # front matter that the hub would refuse
        return {}
    return {key: value for key in KEPT if _is_text(value := getattr(data, key, None))}


def _is_text(value: Any) -> bool:
    """A short text, or a list of such: YAML's references can make a kilobyte into gigabytes."""
    texts = value if isinstance(value, list) else [value]
    return 0 < len(texts) < 100 and all(isinstance(text, str) and len(text) < 200 for text in texts)


def base_models(folder: Path) -> list[str]:
    """The models from which a checkpoint was made, as its card says."""
    base = read_card(folder).get("base_model", [])
    return base if isinstance(base, list) else [base]


def write_card(folder: Path, source: str, is_hub_id: bool, card: dict[str, Any], rope: RopeConfig) -> None:
    """Write README.md, with the licence, language and tags of the source's card.

    The folder's name, less `.partial`, is the title; `rope` are the settings of the result.
    """
    data = ModelCardData(**{key: value for key, value in card.items() if key != "base_model"})
    data.library_name = "mlx"
    data.pipeline_tag = "text-generation"
    data.tags = sorted({*map(str, data.tags or []), "mlx", *(["resonance-rope"] if rope.is_resonant else [])})
    data.base_model = source if is_hub_id else None
    text = TEXT.format(
        name=folder.name.removesuffix(".partial"),
        source=source if is_hub_id else f"`{source}`",
        tool=f"[mlx-resonance]({REPOSITORY})" if REPOSITORY else "mlx-resonance",
        rope_type=rope.rope_type,
        base=rope.base,
        factor=rope.parameters.get("factor") or _quotient(rope.context_length, rope.trained_length),
        trained=rope.trained_length or "unknown",
        context=rope.context_length or "unknown",
        install=f"{install_command(repository=REPOSITORY)}\n" if REPOSITORY else "",  # not all readers have a clone
        resonance=RESONANCE.format(rope_type=rope.rope_type) if rope.is_resonant else "",
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")


def _quotient(context: int | None, trained: int | None) -> float:
    """How many times LongRoPE, which states no factor, lengthens the context; 1 where it is not known."""
    return round(context / trained, 3) if context and trained else 1
