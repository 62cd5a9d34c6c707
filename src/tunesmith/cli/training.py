"""From rows to a finished run: demo, check, plan, train, resume."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import recipe as recipes
from tunesmith import runs
from tunesmith.cli import onward
from tunesmith.cli.console import fetched, loading, print_json, start
from tunesmith.cli.onward import go_on
from tunesmith.cli.options import (
    BatchOption,
    DataOption,
    EpochsOption,
    FilesArgument,
    JsonOption,
    LikeOption,
    ModelOption,
    OutOption,
    RankOption,
    RateOption,
    RunArgument,
    SetOption,
    VerboseOption,
    given,
    whole,
    whole_settings,
)
from tunesmith.data import records
from tunesmith.errors import RecipeError
from tunesmith.language import counted, said
from tunesmith.runs import rundir

if TYPE_CHECKING:
    from tunesmith.screen import Screen
    from tunesmith.training.checking import Checked
    from tunesmith.training.run import Run

DetachOption = Annotated[
    bool, typer.Option("--detach", help="Go on in the background; closing the terminal does not stop it.")
]
_CARD_SIZES = (8, 12, 16, 24, 48, 80)


def demo(out: OutOption = None, as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """The whole story on a small real model: check, train, before and after, report."""
    console = start(verbose, as_json)
    with loading(console):
        from rich.rule import Rule

        from tunesmith.cli import demo as demos
        from tunesmith.cli import display
        from tunesmith.screen import padded, phrase, styled

    console.print(Rule(styled(("tunesmith demo", "bold")), align="left"))
    console.print(
        phrase(
            "A small model (SmolLM2, 135 million numbers) learns to be {name}, who keeps a lighthouse.",
            name=("Hester Quill", "bold"),
        )
    )
    console.print()
    settings, _ = demos.recipe()
    fetched(console, settings.model.name, None, weights=True)
    display.show_check(console, looked_at(console, settings), 2)
    console.print()
    out = out or rundir.free_name(runs.FOLDER, "demo")
    with display.TrainingDisplay(console) as watcher, _point_to_go_on_from(console, out):
        result = demos.demo(out, watcher)
    if not result.run.interrupted:
        pairs = list(zip(result.questions, result.before, result.after, strict=True))
        shown = [pairs[i] for i in demos.SHOWN]
        console.print(display.side_by_side([(q.question, b.reply.shown, a.reply.shown) for q, b, a in shown]))
        for name, judged in ((said("before"), result.before), (said("after"), result.after)):
            character, right, stopped = (
                sum(flags)
                for flags in zip(
                    *((j.in_character, j.right, j.reply.stopped_by == "stop") for j in judged), strict=True
                )
            )
            console.print(
                styled(
                    padded(name, 7),
                    phrase(
                        "{character} of {n} in character, {right} with the right fact, {stopped} stopped by themselves",
                        character=(str(character), "bold"),
                        n=len(judged),
                        right=right,
                        stopped=stopped,
                    ),
                )
            )
        console.print()
    display.show_run(console, result.run)
    interrupted, path = result.run.interrupted, result.run.path
    go_on(console, *(onward.after_run(path, "interrupted") if interrupted else onward.after_demo(path)))
    if as_json:
        judgements = {
            name: [
                {
                    "question": q.question,
                    "reply": j.reply.text,
                    "in_character": j.in_character,
                    "right": j.right,
                    "stopped_by": j.reply.stopped_by,
                }
                for q, j in zip(result.questions, judged, strict=False)
            ]
            for name, judged in (("before", result.before), ("after", result.after))
        }
        print_json({**display.run_json(result.run), **judgements})
    _end_of_run(result.run.interrupted)


def check(
    files: FilesArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    epochs: EpochsOption = None,
    lr: RateOption = None,
    rank: RankOption = None,
    batch: BatchOption = None,
    like: LikeOption = None,
    sets: SetOption = None,
    show: Annotated[int, typer.Option(min=0, help="How many rows to show in colour.")] = 3,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Read and render every row; name the faults by line, or show that all is well. Needs no weights."""
    console = start(verbose, as_json)
    # What is wrong here is said before torch is loaded.
    asked = given(files, model, data, sets, like, epochs=epochs, lr=lr, rank=rank, batch=batch)
    checked = looked_at(console, asked.recipe)
    with loading(console):
        from tunesmith.cli import display
        from tunesmith.screen import phrase, styled

    display.show_check(console, checked, show)
    if as_json:
        print_json(display.check_json(checked, show))
    if not checked.ok:
        go_on(console, *onward.after_faults(asked.words, some_are_good=bool(checked.rows)))
        raise typer.Exit(2)
    if not checked.faults:
        console.print(
            styled(
                "\n",
                phrase(
                    "{well} Every row's prompt is the prompt of chat, token for token, and its reply ends in a stop "
                    "token.",
                    well=(said("All is well."), "green"),
                ),
            )
        )
    go_on(console, *onward.after_check(asked.words))


