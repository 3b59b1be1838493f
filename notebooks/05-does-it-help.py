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
# # 5. Does it help?
#
# Perplexity and a passkey, with plain RoPE, YaRN and Resonance-YaRN, on a LLaMA that was trained with plain RoPE. You
# will measure it on the tiny checkpoint, see the larger experiment's committed results, and get the commands for a
# checkpoint of your own.

# %%
import logging
from importlib.resources import files

logging.getLogger("mlx_resonance").setLevel(logging.ERROR)  # no line about a missing GPU
CHECKPOINT = str(files("mlx_resonance") / "assets/stdlib-llama")  # or such as "meta-llama/Llama-2-7b-hf"

# %%
import tempfile
from pathlib import Path

from mlx_resonance.convert import convert

work = Path(tempfile.mkdtemp())
folder = work / "float32"
convert(CHECKPOINT, folder, resonance=False, dtype="float32")  # the fast type of a CPU

# %% [markdown]
# ## Perplexity over the context
#
# Two files of the standard library that the tiny model was not trained on, cut to the context, with the checkpoint's
# own angles and with YaRN's for 8 times the context, rounded or not. In a terminal that is
# `mlx-resonance eval perplexity --rope default,yarn,resonance_yarn --factor 8 …`.

# %%
import sysconfig

from mlx_resonance import RopeConfig, load
from mlx_resonance.evaluation.perplexity import Subject, named_rope, run_perplexity, select_documents
from mlx_resonance.evaluation.windows import Protocol
from mlx_resonance.files import read_config

library = Path(sysconfig.get_paths()["stdlib"])
texts = [(library / name).read_text() for name in ("http/server.py", "pydoc.py")]
model, tokenizer = load(folder)
protocol = Protocol([256, 512, 1024, 2048], truncate=True, last=256)
documents, _ = select_documents(texts, tokenizer, 2047, None)
assert len(documents) == 2

# %%
own = RopeConfig.from_hf(read_config(folder))
ropes = [named_rope(own, name, 8) for name in ("default", "yarn", "resonance_yarn")]
subject = Subject("tiny", folder, ropes, [tokenizer.bos_token_id], documents)
rows = run_perplexity([subject], protocol, work / "perplexity.jsonl", {"data": "two files"})

# %%
from mlx_resonance.notebook_figures.common import lines

curves = {rope.rope_type: [row["perplexity_tokens"] for row in rows if row["rope"] == rope.rope_type] for rope in ropes}
lines(protocol.contexts, curves, "context, tokens", "perplexity", log="x", mark=own.trained_length)

# %%
plain, yarn, rounded = curves.values()
assert plain[-1] > 1.3 * yarn[-1]  # past the trained length plain RoPE breaks down
assert abs(rounded[-1] / yarn[-1] - 1) < 0.05  # what rounding changes is small beside that

# %% [markdown]
# ## A passkey
#
# A number is hidden in filler, and the model is asked for it: `mlx-resonance eval passkey`. The tiny checkpoint has
# never seen the task and finds nothing, at the trained length neither; that measures the model, not its angles.

# %%
from mlx_resonance.evaluation.passkey import Grid, accuracy, run_passkey

grid = Grid([512], [10, 50, 90], repetitions=1)
trials = run_passkey(model, tokenizer, grid, work / "passkey.jsonl", {"model": "tiny"})
print([(trial["key"], trial["answer"]) for trial in trials])
assert accuracy(grid, trials).max() == 0

# %% [markdown]
# ## The experiment
#
# `benchmarks/extension.py` asks the same of more documents, and fine-tunes. Its results are in the repository: the tiny
# checkpoint at 8 times its context, as it is and after 50 steps on sequences of the trained length.

# %%
import json

results = Path("../benchmarks/results/extension-stdlib-llama.jsonl")
if not results.exists():
    raise SystemExit("this notebook is alone: the results are in benchmarks/results of the repository")
header, *models = map(json.loads, results.read_text().splitlines())
contexts = header["contexts"]
for line in models:
    figures = "  ".join(f"{value:7.2f}" for value in line["perplexity_last"])
    print(f"{line['rope']:15} {line['steps']:3} steps, seed {line['seed']}: {figures}")

# %%
from IPython.display import display

for steps in (0, 50):
    last = {line["rope"]: line["perplexity_last"] for line in models if (line["steps"], line["seed"]) == (steps, 0)}
    figure = lines(contexts, last, "context, tokens", "perplexity of its last 256 tokens", log="xy")
    figure.axes[0].set_title(f"after {steps} steps")
    display(figure)

# %%
as_it_is = {line["rope"]: line["perplexity_last"][-1] for line in models if line["steps"] == 0}
assert as_it_is["default"] > 3 * as_it_is["yarn"]  # YaRN is what makes the long context work
assert as_it_is["ntk"] > 2 * as_it_is["yarn"]
assert abs(as_it_is["resonance_yarn"] / as_it_is["yarn"] - 1) < 0.05  # and rounding changes little here

# %% [markdown]
# ## On a LLaMA of your own
#
# ```
# mlx-resonance eval perplexity --model M --data books.jsonl --contexts 4096,8192,16384,32768 \
#     --rope yarn,resonance_yarn --factor 8 --truncate --output perplexity.jsonl --plot perplexity.png
# mlx-resonance finetune --model M --data books/ --mlx-path OUT --preset paper-4k --fine-tune-type lora
# mlx-resonance eval passkey --model OUT --lengths 4096,8192,16384 --output passkey.jsonl --plot passkey.png
# ```
