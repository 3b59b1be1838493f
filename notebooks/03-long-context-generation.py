# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Long text, generated locally
#
# - The memory of a context of four times the trained length is planned before a weight is read, and the plan is
#   compared with what MLX then uses.
# - A prompt of 1536 tokens is read in chunks and continued to 2048, past the 512 that the model was trained on.
# - A KV cache in 8 and 4 bits, or both: what it saves, what it costs. A second question on the same text: no waiting.
#
# The cells use the tiny LLaMA of the package. To use another checkpoint, one that was trained without scaling, put its
# folder or its Hugging Face id here. The numbers in the text, and so some assertions, are those of the tiny one. Files
# go to a temporary folder.

# %%
from importlib.resources import files

ASSET = files("mlx_resonance") / "assets" / "stdlib-llama"
CHECKPOINT = str(ASSET)  # or "meta-llama/Llama-2-7b-hf", or a folder
FACTOR = 4  # context, in multiples of the trained length

# %% [markdown]
# `convert` writes a copy with Resonance-YaRN ([notebook 2](02-convert-a-checkpoint.ipynb) says more about it). A CPU is
# slow with 16-bit numbers, so the copy has 32 bits there; on a Mac's GPU it keeps the checkpoint's type.

# %%
import logging
import tempfile
from pathlib import Path

from mlx_resonance import load
from mlx_resonance.convert import convert

import mlx.core as mx

logging.getLogger("mlx_resonance").setLevel(logging.ERROR)  # no line about a missing GPU
temporary = tempfile.TemporaryDirectory()
work, on_cpu = Path(temporary.name), mx.default_device() == mx.cpu

# %%
folder = work / "4x"
convert(CHECKPOINT, folder, rope="yarn", factor=FACTOR, dtype="float32" if on_cpu else None)
model, tokenizer = load(folder)
rope = model.args.rope
TRAINED, LENGTH = rope.trained_length, rope.context_length
print(f"{rope.rope_type}: trained on {TRAINED} tokens, stretched to {LENGTH}")

# %%
assert rope.rope_type == "resonance_yarn" and rope.frequencies().is_resonant
assert LENGTH == FACTOR * TRAINED

# %% [markdown]
# ## Does it fit?
#
# `plan_memory` reads no weights. It adds up the weights, the KV cache of the whole context and the work of reading the
# prompt, for each format of the cache: the model's type, 8 bits, 8 for keys and 4 for values, or 4.

# %%
from mlx_resonance import plan_memory

