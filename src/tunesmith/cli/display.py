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

from tunesmith.data.rows import Row
from tunesmith.data.shown import tokens
from tunesmith.language import counted, marked, said
from tunesmith.screen import Screen, padded, phrase, styled
from tunesmith.terminal import safe
from tunesmith.training.checking import Checked, held_out_in_training, lengths
from tunesmith.training.planning import Plan
from tunesmith.training.planning import clock as _clock
from tunesmith.training.run import Run
from tunesmith.training.trainer import StepMetrics, Watcher
from tunesmith.types import Fault, Origin

if TYPE_CHECKING:
    from tunesmith.evaluation.evaluate import Evaluation
    from tunesmith.export import Export
    from tunesmith.tuning.tune import Study, Trial

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
            "trained": len(rows) - checked.n_held_out,
            "held_out": checked.n_held_out,
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

    fact(said("model"), f"{checked.recipe.model.name}  ", (f"({checked.config.model_type})", "grey62"))
    fact(said("template"), template.described)
    names = [str(tokenizer.convert_ids_to_tokens(i)) for i in template.stop_ids]
    stops = [(f"{', ' * (n > 0)}{names[n]} ", (str(i), "grey62")) for n, i in enumerate(template.stop_ids)]
    fact(said("stops at"), *(part for stop in stops for part in stop))
    fact(said("system text"), checked.system_text)
    if template.plain_marks is not None:
        fact(said("turns"), *plain_turns(template.plain_marks))
    targets = [(f"{'  ' * (n > 0)}{t.name}", (f"×{t.layers}", "grey62")) for n, t in enumerate(checked.targets)]
    fact(said("adapts"), *(part for target in targets for part in target))
    fact("", said("{n:,} numbers to train", n=sum(t.parameters for t in checked.targets)))
    fact(said("rows"), checked.account)
    if total:
        longest = int(checked.rows.longest.max())
        account = said(
            "{total:,}, of them learned {learned:,} ({share:.0%}); longest row {longest:,}",
            total=total,
            learned=supervised,
            share=supervised / total,
            longest=longest,
        )
        fact(said("tokens"), account)
    if checked.rows:
        fact(said("lengths"), _histogram(lengths(checked.rows)))
    for name, pairs, what, sign in (
        (said("repeats"), checked.repeats, marked("{n:,} rows say the same as an earlier one"), "="),
        (
            said("contradictions"),
            checked.contradictions,
            marked("{n:,} rows have the prompt of an earlier one and another reply"),
            "≠",
        ),
        (
            said("held out"),
            held_out_in_training(checked),
            marked("{n:,} rows of those held out stand in the training part too"),
            "=",
        ),
    ):
        if pairs:
            lines = ", ".join(f"{row.line} {sign} {first.line}" for row, first in pairs[:5])
            more = " …" if len(pairs) > 5 else ""
            fact(name, (said(what, n=len(pairs)), "yellow"), said(" (lines {lines})", lines=lines + more))
    if checked.rows and show:
        console.print()
        if console.has_colour:
            legend = phrase(
                "What the model sees. {green} is learned: the reply and the token that ends it. {grey} is given.",
                green=(said("Green"), _LEARNED),
                grey=(said("Grey"), _GIVEN),
            )
        else:
            legend = phrase(
                "What the model sees. What is between {start} and {end} is learned: the reply and the token that ends "
                "it.",
                start=_SIGNS[0],
                end=_SIGNS[1],
            )
        console.print(legend)
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
        (said("plain text marks them ({marks})", marks=repr(marks)), "yellow"),
        said(": who types that into a question can pretend a turn, and nothing can prevent it"),
    )


def _histogram(found: Sequence[tuple[int, int]]) -> str:
    """How many rows have at most so many tokens, as bars, and the limit that loses nothing."""
    most = max(count for _, count in found)
    bars = "  ".join(f"≤{bound:,} {_BARS[round(count / most * 7)]} {count:,}" for bound, count in found)
    return f"{bars}  " + said("(data.max_length={limit} loses nothing)", limit=found[-1][0])


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
            rest = len(document.token_ids) - _SHOWN_TOKENS
            text.append(counted(" … {n} more token", " … {n} more tokens", rest), "italic")
    text.rstrip()
    return text


