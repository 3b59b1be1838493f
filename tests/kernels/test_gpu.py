"""Around the kernel's launch: the choice of the op, the fallback and its warning, every transformation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_resonance import ResonanceRoPE, default_frequencies
from mlx_resonance.errors import UsageError
from mlx_resonance.kernels import PhaseConstants, gpu, kernel, ops, trial

import mlx.core as mx
import numpy as np
import pytest

from .. import oracle, pretend, rotations
from ..rotations import YARN, layouts

CLEAR = gpu._rotation.cache_clear, trial.fault.cache_clear, trial._unusable.clear
WARNING = "rotating with plain mlx.core operations"


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(rotations.normal(*shape, seed=seed))


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Every test starts without results of earlier trials on the GPU, and leaves none behind."""
    monkeypatch.setattr(trial, "user_cache_path", lambda name: tmp_path / "cache" / name)
    restart()
    yield
    restart()


def restart() -> None:
    """What a new process knows of trials: what is in the user's cache folder."""
    for clear in CLEAR:
        clear()


def launch_twin(
    backend: str, xs: list[mx.array], offset: mx.array, constants: PhaseConstants, traditional: bool, backward: bool
) -> list[mx.array]:
    """Does the kernel's work with its twin, without the twin's derivatives."""
    rows, length = xs[0].shape[0], xs[0].shape[2]
    assert offset.dtype == mx.int32 and offset.shape in ((1,), (rows,), (1, length), (rows, length))
    return gpu.twin([mx.stop_gradient(x) for x in xs], offset, constants, traditional, backward)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Pretends that there is a GPU; the list gets an item for each launch: whether it turns backward."""
    launches: list[bool] = []

    def launch(*call: object) -> list[mx.array]:
        launches.append(bool(call[-1]))
        return launch_twin(*call)  # type: ignore[arg-type]

    pretend_gpu(monkeypatch)
    monkeypatch.setattr(kernel, "launch", launch)
    return launches


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "current_backend", lambda: None if "metal" in trial._unusable else "metal")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- which op is picked


def test_a_machine_without_a_gpu_gets_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    with mx.stream(mx.cpu):
        for _ in range(2):
            mx.eval(ResonanceRoPE(YARN).rotate(normal(1, 2, 3, 128), normal(1, 1, 3, 128), 5))
    assert warnings_of(caplog) == [f"[ResonanceRoPE] MLX has no GPU here: {WARNING}"]


def test_the_cpu_by_choice_gets_no_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with mx.stream(mx.cpu):
        assert trial.current_backend() is None
    assert warnings_of(caplog) == []


def test_one_launch_for_queries_and_keys(launches: list[bool]) -> None:
    rope, q, k = ResonanceRoPE(YARN), normal(2, 4, 3, 128), normal(2, 2, 3, 128)
    rope.rotate(q, k)
    rope(q)
    launches.clear()  # those that tried the kernel
    assert rope.angles(3, 5).table is None
    rope.rotate(q, k, 5)
    assert launches == [False]
    rope(q, 5)
    assert launches == [False, False]


@pytest.mark.parametrize("shape", [(2, 3, 0, 128), (0, 3, 5, 128), (2, 0, 5, 128)])
def test_nothing_is_launched_for_empty_arrays(launches: list[bool], shape: tuple[int, ...]) -> None:
    rotated = ResonanceRoPE(YARN).rotate(mx.zeros(shape), mx.zeros((shape[0], 1, *shape[2:])), 5)
    assert rotated[0].shape == shape and launches == []


@pytest.mark.parametrize(("features", "launched"), [(6, False), (8, True)])
def test_the_smallest_array_that_is_launched(launches: list[bool], features: int, launched: bool) -> None:
    assert bool(ResonanceRoPE(default_frequencies(features))(normal(1, 1, 1, features)).size and launches) == launched


@pytest.mark.parametrize(("length", "launched"), [(2**26, True), (2**27, False)])
def test_a_grid_of_31_bits(launches: list[bool], length: int, launched: bool) -> None:
    """16 groups of pairs in each token; nothing is evaluated."""
    rope, x = ResonanceRoPE(YARN), mx.broadcast_to(mx.zeros((), mx.float16), (1, 1, length, 128))
    rope(x[:, :, :60])
    launches.clear()
    rope(x)
    assert launches == [False] * launched
    mx.vmap(rope)(mx.broadcast_to(x[:, :, : length // 4], (4, 1, 1, length // 4, 128)))
    assert len(launches) == (3 if launched else 1)  # vmap also traces the function, evaluating nothing


def test_a_kernel_that_cannot_be_built_falls_back_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*variant: object) -> object:
        raise RuntimeError("Unable to build metal library\nfrom source")

    rope, q, k = ResonanceRoPE(YARN), normal(2, 4, 3, 128), normal(2, 2, 3, 128)
    expected = [mx.array(x) for x in rope.rotate(q, k, 70_000)]
    caplog.clear()
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(kernel, "build", fail)
    for _ in range(2):
        for one, other in zip(rope.rotate(q, k, 70_000), expected, strict=True):
            assert mx.allclose(one, other, rtol=0, atol=1e-6)
    reason = "the metal kernel cannot be used: Unable to build metal library from source"
    assert warnings_of(caplog) == [f"[ResonanceRoPE] {reason}: {WARNING}"]
    assert rope.angles(3, 5).table is not None  # computed once for all layers from now on
    rope(q.astype(mx.float16), 5)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("fault", [1e-3, float("nan")])
def test_a_kernel_with_wrong_results_is_not_used(
    launches: list[bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: float
) -> None:
    monkeypatch.setattr(kernel, "launch", lambda *call: [x + fault for x in launch_twin(*call)])
    x = normal(2, 4, 3, 128)
    rotated = ResonanceRoPE(YARN)(x, 70_000)
    cos, sin = ops.cos_sin(mx.array([70_000]), 3, ops.phase_constants(YARN))
    assert mx.array_equal(rotated, ops.rotate([x], cos, sin, False)[0])
    assert len(warnings_of(caplog)) == 1 and "its results are off by" in warnings_of(caplog)[0]


@pytest.mark.metal
def test_the_kernel_is_used_on_metal() -> None:
    assert_used("metal")


@pytest.mark.gpu
def test_the_kernel_is_used_on_cuda() -> None:
    assert_used("cuda")


def assert_used(backend: str) -> None:
    assert trial.current_backend() == backend
    constants = ops.phase_constants(YARN)
    for dtype in kernel.DTYPES:
        for turns in ((False, False), (True, False), (False, True), (True, True)):
            for length in (3, 60):
                x = normal(1, 2, length, 128).astype(dtype)
                for xs in ([x, x], [x]):
                    for shape in ((1,), (1, length)):
                        assert trial.can_rotate(backend, xs, mx.zeros(shape, mx.int32), constants, *turns)


# --- the trial


def launch_oracle(
    backend: str, xs: list[mx.array], offset: mx.array, constants: PhaseConstants, traditional: bool, backward: bool
) -> list[mx.array]:
    """The kernel's work in float64, from the same packed constants."""
    modulus, turns, [scale] = (np.array(part) for part in pretend.constants_of(constants.packed)[:3])
    wavelengths = np.array([float(m) if m else 2.0**64 / float(t) for m, t in zip(modulus, turns, strict=True)])
    length = xs[0].shape[2]
    positions = np.array(offset if offset.ndim == 2 else offset[:, None] + mx.arange(length))
    theta = np.stack([oracle.angles(of_row, wavelengths) for of_row in positions.tolist()])[:, None]
    values = [np.array(x.astype(mx.float32)).astype(np.float64) for x in xs]
    turned = [oracle.rotate(value, -theta if backward else theta, float(scale), traditional) for value in values]
    return [mx.array(y.astype(np.float32)).astype(x.dtype) for x, y in zip(xs, turned, strict=True)]


