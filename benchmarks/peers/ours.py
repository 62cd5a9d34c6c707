"""tunesmith, through the function that its command line calls; it reads and renders the rows itself.

The first step of a new model or version compares a few tokens with plain transformers and peft; that is in the time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from measure import peak_memory_bytes, read_job, write

from tunesmith import recipe
from tunesmith.models import hush_libraries
from tunesmith.training.run import train
from tunesmith.training.trainer import StepMetrics, Watcher


class Stopwatch(Watcher):
    """Is told of a step when it is over and written down, so each step's bookkeeping is in the time."""

    def __init__(self) -> None:
        self.lines: list[StepMetrics] = []
        self.notes: list[str] = []
        self._cpu_before = self._began = self._ended = self._cpu_ended = 0.0
        self._peak_bytes = 0

    def began(self, n_steps: int, run: Path) -> None:
        self._cpu_before = time.process_time()  # a little early: the optimizer is made after it

    def stepped(self, metrics: StepMetrics, n_steps: int) -> None:
        self._ended, self._cpu_ended = time.monotonic(), time.process_time()
        if not self.lines:
            self._began = self._ended - metrics.seconds
        self.lines.append(metrics)
        self._peak_bytes = peak_memory_bytes()

    def noted(self, text: str) -> None:
        self.notes.append(text)

    def seen(self, rows: int) -> dict[str, Any]:
        return {
            "rows": rows,
            "tokens": sum(line.tokens for line in self.lines),
            "supervised_tokens": sum(line.supervised_tokens for line in self.lines),
            "steps": len(self.lines),
            "seconds": self._ended - self._began,
            "cpu_seconds": self._cpu_ended - self._cpu_before,
            "peak_memory_bytes": self._peak_bytes,
            "losses": [line.loss for line in self.lines],
            "grad_norms": [line.grad_norm for line in self.lines],
            "step_seconds": [line.seconds for line in self.lines],
            "notes": self.notes,
        }


def main() -> None:
    job = read_job()
    hush_libraries()
    settings, sources = recipe.resolve(None, job["recipe"])
    stopwatch = Stopwatch()
    run = train(settings, Path(job["scratch"]) / "run", sources=sources, watcher=stopwatch)
    write(job, stopwatch.seen(run.rows_trained))


if __name__ == "__main__":
    main()
