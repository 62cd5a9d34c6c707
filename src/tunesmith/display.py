"""What a person sees in the terminal: the check, the training, answers side by side."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from tunesmith.checking import Checked, held_out_in_training, lengths
from tunesmith.planning import Plan
from tunesmith.planning import clock as _clock
from tunesmith.rows import Row
from tunesmith.screen import Screen, styled
from tunesmith.shown import tokens
from tunesmith.terminal import safe
from tunesmith.trainer import StepMetrics, Watcher
from tunesmith.training import Run
from tunesmith.types import Fault, Origin

if TYPE_CHECKING:
    from tunesmith.evaluate import Evaluation
    from tunesmith.export import Export
    from tunesmith.tune import Study, Trial

_BARS = "▁▂▃▄▅▆▇█"
_LEARNED, _GIVEN = "#052e16 on #86efac", "grey62"
_SIGNS = ("⟦", "⟧")  # around what is learned, where there is no colour
_SHOWN_TOKENS = 400


def check_json(checked: Checked, show: int) -> dict[str, Any]:
    """The answer of `tunesmith check --json`."""
    template = checked.renderer.template
    rows = checked.rows
    return {
        "ok": checked.ok,
        "model": checked.recipe.model.name,
        "template": {
            "source": template.source,
            "digest": template.digest,
            "stop_ids": list(template.stop_ids),
            "folds_system": template.folds_system,
            "own_system": template.own_system,
            "plain_marks": template.plain_marks,
        },
        "rows": {
            "read": checked.n_read,
            "trainable": len(rows),
            "set_aside": checked.n_set_aside,
            "repeats": len(checked.repeats),
        },
        "repeats": _pairs_json(checked.repeats),
        "contradictions": _pairs_json(checked.contradictions),
        "held_out_in_training": _pairs_json(held_out_in_training(checked)),
        "lengths": [{"at_most": bound, "rows": count} for bound, count in lengths(rows)],
        "faults": [fault_json(fault) for fault in checked.faults],
        "tokens": {
            "total": int(rows.n_tokens.sum()),
            "supervised": int(rows.n_supervised.sum()),
            "longest": int(rows.longest.max(initial=0)),
        },
        "targets": [{"name": t.name, "layers": t.layers, "parameters": t.parameters} for t in checked.targets],
        "shown": [_shown_json(checked, row) for row in rows[:show]],
    }


def _pairs_json(pairs: Sequence[tuple[Origin, Origin]]) -> list[dict[str, int]]:
    return [{"line": row.line, "first": first.line} for row, first in pairs]


def _shown_json(checked: Checked, row: Row) -> dict[str, Any]:
    document = row.documents[-1]
    text = checked.renderer.template.tokenizer.decode(list(document.token_ids), skip_special_tokens=False)
    return {
        "line": row.conversation.origin.line,
        "text": text,
        "token_ids": document.token_ids,
        "supervised": document.supervised,
        "prompt_ids": document.prompt_ids,
    }


def fault_json(fault: Fault) -> dict[str, Any]:
    return {
        "file": fault.origin.path,
        "line": fault.origin.line,
        "field": fault.field,
        "found": fault.found,
        "expected": fault.expected,
        "fix": fault.fix,
    }


def run_json(run: Run) -> dict[str, Any]:
    """The answer of `tunesmith train --json`."""
    return {
        "run": str(run.path),
        "adapter": str(run.adapter),
        "steps": run.steps,
        "rows": {"trained": run.rows_trained, "held_out": run.rows_held_out, "set_aside": run.rows_set_aside},
        "final_loss": run.final_loss,
        "held_out_loss": run.held_out_loss,
        "seconds": run.seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "tokens": run.tokens,
        "supervised_tokens": run.supervised_tokens,
        "interrupted": run.interrupted,
        "checkpoint": str(run.checkpoint) if run.checkpoint else None,
    }


def show_check(console: Screen, checked: Checked, show: int) -> None:
    """Account, template, targets, the first rows in colour, and the faults."""
    template, tokenizer = checked.renderer.template, checked.renderer.template.tokenizer
    supervised, total = int(checked.rows.n_supervised.sum()), int(checked.rows.n_tokens.sum())

    def fact(name: str, *parts: str | tuple[str, str]) -> None:
        console.labelled(name, styled(*parts, one_line=True), 13)

    fact("model", f"{checked.recipe.model.name}  ", (f"({checked.config.model_type})", "grey62"))
    fact("template", template.source)
    names = [str(tokenizer.convert_ids_to_tokens(i)) for i in template.stop_ids]
    stops = [(f"{', ' * (n > 0)}{names[n]} ", (str(i), "grey62")) for n, i in enumerate(template.stop_ids)]
    fact("stops at", *(part for stop in stops for part in stop))
    fact("system text", checked.system_text)
    if template.plain_marks is not None:
        fact("turns", *plain_turns(template.plain_marks))
    targets = [(f"{'  ' * (n > 0)}{t.name}", (f"×{t.layers}", "grey62")) for n, t in enumerate(checked.targets)]
    fact("adapts", *(part for target in targets for part in target))
    fact("", f"{sum(t.parameters for t in checked.targets):,} numbers to train")
    fact("rows", f"{checked.n_read:,} read = {len(checked.rows):,} trainable + {checked.n_set_aside:,} faulty")
    if total:
        longest = int(checked.rows.longest.max())
        fact("tokens", f"{total:,}, of them learned {supervised:,} ({supervised / total:.0%}); longest row {longest:,}")
    if checked.rows:
        fact("lengths", _histogram(lengths(checked.rows)))
    for name, pairs, what in (
        ("repeats", checked.repeats, "say the same as an earlier one"),
        ("contradictions", checked.contradictions, "have the prompt of an earlier one and another reply"),
        ("held out", held_out_in_training(checked), "of those held out stand in the training part too"),
    ):
        if pairs:
            sign = "≠" if name == "contradictions" else "="
            lines = ", ".join(f"{row.line} {sign} {first.line}" for row, first in pairs[:5])
            more = " …" if len(pairs) > 5 else ""
            fact(name, (f"{len(pairs):,} rows {what}", "yellow"), f" (lines {lines}{more})")
    if checked.rows and show:
        console.print()
        learned = "is learned: the reply and the token that ends it."
        if console.has_colour:
            said = styled("What the model sees. ", ("Green", _LEARNED), f" {learned} ", ("Grey", _GIVEN), " is given.")
        else:
            said = styled(f"What the model sees. What is between {_SIGNS[0]} and {_SIGNS[1]} {learned}")
        console.print(said)
        for row in checked.rows[:show]:
            place = styled(_place(row.conversation.origin), one_line=True)
            fits = place.cell_len + 6 < console.width  # a panel cuts a title that is too long
            if not fits:
                console.print(place, soft_wrap=True)
            title = place if fits else None
            console.print(
                Panel(
                    coloured(checked, row, signs=not console.has_colour),
                    title=title,
                    title_align="left",
                    border_style="grey35",
                )
            )
    show_faults(console, checked.faults)


def plain_turns(marks: str) -> tuple[str | tuple[str, str], ...]:
    """What a person should know of a template that marks turns with plain text."""
    return (
        (f"plain text marks them ({marks!r})", "yellow"),
        ": who types that into a question can pretend a turn, and nothing can prevent it",
    )


def _histogram(found: Sequence[tuple[int, int]]) -> str:
    """How many rows have at most so many tokens, as bars, and the limit that loses nothing."""
    most = max(count for _, count in found)
    bars = "  ".join(f"≤{bound:,} {_BARS[round(count / most * 7)]} {count:,}" for bound, count in found)
    return f"{bars}  (data.max_length={found[-1][0]} loses nothing)"


def coloured(checked: Checked, row: Row, *, signs: bool = False) -> Text:
    """A row as the model sees it, its learned tokens in colour, and between signs where there is none."""
    text, open_, close = Text(), *(_SIGNS if signs else ("", ""))
    for document in row.documents:
        before = False
        for number, token in enumerate(tokens(checked.renderer, document, _SHOWN_TOKENS)):
            if token.supervised != before:
                text.append(open_ if token.supervised else close)
            before = token.supervised
            style = _LEARNED if token.supervised else _GIVEN
            if not token.supervised and number % 2:
                style += " on grey11"  # so that the borders between tokens can be seen
            text.append(safe(token.text).replace("\n", "⏎\n"), style)
        if before:
            text.append(close)
        if len(document.token_ids) > _SHOWN_TOKENS:
            text.append(f" … {len(document.token_ids) - _SHOWN_TOKENS} more tokens", "italic")
    text.rstrip()
    return text


def show_faults(console: Screen, faults: Sequence[Fault], at_most: int = 10) -> None:
    """The first faults by line, and how many there are."""
    if not faults:
        return
    console.print(f"\n{len(faults):,} faulty {'row' if len(faults) == 1 else 'rows'}", style="bold red")
    for fault in faults[:at_most]:
        if not console.for_people:
            console.print(styled(str(fault), one_line=True))
            continue
        place = styled((str(fault.origin), "bold"), one_line=True)
        console.print(styled("\n", place, "  ", styled((fault.field, "cyan"), one_line=True)), soft_wrap=True)
        for name, part in (("found", fault.found), ("expected", fault.expected), ("fix", fault.fix)):
            console.labelled(name, part)
    if len(faults) > at_most:
        console.print(f"… and {len(faults) - at_most:,} more (all of them with --json)")


def side_by_side(rows: Sequence[tuple[str, str, str]]) -> RenderableType:
    """Questions with the answers before and after."""
    table = Table(box=ROUNDED, show_lines=True, expand=True, border_style="grey35")
    for name, style, ratio in (("question", "bold", 3), ("before", "grey62", 5), ("after", "green", 5)):
        table.add_column(name, style=style, ratio=ratio, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def sparkline(values: Sequence[float], width: int = 30) -> str:
    """The values as small bars, newest on the right.

    >>> sparkline([3, 2, 1])
    '█▅▁'
    """
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    return "".join(_BARS[round((v - low) / (high - low) * 7) if high > low else 0] for v in means)


class TrainingDisplay(Watcher):
    """Step, loss with a sparkline, tokens per second, time left and memory, while it trains."""

    def __init__(self, console: Screen, at_first: str = "Laying out the steps …") -> None:
        """`at_first` is what is done before there is a plan, or the training itself."""
        self._console = console
        self.run: Path | None = None
        """The folder of the training, once there is one."""
        self._status = console.status(at_first)
        self._losses: list[float] = []
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._held_out: list[float] = []
        self._line = Text("Before the first step: the engine is checked, and the loss measured on rows held out …")
        self._progress = Progress(
            TextColumn("training", style="bold", markup=False),
            BarColumn(bar_width=None),
            TextColumn("step {task.completed}/{task.total}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            expand=True,
        )
        self._live = Live(console=console, refresh_per_second=8, transient=False)
        self._plain_at = 0.0
        self._rest = ""
        """What is done after the last step."""

    def __enter__(self) -> TrainingDisplay:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()
        if self._live.is_started:
            self._rest = ""
            self._update(at_once=True)
        self._live.stop()

    def planned(self, plan: Plan) -> None:
        show_plan(self._console, plan, in_full=False)
        self._status.update("Loading the model, and asking it what the trained one will be asked …")

    def began(self, n_steps: int, run: Path) -> None:
        self.run = run
        self._status.stop()
        self._task = self._progress.add_task("train", total=n_steps, left="")
        if self._console.for_people:
            self._live.start()
            self._update(at_once=True)

    def went_on(self, earlier: Sequence[StepMetrics]) -> None:
        self._losses += [line.loss for line in earlier]
        self._progress.update(self._task, completed=len(earlier))

    def stepped(self, metrics: StepMetrics, n_steps: int) -> None:
        self._losses.append(metrics.loss)
        self._recent.append((metrics.tokens, metrics.seconds))
        seconds = sum(s for _, s in self._recent)
        per_step = seconds / len(self._recent)
        left = per_step * (n_steps - metrics.step)
        speed = sum(t for t, _ in self._recent) / max(seconds, 1e-9)
        held_out = ("  held-out ", (f"{self._held_out[-1]:.3f}", "bold")) if self._held_out else ()
        self._line = styled(
            "loss ",
            (f"{metrics.loss:.3f} ", "bold"),
            (sparkline(self._losses), "cyan"),
            *held_out,
            f"  {speed:,.0f} tokens/s  {metrics.peak_memory_bytes / 2**30:.1f} GiB",
        )
        self._rest = "" if metrics.step < n_steps else "The adapter, its answers and the report are written …"
        self._progress.update(self._task, completed=metrics.step, left=f"{_clock(left)} left" if left >= 1 else "")
        if self._console.for_people:
            self._update(at_once=bool(self._rest))
        elif metrics.step in (1, n_steps) or time.monotonic() - self._plain_at > 10:
            self._plain_at = time.monotonic()
            self._console.print(f"step {metrics.step}/{n_steps}  {self._line.plain}  {_clock(left)} left")

    def measured(self, step: int, held_out_loss: float) -> None:
        self._held_out.append(held_out_loss)

    def noted(self, text: str) -> None:
        self._console.print(text, style="yellow")

    def _update(self, *, at_once: bool) -> None:
        lines = Group(self._progress, self._line, *([self._rest] if self._rest else []))
        self._live.update(lines, refresh=at_once)


_MEANINGS = {
    "runtime": "interpreter and libraries",
    "weights": "the base, frozen",
    "adapter": "what is trained",
    "gradients": "of the adapter",
    "optimizer": "two numbers for each of the adapter's",
    "activations": "kept for the backward pass",
    "logits": "of the words that are learned",
    "workspace": "needed for a moment",
}


def show_plan(console: Screen, plan: Plan, *, in_full: bool = True) -> None:
    """Memory by what takes it, time, and what was chosen and why; or one line of it."""
    needed, there = plan.peak_memory_bytes / 2**30, plan.machine.available_bytes / 2**30
    console.print(
        styled(
            ("plan", "bold"),
            f"  {needed:.1f} of {there:.1f} GiB on {plan.machine.name}, ",
            _fits(plan),
            f"; {plan.steps:,} steps in about {_clock(plan.seconds)}",
        )
    )
    if not in_full:
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column("memory")
    table.add_column("MiB", justify="right")
    table.add_column("")
    for name, count in asdict(plan.parts).items():
        table.add_row(name, f"{count / 2**20:,.0f}", _MEANINGS[name], style="" if count else "grey62")
    console.print(table)
    for choice in plan.choices:
        console.print(styled((choice.setting, "cyan"), f" = {choice.value}: {choice.why}"))


def _fits(plan: Plan) -> tuple[str, str]:
    return ("fits", "green") if plan.fits else ("does not fit", "red")


def show_fitting(console: Screen, plans: Sequence[tuple[int, Plan]]) -> None:
    """How a training fits cards of different memories."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("card", "", "needs", "micro-batch", "recomputed", "weights"):
        table.add_column(name)
    for gib, plan in plans:
        chosen = plan.chosen
        table.add_row(
            f"{gib} GiB",
            styled(_fits(plan)),
            f"{plan.peak_memory_bytes / 2**30:.1f} GiB",
            f"{chosen.get('engine.tokens_per_micro_batch', '')} tokens",
            f"{chosen.get('engine.recompute_layers', '')} layers",
            "4 bits (model.quantize=nf4)" if chosen.get("model.quantize") == "nf4" else "16 bits",
        )
    console.print(table)


