"""What an evaluation leaves in the run's folder: eval.json, the page eval.html, and its verdict in report.html."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from tunesmith import places, rundir, verdict
from tunesmith.evaluate import Evaluation
from tunesmith.rundir import RunDir
from tunesmith.verdict import Side

_PLACE = re.compile(r"<!-- evaluation -->.*<!-- /evaluation -->", re.DOTALL)


def write(run: RunDir, evaluation: Evaluation) -> Path:
    """Writes all three; returns the page."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    shown: dict[str, Any] = {
        **{name: getattr(evaluation, name) for name in ("rows", "verdict", "sentence", "advice", "general", "judge")},
        "data": Path(evaluation.data).name,
        "answers": [replace(answer, where=places.named(answer.where)) for answer in evaluation.answers],
        "kind": evaluation.verdict.replace(",", "").split()[0],
        "table": table(evaluation),
    }
    page = environment.get_template("eval.html.jinja").render(
        **shown,
        title=f"{run.path.name}: {evaluation.verdict}",
        run=run.path.name,
        rules=verdict.RULES,
        meanings=verdict.MEANINGS,
    )
    rundir.write_json(run.path / "eval.json", evaluation.as_dict())
    rundir.write_text(run.path / "eval.html", page)
    if run.report.is_file():
        section = environment.get_template("verdict.html.jinja").render(**shown)
        link = '<p class="soft"><a href="eval.html">Answers side by side</a></p>'
        marked = f"<!-- evaluation --><h2>Evaluation</h2>\n{section}{link}<!-- /evaluation -->"
        report = run.report.read_text(encoding="utf-8")
        rundir.write_text(run.report, _PLACE.sub(lambda _: marked, report))
    return run.path / "eval.html"


def table(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """Name, what it means, the base's figure and the tuned model's."""
    lines = [
        ("loss", "nats per supervised token, with the interval of 95 of 100 draws of rows", _loss),
        ("perplexity", "", lambda side: f"{side.perplexity:.2f}"),
        ("listening", "by how much an answer is likelier after its own question than after another one", _listening),
        ("likeness to the row's own answer", "chrF", lambda side: f"{side.likeness:.2f}"),
        ("same words", "where the row's own answer is short", lambda side: _share(side.exact)),
        ("ended by itself", "", lambda side: _share(side.stopped)),
        ("repetition", "runs of four words that stand earlier in the answer", lambda side: _share(side.repetition)),
        ("copied", "runs of eight words that stand in training rows", lambda side: _share(side.copied)),
        ("general questions", "of 100 that have nothing to do with the data", lambda side: str(side.general)),
        ("speed", "tokens per second, answers side by side", lambda side: f"{side.tokens_per_second:.0f}"),
    ]
    made = [(name, note, show(evaluation.base), show(evaluation.tuned)) for name, note, show in lines]
    if evaluation.judge is not None:
        neither = f"neither: {evaluation.judge['neither']}"
        made.append(("preferred by the judge", neither, str(evaluation.judge["base"]), str(evaluation.judge["tuned"])))
    for task, figures in (evaluation.tasks or {}).items():
        made.append((task, "lm-evaluation-harness", f"{figures['base']:.3f}", f"{figures['tuned']:.3f}"))
    return made


def _loss(side: Side) -> str:
    return f"{side.loss:.3f} ({side.loss_interval[0]:.3f} to {side.loss_interval[1]:.3f})"


def _listening(side: Side) -> str:
    return f"{side.listening:.3f} ({side.listening_interval[0]:.3f} to {side.listening_interval[1]:.3f})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
