"""Put deliberate faults into the kernel, one at a time: the tests must notice every one.

    python tests/kernels/mutants.py [NAME …]

Each runs in a copy of the package and its tests. Prints which test fails for each fault; exits with 1 where none does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TESTS = [
    "tests/kernels/test_kernel.py", "tests/kernels/test_source.py", "-k", "not address_spaces",
    "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants",
]  # fmt: skip


class Fault(NamedTuple):
    """What stands in a file, and what stands there instead."""

    file: str
    right: str
    wrong: str


FAULTS = {
    "none": Fault("body.h", "// CUDA launches", "// CUDA launches"),  # the tests pass without a fault
    "sine turned round": Fault("rotary.h", "turn.sin = (odd ? cos : sin)", "turn.sin = -(odd ? cos : sin)"),
    "cosine and sine swapped": Fault("rotary.h", "turn.cos = (odd ? sin : cos)", "turn.cos = (odd ? cos : sin)"),
    "sign of a quadrant": Fault("rotary.h", "quadrant == 1 || quadrant == 2 ?", "quadrant == 1 || quadrant == 3 ?"),
    "no attention scale": Fault("body.h", "attention_scale[0])", "1.0f)"),
    "angle in floating point": Fault(
        "body.h",
        "turn_by(phase_of(position, modulus[first + j], turns[first + j]),",
        "turn_by(uint32_t(int64_t(float(position) * (float(turns[first + j]) * 2.3283064e-10f))),",
    ),
    "no modulus": Fault("rotary.h", "if (modulus != 0) {", "if (false) {"),
    "modulus of a negative position": Fault("rotary.h", "position < 0 && rest != 0 ? modulus - rest : rest", "rest"),
    "phase cut, not rounded": Fault("rotary.h", "(reduced * turns + 0x80000000u) >> 32", "(reduced * turns) >> 32"),
    "term of the series": Fault("rotary.h", "2.55016404f", "2.55316404f"),
    "offset by one": Fault("body.h", "+ uint32_t(step));", "+ uint32_t(step) + 1u);"),
    "one offset for all rows": Fault("body.h", "offset[row * offset_strides[0]]", "offset[0]"),
    "row added to the position": Fault(
        "body.h", "const int64_t step = token % ", "const int64_t step = row + token % "
    ),
    "stride of queries for keys": Fault(
        "body.h", "k_strides[1],\n      k_strides[3],", "q_strides[1],\n      k_strides[3],"
    ),
    "feature stride of 1": Fault("rotary.h", "static_cast<float>(x[b * stride])", "static_cast<float>(x[b])"),
    "wrong half": Fault(
        "body.h", "{first, pairs, pairs + first, 2 * pairs}", "{first, pairs, first + PAIRS, 2 * pairs}"
    ),
    "layouts exchanged": Fault(
        "rotary.h", "TRADITIONAL ? 2 * j + 1 : PAIRS + j", "TRADITIONAL ? PAIRS + j : 2 * j + 1"
    ),
    "past the last pair": Fault("body.h", "pairs + first, 2 * pairs};", "pairs + first, 2 * pairs + 1};"),
    "last heads left out": Fault(
        "body.h", "const uint32_t q_blocks = (q_shape[1] + HEADS - 1)", "const uint32_t q_blocks = q_shape[1]"
    ),
    "heads past the last": Fault(
        "body.h", "k_shape[1] - head < HEADS ? int(k_shape[1] - head) : HEADS", "k_shape[1] > 0 ? HEADS : 0"
    ),
    "packed where the low run is not": Fault(
        "rotary.h", "(x + runs.low) % sizeof(Pack<PAIRS, T>) == 0", "(x) % 2 == 0"
    ),
    "packed where the high run is not": Fault(
        "rotary.h", "(x + runs.high) % sizeof(Pack<PAIRS, T>) == 0", "(x) % 2 == 0"
    ),
    "packed across a gap": Fault("rotary.h", "&& feature_stride == 1 &&", "&&"),
    "heads off the packs": Fault("rotary.h", "head_stride % PAIRS == 0 &&", ""),
    "output packed like the input": Fault("rotary.h", "&& is_packed<PAIRS>(y, y_head_stride, 1, runs)", ""),
    "other features turned": Fault("rotary.h", "if (is_copy) {", "if (is_copy && !TRADITIONAL) {"),
    "other features left out": Fault("body.h", "{copied, dims, copied + PAIRS, dims}", "{copied, dims, dims, dims}"),
    "stride of other features": Fault("rotary.h", "y[a] = x[a * stride];", "y[a] = x[a];"),
    "neighbours across the runs": Fault(
        "rotary.h", "!is_copy ? a + 1 : runs.high + j", "!is_copy ? a + 2 : runs.high + j"
    ),
    "forward and backward alike": Fault("body.h", "if (BACKWARD)", "if (false)"),
    "threads past the grid": Fault("body.h", "if (token >= ", "if (token > 16 * "),
    "32-bit output": Fault(
        "body.h",
        "q_out + ((row * q_shape[1] + head) * length + step) * dims",
        "q_out + int(((row * q_shape[1] + head) * length + step) * dims)",
    ),
    "32-bit head stride": Fault("rotary.h", "int64_t x_head_stride,", "int x_head_stride,"),
    "32-bit feature stride": Fault("rotary.h", "int64_t x_feature_stride,", "int x_feature_stride,"),
}


def outcome(fault: Fault, folder: Path) -> str:
    """The first test that fails; `nothing` where all pass; what else happened where that says nothing of the tests."""
    for part in ("mlx_resonance", "tests", "pyproject.toml"):
        source, target = ROOT / part, folder / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".built", "*.safetensors"))
        else:
            shutil.copy(source, target)
    path = folder / "mlx_resonance" / "kernels" / fault.file
    text = path.read_text()
    if text.count(fault.right) != 1:
        return f"ERROR: {fault.file} has {text.count(fault.right)} times {fault.right!r}"
    path.write_text(text.replace(fault.right, fault.wrong))
    # The copy comes before an installed package: -m puts the working directory first.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    before = filter(None, [environment.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join([str(folder / "tests" / "without_torch"), *before])
    command = [sys.executable, "-m", "pytest", *TESTS]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if "BuildError" in done.stdout:
        return "ERROR: the compiler does not take it"
    failures = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode == 1 and failures:
        return failures[0].removeprefix("FAILED tests/kernels/")
    return "nothing" if done.returncode == 0 else f"ERROR: {(done.stdout + done.stderr)[-500:]}"


def main() -> None:
    """Try the faults that the command line names, or all."""
    names = sys.argv[1:] or list(FAULTS)

    def attempt(name: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            return outcome(FAULTS[name], Path(folder))

    unnoticed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, failed in zip(names, pool.map(attempt, names), strict=True):
            print(f"{name}: {failed}", flush=True)
            if failed.startswith("ERROR") or (failed == "nothing") != (name == "none"):
                unnoticed.append(name)
    print(f"{len(names) - len(unnoticed)} of {len(names)} as it should be", *unnoticed, sep="; ")
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