def show_evaluation(console: Screen, evaluation: Evaluation, lines: Sequence[Sequence[str]], page: Path) -> None:
    """The verdict, the table, and the answers that changed most."""
    colour = {"better": "green", "worse": "red"}.get(evaluation.verdict, "yellow")
    console.print(evaluation.sentence, style=f"bold {colour}")
    for line in evaluation.advice:
        console.print(line)
    table = Table(box=SIMPLE_HEAD)
    table.add_column(f"{evaluation.rows} rows")
    for name in ("base", "tuned"):
        table.add_column(name, justify="right")
    for name, _, base, tuned in lines:
        table.add_row(name, base, tuned)
    console.print(table)
    console.print(f"Answers side by side, worst first: {page}", soft_wrap=True)


def show_export(console: Screen, export: Export) -> None:
    """Where it is, and what it was compared with."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("compared with the live adapter", "found", "bound"):
        table.add_column(name, justify="left" if name.startswith("compared") else "right")
    for check in export.checks:
        table.add_row(check.name, styled((f"{check.value:.4g}", "green")), f"{check.bound:.4g}")
    console.print(table)
    for note in export.notes:
        console.print(styled(("note ", "yellow"), note))
    console.print(f"{export.to}: {export.path}", soft_wrap=True)


def show_run(console: Screen, run: Run) -> None:
    """Where everything is, and how it went."""
    if run.interrupted:
        stopped = (f"Stopped after step {run.steps}.", "yellow")
        console.print(styled(stopped, f" The state is in {run.checkpoint}"), soft_wrap=True)
        return
    before_after = run.held_out_loss
    held_out = (f", held-out loss {before_after[0]:.3f} → ", (f"{before_after[1]:.3f}", "bold")) if before_after else ()
    steps = f": {run.steps} steps in {_clock(run.seconds)}, last loss {run.final_loss:.3f}"
    console.print(styled(("Done", "green"), steps, *held_out))
    console.print(f"{run.rows_trained} rows trained + {run.rows_held_out} held out + {run.rows_set_aside} set aside")
    console.print(f"adapter  {run.adapter}\nreport   {run.path / 'report.html'}", soft_wrap=True)


def drawn(settings: Mapping[str, float]) -> str:
    """The settings of a trial, in a line."""
    return "  ".join(f"{name}={value:.3g}" for name, value in settings.items())


def show_trial(console: Screen, study: Study, trial: Trial) -> None:
    """What came out of a trial that has ended."""
    name, loss = f"trial {trial.number:04}: ", trial.held_out_loss
    if trial.state != "done":
        console.print(styled(name, ("pruned", "yellow"), f", {trial.why}"))
        return
    forgot = (", it forgot", "red") if trial.forgot else ", nothing forgotten"
    parts = [f"held-out loss {loss:.3f}, {trial.general} general questions right, {study.general} before", forgot]
    best = study.best
    console.print(styled(name, *parts, (" (the best so far)", "green") if best and best.number == trial.number else ""))


_STATES = {"done": "", "pruned": "yellow", "running": "cyan", "waiting": "yellow"}


def show_study(console: Screen, study: Study) -> None:
    """All trials, and where the best one is."""
    best, names = study.best, list(study.trials[0].settings) if study.trials else []
    table = Table(box=SIMPLE_HEAD)
    for name in ("trial", "state", *names, "held-out loss", "general", "seconds"):
        table.add_column(name, justify="left" if name in ("trial", "state") else "right")
    for trial in study.trials:
        is_best = best is not None and trial.number == best.number
        state = ("best", "bold green") if is_best else (trial.state, _STATES[trial.state])
        table.add_row(
            f"{trial.number:04}",
            styled(("forgot", "red") if trial.forgot else state),
            *(f"{trial.settings[name]:.3g}" if name in trial.settings else "" for name in names),
            "" if trial.held_out_loss is None else f"{trial.held_out_loss:.3f}",
            "" if trial.general is None else f"{trial.general} of {study.general}",
            "" if trial.seconds is None else f"{trial.seconds:.0f}",
        )
    console.print(table)
    counts = {state: sum(trial.state == state for trial in study.trials) for state in _STATES}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"
    console.print(f"{len(study.trials)} of {study.wanted} trials: {said}. No further one was begun: {study.ended}.")
    if best is None:
        if counts["done"]:
            console.print("None came to its end without forgetting; lower rates and fewer epochs forget less.")
    else:
        console.print(styled(("Best", "green"), f": trial {best.number:04}, {drawn(best.settings)}"), soft_wrap=True)
        console.print(f"run      {best.run}\nrecipe   {study.best_recipe}", soft_wrap=True)
    console.print(f"page     {study.page}", soft_wrap=True)
    console.print("Finished trials keep their adapter and no checkpoints; pruned ones keep their newest checkpoint.")


def _place(origin: Origin) -> str:
    return str(replace(origin, path=Path(origin.path).name))