STEP = TRAINED // 2  # prompt tokens of a chunk
FORMATS = {f"{8 * model.model.norm.weight.itemsize} bit": None, "8 bit": 8, "8,4 bit": "8,4", "4 bit": 4}
whole = next(iter(FORMATS))
contexts = [TRAINED // 2, TRAINED, 2 * TRAINED, LENGTH]


# %%
def plan(context, bits, memory=None):
    return plan_memory(folder, context, kv_bits=bits, memory=memory, prefill_step_size=STEP)


plans = {name: [plan(context, bits) for context in contexts] for name, bits in FORMATS.items()}

# %%
for name, each in plans.items():
    last = each[-1]
    parts = f"weights {last.weights / 1e6:.1f} + KV cache {last.kv / 1e6:.1f} + prompt {last.prefill / 1e6:.1f}"
    print(f"{name:>6}, {last.context} tokens: {parts} = {last.total / 1e6:.1f} MB")

# %% [markdown]
# The KV cache grows in proportion to the context. Fewer bits make every plan smaller.

# %%
from itertools import pairwise

assert all(each[-1].kv == LENGTH * each[-1].kv_per_token for each in plans.values())
assert all(x.total > y.total for more, less in pairwise(plans.values()) for x, y in zip(more, less, strict=True))

# %% [markdown]
# With a budget of 16 GB, of which a reserve is left to everything else, the plan says how far each format goes. Weights
# that would not fit, such as those of LLaMA 2 7B in 16 bits, get more.

# %%
from figures.generation import what_fits

MEMORY = max(16 * 10**9, 3 * plans[whole][-1].weights)
far = [2**i for i in range(12, 24)]
totals = {name: [plan(context, bits).total for context in far] for name, bits in FORMATS.items()}
there = plan(LENGTH, None, MEMORY)
most = {name: there.max_context[name] for name in FORMATS}
what_fits(far, totals, most, there.limit)

# %% [markdown]
# One token more than the largest context does not fit. Fewer bits go further, though not in proportion to what they
# save: one layer's keys and values are dequantized at a time while the prompt is read.

# %%
for name, bits in FORMATS.items():
    assert plan(most[name], bits, MEMORY).fits and not plan(most[name] + 1, bits, MEMORY).fits
saved = plans[whole][-1].kv / plans["4 bit"][-1].kv
assert most[whole] < most["8 bit"] < most["8,4 bit"] < most["4 bit"] < saved * most[whole]

# %% [markdown]
# A context that does not fit is refused before a weight is read, with the numbers and with options that would help.

# %%
from mlx_resonance import Checkpoint
from mlx_resonance.generation import require_memory

checkpoint = Checkpoint.open(folder)
try:
    require_memory(checkpoint, most[whole] + 1, kv_bits=None, memory=MEMORY, prefill_step_size=STEP)
except ValueError as error:
    refusal = str(error)
print(refusal)
assert "kv_bits=8" in refusal

# %% [markdown]
# ## Is the plan right?
#
# Read prompts of growing length with each format, and compare with MLX's peak memory. A point appears for each prompt;
# the lines are the plan. The format matters less here than above: with such a short context, most of the memory
# is weights and the work of reading.

# %%
import gc

from mlx_resonance import stream_generate


def peak(context, bits):
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    options = {"max_tokens": 2, "kv_bits": bits, "prefill_step_size": STEP}
    list(stream_generate(model, tokenizer, [5] * (context - 2), **options))
    return mx.get_peak_memory()


# %%
from figures.generation import memory_over_context
from IPython.display import display

planned = {name: [one.total for one in each] for name, each in plans.items()}
measured = {name: [] for name in FORMATS}
live = display(memory_over_context(contexts, planned, measured), display_id=True)
for context in contexts:
    for name, bits in FORMATS.items():
        measured[name].append(peak(context, bits))
    live.update(memory_over_context(contexts, planned, measured))

# %% [markdown]
# On a CPU, for which it is fitted, the plan is within 15 % of the peak. On a Mac's GPU that has not been measured.

# %%
off = {name: max(abs(p / m - 1) for p, m in zip(planned[name], measured[name], strict=True)) for name in FORMATS}
print(", ".join(f"{name}: at most {100 * value:.0f} % off" for name, value in off.items()))
assert not on_cpu or max(off.values()) < 0.15

# %% [markdown]
# ## Past the trained length
#
# The text is Python's own standard library: modules that the tiny model was not trained on.

# %%
import json
import sysconfig

modules = ["calendar.py", "http/server.py", "ast.py"]
assert set(modules) <= set(json.loads((ASSET / "training.json").read_text())["held_out_files"])
library = Path(sysconfig.get_paths()["stdlib"])
text = "\n\n".join((library / name).read_text(encoding="utf-8") for name in modules)
tokens = tokenizer.encode(text)[:LENGTH]
assert len(tokens) == LENGTH

# %% [markdown]
# How well does the model predict each token from all before it? With the angles of its training, with Resonance-YaRN,
# and with YaRN alone, not rounded: the weights are the same and have never seen more than 512 tokens.

# %%
from mlx_resonance.evaluation.losses import token_losses
from mlx_resonance.scaling import named_rope

own = Checkpoint.open(CHECKPOINT, weights=False).rope
angles = {"RoPE, as trained": own, "Resonance-YaRN": rope, "YaRN": named_rope(own, "yarn", FACTOR)}

# %%
import numpy as np

row = np.array(tokens, np.int32)[None]
models = {name: checkpoint.with_rope(each).load() for name, each in angles.items()}
loss = {name: token_losses(each, row, LENGTH - 1)[0] for name, each in models.items()}

# %%
from figures.common import loss_over_position

loss_over_position(loss, TRAINED, window=TRAINED // 8)

# %% [markdown]
# Past the trained length plain RoPE shows the model angles that it never saw, and the loss rises by more than half a
# nat. With Resonance-YaRN it does not rise, and within the trained length the other angles cost next to nothing. That
# is YaRN's doing: rounding changes either loss by less than 0.02 nats. [Notebook 5](05-does-it-help.ipynb) looks
# closer.

# %%
inside = {name: values[: TRAINED - 1].mean() for name, values in loss.items()}
past = {name: values[TRAINED - 1 :].mean() for name, values in loss.items()}
for name in loss:
    print(f"{name:16} {inside[name]:.2f} nats per token within {TRAINED} tokens, {past[name]:.2f} past them")
assert past["RoPE, as trained"] > inside["RoPE, as trained"] + 0.5
assert past["Resonance-YaRN"] < inside["Resonance-YaRN"] + 0.1
assert abs(inside["Resonance-YaRN"] - inside["RoPE, as trained"]) < 0.1
assert abs(inside["Resonance-YaRN"] - inside["YaRN"]) < 0.02 and abs(past["Resonance-YaRN"] - past["YaRN"]) < 0.02

# %% [markdown]
# ## Read, then write
#
# Three quarters of the context are the prompt; the last quarter is generated. The prompt is read in chunks, and
# `stream_generate` reports each of them. Below the figure: the last 500 characters, while the text is generated.

# %%
import time

from figures.generation import tokens_over_time

prompt = tokens[: 3 * LENGTH // 4]
read, written, pieces = [], [], []


def note(points, count):
    points.append((time.perf_counter() - start, count))
    live.update(tokens_over_time(read, written, TRAINED, LENGTH))


# %%
options = {"max_tokens": LENGTH - len(prompt), "temp": 0.5, "seed": 1, "prefill_step_size": STEP}
live = display(tokens_over_time(read, written, TRAINED, LENGTH), display_id=True)
page = display({"text/plain": ""}, raw=True, display_id=True)
start = time.perf_counter()
watch = {"prompt_progress_callback": lambda done, total: note(read, done)}
stream = stream_generate(model, tokenizer, prompt, **watch, **options)
for count, response in enumerate(stream, 1):
    pieces.append(response.text)
    if count % (TRAINED // 4) == 0 or response.finish_reason:
        note(written, len(prompt) + count)
        page.update({"text/plain": f"… {''.join(pieces)[-500:]}"}, raw=True)

# %% [markdown]
# The model is tiny: its text looks like Python and means nothing. The text continues to the last token of the context;
# anything longer is refused.

# %%
assert read[-1][1] == len(prompt) > TRAINED and len(read) > len(prompt) // STEP
assert written[-1][1] == LENGTH and response.finish_reason == "length"
try:
    next(stream_generate(model, tokenizer, tokens, max_tokens=1))
except ValueError as error:
    print(error)
else:
    raise AssertionError("a context that is too long was not refused")

# %% [markdown]
# The same seed gives the same text.

# %%
again = stream_generate(model, tokenizer, prompt, **options | {"max_tokens": 32})
assert "".join(response.text for response in again) == "".join(pieces[:32])

# %% [markdown]
# ## The KV cache in 8 and 4 bits, or both
#
# What the formats save: the bytes of the caches, which are allocated once for the whole text. What they cost: the
# perplexity of the same 2048 tokens.

# %%
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.prefill import prefill

megabytes, perplexity = {}, {}
for name, bits in FORMATS.items():
    cache = make_cache(model, LENGTH, bits)
    prefill(model, tokens[:3], cache)
    megabytes[name] = sum(layer.nbytes for layer in cache) / 1e6
    nats = token_losses(model, row, LENGTH - 1, kv_bits=bits) if bits else loss["Resonance-YaRN"]
    perplexity[name] = float(np.exp(nats.mean()))

# %%
from figures.common import bar_panels

bar_panels({f"KV cache of {LENGTH} tokens, MB": megabytes, "perplexity": perplexity})

# %% [markdown]
# The caches take exactly the planned memory. 8 bits, and 8 for keys with 4 for values, change the perplexity by less
# than 1 %, 4 bits by less than 10 %.

# %%
assert all(round(megabytes[name] * 1e6) == plans[name][-1].kv for name in FORMATS)
assert all(abs(perplexity[name] / perplexity[whole] - 1) < 0.01 for name in ("8 bit", "8,4 bit"))
assert abs(perplexity["4 bit"] / perplexity[whole] - 1) < 0.10

# %% [markdown]
# ## The second question
#
# An on-disk KV cache keeps the keys and values of earlier prompts, under the content of the model, its angles, the
# cache's format and the tokens. Three questions on the same text, each asked without the cache and with it:

# %%
from mlx_resonance.generation import PromptCache, cache_key

disk_cache = PromptCache(work / "prompts", cache_key(checkpoint, None))
questions = ["\n    def ", "\n\nclass ", "\n\nimport "]
questions = [prompt + tokenizer.encode(question, add_special_tokens=False) for question in questions]


def ask(question, cache):
    start, known = time.perf_counter(), []
    keep = {"max_tokens": 1, "disk_cache": cache, "prompt_progress_callback": lambda done, _: known.append(done)}
    response = next(stream_generate(model, tokenizer, question, **keep))
    return time.perf_counter() - start, known[0], response.token


# %%
from figures.generation import first_tokens

caches = {"without a prompt cache": None, "with": disk_cache}
seconds, known, answers = ({name: [] for name in caches} for _ in range(3))
live = display(first_tokens(seconds), display_id=True)
for question in questions:
    for name, cache in caches.items():
        for values, value in zip((seconds, known, answers), ask(question, cache), strict=True):
            values[name].append(value)
    live.update(first_tokens(seconds))

# %% [markdown]
# From the second question on, only the new tokens have to be read. The answers begin with the same token.

# %%
print("tokens known:", known)
assert known["with"][0] == 0 and min(known["with"][1:]) >= len(prompt)
assert not any(known["without a prompt cache"])
assert answers["with"] == answers["without a prompt cache"]

# %%
temporary.cleanup()

# %% [markdown]
# On the command line: `mlx-resonance plan`, and `mlx-resonance generate` with `--kv-bits 8` and `--prompt-cache DIR`.
# Next: [PosGen](04-posgen.ipynb), the paper's benchmark.
