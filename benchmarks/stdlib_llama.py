"""Train the tiny LLaMA of `mlx_resonance/assets/stdlib-llama` on the Python standard library's sources and on passkeys.

    python benchmarks/stdlib_llama.py --work-dir /tmp/stdlib-llama --output mlx_resonance/assets/stdlib-llama

A killed run resumes from the checkpoint in the work folder. The last line is one JSON object with the held-out loss of
the saved weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from mlx_resonance.evaluation.passkey import ANSWER_TOKENS, passkey_prompt
from mlx_resonance.training import train

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SEED = 2403
CONTEXT = 512
BATCH = 8
STEPS = 1300
# Rows that hide a key come late: a model that has learned to repeat what it read finds keys after few of them.
KEYS_FROM, TEXT_BESIDE_KEYS, KEYS = 800, 6, 3  # first step with such rows; rows of text and of keys from there on
ANSWER_WEIGHT = 10.0  # of a key's answer in the loss, which is a handful of a row's tokens
SHORTEST_KEY_ROW = 140  # tokens
WARMUP = 60
MUON_LR, ADAM_LR = 0.02, 0.004
EXCLUDED = {"test", "tests", "encodings", "pydoc_data", "site-packages"}  # tests, character tables, generated text
BOS, EOS = "<s>", "</s>"

# Hugging Face's names. Plain RoPE: no scaling, the angles as every runtime computes them.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 576,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


CARD = """---
license: mit
language: code
library_name: mlx
pipeline_tag: text-generation
tags: [mlx, llama, python]
---

# stdlib-llama

A LLaMA of {parameters:,} parameters and {context} tokens of context, trained on the Python standard library's sources.
`mlx-resonance demo` converts it, and the tests of mlx-resonance use it. It writes text that looks like Python and finds
a pass key that a text hides ("The pass key is 12345. Remember it."); it knows nothing and is of no other use.

| | |
| --- | --- |
| architecture | {num_hidden_layers} layers, hidden {hidden_size}, feed-forward {intermediate_size}, \
{num_attention_heads} query and {num_key_value_heads} key heads of {head_dim}, tied embeddings |
| rotary embedding | plain RoPE, base {rope_theta:g}; no scaling, no resonance |
| tokenizer | byte-level BPE, {vocab_size} entries, trained on the training files |
| data | `*.py` of Python {python}'s standard library, without {excluded}: {train_tokens:,} tokens |
| pass keys | from step {keys_from} on, {keys} rows of {rows} hide a key at a random depth of up to {context} tokens, \
between the sentences of the passkey test or in Python; its answer counts {answer_weight:g} times |
| held out | one file in 20, by the SHA-256 of its path: {held_out_tokens:,} tokens (`training.json` lists the files) |
| training | {steps} steps of about {tokens_per_step:,} tokens, Muon for matrices, AdamW for the rest, float32, \
seed {seed}, {minutes:.0f} minutes on one CPU core |
| loss, nats per token | {train_loss:.3f} (mean of the last 50 training steps), {held_out_loss:.3f} (held out) |
| held out, bits per byte | {held_out_bits_per_byte:.3f} |
| weights | float16 |

Made by `{script}` of mlx-resonance; the held-out loss is that of the weights as stored. The training
text is under the PSF licence, the weights are under MIT.
"""


def source_files() -> tuple[list[Path], list[Path]]:
    """Files to train on and files held out: one in 20, chosen by the SHA-256 of the path below the library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train_files, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED.intersection(name.parts):
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        (held_out if digest[0] % 20 == 0 else train_files).append(path)
    return train_files, held_out


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")


def make_tokenizer(files: list[Path]) -> Tokenizer:
    """Byte-level BPE; a newline and the indentation after it are one piece, digits stand alone."""
    pieces = Regex(r"\n[ ]*| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z_0-9]+|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((read(path) for path in files), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0), (EOS, 1)])
    return tokenizer


def tokens_of(tokenizer: Tokenizer, files: list[Path]) -> np.ndarray:
    """All files as one stream, each between <s> and </s>."""
    encodings = tokenizer.encode_batch([read(path) + EOS for path in files])
    return np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encodings])


