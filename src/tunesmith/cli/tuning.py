"""Settings found by trying: tune."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from tunesmith.cli.console import fetched, print_json, require_extra, start
from tunesmith.cli.options import DataOption, JsonOption, ModelOption, SetOption, VerboseOption
from tunesmith.cli.training import checked_rows, recipe_given, rows_of

if TYPE_CHECKING:
    from tunesmith.trainer import Watcher
    from tunesmith.tune import Study, Trial


def tune(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="Settings in a file.", show_default=False)
    ] = None,
    model: ModelOption = None,
    data: DataOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the study; new, empty, or one to go on with. Default: tunes/<data>-<model>.",
            show_default=False,
        ),
    ] = None,
    sets: SetOption = None,
    trials: Annotated[int, typer.Option(min=1, help="How many trials there are to be in the study.")] = 20,
    hours: Annotated[
        float | None, typer.Option(min=0.001, help="Ends within so many hours.", show_default=False)
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Take part in the study with other processes, also of other hosts.")
    ] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Train even what the plan says does not fit.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Try settings for learning rate, epochs and rank: the lowest held-out loss at which nothing is forgotten."""
    began = psutil.Process().create_time()
    console = start(verbose, as_json)
    settings, sources = recipe_given(recipe, model, data, sets)  # what is wrong here is said before torch is loaded
    require_extra("tune", "optuna")
    rows = rows_of(settings)
    found = fetched(console, settings.model.name, settings.model.revision, weights=False)
    from tunesmith import display
    from tunesmith.tune import tune

    checked = checked_rows(console, settings, found, rows)
    checked.require_ok()
    display.show_check(console, checked, 0)
    fetched(console, settings.model.name, settings.model.revision, weights=True)

    @contextmanager
    def shown(number: int, drawn: Mapping[str, float]) -> Iterator[Watcher]:
        console.print(f"\nTrial {number:04}  {display.drawn(drawn)}", style="bold")
        with display.TrainingDisplay(console) as watcher:
            yield watcher

    def told(study: Study, trial: Trial) -> None:
        display.show_trial(console, study, trial)

    study = tune(
        settings,
        out,
        trials=trials,
        hours=None if hours is None else max(hours - (time.time() - began) / 3600, 0),
        join=join,
        sources=sources,
        checked=checked,
        anyway=anyway,
        shown=shown,
        told=told,
    )
    display.show_study(console, study)
    if study.best:
        console.print("\nNext", style="bold")
        for line in (f"chat {shlex.quote(str(study.best.run))}", f"train {shlex.quote(str(study.best_recipe))}"):
            console.print(f"  tunesmith {line}", soft_wrap=True)
    if as_json:
        print_json(study.as_dict())
    if study.interrupted:
        raise typer.Exit(130)
