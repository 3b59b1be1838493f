"""Several processes: two of them over the ring backend compute what one does, with half of the matrices each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from mlx_resonance import plan_memory
from mlx_resonance.cli.processes import Processes
from mlx_resonance.convert import convert

import mlx.core as mx
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring backend")

LIMIT = 300  # seconds: processes that wait for each other longer have failed
MAIN = [sys.executable, "-c", "from mlx_resonance.cli import main; main()"]
REPORT = """
import json, sys
from pathlib import Path
from mlx_resonance import Checkpoint, generate
from mlx_resonance.cli.processes import processes
from mlx_resonance.generation.cache import make_cache
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generation_stream

group = processes()
reports = {"seed": group.start([], [], (), None)[1]}
tokens = json.loads(Path(sys.argv[1]).read_text())
for folder in map(Path, sys.argv[3:]):
    checkpoint = Checkpoint.open(folder)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = group.load(checkpoint)
    peak, tokenizer = mx.get_peak_memory() - before, checkpoint.tokenizer
    weights = {name: value.nbytes for name, value in tree_flatten(model.parameters())}
    cache = make_cache(model, len(tokens))
    logits = model(mx.array([tokens]), cache=cache)[0, -1].astype(mx.float32)
    reports[str(folder)] = {
        "matrices": sum(size for name, size in weights.items() if "_proj." in name),
        "weights": sum(weights.values()),
        "largest": max(weights.values()),
        "peak": peak,
        "kv": sum(value.nbytes for _, value in tree_flatten([(layer.keys, layer.values) for layer in cache])),
        "logits": logits.tolist(),
        "greedy": generate(model, tokenizer, tokens, max_tokens=24),
        "sampled": generate(model, tokenizer, tokens, max_tokens=24, temp=1.0, seed=5),
    }
    mx.synchronize(generation_stream)  # after the end of a text a step may be under way
    del model, cache, logits
Path(sys.argv[2] + f"/{group.rank}.json").write_text(json.dumps(reports))
if group.size > 1:
    group.agree()
"""
COMMANDS = """
import contextlib, io, json, sys
from pathlib import Path
from mlx_resonance.cli import main
from mlx_resonance.cli.processes import processes
from mlx_resonance.generation import stream

group, ends, known, prefill = processes(), [], [], stream.prefill
stream.prefill = lambda *args, **options: (known.append(args[2][0].offset), prefill(*args, **options))
for arguments in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv[1:] = ["generate", *arguments[group.rank]]
    group.agreed = False  # as in a new process
    known.clear()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as done:
            ends.append((done.code, out.getvalue(), err.getvalue(), sum(known)))
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(3).integers(2, 2048, 700).tolist()


