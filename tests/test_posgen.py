"""PosGen's settings, training and measures, on the preset that takes a second."""

import json
import re
from dataclasses import asdict, replace
from itertools import product

from mlx_resonance import frequencies
from mlx_resonance.errors import UsageError
from mlx_resonance.posgen import train
from mlx_resonance.posgen.data import tokens
from mlx_resonance.posgen.evaluate import generated, in_and_out, teacher_forced
from mlx_resonance.posgen.settings import ENCODINGS, PRESETS, Reading, Settings, Stage, settings_from
from mlx_resonance.posgen.tasks import SUBTASKS, Task
from mlx_resonance.posgen.train import Best, Run, results, run_training

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

SMOKE = PRESETS["smoke"]
TASK = Task("recursive")
ROPE, NTK, YARN = Reading("rope"), Reading("ntk"), Reading("yarn", 13)
RESONANCE = Reading("resonance_rope")


def arrays(tree) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_presets_are_what_the_sources_say() -> None:
    official, paper = PRESETS["official"], PRESETS["paper"]
    assert (official.model.layers, paper.model.layers) == (6, 2)
    assert (official.model.train_feed_forward, paper.model.train_feed_forward) == (False, True)
    assert (official.split, paper.split) == ("official", "disjoint")
    assert (official.train_scaled, paper.train_scaled) == (False, True)
    for preset in (official, paper):
        assert preset.steps == 11850 and preset.factor == 257 / 65
        assert preset.frequencies(preset.readings(["yarn"])[0], True).attention_scale == pytest.approx(1.1375, abs=5e-5)
    assert official.ramps == (257, 65) and paper.ramps == (65,)
    for preset in PRESETS.values():
        assert settings_from(json.loads(json.dumps(asdict(preset)))) == preset


def test_encodings() -> None:
    official = replace(PRESETS["official"], ramps=(65, 257))
    readings = official.readings(ENCODINGS)
    assert len(readings) == 10 and set(readings) > {Reading("ntk"), Reading("yarn", 65), Reading("resonance_yarn", 257)}
    assert str(Reading("ntk")) == "ntk" and str(Reading("yarn", 65)) == "yarn/65"
    with pytest.raises(UsageError, match="alibi"):
        official.readings(["alibi"])
    for reading in readings:
        resonant = reading.encoding.startswith("resonance_")
        assert official.frequencies(reading, True).is_resonant == resonant
        unscaled = official.frequencies(reading, False)
        plain = frequencies.default_frequencies(64, 10000.0)
        assert unscaled == (plain.resonate() if resonant else plain)
        assert official.training(reading) == (RESONANCE if resonant else ROPE)
        assert PRESETS["paper"].training(reading) == reading
    for ramp in official.ramps:
        yarn = frequencies.yarn_frequencies(64, 10000.0, 257 / 65, ramp, beta_fast=2, beta_slow=1)
        assert official.frequencies(Reading("yarn", ramp), True) == yarn
        assert official.frequencies(Reading("resonance_yarn", ramp), True) == yarn.resonate()


def test_a_run_that_was_killed_ends_bit_identical(tmp_path) -> None:
    run = Run(TASK, SMOKE, (ROPE, YARN), 3)
    model, best = run_training(run)
    path = tmp_path / "checkpoint.safetensors"

    def kill(step: int, *_) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(run, path, kill)
    steps = []
    resumed, resumed_best = run_training(run, path, lambda step, *_: steps.append(step))
    assert steps == [5, 6]
    assert_same(arrays(model.parameters()), arrays(resumed.parameters()))
    assert_same(arrays(best.arrays), arrays(resumed_best.arrays))


# Golden values: the code that made benchmarks/results/ (commit 5c3dc3b), with each seed trained alone.
LOSSES = {
    3: [3.8836546, 3.8599381, 3.8870163, 3.6680424, 3.7486705, 3.7196372],
    42: [4.1624517, 3.9751000, 3.7129149, 3.5397537, 3.7832675, 3.6777713],
}


@pytest.mark.parametrize("seed", LOSSES)
def test_a_seed_gives_the_training_of_the_committed_results(seed) -> None:
    """The same initial values, order of rows and dropout."""
    losses = []
    run_training(Run(TASK, SMOKE, (ROPE,), seed), on_progress=lambda step, loss, *_: losses.append(loss))
    assert losses == pytest.approx(LOSSES[seed], abs=1e-4)


