"""The checkpoint converter: a Hugging Face LLaMA checkpoint to an MLX folder, with new rope settings."""

from .checkpoint import Conversion, convert

__all__ = ["Conversion", "convert"]
