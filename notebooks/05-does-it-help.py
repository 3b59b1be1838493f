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
# # 5. Does it help?
#
# After this notebook you can
#
# - measure perplexity over the context, and whether a hidden key is found, with any
#   angles, on a checkpoint of your own;
# - read the results of this project's experiments: what carries a model past its
#   window, and what rounding adds to that;
# - compare methods that change the angles with methods that change positions.
#
# It takes about a minute. The measurements are of the tiny LLaMA of the package,
# which was trained with plain RoPE on 512 tokens of Python. The experiments took
# hours; their results are in `benchmarks/results` of the repository.

# %%
import logging
import tempfile
from importlib.resources import files
from pathlib import Path

from mlx_resonance import Checkpoint
from mlx_resonance.convert import convert

logging.getLogger("mlx_resonance").setLevel(logging.ERROR)  # no line without a GPU
CHECKPOINT = str(files("mlx_resonance") / "assets" / "stdlib-llama")
folder = tempfile.TemporaryDirectory()
work = Path(folder.name)
made = convert(CHECKPOINT, work / "float32", resonance=False, dtype="float32")
checkpoint = Checkpoint.open(made.path)  # the same angles, in the fast type of a CPU

# %% [markdown]
# ## Perplexity
#
# A model gives every next token $x_t$ a probability. Its *perplexity* on a text is
#
# $$\exp\left(-\frac{1}{T} \sum_{t=1}^{T} \log p(x_t \mid x_{<t})\right),$$
#
# the number of equally likely tokens among which it would have to guess. By hand, on
# the first 256 tokens of a file that the model was not trained on:

# %%
import sysconfig

import mlx.core as mx
import numpy as np

library = Path(sysconfig.get_paths()["stdlib"])
texts = [(library / name).read_text() for name in ("http/server.py", "pydoc.py")]
model, tokenizer = checkpoint.load(), checkpoint.tokenizer
tokens = np.array(tokenizer.encode(texts[0])[:256])
logits = np.array(model(mx.array(tokens[None])))[0, :-1].astype(np.float64)
logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
by_hand = np.exp(-logp[np.arange(255), tokens[1:]].mean())

# %%
from mlx_resonance.evaluation.losses import token_losses

by_library = np.exp(token_losses(model, tokens[None].astype(np.int32), 255).mean())
print(f"by hand {by_hand:.4f}, difference {abs(by_hand - by_library):.1e}")

# %% [markdown]
# ## Over the context
#
# Two files, cut to the context; the last 256 tokens count. With the checkpoint's own
# angles, and with YaRN's for eight times the context, rounded and not. In a terminal:
# `mlx-resonance eval perplexity --rope default,yarn,resonance_yarn --factor 8 …`.

# %%
from mlx_resonance.evaluation.perplexity import (
    Subject,
    run_perplexity,
    select_documents,
)
from mlx_resonance.evaluation.windows import Protocol
from mlx_resonance.scaling import named_rope

names = ("default", "yarn", "resonance_yarn")
ropes = [named_rope(checkpoint.rope, name, 8) for name in names]
protocol = Protocol([256, 512, 1024, 2048], truncate=True, last=256)
documents, _ = select_documents(texts, tokenizer, 2047, None)
subject = Subject(checkpoint, ropes, [tokenizer.bos_token_id], documents)
log = work / "perplexity.jsonl"
rows = run_perplexity([subject], protocol, log, {"data": "two files"})

# %%
from figures.common import method_lines

curves = {name: [] for name in names}
for row in rows:
    curves[row["rope"]].append(row["perplexity_tokens"])
ends = ", ".join(f"{name} {values[-1]:.1f}" for name, values in curves.items())
method_lines(
    f"Perplexity over the context. At 2,048 tokens: {ends}.",
    protocol.contexts,
    curves,
    "perplexity",
    trained=512,
)

# %% [markdown]
# Past 512 tokens (dotted) plain RoPE breaks down, and YaRN does not. Rounding changes
# little beside that: the dark line lies on the light one.

# %% [markdown]
# ## A hidden key
#
# A number is hidden in a long text, and the model is asked for it. The tiny
# checkpoint has learned that on texts of up to 512 tokens. Three keys at each length,
# early, in the middle and late; in a terminal, `mlx-resonance eval passkey`.

# %%
from dataclasses import replace

from mlx_resonance.evaluation.passkey import PasskeyGrid, accuracy, run_passkey

grid, answered = PasskeyGrid([512, 2048], [10, 50, 90], repetitions=1), {}
for rope in ropes:
    stretched = checkpoint.with_rope(replace(rope, max_position_embeddings=4096))
    trials = run_passkey(stretched, grid, work / f"passkey-{rope.rope_type}.jsonl")
    answered[rope.rope_type] = accuracy(grid, trials).sum(0)
    first = next(trial for trial in trials if trial["length"] == 2048)
    answer = " ".join(first["answer"].split())[:22]
    found = "{:.0f} of 3 at 512, {:.0f} of 3 at 2048".format(*answered[rope.rope_type])
    print(f"{rope.rope_type:15} {found}; {first['key']}? {answer!r}")