def test_encodings_that_share_a_training_get_what_each_alone_gets() -> None:
    run = Run(TASK, SMOKE, (ROPE, NTK), 1)
    _, shared = run_training(run)
    for reading in run.readings:
        _, alone = run_training(replace(run, readings=(reading,)))
        assert_same({name: value for name, value in arrays(shared.arrays).items() if name.startswith(f"{reading}.")},
                    arrays(alone.arrays))  # fmt: skip
    with pytest.raises(UsageError, match="different angles"):
        Run(TASK, SMOKE, (ROPE, RESONANCE), 1)


def test_scaled_training_differs() -> None:
    plain, _ = run_training(Run(TASK, SMOKE, (NTK,), 1))
    scaled, _ = run_training(Run(TASK, replace(SMOKE, train_scaled=True), (NTK,), 1))
    assert not np.array_equal(arrays(plain.parameters())["embedding"], arrays(scaled.parameters())["embedding"])


def test_the_best_weights_are_the_earliest_of_the_best() -> None:
    run = Run(TASK, SMOKE, (ROPE,), 1)
    for accuracies, chosen in (((0.1, 0.3, 0.3), 2), ((0.5, 0.5, 0.4), 1), ((0.0, 0.0, 0.1), 3)):
        model = run.model()
        best = Best(run, model)
        for step, accuracy in enumerate(accuracies, 1):
            model.update({"embedding": mx.full(model.embedding.shape, step)})
            best.consider(ROPE, step, accuracy, model)
        assert best.arrays["rope.step"].item() == chosen
        best.load_into(model, ROPE)
        assert (model.embedding == chosen).all()


def test_the_model_learns_and_the_measures_see_it() -> None:
    """A rule of one token: a small model learns it and, since it is local, is mostly right out of distribution, too."""
    task = Task("recursive", modulus=5, near=1, far=0, arithmetic="pow_sin")
    settings = replace(SMOKE, split="official", epochs=40, learning_rate=2e-2, model=replace(SMOKE.model, dropout=0.0))
    run = Run(task, settings, (ROPE,), 1)
    losses = []
    model, best = run_training(run, on_progress=lambda step, loss, *_: losses.append(loss))
    assert losses[-1] < 0.05 < 1 < losses[0]
    line = results(run, model, best)[0]
    assert line["id"] == line["generated_id"] == 1.0
    assert line["correct"][: settings.train_length - 1] == [line["rows"]] * (settings.train_length - 1)


@pytest.mark.parametrize("train_scaled", [False, True])
def test_each_part_has_its_rows_and_its_rope(monkeypatch, train_scaled) -> None:
    """Training is unscaled or scaled, validation and test are scaled; each has rows of its own.

    Within the training length, the test also reads with the angles of the training.
    """
    run = Run(TASK, replace(SMOKE, train_scaled=train_scaled), (YARN,), 1)
    rows, seen, trained = run.splits(), [], []

    def watched(measure):
        def call(model, rope, some, task, *prompt):
            seen.append((measure.__name__, rope.frequencies, some, *prompt))
            return measure(model, rope, some, task, *prompt)

        return call

    class Watched(train.Decoder):
        def __call__(self, ids, rope, *rest, dropout_key=None, **options):
            if dropout_key is not None:
                trained.append(rope.frequencies)
            return super().__call__(ids, rope, *rest, dropout_key=dropout_key, **options)

    for measure in (teacher_forced, generated):
        monkeypatch.setattr(train, measure.__name__, watched(measure))
    monkeypatch.setattr(train, "Decoder", Watched)
    model, best = run_training(run)
    validations = len(seen)
    results(run, model, best)
    assert trained and all(one == SMOKE.frequencies(YARN, scaled=train_scaled) for one in trained)
    as_trained = seen[validations + 1], seen[validations + 3]
    for one in seen:
        scaled = train_scaled or not any(one is other for other in as_trained)
        assert one[1] == SMOKE.frequencies(YARN, scaled=scaled)
    assert [one[0] for one in seen[:validations]] == ["teacher_forced"] * 3
    assert all(np.array_equal(one[2], rows.validation) for one in seen[:validations])
    assert [(name, *prompt) for name, _, _, *prompt in seen[validations:]] == [
        *[("teacher_forced",)] * 4, ("generated", 4), ("generated", 12),
    ]  # fmt: skip
    measured = [rows.test, rows.test[:, :12]] * 2
    for one, expected in zip(seen[validations:], (*measured, *[rows.test[:2]] * 2), strict=True):
        np.testing.assert_array_equal(one[2], expected)


