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
# # 2. Convert a checkpoint
#
# - A Hugging Face checkpoint becomes an MLX folder with eight times the context. You will see what changes in it, and
#   how it is checked against its source.
# - The weights run with any angles, and nothing fails if these are wrong: you will see what that costs, and what
#   rounding and quantization cost.
# - At the end: the same angles in a form that transformers and stock mlx-lm can read.
#
# The cells use the tiny LLaMA of the package. To use another checkpoint, put its folder or its Hugging Face id here.
# Files go to a temporary folder, which is deleted at the end; they take five times the space of the weights.

# %%
from importlib.resources import files

CHECKPOINT = files("mlx_resonance") / "assets" / "stdlib-llama"  # or "meta-llama/Llama-2-7b-hf", or a folder
SCALING = {"rope": "yarn", "factor": 8}  # {} for a checkpoint that has a scaling of its own, such as Llama 3.1
DTYPE = "float32"  # fast on any CPU; None keeps that of the checkpoint

# %%
import logging
import tempfile
from pathlib import Path

from mlx_resonance import Checkpoint, RopeConfig, feature_gap

logging.getLogger("mlx_resonance").setLevel(logging.ERROR)  # no line about a missing GPU
folder = tempfile.TemporaryDirectory()
source, work = str(CHECKPOINT), Path(folder.name)
before = Checkpoint.open(source, weights=False).rope
print(f"{before.rope_type}, base {before.base:g}, heads of {before.dims} features, {before.context_length} tokens")

# %% [markdown]
# ## Look before you write
#
# A dry run says what would be written, and the memory that it takes.

# %%
from mlx_resonance.convert import convert

plan = convert(source, work / "8x", **SCALING, dtype=DTYPE, dry_run=True)
assert not any(work.iterdir())  # nothing was written
print(f"{plan.rope.rope_type}, {plan.rope.context_length} tokens of context")
print(f"{plan.weights / 1e6:.1f} MB of weights; takes about {plan.memory / 1e6:.0f} MB of memory")

# %% [markdown]
# The wavelengths of the new angles, and their feature gap: how far they lie from those that the checkpoint was trained
# with, its own ([notebook 1](01-resonance-rope.ipynb) explains both).

# %%
from mlx_resonance.inspection import Training, inspect_rope, training_of

from figures.rope import inspected

inspection = inspect_rope(plan.rope, training=Training(before, before.trained_length))
inspected(inspection)

# %% [markdown]
# YaRN brings every pair close to known angles. Rounding, which moves the fastest pairs most, does not bring them
# closer: the gap of the pre-critical pairs is zero only in a model that is fine-tuned with the rounded wavelengths.

# %%
critical, gap = inspection.in_use.critical_pairs(inspection.train_length), inspection.gap
lengths = inspection.train_length, inspection.test_length
assert critical > 0 and gap[:critical].all()
assert not feature_gap(inspection.in_use, *lengths, trained=inspection.in_use)[:critical].any()
shift = inspection.unrounded.angle_shift()
assert plan.largest_shift == shift.max() == shift[:3].max()
print(f"{critical} of {len(shift)} pairs are pre-critical; rounding moves a wavelength by up to {shift.max():.1%}")
print(f"feature gap: {gap[:critical].sum():.2f} summed over them, {gap[critical:].sum():.2f} over the others")

# %% [markdown]
# ## Convert
#
# The folder is written atomically. With `verify=True` every tensor is read again and compared with its source, and
# where torch and transformers are installed, the logits with those of transformers.

# %%
made = convert(source, work / "8x", **SCALING, dtype=DTYPE, verify=True)
for path in sorted(made.path.iterdir()):
    print(f"{path.stat().st_size:>12,}  {path.name}")

# %%
checks = made.checks
assert checks["exact"] == checks["tensors"] and not checks["problems"]
assert made.weights == plan.weights or abs(made.weights - plan.weights) < 1e5  # bytes of headers
print(f"{checks['exact']} of {checks['tensors']} tensors hold the numbers of the source")
print("logits against transformers:", checks["logits"])

# %% [markdown]
# The weights are the same; the difference is in config.json.

# %%
import json

settings = json.loads((made.path / "config.json").read_text())
assert RopeConfig.from_hf(settings) == made.rope == plan.rope
print(json.dumps({key: settings[key] for key in ("rope_theta", "rope_scaling", "max_position_embeddings")}, indent=2))

# %% [markdown]
# `conversion.json` has the settings that the checkpoint was trained with. `mlx-resonance inspect` reads them, and shows
# the same gap as above.

# %%
assert training_of(made.path, made.rope) == Training(before, before.trained_length)
print("trained angles:", training_of(made.path, made.rope))

# %% [markdown]
# The rope type says that the wavelengths are rounded. A runtime that does not know it refuses the checkpoint instead of
# running it with other angles.

# %%
from mlx_lm.models.rope_utils import initialize_rope

try:
    initialize_rope(made.rope.dims, made.rope.base, False, settings["rope_scaling"], made.rope.context_length)
    raise AssertionError("stock mlx-lm took it")
except ValueError as error:
    print("stock mlx-lm:", error)

# %% [markdown]
# ## One bit
#
# A file that has changed since is detected. Here, one bit has.

# %%
from mlx_resonance.convert import verify


def flip(path, place=-1000):
    with path.open("r+b") as file:
        file.seek(place, 2)
        byte = file.read(1)[0]
        file.seek(place, 2)
        file.write(bytes([byte ^ 1]))