# %% [markdown]
# ## With fine-tuning
#
# `benchmarks/extension.py` measures the same on ten documents, and fine-tunes: the
# tiny checkpoint at eight times its context as it is, and after 50 steps on the
# trained length, with several seeds (bands: from the lowest to the highest).

# %%
from figures.language import extension

contexts, models = extension("stdlib-llama")
last = {}  # by steps and rope: perplexity of the last tokens, by seed and context
for line in models:
    of_rope = last.setdefault(line["steps"], {}).setdefault(line["rope"], [])
    of_rope.append(line["perplexity_last"])

# %%
from figures.common import perplexity_over_context

words = []
for steps, of_rope in last.items():
    ends = (f"{rope} {np.mean(seeds, 0)[-1]:.0f}" for rope, seeds in of_rope.items())
    words.append(f"after {steps} steps {', '.join(ends)}")
panels = {f"{steps} steps" if steps else "as it is": of for steps, of in last.items()}
end = f"At {contexts[-1]:,} tokens: {'; '.join(words)}."
alt = f"Perplexity over the context, by method. {end}"
perplexity_over_context(alt, contexts, panels)

# %% [markdown]
# YaRN is what makes the long context work: plain RoPE breaks down, and so does
# NTK-aware scaling at the full factor. Rounding changes little beside that, with or
# without fine-tuning.

# %% [markdown]
# The keys, as it is: with its own angles the checkpoint finds nearly all of them
# within 512 tokens and none past that; with YaRN's it finds most, up to eight times
# as far.

# %%
share = {}
for line in models:
    if not line["steps"]:
        share.setdefault(line["rope"], []).append(line["passkey"])
share = {rope: 100 * np.mean(seeds, 0) for rope, seeds in share.items()}
at = ", ".join(f"{rope} {values[-1]:.0f} %" for rope, values in share.items())
method_lines(
    f"Hidden keys found over the context. At {contexts[-1]:,} tokens: {at}.",
    contexts,
    share,
    "keys found, %",
    trained=512,
)

# %% [markdown]
# ## Past the window, without training
#
# There are other ways than other angles. *Position maps* keep every angle and count
# the positions of distant tokens anew: `self-extend`, `dca` and `dynamic` ([notebook
# 3](03-long-context-generation.ipynb) shows the last one). Dynamic NTK changes the
# base as the text grows. `benchmarks/past_the_window.py` has measured all of them on
# the same texts. A row for each; the line is Resonance-YaRN, the bars are 95 %
# intervals of the difference to it, over texts.

# %%
from figures.language import methods_past_the_window, past_the_window

lengths, report = past_the_window("stdlib-llama")
methods_past_the_window(lengths, report)

# %% [markdown]
# - Within the trained length (512) the position maps and plain RoPE are the same or
#   nearly so, while YaRN's other angles cost something.
# - Past it plain RoPE breaks down, and the position maps are ahead of YaRN.
# - Rounding makes no difference that these texts show, for any of the methods: the
#   bars of a light point and of its dark twin overlap everywhere.

# %%
at = str(lengths[-1])
for method, cells in report.items():
    mean, low, high = cells[at].get("to_resonance_yarn", (0, 0, 0))
    interval = f"{mean:+6.1f} % [{low:+.1f}, {high:+.1f}]"
    print(f"{method:22} {cells[at]['perplexity']:7.2f}  {interval}")

# %% [markdown]
# The keys that were found at the same lengths, for the methods that have been
# measured:

# %%
from figures.language import keys_past_the_window

keys_past_the_window(lengths, report)

# %% [markdown]
# ## A larger model
#
# The same with SmolLM2-135M-Instruct, trained on 8192 tokens of text, on long English
# manuals, if its results are there.

# %%
from IPython.display import display

larger = past_the_window("smollm2")
if larger is None:
    print(
        "no results: python benchmarks/past_the_window.py --model build/smollm2",
        "--lengths 8192,16384 --documents 3 --keys 0",
    )
else:
    display(methods_past_the_window(*larger))

# %% [markdown]
# ## On a LLaMA of your own
#
# ```
# mlx-resonance eval perplexity --model M --data books.jsonl --truncate \
#     --contexts 4096,8192,16384,32768 --rope yarn,resonance_yarn --factor 8 \
#     --output perplexity.jsonl --plot perplexity.png
# mlx-resonance eval perplexity --model M --data books.jsonl --truncate \
#     --contexts 4096,8192,16384,32768 --extend dynamic --output dynamic.jsonl
# mlx-resonance finetune --model M --data books/ --mlx-path OUT \
#     --preset paper-4k --fine-tune-type lora
# mlx-resonance eval passkey --model OUT --lengths 4096,8192,16384 \
#     --output passkey.jsonl --plot passkey.png
# ```
