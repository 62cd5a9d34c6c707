"""Cards that are not here: the kernels that torch would write for them are written and compiled, and fit."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.engine import flex

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++, which makes a device that does nothing, is not here"),
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="an earlier torch asks cards otherwise"
    ),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
KIB = 1 << 10


ASKED = (
    "RTX 4090:8/1x256:bfloat16:300",  # Gemma-2B's heads, which torch's own tiles are too large for
    "RTX 4090:40/10x128:float32:300",  # Phi-4's, in the self-check
    "RTX 4090:40/10x128:bfloat16:24",  # a tree so small that torch would take the kernel for decoding
    "RTX 4090:8/4x64:bfloat16:300:50",  # soft caps, which as a number had no backward pass
    "T4:8/1x256:float16:300",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each kernel takes, by a process of its own, because it tells its torch of cards."""
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("compiled_flex.py"), *ASKED],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_kernels_of_attention_fit_into_shared_memory(kernels: list[dict[str, Any]]) -> None:
    assert not [kernel for kernel in kernels if "error" in kernel or kernel["shared"] > kernel["limit"]]
    passes = [(kernel["asked"], "backward" in kernel["kernel"]) for kernel in kernels]
    assert passes == [(asked, backward) for asked in ASKED for backward in (False, True)]
    assert not [kernel for kernel in kernels if "decod" in kernel["kernel"]]


@pytest.mark.parametrize(
    ("head_size", "dtype", "kib", "side"),
    [
        (128, torch.float16, 64, None),  # torch's own tiles
        (256, torch.bfloat16, 163, None),
        (256, torch.bfloat16, 99, 32),
        (256, torch.float16, 64, 16),
        (96, torch.float32, 99, 32),
        (128, torch.float32, 64, 16),
        (256, torch.float32, 99, 16),
    ],
)
def test_tiles_are_as_small_as_a_card_needs_them(
    head_size: int, dtype: torch.dtype, kib: int, side: int | None
) -> None:
    options = flex.tiles(head_size, dtype, kib * KIB)
    assert options is not None and options.get("bwd_BLOCK_M1") == side and options["FORCE_USE_FLEX_ATTENTION"]


def test_where_no_tile_fits_the_walk_through_the_tree_is_taken() -> None:
    assert flex.tiles(256, torch.float32, 64 * KIB) is None
