"""A training as a notebook shows it: one display that follows the steps, and stays as their record."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tunesmith import markup
from tunesmith.language import said
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.training.planning import Plan, clock
from tunesmith.training.report import curve
from tunesmith.training.trainer import StepMetrics, Watcher

_RECENT = 20  # steps, from which the time left is told
_POINTS = 200
"""Of a curve, so that it has a few kilobytes however many steps there are."""


def watcher() -> Watcher:
    """Who watches a training where nobody is named: in a notebook its display, elsewhere nobody."""
    ipython: Any = sys.modules.get("IPython")  # where it runs, it has been imported
    return Display() if getattr(ipython and ipython.get_ipython(), "kernel", None) else Watcher()


class Display(Watcher):
    """Step, losses with their curve, time left, and notes."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._n_steps = 0
        self._steps: list[StepMetrics] = []
        self._held_out: list[tuple[int, float]] = []
        self._notes: list[str] = []
        self._shown: Any = None
        self._showing = self._is_old = False

    def planned(self, plan: Plan) -> None:
        self._plan = plan
        self._show()

    def began(self, n_steps: int, run: Path) -> None:
        self._n_steps = n_steps
        self._held_out = [(line["step"], line["loss"]) for line in rundir.read_lines(RunDir(run).held_out)]
        self._show()

    def went_on(self, earlier: Sequence[StepMetrics]) -> None:
        self._steps += earlier
        self._show()

    def stepped(self, metrics: StepMetrics, n_steps: int) -> None:
        self._steps.append(metrics)
        self._show()

    def measured(self, step: int, held_out_loss: float) -> None:
        self._held_out.append((step, held_out_loss))
        self._show()

    def noted(self, text: str) -> None:
        self._notes.append(text)
        self._show()

    def __repr__(self) -> str:
        return "\n".join(map(markup.text, [self._in_a_line, *self._notes]))

    def _repr_html_(self) -> str:
        parts = [markup.paragraph(note) for note in self._notes]
        if self._steps:
            bar = Markup('<progress value="{}" max="{}"></progress>').format(len(self._steps), self._n_steps)
            losses = _thinned([(line.step, line.loss) for line in self._steps])
            drawn = Markup('<div style="max-width: 36rem">{}</div>').format(curve(losses, self._held_out))
            parts = [Markup("<div>{}</div>").format(bar), drawn, *parts]
        return markup.block(self._in_a_line, *parts)

    @property
    def _in_a_line(self) -> str:
        if not self._steps:
            return said("plan {plan}", plan=self._plan.in_a_line) if self._plan else said("training")
        done, seconds = len(self._steps), [line.seconds for line in self._steps]
        text = said("step {done:,} of {n:,}, loss {loss:.3f}", done=done, n=self._n_steps, loss=self._steps[-1].loss)
        if self._held_out:
            first, last = self._held_out[0][1], self._held_out[-1][1]
            changes = f" → {last:.3f}" * (len(self._held_out) > 1)
            text += said(", held-out loss {loss}", loss=f"{first:.3f}{changes}")
        recent = seconds[-_RECENT:]
        left = sum(recent) / len(recent) * (self._n_steps - done)
        text += said(", {time}", time=clock(sum(seconds)))
        return text + (said(", {time} left", time=clock(left)) if left > 0 else "")

    def _show(self) -> None:
        self._is_old = True
        if self._showing:  # a note of Ctrl-C came meanwhile, and is shown below
            return
        self._showing = True
        try:
            while self._is_old:
                self._is_old = False
                if self._shown is None:
                    self._shown = importlib.import_module("IPython.display").display(self, display_id=True)
                else:
                    self._shown.update(self)
        finally:
            self._showing = False


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most so many points, each the mean of those that it stands for."""
    size = -(-len(points) // _POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
