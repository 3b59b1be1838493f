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
# # 1. Resonance RoPE: why position 4097 is new, and what rounding does
#
# - A rotary embedding turns every pair of features by an angle. You will see which angles a model meets in a text that
#   is longer than those of its training, and that they are new to it.
# - A model that is trained with wavelengths of whole tokens knows all angles of its fast pairs. YaRN takes care of the
#   slow ones.
# - The angles of whole wavelengths can be computed exactly at any position, even where float32 cannot hold them.
#
# The numbers come from a checkpoint, by default the tiny LLaMA of the package. To use another one, put its folder or
# Hugging Face id here; from the hub, only config.json is fetched.

# %%
from importlib.resources import files

CHECKPOINT = files("mlx_resonance") / "assets" / "stdlib-llama"  # or "meta-llama/Llama-2-7b-hf", or a folder

# %%
import logging

from mlx_resonance import Checkpoint, default_frequencies

logging.getLogger("mlx_resonance").setLevel(logging.ERROR)  # no line about a missing GPU
rope = Checkpoint.open(CHECKPOINT, weights=False).rope
plain = default_frequencies(rope.dims, rope.base)
TRAINED, LONGER = rope.trained_length, 8 * rope.trained_length
print(f"heads of {rope.dims} features, base {rope.base:g}; trained on {TRAINED} tokens, here read at {LONGER}")

# %% [markdown]
# ## Wavelengths
#
# At position $m$, pair $i$ of a head with $d$ features has turned by $m \, \theta^{-2i/d}$ radians, where $\theta$ is
# the base. Its *wavelength* $\lambda_i = 2\pi \, \theta^{2i/d}$ is the number of tokens for a full turn.

# %%
from figures.rope import wavelengths

wavelengths(plain, TRAINED, LONGER)

# %% [markdown]
# The first pair turns once in 6.28 tokens. Each pair is slower than the one before, by the same ratio. The last one
# does not complete a turn within the training length.

# %%
import numpy as np

ratios = plain.wavelengths[1:] / plain.wavelengths[:-1]
assert plain.wavelengths[0] == 2 * np.pi
assert np.allclose(ratios, rope.base ** (2 / rope.dims)) and ratios.min() > 1
assert plain.wavelengths[-1] > TRAINED
turns = TRAINED / plain.wavelengths
print(f"turns in training: {turns[0]:.1f} of the first, {turns[-1]:.3f} of the last")

# %% [markdown]
# ## Why position 4097 is new
#
# Three pairs on their circles, in a model that was trained on 30 tokens and reads 60. With a wavelength of $2\pi$ no
# angle ever comes back: the second turn lands between the angles of the first. With a wavelength of 6 there are six
# angles. The slow pair on the right enters an arc where it has never been; rounding does not change that.

# %%
from figures.rope import circles

circles([2 * np.pi, 6, 40.7], train_length=30, test_length=60)


# %%
def angles(wavelength, start, end):
    return set(np.round(np.arange(start, end) / wavelength % 1, 9))  # in turns


assert not angles(2 * np.pi, 0, 30) & angles(2 * np.pi, 30, 60)
assert angles(6, 30, 60) == angles(6, 0, 30) and len(angles(6, 0, 60)) == 6
assert max(angles(40, 0, 30)) < 0.75 and 0.75 in angles(40, 30, 60)  # 40.7, rounded down

# %% [markdown]
# The same in LLaMA 2, which has heads of 128 features and was trained on 4096 tokens, positions 0 to 4095. The token
# after these, the 4097th, is at an angle that the model has not seen, in every one of its 64 pairs. To a model that was
# trained with rounded wavelengths, it shows nothing new in 46 of them. `feature_gap` measures how far each new angle
# lies from the nearest one that was seen in training, on a circle with radius 1; `trained` are the angles of training.

# %%
from mlx_resonance import feature_gap

llama2 = default_frequencies(128, base=10000)
as_computed = feature_gap(llama2, 4096, 4097, trained=llama2)
rounded = feature_gap(llama2.resonate(), 4096, 4097, trained=llama2.resonate())
assert np.all(as_computed > 0)
assert np.sum(rounded == 0) == 46

# %% [markdown]
# ## What rounding changes
#
# Now for all positions of a text eight times as long as those of training: the largest distance between one of its
# angles and the nearest one seen in training, pair by pair. Back to the checkpoint of the first cell, which was trained
# with the wavelengths as computed. They can be rounded after training or, for another model, before.

