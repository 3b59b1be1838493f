"""Fine-tuning: a checkpoint learns a longer context, planned, packed, resumable."""

from .recipes import PRESETS, Recipe
from .run import finetune

__all__ = ["PRESETS", "Recipe", "finetune"]
