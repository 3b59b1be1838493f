"""Put deliberate faults into the kernel, one at a time: the tests must notice every one.

    python tests/kernels/mutants.py [--if-changed | NAME …]

Prints for each fault the first test that fails; exits with 1 if there is none. After a run of all faults in which each
was noticed, mutants.sha256 holds the hashes of the files that decide the outcome. With --if-changed, nothing runs while
they still fit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HASHES = Path(__file__).with_suffix(".sha256")
# What decides whether a fault is noticed: the kernel, and its tests with all that they call. The versions of MLX and of
# the compiler do too, which is why all faults are tried every night.
DECISIVE = [
    "mlx_resonance/frequencies.py", "mlx_resonance/kernels/*.py", "mlx_resonance/kernels/*.h",
    "tests/oracle.py", "tests/rotations.py", "tests/kernels/*.py", "tests/kernels/*.h",
]  # fmt: skip
NOT_DECISIVE = [  # they do not run the kernel
    "mlx_resonance/kernels/gpu.py", "mlx_resonance/kernels/trial.py", "tests/kernels/test_gpu.py",
    "tests/kernels/test_mutants.py",
]  # fmt: skip
TESTS = [
    "tests/kernels/test_kernel.py", "tests/kernels/test_source.py", "-m", "not metal and not gpu and not long",
    "-k", "not address_space", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants",
]  # fmt: skip


class Fault(NamedTuple):
    """A text in a file, and what replaces it."""

    file: str
    right: str
    wrong: str


FAULTS = {
    "none": Fault("body.h", "// CUDA launches", "// CUDA launches"),  # the tests pass without a fault
    "sine negated": Fault("rotary.h", "turn.sin = (odd ? cos : sin)", "turn.sin = -(odd ? cos : sin)"),
    "cosine and sine swapped": Fault("rotary.h", "turn.cos = (odd ? sin : cos)", "turn.cos = (odd ? cos : sin)"),
    "sign of a quadrant": Fault("rotary.h", "quadrant == 1 || quadrant == 2 ?", "quadrant == 1 || quadrant == 3 ?"),
    "no attention scale": Fault("body.h", "FLOAT_OF_BITS(uint32_t(constants[2 * pairs])))", "1.0f)"),
    "angle in floating point": Fault(
        "body.h",
        "phase_of(position, uint32_t(constants[first + j]), constants[pairs + first + j]);",
        "uint32_t(int64_t(float(position) * (float(constants[pairs + first + j]) * 2.3283064e-10f)));",
    ),
    "turns of another pair": Fault("body.h", "constants[pairs + first + j]);", "constants[pairs + first]);"),
    "no modulus": Fault("rotary.h", "if (modulus != 0) {", "if (false) {"),
    "modulus of a negative position": Fault("rotary.h", "position < 0 && rest != 0 ? modulus - rest : rest", "rest"),
    "phase truncated": Fault("rotary.h", "(reduced * turns + 0x80000000u) >> 32", "(reduced * turns) >> 32"),
    "wrong term of the series": Fault("rotary.h", "2.55016404f", "2.55316404f"),
    "offset by one": Fault("body.h", "+ uint32_t(step))", "+ uint32_t(step) + 1u)"),
    "one offset for all rows": Fault("body.h", "row * offset_strides[0]", "0"),
    "positions of tokens in another layout": Fault("body.h", "step * offset_strides[1]", "step"),
    "positions of tokens counted on": Fault(
        "body.h", "step * offset_strides[1]]);", "step * offset_strides[1]] + step);"
    ),
    "row added to the position": Fault(
        "body.h", "const int64_t step = token % ", "const int64_t step = row + token % "
    ),
    "stride of queries for keys": Fault(
        "body.h", "k_strides[1],\n        k_strides[3],", "q_strides[1],\n        k_strides[3],"
    ),
    "feature stride of 1": Fault("rotary.h", "static_cast<float>(x[b * stride])", "static_cast<float>(x[b])"),
    "wrong half": Fault(
        "body.h", "{first, pairs, pairs + first, 2 * pairs}", "{first, pairs, first + PAIRS, 2 * pairs}"
    ),
    "layouts exchanged": Fault(
        "rotary.h", "TRADITIONAL ? 2 * j + 1 : PAIRS + j", "TRADITIONAL ? PAIRS + j : 2 * j + 1"
    ),
    "past the last pair": Fault("body.h", "pairs + first, 2 * pairs};", "pairs + first, 2 * pairs + 1};"),
    "last heads skipped": Fault(
        "body.h", "const uint32_t q_blocks = (q_shape[1] + HEADS - 1)", "const uint32_t q_blocks = q_shape[1]"
    ),
    "one head per thread": Fault("body.h", "at.y - q_blocks) * HEADS;", "at.y - q_blocks) * (HEADS == 1 ? 2 : HEADS);"),
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
    "heads between two packs": Fault("rotary.h", "head_stride % PAIRS == 0 &&", ""),
    "output packed like the input": Fault("rotary.h", "&& is_packed<PAIRS>(y, y_head_stride, 1, runs)", ""),
    "unrotated features rotated": Fault("rotary.h", "if (is_copy) {", "if (is_copy && !TRADITIONAL) {"),
    "unrotated features skipped": Fault("body.h", "{copied, dims, copied + PAIRS, dims}", "{copied, dims, dims, dims}"),
    "stride of unrotated features": Fault("rotary.h", "y[a] = x[a * stride];", "y[a] = x[a];"),
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


def decisive_files() -> list[Path]:
    """The files that decide the outcome, relative to the repository."""
    found = {path for pattern in DECISIVE for path in ROOT.glob(pattern)} - {ROOT / path for path in NOT_DECISIVE}
    return sorted(path.relative_to(ROOT) for path in found)


def hashes() -> dict[str, str]:
    """The SHA-256 of each of them, by path."""
    return {path.as_posix(): hashlib.sha256((ROOT / path).read_bytes()).hexdigest() for path in decisive_files()}


def changed() -> list[str]:
    """The decisive files that are not as they were at the last complete run: changed, new or removed."""
    text = HASHES.read_text() if HASHES.exists() else ""
    before = {path: digest for digest, path in (line.split("  ") for line in text.splitlines())}
    now = hashes()
    return sorted(path for path in before | now if before.get(path) != now.get(path))


def outcome(fault: Fault, folder: Path) -> str:
    """The first test that fails; `nothing` if all pass; the error if the tests cannot decide."""
    shutil.copytree(
        ROOT / "mlx_resonance", folder / "mlx_resonance", ignore=shutil.ignore_patterns("__pycache__", "assets")
    )
    # Without tests/conftest.py, which imports the whole package.
    for part in ("pyproject.toml", "tests/__init__.py", *decisive_files()):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, folder / part)
    path = folder / "mlx_resonance" / "kernels" / fault.file
    text = path.read_text()
    if text.count(fault.right) != 1:
        return f"ERROR: {fault.right!r} occurs {text.count(fault.right)} times in {fault.file}"
    path.write_text(text.replace(fault.right, fault.wrong))
    # The copy comes before an installed package: -m puts the working directory first.
    command = [sys.executable, "-m", "pytest", *TESTS]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if "BuildError" in done.stdout:
        return "ERROR: it does not compile"
    failures = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode == 1 and failures:
        return failures[0].removeprefix("FAILED tests/kernels/")
    return "nothing" if done.returncode == 0 else f"ERROR: {(done.stdout + done.stderr)[-500:]}"


def survivors(names: list[str]) -> list[str]:
    """Try the faults of these names and print each outcome. Returns those that no test notices."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        sys.exit("error: the emulator, in which the tests run the kernel, needs g++ on Linux")

    def attempt(name: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            return outcome(FAULTS[name], Path(folder))

    unnoticed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, failed in zip(names, pool.map(attempt, names), strict=True):
            print(f"{name}: {failed}", flush=True)
            if failed.startswith("ERROR") or (failed == "nothing") != (name == "none"):
                unnoticed.append(name)
    print(f"{len(names) - len(unnoticed)} of {len(names)} as expected", *unnoticed, sep="; ")
    return unnoticed


def main() -> None:
    """Try the faults that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(FAULTS)}")
    parser.add_argument("--if-changed", action="store_true", help="only if a file that decides the outcome has changed")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in FAULTS]:
        parser.error(f"there is no fault {unknown[0]!r}: see --help")
    if args.if_changed:
        different = changed()
        if not different:
            print(f"mutants: the kernel and its tests are as in {HASHES.name}, when every fault was noticed")
            return
        print("mutants: all are tried because of", *different, flush=True)
    before = hashes()
    if survivors(args.names or list(FAULTS)):
        sys.exit(1)
    if not args.names and before == hashes():
        HASHES.write_text("".join(f"{digest}  {path}\n" for path, digest in before.items()))


if __name__ == "__main__":
    main()
