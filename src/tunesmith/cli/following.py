"""Runs of this and of other processes: runs, watch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import runs as all_runs
from tunesmith.cli import onward
from tunesmith.cli.console import loading, print_json, start
from tunesmith.cli.onward import go_on
from tunesmith.cli.options import JsonOption, RunArgument, VerboseOption
from tunesmith.language import marked, said

if TYPE_CHECKING:
    from rich.text import Text

_STATES = {
    "running": (marked("running"), "cyan"),
    "done": (marked("done"), "green"),
    "interrupted": (marked("interrupted"), "yellow"),
    "failed": (marked("failed"), "red"),
    "gone": (marked("gone"), "red"),
    "silent": (marked("silent"), "yellow"),
}


def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = all_runs.FOLDER,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """The runs of a folder: running, done, interrupted, failed, gone (its process was killed), or silent (it is on
    another machine and has not been heard of for minutes)."""
    console = start(verbose, as_json)
    from rich.table import Table

    found = all_runs.all_in(folder)
    if as_json:
        print_json({"runs": [run.as_dict() for run in found]})
        return
    if not found:
        console.print(said("No runs in {folder}.", folder=folder))
        go_on(console, *onward.after_all(found))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in (said("run"), said("state"), said("step"), said("loss"), said("model"), said("data"), said("began")):
        table.add_column(name, overflow="fold")
    for column in (table.columns[0], table.columns[-1]):
        column.no_wrap = True
    for run in found:
        table.add_row(
            run.path.name,
            _state(run.state),
            f"{run.step}/{run.n_steps}" if run.n_steps else "",
            "" if run.loss is None else f"{run.loss:.3f}",
            Path(run.model).name,
            Path(run.data).name,
            _briefly(run.began),
        )
    console.print(table)
    go_on(console, *onward.after_all(found))


def _briefly(time: str) -> str:
    """By this machine's clock, without the year where it is this one."""
    if not time:
        return ""
    at = datetime.fromisoformat(time).astimezone()
    return at.strftime("%m-%d %H:%M" if at.year == datetime.now().year else "%Y-%m-%d %H:%M")


def _state(state: all_runs.State) -> Text:
    from tunesmith.screen import styled

    name, style = _STATES[state]
    return styled((said(name), style))


def watch(run: RunArgument, as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Follow a run of another process. Ctrl-C ends the watching alone; the exit code is that of the run."""
    console = start(verbose, as_json)
    run = all_runs.named(run)
    state = all_runs.state_of(run)
    with loading(console):
        from tunesmith import terminal
        from tunesmith.cli import display
        from tunesmith.screen import phrase
        from tunesmith.training.trainer import StepMetrics

    with display.TrainingDisplay(console) as watcher:
        watcher.began(state.n_steps, run)
        for news in all_runs.follow(run):
            for line in news.held_out:
                watcher.measured(line["step"], line["loss"])
            if news.metrics:
                metrics = [StepMetrics.of(line) for line in news.metrics]
                watcher.went_on(metrics[:-1])
                watcher.stepped(metrics[-1], news.n_steps)
            if terminal.nobody_reads():
                return
    state = all_runs.state_of(run)
    how, at = _state(state.state), f"{state.step}/{state.n_steps}"
    console.print(phrase("{run}: {state} after step {step}", run=str(run), state=how, step=at))
    if state.reason:
        console.print(state.reason)
    go_on(console, *onward.after_run(run, state.state))
    if as_json:
        print_json(state.as_dict())
    if state.exit_code:
        raise typer.Exit(state.exit_code)
