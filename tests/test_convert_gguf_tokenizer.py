"""Tokenizers of GGUF files: the same ids as the tokenizer that the file was made from.

That one is trained here with the rules of the original models' tokenizer.json, or is sentencepiece's own; `as_gguf`
writes it down as llama.cpp's converter does.
"""

from __future__ import annotations

import functools
import inspect
import io
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_resonance.convert.gguf_pre_tokenizers import BY_NAME
from mlx_resonance.convert.gguf_tokenizer import write_tokenizer
from mlx_resonance.tokenizer import load_tokenizer

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from .checkpoints import source

GGML = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ONE_WORD = " qzqz"  # a token that no merges lead to
CONTROLS, OTHERS = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "\t\t"]
TEXTS = [
    "x   2000 + 1234567 = 3.14; 12 345 ٣٤٥ ½ ² Ⅷ",
    " a  b   c                 d ",
    "a\n\n\nb\r\n\r\n  c \n \t\n\n  ",
    "I'm sure they'll say it's WE'LL'VE don'T, 'tis 'Re l'été ſ'ſ",
    "今天天气很好，我们去公园吧。 東京タワー 한국어",
    "مرحبا بالعالم، كيف الحال؟",
    "नमस्ते दुनिया, क्षत्रिय",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽!",
    "e\u0301te\u0301 A\u030a \u1112\u1161\u11ab",  # not in NFC
    "\x00\x01\x1b[0m\x7f\u200b\ufeff\ufffd",
    "<|im_start|>user\nhi <|im_end|>\n<tool_call>{}\t\t\tx <|im_start |> <|end|>",
    f"{ONE_WORD} x{ONE_WORD}",
    "HTMLParser parseHTML iPhone <unk> <s> </s> https://x.org/a?b=c#d//e/",
]
LLAMA3 = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
# From mistralai/Mistral-Nemo-Base-2407, as ggml-org/llama.cpp quotes it in src/llama-vocab.cpp.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words_of(pattern: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
RULES: dict[str, list[Any]] = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL],
    "llama-bpe": words_of(LLAMA3),
    "smaug-bpe": words_of(LLAMA3),
    "qwen2": words_of(PRETOKENIZE_REGEX),
    "tekken": words_of(TEKKEN),
}


@functools.cache
def trained(name: str) -> Tokenizer:
    """A tokenizer with the rules of a model's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(RULES[name]), decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([source()[:100_000], *(text for text in TEXTS * 3 if ONE_WORD not in text)], trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"][ONE_WORD.replace(" ", "Ġ")] = len(content["model"]["vocab"])
    content["model"]["ignore_merges"] = name in ("llama-bpe", "tekken")
    tokenizer = Tokenizer.from_str(json.dumps(content))
    for texts, special in ((CONTROLS, True), (OTHERS, False)):
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in texts])
    return tokenizer


def as_gguf(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """The metadata of a GGUF file with this tokenizer, and two tokens for padding."""
    tokens = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    kinds = dict.fromkeys(CONTROLS, CONTROL) | dict.fromkeys(OTHERS, USER_DEFINED)
    types = [kinds.get(token, NORMAL) for token in tokens]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "general.architecture": "llama",
        GGML + "model": "gpt2",
        GGML + "pre": pre,
        GGML + "tokens": [*tokens, "[PAD1]", "[PAD2]"],
        GGML + "token_type": [*types, UNUSED, UNUSED],
        GGML + "merges": [" ".join(pair) for pair in merges],
        GGML + "bos_token_id": tokens.index("<|begin|>"),
        GGML + "eos_token_id": tokens.index("<|end|>"),
    }


def written(folder: Path, metadata: Mapping[str, Any], kind: str = "llama") -> tuple[Any, Any]:
    """The tokenizer that transformers reads, and ours."""
    write_tokenizer(metadata, folder)
    config = {"model_type": kind, "vocab_size": len(metadata[GGML + "tokens"])}
    (folder / "config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder), load_tokenizer(folder, config)


def streamed(tokenizer: Any, ids: list[int]) -> str:
    """As mlx-lm's generation reads it: piece by piece."""
    detokenizer, pieces = tokenizer.detokenizer, []
    for number in ids:
        detokenizer.add_token(number)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    return "".join([*pieces, detokenizer.last_segment])


@pytest.mark.parametrize("name", RULES)
def test_byte_level_ids(name: str, tmp_path: Path) -> None:
    expected = trained(name)
    metadata = as_gguf(expected, name) | {GGML + "add_bos_token": False}
    theirs, ours = written(tmp_path, metadata, "qwen2" if name == "qwen2" else "llama")
    for text in [*TEXTS, source()[100_000:]]:
        ids = expected.encode(text).ids
        assert ours.encode(text) == theirs.encode(text) == ids, text
        same = unicodedata.normalize("NFC", text) if name == "qwen2" else text
        assert ours.decode(ids) == theirs.decode(ids) == same
        # mlx-lm begins an answer without its space, and has Ā for NUL.
        assert streamed(ours, ids) == same.removeprefix(" ").replace("\0", "Ā")
    begin, end = (expected.token_to_id(name) for name in ("<|begin|>", "<|end|>"))
    turn = expected.token_to_id("<|im_end|>")
    assert (ours.bos_token_id, ours.eos_token_id, ours.eos_token_ids) == (begin, end, {end, turn})
    assert theirs.decode(expected.encode("a<|im_end|><tool_call>").ids, skip_special_tokens=True) == "a<tool_call>"


