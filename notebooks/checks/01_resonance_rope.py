"""Claims of notebook 1."""

from __future__ import annotations

from typing import Any

from mlx_resonance import feature_gap

import mlx.core as mx
import numpy as np
from figures import Picture


def position_4097_is_new_in_every_pair(theta: Any, seen: Any, angle: float) -> None:
    assert np.abs(seen - angle).min() > 1e-3  # degrees
    turns = np.arange(4096)[:, None] * theta / (2 * np.pi) % 1
    assert np.all(np.abs(turns - 4097 * theta / (2 * np.pi) % 1).min(axis=0) > 0)


def the_layer_rotates_as_numpy_does(rotated: Any, rotate: Any, head: Any) -> None:
    assert np.abs(np.array(rotated).ravel() - rotate(head, 4097)).max() < 2e-6


def scores_depend_on_the_distance(distant: dict[int, float], scores: Any) -> None:
    assert np.ptp(list(distant.values())) < 1e-7
    assert all(np.ptp(np.diagonal(scores, k)) < 1e-9 for k in range(-23, 24))


def wavelengths_grow_by_one_ratio(plain: Any, wavelengths: Any, BASE: int, DIMS: int, TRAINED: int, turns: Any) -> None:
    ratios = plain.wavelengths[1:] / plain.wavelengths[:-1]
    assert plain.wavelengths[0] == 2 * np.pi
    assert np.allclose(ratios, BASE ** (2 / DIMS)) and ratios.min() > 1
    assert plain.wavelengths[-1] > TRAINED
    assert np.allclose(wavelengths, plain.wavelengths, rtol=1e-12, atol=0)
    assert turns[0] > 100 and turns[-1] < 1


def pair_10_is_as_the_picture_says(wavelengths: Any, rounded: Any, same: Any) -> None:
    assert round(wavelengths[10], 1) == 26.5 and rounded[10] == 26 and int(4096 / wavelengths[10]) == 154
    assert len(same) == 157 and np.all(same % 26 == 4097 % 26)


def the_circles_are_as_told() -> None:
    def angles(wavelength: float, start: int, end: int) -> set[float]:
        return set(np.round(np.arange(start, end) / wavelength % 1, 9))  # in turns

    assert not angles(2 * np.pi, 0, 30) & angles(2 * np.pi, 30, 60)
    assert angles(6, 30, 60) == angles(6, 0, 30) and len(angles(6, 0, 60)) == 6
    assert max(angles(40, 0, 30)) < 0.75 and 0.75 in angles(40, 30, 60)  # 40.7, rounded down


def at_4096_all_pairs_are_new_and_18_if_rounded(as_computed: Any, rounded_gap: Any) -> None:
    assert np.all(as_computed > 0)
    assert np.sum(rounded_gap == 0) == 46


def the_library_measures_the_gap_of_the_formula(by_hand: float, by_library: float) -> None:
    assert abs(by_hand - by_library) < 1e-9


def rounding_before_training_closes_the_fast_pairs_gap(before: Any, moved: Any, after: Any, critical: int) -> None:
    assert np.all(before > 0) and np.all(moved > 0)
    assert np.all(after[:critical] == 0) and np.all(after[critical:] > 0)
    others = [moved[critical:].sum(), after[critical:].sum()]
    assert np.allclose(before[critical:].sum(), others, rtol=0.01)


def that_gap_is_a_small_part(before: Any, critical: int) -> None:
    assert before[:critical].sum() < 0.02 * before.sum()


def rounding_moves_the_first_pair_by_4_5_percent(plain: Any) -> None:
    change = plain.angle_shift()
    assert np.all(change <= 0.5 / plain.wavelengths)
    assert round(100 * change[0], 1) == 4.5


def yarns_ramp_is_the_formula(stretched: Any, yarn: Any) -> None:
    assert np.allclose(stretched, yarn.wavelengths, rtol=1e-12, atol=0)


def yarn_stretches_the_slow_pairs(plain: Any, yarn: Any, TRAINED: int, LONGER: int) -> None:
    stretch = yarn.wavelengths / plain.wavelengths
    assert np.isclose(stretch[0], 1) and np.isclose(stretch[-1], 8) and np.all(np.diff(stretch) > -1e-9)
    slow, seen = plain.wavelengths > TRAINED, np.minimum(TRAINED / plain.wavelengths, 1)
    assert np.all(np.minimum(LONGER / plain.wavelengths, 1)[slow] > seen[slow])
    assert np.all(np.minimum(LONGER / yarn.wavelengths, 1) <= seen + 1e-12)


def resonance_yarn_closes_both(
    both: Any, yarn: Any, converted: Any, tuned: Any, before: Any, TRAINED: int, LONGER: int
) -> None:
    critical = both.critical_pairs(TRAINED)
    assert both.is_resonant and not yarn.is_resonant
    assert np.all(converted > 0) and converted[critical:].sum() < 0.01 * before[critical:].sum()
    assert np.all(tuned[:critical] == 0)
    assert np.all(feature_gap(yarn, TRAINED, LONGER, trained=yarn)[:critical] > 0)


def phases_are_exact(measured: dict[str, list[float]], positions: list[int], in_float32: float, exact: float) -> None:
    theirs, ours = measured.values()
    assert max(ours) <= 2.5e-7
    assert theirs[positions.index(10**7)] > 0.1
    assert not theirs[-1] < 1  # the angle is anywhere
    right = np.cos(2 * np.pi * (10**7 % 26) / 26)
    assert abs(in_float32 - right) > 1e-2 and abs(exact - right) < 2.5e-7


def a_wavelength_on_the_bits_are_the_same(near: Any, far: Any, ours: Any, ones: Any, resonant: Any) -> None:
    assert mx.array_equal(near[..., 10], far[..., 10]).item()
    period = int(resonant.wavelengths[3])
    assert mx.array_equal(ours(ones, offset=5)[..., 3], ours(ones, offset=5 + 10**6 * period)[..., 3]).item()


def a_slider_changes_the_figure(controls: Any, chosen: Any, live: Any) -> None:
    assert {name: control.value for name, control in controls.items()} == {
        "trained": 4096, "times": 8, "factor": 1, "head_dim": 128, "base": 10_000,
    }  # fmt: skip
    first, shown = chosen().png(), []
    live.update = lambda picture: shown.append(picture)
    controls["factor"].value = 8  # as a hand would
    controls["factor"].value = 1
    assert all(isinstance(picture, Picture) for picture in shown)
    assert shown[0].png() != first == shown[1].png()


def a_checkpoint_gives_the_same_numbers(rope: Any, whole: int) -> None:
    assert (rope.dims, rope.base, rope.trained_length) == (64, 10_000, 512) and whole == 16
