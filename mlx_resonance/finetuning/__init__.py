"""Fine-tuning: a checkpoint learns a longer context, within a memory plan; a killed run resumes."""

from .recipes import PRESETS, Recipe
from .run import finetune

__all__ = ["PRESETS", "Recipe", "finetune"]