def test_the_rules_differ_on_the_texts() -> None:
    """Otherwise the test above could not tell one from another."""
    words = {name: [trained(name).pre_tokenizer.pre_tokenize_str(text) for text in TEXTS] for name in RULES}
    del words["smaug-bpe"]  # differs from llama-bpe in the next line only
    assert all(words[one] != words[other] for one in words for other in words if one != other)
    assert len(trained("llama-bpe").encode(ONE_WORD).ids) == 1 < len(trained("smaug-bpe").encode(ONE_WORD).ids)


@pytest.mark.parametrize(
    ("names", "text", "words"),
    [
        ("gpt-2 phi-2 mellum trillion", "it's 2024...\n  x", "it|'s| 2024|...|\n | x"),
        ("smollm starcoder refact minerva-7b", "it's 2024...\n  x", "it|'s| |2|0|2|4|...|\n | x"),
        ("llama-bpe llama3 llama-v3 falcon3 pixtral midm-2.0", "IT'Sx 2024...\n  x", "IT|'S|x| |202|4|...\n| | x"),
        ("smaug-bpe", "IT'Sx 2024...\n  x", "IT|'S|x| |202|4|...\n| | x"),
        ("qwen2 deepseek-r1-qwen megrez", "IT'Sx 2024...\n  x", "IT|'S|x| |2|0|2|4|...\n| | x"),
        ("seed-coder", "IT'Sx 20...\n  x", "IT|'S|x| |2|0|...|\n| | x"),
        ("tekken", "parseHTML it's 20//\n x", "parse|HTML| it|'s| |2|0|//\n| x"),
        ("deepseek-coder", "a b, 20+1\n\nx 中文", "a| b|,| |2|0|+|1|\n|\n|x| |中文"),
        ("default", "a b, 12345+1\n x", "a| b|,| |123|45|+|1|\n| x"),
    ],
)
def test_how_a_text_is_split(names: str, text: str, words: str, tmp_path: Path) -> None:
    for name in names.split():
        write_tokenizer(SMALL | {GGML + "pre": name}, tmp_path)
        rule = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer
        found = [text[start:end] for _, (start, end) in rule.pre_tokenize_str(text)]
        assert found == words.split("|"), name


def test_every_rule_is_tested() -> None:
    marks = test_how_a_text_is_split.pytestmark  # type: ignore[attr-defined]
    assert {name for names, *_ in marks[0].args[1] for name in names.split()} == BY_NAME.keys()


SMALL: dict[str, Any] = {
    GGML + "model": "gpt2",
    GGML + "pre": "gpt-2",
    GGML + "tokens": ["a", "b", "ab", "<s>", "</s>", "!", "<|eot_id|>", "<x>"],
    GGML + "token_type": [NORMAL, NORMAL, NORMAL, CONTROL, CONTROL, NORMAL, CONTROL, USER_DEFINED],
    GGML + "merges": ["a b"],
    GGML + "bos_token_id": 3,
    GGML + "eos_token_id": 4,
}
SPM: dict[str, Any] = {
    GGML + "model": "llama",
    GGML + "tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "<x>"],
    GGML + "scores": [0, 0.0, 0.0, -2.0, -3.0, -4.0, -1.0, -1000.0],
    GGML + "token_type": [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL, NORMAL, CONTROL],
}


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        ({}, [2]),
        ({"add_bos_token": True}, [3, 2]),
        ({"add_eos_token": True}, [2, 4]),
        ({"add_bos_token": True, "add_eos_token": True}, [3, 2, 4]),
        ({"pre": "llama-bpe"}, [3, 2]),
        ({"pre": "tekken"}, [3, 2]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [2]),
    ],
    ids=str,
)
def test_bos_and_eos_around_a_text(change: dict[str, Any], ids: list[int], tmp_path: Path) -> None:
    tokenizers = written(tmp_path, SMALL | {GGML + key: value for key, value in change.items()})
    assert [tokenizer.encode("ab") for tokenizer in tokenizers] == [ids, ids]
    assert [tokenizer.encode("ab", add_special_tokens=False) for tokenizer in tokenizers] == [[2], [2]]


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        ({}, [4, 6]),  # <|eot_id|> by its name
        ({"eot_token_id": 6}, [4, 6]),
        ({"eot_token_id": 7, "eom_token_id": 3}, [4, 7, 3, 6]),
        ({"eos_token_id": 6}, [6]),
    ],
    ids=str,
)
def test_ids_that_end_a_text(change: dict[str, int], ends: list[int], tmp_path: Path) -> None:
    _, ours = written(tmp_path, SMALL | {GGML + key: value for key, value in change.items()})
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 3, "eos_token_id": ends}
    assert ours.eos_token_ids == set(ends)