def test_weights_of_the_last_step_are_measured_once(monkeypatch) -> None:
    run, measured = Run(TASK, SMOKE, (ROPE, NTK), 1), []
    monkeypatch.setattr(train, "_measured", lambda run, model, reading, rows: measured.append(reading) or {"id": 0.5})
    model, best = run_training(run)
    best.keep(ROPE, SMOKE.steps, 1.0, model)
    best.keep(NTK, SMOKE.steps - 1, 1.0, model)
    lines = results(run, model, best)
    assert measured == [ROPE, NTK, NTK] and [line["last"] for line in lines] == [{"id": 0.5}] * 2


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    runs = [Run(TASK, SMOKE, (ROPE,), seed) for seed in (1, 2)]
    rows = runs[0].splits().train
    ids = tokens(rows, TASK.modulus)
    orders, steps = [], SMOKE.steps_per_epoch
    for run, epoch in product(runs, range(2)):
        batches = [train._batch(run, rows, steps * epoch + i) for i in range(steps)]
        assert [batch.shape for batch, *_ in batches] == [(16, 13), (16, 13), (8, 13)]
        assert [key.tolist() for *_, key in batches] == [[run.seed, 1024 * (steps * epoch + i)] for i in range(steps)]
        orders.append(np.concatenate([batch for batch, *_ in batches]))
    for order in orders:
        np.testing.assert_array_equal(np.sort(order, axis=0), np.sort(ids, axis=0))
        assert {row.tobytes() for row in order} == {row.tobytes() for row in ids}
    assert len({order.tobytes() for order in orders}) == 4


def test_the_optimizer_is_that_of_the_settings(monkeypatch) -> None:
    made, optimizer = [], train.OneCycleAdamW
    monkeypatch.setattr(
        train, "OneCycleAdamW", lambda *args, **options: made.append((args, options)) or optimizer(*args, **options)
    )
    norms, loop = [], train.train
    monkeypatch.setattr(
        train, "train", lambda *args, **options: norms.append(options["max_grad_norm"]) or loop(*args, **options)
    )
    run_training(Run(TASK, replace(SMOKE, weight_decay=0.25, beta_2=0.9), (ROPE,), 1))
    run_training(Run(TASK, replace(SMOKE, max_grad_norm=0.5), (ROPE,), 1))
    assert made[0] == ((SMOKE.learning_rate, SMOKE.steps), {"weight_decay": 0.25, "hold": 0, "beta_2": 0.9})
    assert norms == [None, 0.5]


def test_measures_count_positions() -> None:
    run = Run(TASK, SMOKE, (ROPE,), 1)
    model, rope, rows = run.model(), run.rope(ROPE), run.splits().test
    counts = teacher_forced(model, rope, rows, TASK)
    assert counts.shape == (SMOKE.test_length - TASK.seed_length,)
    assert 0 < counts.sum() < len(rows) * len(counts)
    assert generated(model, rope, rows, TASK, 12).shape == (12,)
    # The first generated token is the one that teacher forcing predicts there.
    assert generated(model, rope, rows, TASK, 4)[0] == counts[0]
    assert in_and_out(np.array([4, 2, 0, 0, 1]), 4, 2) == (0.75, 1 / 12)


def test_every_name_of_a_setting_is_explained() -> None:
    explained = {
        name.strip() for names in re.findall(r"^ {8}(\w[\w, ]*): ", Settings.__doc__, re.M) for name in names.split(",")
    }
    assert explained == set(Settings.__dataclass_fields__)


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_rows_of_random_digits_are_answered_by_the_rule(subtask: str) -> None:
    """Each row's digits are between two numbers of its own; an answer is the sum of the rule's tokens."""
    task = Task(subtask, far=2)
    settings = replace(SMOKE, batch_size=4000, curriculum=(Stage(120, 1, largest=9, least=6),))
    run = Run(task, settings, (ROPE,), 1)
    ids, answers, _ = map(np.array, train._batch(run, run.splits().train, 0))
    rows = ids[:, 1:].astype(int)
    between = {(row.min(), row.max()) for row in rows}
    assert rows.shape == (400, 120) and between == {(a, b) for b in (6, 7, 8, 9) for a in range(b - 3)}
    assert answers.shape == (400, 115) and np.array_equal(answers[:, 0], rows[:, :5].sum(axis=1) % 17)
    for position in range(5, 120):
        window = task.window(position)
        far = rows[:, window] + rows[:, window + 1]
        near = rows[:, position - 1] + rows[:, position - 2] + rows[:, position - 3]
        assert np.array_equal(answers[:, position - 5], (near + far) % 17)


