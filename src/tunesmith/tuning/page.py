"""The page of a study: its trials as a table and as points, in one self-contained file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tunesmith import markup, places
from tunesmith.language import marked, said
from tunesmith.runs import rundir

if TYPE_CHECKING:
    from tunesmith.tuning.tune import Study, Trial

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 220, 52, 12, 12, 28


RULES = (
    marked(
        "The first trial is the recipe as it stands. The settings of the others are drawn by what is known by then: at "
        "random at first, later where losses were low."
    ),
    marked(
        "All trials hold out the same rows. The best has the lowest loss on them among those that forgot nothing, by "
        "the rule of `tunesmith eval`; one that forgot is never the best."
    ),
    marked(
        "The held-out loss is measured after each quarter of a trial's steps. After the second and the third a trial "
        "is pruned where its lowest loss so far is above the median that the others had there, from five on that came "
        "to their end and forgot nothing."
    ),
    marked(
        "A trial is also pruned when the time is up, when it does not fit into memory, and when its numbers are not "
        "finite."
    ),
    marked("A trial that was stopped or killed is gone on with, from its newest checkpoint."),
)
"""How a study goes, and how its best trial is found."""


def write_page(study: Study) -> None:
    """Writes tune.html."""
    best = study.best
    names = list(study.trials[0].settings) if study.trials else []
    page = (
        markup.pages()
        .get_template("tuning/tune.html.jinja")
        .render(
            title=said("{study}: {n} trials", study=study.name, n=len(study.trials)),
            summary=_summary(study),
            names=names,
            plots=[(name, _points(study, name)) for name in names],
            rows=[
                {
                    "trial": trial,
                    "kind": (kind := _kind(study, trial)),
                    "state": said(_STATES[kind]),
                    "settings": [f"{trial.settings[name]:.3g}" if name in trial.settings else "" for name in names],
                    "why": places.without(trial.why, [str(study.path.absolute())]),
                }
                for trial in study.trials
            ],
            base=study.general,
            best=best,
            recipe=places.without(study.recipe, [str(study.path.absolute())]),
            rules=[said(rule) for rule in RULES],
        )
    )
    rundir.write_text(study.path / study.page.name, page)


def _summary(study: Study) -> str:
    n_ended = sum(trial.state in ("done", "pruned") for trial in study.trials)
    parts = [said("{n} of {wanted} trials have ended.", n=n_ended, wanted=study.wanted)]
    best, first = study.best, study.trials[0] if study.trials else None
    if best is None:
        return " ".join([*parts, said("None of them came to its end without forgetting.")] if n_ended else parts)
    values: dict[str, Any] = {"number": f"{best.number:04}", "loss": best.held_out_loss}
    if first is not None and best.number and first.state == "done" and not first.forgot:
        text = marked(
            "The best is {number}, with a held-out loss of {loss:.3f}; that of the recipe as it stands is {first:.3f}."
        )
        parts.append(said(text, **values, first=first.held_out_loss))
    else:
        parts.append(said("The best is {number}, with a held-out loss of {loss:.3f}.", **values))
    kept = said("It answers {n} general questions rightly, and its base {base}.", n=best.general, base=study.general)
    return " ".join([*parts, kept])


_STATES = {
    "best": marked("best"),
    "forgot": marked("forgot"),
    "done": marked("done"),
    "pruned": marked("pruned"),
    "running": marked("running"),
    "waiting": marked("waiting"),
}


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
        return Markup("<p class='soft'>{}</p>").format(said("Nothing measured."))
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
            f"<title>{trial.number:04}: {x:.3g}, {y:.3f}</title></circle>"
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
