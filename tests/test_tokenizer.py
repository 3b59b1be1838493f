"""Tokenizers of checkpoints that do not fit their files: other decoders or classes, empty tokens, no tokenizer.json.

Expected values come from the tokenizers library reading tokenizer.json by itself, and from sentencepiece.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_resonance.errors import UsageError
from mlx_resonance.files import read_config
from mlx_resonance.generation import prompt_tokens
from mlx_resonance.tokenizer import READS_SENTENCEPIECE, load_tokenizer

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers

from .checkpoints import STDLIB_LLAMA, source

TEXT = "import os, re\n\n  def f(x):\n  return x+12345 été don't </s> y  "
ROWS = 2048  # of the tiny checkpoint, whose tokenizer has as many tokens
Change = Callable[[dict[str, Any]], Any]


def made(folder: Path, change: Change = lambda content: None, config: Any = (), **files: Any) -> Path:
    """A folder with the tiny checkpoint's tokenizer, changed, and with other files of JSON, but without weights."""
    folder.mkdir()
    values = {"config": json.loads((STDLIB_LLAMA / "config.json").read_text()) | dict(config)}
    content = json.loads((STDLIB_LLAMA / "tokenizer.json").read_text())
    change(content)
    values |= {"tokenizer": content, "tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}} | files
    for name, value in values.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def opened(folder: Path) -> Any:
    return load_tokenizer(folder, read_config(folder))


def streamed(tokenizer: Any, ids: list[int]) -> str:
    """As mlx-lm's generation reads it: piece by piece."""
    detokenizer, pieces = tokenizer.detokenizer, []
    for number in ids:
        detokenizer.add_token(number)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    return "".join([*pieces, detokenizer.last_segment])


REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
OTHER_DECODERS = {
    "spm": {"type": "Sequence", "decoders": [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP]},
    "spm without strip": {"type": "Sequence", "decoders": [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}]},
    "metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "none": None,
}


@pytest.mark.parametrize("name", OTHER_DECODERS)
def test_a_byte_level_tokenizer_is_decoded_as_one(name: str, tmp_path: Path) -> None:
    tokenizer = opened(made(tmp_path / "model", lambda content: content.update(decoder=OTHER_DECODERS[name])))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == "<s>" + TEXT
    assert streamed(tokenizer, ids[1:3]) == "import os"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", None])
def test_ids_are_those_of_tokenizer_json(
    name: str | None, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever class of transformers the folder asks for, as in transformers 4."""
    settings = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}
    folder = made(tmp_path / "model", config={"model_type": kind}, tokenizer_config=settings)
    tokenizer, expected = opened(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (TEXT, "<|endoftext|>", "0123456789 <s> ''"):
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text).ids
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == expected.decode(ids, skip_special_tokens=False)
    assert len(tokenizer.get_vocab()) == ROWS and tokenizer.without_row == {}  # classes add tokens of their own
    assert tokenizer.pad_token_id is None and tokenizer.unk_token_id is None
    assert not [record for record in caplog.records if record.name == "mlx_resonance"]


def test_tokens_that_the_settings_name_are_added(tmp_path: Path) -> None:
    more = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "tokenizer_class": "GPT2Tokenizer"}
    tokenizer = opened(made(tmp_path / "model", config={"vocab_size": ROWS + 8}, tokenizer_config=more))
    assert tokenizer.encode("[PAD]", add_special_tokens=False) == [ROWS] and len(tokenizer.get_vocab()) == ROWS + 1
    assert streamed(tokenizer, tokenizer.encode("x[PAD]")) == "<s>x[PAD]"


def test_ids_of_an_spm_style_file_too(tmp_path: Path) -> None:
    """transformers 5 puts no space after a special token there, the file does."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(["▁", "a", "b", "▁a"])}
    file = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    file.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    file.decoder = decoders.Sequence(parts)
    file.add_special_tokens(["<unk>", "<s>", "</s>"])
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    folder = made(tmp_path / "model", tokenizer=json.loads(file.to_str()), tokenizer_config=settings)
    tokenizer, text = opened(folder), "<s>a b</s>aé"
    assert tokenizer.encode(text) == file.encode(text).ids
    assert transformers.AutoTokenizer.from_pretrained(folder).encode(text) != file.encode(text).ids
    assert streamed(tokenizer, tokenizer.encode("a b aé")) == tokenizer.decode(tokenizer.encode("a b aé")) == "a b aé"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(0, 1, {0, 1}), ([0, 5], 1, {0, 1, 5}), (None, 0, {0, 1}), ([], 7, {1, 7}), (7, [8, 9], {1, 7})],
)
def test_eos_of_the_generation_config(generation: Any, config: Any, expected: set[int], tmp_path: Path) -> None:
    more = {"generation_config": {"eos_token_id": generation}}
    folder = made(tmp_path / "model", config={"eos_token_id": config}, **more)
    assert opened(folder).eos_token_ids == expected  # 1 is that of the tokenizer


