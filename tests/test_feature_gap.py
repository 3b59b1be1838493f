"""The feature gap: how far a longer text takes each feature pair from the angles seen in training."""

from __future__ import annotations

import math

from mlx_resonance import RotaryFrequencies, default_frequencies, feature_gap, yarn_frequencies
from mlx_resonance.errors import UsageError

import numpy as np
import pytest

from . import oracle


def brute_force_gap(wavelengths, train_length, test_length):
    """The definition, position by position: distances between points on the unit circle."""

    def point(m, wavelength):
        angle = 2 * math.pi * oracle.turns(m, wavelength)
        return complex(math.cos(angle), math.sin(angle))

    return [
        max(min(abs(point(m, λ) - point(n, λ)) for n in range(train_length)) for m in range(train_length, test_length))
        for λ in wavelengths
    ]


@pytest.mark.parametrize("resonant", [False, True])
@pytest.mark.parametrize("train_length, test_length", [(1, 2), (13, 40), (64, 80)])
def test_feature_gap_is_its_definition(train_length, test_length, resonant):
    frequencies = yarn_frequencies(16, 100, 4, 32, beta_fast=4)
    frequencies = frequencies.resonate() if resonant else frequencies
    expected = brute_force_gap(frequencies.wavelengths.tolist(), train_length, test_length)
    np.testing.assert_allclose(feature_gap(frequencies, train_length, test_length), expected, rtol=0, atol=1e-13)


def test_feature_gap_to_other_angles_of_training():
    """Against every pair of positions, by complex numbers."""
    trained, tested = default_frequencies(16, 100), yarn_frequencies(16, 100, 4, 32, beta_fast=4).resonate()
    seen = np.exp(2j * np.pi * np.arange(30)[:, None] / trained.wavelengths)
    new = np.exp(2j * np.pi * np.arange(30, 100)[:, None] / tested.wavelengths)
    expected = np.abs(new[:, None] - seen).min(axis=1).max(axis=0)
    np.testing.assert_allclose(feature_gap(tested, 30, 100, trained), expected, rtol=0, atol=1e-13)
    assert np.any(feature_gap(tested, 30, 100) < expected - 0.01)
    with pytest.raises(UsageError, match="trained has 4 pairs, expected 8"):
        feature_gap(tested, 30, 100, default_frequencies(8))


def test_rounding_closes_the_gap_of_every_pre_critical_pair():
    plain = yarn_frequencies(64, 10000, 4, 512)
    resonant = plain.resonate()
    seen = resonant.wavelengths <= 512
    assert 0 < seen.sum() < len(seen)
    np.testing.assert_array_equal(feature_gap(resonant, 512, 2048)[seen], 0)
    assert np.all(feature_gap(plain, 512, 2048)[seen] > 1e-5)
    assert np.all(feature_gap(resonant, 512, 2048)[~seen] > 0)


def test_feature_gap_of_one_length_is_zero():
    np.testing.assert_array_equal(feature_gap(default_frequencies(8), 7, 7), np.zeros(4))


def test_feature_gap_of_a_pair_that_never_turns_is_zero():
    assert feature_gap(RotaryFrequencies(np.array([np.inf])), 4, 100) == [0]


@pytest.mark.parametrize("train_length, test_length", [(0, 10), (-1, 10), (10, 9), (10, 2**24 + 1)])
def test_feature_gap_refuses_lengths_out_of_range(train_length, test_length):
    with pytest.raises(UsageError, match=r"\[feature_gap\] .*test_length"):
        feature_gap(default_frequencies(8), train_length, test_length)
