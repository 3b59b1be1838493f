"""Claims of notebook 3. What is said of numbers is said of the tiny checkpoint, on a CPU where it says so."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from mlx_resonance import generate, stream_generate
from mlx_resonance.positions import position_map

import numpy as np


def the_copy_is_stretched_and_rounded(made: Any, LENGTH: int, TRAINED: int) -> None:
    assert made.rope.rope_type == "resonance_yarn" and made.rope.frequencies().is_resonant
    assert LENGTH == 4 * TRAINED


def the_document_was_read_in_chunks(read: Any, prompt: Any, written: Any) -> None:
    assert read[-1][1] == len(prompt) and len(read) > 2
    assert written[-1][0] > read[-1][0] and written[-1][1] <= len(prompt) + 30


def the_answers_are_right(answer: str, answer2: str, real: bool) -> None:
    right = ("finally", "exception") if real else ("34718", "34718")
    assert right[0] in answer and right[1] in answer2


def the_second_question_is_read_alone(prompt: Any, prompt2: Any, new: int) -> None:
    assert 0 < new < 40 and len(prompt) > 1500 and len(prompt2) > 1500


def the_cache_changes_no_answer(
    real: bool, small: Any, tokens_of: Any, prompt: Any, prompt2: Any, answer: str, answer2: str
) -> None:
    if not real:  # with the real one it takes minutes
        assert generate(small, tokens_of, prompt, max_tokens=12) == answer
        assert generate(small, tokens_of, prompt2, max_tokens=12) == answer2


def the_modules_were_not_trained_on(modules: list[str], TINY: Any, tokens: Any, LENGTH: int) -> None:
    assert set(modules) <= set(json.loads((TINY / "training.json").read_text())["held_out_files"])
    assert len(tokens) == LENGTH


def yarn_keeps_the_loss_down_past_the_trained_length(loss: Any, TRAINED: int) -> None:
    inside = {name: values[: TRAINED - 1].mean() for name, values in loss.items()}
    past = {name: values[TRAINED - 1 :].mean() for name, values in loss.items()}
    assert past["RoPE"] > inside["RoPE"] + 0.5
    assert past["Resonance-YaRN"] < inside["Resonance-YaRN"] + 0.1
    assert abs(inside["Resonance-YaRN"] - inside["RoPE"]) < 0.1
    assert abs(inside["Resonance-YaRN"] - inside["YaRN"]) < 0.02 and abs(past["Resonance-YaRN"] - past["YaRN"]) < 0.02


def distances_stay_below_the_trained_length(distance: Any, w: int, g: int, TRAINED: int) -> None:
    assert [distance(1800, 1800 - back) for back in (1, w - 1)] == [1, w - 1]
    assert max(distance(1800, j) for j in range(1801)) < TRAINED
    (run,) = position_map("dynamic", TRAINED).runs(1800, 1801)
    far, near = run.pieces
    keys = np.arange(far.end[0])
    moved = far.queries[0] - position_map("dynamic", TRAINED).of_keys(run.form, keys)
    assert run.form == g and [distance(1800, j) for j in keys] == moved.tolist()
    assert near.first[0] == far.end[0] == 1801 - w


def the_extended_model_finds_what_the_plain_one_does_not(answers: dict[str, str]) -> None:
    assert "34718" in answers["extend dynamic"] and "34718" not in answers["plain"]


def prompt_lookup_saves_passes_and_changes_nothing(found: Any) -> None:
    (plain, ones), (same, sizes) = found.values()
    assert plain == same and set(ones) == {1}
    assert len(sizes) < len(same) / 2


def the_same_seed_gives_the_same_text(small: Any, tokens_of: Any, asked: Any) -> None:
    how = {"max_tokens": 16, "temp": 0.5, "seed": 1}
    one, other = ([x.token for x in stream_generate(small, tokens_of, asked, **how)] for _ in range(2))
    assert one == other


def the_plan_adds_up(plans: Any, LENGTH: int, kv_by_hand: int, whole: str) -> None:
    assert plans[whole][-1].kv == kv_by_hand
    assert all(each[-1].kv == LENGTH * each[-1].kv_per_token for each in plans.values())
    assert all(x.total > y.total for more, less in pairwise(plans.values()) for x, y in zip(more, less, strict=True))


def the_plan_is_right(planned: Any, peaks: Any, FORMATS: Any, on_cpu: bool) -> None:
    off = {name: max(abs(p / m - 1) for p, m in zip(planned[name], peaks[name], strict=True)) for name in FORMATS}
    assert not on_cpu or max(off.values()) < 0.15, off


def what_fits_fits_and_one_token_more_does_not(plan: Any, most: Any, FORMATS: Any, MEMORY: int) -> None:
    for name, bits in FORMATS.items():
        assert plan(most[name], bits, MEMORY).fits and not plan(most[name] + 1, bits, MEMORY).fits


def fewer_bits_go_further_but_less_than_they_save(most: Any, plans: Any, whole: str) -> None:
    saved = plans[whole][-1].kv / plans["4 bit"][-1].kv
    assert most[whole] < most["8 bit"] < most["8,4 bit"] < most["4 bit"] < saved * most[whole]


def errors_say_what_helps(too_large: str, too_long: str) -> None:
    assert "kv_bits=8" in too_large
    assert "factor=5" in too_long and "extend='dynamic'" in too_long


def caches_take_what_was_planned(megabytes: Any, plans: Any, FORMATS: Any) -> None:
    assert all(round(megabytes[name] * 1e6) == plans[name][-1].kv for name in FORMATS)


def fewer_bits_cost_little(perplexity: Any, whole: str) -> None:
    assert all(abs(perplexity[name] / perplexity[whole] - 1) < 0.01 for name in ("8 bit", "8,4 bit"))
    assert abs(perplexity["4 bit"] / perplexity[whole] - 1) < 0.10