@pytest.mark.parametrize("value", ["</s>", -1, ROWS, True, 1.0, [0, "1"], [[0]], {}], ids=str)
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_eos_ids_that_cannot_be(name: str, value: Any, tmp_path: Path) -> None:
    folder = made(tmp_path / "model")
    (folder / "generation_config.json").write_text("{}")
    content = json.loads((folder / f"{name}.json").read_text()) | {"eos_token_id": value}
    (folder / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=rf"eos_token_id in {name}\.json must be one or more ids in \[0, 2048\)"):
        opened(folder)


EMPTY = [
    "",
    {"content": ""},
    {"__type": "AddedToken", "content": "", "lstrip": False, "rstrip": False, "normalized": False},
]


@pytest.mark.parametrize("value", EMPTY, ids=["text", "object", "AddedToken"])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_empty_special_tokens_count_as_absent(file: str, value: Any, tmp_path: Path) -> None:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    for missing in (names, *((name,) for name in names)):
        folder = made(tmp_path / "-".join(missing), **{"tokenizer_config": {}} | {file: dict.fromkeys(missing, value)})
        tokenizer = opened(folder)
        assert all(getattr(tokenizer, name) is None and getattr(tokenizer, f"{name}_id") is None for name in missing)
        assert prompt_tokens(tokenizer, "import os") == [0, *tokenizer.encode("import os", add_special_tokens=False)]
        assert tokenizer.eos_token_ids == {1}  # config.json's
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json"}  # the folder itself is left alone


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in source()[:20_000].splitlines() if line), model_writer=model, vocab_size=400,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def from_sentencepiece(folder: Path, model: bytes, settings: Any, kind: str = "llama") -> Path:
    folder.mkdir()
    config = json.loads((STDLIB_LLAMA / "config.json").read_text()) | {"vocab_size": 400, "model_type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(model)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


needs_5_24 = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < READS_SENTENCEPIECE, reason="refused: the test below"
)


@needs_5_24
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("settings", "bos"),
    [
        (None, True),
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": ""}, True),
    ],
)
def test_tokenizer_model_alone_puts_bos_in_front(
    settings: Any, bos: bool, kind: str, sentencepiece_model: bytes, tmp_path: Path
) -> None:
    """As transformers 4.57 does with these folders; 5.24 only where the settings say so."""
    import sentencepiece

    tokenizer = opened(from_sentencepiece(tmp_path / "model", sentencepiece_model, settings, kind))
    expected = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    text = "import os, re\n  def f(x):\n  return x+12345 été  "
    ids = prompt_tokens(tokenizer, text)
    assert ids == [expected.bos_id()] * bos + expected.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip(" ") == text.strip(" ")
    assert prompt_tokens(tokenizer, "<s>" + text).count(1) == 1
    indented = "def f(\n    x)\n日本語é"
    assert streamed(tokenizer, expected.encode(indented)).strip(" ") == indented
    after = tokenizer.convert_ids_to_tokens(tokenizer.encode("<s>import", add_special_tokens=False))
    assert after == ["<s>", *expected.encode("import", out_type=str)]  # `legacy`, also the default of transformers 4


def test_a_transformers_that_reads_it_wrongly_is_refused(
    sentencepiece_model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5.20 gives the text of the test above other ids: it merges in the order of the ids, or not at all."""
    monkeypatch.setattr("transformers.__version__", "5.20.2")
    with pytest.raises(UsageError, match=r"no tokenizer\.json beside it, and transformers 5\.20\.2 reads it wrongly"):
        opened(from_sentencepiece(tmp_path / "model", sentencepiece_model, None))


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf", "tiktoken"])
def test_a_missing_package_is_named(
    package: str, sentencepiece_model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"transformers.utils.is_{package}_available", lambda: False)
    model = b"IQ== 0\nIg== 1\n" if package == "tiktoken" else sentencepiece_model
    with pytest.raises(UsageError, match=rf"tokenizer\.model cannot be read without {package}: install {package}$"):
        opened(from_sentencepiece(tmp_path / "model", model, None))


def test_one_bos(tmp_path: Path) -> None:
    for template in ("{{ messages[0]['content'] }}", "{{ bos_token }}{{ messages[0]['content'] }}"):
        folder = made(tmp_path / str(len(template)), tokenizer_config={"bos_token": "<s>", "chat_template": template})
        tokenizer = opened(folder)
        plain = tokenizer.encode("import os")
        assert plain.count(0) == 1 and prompt_tokens(tokenizer, "<s>import os") == plain
        assert prompt_tokens(tokenizer, "<s>import os", chat=True) == plain
        expected = plain if "bos" in template else plain[1:]
        assert prompt_tokens(tokenizer, "import os", chat=True) == expected