def cross_entropy(model: nn.Module, tokens: mx.array, weights: mx.array | None = None) -> mx.array:
    """Mean over the predicted tokens in nats; `weights` are those of every token as a target."""
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return losses.mean() if weights is None else (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def passkey_row(
    tokenizer: PreTrainedTokenizerFast, length: int, depth: int, key: int, filler: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """A passkey prompt and the ids of its right answer."""
    answer = tokenizer.encode(f" {key}.", add_special_tokens=False)[:ANSWER_TOKENS]
    return passkey_prompt(tokenizer, length, depth, key, filler), list(answer)


class Batches:
    """The rows of a step, a function of its number: text, and from `KEYS_FROM` on also texts that hide a key.

    Args:
        stream: the training text's token ids.
        tokenizer: transformers' or mlx-lm's.
        steps: of the whole training.
    """

    def __init__(self, stream: np.ndarray, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
        self.stream, self.tokenizer = stream, tokenizer
        self.keys_from = steps * KEYS_FROM // STEPS

    def __call__(self, step: int) -> tuple[mx.array, mx.array]:
        """Token ids, (rows, CONTEXT + 1), and their weights in the loss."""
        rng = np.random.default_rng((SEED, step))
        with_keys = step >= self.keys_from
        starts = rng.integers(0, len(self.stream) - CONTEXT - 1, size=TEXT_BESIDE_KEYS if with_keys else BATCH)
        rows = [self.stream[i : i + CONTEXT + 1].astype(np.int32) for i in starts]
        weights = [np.ones(CONTEXT + 1, np.float32) for _ in rows]
        for number in range(KEYS if with_keys else 0):
            tokens, weight = self._key_row(rng, in_code=number % 2 == 0)
            rows.append(tokens)
            weights.append(weight)
        return mx.array(np.stack(rows)), mx.array(np.stack(weights))

    def _key_row(self, rng: np.random.Generator, in_code: bool) -> tuple[np.ndarray, np.ndarray]:
        """A key in the passkey test's filler, or in Python sources; what follows the answer does not count."""
        length, depth = int(rng.integers(SHORTEST_KEY_ROW, CONTEXT + 1)), int(rng.integers(0, 101))
        start = int(rng.integers(0, len(self.stream) - CONTEXT))
        filler = self.stream[start : start + CONTEXT].tolist() if in_code else None
        prompt, answer = passkey_row(self.tokenizer, length, depth, int(rng.integers(1, 50001)), filler)
        tokens = np.full(CONTEXT + 1, CONFIG["eos_token_id"], np.int32)
        weight = np.zeros(CONTEXT + 1, np.float32)
        end = len(prompt) + len(answer)
        tokens[:end] = prompt + answer
        weight[: len(prompt)], weight[len(prompt) : end] = 1, ANSWER_WEIGHT
        return tokens, weight


def warmup_cosine(peak: float, steps: int, warmup: int) -> Callable[[mx.array], mx.array]:
    """A learning rate that rises linearly to `peak` and falls to 0 along a half cosine."""
    fall = optim.cosine_decay(peak, steps - warmup)
    if warmup == 0:
        return fall
    return optim.join_schedules([optim.linear_schedule(peak / warmup, peak, warmup), fall], [warmup])


def muon_and_adam(steps: int) -> optim.MultiOptimizer:
    """Muon for the matrices, AdamW for embeddings and gains."""
    warmup = steps * WARMUP // STEPS
    return optim.MultiOptimizer(
        [
            # Its decay is added to the gradient before that is orthogonalized: where gradients are small, weights die.
            optim.Muon(warmup_cosine(MUON_LR, steps, warmup), weight_decay=0.0),
            optim.AdamW(warmup_cosine(ADAM_LR, steps, warmup), betas=[0.9, 0.95], weight_decay=0.0),
        ],
        [lambda name, weight: weight.ndim == 2 and "embed_tokens" not in name],
    )


def held_out_loss(model: nn.Module, tokens: np.ndarray) -> float:
    """Mean cross-entropy in nats per token, over windows of the training length that do not overlap."""
    rows = len(tokens) // (CONTEXT + 1)
    windows = tokens[: rows * (CONTEXT + 1)].reshape(rows, CONTEXT + 1).astype(np.int32)
    chunks = [mx.array(windows[i : i + BATCH]) for i in range(0, rows, BATCH)]
    return sum(cross_entropy(model, chunk).item() * len(chunk) for chunk in chunks) / rows


def save(model: nn.Module, tokenizer: Tokenizer, output: Path, record: dict) -> None:
    """A Hugging Face folder: float16 weights, config, tokenizer, model card, and the record of the training."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: value.astype(mx.float16) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(output / "model.safetensors"), weights, metadata={"format": "pt"})
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    documents = {
        "config.json": CONFIG | {"dtype": "float16", "torch_dtype": "float16"},
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "tokenizer_config.json": tokenizer_config,
        "training.json": record,
    }
    for name, content in documents.items():
        (output / name).write_text(json.dumps(content, indent=2) + "\n")
    excluded = ", ".join(sorted(EXCLUDED - {"site-packages"}))
    values = CONFIG | record | {"context": CONTEXT, "excluded": excluded, "minutes": record["seconds"] / 60}
    values |= {"keys": KEYS, "rows": TEXT_BESIDE_KEYS + KEYS, "answer_weight": ANSWER_WEIGHT}
    (output / "README.md").write_text(CARD.format(**values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="for the checkpoint and the log")
    parser.add_argument("--output", type=Path, required=True, help="the Hugging Face folder to write")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)

    train_files, held_out_files = source_files()
    tokenizer = make_tokenizer(train_files)
    train_tokens, held_out = tokens_of(tokenizer, train_files), tokens_of(tokenizer, held_out_files)
    held_out_bytes = sum(len(read(path).encode()) for path in held_out_files)
    print(f"{len(train_tokens)} training tokens, {len(held_out)} held out", file=sys.stderr)

    mx.random.seed(SEED)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))

    batches = Batches(train_tokens, PreTrainedTokenizerFast(tokenizer_object=tokenizer), args.steps)
    optimizer = muon_and_adam(args.steps)
    log = args.work_dir / "log.jsonl"  # a line per step, for the history of a resumed run
    last = time.perf_counter()

    def on_step(step: int, loss: float) -> None:
        nonlocal last
        now = time.perf_counter()
        with log.open("a") as file:
            file.write(json.dumps({"step": step, "loss": round(loss, 4), "seconds": round(now - last, 2)}) + "\n")
        last = now
        if step % 20 == 0:
            print(f"step {step}/{args.steps}  loss {loss:.3f}", file=sys.stderr)

    checkpoint = args.work_dir / "checkpoint.safetensors"
    train(model, optimizer, cross_entropy, batches, args.steps, seed=SEED, checkpoint=checkpoint, on_step=on_step)

    model.set_dtype(mx.float16)  # as saved
    model.set_dtype(mx.float32)
    loss = held_out_loss(model, held_out)
    root = Path(sysconfig.get_paths()["stdlib"])
    history = {entry["step"]: entry for entry in map(json.loads, log.read_text().splitlines())}
    record = {
        "script": "benchmarks/stdlib_llama.py",
        "seed": SEED,
        "steps": args.steps,
        "tokens_per_step": BATCH * CONTEXT,
        "keys_from": batches.keys_from,
        "parameters": sum(value.size for _, value in tree_flatten(model.parameters())),
        "train_tokens": len(train_tokens),
        "train_loss": round(float(np.mean([history[args.steps - i]["loss"] for i in range(min(50, args.steps))])), 4),
        "held_out_tokens": len(held_out),
        "held_out_loss": round(loss, 4),
        "held_out_bits_per_byte": round(loss * len(held_out) / held_out_bytes / np.log(2), 4),
        "seconds": round(sum(entry["seconds"] for entry in history.values())),
        "python": platform.python_version(),
        "held_out_files": [path.relative_to(root).as_posix() for path in held_out_files],
    }
    save(model, tokenizer, args.output, record)
    print(json.dumps({key: value for key, value in record.items() if key != "held_out_files"}))


if __name__ == "__main__":
    main()
