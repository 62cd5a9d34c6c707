"""The page of a study: its trials as a table and as points, in one self-contained file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from tunesmith import places, rundir

if TYPE_CHECKING:
    from tunesmith.tune import Study, Trial

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 220, 52, 12, 12, 28


def write_page(study: Study, rules: str) -> None:
    """Writes tune.html; `rules` say how the best trial is found."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    best = study.best
    names = list(study.trials[0].settings) if study.trials else []
    page = environment.get_template("tune.html.jinja").render(
        title=f"{study.name}: {len(study.trials)} trials",
        summary=_summary(study),
        names=names,
        plots=[(name, _points(study, name)) for name in names],
        rows=[
            {
                "trial": trial,
                "kind": _kind(study, trial),
                "settings": [f"{trial.settings[name]:.3g}" if name in trial.settings else "" for name in names],
                "why": places.without(trial.why, [str(study.path.absolute())]),
            }
            for trial in study.trials
        ],
        base=study.general,
        best=best,
        recipe=places.without(study.recipe, [str(study.path.absolute())]),
        rules=rules,
    )
    rundir.write_text(study.path / study.page.name, page)


def _summary(study: Study) -> str:
    done = sum(trial.state in ("done", "pruned") for trial in study.trials)
    text = f"{done} of {study.wanted} trials have ended."
    best = study.best
    if best is None:
        return f"{text} None of them came to its end without forgetting." if done else text
    text += f" The best is {best.number:04}, with a held-out loss of {best.held_out_loss:.3f}"
    if best.number and study.trials[0].state == "done" and not study.trials[0].forgot:
        text += f"; that of the recipe as it stands is {study.trials[0].held_out_loss:.3f}"
    return f"{text}. It answers {best.general} general questions rightly, and its base {study.general}."


def _kind(study: Study, trial: Trial) -> str:
    best = study.best
    if best and trial.number == best.number:
        return "best"
    return "forgot" if trial.forgot else trial.state


def _points(study: Study, name: str) -> Markup:
    """An inline SVG: the held-out loss over a setting, a point for each trial that has one."""
    found = [
        (trial.settings[name], trial.held_out_loss, trial)
        for trial in study.trials
        if trial.held_out_loss is not None and name in trial.settings
    ]
    if not found:
        return Markup("<p class='soft'>Nothing measured.</p>")
    x_place, x_ticks = _axis([x for x, _, _ in found], _LEFT, _WIDTH - _RIGHT, log=_is_wide([x for x, _, _ in found]))
    y_place, y_ticks = _axis([y for _, y, _ in found], _HEIGHT - _BOTTOM, _TOP, log=False)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for tick in y_ticks:
        y = y_place(tick)
        parts.append(
            f'<path class="axis" d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
        )
    for tick in x_ticks:
        parts.append(f'<text x="{x_place(tick):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{tick:.2g}</text>')
    for x, y, trial in sorted(found, key=lambda point: _kind(study, point[2]) == "best"):
        parts.append(
            f'<circle class="{_kind(study, trial)}" cx="{x_place(x):.1f}" cy="{y_place(y):.1f}" r="5">'
            f"<title>{trial.number:04}: {x:.3g}, loss {y:.3f}</title></circle>"
        )
    return Markup("".join([*parts, "</svg>"]))  # numbers, and words of ours


def _axis(
    values: Sequence[float], start: float, end: float, *, log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies between two ends, and three values to write there: the least, one between, and the largest."""
    scale: Callable[[float], float] = math.log if log else float
    low, high = scale(min(values)), scale(max(values))
    if high == low:
        low, high = low - 0.5, high + 0.5
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
    between = math.sqrt(min(values) * max(values)) if log else (min(values) + max(values)) / 2
    return lambda value: start + (scale(value) - low) / (high - low) * (end - start), sorted(
        {min(values), between, max(values)}
    )


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > 8 * min(values)
