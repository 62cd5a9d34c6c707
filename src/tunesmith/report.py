"""The page of a run: one self-contained file that a person would send to a colleague, and that does not say where on
this machine things lie."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from tunesmith import places, rundir
from tunesmith.checking import Checked
from tunesmith.rundir import RunDir
from tunesmith.shown import Token, tokens

if TYPE_CHECKING:
    from tunesmith.training import Run

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 56, 12, 12, 28


def write_report(run: RunDir, result: Run, checked: Checked) -> None:
    """Writes report.html from the run's own files and `result`."""
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    lie = [str(run.path.absolute()), *places.paths_in(manifest)]
    lines, held_out = rundir.read_lines(run.metrics), rundir.read_lines(run.held_out)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    template = checked.renderer.template
    page = environment.get_template("report.html.jinja").render(
        title=f"{Path(checked.data.path).name} → {places.named(checked.recipe.model.name)}",
        created=manifest["created"].replace("T", " ")[:16] + " UTC",
        summary=_summary(result, checked),
        figures=_figures(result, manifest["plan"]),
        notes=[(line["step"], places.without(text, lie)) for line in lines for text in line.get("notes", ())],
        loss_curve=curve(
            [(line["step"], line["loss"]) for line in lines], [(line["step"], line["loss"]) for line in held_out]
        ),
        rate_curve=curve([(line["step"], line["learning_rate"]) for line in lines], [], height=120),
        has_held_out=bool(held_out),
        samples=result.samples,
        shown=[
            {
                "where": places.named(str(row.conversation.origin)),
                "tokens": [_visible(token) for token in tokens(checked.renderer, row.documents[-1])],
            }
            for row in checked.rows[:3]
        ],
        account=[
            (
                "rows",
                f"{checked.n_read} read = {result.rows_trained} trained + {result.rows_held_out} held out"
                f" + {result.rows_set_aside} set aside",
            ),
            ("data", f"{Path(checked.data.path).name}, SHA-256 {checked.data.digest}"),
            (
                "base",
                places.named(checked.recipe.model.name if checked.found.source == "folder" else checked.found.source)
                + (f", revision {checked.found.revision}" if checked.found.revision else ""),
            ),
            (
                "adapter",
                f"{sum(t.parameters for t in checked.targets):,} numbers in "
                + ", ".join(t.name for t in checked.targets),
            ),
            (
                "template",
                f"{places.without(template.source, lie)}, SHA-256 {template.digest[:16]}…; stops at "
                + ", ".join(f"{template.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in template.stop_ids),
            ),
            ("system text", checked.system_text),
            ("versions", ", ".join(f"{name} {version}" for name, version in manifest["code"].items())),
            ("machine", f"{manifest['machine']}, {manifest['device']}, {manifest['threads']} threads"),
        ],
        recipe=places.without(run.recipe.read_text(encoding="utf-8"), lie),
        manifest=places.without(json.dumps(manifest, indent=2, ensure_ascii=False), lie),
    )
    rundir.write_text(run.report, page)


def _summary(result: Run, checked: Checked) -> str:
    text = f"{result.rows_trained} rows taught {places.named(checked.recipe.model.name)} in {_minutes(result.seconds)}."
    if result.held_out_loss:
        before, after = result.held_out_loss
        text += f" On {result.rows_held_out} rows it never saw, the loss went from {before:.2f} to {after:.2f}"
        text += f" ({math.exp(before):.1f} to {math.exp(after):.1f} perplexity)."
    return text


def _figures(result: Run, plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    figures = [
        (f"{result.rows_trained:,}", "rows trained"),
        (f"{result.steps:,}", "steps"),
        (f"{result.final_loss:.3f}", "last training loss"),
        (_minutes(result.seconds), f"training time (plan: {_minutes(plan['seconds'])})"),
        (f"{result.tokens:,}", "tokens"),
        (f"{result.supervised_tokens:,}", "of them learned"),
        (
            f"{result.peak_memory_bytes / 2**30:.2f} GiB",
            f"peak memory (plan: {plan['peak_memory_bytes'] / 2**30:.2f})",
        ),
    ]
    if result.held_out_loss:
        figures.insert(2, (f"{result.held_out_loss[0]:.2f} → {result.held_out_loss[1]:.2f}", "held-out loss"))
    return figures


def _minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _visible(token: Token) -> dict[str, Any]:
    return {"text": token.text.replace("\n", "⏎\n"), "learned": token.supervised}


def curve(points: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], height: int = 260) -> Markup:
    """An inline SVG of one or two curves with their axes; its colours hold where no page's style has others."""
    everything = [*points, *held_out]
    if not everything:
        return Markup("<p class='soft'>Nothing measured.</p>")
    last = max(step for step, _ in everything)
    low, high = 0.0, max(value for _, value in everything) or 1.0
    first = min(step for step, _ in everything)

    def place(step: float, value: float) -> str:
        x = _LEFT + (step - first) / max(last - first, 1) * (_WIDTH - _LEFT - _RIGHT)
        y = height - _BOTTOM - (value - low) / (high - low) * (height - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" fill="none" font-size="11">']
    for tick in _ticks(high, 4 if height > 200 else 2):
        x, y = place(first, tick).split(",")
        parts.append(
            f'<path class="axis" stroke="#98a2b3" stroke-width=".5" d="M{x},{y}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{float(y) + 4}" text-anchor="end" fill="#667085">{tick:.3g}</text>'
        )
    for step in sorted({first, (first + last) // 2, last}):
        x = place(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="middle" fill="#667085">{step}</text>')
    line = " ".join(place(*point) for point in points)
    if height > 200 and len(points) > 12:
        parts.append(f'<polyline class="train" points="{line}" stroke="#2f6fde" opacity=".45"/>')
        line = " ".join(place(*point) for point in _smooth(points))
    parts.append(f'<polyline class="smooth" points="{line}" stroke="#2f6fde" stroke-width="2"/>')
    if held_out:
        line = " ".join(place(*point) for point in held_out)
        parts.append(f'<polyline class="held" points="{line}" stroke="#d9730d" stroke-width="2"/>')
        for step, value in held_out:
            x, y = place(step, value).split(",")
            parts.append(
                f'<circle class="dot" cx="{x}" cy="{y}" r="4" fill="#d9730d">'
                f"<title>step {step}: {value:.3f}</title></circle>"
            )
    return Markup("".join([*parts, "</svg>"]))  # numbers only


def _ticks(high: float, count: int) -> list[float]:
    raw = high / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
    return [i * step for i in range(int(high / step) + 1)]


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """For each value the mean of it and all before it, each of which weighs 0.8 of the next one. It is divided by what
    they weigh together, so that the first values count no more than others (arXiv 1412.6980, section 3)."""
    smoothed, total, weight = [], 0.0, 0.0
    for step, value in points:
        total, weight = 0.8 * total + value, 0.8 * weight + 1
        smoothed.append((step, total / weight))
    return smoothed
