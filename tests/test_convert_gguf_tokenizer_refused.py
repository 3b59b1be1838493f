"""Tokenizers of GGUF files that cannot be converted: one line that names the key, and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_resonance.convert.gguf_tokenizer import write_tokenizer
from mlx_resonance.errors import UsageError

import pytest

from .test_convert_gguf_tokenizer import BYTE, GGML, SMALL, SPM

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def with_bytes(names: list[str]) -> dict[str, Any]:
    types = [*SPM[GGML + "token_type"], *[BYTE] * len(names)]
    scores = [*SPM[GGML + "scores"], *[0.0] * len(names)]
    return {"tokens": [*SPM[GGML + "tokens"], *names], "token_type": types, "scores": scores}


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        *((SMALL, {"model": name}, f"model = '{name}' cannot be converted: supported are gpt2 and llama")
          for name in ("bert", "t5", "rwkv", "none", "no_vocab", "gemma4", "plamo2", "")),
        (SMALL, {"model": 3}, "model must be a string, got 3"),
        (SMALL, {"pre": "kimi-k2"}, "pre = 'kimi-k2': it is not known how this splits texts; known are deepseek-coder"),
        (SMALL, {"pre": 1}, "pre must be a string, got 1"),
        (SMALL, {"tokens": None}, "tokens is missing"),
        (SMALL, {"tokens": []}, r"tokens must be a list with entries, got \[\]"),
        (SMALL, {"tokens": "abcdefgh"}, "tokens must be a list with entries, got 'abcdefgh'"),
        (SMALL, {"tokens": ["a", 1]}, r"tokens\[1\] must be a string, got 1"),
        (SMALL, {"tokens": ["a", "\udc80"]}, r"tokens\[1\] = .* is not valid UTF-8"),
        (SMALL, {"tokens": ["a", "b", "ab", "a", *"1234"]}, "tokens: 'a' is both token 0 and token 3"),
        (SMALL, {"token_type": None}, "token_type is missing"),
        (SMALL, {"token_type": [1] * 7}, "token_type has 7 entries, but there are 8 tokens"),
        (SMALL, {"token_type": [True] * 8}, r"token_type\[0\] must be an integer, got True"),
        (SMALL, {"token_type": [1] * 7 + [BYTE]}, "token_type: token 7, '<x>', has type 6, not 1 to 5"),
        (SPM, {"token_type": [1] * 7 + [0]}, "token_type: token 7, '<x>', has type 0, not 1 to 6"),
        (SMALL, {"merges": None}, "merges is missing"),
        (SMALL, {"merges": ["a b", "a c"]}, r"merges\[1\] = 'a c' needs 'c', which is not a token"),
        (SMALL, {"merges": ["b a"]}, r"merges\[0\] = 'b a' needs 'ba', which is not a token"),
        (SMALL, {"merges": ["ab"]}, r"merges\[0\] = 'ab' needs '', which is not a token"),
        (SMALL, {"merges": [["a", "b"]]}, r"merges\[0\] must be a string"),
        (SMALL, {"eos_token_id": 8}, "eos_token_id = 8, but there are 8 tokens: ids are below 8"),
        (SMALL, {"padding_token_id": -1}, "padding_token_id = -1, but"),
        (SMALL, {"eot_token_id": "</s>"}, "eot_token_id must be an integer, got '</s>'"),
        (SMALL, {"add_bos_token": 1}, "add_bos_token must be true or false, got 1"),
        (SMALL, {"add_bos_token": True, "bos_token_id": None},
         "texts need the token that tokenizer.ggml.bos_token_id names, which is missing or empty"),
        (SPM, {"scores": None}, "scores is missing"),
        (SPM, {"scores": [0.0] * 7}, "scores has 7 entries, but there are 8 tokens"),
        (SPM, {"scores": ["0"] * 8}, r"scores\[0\] must be a number, got '0'"),
        (SPM, {"scores": [float("nan")] + [0.0] * 7}, r"scores\[0\] must be a finite number, got nan"),
        (SPM, {"add_space_prefix": "yes"}, "add_space_prefix must be true or false, got 'yes'"),
        (SPM, {"remove_extra_whitespaces": True}, "remove_extra_whitespaces: tokenizers that normalize texts cannot"),
        (SPM, {"precompiled_charsmap": [1, 2]}, "precompiled_charsmap: tokenizers that normalize texts cannot"),
        (SPM, with_bytes(BYTES[:-1]), "tokens: '<0xFF>': a byte token is missing, expected <0x00> to <0xFF>"),
        (SPM, with_bytes([*BYTES, "<0xZZ>"]), "tokens: '<0xZZ>': not a byte, expected <0x00> to <0xFF>"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(base: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^(texts need the token that )?tokenizer\.ggml\.") as raised:
        write_tokenizer(base | {GGML + key: value for key, value in change.items()}, tmp_path)
    assert raised.match(message) and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../x", "", "a/b", "default", "a b", "é"])
def test_names_of_chat_templates(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the name of a chat template must consist of letters, digits, _ and -"):
        write_tokenizer(SMALL | {f"tokenizer.chat_template.{name}": "x"}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_template_that_is_not_a_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.chat_template must be a string, got \['x'\]"):
        write_tokenizer(SMALL | {"tokenizer.chat_template": ["x"]}, tmp_path)
