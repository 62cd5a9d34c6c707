"""The page of a run: one self-contained file that a person would send to a colleague, and that does not say where on
this machine things lie."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from tunesmith import markup, places
from tunesmith.data.shown import Token, tokens
from tunesmith.language import said
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.training.checking import Checked

if TYPE_CHECKING:
    from tunesmith.training.run import Run

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 72, 12, 12, 28


def write_report(run: RunDir, result: Run, checked: Checked) -> None:
    """Writes report.html from the run's own files and `result`."""
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    lie = [str(run.path.absolute()), *places.paths_in(manifest)]
    lines, held_out = rundir.read_lines(run.metrics), rundir.read_lines(run.held_out)
    template = checked.renderer.template
    page = (
        markup.pages()
        .get_template("training/report.html.jinja")
        .render(
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
                    said("rows"),
                    said(
                        "{read} read = {trained} trained + {held_out} held out + {set_aside} set aside",
                        read=checked.n_read,
                        trained=result.rows_trained,
                        held_out=result.rows_held_out,
                        set_aside=result.rows_set_aside,
                    ),
                ),
                (said("data"), f"{Path(checked.data.path).name}, SHA-256 {checked.data.digest}"),
                (
                    said("base"),
                    places.named(
                        checked.recipe.model.name if checked.found.source == "folder" else checked.found.source
                    )
                    + (
                        said(", revision {revision}", revision=checked.found.revision) if checked.found.revision else ""
                    ),
                ),
                (
                    said("adapter"),
                    said(
                        "{n:,} numbers in {layers}",
                        n=sum(t.parameters for t in checked.targets),
                        layers=", ".join(t.name for t in checked.targets),
                    ),
                ),
                (
                    said("template"),
                    said(
                        "{source}, SHA-256 {digest}…; stops at {tokens}",
                        source=places.without(template.described, lie),
                        digest=template.digest[:16],
                        tokens=", ".join(
                            f"{template.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in template.stop_ids
                        ),
                    ),
                ),
                (said("system text"), checked.system_text),
                (said("versions"), ", ".join(f"{name} {version}" for name, version in manifest["code"].items())),
                (
                    said("machine"),
                    said(
                        "{machine}, {device}, {threads} threads",
                        **{n: manifest[n] for n in ("machine", "device", "threads")},
                    ),
                ),
            ],
            recipe=places.without(run.recipe.read_text(encoding="utf-8"), lie),
            manifest=places.without(json.dumps(manifest, indent=2, ensure_ascii=False), lie),
        )
    )
    rundir.write_text(run.report, page)


def _summary(result: Run, checked: Checked) -> str:
    text = said(
        "{rows} rows taught {model} in {time}.",
        rows=result.rows_trained,
        model=places.named(checked.recipe.model.name),
        time=_minutes(result.seconds),
    )
    if result.held_out_loss:
        before, after = result.held_out_loss
        text += said(
            " On {rows} rows it never saw, the loss went from {before:.2f} to {after:.2f} "
            "({less:.1f} to {more:.1f} perplexity).",
            rows=result.rows_held_out,
            before=before,
            after=after,
            less=math.exp(before),
            more=math.exp(after),
        )
    return text


def _figures(result: Run, plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    figures = [
        (f"{result.rows_trained:,}", said("rows trained")),
        (f"{result.steps:,}", said("steps")),
        (f"{result.final_loss:.3f}", said("last training loss")),
        (_minutes(result.seconds), said("time of work (plan: {time})", time=_minutes(plan["seconds"]))),
        (f"{result.tokens:,}", said("tokens")),
        (f"{result.supervised_tokens:,}", said("of them learned")),
        (
            f"{result.peak_memory_bytes / 2**30:.2f} GiB",
            said("peak memory (plan: {gib:.2f})", gib=plan["peak_memory_bytes"] / 2**30),
        ),
    ]
    if result.held_out_loss:
        figures.insert(2, (f"{result.held_out_loss[0]:.2f} → {result.held_out_loss[1]:.2f}", said("held-out loss")))
    return figures


def _minutes(seconds: float) -> str:
    return (
        said("{n:.0f} s", n=seconds)
        if seconds < 100
        else said("{n:.1f} min", n=seconds / 60)
        if seconds < 6000
        else said("{n:.1f} h", n=seconds / 3600)
    )


def _visible(token: Token) -> dict[str, Any]:
    return {"text": token.text.replace("\n", "⏎\n"), "learned": token.supervised}


def curve(points: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], height: int = 260) -> Markup:
    """An inline SVG of one or two curves with their axes; its colours hold where no page's style has others."""
    everything = [*points, *held_out]
    if not everything:
        return Markup("<p class='soft'>{}</p>").format(said("Nothing measured."))
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
                f"<title>{escape(said('step {step}: {value:.3f}', step=step, value=value))}</title></circle>"
            )
    return Markup("".join([*parts, "</svg>"]))


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
