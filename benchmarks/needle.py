"""Does a checkpoint find a sentence that was planted in a long text? Perl's documentation, several lengths and depths.

    python benchmarks/needle.py --model build/smollm2-32k [--original build/smollm2] [--output build/needle.jsonl]

The checkpoint, stretched with YaRN, is asked with rounded and with unrounded angles; and as it was before, with plain
RoPE, also past the context that it was trained on. The sentence is put between two paragraphs, and the question follows
the text, in the chat template. Per depth: how many greedy answers have the right number; how many greedy continuations
of the answer's first words have it, which also counts a model that comments on the text instead of answering; and the
log-likelihood per token of the right number less that of a wrong one, after the same words. `without` is the text
without the sentence. The output is a run log: a killed run resumes. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig
from mlx_resonance.attention import set_rope
from mlx_resonance.errors import UsageError
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.prefill import prefill
from mlx_resonance.run_log import Record, RunLog
from mlx_resonance.scaling import named_rope

import mlx.core as mx
import mlx.nn as nn
from documents import FOLDER, PERL, digest_of, documents
from reporting import exit_with, markdown

# Five sentences and three forms of the question were tried once on SmolLM2-135M-Instruct, at 2000 tokens with the
# sentence in the middle. This form had most answers, two of five. Asked without the introduction, the model commented
# on the text instead; ingredients, names and passwords it never gave.
SENTENCE = "The magic number of the city of {city} is {number}."
QUESTION = (
    "That was the text. Now a question about it: What is the magic number of the city of {city}? "
    "Answer in one sentence."
)
ANSWER = "The magic number of the city of {city} is"  # what precedes the number in both answers
NEEDLES = (("Lisbon", 7421, 3958), ("Oslo", 5836, 2694), ("Cairo", 9173, 4580))  # right and wrong numbers
WITHOUT = "none"  # a depth
ANSWER_TOKENS, NUMBER_TOKENS = 24, 8  # of a greedy answer, and of a continuation; a digit is a token, or less
STEP = 512  # tokens in one pass
WAYS = ("answered", "continued")
KEY = ("rope", "length", "depth", "needle")


@dataclass(frozen=True)
class Trial:
    """A prompt to ask.

    Args:
        length: tokens of the prompt, at most.
        depth: where the sentence is, in % of the text; `WITHOUT` for nowhere.
        needle: its number in `NEEDLES`.
        at, end: tokens of the text before the sentence, and in all.
    """

    length: int
    depth: int | str
    needle: int
    at: int
    end: int


class Prompts:
    """The token ids of a text, by paragraph, and of what the chat template puts around it."""

    def __init__(self, checkpoint: Checkpoint, text: str) -> None:
        tokenizer = checkpoint.tokenizer
        self.start, self.finish = "", "\n"
        if tokenizer.has_chat_template:
            messages = [{"role": "user", "content": "\0"}]
            whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            self.start, _, self.finish = whole.partition("\0")
        self.tokenizer = tokenizer
        bos = [] if tokenizer.has_chat_template or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.head = bos + self.encode(self.start)
        self.text: list[int] = []
        self.breaks = [0]  # where a paragraph begins
        for paragraph in text.split("\n\n"):
            self.text += self.encode(paragraph + "\n\n")
            self.breaks.append(len(self.text))

    def encode(self, text: str) -> list[int]:
        """Token ids without a start token."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def sentence(self, needle: int) -> list[int]:
        """The planted paragraph."""
        city, number, _ = NEEDLES[needle]
        return self.encode(SENTENCE.format(city=city, number=number) + "\n\n")

    def question(self, needle: int) -> list[int]:
        """The question, and the beginning of the model's turn."""
        return self.encode(QUESTION.format(city=NEEDLES[needle][0]) + self.finish)

    def trials(self, lengths: list[int], depths: list[int], needle: int) -> list[Trial]:
        """All prompts with a sentence, the one with the longest text before it first."""
        around = len(self.head) + len(self.sentence(needle)) + len(self.question(needle))
        found = []
        for length in lengths:
            room = length - around - ANSWER_TOKENS
            if not 0 < room <= len(self.text):
                raise UsageError(f"{length} tokens: the text has {len(self.text)}, around it are {around}")
            end = max(at for at in self.breaks if at <= room)
            for depth in depths:
                at = min(self.breaks, key=lambda at, wanted=depth * end / 100: abs(at - wanted))
                found.append(Trial(length, depth, needle, min(at, end), end))
            found.append(Trial(length, WITHOUT, needle, end, end))
        return sorted(found, key=lambda trial: -trial.at)


