"""The README.md of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path

from mlx_resonance.config import RopeConfig

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError  # type: ignore[import-untyped]

TEXT = """
# {name}

{source} converted to MLX with mlx-resonance.

| rope type | base | factor | context before scaling | context |
| --- | --- | --- | --- | --- |
| `{rope_type}` | {base:g} | {factor:g} | {trained} | {context} |

```
pip install mlx-resonance
mlx-resonance generate --model {name} --prompt "…"
```
{resonance}"""

RESONANCE = """
The rotary wavelengths are whole numbers of tokens (arXiv 2403.00071). A runtime without the rope type
`{rope_type}` refuses this checkpoint: with other angles it would write noise.
"""


def read_card(path: Path) -> ModelCardData:
    """The metadata of a card; empty where there is none, or one that the hub would refuse."""
    if path.is_file():
        try:
            return ModelCard.load(path).data
        except (ValueError, YAMLError):
            pass
    return ModelCardData()


def base_models(folder: Path) -> list[str]:
    """What the card of a checkpoint names as the models that it was made from."""
    base = read_card(folder / "README.md").base_model
    return [str(name) for name in (base if isinstance(base, list) else [base]) if name]


def write_card(folder: Path, source: str | Path, source_card: Path, rope: RopeConfig) -> None:
    """Write README.md, keeping the licence and language of the source's card.

    Args:
        folder: where to write; its name, less `.partial`, is the title.
        source: folder or hub id that was converted.
        source_card: the source's README.md, which may be missing.
        rope: the settings that were written.
    """
    data = read_card(source_card)
    data.library_name = "mlx"
    data.pipeline_tag = "text-generation"
    data.tags = sorted({*map(str, data.tags or []), "mlx", *(["resonance-rope"] if rope.is_resonant else [])})
    is_hub_id = not Path(source).exists()
    data.base_model = str(source) if is_hub_id else None
    text = TEXT.format(
        name=folder.name.removesuffix(".partial"),
        source=str(source) if is_hub_id else f"`{Path(source).resolve().name}`",
        rope_type=rope.rope_type,
        base=rope.base,
        factor=rope.parameters.get("factor") or _quotient(rope.context_length, rope.trained_length),
        trained=rope.trained_length,
        context=rope.context_length,
        resonance=RESONANCE.format(rope_type=rope.rope_type) if rope.is_resonant else "",
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")


def _quotient(context: int | None, trained: int | None) -> float:
    """By how much LongRoPE, which states no factor, lengthens the context; 1 where it is not known."""
    return round(context / trained, 3) if context and trained else 1
