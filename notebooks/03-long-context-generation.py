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
# # 3. Ask a long document
#
# After this notebook you can
#
# - ask a document a question, and a second one without waiting again;
# - say why a model reads past its trained length, with a conversion and without one;
# - explain why an answer that quotes takes fewer passes than it has tokens;
# - plan the memory of a long context, and choose a format for the KV cache.
#
# It takes about a minute with the tiny LLaMA of the package, and two to four with
# SmolLM2-135M-Instruct, on two slow cores. `make smollm2` fetches and converts the
# latter (93 MB) into `build/`; the notebook uses it for the first half if it is
# there.

# %%
import logging
import os
import tempfile
from importlib.resources import files
from pathlib import Path

logging.getLogger("mlx_resonance").setLevel(logging.ERROR)  # no line without a GPU
SMOLLM2 = Path("../build/smollm2-32k")
TINY = files("mlx_resonance") / "assets" / "stdlib-llama"
real = SMOLLM2.exists() and "NOTEBOOK_TINY" not in os.environ

# %% [markdown]
# The tiny one was trained on 512 tokens. `convert` writes a copy with Resonance-YaRN
# for four times that ([notebook 2](02-convert-a-checkpoint.ipynb) says more). A CPU
# is slow with 16-bit numbers, so the copy has 32 bits there.

# %%
from mlx_resonance import load
from mlx_resonance.convert import convert

import mlx.core as mx

temporary = tempfile.TemporaryDirectory()
work, on_cpu = Path(temporary.name), mx.default_device() == mx.cpu
made = convert(
    str(TINY), work / "4x", rope="yarn", factor=4, dtype="float32" if on_cpu else None
)
folder = SMOLLM2 if real else made.path
model, tokenizer = load(folder)
rope = model.args.rope
print(f"{folder.name}: {rope.trained_length:,} tokens, now {rope.context_length:,}")

# %% [markdown]
# ## A document
#
# For SmolLM2, the chapter of Python's reference on `try`; with 135 million parameters
# it answers simple questions. Its 2000 tokens are well within the trained 8192, as
# reading more takes minutes on a CPU. The tiny model knows one kind of question: it
# is asked for a number that is hidden in 1700 tokens of filler, more than three times
# its trained length.

# %%
from pydoc_data.topics import topics

from mlx_resonance.evaluation import passkey

if real:
    document = topics["try"]
    question = "Which clause is executed on the way out, exception or not?"
    second = "What does the expression of an except clause have to evaluate to?"
else:
    filler, hidden = passkey.FILLER + " ", passkey.STATEMENT.format(key=34718)
    document = f"{passkey.INSTRUCTION}\n{filler * 4}\n{hidden}\n{filler * 36}"
    question, second = passkey.QUESTION, "Remember it. The pass key is"
print(f"{len(tokenizer.encode(document)):,} tokens: {document[:60]!r} …")

# %% [markdown]
# ## A question
#
# A prompt is the document, then the question, in the model's chat template if it has
# one. It is read in chunks; then tokens are generated one after the other. The figure
# follows.

# %%
from mlx_resonance import Checkpoint, stream_generate
from mlx_resonance.generation import PromptCache, cache_key
from mlx_resonance.generation.messages import question_tokens

checkpoint = Checkpoint.open(folder)
disk_cache = PromptCache(work / "prompts", cache_key(checkpoint, None))  # see below
options = {"max_tokens": 30 if real else 12, "stop": ["\n\n", ".  "]}
options |= {"prefill_step_size": 256, "disk_cache": disk_cache}
prompt = question_tokens(tokenizer, [document], question)

# %%
import time

from figures import Live
from figures.generation import tokens_over_time

read, written, start = [(0, 0)], [], time.perf_counter()
live = Live(tokens_over_time(read, written, rope.trained_length))


def on_read(done, total):
    read.append((time.perf_counter() - start, done))
    live.update(tokens_over_time(read, written, rope.trained_length))


