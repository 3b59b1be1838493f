"""Token ids that the model has no row for, and chat templates that fail: one line, before the model reads anything."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, load, stream_generate
from mlx_resonance.errors import UsageError
from mlx_resonance.generation.batch import Request, generate_batch
from mlx_resonance.tokenizer import load_tokenizer

import mlx_lm.utils
import pytest

from .checkpoints import STDLIB_LLAMA, source
from .serving import CHAT, COMMAND, TEXT, ask

ROWS = 2048  # of the tiny checkpoint, whose tokenizer has as many tokens
PAD = f"token '<pad>' has id {ROWS}: the model's vocabulary has {ROWS} ids"


@pytest.fixture
def padded(checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with a token that its model has no row for."""
    folder = shutil.copytree(checkpoint, tmp_path / "padded")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][1] | {"id": ROWS, "content": "<pad>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def starting(padded: Path) -> Path:
    """The same with this token as BOS and EOS."""
    content = json.loads((padded / "tokenizer.json").read_text())
    content["post_processor"]["single"][0]["SpecialToken"]["id"] = "<pad>"
    content["post_processor"]["special_tokens"]["<pad>"] = {"id": "<pad>", "ids": [ROWS], "tokens": ["<pad>"]}
    (padded / "tokenizer.json").write_text(json.dumps(content))
    (padded / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<pad>", "eos_token": "<pad>"}))
    return padded


def test_tokens_without_a_row_are_named_once_at_load(padded: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load(padded)[1]
    (message,) = [record.getMessage() for record in caplog.records if record.name == "mlx_resonance"]
    assert "'<pad>' (2048)" in message and "vocab_size = 2048" in message and "\n" not in message
    assert tokenizer.encode("import")[0] == 0 and tokenizer.eos_token_ids == {1}
    with pytest.raises(UsageError, match=PAD):
        tokenizer.encode("import <pad>")


def test_a_healthy_tokenizer_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert Checkpoint.open(STDLIB_LLAMA).tokenizer.without_row == {} and not caplog.records


@pytest.mark.parametrize("prompt", [[5, ROWS], [-1, 5], [5, 1.5], [10**30], [[5]]], ids=str)
def test_ids_outside_the_vocabulary_are_refused(checkpoint: Path, prompt: Any) -> None:
    with pytest.raises(UsageError, match=r"there is no token id .*: the model's vocabulary has 2048 ids"):
        stream_generate(*load(checkpoint), prompt)
    with pytest.raises(UsageError, match="there is no token id"):
        next(generate_batch(*load(checkpoint), [Request(1, prompt, "")]))


def test_an_id_is_named_by_its_token(padded: Path) -> None:
    with pytest.raises(UsageError, match=PAD):
        stream_generate(*load(padded), [5, ROWS])


COMMANDS: dict[str, tuple[Any, ...]] = {
    "generate": ("generate", "--prompt", "import <pad>"),
    "batch": ("generate", "--prompts-file", "{lines}", "--output", "{new}"),
    "perplexity": ("eval", "perplexity", "--data", "{text}", "--contexts", 64, "--stride", 16, "--output", "{new}"),
    "finetune": (
        "finetune", "--data", "{text}", "--mlx-path", "{new}", "--length", 64, "--steps", 1, "--accumulate", 1,
    ),
    "lm generate": ("lm", "generate", "--prompt", "import <pad>"),
    "lm chat": ("lm", "chat"),
}  # fmt: skip
OF_BOS: dict[str, tuple[Any, ...]] = {
    "passkey": ("eval", "passkey", "--lengths", 300, "--repetitions", 1, "--depths", 0, "--output", "{new}"),
    "leval": ("eval", "leval", "--data", "{leval}", "--context", 500, "--output", "{new}"),
    "perplexity": ("eval", "perplexity", "--data", "{healthy}", "--contexts", 64, "--stride", 16, "--output", "{new}"),
    "finetune": (
        "finetune", "--data", "{healthy}", "--mlx-path", "{new}", "--length", 64, "--steps", 1, "--accumulate", 1,
    ),
}  # fmt: skip


def refused(run: Any, tmp_path: Path, model: Path, command: tuple[Any, ...], stdin: str = "") -> str:
    """The one line with which a command ends."""
    places: dict[str, Any] = {"new": tmp_path / "new.jsonl"}
    answer = {"input": "A text. " * 5, "instructions": ["Q1\nA. x"], "outputs": ["A"], "evaluation": "exam"}
    texts = {
        "lines.jsonl": json.dumps({"id": 1, "prompt": "import <pad>"}),
        "coursera.jsonl": json.dumps(answer),
        "text.txt": source()[:2000] + "<pad>",
        "healthy.txt": source()[:2000],
    }
    for (name, text), place in zip(texts.items(), ("lines", "leval", "text", "healthy"), strict=True):
        (tmp_path / name).write_text(text + "\n")
        places[place] = tmp_path / name
    split = 2 if command[0] in ("lm", "eval") else 1
    arguments = [str(part).format(**places) for part in command]
    code, _, err = run(*arguments[:split], "--model", model, *arguments[split:], stdin=stdin)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_a_text_with_such_a_token(
    name: str, padded: Path, tmp_path: Path, run: Any, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["import <pad>", "q"])  # `lm chat` asks until q, and needs a template
    monkeypatch.setattr("builtins.input", lambda *_: next(said))
    (padded / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1]['content'] }}")
    assert PAD in refused(run, tmp_path, padded, COMMANDS[name])


@pytest.mark.parametrize("name", OF_BOS)
def test_every_command_refuses_such_a_bos(name: str, starting: Path, tmp_path: Path, run: Any) -> None:
    assert PAD in refused(run, tmp_path, starting, OF_BOS[name])


def test_harness_refuses_such_a_token(starting: Path) -> None:
    from mlx_resonance.evaluation.harness_model import ResonanceLM

    harness = ResonanceLM(Checkpoint.open(starting), 512)
    assert harness.tokenizer.eos_token_ids == {1}  # that of generation_config.json alone
    for read in (lambda: harness.prefix_token_id, lambda: harness.eot_token_id, lambda: harness.tok_encode("import")):
        with pytest.raises(UsageError, match=PAD):
            read()


def test_install_gives_mlx_lm_the_same_tokenizer(padded: Path, installed: None) -> None:
    (padded / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    model, tokenizer = mlx_lm.load(str(padded))
    assert tokenizer.eos_token_ids == {0, 1}
    with pytest.raises(UsageError, match=PAD):
        mlx_lm.generate(model, tokenizer, "import <pad>")
    assert mlx_lm.utils.load_tokenizer(padded, {"chat_template": "x"}, eos_token_ids=7).eos_token_ids == {1, 7}
    config = json.loads((padded / "config.json").read_text()) | {"model_type": "mixtral"}
    (padded / "config.json").write_text(json.dumps(config))
    assert type(mlx_lm.utils.load_tokenizer(padded)).__module__ == "mlx_lm.tokenizer_utils"


def test_the_warning_names_five(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(STDLIB_LLAMA / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path, {"model_type": "llama", "vocab_size": ROWS - 8})
    (record,) = [record for record in caplog.records if record.name == "mlx_resonance"]
    assert record.getMessage().count("(20") == 5 and " and 3 more; " in record.getMessage()
    assert set(tokenizer.without_row) == set(range(ROWS - 8, ROWS))


TEMPLATES = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "undefined": "{{ nothing.at.all }}",
    "syntax": "{% bad %}",
    "endless": "{% for i in range(10**9) %}{% endfor %}",
    "empty": "",
    "number": 5,
    "true": True,
    "list": [1],
    "no default": {"other": "x"},
    "list without templates": [{"name": "default"}],
    "list in an object": {"default": [1]},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that_fails_can_be_ignored(name: str, checkpoint: Path, tmp_path: Path, run: Any) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATES[name]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    line = refused(run, tmp_path, folder, ("generate", "--prompt", "import os"))
    assert line.startswith("error: the tokenizer's chat template ") and line.endswith(": give --ignore-chat-template")
    batch = ("generate", "--prompts-file", "{lines}", "--output", "{new}")
    assert refused(run, tmp_path, folder, batch).endswith(": give --ignore-chat-template")
    task = ("eval", "leval", "--data", "{leval}", "--context", 500, "--output", "{new}")
    if name != "empty":  # it asks with the text after the template
        assert refused(run, tmp_path, folder, task).endswith(": give --ignore-chat-template")
    options = ("--prompt", "import os", "--max-tokens", 1, "--ignore-chat-template")
    assert run("generate", "--model", folder, *options)[0] == 0


def test_harness_names_its_own_flag(checkpoint: Path, tmp_path: Path) -> None:
    from mlx_resonance.evaluation.harness_model import ResonanceLM

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(str(TEMPLATES["raises"]))
    with pytest.raises(UsageError, match="chat template fails: TemplateError: roles must alternate") as caught:
        ResonanceLM(Checkpoint.open(folder), 512).apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.option == "apply_chat_template"


@pytest.fixture
def port(padded: Path, tmp_path: Path) -> Iterator[int]:
    """The port of a server whose model has a token without a row, and whose template fails for some texts."""
    (padded / "chat_template.jinja").write_text(
        "{% if messages[-1]['content'] == 'fail' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1]['content'] }}"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        command = [*COMMAND, "--model", padded, "--port", str(port), "--no-prompt-cache"]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                assert ask(port, "GET", "/health")[0] == 200
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


def test_the_server_answers_400(port: int) -> None:
    def answer(path: str, **body: Any) -> tuple[int, Any]:
        status, text = ask(port, "POST", path, json.dumps({"max_tokens": 2} | body))
        return status, json.loads(text).get("error", {}).get("message")

    def chat(content: str, **body: Any) -> tuple[int, Any]:
        return answer(CHAT, messages=[{"role": "user", "content": content}], **body)

    assert chat("import <pad>") == answer(TEXT, prompt="import <pad>") == (400, f"{PAD}, from 0 on")
    assert chat("fail") == (400, "the tokenizer's chat template fails: TemplateError: no")
    assert chat("") == (400, "the tokenizer's chat template makes an empty prompt")
    assert chat("import", logit_bias={str(ROWS): 5})[0] == 400
    assert chat("import") == (200, None)


@pytest.mark.parametrize("ids", [[5, 2048], [99999, 5], [-1]])
def test_mlx_lm_refuses_such_ids_after_install(stdlib_llama: Path, ids: list[int], installed: None) -> None:
    """MLX would read what is in memory behind the embedding, or crash."""
    model, tokenizer = mlx_lm.load(str(stdlib_llama))
    bad = next(number for number in ids if not 0 <= number < 2048)
    with pytest.raises(UsageError, match=f"there is no token id {bad}: the model's vocabulary has 2048 ids"):
        mlx_lm.generate(model, tokenizer, ids, max_tokens=2)
    with pytest.raises(UsageError, match=f"there is no token id {bad}"):
        mlx_lm.batch_generate(model, tokenizer, [[5, 6], ids], max_tokens=2)
    with pytest.raises(UsageError, match=f"there is no token id {bad}"):
        mlx_lm.generate(model, tokenizer, ids, max_tokens=2, draft_model=model)
    with_draft = mlx_lm.generate(model, tokenizer, [5, 6], max_tokens=2, draft_model=model)
    assert with_draft == mlx_lm.generate(model, tokenizer, [5, 6], max_tokens=2)
    assert mlx_lm.generate(model, tokenizer, [5, 6], max_tokens=2)


def test_a_generation_config_that_is_no_object_is_one_line(run: Any, stdlib_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stdlib_llama, tmp_path / "model")
    (folder / "generation_config.json").write_text("[]")
    for command in (("generate",), ("lm", "generate")):
        code, out, err = run(*command, "--model", folder, "--prompt", "x", "--max-tokens", 1)
        assert (code, out, err.count("\n")) == (2, "", 1) and "generation_config.json is not a JSON object" in err
