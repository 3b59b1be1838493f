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
# # 2. Convert a checkpoint
#
# After this notebook you can
#
# - give a Hugging Face checkpoint eight times its context, and know what changed in
#   it;
# - check the result against its source, tensor by tensor;
# - say what wrong angles cost, and what rounding and quantization cost beside that;
# - write the same angles for transformers and for stock mlx-lm.
#
# It takes about 40 seconds. The cells use the tiny LLaMA of the package, which was
# trained on 512 tokens of Python; put another folder or Hugging Face id in its place.
# The files go to a temporary folder.

# %%
import logging
import tempfile
from importlib.resources import files
from pathlib import Path

logging.getLogger("mlx_resonance").setLevel(logging.ERROR)  # no line without a GPU
CHECKPOINT = str(files("mlx_resonance") / "assets" / "stdlib-llama")
SCALING = {"rope": "yarn", "factor": 8}  # {} where the source has one, as Llama 3.1
DTYPE = "float32"  # fast on any CPU; None keeps the checkpoint's
folder = tempfile.TemporaryDirectory()
work = Path(folder.name)

# %% [markdown]
# ## Look before you write
#
# A dry run says what would be written, and the memory that it takes.

# %%
from mlx_resonance.convert import convert

plan = convert(CHECKPOINT, work / "8x", **SCALING, dtype=DTYPE, dry_run=True)
untouched = not any(work.iterdir())
print(f"{plan.rope.rope_type}, {plan.rope.context_length} tokens of context")
print(f"{plan.weights / 1e6:.1f} MB of weights, {plan.memory / 1e6:.0f} MB of memory")

# %% [markdown]
# ## Convert
#
# The folder is written under a temporary name, and renamed when it is complete. With
# `verify=True` every tensor is read again and compared with its source, and where
# torch and transformers are installed, the logits with those of transformers.

# %%
made = convert(CHECKPOINT, work / "8x", **SCALING, dtype=DTYPE, verify=True)
for path in sorted(made.path.iterdir()):
    print(f"{path.stat().st_size:>12,}  {path.name}")

# %% [markdown]
# ## The weights are the same
#
# By hand, in four lines: read both files, compare every tensor.

# %%
import mlx.core as mx

theirs = mx.load(str(Path(CHECKPOINT) / "model.safetensors"))
ours = mx.load(str(made.path / "model.safetensors"))
same = [mx.array_equal(ours[name], theirs[name].astype(mx.float32)) for name in theirs]
print(f"{sum(x.item() for x in same)} of {len(theirs)} tensors hold the same numbers")

# %% [markdown]
# What `verify=True` found:

# %%
checks = made.checks
print(f"{checks['exact']} of {checks['tensors']} tensors are exact")
print("logits against transformers:", checks["logits"])

# %% [markdown]
# ## The difference is in config.json
#
# Three keys say which angles the weights are to be run with.

# %%
import json

settings = json.loads((made.path / "config.json").read_text())
keys = ("rope_theta", "rope_scaling", "max_position_embeddings")
print(json.dumps({key: settings[key] for key in keys}, indent=2))

# %% [markdown]
# From these keys to wavelengths. With base $b$, $d$ features, factor $s$ and YaRN's
# ramp $\gamma_i$ ([notebook 1](01-resonance-rope.ipynb) derives it):
#
# $$\lambda_i = 2\pi\, b^{2i/d}, \qquad
# \lambda_i' = \frac{\lambda_i}{\gamma_i + (1 - \gamma_i)/s}, \qquad
# \tilde\lambda_i = \mathrm{round}(\lambda_i')$$

# %%
import numpy as np

