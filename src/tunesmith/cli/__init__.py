"""The command line: arguments become calls of the modules below; the only place that prints and sets exit codes.

What needs torch is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import gc
import importlib.metadata
import sys
import traceback
from typing import Annotated, Any

import typer

from tunesmith import caller, system
from tunesmith.cli.console import show_error, show_usage
from tunesmith.errors import RunError, TunesmithError
from tunesmith.language import said

try:
    system.refuse_windows()
except TunesmithError as error:  # before anything is imported that Windows does not have
    show_error(error)
    raise SystemExit(error.exit_code) from None

from tunesmith import terminal
from tunesmith.cli import following, machine, training, tuning, using
from tunesmith.cli.helping import Command, Group

app = typer.Typer(
    name="tunesmith",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="From a file of examples to a model that answers like them.",
)
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # of click, or of the copy that newer versions of typer carry


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"tunesmith {importlib.metadata.version('tunesmith')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version and end.")
    ] = False,
) -> None:
    pass


for command in (training.demo, training.check, training.plan, training.train, tuning.tune, training.resume):
    app.command(cls=Command)(command)
for command in (following.runs, following.watch, using.chat):
    app.command(cls=Command)(command)
app.command(name="eval", cls=Command)(using.evaluate)
for command in (using.export, using.serve, machine.models, machine.fetch, machine.doctor):
    app.command(cls=Command)(command)


def main() -> None:
    """Runs the command line and ends the process with the contract's exit code."""
    caller.is_command_line()
    terminal.open_streams()
    code = 1
    try:
        code = int(app(standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        code = 2
        show_usage(error)
    except TunesmithError as error:
        code = error.exit_code
        show_error(error)
    except (KeyboardInterrupt, typer.Abort):
        print(f"\n{said('Stopped.')}", file=sys.stderr)
        code = 130
    except Exception:
        terminal.guard_streams()
        traceback.print_exc()
        print(said("This is a bug of tunesmith; please report it with the lines above."), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if why := terminal.not_written():
        show_error(
            RunError(
                said("standard output"), why, said("a place to write to"), said("Make room there, or print elsewhere.")
            )
        )
        code = code or 2
    gc.freeze()  # Python goes through everything once more when it ends, a second for what torch and transformers hold
    raise SystemExit(code)