# %%
from figures.rope import gaps

resonant = plain.resonate()
before = feature_gap(plain, TRAINED, LONGER, trained=plain)
moved = feature_gap(resonant, TRAINED, LONGER, trained=plain)
after = feature_gap(resonant, TRAINED, LONGER, trained=resonant)
gaps({"as computed": before, "rounded after training": moved, "rounded before training": after})

# %% [markdown]
# A pair whose rounded wavelength fits into the training length is called *pre-critical*. In a model that is trained
# with the rounded wavelengths, the gap of these pairs is exactly zero. Rounding after training does not close it: it
# moves the angles away from those of training. The other pairs keep theirs.

# %%
critical = resonant.critical_pairs(TRAINED)
assert np.all(before > 0) and np.all(moved > 0)
assert np.all(after[:critical] == 0) and np.all(after[critical:] > 0)
assert np.allclose(before[critical:].sum(), [moved[critical:].sum(), after[critical:].sum()], rtol=0.01)
print(f"{critical} of {len(after)} pairs are pre-critical; their gaps in all:")
print(f"as computed {before[:critical].sum():.3f}, rounded after training {moved[:critical].sum():.3f}, before it 0")
print(f"the others: {before[critical:].sum():.2f}, {moved[critical:].sum():.2f}, {after[critical:].sum():.2f}")

# %% [markdown]
# Zero sounds like a lot, yet it is a small part of the whole: the fast pairs have been nearly everywhere on their
# circles, so a new angle is close to a known one anyway. Whether a model benefits has to be measured (notebooks 4
# and 5).
#
# `mlx-resonance inspect` shows the feature gap of a checkpoint to the angles that it was trained with. `convert` and
# `finetune` write those into a record beside the weights; without one, `inspect` assumes plain RoPE and says so.

# %%
assert before[:critical].sum() < 0.02 * before.sum()

# %% [markdown]
# ## What rounding costs
#
# A wavelength changes by half a token at most. For a slow pair that is nothing; the first pair turns in 6 tokens, not
# 6.28, a change of 4.5 %. [Notebook 2](02-convert-a-checkpoint.ipynb) measures what that does to a model that was
# trained without rounding.

# %%
from figures.rope import shifts

shifts(plain)

# %%
change = plain.angle_shift()
assert np.all(change <= 0.5 / plain.wavelengths)
assert round(100 * change[0], 1) == 4.5

# %% [markdown]
# ## YaRN's ramp
#
# The slow pairs need something else. YaRN leaves the fast ones unchanged and stretches the slow ones by the factor by
# which the text is longer; between the two there is a ramp. On the right: how far each pair gets around its circle.
# Where a line is above the dotted one, the pair reaches angles that it has not seen in training. With RoPE all slow
# pairs do; with YaRN none does.

# %%
from mlx_resonance import yarn_frequencies

from figures.rope import arcs

yarn = yarn_frequencies(rope.dims, rope.base, factor=8, original_max_position_embeddings=TRAINED)
arcs(plain, yarn, TRAINED, LONGER)

# %%
stretch = yarn.wavelengths / plain.wavelengths
assert np.isclose(stretch[0], 1) and np.isclose(stretch[-1], 8) and np.all(np.diff(stretch) > -1e-9)
slow = plain.wavelengths > TRAINED
seen = np.minimum(TRAINED / plain.wavelengths, 1)
assert np.all(np.minimum(LONGER / plain.wavelengths, 1)[slow] > seen[slow])
assert np.all(np.minimum(LONGER / yarn.wavelengths, 1) <= seen + 1e-12)

# %% [markdown]
# Resonance-YaRN rounds the wavelengths that YaRN computes: first the stretch, then the rounding. To this checkpoint,
# trained with plain RoPE, the slow pairs then show angles close to known ones; for the fast ones little changes. In a
# model that is fine-tuned with them on its old length, the pre-critical pairs again have no gap.

# %%
both = yarn.resonate()
critical = both.critical_pairs(TRAINED)
converted = feature_gap(both, TRAINED, LONGER, trained=plain)
tuned = feature_gap(both, TRAINED, LONGER, trained=both)
assert both.is_resonant and not yarn.is_resonant
assert np.all(converted > 0) and converted[critical:].sum() < 0.01 * before[critical:].sum()
assert np.all(tuned[:critical] == 0)
assert np.all(feature_gap(yarn, TRAINED, LONGER, trained=yarn)[:critical] > 0)
print(f"converted: {converted[:critical].sum():.2f} in the fast pairs, {converted[critical:].sum():.2f} in the others")
print(f"fine-tuned: {tuned[:critical].sum():.0f} in the fast pairs, {tuned[critical:].sum():.2f} in the others")

