"""What commands have in common: the console, a model brought here, the answer as JSON, an error shown."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunesmith import language, system, terminal
from tunesmith.errors import DataError, RecipeError, TunesmithError
from tunesmith.language import said

if TYPE_CHECKING:
    from tunesmith.screen import Screen

_ESCAPES = {code: f"\\u{code:04x}" for code in terminal.SIGNS if code > ord("~")}


def start(verbose: bool, answer_on_stdout: bool) -> Screen:
    """The console for people: standard output, or standard error where that is for the answer alone."""
    from tunesmith.screen import Screen

    terminal.guard_streams()
    if given := language.unknown():
        fix = said("Set it to one of the two, or leave it to the locale.")
        raise RecipeError(language.VARIABLE, repr(given), said("en or zh"), fix)
    language.settle(sys.stderr.encoding if answer_on_stdout else sys.stdout.encoding)
    # Before torch is loaded: its threads would wait for each other actively for milliseconds, and on cores that another
    # program uses too a step of 2.7 s took 59 s (2 cores, 2026-11); with this 6.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    system.bound_threads()
    # bitsandbytes fetches code for a CPU from a hub as soon as it is imported, where the package `kernels` is there.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # which lets an import fail

    if verbose:
        os.environ["TUNESMITH_VERBOSE"] = "1"
    else:
        import logging
        import warnings

        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the processes that this one starts
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        logging.disable(logging.WARNING)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if sys.platform.startswith("linux") and "PYTORCH_ALLOC_CONF" not in os.environ:
        # Micro-batches differ in length; in segments that can grow, what one leaves is of use to the next.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from tunesmith import hub

    if hub.offline():
        hub.forbid_network()
    return Screen(stderr=answer_on_stdout, quiet=not _speaks())


@contextmanager
def loading(console: Screen) -> Iterator[None]:
    """While modules are imported that need torch and transformers, which takes seconds; a fifth more where the garbage
    collector goes through the growing heap again and again (4.5 and 3.8 s). It passes over what is there then."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        with console.status(said("Loading torch and transformers …")):
            yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def fetched(console: Screen, name: str, revision: str | None, *, weights: bool) -> Any:
    """The model on this machine, ready for transformers; shows a bar while it is fetched."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from tunesmith import hub

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
    )
    tasks: dict[str, Any] = {}
    with console.status(said("Looking for {name} …", name=name)) as looking:

        def moved(file: str, done: int, total: int) -> None:
            if file not in tasks:
                looking.stop()  # of two that move on a screen, older versions of rich refuse one
                bar.start()
                tasks[file] = bar.add_task(terminal.safe(said("fetching {file}", file=file)), total=total)
            bar.update(tasks[file], completed=done, total=total)

        try:
            found = hub.locate(name, revision, weights=weights, on_progress=moved)
        finally:
            if tasks:
                bar.stop()
    with loading(console):
        from tunesmith import models

    if os.environ.get("TUNESMITH_VERBOSE") is None:
        models.hush_libraries()
    converting = weights and found.folder.is_dir() and models.needs_preparing(found)
    doing = said("Converting the weights to safetensors, once …") if converting else said("Reading its files …")
    with console.status(doing):
        return models.prepared(found, weights=weights)


def print_json(value: dict[str, Any]) -> None:
    """Prints one line of JSON; what a terminal would obey or the encoding lacks is written as an escape of JSON."""
    if not _speaks():
        return
    text = json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_ESCAPES)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False)
    print(text, flush=True)  # serve goes on after it


def _speaks() -> bool:
    """Of several processes that train together the first one speaks; errors are shown by each."""
    return os.environ.get("RANK", "0") == "0"


def show_error(error: TunesmithError) -> None:
    from tunesmith.screen import Screen, styled

    screen = Screen(stderr=True)
    faults: list[dict[str, Any]] = []
    if isinstance(error, DataError) and error.faults:
        from tunesmith.cli.display import fault_json, show_faults

        show_faults(screen, error.faults)
        faults = [fault_json(fault) for fault in error.faults]
    screen.print(
        styled((f"{said('Error')}  ", "bold red"), styled((error.where, "bold"), one_line=True)), soft_wrap=True
    )
    screen.explained(error.found, error.expected, error.fix)
    if "--json" in sys.argv:
        parts = {"where": error.where, "found": error.found, "expected": error.expected, "fix": error.fix}
        print_json({"ok": False, "error": parts, "faults": faults})


def show_usage(error: Any) -> None:
    """What is wrong with the words of a command, as typer found it."""
    from tunesmith.cli import usage
    from tunesmith.screen import Screen

    if not error.format_message():  # the help was printed in its place
        return
    language.settle(sys.stderr.encoding)
    if error.ctx is not None:
        Screen(stderr=True).print(error.ctx.get_usage(), style="grey62")
    show_error(usage.understood(error))