answer, watch = "", {"prompt_progress_callback": on_read}
for response in stream_generate(model, tokenizer, prompt, **options, **watch):
    answer += response.text
    count = len(prompt) + response.generation_tokens
    written.append((time.perf_counter() - start, count))
live.update(tokens_over_time(read, written, rope.trained_length))

# %%
print("Q:", question)
print("A:", answer.strip())

# %% [markdown]
# ## The second question
#
# Nearly all of the time went into reading. What a model keeps of a text are keys and
# values, its KV cache, and `disk_cache` has stored them: under the content of the
# model, its angles, the format and the tokens. Another question about the same
# document begins with the same tokens.

# %%
prompt2 = question_tokens(tokenizer, [document], second)
start2, answer2, first2 = time.perf_counter(), "", None
for response in stream_generate(model, tokenizer, prompt2, **options):
    first2 = first2 or time.perf_counter() - start2
    answer2 += response.text
print("Q:", second)
print("A:", answer2.strip())

# %%
from figures.common import bar_panels

first = written[0][0]
new = len(prompt2) - response.cached_tokens
bar_panels(
    {
        "tokens to read": {"question 1": len(prompt), "question 2": new},
        "seconds to the first token": {"question 1": first, "question 2": first2},
    }
)

# %% [markdown]
# On the command line: `mlx-resonance generate -m MODEL -f FILE -p QUESTION
# --prompt-cache DIR`; `chat` keeps such a cache by itself.

# %% [markdown]
# ## Why it works past the trained length
#
# From here on the tiny model, whose 512 tokens are soon exceeded. The text: modules
# of Python's standard library that it was not trained on.

# %%
import sysconfig

import numpy as np

small, tokens_of = load(made.path)
TRAINED, LENGTH = small.args.rope.trained_length, small.args.rope.context_length
modules = ["calendar.py", "http/server.py", "ast.py"]
library = Path(sysconfig.get_paths()["stdlib"])
text = "\n\n".join((library / name).read_text(encoding="utf-8") for name in modules)
tokens = tokens_of.encode(text)[:LENGTH]

# %% [markdown]
# How well does the model predict each token from all before it? The weights are the
# same, the angles are those of its training, YaRN's, or YaRN's rounded.

# %%
from mlx_resonance.evaluation.losses import token_losses
from mlx_resonance.scaling import named_rope

opened = Checkpoint.open(made.path)
own = Checkpoint.open(TINY, weights=False).rope
yarn, rounded = named_rope(own, "yarn", 4), opened.rope
angles = {"RoPE": own, "YaRN": yarn, "Resonance-YaRN": rounded}
row, loss = np.array(tokens, np.int32)[None], {}
for name, each in angles.items():
    loss[name] = token_losses(opened.with_rope(each).load(), row, LENGTH - 1)[0]

# %%
from figures.common import loss_over_position