class Reader:
    """A model with a KV cache that goes back to an earlier token, so that prompts share their beginning."""

    def __init__(self, model: nn.Module, capacity: int) -> None:
        self.model, self.cache = model, make_cache(model, capacity)

    @property
    def tokens(self) -> int:
        """How many tokens were read."""
        return int(self.cache[0].offset)

    def back(self, tokens: int) -> None:
        """Forget all but the first tokens."""
        for layer in self.cache:
            layer.trim(layer.offset - tokens)

    def read(self, tokens: list[int]) -> mx.array:
        """Read tokens. Returns the log-probabilities after the last one, shape (vocabulary,)."""
        prefill(self.model, tokens, self.cache, step=STEP, before=self.tokens)
        logits = self.model(mx.array(tokens[-1:])[None], cache=self.cache)[0, -1].astype(mx.float32)
        return logits - mx.logsumexp(logits)

    def likelihood(self, words: list[int], tokens: list[int]) -> float:
        """Mean log-probability of tokens after some words; they are not kept."""
        start = self.tokens
        logits = self.model(mx.array([words + tokens[:-1]]), cache=self.cache)[0, len(words) - 1 :].astype(mx.float32)
        found = mx.take_along_axis(logits, mx.array(tokens)[:, None], -1)[:, 0] - mx.logsumexp(logits, axis=-1)
        mean = float(found.mean())
        self.back(start)
        return mean

    def answer(self, log_probabilities: mx.array, most: int, ends: set[int]) -> list[int]:
        """The greedy answer after what was read, which is not kept."""
        start, tokens = self.tokens, list[int]()
        while len(tokens) < most and (token := int(mx.argmax(log_probabilities))) not in ends:
            tokens.append(token)
            log_probabilities = self.read([token])
        self.back(start)
        return tokens


def ask(reader: Reader, prompts: Prompts, trial: Trial) -> Record:
    """Read the sentence, what follows it and the question; measure the answer in three ways."""
    city, right, wrong = NEEDLES[trial.needle]
    reader.back(len(prompts.head) + trial.at)
    planted = [] if trial.depth == WITHOUT else prompts.sentence(trial.needle)
    last = reader.read(planted + prompts.text[trial.at : trial.end] + prompts.question(trial.needle))
    record: Record = {"length": trial.length, "depth": trial.depth, "needle": trial.needle, "tokens": reader.tokens}
    words = prompts.encode(ANSWER.format(city=city))
    for name, number in (("right", right), ("wrong", wrong)):
        record[name] = reader.likelihood(words, prompts.encode(f" {number}"))
    tokenizer, ends = prompts.tokenizer, set(prompts.tokenizer.eos_token_ids)
    answer = tokenizer.decode(reader.answer(last, ANSWER_TOKENS, ends))
    continued = tokenizer.decode(reader.answer(reader.read(words), NUMBER_TOKENS, ends))
    record |= {"answered": str(right) in answer, "continued": str(right) in continued}
    return record | {"answer": answer, "continuation": continued}


def run(checkpoint: Checkpoint, rope: RopeConfig, prompts: Prompts, trials: list[Trial]) -> Iterator[Record]:
    """The results of the trials, which are in the order of the text before the sentence, the longest first."""
    model = checkpoint.load()
    set_rope(model, rope)
    reader = Reader(model, max(trial.length for trial in trials) + ANSWER_TOKENS)
    reader.read(prompts.head + prompts.text[: trials[0].at])
    for trial in trials:
        start = time.perf_counter()
        yield ask(reader, prompts, trial) | {"seconds": round(time.perf_counter() - start, 1)}


