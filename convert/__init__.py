"""The checkpoint converter: a Hugging Face LLaMA checkpoint to an MLX folder, with new rope settings."""

from .checkpoint import Conversion, convert
from .verify import Verification, VerificationError, verify

__all__ = ["Conversion", "Verification", "VerificationError", "convert", "verify"]