def test_a_curriculum_fits_the_task() -> None:
    """Digits stay below the modulus, and rows are longer than the seed or the run is refused."""
    settings = replace(SMOKE, batch_size=500, curriculum=(Stage(8, 1, largest=16, least=12),))
    run = Run(Task("cot", modulus=5), settings, (ROPE,), 1)
    ids, answers, _ = train._batch(run, run.splits().train, 0)
    assert mx.max(ids[:, 1:]).item() == 4 and mx.max(answers).item() == 4
    Run(Task("cot", near=6, far=1), settings, (ROPE,), 1)
    with pytest.raises(UsageError, match="near \\+ far must be less than the 8 digits of the first rows, got 6 \\+ 2"):
        Run(Task("cot", near=6, far=2), settings, (ROPE,), 1)


def test_a_curriculum_comes_before_the_first_epoch() -> None:
    """Short rows first, more of them in a step, from their beginning; the epochs then are those without it."""
    settings = replace(SMOKE, curriculum=(Stage(6, 2), Stage(8, 1), Stage(12, 2, 5)))
    assert settings.curriculum_steps == 5 and settings.steps == SMOKE.steps + 5
    assert settings_from(json.loads(json.dumps(asdict(settings)))) == settings
    run, plain = Run(TASK, settings, (ROPE,), 1), Run(TASK, SMOKE, (ROPE,), 1)
    rows = run.splits().train
    batches = [train._batch(run, rows, step) for step in range(settings.steps)]
    assert [batch.shape for batch, _, _ in batches[:4]] == [(32, 7), (32, 7), (24, 9), (16, 13)]
    beginnings = {row.tobytes() for row in tokens(rows, TASK.modulus)[:, :7]}
    assert all(row.tobytes() in beginnings for row in np.array(batches[0][0]))
    assert not np.array_equal(batches[0][0], batches[1][0])
    for step in range(SMOKE.steps):
        assert all(map(np.array_equal, batches[5 + step][:2], train._batch(plain, rows, step)[:2]))
    for ids, answers, _ in (batches[0], batches[-1]):  # the right answers are the next digits
        assert np.array_equal(ids[:, 1 + TASK.seed_length :], answers)
    assert [key.tolist() for *_, key in batches] == [[1, 1024 * step] for step in range(settings.steps)]
    losses = []
    run_training(run, on_progress=lambda step, loss, *_: losses.append(loss))
    assert len(losses) == settings.steps


def test_epochs_may_have_random_rows_beside_those_of_the_training() -> None:
    """Every step has them, each its own, with the rule's answers; the training rows stay those of the epoch."""
    stage = Stage(6, 2, largest=9, least=7)
    settings = replace(SMOKE, curriculum=(stage,), random_rows=3)
    assert settings_from(json.loads(json.dumps(asdict(settings)))) == settings
    assert settings.steps == SMOKE.steps + 2
    run, plain = Run(TASK, settings, (ROPE,), 1), Run(TASK, SMOKE, (ROPE,), 1)
    rows = run.splits().train
    assert train._batch(run, rows, 0)[0].shape == ((16 + 3) * 12 // 6, 7)
    drawn = []
    for step in range(SMOKE.steps):
        ids, answers, _ = map(np.array, train._batch(run, rows, 2 + step))
        of_epoch, of_epoch_answers, _ = map(np.array, train._batch(plain, rows, step))
        assert np.array_equal(ids[:-3], of_epoch) and np.array_equal(answers[:-3], of_epoch_answers)
        digits = ids[-3:, 1:].astype(np.int32)
        assert np.array_equal(answers[-3:], TASK.answers(digits))
        assert digits.max() <= 9
        drawn.append(digits.tobytes())
    assert len(set(drawn)) == SMOKE.steps
    for wrong in ((), (Stage(6, 2),)):
        with pytest.raises(UsageError, match="random_rows are like those of the last stage"):
            replace(SMOKE, curriculum=wrong, random_rows=3)