# %%
weights = next(made.path.glob("*.safetensors"))
flip(weights)
problems = verify(made.path, source).problems
flip(weights)  # and back
assert any("SHA-256" in problem for problem in problems)
assert any("further from the source" in problem for problem in problems)
assert not verify(made.path, source).problems
print("\n".join(problems))

# %% [markdown]
# ## The wrong angles
#
# The weights do not say which angles they need. If a runtime ignored the scaling, nothing would fail. Here is the loss
# on modules of the standard library that the tiny model has not seen in training, three times as long as its training
# texts: with the angles of plain RoPE, with YaRN's, and with YaRN's rounded.

# %%
import sysconfig

from mlx_resonance import load

import numpy as np

model, tokenizer = load(made.path)
library, trained = Path(sysconfig.get_paths()["stdlib"]), before.trained_length
text = "".join((library / name).read_text(encoding="utf-8") for name in ("calendar.py", "random.py", "pydoc.py"))
length = 3 * trained
tokens = np.array(tokenizer.encode(text), np.int32)
rows = tokens[: len(tokens) // length * length].reshape(-1, length)[:2]

# %%
from dataclasses import replace

from mlx_resonance.attention import set_rope
from mlx_resonance.evaluation.losses import token_losses

plain = RopeConfig(before.dims, base=before.base, max_position_embeddings=trained)
ropes = {"RoPE": plain, "YaRN": replace(made.rope, rope_type=made.rope.base_type), "Resonance-YaRN": made.rope}
loss = {}
for name, rope in ropes.items():
    set_rope(model, rope)  # the weights stay
    loss[name] = token_losses(model, rows, length - 1)

# %%
from figures.common import loss_over_position

loss_over_position({name: values.mean(axis=0) for name, values in loss.items()}, trained, window=128)

# %% [markdown]
# Past the trained length the loss grows with RoPE, and does not with YaRN. Within it YaRN costs a little, since the
# model has not been fine-tuned with it. Rounding costs next to nothing beside that, though it moved the first pair by
# 4.5 %.

# %%
past = {name: values[:, 2 * trained :].mean() for name, values in loss.items()}
within = {name: values[:, : trained - 1].mean() for name, values in loss.items()}
print("past twice the trained length", {name: f"{value:.3f}" for name, value in past.items()})
print("within the trained length    ", {name: f"{value:.3f}" for name, value in within.items()})
assert past["RoPE"] > past["Resonance-YaRN"] + 0.5
assert past["RoPE"] > within["RoPE"] + 0.5 and past["YaRN"] < within["YaRN"] + 0.1
assert 0 < within["Resonance-YaRN"] - within["RoPE"] < 0.3
assert abs(past["Resonance-YaRN"] - past["YaRN"]) < 0.05 and abs(within["Resonance-YaRN"] - within["YaRN"]) < 0.05

# %% [markdown]
# ## Quantize
#
# The same in 8, 4 and 3 bits: the size of the files, the error of the weights (its root mean square over that of the
# values, median of all tensors), and the loss on a text of the trained length.

# %%
import contextlib
import io

whole = DTYPE or "source"
sizes, off, nats = {whole: made.weights / 1e6}, {}, {whole: loss["Resonance-YaRN"][0, : trained - 1].mean()}
for bits in (8, 4, 3):
    name = f"{bits} bit"
    with contextlib.redirect_stderr(io.StringIO()):  # mlx-lm's line
        small = convert(source, work / name, **SCALING, dtype=DTYPE, quantize=True, q_bits=bits)
    sizes[name] = small.weights / 1e6
    off[name] = 100 * float(np.median(list(small.quantization_error.values())))
    nats[name] = token_losses(load(small.path)[0], rows[:1, :trained], trained - 1).mean()

# %%
from figures.common import bar_panels

bar_panels({"weights, MB": sizes, "error of the weights, %": off, "loss, nats per token": nats})

# %% [markdown]
# Each bit less about doubles the error. Eight bits barely change the loss, three change it most.

# %%
assert off["8 bit"] < 1 < off["4 bit"] < 15 < off["3 bit"]
assert 1.8 < off["3 bit"] / off["4 bit"] < 2.6 and 1.8**4 < off["4 bit"] / off["8 bit"] < 2.6**4
assert abs(nats["8 bit"] - nats[whole]) < 0.03
assert nats["3 bit"] > nats["4 bit"] > nats["8 bit"]

# %% [markdown]
# ## For other runtimes
#
# `portable=True` writes the same rounded angles as `longrope`, a rope type that transformers and stock mlx-lm know.

# %%
portable = convert(source, work / "portable", **SCALING, dtype="float32", portable=True)
rope_type = json.loads((portable.path / "config.json").read_text())["rope_scaling"]["rope_type"]
assert rope_type == "longrope"

# %%
from importlib.util import find_spec

theirs, ids = None, rows[:1, : trained + 100]  # past the trained length
if find_spec("torch") and find_spec("transformers"):
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    other = transformers.AutoModelForCausalLM.from_pretrained(portable.path, dtype=torch.float32)
    theirs = other(torch.tensor(ids).long()).logits.detach().numpy()

# %%
import mlx.core as mx

if theirs is None:
    print("torch and transformers are not installed: nothing to compare with")
else:
    model.set_dtype(mx.float32)
    ours = np.array(model(mx.array(ids)))
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert difference < 5e-3 and (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.999
    print(f"over {ids.shape[1]} positions, the logits are within {difference:.1e} of the largest")

# %%
folder.cleanup()
assert not work.exists()

# %% [markdown]
# The same on the command line: `mlx-resonance convert SRC --mlx-path OUT --rope yarn --factor 8 -q --verify`.
#
# Next: [generate past the trained length](03-long-context-generation.ipynb).
