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
# # 1. Resonance RoPE: why position 4097 is new, and what rounding does
#
# After this notebook you can
#
# - write RoPE in five lines of NumPy, and say why a score depends on a distance
#   alone;
# - say what LLaMA 2, which was trained on 4096 tokens, meets at position 4097, and
#   how rounding changes that;
# - read YaRN's ramp, and tell what it solves from what rounding solves;
# - compute an angle at position ten million exactly.
#
# It takes about 20 seconds. Nothing is downloaded: all numbers follow from three of
# LLaMA 2's settings.

# %%
import logging

import numpy as np

logging.getLogger("mlx_resonance").setLevel(
    logging.ERROR
)  # no line about a missing GPU
DIMS, BASE, TRAINED = 128, 10_000, 4096  # of LLaMA 2: features of a head, base, tokens

# %% [markdown]
# ## A number
#
# The features of a head come in pairs. At position $m$, RoPE turns pair $i$ by the
# angle
#
# $$m\,\theta_i, \qquad \theta_i = b^{-2i/d},$$
#
# with $d$ features and the base $b$. Pair 10 at position 4097:

# %%
theta = BASE ** (-2 * np.arange(DIMS // 2) / DIMS)  # radians per token, one per pair
angle = np.degrees(4097 * theta[10]) % 360
print(f"{angle:.4f} degrees")

# %% [markdown]
# In training the model saw positions 0 to 4095. Which of their angles came closest?

# %%
seen = np.degrees(np.arange(TRAINED) * theta[10]) % 360
nearest = seen[np.abs(seen - angle).argmin()]
print(f"{nearest:.4f} degrees, {abs(nearest - angle):.4f} away")

# %% [markdown]
# Close, but not the same: the model has never seen the angle of position 4097. That
# holds for all 64 pairs, and for every position after it.

# %% [markdown]
# ## The rotation
#
# "Turns" is meant literally. A pair $(x, y)$ is a point in the plane, and RoPE
# multiplies it by a rotation:
#
# $$R_m \begin{pmatrix} x \\ y \end{pmatrix}
# = \begin{pmatrix} \cos m\theta & -\sin m\theta \\ \sin m\theta & \cos m\theta
# \end{pmatrix} \begin{pmatrix} x \\ y \end{pmatrix}$$
#
# A LLaMA keeps $x$ of pair $i$ in feature $i$, and $y$ in feature $i + d/2$:


# %%
def rotate(head, m):
    x, y = np.split(head, 2)
    cos, sin = np.cos(m * theta), np.sin(m * theta)
    return np.concatenate([x * cos - y * sin, x * sin + y * cos])


# %% [markdown]
# The library's layer does the same, in float32 and for many heads at once.

# %%
from mlx_resonance import ResonanceRoPE, default_frequencies

import mlx.core as mx

head = np.random.default_rng(0).normal(size=DIMS)
layer = ResonanceRoPE(default_frequencies(DIMS, BASE))
rotated = layer(mx.array(head, mx.float32).reshape(1, 1, 1, DIMS), offset=4097)
difference = np.abs(np.array(rotated).ravel() - rotate(head, 4097)).max()
print(f"largest difference: {difference:.1e}")

# %% [markdown]
# ## A score depends on $m - n$ alone
#
# Attention compares a query at position $m$ with a key at position $n$. Both have
# been turned, and turning one back undoes the other:
#
# $$(R_m q) \cdot (R_n k) = q^\top R_m^\top R_n\, k = q^\top R_{n-m}\, k$$
#
# Three places in a text, each with 100 tokens between query and key:

# %%
q, k = np.random.default_rng(1).normal(size=(2, DIMS))
distant = {m: rotate(q, m) @ rotate(k, m - 100) for m in (100, 4097, 1_000_000)}
for m, score in distant.items():
    print(f"query at {m:>9,}, key at {m - 100:>9,}: score {score:.9f}")

# %% [markdown]
# All scores of the first 24 positions: every diagonal has one color.

# %%
from figures import figure_of

scores = np.array([[rotate(q, m) @ rotate(k, n) for n in range(24)] for m in range(24)])
figure, (axis,) = figure_of(
    "Scores of 24 queries with 24 keys, as colors: constant along every diagonal.",
    size=(3.6, 3),
)
image = axis.imshow(scores, cmap="cividis")
axis.set(xlabel="position of the key", ylabel="position of the query")
axis.grid(False)
figure.colorbar(image, label="score")
figure

# %% [markdown]
# So what a model learns about an angle it learns about a distance. A distance of 4097
# tokens shows it the angle of position 4097.

# %% [markdown]
# ## Wavelengths
#
# The number of tokens for a full turn is a pair's *wavelength*:
#
# $$\lambda_i = \frac{2\pi}{\theta_i} = 2\pi\, b^{2i/d}$$

# %%
wavelengths = 2 * np.pi * BASE ** (2 * np.arange(DIMS // 2) / DIMS)
plain = default_frequencies(DIMS, BASE)
print(f"first {wavelengths[0]:.2f}, last {wavelengths[-1]:,.0f} tokens")
print(f"largest difference: {np.abs(wavelengths - plain.wavelengths).max():.1e}")

# %%
from figures.rope import wavelengths as draw_wavelengths

LONGER = 8 * TRAINED
draw_wavelengths(plain, TRAINED, LONGER)

# %% [markdown]
# The fast pairs turn hundreds of times in 4096 tokens. The slow ones do not get
# around once. They have different problems past position 4095, and different
# remedies.

# %%
turns = TRAINED / wavelengths
print(
    f"turns in training: {turns[0]:.1f} of the first, {turns[-1]:.3f} of the last pair"
)

# %% [markdown]
# ## A picture
#
# Pair 10 has turned 154 times in training, and has never been where position 4097
# puts it. Its wavelength is 26.5 tokens. With a wavelength of exactly 26 it would
# have been there 157 times. Both circles, magnified around the angle of position
# 4097:

# %%
figure, axes = figure_of(
    "Angles of pair 10 seen in training, near that of position 4097. With a wavelength "
    "of 26.5 the new angle lies between two of them, with one of 26 on one of them.",
    rows=2,
    size=(7, 2.4),
)
for axis, wavelength in zip(axes, (wavelengths[10], 26), strict=True):
    new = 360 * (4097 / wavelength % 1)
    others = 360 * (np.arange(TRAINED) / wavelength % 1)
    axis.plot(others - new, np.zeros(TRAINED), "|", markersize=22, color="#0072B2")
    axis.plot(0, 0, "^", markersize=8, color="#D55E00")
    axis.set(xlim=(-0.3, 0.3), ylim=(-1, 1), yticks=[])
    axis.set_title(f"wavelength {wavelength:.4g}", loc="left", fontsize=9)
axes[0].tick_params(labelbottom=False)
axes[1].set_xlabel(
    "degrees from the angle of position 4097 (triangle); lines: training"
)
figure

# %% [markdown]
# The whole circle is easier to see with a smaller model, which was trained on 30
# tokens and reads 60. With a wavelength of $2\pi$ no angle ever comes back. With 6
# there are six angles, seen again and again. The slow pair on the right enters an arc
# where it has never been, and rounding does not change that.

# %%
from figures.rope import circles

circles([2 * np.pi, 6, 40.7], train_length=30, test_length=60)

# %% [markdown]
# ## The rule
#
# Resonance RoPE rounds every wavelength to a whole number of tokens,
#
# $$\tilde\lambda_i = \mathrm{round}(\lambda_i),$$
#
# so that positions $m$ and $m + \tilde\lambda_i$ have *the same* angle. A pair that
# turns fully in training, $\tilde\lambda_i \le L$, then shows nothing new, however
# long the text. The paper calls these pairs *pre-critical*.

# %%
rounded = np.round(wavelengths)
resonant = plain.resonate()
print(f"largest difference: {np.abs(rounded - resonant.wavelengths).max():.1e}")

# %%
same = np.flatnonzero(np.arange(TRAINED) % rounded[10] == 4097 % rounded[10])
print(f"pair 10 at 4097: like at {same[:4]} …, {len(same)} positions in training")
print(f"pre-critical: {np.sum(rounded <= TRAINED)} of {len(rounded)} pairs")

# %% [markdown]
# ## How new is new?
#
# The paper's *feature gap* measures it: for each pair, the largest distance between
# an angle of the longer text and the nearest one of training, as points on a circle
# with radius 1:
#
# $$\max_{L \le m < L'} \; \min_{0 \le n < L} \;
# \left| e^{2\pi i\, m/\lambda} - e^{2\pi i\, n/\lambda} \right|$$


# %%
def gap_of(wavelength, length, longer):
    points = np.exp(2j * np.pi * np.arange(longer) / wavelength)
    return max(np.abs(new - points[:length]).min() for new in points[length:])


# %% [markdown]
# The library finds the same for all pairs at once. Pair 10, up to position 8191:

# %%
from mlx_resonance import feature_gap

by_hand = gap_of(wavelengths[10], TRAINED, 2 * TRAINED)
by_library = feature_gap(plain, TRAINED, 2 * TRAINED)[10]
print(f"{by_hand:.6f} and {by_library:.6f}, difference {abs(by_hand - by_library):.1e}")

# %% [markdown]
# Position 4096, the first new one: how many of the 64 pairs show LLaMA 2 an angle
# that it has not seen? And a model that was *trained* with rounded wavelengths?

# %%
as_computed = feature_gap(plain, TRAINED, TRAINED + 1)
rounded_gap = feature_gap(resonant, TRAINED, TRAINED + 1)
print(f"{np.sum(as_computed > 0)} with plain RoPE, {np.sum(rounded_gap > 0)} rounded")

# %% [markdown]
# All positions of a text of 32,768 tokens, pair by pair. `trained` are the
# wavelengths of training: a checkpoint that was trained with plain RoPE can be
# rounded afterwards.

# %%
before = feature_gap(plain, TRAINED, LONGER, trained=plain)
moved = feature_gap(resonant, TRAINED, LONGER, trained=plain)
after = feature_gap(resonant, TRAINED, LONGER, trained=resonant)

# %%
from figures.rope import gaps

gaps(
    {
        "as computed": before,
        "rounded after training": moved,
        "rounded before training": after,
    }
)

# %% [markdown]
# Rounded *before* training, the pre-critical pairs have no gap at all. Rounding
# *after* training does not close it: the rounded angles lie between those of
# training, as any other angle does. The slow pairs keep their gap either way.

# %%
critical = resonant.critical_pairs(TRAINED)
for name, gap in (("as computed", before), ("after", moved), ("before", after)):
    print(
        f"{name:11}  {gap[:critical].sum():5.2f} fast  {gap[critical:].sum():5.2f} slow"
    )

# %% [markdown]
# Zero sounds like a lot, yet it is a small part of the whole: the fast pairs have
# been nearly everywhere on their circles, so a new angle is close to a known one
# anyway. Whether a model benefits has to be measured (notebooks 4 and 5).

# %% [markdown]
# ## What rounding costs
#
# A wavelength changes by half a token at most. For a slow pair that is nothing; the
# first pair turns in 6 tokens instead of 6.28, a change of 4.5 %.

# %%
from figures.rope import shifts

shifts(plain)

# %% [markdown]
# ## YaRN's ramp
#
# The slow pairs need something else. For a text that is longer by the factor $s$,
# YaRN stretches them, so that they get no further around their circles than in
# training:
#
# $$\theta_i' = \gamma_i\,\theta_i + (1 - \gamma_i)\,\frac{\theta_i}{s}$$
#
# $\gamma_i$ is a ramp over the pairs: 1 for those that turn more than 32 times in
# training, 0 for those that do not turn once.


# %%
def pair_that_turns(times):
    return DIMS * np.log(TRAINED / (2 * np.pi * times)) / (2 * np.log(BASE))


low, high = np.floor(pair_that_turns(32)), np.ceil(pair_that_turns(1))
gamma = 1 - np.clip((np.arange(DIMS // 2) - low) / (high - low), 0, 1)
stretched = wavelengths / (gamma + (1 - gamma) / 8)

# %%
from mlx_resonance import yarn_frequencies

yarn = yarn_frequencies(DIMS, BASE, factor=8, original_max_position_embeddings=TRAINED)
difference = np.abs(stretched / yarn.wavelengths - 1).max()
print(f"ramp from pair {low:.0f} to {high:.0f}; largest difference: {difference:.1e}")

# %% [markdown]
# On the right: how far each pair gets around its circle. Where a line is above the
# dotted one, the pair reaches angles that it has not seen in training.

# %%
from figures.rope import arcs

arcs(plain, yarn, TRAINED, LONGER)

# %% [markdown]
# Resonance-YaRN rounds the wavelengths that YaRN computes: first the stretch, then
# the rounding. In a checkpoint that was trained with plain RoPE, the slow pairs then
# reach only angles close to known ones. Fine-tuning at the old length removes the gap
# of the fast pairs, too.

# %%
both = yarn.resonate()
tuned = feature_gap(both, TRAINED, LONGER, trained=both)
converted = feature_gap(both, TRAINED, LONGER, trained=plain)
critical_yarn = both.critical_pairs(TRAINED)
for name, gap in (("plain RoPE", before), ("converted", converted)):
    fast, slow = gap[:critical_yarn].sum(), gap[critical_yarn:].sum()
    print(f"{name:10}  {fast:5.2f} fast  {slow:6.2f} slow")
print(f"fine-tuned  {tuned[:critical_yarn].sum():5.2f} fast")

# %% [markdown]
# ## Exact phases
#
# Float32 has 24 bits. At position ten million, nearly all of them go into the number
# of turns, and few are left to say where on the circle an angle is:

# %%
m = 10_000_000
in_float32 = np.cos(np.float32(m) * np.float32(2 * np.pi / 26))
print(f"float32 {in_float32:.6f}, float64 {np.cos(m * 2 * np.pi / 26):.6f}")

# %% [markdown]
# With a whole wavelength that is a problem of integers: `m % 26` is exact, and the
# angle that remains is small.

# %%
exact = np.cos(np.float32(2 * np.pi) * np.float32((m % 26) / 26))
print(f"float32 {exact:.6f}, after the remainder")

# %% [markdown]
# The library's kernel does this on a GPU as well. `mx.fast.rope` multiplies in
# float32. Both get the same rounded wavelengths here; the reference is computed in
# float64.

# %%
LENGTH, half = 64, DIMS // 2
periods = mx.array(resonant.wavelengths / (2 * np.pi), dtype=mx.float32)  # 1 / theta
# First half of the features 1, second half 0: rotated, they are cosines and sines.
ones = mx.concatenate(
    [mx.ones((1, 1, LENGTH, half)), mx.zeros((1, 1, LENGTH, half))], -1
)


def error(rotated, position):
    m = np.arange(position, position + LENGTH)[:, None]
    turn = m % resonant.wavelengths.astype(np.int64) / resonant.wavelengths
    right = np.hstack([np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)])
    return np.abs(np.array(rotated[0, 0], np.float64) - right).max()


# %%
ours = ResonanceRoPE(resonant)
fast = {"traditional": False, "base": None, "scale": 1.0, "freqs": periods}
positions = [10**k for k in range(1, 10)] + [2**31 - LENGTH]
measured = {
    "mx.fast.rope": [
        error(mx.fast.rope(ones, DIMS, offset=p, **fast), p) for p in positions
    ],
    "ours": [error(ours(ones, offset=p), p) for p in positions],
}

# %%
from figures.rope import errors

errors(positions, measured, 2.5e-7, "largest error of cos and sin")

# %% [markdown]
# Positions a wavelength apart are not only close, they give the same bits.

# %%
near = ours(ones, offset=5)
far = ours(ones, offset=5 + 10**7 * 26)
same_bits = mx.array_equal(near[..., 10], far[..., 10]).item()
print(f"pair 10, 260 million tokens on: same bits? {same_bits}")

# %% [markdown]
# ## Your own checkpoint
#
# Any checkpoint has these three settings in its config.json. Put a folder or a
# Hugging Face id here; from the hub, only config.json is fetched.
# `mlx-resonance inspect` prints the rest.

# %%
from importlib.resources import files

from mlx_resonance import Checkpoint

CHECKPOINT = (
    files("mlx_resonance") / "assets" / "stdlib-llama"
)  # the package's tiny one
rope = Checkpoint.open(CHECKPOINT, weights=False).rope
whole = rope.frequencies().resonate().critical_pairs(rope.trained_length)
print(
    f"heads of {rope.dims} features, base {rope.base:g}, {rope.trained_length} tokens"
)
print(f"pre-critical: {whole} of {rope.dims // 2} pairs")

# %% [markdown]
# ## Try it
#
# Move a slider: the figure follows. A factor above 1 turns YaRN on; the dashed line
# is then RoPE without it. Where sliders do not run, as on GitHub, you see the figure
# that they start with.

# %%
import ipywidgets as widgets

look = {
    "continuous_update": False,
    "style": {"description_width": "8em"},
    "layout": {"width": "32em"},
}
lengths = [256, 512, 1024, 2048, 4096, 8192]
bases, heads = [10_000, 500_000, 1_000_000], [32, 64, 96, 128]
choose, slide = widgets.SelectionSlider, widgets.FloatSlider
controls = {
    "trained": choose(options=lengths, value=4096, description="trained on", **look),
    "times": widgets.IntSlider(8, 2, 16, description="text, times that", **look),
    "factor": slide(1, min=1, max=16, step=0.5, description="YaRN factor", **look),
    "head_dim": choose(options=heads, value=128, description="head_dim", **look),
    "base": choose(options=bases, description="base", **look),
}

# %%
from figures import Live
from figures.rope import playground

from IPython.display import display


def chosen():
    return playground(**{name: control.value for name, control in controls.items()})


display(widgets.VBox(list(controls.values())))
live = Live(chosen())
for control in controls.values():
    control.observe(lambda change: live.update(chosen()), "value")

# %% [markdown]
# Next: [convert a checkpoint](02-convert-a-checkpoint.ipynb) to these angles.