def test_an_ordinary_token_for_padding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers would cut texts at it, and leave it out of answers."""
    theirs, ours = written(tmp_path, SMALL | {GGML + "padding_token_id": 5})
    assert theirs.decode([0, 5, 1], skip_special_tokens=True) == ours.decode([0, 5, 1]) == "a!b"
    assert caplog.messages == ["tokenizer.ggml.padding_token_id names '!', an ordinary token: it is not used as such"]
    assert "pad_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_rule_that_is_not_named(pre: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tokenizer(SMALL | {GGML + "pre": pre}, tmp_path)
    assert "texts are split as llama.cpp does then, which may not be how the model was trained" in caplog.text


def test_chat_templates(tmp_path: Path) -> None:
    template = "{% for m in messages %}<s>{{ m.content }}</s>\n{% endfor %}"
    more = {"tokenizer.chat_template": template, "tokenizer.chat_template.rag": "{{ documents }}"}
    theirs, ours = written(tmp_path, SMALL | more | {"tokenizer.chat_templates": ["rag"]})
    assert theirs.chat_template == {"default": template, "rag": "{{ documents }}"}
    assert ours.apply_chat_template([{"role": "user", "content": "ab"}])[:3] == [3, 2, 4]


def test_of_equal_merges_the_first_counts(tmp_path: Path) -> None:
    """As in llama.cpp; in the tokenizers library, the last one would."""
    metadata = SMALL | {GGML + "tokens": ["a", "b", "ab", "<s>", "</s>", "c", "<|eot_id|>", "bc"]}
    theirs, _ = written(tmp_path, metadata | {GGML + "merges": ["a b", "b c", "a b"], GGML + "token_type": [1] * 8})
    assert theirs.encode("abc") == [2, 5]


def sentencepiece_model(**options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    lines = (line for line in [*source()[:100_000].splitlines(), *TEXTS] if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=1500, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def spm_as_gguf(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """With two control tokens more, as for chat, and one for padding."""
    kinds = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, BYTE: model.is_byte}
    rows, more = range(model.vocab_size()), ["<|im_start|>", "<|im_end|>", "[PAD]"]
    types = [next((kind for kind, holds in kinds.items() if holds(row)), NORMAL) for row in rows]
    return {
        GGML + "model": "llama",
        GGML + "pre": "default",
        GGML + "tokens": [*(model.id_to_piece(row) for row in rows), *more],
        GGML + "scores": [*(model.get_score(row) for row in rows), -1000.0, -1000.0, -1000.0],
        GGML + "token_type": [*types, CONTROL, CONTROL, UNUSED],
    }


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("fallback", [True, False])
def test_sentencepiece_ids(fallback: bool, prefix: bool, tmp_path: Path) -> None:
    expected = sentencepiece_model(byte_fallback=fallback, add_dummy_prefix=prefix, character_coverage=0.999)
    metadata = spm_as_gguf(expected) | ({} if prefix else {GGML + "add_space_prefix": False})
    theirs, ours = written(tmp_path, metadata)
    # sentencepiece finds no special tokens in texts.
    texts = [text for text in TEXTS if "<s>" not in text and "<|im" not in text]
    for text in [*texts, "=" * 37 + "-" * 21 + " " * 13 + "aaaaaa", *source()[100_000:].splitlines()]:
        ids = expected.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False) == ids
        if fallback:
            assert ours.decode(ids) == streamed(ours, ids) == text
    assert ours.encode("ab") == [1, *expected.encode("ab")]
    start, end = (len(metadata[GGML + "tokens"]) - n for n in (3, 2))
    chat = [1, start, *expected.encode("user\nhi"), end, *expected.encode("\n")]
    assert ours.encode("<|im_start|>user\nhi<|im_end|>\n") == chat == theirs.encode("<|im_start|>user\nhi<|im_end|>\n")
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, end]


def test_pieces_of_a_long_word_and_a_token_that_is_only_for_padding(tmp_path: Path) -> None:
    metadata = SPM | {GGML + "tokens": [*SPM[GGML + "tokens"], "ab", "x" * 10**6]}
    metadata |= {GGML + "scores": [*SPM[GGML + "scores"], 0, 0]}
    types = [*SPM[GGML + "token_type"]]
    theirs, _ = written(tmp_path, metadata | {GGML + "token_type": [*types, UNUSED, NORMAL]})
    assert theirs.encode(" ab", add_special_tokens=False) == [3, 6, 5]
    theirs, _ = written(tmp_path, metadata | {GGML + "token_type": [*types, NORMAL, NORMAL]})
    assert theirs.encode(" ab", add_special_tokens=False) == [3, 3, 8]


def test_without_a_tokenizer(tmp_path: Path) -> None:
    write_tokenizer({"general.architecture": "llama"}, tmp_path)
    assert not list(tmp_path.iterdir())