def plan(
    files: FilesArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    epochs: EpochsOption = None,
    lr: RateOption = None,
    rank: RankOption = None,
    batch: BatchOption = None,
    like: LikeOption = None,
    sets: SetOption = None,
    memory: Annotated[
        str | None, typer.Option(help="As if so much were free, e.g. 24GiB.", callback=whole, show_default=False)
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(help="As if it were this graphics card, e.g. 4090.", callback=whole, show_default=False),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="How it fits cards of 8 to 80 GiB.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Memory and time of a training before the start, by what takes them. Needs no weights."""
    console = start(verbose, as_json)
    asked = given(files, model, data, sets, like, epochs=epochs, lr=lr, rank=rank, batch=batch)
    with loading(console):
        from tunesmith import driver, machines
        from tunesmith.cli import display
        from tunesmith.training import planning

    size = None if memory is None else machines.parse_bytes(memory)
    machine = None if card is None else machines.card(card, size)
    checked = looked_at(console, asked.recipe)
    checked.require_ok()
    with console.status(said("Laying out its steps …")):
        plans = planning.fitting(checked, _CARD_SIZES) if table else []
        made = None if table else planning.plan(checked, machine or machines.this_machine(size))
    if made is None:
        display.show_fitting(console, plans)
        go_on(console, *onward.after_plan(asked.words, fits=True))
        if as_json:
            print_json({"table": [{"gib": gib, **plan.as_dict()} for gib, plan in plans]})
        return
    display.show_plan(console, made)
    unused = None if card else driver.unused_card()
    if unused is not None:
        console.print(str(unused), style="yellow")
    go_on(console, *onward.after_plan(asked.words, fits=made.fits))
    if as_json:
        print_json({**made.as_dict(), "unused_card": None if unused is None else str(unused)})


def train(
    files: FilesArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    out: OutOption = None,
    epochs: EpochsOption = None,
    lr: RateOption = None,
    rank: RankOption = None,
    batch: BatchOption = None,
    like: LikeOption = None,
    sets: SetOption = None,
    detach: DetachOption = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Begin even if the plan says that it does not fit.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check, plan, train, save, report."""
    console = start(verbose, as_json)
    asked = given(files, model, data, sets, like, epochs=epochs, lr=lr, rank=rank, batch=batch)
    settings = asked.recipe
    if out is not None:
        rundir.check_target(out)
    checked = looked_at(console, settings)
    with loading(console):
        from tunesmith.cli import display
        from tunesmith.training.run import run_name, train

    checked.require_ok()
    display.show_check(console, checked, 1)
    if detach:
        arguments = [*asked.words, *(["--anyway"] if anyway else [])]
        _go_on_detached(console, "train", arguments, out or rundir.free_name(runs.FOLDER, run_name(settings)), as_json)
        return
    fetched(console, settings.model.name, settings.model.revision, weights=True)
    out = out or rundir.free_name(runs.FOLDER, run_name(settings))
    with display.TrainingDisplay(console) as watcher, _point_to_go_on_from(console, out):
        run = train(settings, out, sources=asked.sources, watcher=watcher, checked=checked, anyway=anyway)
    _show_trained(console, run, as_json)


def resume(
    run: RunArgument,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="train.epochs=N",
            help="Train for longer than was asked.",
            callback=whole_settings,
            show_default=False,
        ),
    ] = None,
    detach: DetachOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Go on with a run that was stopped or killed, as if it never had been."""
    console = start(verbose, as_json)
    run = runs.named(run)
    runs.check_resumable(run)
    epochs = _epochs(sets or [])
    if detach:
        _go_on_detached(console, "resume", [text for s in sets or [] for text in ("--set", s)], run, as_json)
        return
    with loading(console):
        from tunesmith.cli import display
        from tunesmith.training.run import resume

    at_first = said("Comparing checkpoint, rows and base with what the run began with …")
    with display.TrainingDisplay(console, at_first) as watcher, _point_to_go_on_from(console, run):
        result = resume(run, epochs=epochs, watcher=watcher)
    _show_trained(console, result, as_json)


def looked_at(console: Screen, settings: recipes.Recipe) -> Checked:
    """The check of a recipe and what it needs, with a count of the rows while a large file is rendered."""
    with console.status(said("Opening {path} …", path=settings.data.path)):
        rows = records.open_file(settings.data.path, settings.data.columns, settings.template.system)
    found = fetched(console, settings.model.name, settings.model.revision, weights=False)
    with console.status(said("Reading and rendering every row …")) as status:
        from tunesmith.training.checking import check

        def rendered(count: int) -> None:
            status.update(counted("{n:,} row rendered …", "{n:,} rows rendered …", count))

        return check(settings, found, rows, rendered)


def _epochs(sets: list[str]) -> int | None:
    """The one setting that a run may be given anew."""
    epochs = None
    for name, value in map(recipes.parse_flag, sets):
        if name != "train.epochs":
            fix = said("Leave it out, or train anew with it.")
            raise RecipeError(
                f"--set {name}", said("a setting that the run began with"), said("train.epochs alone"), fix
            )
        settings, _ = recipes.resolve(None, {name: value})
        if (epochs := settings.train.epochs) == "auto":
            fix = said("Give the number of epochs to reach, counted from the run's beginning.")
            raise RecipeError(f"--set {name}", "auto", said("a number"), fix)
    return epochs


def _go_on_detached(console: Screen, command: str, arguments: list[str], out: Path, as_json: bool) -> None:
    """Starts a process of its own, waits until it trains, and says where it is; ends as it does where it fails."""
    from tunesmith.runs import Ended, start_detached

    place = ["--out", str(out)] if command == "train" else [str(out)]
    try:
        with console.status(said("It begins in the background: rows, plan, weights …")):
            process = start_detached([command, *arguments, *place], out)
    except Ended as ended:
        print(ended.said, file=sys.stderr)
        raise typer.Exit(ended.code) from None
    place = out / rundir.OUTPUT
    begun = said("Trains in the background as process {pid}. What it says is in {file}", pid=process.pid, file=place)
    console.print(begun, soft_wrap=True)
    go_on(console, *onward.after_detaching(out, process.pid))
    if as_json:
        print_json({"run": str(out), "pid": process.pid, "output": str(out / rundir.OUTPUT)})


def _show_trained(console: Screen, run: Run, as_json: bool) -> None:
    from tunesmith.cli import display

    if run.samples:
        console.print(display.side_by_side([(s.question, s.before, s.after) for s in run.samples]))
    display.show_run(console, run)
    go_on(console, *onward.after_run(run.path, "interrupted" if run.interrupted else "done"))
    if as_json:
        print_json(display.run_json(run))
    _end_of_run(run.interrupted)


@contextmanager
def _point_to_go_on_from(console: Screen, run: Path) -> Iterator[None]:
    """Says how to go on where a training is stopped at once."""
    try:
        yield
    except KeyboardInterrupt:
        if rundir.RunDir(run).manifest.is_file():
            go_on(console, *onward.after_run(run, "interrupted"))
        else:
            console.print(said("Stopped before anything was written."), style="yellow")
        raise


def _end_of_run(interrupted: bool) -> None:
    if interrupted:
        raise typer.Exit(130)