loss_over_position(loss, TRAINED, window=TRAINED // 8)

# %% [markdown]
# With plain RoPE the loss rises where the angles become new. With YaRN it does not,
# and within the trained length the other angles cost next to nothing. Rounding
# changes little beside that: the dark line lies within the light one. [Notebook
# 5](05-does-it-help.ipynb) looks closer.

# %%
for name, values in loss.items():
    inside, past = values[: TRAINED - 1].mean(), values[TRAINED - 1 :].mean()
    print(f"{name:15} {inside:.2f} nats within {TRAINED} tokens, {past:.2f} past them")

# %% [markdown]
# ## Without a conversion: `--extend dynamic`
#
# Angles can stay as they were trained if *distances* stay below the trained length.
# Keys fewer than $w$ tokens back keep their distance; those further away share a
# position with their neighbours, in groups of $g$:
#
# $$i - j \;\longrightarrow\; \lfloor i / g \rfloor + w - \lfloor w / g \rfloor
# - \lfloor j / g \rfloor$$
#
# The group of `dynamic` is the smallest that keeps query $i$ below
# $w + \tfrac{2}{3}(512 - w) = 384$: the largest distances are those that a model has
# seen least, so that a third of the far positions stays unused. Up to 512 tokens
# nothing changes at all.

# %%
from mlx_resonance.positions import position_map

positions = position_map("dynamic", TRAINED)
w, g = positions.window, positions.group_of(1800)


def distance(i, j):
    return i - j if i - j < w else i // g + w - w // g - j // g


print(f"the query at 1800 has w = {w}, g = {g}")
for back in (1, 127, 500, 1000, 1800):
    print(f"{back:5} tokens back count as {distance(1800, 1800 - back)}")

# %% [markdown]
# The same weights and a question about 1700 tokens of filler with a hidden number,
# 34718: with the angles and positions of training, then with `extend="dynamic"`.

# %%
from dataclasses import replace

from mlx_resonance import generate

filler, hidden = passkey.FILLER + " ", passkey.STATEMENT.format(key=34718)
haystack = f"{passkey.INSTRUCTION}\n{filler * 4}\n{hidden}\n{filler * 36}"
asked = question_tokens(tokens_of, [haystack], passkey.QUESTION)
plain = opened.with_rope(replace(own, max_position_embeddings=LENGTH)).load()
extended = opened.with_rope(own).extended("dynamic").load()

# %%
answers = {
    name: generate(each, tokens_of, asked, max_tokens=12)
    for name, each in (("plain", plain), ("extend dynamic", extended))
}
for name, text_of in answers.items():
    print(f"{name:15} {text_of!r}")

# %% [markdown]
# ## Fewer passes than tokens
#
# An answer about a document often repeats words of it. *Prompt lookup* proposes what
# followed the last words where they stood before, and checks the whole proposal in
# one pass of the model. What the model would have said anyway is kept, the rest is
# thrown away, and the text stays the same. It is on by default.
#
# A pass puts the keys of its tokens into the KV cache, where they can be counted:

# %%
from mlx_resonance.generation.cache import make_cache


def passes(prompt_lookup):
    cache, sizes, taken = make_cache(small, LENGTH), [], []
    update = cache[0].update_and_fetch

    def counted(keys, values):
        sizes.append(keys.shape[2])
        return update(keys, values)

    cache[0].update_and_fetch = counted
    how = {"max_tokens": 96, "prompt_cache": cache, "prompt_lookup": prompt_lookup}
    for response in stream_generate(small, tokens_of, asked, **how):
        taken.append(response.token)
    return taken, sizes[1:]  # the first one read the prompt


# %%
found = {way: passes(way) for way in ("off", "auto")}
for way, (taken, sizes) in found.items():
    print(f"{way:4} {len(taken)} tokens, {len(sizes)} passes of {sizes[:14]} … tokens")
print(f"{len(sizes) / len(taken):.2f} passes per token. The text:")
print(tokens_of.decode(taken))

# %% [markdown]
# ## Does it fit?
#
# `plan_memory` reads no weights. It adds up the weights, the KV cache of the whole
# context and the work of reading the prompt, for each format of the cache: the
# model's own type, 8 bits, 8 for keys and 4 for values, or 4.
#
# The KV cache is the part that grows. It holds a key and a value for every layer,
# every KV head and every token:
#
# $$\mathrm{bytes} = 2 \cdot n_\mathrm{layers} \cdot n_\mathrm{KV\,heads}
# \cdot d_\mathrm{head} \cdot n_\mathrm{tokens} \cdot \mathrm{bytes\ of\ a\ number}$$

# %%
args, itemsize = small.args, small.model.norm.weight.itemsize
of_a_token = 2 * args.num_hidden_layers * args.num_key_value_heads * args.head_dim
kv_by_hand = of_a_token * LENGTH * itemsize
print(f"{kv_by_hand / 1e6:.1f} MB for {LENGTH} tokens of {8 * itemsize} bits")

# %% [markdown]
# What the library plans, with the other parts, for each format:

# %%
from mlx_resonance import plan_memory

FORMATS = {
    f"{8 * small.model.norm.weight.itemsize} bit": None,
    "8 bit": 8,
    "8,4 bit": "8,4",
    "4 bit": 4,
}
STEP, contexts = TRAINED // 2, [TRAINED // 2, TRAINED, 2 * TRAINED, LENGTH]


def plan(context, bits, memory=None):
    how = {"memory": memory, "prefill_step_size": STEP}
    return plan_memory(made.path, context, kv_bits=bits, **how)


plans = {name: [plan(n, bits) for n in contexts] for name, bits in FORMATS.items()}
for name, (*_, last) in plans.items():
    parts = (last.weights / 1e6, last.kv / 1e6, last.prefill / 1e6)
    print("{:>7}: {:.1f} weights + {:.1f} KV + {:.1f} prompt, MB".format(name, *parts))

# %% [markdown]
# Is the plan right? Read prompts of growing length with each format, and compare with
# MLX's peak memory. Points appear as they are measured; the lines are the plan.

# %%
import gc

from figures.generation import memory_over_context


def peak(context, bits):
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    how = {"max_tokens": 2, "kv_bits": bits, "prefill_step_size": STEP}
    list(stream_generate(small, tokens_of, [5] * (context - 2), **how))
    return mx.get_peak_memory()


# %%
del model, plain, extended  # what is in memory counts
planned = {name: [one.total for one in each] for name, each in plans.items()}
peaks = {name: [] for name in FORMATS}
live = Live(memory_over_context(contexts, planned, peaks))
for context in contexts:
    for name, bits in FORMATS.items():
        peaks[name].append(peak(context, bits))
    live.update(memory_over_context(contexts, planned, peaks))

# %% [markdown]
# With a budget of 16 GB, of which a reserve is left to everything else, the plan says
# how far each format goes with this model.

# %%
MEMORY = 16 * 10**9
there = plan(LENGTH, None, MEMORY)
most = {name: there.max_context[name] for name in FORMATS}
millions = {name: tokens_in / 1e6 for name, tokens_in in most.items()}
bar_panels({f"million tokens in {there.limit / 1e9:.1f} GB": millions})

# %% [markdown]
# A context that does not fit fails before a weight is read. The error says what would
# help. So does a text that is longer than the context.

# %%
from mlx_resonance.generation import require_memory

whole = next(iter(FORMATS))
try:
    require_memory(opened, most[whole] + 1, memory=MEMORY, prefill_step_size=STEP)
except ValueError as error:
    too_large = str(error)
    print(too_large)

# %%
try:
    next(stream_generate(small, tokens_of, tokens, max_tokens=1))
except ValueError as error:
    too_long = str(error)
    print(too_long)

# %% [markdown]
# ## What fewer bits cost
#
# The bytes of the caches, which are allocated once for the whole text, and the
# perplexity of the 2048 tokens of source code.

# %%
from mlx_resonance.generation.prefill import prefill

megabytes, perplexity = {}, {}
for name, bits in FORMATS.items():
    cache = make_cache(small, LENGTH, bits)
    prefill(small, tokens[:3], cache)
    megabytes[name] = sum(layer.nbytes for layer in cache) / 1e6
    nats = loss["Resonance-YaRN"]  # in full precision
    if bits:
        nats = token_losses(small, row, LENGTH - 1, kv_bits=bits)
    perplexity[name] = float(np.exp(nats.mean()))

# %%
bar_panels({f"KV cache of {LENGTH} tokens, MB": megabytes, "perplexity": perplexity})

# %% [markdown]
# 8 bits, and 8 for keys with 4 for values, change the perplexity by less than 1 %, 4
# bits by less than 10 %. On the command line: `mlx-resonance plan`, and
# `--kv-bits 8,4`.

# %% [markdown]
# Next: [PosGen](04-posgen.ipynb), the paper's benchmark.