@pytest.fixture(scope="module")
def models(extended: Path, random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Whole and quantized models with eight times the context."""
    folder = tmp_path_factory.mktemp("models")
    options: dict[str, Any] = {"rope": "yarn", "factor": 8.0, "dtype": "float32"}
    convert(random_llama, folder / "quantized", quantize=True, q_bits=4, q_group_size=32, **options)
    return [extended, folder / "quantized"]


def free_port(count: int) -> int:
    """The first of a run of consecutive ports that nobody listens on."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            start: int = first.getsockname()[1]
        try:
            for port in range(start, start + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return start


def environment(**variables: str) -> dict[str, str]:
    """One thread for each process: they share the machine."""
    return os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"} | variables


def start(commands: list[list[object]], folder: Path) -> list[tuple[int, str, str]]:
    """Run a process for each command, as mlx.launch would. Returns their exit codes, stdout and stderr."""
    port = free_port(len(commands))
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(len(commands))]))
    running = [
        subprocess.Popen(
            list(map(str, command)),
            env=environment(MLX_HOSTFILE=str(hostfile), MLX_RANK=str(rank)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        texts = [process.communicate(timeout=LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(running, texts, strict=True)]


@pytest.fixture(scope="module")
def reports(
    models: list[Path], tokens: list[int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process reports about the models, and what each of two does."""
    folder = tmp_path_factory.mktemp("reports")
    (folder / "tokens.json").write_text(json.dumps(tokens))
    command = [sys.executable, "-c", REPORT, folder / "tokens.json", folder, *models]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, command[2:])))
        exec(REPORT, {})
    one = json.loads((folder / "0.json").read_text())
    assert [code for code, *_ in start([command] * 2, folder)] == [0, 0]
    return one, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", [0, 1], ids=["whole", "quantized"])
def test_two_processes_compute_what_one_does(models: list[Path], reports: Any, kind: int) -> None:
    one, two = reports[0][str(models[kind])], [report[str(models[kind])] for report in reports[1]]
    assert reports[0]["seed"] is None and reports[1][0]["seed"] == reports[1][1]["seed"] is not None
    assert two[0]["logits"] == two[1]["logits"]
    expected, logits = np.array(one["logits"]), np.array(two[0]["logits"])
    # Two halves of a sum are added: a different order of additions in float32.
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()
    for text in ("greedy", "sampled"):
        assert one[text] == two[0][text] == two[1][text] != ""


@pytest.mark.parametrize("kind", [0, 1], ids=["whole", "quantized"])
def test_each_process_holds_half(models: list[Path], reports: Any, kind: int) -> None:
    one = reports[0][str(models[kind])]
    for report in reports[1]:
        half = report[str(models[kind])]
        assert half["matrices"] == one["matrices"] / 2 and half["kv"] == one["kv"] / 2
        # Also while loading: one matrix is whole for a moment, then split.
        assert half["peak"] <= half["weights"] + 2 * one["largest"]
        assert half["weights"] == plan_memory(models[kind], 700, processes=2).weights
        assert half["kv"] == plan_memory(models[kind], 700, processes=2).kv


@pytest.mark.long
def test_mlx_launch_prints_one_answer(models: list[Path], run: Any) -> None:
    launch = Path(sysconfig.get_path("scripts")) / "mlx.launch"
    if not launch.exists():
        pytest.skip("mlx.launch is not installed")
    arguments = ["generate", "--model", str(models[0]), "--prompt", "import os\n" * 9, "--max-tokens", "4", "--json"]
    code, one, _ = run(*arguments)
    ring = [str(launch), "-n", "2", "--backend", "ring", "--starting-port", str(free_port(2)), "--", *MAIN, *arguments]
    done = subprocess.run(
        ring, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT
    )
    assert code == 0 and json.loads(one)["text"] == json.loads(done.stdout)["text"]
    assert done.stderr.count("generated 4 tokens") == 1


@pytest.mark.long
def test_heads_that_are_not_divided_are_refused(models: list[Path], tmp_path: Path) -> None:
    ends = start([[*MAIN, "generate", "--model", models[0], "--prompt", "x", "--max-tokens", 2]] * 3, tmp_path)
    assert [code for code, *_ in ends] == [2, 2, 2] and not any(out for _, out, _ in ends)
    lines = [line for *_, err in ends for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].endswith("among 3 processes: num_attention_heads is 4")


@pytest.fixture(scope="module")
def ends(models: list[Path], stdlib_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name, how a command ended in both processes: exit code, stdout, stderr, tokens from prompt caches."""
    folder = tmp_path_factory.mktemp("commands")
    whole, quantized = models
    convert(stdlib_llama, folder / "of-64", quantize=True, q_bits=4, q_group_size=64)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": i, "prompt": f"def f{i}("}) + "\n" for i in range(3))
    )
    prompt = ["--prompt", "import re\n" * 60, "--max-tokens", 8]
    answers = ["--prompts-file", folder / "prompts.jsonl", "--output", folder / "answers.jsonl", "--max-tokens", 4]
    (folder / "first.jsonl").write_text(json.dumps({"id": 1, "prompt": "def f1("}) + "\n")
    one = [*MAIN, "generate", "--model", whole, "--prompts-file", folder / "first.jsonl", *answers[2:], "--temp", 1]
    subprocess.run(list(map(str, one)), check=True, capture_output=True, env=environment())
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"id": 2, "te')

    def cached(*folders: str) -> list[list[Any]]:
        return [["--model", quantized, *prompt, "--prompt-cache", folder / name] for name in folders]

    commands: dict[str, list[list[Any]]] = {
        "groups": [["--model", folder / "of-64", *prompt]] * 2,
        "one": [["--model", model, *prompt] for model in (whole, folder / "missing")],
        "prompts": [["--model", whole, "--prompt", text] for text in ("one", "another")],
        "stdin": [["--model", whole]] * 2,
        "output": [["--model", whole, *answers[:3], folder]] * 2,
        "read": cached("first", "second"),
        "of one": cached("first", "third"),
        "of both": cached("first", "third"),
        "rotated": [
            ["--model", stdlib_llama, *prompt, "--prompt-cache", folder / "rotated", "--kv-bits", 4, "--kv-rotate"]
        ]
        * 2,
        "answers": [["--model", whole, *answers, "--temp", 1]] * 2,  # no seed: they must agree on one
    }
    (folder / "commands.json").write_text(json.dumps(list(commands.values()), default=str))
    both = start([[sys.executable, "-c", COMMANDS, folder / "commands.json"]] * 2, folder)
    assert [code for code, *_ in both] == [0, 0], both
    results = zip(*(json.loads(out) for _, out, _ in both), strict=True)
    return dict(zip(commands, results, strict=True)) | {"folder": folder}


@pytest.mark.parametrize(
    ("name", "speaker", "message"),
    [
        ("groups", 0, "cannot be divided among 2 processes: "),  # 576 features are nine groups of 64
        ("one", 1, "missing"),
        ("prompts", 0, "different prompts"),
        ("stdin", 0, "cannot share standard input"),  # which mlx.launch never closes
        ("output", 0, "is a folder: a file is needed"),
    ],
)
def test_an_error_is_printed_once_and_ends_all(ends: dict[str, Any], name: str, speaker: int, message: str) -> None:
    assert [code for code, *_ in ends[name]] == [2, 2]
    said = ends[name][speaker][2].splitlines()
    assert message in said[-1] and said[-1].startswith("error: ")
    assert "error:" not in ends[name][1 - speaker][2] and not ends[name][0][1] + ends[name][1][1]


def test_the_prompt_cache_of_two_processes(ends: dict[str, Any]) -> None:
    """Each keeps its own heads; if one of them has not read a prompt, both read it."""
    runs = [ends[name] for name in ("read", "of one", "of both")]
    assert all(code == 0 for run in runs for code, *_ in run)
    assert {run[0][1] for run in runs} == {runs[0][0][1]} != {""} and not any(run[1][1] + run[1][2] for run in runs)
    assert [[known for *_, known in run] for run in runs[:2]] == [[0, 0]] * 2
    assert runs[2][0][3] == runs[2][1][3] > 100
    assert [code for code, *_ in ends["rotated"]] == [0, 0], ends["rotated"]
    assert len(list((ends["folder"] / "rotated").glob("*.safetensors"))) == 2
    for name in ("first", "second", "third"):
        assert len(list((ends["folder"] / name).glob("*.safetensors"))) == 1


def test_an_interrupted_file_of_answers_is_resumed(ends: dict[str, Any]) -> None:
    assert [code for code, *_ in ends["answers"]] == [0, 0]
    header, *answers = [json.loads(line) for line in (ends["folder"] / "answers.jsonl").read_text().splitlines()]
    assert header["generate"] == 1 and sorted(answer["id"] for answer in answers) == [0, 1, 2] and answers[0]["id"] == 1


def test_one_process_sets_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.distributed, "init", lambda: pytest.fail("called"))
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Processes().size == 1
