"""Liger's kernels on a machine without a GPU.

Triton's interpreter has to be asked for before triton is imported, so `interpreted_liger.py` is a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from conftest import cases
from test_engine import FAMILIES


def version(module: ModuleType) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


@pytest.mark.parametrize(("marked", "n_gradients"), cases([("not long", 2), ("", 6)], lambda case: case[0]))
def test_ligers_kernels_are_right_where_they_are_interpreted(marked: str, n_gradients: int) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if version(triton) < (3, 6) and version(np) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.6 takes arrays for numbers, which NumPy 2.4 refuses")
    tests = Path(__file__).with_name("interpreted_liger.py")
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider", tests],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    of_no_family = 6
    assert re.search(rf"^{len(FAMILIES) + n_gradients + of_no_family} passed", ran.stdout, re.MULTILINE), ran.stdout
