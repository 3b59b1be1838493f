"""How byte-level BPE tokenizers split texts before merging, by the name that a GGUF file has for it.

A GGUF file names the rule (`tokenizer.ggml.pre`) but does not hold it. The rules are those of the original models'
tokenizer.json; which name stands for which is in src/llama-vocab.cpp and convert_hf_to_gguf_update.py of
ggml-org/llama.cpp.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from mlx_resonance.errors import UsageError

from tokenizers import Regex, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

PRE = "tokenizer.ggml.pre"
# GPT-2's own; ByteLevel has it built in.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3, Qwen 2 and Seed-Coder differ in how many digits go together, and in what a line break goes with.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED_CODER_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER_WORDS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
DEFAULT_WORDS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")

logger = logging.getLogger("mlx_resonance")


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is split into the words that merges are applied to.

    Args:
        splits: regular expressions, applied one after the other; empty for GPT-2's.
        digits: whether each digit is a word, before GPT-2's expression is applied.
        nfc: whether the text is normalized to NFC first.
        ignore_merges: whether a word that is a token needs no merges.
        add_bos: whether a text begins with BOS where the file does not say.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    @property
    def normalizer(self) -> Any:
        """The normalizer of the tokenizers library, or None."""
        return normalizers.NFC() if self.nfc else None

    @property
    def pre_tokenizer(self) -> Any:
        """The pre-tokenizer of the tokenizers library."""
        splits = [Split(Regex(pattern), behavior="isolated") for pattern in self.splits]
        digits = [Digits(individual_digits=True)] if self.digits else []
        return Sequence([*splits, *digits, ByteLevel(add_prefix_space=False, use_regex=not self.splits)])


GPT2 = PreTokenizer()
SMOLLM = PreTokenizer(digits=True)
LLAMA3 = PreTokenizer((WORDS.replace("DIGITS", "{1,3}"),), ignore_merges=True, add_bos=True)
QWEN2 = PreTokenizer((WORDS.replace("DIGITS", ""),), nfc=True)
DEFAULT = PreTokenizer(DEFAULT_WORDS)
BY_NAME = {
    **dict.fromkeys(["gpt-2", "phi-2", "mellum", "trillion"], GPT2),
    **dict.fromkeys(["smollm", "starcoder", "refact", "minerva-7b"], SMOLLM),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"], LLAMA3),
    "smaug-bpe": replace(LLAMA3, ignore_merges=False, add_bos=False),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen"], QWEN2),
    "megrez": replace(QWEN2, nfc=False),
    "seed-coder": PreTokenizer((SEED_CODER_WORDS,)),
    "tekken": PreTokenizer((TEKKEN_WORDS,), ignore_merges=True, add_bos=True),
    "deepseek-coder": PreTokenizer(DEEPSEEK_CODER_WORDS),
    "default": DEFAULT,
}


def pre_tokenizer_of(name: str | None) -> PreTokenizer:
    """The rule that `tokenizer.ggml.pre` names; without one, llama.cpp's default, with a warning.

    Raises:
        UsageError: the name is not a known one.
    """
    if name not in (None, *BY_NAME):
        known = ", ".join(sorted(BY_NAME))
        raise UsageError(f"{PRE} = {name!r:.80}: it is not known how this splits texts; known are {known}")
    if name in (None, "default"):
        what = "is missing" if name is None else "is 'default'"
        logger.warning(
            "%s %s: texts are split as llama.cpp does then, which may not be how the model was trained", PRE, what
        )
    return BY_NAME[name or "default"]