def subjects(model: Path, original: Path | None) -> dict[str, tuple[Checkpoint, RopeConfig]]:
    """By rope type: the checkpoint to load, and its angles."""
    stretched = Checkpoint.open(model)
    before = stretched if original is None else Checkpoint.open(original)
    if stretched.rope.base_type != "yarn":
        raise UsageError(
            f"{model} has rope type {stretched.rope.rope_type}: this asks a checkpoint stretched with YaRN"
        )
    plain = named_rope(before.rope, "default", None)
    parameters: dict[str, Any] = dict(stretched.rope.parameters)
    found = {"default": (before, plain)}
    for name in ("yarn", "resonance_yarn"):
        found[name] = stretched, replace(stretched.rope, rope_type=name, parameters=parameters)
    return found


def table(records: list[Record], ropes: list[str], depths: list[int | str]) -> str:
    """Right answers and continuations of every length, rope and depth; the mean difference of the log-likelihoods."""
    rows = []
    for length in sorted({record["length"] for record in records}):
        for rope in ropes:
            cells = []
            for depth in depths:
                same = [r for r in records if (r["rope"], r["length"], r["depth"]) == (rope, length, depth)]
                score = fmean(r["right"] - r["wrong"] for r in same) if same else 0
                right = [str(sum(r[way] for r in same)) for way in WAYS]
                cells.append(f"{', '.join(right)} of {len(same)}, {score:+.2f}" if same else "")
            rows.append([f"{length:,}", rope, *cells])
    named = [f"{depth} %" if depth != WITHOUT else "without" for depth in depths]
    return markdown(["tokens", "rope", *named], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint stretched with YaRN")
    parser.add_argument("--original", type=Path, help="it before that; default: its weights with plain RoPE")
    parser.add_argument("--lengths", default="2000,4000,8000,12000", help="tokens of a prompt, separated by commas")
    parser.add_argument("--depths", default="0,10,25,50,75,90,100", help="in %% of the text, separated by commas")
    parser.add_argument("--ropes", default="resonance_yarn,default,yarn", help="separated by commas")
    parser.add_argument("--needles", type=int, default=1, choices=range(1, len(NEEDLES) + 1), help="sentences to try")
    parser.add_argument("--output", type=Path, default=Path("build") / "needle.jsonl", help="run log")
    parser.add_argument("--work-dir", type=Path, default=FOLDER, help="where documents.py keeps its texts")
    args = parser.parse_args()
    lengths, depths = ([int(part) for part in option.split(",")] for option in (args.lengths, args.depths))
    ropes = args.ropes.split(",")
    known = subjects(args.model, args.original)
    if unknown := [rope for rope in ropes if rope not in known]:
        raise UsageError(f"ropes must be of {', '.join(known)}, got {unknown[0]}")
    text = next(document.text for document in documents(args.work_dir) if document.name == PERL)
    settings = {"document": digest_of(text), "sentence": SENTENCE, "question": QUESTION, "answer": ANSWER}
    settings |= {name: checkpoint.settings() | {"rope": rope.to_hf("4")} for name, (checkpoint, rope) in known.items()}
    log = RunLog(args.output, "needle", settings, about={"model": args.model.name}, key=KEY)
    for needle in range(args.needles):
        for rope in ropes:
            checkpoint, angles = known[rope]
            prompts = Prompts(checkpoint, text)
            left = [t for t in prompts.trials(lengths, depths, needle) if (rope, t.length, t.depth, needle) not in log]
            for result in run(checkpoint, angles, prompts, left) if left else ():
                log.append({"rope": rope} | result)
                print(json.dumps(log.records[-1]), file=sys.stderr, flush=True)
    wanted = {(rope, length, depth) for rope in ropes for length in lengths for depth in (*depths, WITHOUT)}
    records = [r for r in log.records if (r["rope"], r["length"], r["depth"]) in wanted and r["needle"] < args.needles]
    print(table(records, ropes, [*depths, WITHOUT]))
    planted = [record for record in records if record["depth"] != WITHOUT]
    report = {way: {rope: sum(r[way] for r in planted if r["rope"] == rope) for rope in ropes} for way in WAYS}
    about = {"mlx": mx.__version__, "device": str(mx.default_device()), "model": args.model.name}
    print(json.dumps(about | {"lengths": lengths, "depths": depths, "prompts": len(planted)} | report))


if __name__ == "__main__":
    exit_with(main)
