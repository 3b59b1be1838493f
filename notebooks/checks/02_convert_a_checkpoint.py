"""Claims of notebook 2."""

from __future__ import annotations

from typing import Any

from mlx_resonance import Checkpoint, RopeConfig, feature_gap
from mlx_resonance.convert import verify
from mlx_resonance.inspection import Training

import numpy as np


def a_dry_run_writes_nothing(untouched: bool) -> None:
    assert untouched


def the_weights_are_exact(checks: Any, same: Any, made: Any, plan: Any) -> None:
    assert checks["exact"] == checks["tensors"] == len(same) and not checks["problems"]
    assert all(equal.item() for equal in same)
    assert made.weights == plan.weights or abs(made.weights - plan.weights) < 1e5  # bytes of headers


def config_json_has_the_planned_angles(settings: Any, made: Any, plan: Any) -> None:
    assert RopeConfig.from_hf(settings) == made.rope == plan.rope


def the_formula_gives_the_librarys_wavelengths(by_hand: Any, wavelengths: Any, plain: Any, made: Any) -> None:
    assert np.array_equal(by_hand, wavelengths)
    unscaled = RopeConfig(made.rope.dims, base=made.rope.base, max_position_embeddings=512)
    assert np.allclose(plain, unscaled.frequencies().wavelengths, rtol=1e-12, atol=0)


def the_record_has_the_trained_angles(training: Any, CHECKPOINT: str) -> None:
    before = Checkpoint.open(CHECKPOINT, weights=False).rope
    assert training == Training(before, before.trained_length)


def only_fine_tuning_closes_the_fast_pairs_gap(inspection: Any, critical: int, gap: Any) -> None:
    lengths = inspection.train_length, inspection.test_length
    assert critical > 0 and gap[:critical].all()
    assert not feature_gap(inspection.in_use, *lengths, trained=inspection.in_use)[:critical].any()
    unrounded = feature_gap(inspection.unrounded, *lengths, trained=inspection.training.frequencies)
    assert unrounded.max() < 0.2 and gap.max() < 0.2  # out of 2


def rounding_moves_the_fastest_pairs_most(plan: Any, shift: Any) -> None:
    assert plan.largest_shift == shift.max() == shift[:3].max()
    assert round(100 * shift[0], 1) == 4.5


def stock_mlx_lm_refuses_it(refusal: str | None) -> None:
    assert refusal


def one_bit_is_noticed(problems: Any, made: Any, CHECKPOINT: str) -> None:
    assert any("SHA-256" in problem for problem in problems)
    assert any("further from the source" in problem for problem in problems)
    assert not verify(made.path, CHECKPOINT).problems


def wrong_angles_cost_and_rounding_does_not(past: Any, within: Any) -> None:
    assert past["RoPE"] > past["Resonance-YaRN"] + 0.5
    assert past["RoPE"] > within["RoPE"] + 0.5 and past["YaRN"] < within["YaRN"] + 0.1
    assert 0 < within["Resonance-YaRN"] - within["RoPE"] < 0.3
    assert abs(past["Resonance-YaRN"] - past["YaRN"]) < 0.05
    assert abs(within["Resonance-YaRN"] - within["YaRN"]) < 0.05


def quantization_by_hand_is_about_mlxs(restored: Any, by_mlx: Any, groups: Any) -> None:
    errors = [np.linalg.norm(copy - groups) for copy in (restored, np.array(by_mlx).reshape(groups.shape))]
    assert 0.8 < errors[0] / errors[1] < 1.25
    assert errors[0] < 0.15 * np.linalg.norm(groups)


def each_bit_less_doubles_the_error(off: Any, nats: Any, whole: str) -> None:
    assert off["8 bit"] < 1 < off["4 bit"] < 15 < off["3 bit"]
    assert 1.8 < off["3 bit"] / off["4 bit"] < 2.6 and 1.8**4 < off["4 bit"] / off["8 bit"] < 2.6**4
    assert abs(nats["8 bit"] - nats[whole]) < 0.03
    assert nats["3 bit"] > nats["4 bit"] > nats["8 bit"]


def portable_angles_are_the_same(written: Any, difference: float, logits: Any, model: Any, ids: Any) -> None:
    assert written["rope_type"] == "longrope" and difference < 1e-3
    if logits is not None:
        import mlx.core as mx

        ours = np.array(model(mx.array(ids)))
        assert np.abs(ours - logits).max() / np.abs(logits).max() < 5e-3
        assert (ours.argmax(-1) == logits.argmax(-1)).mean() > 0.999