scaling, b, d = settings["rope_scaling"], settings["rope_theta"], made.rope.dims
plain = 2 * np.pi * b ** (2 * np.arange(d // 2) / d)
turns = [scaling["beta_fast"], scaling["beta_slow"]]
length = scaling["original_max_position_embeddings"]
ends = d * np.log(length / (2 * np.pi * np.array(turns))) / (2 * np.log(b))
low, high = np.floor(ends[0]), np.ceil(ends[1])
gamma = 1 - np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
by_hand = np.round(plain / (gamma + (1 - gamma) / scaling["factor"]))

# %% [markdown]
# The library's:

# %%
wavelengths = made.rope.frequencies().wavelengths
print(wavelengths.astype(int))
print(f"largest difference: {np.abs(by_hand - wavelengths).max():.0f} tokens")

# %% [markdown]
# ## What is new to the model?
#
# The *feature gap*: how far the angles of the longer text lie from those that the
# checkpoint was trained with. The folder's `conversion.json` has those on record.

# %%
from mlx_resonance.inspection import inspect_rope, training_of

training = training_of(made.path, made.rope)
inspection = inspect_rope(made.rope, training=training)
print("trained with:", training)

# %%
from figures.rope import inspected

inspected(inspection)

# %% [markdown]
# YaRN brings every pair close to known angles. Rounding, which moves the fastest
# pairs most, does not bring them closer: their gap is zero only in a model that is
# fine-tuned with the rounded wavelengths. `mlx-resonance inspect` prints these
# numbers.

# %%
critical = inspection.in_use.critical_pairs(inspection.train_length)
gap = inspection.gap
shift = inspection.unrounded.angle_shift()
print(f"{critical} of {len(shift)} pairs turn fully in training (pre-critical)")
print(f"rounding moves a wavelength by up to {shift.max():.1%}")
print(f"feature gap: {gap[:critical].sum():.2f}, summed over these")
print(f"             {gap[critical:].sum():.2f}, summed over the others")

# %% [markdown]
# ## Who can read it?
#
# The rope type says that the wavelengths are rounded. A runtime that does not know
# the type refuses the checkpoint, instead of running it with other angles.

# %%
from mlx_lm.models.rope_utils import initialize_rope

try:
    initialize_rope(d, b, False, scaling, made.rope.context_length)
    refusal = None
except ValueError as error:
    refusal = str(error)
print("stock mlx-lm:", refusal)

# %% [markdown]
# ## One bit
#
# A file that has changed since is detected. Here, one bit has.


# %%
def flip(path, place=-1000):
    with path.open("r+b") as file:
        file.seek(place, 2)
        byte = file.read(1)[0]
        file.seek(place, 2)
        file.write(bytes([byte ^ 1]))


# %%
from mlx_resonance.convert import verify

weights = next(made.path.glob("*.safetensors"))
flip(weights)
problems = verify(made.path, CHECKPOINT).problems
flip(weights)  # and back
for problem in problems:
    print("-", problem.replace(str(work), "…"))

# %% [markdown]
# ## The wrong angles
#
# The weights do not say which angles they need, and nothing fails if they are wrong.
# What does it cost? The loss on modules of the standard library that the tiny model
# has not seen, three times as long as its training texts.

# %%
import sysconfig

from mlx_resonance import load

model, tokenizer = load(made.path)
library, trained = Path(sysconfig.get_paths()["stdlib"]), training.length
names = ("calendar.py", "random.py", "pydoc.py")
text = "".join((library / name).read_text(encoding="utf-8") for name in names)
tokens = np.array(tokenizer.encode(text), np.int32)
rows = tokens[: 6 * trained].reshape(2, -1)

# %%
from dataclasses import replace

from mlx_resonance import RopeConfig
from mlx_resonance.attention import set_rope
from mlx_resonance.evaluation.losses import token_losses

plain_rope = RopeConfig(d, base=b, max_position_embeddings=trained)
unrounded = replace(made.rope, rope_type="yarn")
ropes = {"RoPE": plain_rope, "YaRN": unrounded, "Resonance-YaRN": made.rope}
loss = {}
for name, rope in ropes.items():
    set_rope(model, rope)  # the weights stay
    loss[name] = token_losses(model, rows, 3 * trained - 1)

# %%
from figures.common import loss_over_position

mean = {name: values.mean(axis=0) for name, values in loss.items()}
loss_over_position(mean, trained, window=128)

# %% [markdown]
# Past the trained length the loss grows with RoPE, and does not with YaRN. Within it
# YaRN costs a little, since the model has not been fine-tuned with it. Rounding costs
# next to nothing beside that, though it moved the first pair by 4.5 %.

# %%
within = {name: values[: trained - 1].mean() for name, values in mean.items()}
past = {name: values[2 * trained :].mean() for name, values in mean.items()}
for name in mean:
    print(f"{name:15} {within[name]:.3f} nats within, {past[name]:.3f} past twice that")

# %% [markdown]
# ## Quantize
#
# A group of 64 weights becomes integers $q$ of $k$ bits, a scale and an offset:
#
# $$w \approx \beta + s\,q, \qquad s = \frac{\max w - \min w}{2^k - 1}, \qquad
# q = \mathrm{round}\!\left(\frac{w - \beta}{s}\right) \in \{0, \dots, 2^k - 1\}$$
#
# By hand, in 4 bits, with $\beta = \min w$, and by MLX, which chooses scale and
# offset slightly differently; each error is that of the weights, relative to their
# size.

# %%
weight = ours["model.layers.0.mlp.down_proj.weight"]
groups = np.array(weight).reshape(-1, 64)
offset, top = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
scale = (top - offset) / 15
restored = offset + scale * np.round((groups - offset) / scale)
by_mlx = mx.dequantize(*mx.quantize(weight, 64, 4), 64, 4)
for name, copy in (("by hand", restored), ("MLX", np.array(by_mlx).reshape(-1, 64))):
    error = np.linalg.norm(copy - groups) / np.linalg.norm(groups)
    print(f"{name:8} {100 * error:.1f} %")

# %% [markdown]
# The whole checkpoint in 8, 4 and 3 bits: the size of the files, the error of the
# weights (median of all tensors), and the loss on a text of the trained length.

# %%
import contextlib
import io

whole = DTYPE or "source"
sizes, off = {whole: made.weights / 1e6}, {}
nats = {whole: loss["Resonance-YaRN"][0, : trained - 1].mean()}
for bits in (8, 4, 3):
    name, options = f"{bits} bit", {"dtype": DTYPE, "quantize": True, "q_bits": bits}
    with contextlib.redirect_stderr(io.StringIO()):  # mlx-lm's line
        small = convert(CHECKPOINT, work / name, **SCALING, **options)
    sizes[name] = small.weights / 1e6
    off[name] = 100 * float(np.median(list(small.quantization_error.values())))
    quantized, _ = load(small.path)
    nats[name] = token_losses(quantized, rows[:1, :trained], trained - 1).mean()

# %%
from figures.common import bar_panels

bar_panels(
    {"weights, MB": sizes, "error of the weights, %": off, "loss, nats per token": nats}
)

# %% [markdown]
# Each bit less about doubles the error. Eight bits barely change the loss, three
# change it most.

# %% [markdown]
# ## For other runtimes
#
# `portable=True` writes the same rounded angles as `longrope`, a rope type that
# transformers and stock mlx-lm know. It has a factor for every pair:
#
# $$f_i = \frac{\tilde\lambda_i}{\lambda_i}$$

# %%
portable = convert(CHECKPOINT, work / "portable", **SCALING, dtype=DTYPE, portable=True)
written = json.loads((portable.path / "config.json").read_text())["rope_scaling"]
difference = np.abs(np.array(written["long_factor"]) * plain - by_hand).max()
print(f"{written['rope_type']}; largest difference: {difference:.1e} tokens")

# %% [markdown]
# Where torch and transformers are installed: their logits, past the trained length.

# %%
from importlib.util import find_spec

logits, ids = None, rows[:1, : trained + 100]
if find_spec("torch") and find_spec("transformers"):
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    maker = transformers.AutoModelForCausalLM.from_pretrained
    other = maker(portable.path, dtype=torch.float32)
    logits = other(torch.tensor(ids).long()).logits.detach().numpy()

# %%
if logits is None:
    print("torch and transformers are not installed: nothing to compare with")
else:
    own_logits = np.array(model(mx.array(ids)))  # its angles are made.rope's
    off_by = np.abs(own_logits - logits).max() / np.abs(logits).max()
    print(f"{ids.shape[1]} positions, logits within {off_by:.1e} of the largest")

# %% [markdown]
# The same on the command line:
#
# ```
# mlx-resonance convert SRC --mlx-path OUT --rope yarn --factor 8 -q --verify
# ```
#
# Next: [ask a long document](03-long-context-generation.ipynb).
