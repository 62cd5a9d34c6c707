"""Runs the tests that depend on the machine (those marked `machine`) once more on others: with instructions hidden,
without Numba and with other numbers of threads; and all tests with the oldest and the newest versions that
pyproject.toml allows. Every case of a test, as `make test-long` runs them.

`make test-machines`, or with ONLY="oldest newest" some of them. What each said is left in .pytest_cache/machines/. The
environments of other versions lie in .venv-oldest, .venv-newest and .venv-without-numba; remove one to make it anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
SAID = ROOT / ".pytest_cache" / "machines"
WITHOUT_AVX512 = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own code
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # oneDNN, and our products
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+movbe,+sse4.2",
}


def pinned() -> Path:
    return ROOT / ".venv" / "bin" / "python"


def without_numba() -> Path:
    """The pinned versions once more, as links, without Numba."""
    folder = ROOT / ".venv-without-numba"
    if not (folder / ".made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / ".venv", folder, symlinks=True, copy_function=os.link)
        _pip(folder, "uninstall", "--yes", "numba", "llvmlite")
        (folder / ".made").touch()
    return folder / "bin" / "python"


def oldest() -> Path:
    """The lowest version of everything that pyproject.toml names."""
    folder = ROOT / ".venv-oldest"
    if not (folder / ".made").exists():
        _new(folder)
        uv = [ROOT / ".venv" / "bin" / "uv", "pip", "install", "--quiet", "--system-certs"]
        where = ["--python", folder / "bin" / "python", "--resolution", "lowest-direct", "--editable", ".[dev]"]
        subprocess.run([*uv, *where], cwd=ROOT, check=True)
        (folder / ".made").touch()
    return folder / "bin" / "python"


def newest() -> Path:
    folder = ROOT / ".venv-newest"
    if not (folder / ".made").exists():
        _new(folder)
        _pip(folder, "install", "--editable", ".[dev]")
        (folder / ".made").touch()
    return folder / "bin" / "python"


def _new(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-P", "-m", "venv", folder], check=True)


def _pip(folder: Path, *arguments: str) -> None:
    command = [folder / "bin" / "python", "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    subprocess.run(command, cwd=ROOT, check=True)


@dataclass(frozen=True)
class Machine:
    """Where the tests run once more."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    python: Callable[[], Path] = pinned
    marked: str = "machine"


MACHINES = (
    Machine("as it is"),
    Machine("without AMX", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    Machine("without AVX-512", WITHOUT_AVX512),
    Machine("without Numba", python=without_numba),
    Machine("1 thread", {"OMP_NUM_THREADS": "1"}),
    Machine("2 threads", {"OMP_NUM_THREADS": "2"}),
    Machine("16 threads", {"OMP_NUM_THREADS": "16"}),
    Machine("oldest versions", python=oldest, marked=""),
    Machine("newest versions", python=newest, marked=""),
)


def run(machine: Machine) -> tuple[str, bool]:
    """A line of the table, and whether all passed."""
    began = time.monotonic()
    path = SAID / f"{machine.name.replace(' ', '-')}.txt"
    counted = path.with_suffix(".xml")
    counted.unlink(missing_ok=True)
    try:
        python = machine.python()
    except subprocess.CalledProcessError as error:
        return f"| {machine.name} | could not be set up: exit {error.returncode} | | | |", False
    command = [python, "-m", "pytest", "-m", machine.marked, "--quiet", f"--junitxml={counted}"]
    command += ["--numprocesses", "2", "--dist", "worksteal"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **machine.environment}
    with path.open("w", encoding="utf-8") as out:
        ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False)
    if not counted.is_file():
        return f"| {machine.name} | did not end | | | |", False
    suite = next(ElementTree.parse(counted).iter("testsuite")).attrib
    every, skipped, *broken = (int(suite[name]) for name in ("tests", "skipped", "failures", "errors"))
    numbers = f"{every - skipped - sum(broken)} | {sum(broken)} | {skipped}"
    return f"| {machine.name} | {numbers} | {time.monotonic() - began:.0f} |", ended.returncode == 0


def main() -> None:
    asked = [machine for machine in MACHINES if not sys.argv[1:] or set(machine.name.split()) & set(sys.argv[1:])]
    SAID.mkdir(parents=True, exist_ok=True)
    print("| machine | passed | failed | skipped | seconds |\n|---|---|---|---|---|")
    passed = []
    for machine in asked:
        line, whole = run(machine)
        print(line, flush=True)
        passed.append(whole)
    if not all(passed):
        sys.exit(f"What failed stands in {SAID.relative_to(ROOT)}/.")


if __name__ == "__main__":
    main()
