"""Settings found by trying: tune."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from tunesmith import extras
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
    RankOption,
    RateOption,
    SetOption,
    VerboseOption,
    given,
)
from tunesmith.cli.training import looked_at
from tunesmith.language import said

if TYPE_CHECKING:
    from tunesmith.training.trainer import Watcher
    from tunesmith.tuning.tune import Study, Trial


def tune(
    files: FilesArgument = None,
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
    trials: Annotated[int, typer.Option(min=1, help="How many trials there are to be in the study.")] = 20,
    hours: Annotated[
        float | None, typer.Option(min=0.001, help="Ends within so many hours.", show_default=False)
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Take part in the study with other processes, also of other hosts.")
    ] = False,
    epochs: EpochsOption = None,
    lr: RateOption = None,
    rank: RankOption = None,
    batch: BatchOption = None,
    like: LikeOption = None,
    sets: SetOption = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Train even what the plan says does not fit.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Try other learning rates, epochs, ranks and shares of rehearsal: the best at which nothing is forgotten."""
    began = psutil.Process().create_time()
    console = start(verbose, as_json)
    # What is wrong here is said before torch is loaded.
    asked = given(files, model, data, sets, like, epochs=epochs, lr=lr, rank=rank, batch=batch)
    settings = asked.recipe
    extras.require("tune", "tunesmith tune")
    checked = looked_at(console, settings)
    with loading(console):
        from tunesmith.cli import display
        from tunesmith.tuning.tune import tune

    checked.require_ok()
    display.show_check(console, checked, 0)
    fetched(console, settings.model.name, settings.model.revision, weights=True)

    asking = console.status(said("The general questions are asked …"))  # until it is told what came out

    @contextmanager
    def shown(number: int, drawn: Mapping[str, float]) -> Iterator[Watcher]:
        title = said("Trial {number}", number=f"{number:04}")
        console.print(f"\n{title}  {display.drawn(drawn)}", style="bold")
        with display.TrainingDisplay(console) as watcher:
            yield watcher
        asking.start()

    def told(study: Study, trial: Trial) -> None:
        asking.stop()
        display.show_trial(console, study, trial)

    try:
        study = tune(
            settings,
            out,
            trials=trials,
            hours=None if hours is None else max(hours - (time.time() - began) / 3600, 0),
            join=join,
            sources=asked.sources,
            checked=checked,
            anyway=anyway,
            shown=shown,
            told=told,
        )
    finally:
        asking.stop()
    display.show_study(console, study)
    waiting = any(trial.state == "waiting" for trial in study.trials)
    place = [] if out is None else ["--out", str(out)]
    more = [*asked.words, *place, *(() if trials == 20 else ("--trials", str(trials)))]
    best = study.best and (study.best.run, study.best_recipe)
    go_on(console, *onward.after_study(best, more if waiting or study.interrupted else None))
    if as_json:
        print_json(study.as_dict())
    if study.interrupted:
        raise typer.Exit(130)