# %% [markdown]
# ## Exact phases
#
# Float32 has 24 bits. At position 10 million nearly all of them go into the number of turns, and few are left to say
# where on the circle an angle is; `mx.fast.rope` multiplies in float32. With a whole wavelength the phase is an integer
# problem: `position mod wavelength` is exact, and the remaining angle is small. This package's op does that, also on a
# GPU. Both get the same rounded wavelengths here; the reference is computed in float64.

# %%
import mlx.core as mx

LENGTH, freqs = 64, mx.array(resonant.wavelengths / (2 * np.pi), dtype=mx.float32)
# First half of the features 1, second half 0: rotated, they are the cosines and the sines of the angles.
ones = mx.concatenate([mx.ones((1, 1, LENGTH, rope.dims // 2)), mx.zeros((1, 1, LENGTH, rope.dims // 2))], axis=-1)


def error(rotated, position):
    positions = np.arange(position, position + LENGTH)[:, None]
    angle = 2 * np.pi * (positions % resonant.wavelengths.astype(np.int64)) / resonant.wavelengths
    return np.abs(np.array(rotated[0, 0], np.float64) - np.hstack([np.cos(angle), np.sin(angle)])).max()


# %%
from mlx_resonance import ResonanceRoPE

ours = ResonanceRoPE(resonant)
positions = [10**k for k in range(1, 10)] + [2**31 - LENGTH]
float32 = [
    error(mx.fast.rope(ones, rope.dims, traditional=False, base=None, scale=1.0, offset=p, freqs=freqs), p)
    for p in positions
]
exact = [error(ours(ones, offset=p), p) for p in positions]

# %%
from figures.rope import errors

measured = {"mx.fast.rope": float32, "ours": exact}
errors(positions, measured, 2.5e-7, "largest error of cos and sin")

# %%
assert max(exact) <= 2.5e-7
assert float32[positions.index(10**7)] > 0.1
assert not float32[-1] < 1  # the angle is anywhere

# %% [markdown]
# Positions a wavelength apart are not only close, they give the same bits: here in pair 3.

# %%
wavelength = int(resonant.wavelengths[3])
near, far = ours(ones, offset=5), ours(ones, offset=5 + 10**6 * wavelength)
assert mx.array_equal(near[..., 3], far[..., 3]).item()

# %% [markdown]
# ## Try it
#
# Move a slider: the figure follows. A factor above 1 turns YaRN on; the dashed line is then RoPE without it. The gap is
# that of a model trained with plain RoPE and, in green, of one trained with the rounded wavelengths.

# %%
import ipywidgets as widgets

look = {"continuous_update": False, "style": {"description_width": "8em"}, "layout": {"width": "32em"}}
lengths, bases = [256, 512, 1024, 2048, 4096, 8192], [10_000, 500_000, 1_000_000]
controls = {
    "trained": widgets.SelectionSlider(options=lengths, value=1024, description="trained on", **look),
    "times": widgets.IntSlider(8, 2, 16, description="text, times that", **look),
    "factor": widgets.FloatSlider(1, min=1, max=16, step=0.5, description="YaRN factor", **look),
    "head_dim": widgets.SelectionSlider(options=[32, 64, 96, 128], value=64, description="head_dim", **look),
    "base": widgets.SelectionSlider(options=bases, description="base", **look),
}

# %%
from figures.rope import playground

picture = widgets.Image(format="png", layout={"max_width": "850px"})


def draw(change=None):
    picture.value = playground(**{name: control.value for name, control in controls.items()}).png()


for control in controls.values():
    control.observe(draw, "value")

# %%
draw()
widgets.VBox([*controls.values(), picture])

# %% [markdown]
# No sliders, as on GitHub or on paper? This is the figure they start with.

# %%
start = {"trained": 1024, "times": 8, "factor": 1, "head_dim": 64, "base": 10_000}
assert start == {name: control.value for name, control in controls.items()}
playground(**start)

# %% [markdown]
# Another factor gives another figure.

# %%
before = picture.value
controls["factor"].value = 8  # as a hand would
after, controls["factor"].value = picture.value, 1
assert before != after and before == picture.value

# %% [markdown]
# Next: [convert a checkpoint](02-convert-a-checkpoint.ipynb) to these angles.
