# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---


# %% [markdown]
# # 4. PosGen: only the position gets harder
#
# The paper's benchmark. Every next token of a sequence follows from a fixed number of earlier ones, so that a longer
# sequence is no harder but for its positions. You will see the sequences, train a small model for seconds, and look at
# the results of the laptop preset beside the paper's table: what they show, and what they do not.
#
# No checkpoint is needed. The `paper` and `official` presets are the paper's sizes, for a GPU:
# `mlx-resonance posgen sweep --preset paper --seeds 5`.

# %%
import logging

logging.getLogger("mlx_resonance").setLevel(logging.ERROR)  # no line about a missing GPU

# %% [markdown]
# ## Sequences
#
# Digits modulo 17. In a *recursive* sequence the next digit is the sum of the three before it and of the one before
# those; with *chain of thought* (cot) the fourth is always the first digit; *semi-recursive* is between.

# %%
from mlx_resonance.posgen.tasks import Task

import numpy as np

seed = np.array([[3, 1, 4, 15]], np.int32)
for name in ("recursive", "cot", "semi-recursive"):
    row = Task(name).extend(seed, 20)[0]
    print(f"{name:15}", *row)

# %%
recursive, cot = (Task(name).extend(seed, 256)[0] for name in ("recursive", "cot"))
for n in range(4, 256):
    assert recursive[n] == recursive[n - 4 : n].sum() % 17
    assert cot[n] == (cot[n - 3 : n].sum() + cot[0]) % 17

# %% [markdown]
# ## A shortcut
#
# Two sums that follow one another differ by two terms: $x_n = 2x_{n-1} - x_{n-5}$. A model that finds this needs two
# distances instead of a sum, and is right everywhere but at the first token. The models of the laptop preset find it.

# %%
n = np.arange(5, 256)
assert np.array_equal(recursive[n], (2 * recursive[n - 1] - recursive[n - 5]) % 17)

# %% [markdown]
# ## Train one
#
# The `smoke` preset trains for seconds and learns little. `mlx-resonance posgen train --preset laptop
# --subtask recursive --encoding resonance_yarn` takes one to four minutes on a CPU.

# %%
import tempfile
from pathlib import Path

from mlx_resonance.posgen.runs import train_into
from mlx_resonance.posgen.settings import PRESETS

losses = []
folder = Path(tempfile.mkdtemp()) / "run"
line = train_into(
    folder, "smoke", PRESETS["smoke"], Task("recursive"), "resonance_yarn", 0, lambda *state: losses.append(state)
)
print({key: line[key] for key in ("encoding", "id", "ood")})

# %%
assert losses
assert 0 <= line["ood"] <= 1

# %% [markdown]
# ## The committed results
#
# Three subtasks, eight encodings, five seeds of the laptop preset: trained on 64 digits without scaling, tested on 256
# with it.

# %%
from mlx_resonance.posgen.report import PAPER, accuracy_curves, summarize
from mlx_resonance.posgen.sweep import read_results

results = Path("../benchmarks/results/posgen-laptop.jsonl")
if not results.exists():
    raise SystemExit("this notebook is alone: the results are in benchmarks/results of the repository")
header, lines = read_results(results)
summary = summarize(lines)
assert len(lines) == 3 * 8 * 5

# %%
from mlx_resonance.notebook_figures import accuracy

from IPython.display import display

FOUR = ("rope", "resonance_rope", "yarn", "resonance_yarn")
for subtask, curves in accuracy_curves(lines).items():
    figure = accuracy({name: curves[name] for name in FOUR}, 4, 64)
    figure.axes[0].set_title(subtask)
    display(figure)

# %% [markdown]
# ## Beside the paper
#
# Accuracy past the training length in %, mean over five seeds; the paper's models are larger.

# %%
for subtask, encodings in summary["table"].items():
    for name in FOUR:
        ours, paper = encodings[name], PAPER[subtask][name]
        print(f"{subtask:15} {name:15} {ours['ood']:5.1f} ± {ours['ood_std']:4.1f}   paper {paper:5.1f}")

# %% [markdown]
# YaRN helps a great deal, as in the paper. What resonance adds to it at this size is not told apart from the chance of
# the seed, except where it loses; and five seeds make intervals that are too narrow rather than too wide.

# %%
for subtask, pairs in summary["pairs"].items():
    pair = pairs["yarn"]
    print(f"{subtask:15} resonance - plain YaRN: {pair['difference']:+.1f} [{pair['low']:+.1f}, {pair['high']:+.1f}]")

# %%
table, pairs = summary["table"], summary["pairs"]
for subtask in table:
    assert table[subtask]["yarn"]["ood"] > table[subtask]["rope"]["ood"] + 10
    assert pairs[subtask]["yarn"]["low"] <= 0  # nowhere is resonance ahead for certain
assert pairs["semi-recursive"]["yarn"]["high"] < 0

# %% [markdown]
# Why: rounding closes the gap of the pairs that turn within 65 tokens, and that is a small part of all gaps (notebook
# 1). The others are what a longer text shows anew.

# %%
from mlx_resonance import default_frequencies, feature_gap

before = feature_gap(default_frequencies(64), 65, 257)
after = feature_gap(default_frequencies(64).resonate(), 65, 257)
print(f"feature gap of all pairs: {before.sum():.1f} before, {after.sum():.1f} after rounding")
assert before.sum() - after.sum() < 0.1 * before.sum()

# %% [markdown]
# Next: [does it help on language?](05-does-it-help.ipynb)