def show_faults(console: Screen, faults: Sequence[Fault], at_most: int = 10) -> None:
    """The first faults by line, and how many there are."""
    if not faults:
        return
    console.print("\n" + counted("{n:,} faulty row", "{n:,} faulty rows", len(faults)), style="bold red")
    for fault in faults[:at_most]:
        if not console.for_people:
            console.print(styled(str(fault), one_line=True))
            continue
        place = styled((str(fault.origin), "bold"), one_line=True)
        console.print(styled("\n", place, "  ", styled((fault.field, "cyan"), one_line=True)), soft_wrap=True)
        console.explained(fault.found, fault.expected, fault.fix)
    if len(faults) > at_most:
        console.print(said("… and {n:,} more (all of them with --json)", n=len(faults) - at_most))


def side_by_side(rows: Sequence[tuple[str, str, str]]) -> RenderableType:
    """Questions with the answers before and after."""
    table = Table(box=ROUNDED, show_lines=True, expand=True, border_style="grey35")
    columns = ((said("question"), "bold", 3), (said("before"), "grey62", 5), (said("after"), "green", 5))
    for name, style, ratio in columns:
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

    def __init__(self, console: Screen, at_first: str | None = None) -> None:
        """`at_first` is what is done before there is a plan, or the training itself."""
        self._console = console
        self._status = console.status(at_first or said("Laying out the steps …"))
        self._losses: list[float] = []
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._held_out: list[float] = []
        self._newest: tuple[float, str] | None = None
        """The loss of the last step, and its speed and memory."""
        self._line = phrase("Before the first step: the engine is checked, and the loss measured on rows held out …")
        self._progress = Progress(
            TextColumn(said("training"), style="bold", markup=False),
            BarColumn(bar_width=None),
            TextColumn(said("step") + " {task.completed}/{task.total}", markup=False),
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
        self._status.update(said("Loading the model, and asking it what the trained one will be asked …"))

    def began(self, n_steps: int, run: Path) -> None:
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
        self._newest = metrics.loss, f"  {speed:,.0f} {said('tokens/s')}  {metrics.peak_memory_bytes / 2**30:.1f} GiB"
        self._lay_out()
        self._rest = "" if metrics.step < n_steps else said("The adapter, its answers and the report are written …")
        remaining = said("{time} left", time=_clock(left))
        self._progress.update(self._task, completed=metrics.step, left=remaining if left >= 1 else "")
        if self._console.for_people:
            self._update(at_once=bool(self._rest))
        elif metrics.step in (1, n_steps) or time.monotonic() - self._plain_at > 10:
            self._plain_at = time.monotonic()
            self._console.print(f"{said('step')} {metrics.step}/{n_steps}  {self._line.plain}  {remaining}")

    def measured(self, step: int, held_out_loss: float) -> None:
        self._held_out.append(held_out_loss)
        self._lay_out()

    def _lay_out(self) -> None:
        """The line below the bar, of the newest figures."""
        if self._newest is None:
            return
        loss, costs = self._newest
        held_out = (f"  {said('held-out')} ", (f"{self._held_out[-1]:.3f}", "bold")) if self._held_out else ()
        self._line = styled(
            f"{said('loss')} ", (f"{loss:.3f} ", "bold"), (sparkline(self._losses), "cyan"), *held_out, costs
        )

    def noted(self, text: str) -> None:
        if not self._live.is_started:  # what is done now, too
            self._status.update(text)
        self._console.print(text, style="yellow")

    def _update(self, *, at_once: bool) -> None:
        lines = Group(self._progress, self._line, *([self._rest] if self._rest else []))
        self._live.update(lines, refresh=at_once)


_MEANINGS = {
    "runtime": (marked("runtime"), marked("interpreter and libraries")),
    "weights": (marked("weights"), marked("the base, frozen")),
    "adapter": (marked("adapter"), marked("what is trained")),
    "gradients": (marked("gradients"), marked("of the adapter")),
    "optimizer": (marked("optimizer"), marked("two numbers for each of the adapter's")),
    "activations": (marked("activations"), marked("kept for the backward pass")),
    "logits": (marked("logits"), marked("of the words that are learned")),
    "workspace": (marked("workspace"), marked("needed for a moment")),
}


_TIMES = {
    "before": (marked("before"), marked("the base answers questions and general prompts")),
    "steps": (marked("steps"), marked("of the training itself")),
    "measures": (marked("measures"), marked("the loss on rows held out")),
    "after": (marked("after"), marked("the tuned model answers the questions")),
}


def show_plan(console: Screen, plan: Plan, *, in_full: bool = True) -> None:
    """Memory by what takes it, time, and what was chosen and why; or one line of it."""
    needed, there = plan.peak_memory_bytes / 2**30, plan.machine.available_bytes / 2**30
    console.print(
        phrase(
            "{plan}  {needed:.1f} of {there:.1f} GiB on {machine}, {fits}; {steps} in about {time}, {all} with answers",
            plan=(said("plan"), "bold"),
            needed=needed,
            there=there,
            machine=plan.machine.called,
            fits=_fits(plan),
            steps=said("{n:,} steps", n=plan.steps),
            time=_clock(plan.times.steps),
            all=_clock(plan.seconds),
        )
    )
    if not in_full:
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column(said("memory"))
    table.add_column("MiB", justify="right")
    table.add_column("")
    for name, count in asdict(plan.parts).items():
        called, meaning = map(said, _MEANINGS[name])
        table.add_row(called, f"{count / 2**20:,.0f}", meaning, style="" if count else "grey62")
    console.print(table)
    table = Table(box=SIMPLE_HEAD)
    table.add_column(said("time"))
    table.add_column("", justify="right")
    table.add_column("")
    for name, seconds in asdict(plan.times).items():
        called, meaning = map(said, _TIMES[name])
        table.add_row(called, _clock(seconds), meaning)
    console.print(table)
    tokens = said(
        "{total:,} tokens, of them learned {learned:,}; {shared:,} are shared by rows and computed once",
        total=plan.tokens,
        learned=plan.supervised_tokens,
        shared=plan.shared_tokens,
    )
    console.print(tokens)
    for choice in plan.choices:
        console.print(styled((choice.setting, "cyan"), said(" = {value}: {why}", value=choice.value, why=choice.why)))


def _fits(plan: Plan) -> tuple[str, str]:
    return (said("fits"), "green") if plan.fits else (said("does not fit"), "red")


def show_fitting(console: Screen, plans: Sequence[tuple[int, Plan]]) -> None:
    """How a training fits cards of different memories."""
    table = Table(box=SIMPLE_HEAD)
    for name in (said("card"), "", said("needs"), said("micro-batch"), said("recomputed"), said("weights")):
        table.add_column(name)
    for gib, plan in plans:
        chosen = plan.chosen
        table.add_row(
            f"{gib} GiB",
            styled(_fits(plan)),
            f"{plan.peak_memory_bytes / 2**30:.1f} GiB",
            said("{n} tokens", n=chosen.get("engine.tokens_per_micro_batch", "")),
            said("{n} layers", n=chosen.get("engine.recompute_layers", "")),
            said("4 bits (model.quantize=nf4)") if chosen.get("model.quantize") == "nf4" else said("16 bits"),
        )
    console.print(table)


def show_evaluation(console: Screen, evaluation: Evaluation, lines: Sequence[Sequence[str]], page: Path) -> None:
    """The verdict, the table, and the answers that changed most."""
    colour = {"better": "yellow" if evaluation.reserved else "green", "worse": "red"}.get(evaluation.verdict, "yellow")
    console.print(evaluation.sentence, style=f"bold {colour}")
    for line in evaluation.advice:
        console.print(line)
    table = Table(box=SIMPLE_HEAD)
    table.add_column(said("{n} rows", n=evaluation.rows))
    for name in (said("base"), said("tuned")):
        table.add_column(name, justify="right")
    for name, _, base, tuned in lines:
        table.add_row(name, base, tuned)
    console.print(table)
    console.print(said("Answers side by side, worst first: {page}", page=page), soft_wrap=True)


def show_export(console: Screen, export: Export) -> None:
    """Where it is, and what it was compared with."""
    table = Table(box=SIMPLE_HEAD)
    for name in (said("compared with the live adapter"), said("found"), said("bound")):
        table.add_column(name, justify="right" if table.columns else "left")
    for check in export.checks:
        table.add_row(said(check.name), styled((f"{check.value:.4g}", "green")), f"{check.bound:.4g}")
    console.print(table)
    for note in export.notes:
        console.print(styled((f"{said('note')} ", "yellow"), note))
    console.print(f"{export.to}: {export.path}", soft_wrap=True)


def show_run(console: Screen, run: Run) -> None:
    """Where everything is, and how it went."""
    if run.interrupted:
        stopped = (said("Stopped after step {step}.", step=run.steps), "yellow")
        where = phrase("{stopped} The state is in {folder}", stopped=stopped, folder=str(run.checkpoint))
        console.print(where, soft_wrap=True)
        return
    before_after = run.held_out_loss
    done = phrase(
        "{done} in {time}: {steps} steps, last loss {loss:.3f}",
        done=(said("Done"), "green"),
        steps=run.steps,
        time=_clock(run.seconds),
        loss=run.final_loss,
    )
    if before_after:
        before, after = before_after[0], (f"{before_after[1]:.3f}", "bold")
        done = styled(done, phrase(", held-out loss {before:.3f} → {after}", before=before, after=after))
    console.print(done)
    account = said(
        "{trained} rows trained + {held_out} held out + {set_aside} set aside",
        trained=run.rows_trained,
        held_out=run.rows_held_out,
        set_aside=run.rows_set_aside,
    )
    console.print(account)
    for name, path in ((said("adapter"), run.adapter), (said("report"), run.path / "report.html")):
        console.print(f"{padded(name, 8)} {path}", soft_wrap=True)


def drawn(settings: Mapping[str, float]) -> str:
    """The settings of a trial, in a line."""
    return "  ".join(f"{name}={value:.3g}" for name, value in settings.items())


def show_trial(console: Screen, study: Study, trial: Trial) -> None:
    """What came out of a trial that has ended."""
    number = f"{trial.number:04}"
    if trial.state != "done":
        console.print(
            phrase("trial {number}: {pruned}, {why}", number=number, pruned=(said("pruned"), "yellow"), why=trial.why)
        )
        return
    values: dict[str, Any] = {"number": number, "loss": f"{trial.held_out_loss:.3f}", "right": trial.general}
    values["before"] = study.general
    line = phrase(
        "trial {number}: held-out loss {loss}, {right} general questions right, {before} before, {kept}",
        **values,
        kept=(said("it forgot"), "red") if trial.forgot else said("nothing forgotten"),
    )
    best = study.best
    is_best = best is not None and best.number == trial.number
    console.print(styled(line, (said(" (the best so far)"), "green")) if is_best else line)


_STATES = {
    "done": ("", marked("done")),
    "pruned": ("yellow", marked("pruned")),
    "running": ("cyan", marked("running")),
    "waiting": ("yellow", marked("waiting")),
}


def show_study(console: Screen, study: Study) -> None:
    """All trials, and where the best one is."""
    best, names = study.best, list(study.trials[0].settings) if study.trials else []
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # whole in eighty columns
    for name in (said("trial"), said("state")):
        table.add_column(name)
    general = said("general") if study.general is None else said("general,\nbase {n}", n=study.general)
    words = [name.removeprefix("train.").replace("_", " ") for name in names]
    for name in (*words, said("held-out loss"), general, said("seconds")):
        table.add_column(name, justify="right")
    for trial in study.trials:
        colour, state = _STATES[trial.state]
        shown = (said(state), colour)
        if trial.forgot:
            shown = (said("forgot"), "red")
        elif best is not None and trial.number == best.number:
            shown = (said("best"), "bold green")
        table.add_row(
            f"{trial.number:04}",
            styled(shown),
            *(f"{trial.settings[name]:.3g}" if name in trial.settings else "" for name in names),
            "" if trial.held_out_loss is None else f"{trial.held_out_loss:.3f}",
            "" if trial.general is None else str(trial.general),
            "" if trial.seconds is None else f"{trial.seconds:.0f}",
        )
    console.print(table)
    counts = {state: sum(trial.state == state for trial in study.trials) for state in _STATES}
    states = (f"{count} {said(_STATES[state][1])}" for state, count in counts.items() if count)
    console.print(
        said(
            "{n} of {wanted} trials: {states}. No further one was begun: {why}.",
            n=len(study.trials),
            wanted=study.wanted,
            states=said(", ").join(states) or said("none"),
            why=study.ended,
        )
    )
    if best is not None:
        text = phrase(
            "{best}: trial {number}, {settings}",
            best=(said("Best"), "green"),
            number=f"{best.number:04}",
            settings=drawn(best.settings),
        )
        console.print(text, soft_wrap=True)
        console.print(f"{padded(said('run'), 9)}{best.run}", soft_wrap=True)
        console.print(f"{padded(said('recipe'), 9)}{study.best_recipe}", soft_wrap=True)
    elif counts["done"]:
        console.print(said("None came to its end without forgetting; lower rates and fewer epochs forget less."))
    console.print(f"{padded(said('page'), 9)}{study.page}", soft_wrap=True)
    console.print(said("Finished trials keep their adapter and no checkpoints; pruned ones their newest checkpoint."))


def _place(origin: Origin) -> str:
    return str(replace(origin, path=Path(origin.path).name))
