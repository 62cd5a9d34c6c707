"""What an evaluation leaves in the run's folder: eval.json, the page eval.html, and its verdict in report.html."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tunesmith import markup, places
from tunesmith.evaluation import verdict
from tunesmith.evaluation.evaluate import Evaluation
from tunesmith.evaluation.verdict import Side
from tunesmith.language import said
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir

_PLACE = re.compile(r"<!-- evaluation -->.*<!-- /evaluation -->", re.DOTALL)


def write(run: RunDir, evaluation: Evaluation) -> Path:
    """Writes all three; returns the page."""
    environment = markup.pages()
    shown: dict[str, Any] = {
        **{name: getattr(evaluation, name) for name in ("rows", "verdict", "sentence", "advice", "general", "judge")},
        "data": Path(evaluation.data).name,
        "answers": [replace(answer, where=places.named(answer.where)) for answer in evaluation.answers],
        "kind": "reserved" if evaluation.reserved and evaluation.verdict == "better" else evaluation.verdict,
        "table": table(evaluation),
    }
    page = environment.get_template("evaluation/eval.html.jinja").render(
        **shown,
        title=said("{run}: {verdict}", run=run.path.name, verdict=verdict.called(evaluation.verdict)),
        run=run.path.name,
        rules=verdict.rules(),
        meanings=verdict.meanings(),
    )
    rundir.write_json(run.path / "eval.json", evaluation.as_dict())
    rundir.write_text(run.path / "eval.html", page)
    if run.report.is_file():
        section = environment.get_template("evaluation/verdict.html.jinja").render(**shown)
        link = Markup('<p class="soft"><a href="eval.html">{}</a></p>').format(said("Answers side by side"))
        head = Markup("<h2>{}</h2>").format(said("Evaluation"))
        marked = f"<!-- evaluation -->{head}\n{section}{link}<!-- /evaluation -->"
        report = run.report.read_text(encoding="utf-8")
        rundir.write_text(run.report, _PLACE.sub(lambda _: marked, report))
    return run.path / "eval.html"


def table(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """Name, what it means, the base's figure and the tuned model's."""
    lines = [
        (
            said("loss, nats per token"),
            said("of the tokens that are learned, with the interval of 95 of 100 draws of rows"),
            _loss,
        ),
        (said("perplexity"), "", lambda side: f"{side.perplexity:.2f}"),
        (
            said("listening, nats per token"),
            said("by how much an answer is likelier after its own question than after another one"),
            _listening,
        ),
        (said("likeness to the row's own answer"), "chrF", lambda side: _share(side.likeness)),
        (said("same words"), said("where the row's own answer is short"), lambda side: _share(side.exact)),
        (said("ended by itself"), "", lambda side: _share(side.stopped)),
        (
            said("repetition"),
            said("runs of four words that stand earlier in the answer"),
            lambda side: _share(side.repetition),
        ),
        (said("copied"), said("runs of eight words that stand in training rows"), lambda side: _share(side.copied)),
        (
            said("general questions"),
            said("right of 100 that have nothing to do with the data"),
            lambda side: _right(side.general, sum(one.asked for one in evaluation.kept)),
        ),
        (
            said("speed"),
            said("answers side by side"),
            lambda side: said("{n:.0f} tokens/s", n=side.tokens_per_second),
        ),
    ]
    made = [(name, note, show(evaluation.base), show(evaluation.tuned)) for name, note, show in lines]
    if len(evaluation.kept) > 1:
        made[-1:-1] = [  # before the speed
            (
                said("– in {language}", language=one.called),
                "",
                _right(one.base, one.asked),
                _right(one.tuned, one.asked),
            )
            for one in evaluation.kept
        ]
    if evaluation.judge is not None:
        neither = said("neither: {n}", n=evaluation.judge["neither"])
        made.append(
            (said("preferred by the judge"), neither, str(evaluation.judge["base"]), str(evaluation.judge["tuned"]))
        )
    for task, figures in (evaluation.tasks or {}).items():
        made.append((task, "lm-evaluation-harness", f"{figures['base']:.3f}", f"{figures['tuned']:.3f}"))
    return made


def _right(right: int, asked: int) -> str:
    return said("{right} of {asked}", right=right, asked=asked)


def _loss(side: Side) -> str:
    return _within(side.loss, side.loss_interval)


def _listening(side: Side) -> str:
    return _within(side.listening, side.listening_interval)


def _within(value: float, interval: tuple[float, float]) -> str:
    return said("{value:.3f} ({low:.3f} to {high:.3f})", value=value, low=interval[0], high=interval[1])


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
