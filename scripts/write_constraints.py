"""Writes constraints.txt: one version of every package that any extra brings, newest first, with the digests of its
files.

What is pinned already stays, unless it is named: `write_constraints.py transformers peft`, or `--all`. torch stays as
it is in any case, so that nobody fetches gigabytes for nothing; raise it by hand.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WRITTEN = ROOT / "constraints.txt"
HEADER = """\
# The versions that make demo, make test and the figures in docs/ were seen with, and the digests of their files.
# Written by `make constraints`. A version of torch has several builds (for a CPU, for CUDA), which bring libraries of
# their own: they have no digests here.
"""
SEVERAL_BUILDS = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
BESIDES = ("uv", "setuptools>=77")  # what installs, and what builds


def main() -> None:
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    raised = sys.argv[1:]
    upgrades = ["--upgrade"] if raised == ["--all"] else [f"--upgrade-package={name}" for name in raised]
    with tempfile.TemporaryDirectory() as folder:
        besides, bound, out = (Path(folder) / name for name in ("besides.in", "bound.txt", "out.txt"))
        before = WRITTEN.read_text(encoding="utf-8")
        besides.write_text("\n".join(BESIDES))
        bound.write_text("\n".join(re.findall(r"^torch==\S+", before, re.M)))
        out.write_text(before)
        command = [uv, "pip", "compile", "--quiet", "--system-certs", "--universal", "--python-version", "3.11"]
        shown = ["--all-extras", "--generate-hashes", "--no-annotate", "--no-header"]
        files = ["--constraint", bound, "--output-file", out, "pyproject.toml", besides]
        subprocess.run([*command, *shown, *upgrades, *files], cwd=ROOT, check=True)
        made = out.read_text(encoding="utf-8").replace(" \\\n    --hash", " --hash")
    lines = [
        line.partition(" --hash")[0] if SEVERAL_BUILDS.match(line) else line
        for line in made.splitlines()
        if not line.startswith("#")
    ]
    WRITTEN.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