def test_the_trial_does_not_ask_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twin on the same GPU would share the faults of MLX's compiler: the trial compares with NumPy."""
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(kernel, "launch", launch_oracle)
    for name in ("cos_sin", "rotate"):
        monkeypatch.setattr(ops, name, lambda *_: pytest.fail("the twin was asked"))
    for dtype in kernel.DTYPES:
        for traditional, backward in ((False, False), (True, True)):
            for length in (1, 40):
                xs = [normal(1, 4, length, 128).astype(dtype)] * 2
                for offset in (mx.array([7]), mx.arange(length)[None]):
                    assert trial.can_rotate("metal", xs, offset, ops.phase_constants(YARN), traditional, backward)


def test_the_backward_kernel_is_built_for_the_first_gradient(launches: list[bool]) -> None:
    rope, x = ResonanceRoPE(YARN), normal(1, 2, 3, 128)
    mx.eval(rope(x))
    assert launches and not any(launches)
    mx.eval(mx.grad(lambda x: rope(x).sum())(x))
    assert any(launches)


def test_a_backward_kernel_with_wrong_results_is_not_used(
    launches: list[bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rope, x = ResonanceRoPE(YARN), normal(1, 2, 3, 128)
    loss = lambda x: (rope(x, 9)[..., :70] ** 2).sum()  # noqa: E731
    fake = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *call: [y + 0.01 * call[-1] for y in fake(*call)])
    with_kernel = mx.grad(loss)(x)
    assert len(warnings_of(caplog)) == 1
    monkeypatch.setattr(trial, "current_backend", lambda: None)
    assert mx.allclose(with_kernel, mx.grad(loss)(x), rtol=1e-5, atol=1e-5)


def test_a_variant_that_passed_is_not_tried_again(launches: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        restart()
        launches.clear()
        ResonanceRoPE(YARN)(normal(1, 2, 3, 128))
        return len(launches)

    assert [count(), count(), count()] == [3, 1, 1]  # two trials and the launch itself
    for change in ("mlx", "device", "system", "source", "package"):
        with monkeypatch.context() as patch:
            if change == "mlx":
                patch.setattr(mx, "__version__", "99.0")
            if change == "device":
                patch.setattr(mx, "device_info", lambda: {"device_name": "M9", "architecture": "applegpu"})
            if change == "system":
                patch.setattr(trial.platform, "version", lambda: "Darwin Kernel Version 99")
            if change == "source":
                patch.setattr(trial, "_sources", lambda: ["another kernel"])
            if change == "package":
                patch.setattr(trial, "VERSION", "99.0")
            assert [count(), count()] == [3, 1], change
    assert count() == 1


def test_a_variant_that_failed_is_tried_again(launches: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *call: [y + 0.01 for y in fake(*call)])
    for _ in range(2):
        restart()
        launches.clear()
        ResonanceRoPE(YARN)(normal(1, 2, 3, 128))
        assert len(launches) == 1


@pytest.mark.parametrize("why", ["a file in the way", "not allowed"])
def test_without_a_cache_folder_it_is_tried_every_time(
    launches: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    (tmp_path / "cache").write_text("")
    if why == "not allowed":  # to anyone: tests may run as root

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError("not allowed")

        monkeypatch.setattr(Path, "stat", refuse)
        monkeypatch.setattr(Path, "mkdir", refuse)
    for _ in range(2):
        restart()
        launches.clear()
        ResonanceRoPE(YARN)(normal(1, 2, 3, 128))
        assert len(launches) == 3


# --- bare launches: what MLX will not transform


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Pretends that there is a GPU; counts the launches that MLX can transform, and all."""
    return pretend.pretend_gpu(monkeypatch)


def test_bare_launches_rotate_alike(bare: dict[str, int]) -> None:
    rope, q, k = ResonanceRoPE(YARN), normal(2, 4, 3, 128), normal(2, 2, 3, 128, seed=1)
    expected = rope.rotate(q, k, 70_000)
    assert bare == {"transformable": 1, "all": 1}
    angles = rope.angles(3, 70_000, transformable=False)
    for _ in range(3):
        assert_alike((rope.rotate(q, k, angles=angles), expected))
    assert bare == {"transformable": 1, "all": 4}


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 1), (2, 40)])
def test_bare_launches_have_the_arguments_of_others(monkeypatch: pytest.MonkeyPatch, rows: int, length: int) -> None:
    calls: list[tuple[Any, Any]] = []

    def build(*variant: Any) -> Any:
        def launch(**call: Any) -> list[mx.array]:
            inputs = [np.array(x).tolist() for x in call.pop("inputs")]
            calls.append((variant, call | {"inputs": inputs}))
            return [mx.zeros(shape) for shape in call["output_shapes"]]

        return launch

    pretend.pretend_gpu(monkeypatch)
    monkeypatch.setattr(kernel, "build", build)
    rope, q, k = ResonanceRoPE(YARN), normal(rows, 9, length, 144), normal(rows, 2, length, 144)
    offset = mx.array([5 * i for i in range(rows)])
    rope.rotate(q, k, offset)
    angles = rope.angles(length, offset, transformable=False)
    for _ in range(2):
        rope.rotate(q, k, angles=angles)
    assert len(calls) == 3 and calls[0] == calls[1] == calls[2]


@pytest.mark.parametrize("change", ["heads", "features", "type"])
def test_layers_of_other_shapes_and_types(bare: dict[str, int], change: str) -> None:
    rope = ResonanceRoPE(YARN)
    angles = rope.angles(3, 5, transformable=False)
    for _ in range(2):
        q, k = normal(2, 4, 3, 128), normal(2, 2, 3, 128, seed=1)
        assert_alike((rope.rotate(q, k, angles=angles), rope.rotate(q, k, 5)))
        q = normal(2, 8, 3, 128) if change == "heads" else q
        q, k = (mx.repeat(x, 2, axis=-1) for x in (q, k)) if change == "features" else (q, k)
        k = k.astype(mx.float16) if change == "type" else k
        rotated = rope.rotate(q, k, angles=angles)
        assert [(x.shape, x.dtype) for x in rotated] == [(q.shape, q.dtype), (k.shape, k.dtype)]
        expected = rope.rotate(q, k, 5)
        assert all(mx.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(rotated, expected, strict=True))


@pytest.mark.parametrize("wrong", ["length", "rows", "features"])
def test_shapes_are_checked_all_the_same(bare: dict[str, int], wrong: str) -> None:
    rope = ResonanceRoPE(YARN)
    angles = rope.angles(3, mx.array([1, 2]), transformable=False)
    rope.rotate(normal(2, 4, 3, 128), normal(2, 2, 3, 128), angles=angles)
    shape = {"length": (2, 4, 4, 128), "rows": (3, 4, 3, 128), "features": (2, 4, 3, 64)}[wrong]
    with pytest.raises(UsageError):
        rope.rotate(normal(*shape), normal(*shape), angles=angles)


# --- transformations: MLX derives them for the twin, gpu.py defines them for the kernel


def both(launches: list[bool], monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> tuple[object, object]:
    """The result of `call` with the kernel, and with the twin."""
    with_kernel = call()
    mx.eval(with_kernel)
    assert launches
    monkeypatch.setattr(trial, "current_backend", lambda: None)
    return with_kernel, call()


def assert_alike(results: tuple[object, object]) -> None:
    one, other = (list(result) if isinstance(result, (list, tuple)) else [result] for result in results)
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-5, atol=1e-5)


def loss(rope: ResonanceRoPE, offset: mx.array | int) -> Callable[..., mx.array]:
    def loss(q: mx.array, k: mx.array) -> mx.array:
        q, k = rope.rotate(q, k, offset)
        return mx.square(q[..., :40]).sum() + (k[..., 30:] * k[..., :-30]).sum() + (q[:, :2] * k).sum()

    return loss


@layouts
@pytest.mark.parametrize("offset", [70_000, "(B,)"])
@pytest.mark.parametrize("transform", [lambda f: f, mx.checkpoint, mx.compile], ids=["plain", "checkpoint", "compile"])
def test_gradients(
    launches: list[bool], monkeypatch: pytest.MonkeyPatch, transform: Callable, offset: int | str, traditional: bool
) -> None:
    rope, q, k = ResonanceRoPE(YARN, traditional), normal(2, 4, 3, 144), normal(2, 2, 3, 144, seed=1)
    at = mx.array([3, 1_000_003]) if offset == "(B,)" else offset
    results = both(launches, monkeypatch, lambda: mx.grad(transform(loss(rope, at)), argnums=(0, 1))(q, k))
    assert launches.count(True) == 3  # two trials of the variant and one launch for both gradients
    assert_alike(results)


def test_gradient_of_one_array(launches: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    rope, x = ResonanceRoPE(YARN), normal(2, 4, 3, 128)
    assert_alike(both(launches, monkeypatch, lambda: mx.grad(lambda x: (rope(x, 9)[..., :70] ** 2).sum())(x)))


def test_gradient_of_a_gradient(launches: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    rope, x = ResonanceRoPE(YARN), normal(1, 2, 3, 128)

    def of_gradient(x: mx.array) -> mx.array:
        return (mx.grad(lambda x: (rope(x, 9)[..., :70] ** 3).sum())(x) ** 2).sum()

    assert_alike(both(launches, monkeypatch, lambda: mx.grad(of_gradient)(x)))


def test_forward_derivative(launches: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    rope, q, k, tangent = ResonanceRoPE(YARN), normal(1, 2, 3, 128), normal(1, 1, 3, 128), normal(1, 2, 3, 128, seed=2)
    for primals, tangents in (([q, k], [tangent, mx.ones_like(k)]), ([q], [tangent])):
        call = lambda *xs: list(rope.rotate(xs[0], xs[-1] if len(xs) > 1 else k, 9))  # noqa: E731
        pretend_gpu(monkeypatch)
        results = both(launches, monkeypatch, lambda: mx.jvp(call, primals, tangents)[1])  # noqa: B023
        assert_alike(results)


@layouts
@pytest.mark.parametrize("axes", [(0, 0, None), (0, None, 0), (None, None, 0), (1, 2, 0), (3, 0, None)], ids=str)
@pytest.mark.parametrize("transform", [lambda f: f, mx.compile], ids=["plain", "compile"])
def test_vmap(
    launches: list[bool], monkeypatch: pytest.MonkeyPatch, transform: Callable, axes: tuple, traditional: bool
) -> None:
    rope = ResonanceRoPE(YARN, traditional)

    def mapped(shape: tuple[int, ...], axis: int | None, seed: int) -> mx.array:
        return normal(*shape, seed=seed) if axis is None else mx.moveaxis(normal(3, *shape, seed=seed), 0, axis)

    q, k = mapped((2, 4, 3, 128), axes[0], 0), mapped((2, 1, 3, 128), axes[1], 1)
    offset = mx.array([[0, 5], [3, 70_000], [9, 9]]) if axes[2] == 0 else mx.array([4, 70_000])
    call = transform(mx.vmap(lambda q, k, offset: rope.rotate(q, k, offset), in_axes=axes))
    assert_alike(both(launches, monkeypatch, lambda: call(q, k, offset)))


def test_vmap_of_vmap_and_of_a_gradient(launches: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    rope, x = ResonanceRoPE(YARN), normal(2, 3, 1, 2, 4, 128)
    assert_alike(both(launches, monkeypatch, lambda: mx.vmap(mx.vmap(lambda x: rope(x, 9)))(x)))
    pretend_gpu(monkeypatch)
    gradient = mx.vmap(mx.grad(lambda x: (rope(x, 9)[..., :70] ** 2).sum()))
    assert_alike(both(launches, monkeypatch, lambda: gradient(x[0])))
