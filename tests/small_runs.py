"""Small trainings for tests: their settings, as a function call and as a process, and what they wrote down."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith import recipe
from tunesmith.runs import rundir
from tunesmith.training.trainer import Watcher
from warm import Forked

FLAGS = {
    "eval.hold_out": 0.1,
    "train.examples_per_step": 4,
    "train.learning_rate": 1e-2,
    "train.epochs": 2,
    "train.rehearse": 0,
    "lora.r": 8,
    "lora.dropout": 0.1,
    "train.save_every": "3 steps",
    "train.keep_checkpoints": 2,
}


def settings(model: Path, data: Path, **flags: Any) -> recipe.Recipe:
    return recipe.resolve(None, {"model.name": str(model), "data.path": str(data), **FLAGS, **flags})[0]


class Notes(Watcher):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def numbers(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl and held_out.jsonl hold, without clocks, memory and notes."""
    lines = rundir.read_lines(run / "metrics.jsonl") + rundir.read_lines(run / "held_out.jsonl")
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_bytes", "notes")} for line in lines]


def assert_same(run: Path, other: Path) -> None:
    weights = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (run, other)]
    assert weights[0] == weights[1]
    assert numbers(run) == numbers(other)


def until(steps: int, run: Path, process: Forked, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Waits until a process has written down so many steps, or has ended."""
    deadline = time.monotonic() + 120
    written = run / "metrics.jsonl"
    while len(rundir.read_lines(written)) < steps and process.poll() is None and time.monotonic() < deadline:
        meanwhile()
        time.sleep(0.02)


def flags_of(model: Path, data: Path, **flags: Any) -> list[str]:
    pairs = {**FLAGS, **flags}.items()
    sets = [part for name, value in pairs for part in ("--set", f"{name}={value}")]
    return ["--model", str(model), "--data", str(data), *sets, "--json"]
