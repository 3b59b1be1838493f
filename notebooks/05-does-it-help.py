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

# %%

# %% [markdown]
# # 5. Does it help?
#
# Perplexity and a passkey, with plain RoPE, YaRN and Resonance-YaRN, on a LLaMA that was trained with plain RoPE. You
# will measure both on the tiny checkpoint, see the committed results of a larger experiment, and get the commands for a
# checkpoint of your own.

# %%
import logging
from importlib.resources import files

logging.getLogger("mlx_resonance").setLevel(logging.ERROR)  # no line about a missing GPU
CHECKPOINT = str(files("mlx_resonance") / "assets/stdlib-llama")  # or "meta-llama/Llama-2-7b-hf", or a folder

# %%
import tempfile
from pathlib import Path

from mlx_resonance.convert import convert

work = Path(tempfile.mkdtemp())
folder = work / "float32"
made = convert(CHECKPOINT, folder, resonance=False, dtype="float32")  # the fast type of a CPU

# %% [markdown]
# ## Perplexity over the context
#
# Two files of the standard library that the tiny model was not trained on, cut to the context, with the checkpoint's
# own angles and with YaRN's for 8 times the context, rounded and not. In a terminal that is
# `mlx-resonance eval perplexity --rope default,yarn,resonance_yarn --factor 8 …`.

# %%
import sysconfig

from mlx_resonance import Checkpoint
from mlx_resonance.evaluation.perplexity import Subject, run_perplexity, select_documents
from mlx_resonance.evaluation.windows import Protocol
from mlx_resonance.scaling import named_rope

library = Path(sysconfig.get_paths()["stdlib"])
texts = [(library / name).read_text() for name in ("http/server.py", "pydoc.py")]
checkpoint = Checkpoint.open(folder)
tokenizer = checkpoint.tokenizer
protocol = Protocol([256, 512, 1024, 2048], truncate=True, last=256)
documents, _ = select_documents(texts, tokenizer, 2047, None)
assert len(documents) == 2

# %%
ropes = [named_rope(checkpoint.rope, name, 8) for name in ("default", "yarn", "resonance_yarn")]
subject = Subject(checkpoint, ropes, [tokenizer.bos_token_id], documents)
rows = run_perplexity([subject], protocol, work / "perplexity.jsonl", {"data": "two files"})

# %%
from figures.common import lines

curves = {rope.rope_type: [row["perplexity_tokens"] for row in rows if row["rope"] == rope.rope_type] for rope in ropes}
lines(protocol.contexts, curves, "context, tokens", "perplexity", log="x", mark=checkpoint.rope.trained_length)

# %%
plain, yarn, rounded = curves.values()
assert plain[-1] > 1.3 * yarn[-1]  # past the trained length plain RoPE breaks down
assert abs(rounded[-1] / yarn[-1] - 1) < 0.05  # rounding changes little beside that

# %% [markdown]
# ## A passkey
#
# A number is hidden in a long text, and the model is asked for it: `mlx-resonance eval passkey`. The tiny checkpoint
# has learned this task on texts of up to 512 tokens. With the angles of its training it answers a text of that length,
# and no longer one of four times that length; with YaRN's it does, rounded or not.

# %%
from dataclasses import replace

from mlx_resonance.evaluation.passkey import PasskeyGrid, accuracy, run_passkey

grid = PasskeyGrid([512, 2048], [10, 50, 90], repetitions=1)
for rope in ropes:
    stretched = checkpoint.with_rope(replace(rope, max_position_embeddings=4096))
    trials = run_passkey(stretched, grid, work / f"passkey-{rope.rope_type}.jsonl")
    print(f"{rope.rope_type:15} found at {grid.lengths}:", accuracy(grid, trials).mean(0).round(2))
    print([(trial["key"], trial["answer"]) for trial in trials if trial["length"] == 2048])

# %% [markdown]
# ## The experiment
#
# `benchmarks/extension.py` measures the same on more documents, and fine-tunes. Its results are in the repository: the
# tiny checkpoint at 8 times its context, without fine-tuning and after some on the trained length, with several seeds.

# %%
import json

import numpy as np

folder = Path("../benchmarks/results")
if not folder.exists():
    raise SystemExit("the results are in benchmarks/results of the repository, which is not here")


def results(name):
    header, *models = map(json.loads, (folder / f"extension-{name}.jsonl").read_text().splitlines())
    return header["contexts"], models


contexts, models = results("stdlib-llama")
last = {}  # by steps, then by rope: perplexity of the last 512 tokens, shape (seeds, contexts)
for line in models:
    last.setdefault(line["steps"], {}).setdefault(line["rope"], []).append(line["perplexity_last"])
for steps, ropes in last.items():
    for rope, seeds in ropes.items():
        print(f"{steps:3} steps  {rope:15} {len(seeds)} seeds: ", *(f"{x:7.2f}" for x in np.mean(seeds, 0)))

# %%
from figures.common import perplexity_over_context

perplexity_over_context(contexts, {f"{steps} steps" if steps else "as it is": ropes for steps, ropes in last.items()})

# %% [markdown]
# YaRN is what makes the long context work: plain RoPE breaks down, and so does NTK-aware scaling at the full factor.
# Rounding changes little beside that, with or without fine-tuning.

# %%
for ropes in last.values():
    far = {rope: np.mean(seeds, 0)[-1] for rope, seeds in ropes.items()}
    assert abs(far["resonance_yarn"] / far["yarn"] - 1) < 0.05
    assert all(far[rope] > 2 * far["yarn"] for rope in ("default", "ntk"))

# %% [markdown]
# The passkeys, as it is: with its own angles the checkpoint finds nearly all of them within 512 tokens and none past
# that; with YaRN's it finds most, up to 8 times as far.

# %%
found = {}
for line in models:
    if not line["steps"]:
        found.setdefault(line["rope"], []).append(line["passkey"])
share = {rope: 100 * np.mean(seeds, 0) for rope, seeds in found.items()}
lines(contexts, share, "context, tokens", "passkeys found, %", log="x", mark=512)

# %%
assert share["default"][0] > 80 and share["default"][1:].max() == 0
assert min(share["yarn"].min(), share["resonance_yarn"].min()) > 50

# %% [markdown]
# ## On a LLaMA of your own
#
# ```
# mlx-resonance eval perplexity --model M --data books.jsonl --contexts 4096,8192,16384,32768 \
#     --rope yarn,resonance_yarn --factor 8 --truncate --output perplexity.jsonl --plot perplexity.png
# mlx-resonance finetune --model M --data books/ --mlx-path OUT --preset paper-4k --fine-tune-type lora
# mlx-resonance eval passkey --model OUT --lengths 4096,8192,16384 --output passkey.jsonl --plot passkey.png
# ```
