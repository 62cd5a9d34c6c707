"""The command line: arguments become calls of the modules below; the only place that prints and sets exit codes.

What needs torch is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from typing import Any

import typer

from tunesmith import system
from tunesmith.cli.console import show_error
from tunesmith.errors import TunesmithError

try:
    system.refuse_windows()
except TunesmithError as error:  # before anything is imported that Windows does not have
    show_error(error)
    raise SystemExit(error.exit_code) from None

from tunesmith.cli import following, machine, training, using
from tunesmith.cli.options import SETTINGS
from tunesmith.interrupts import Terminal

app = typer.Typer(
    name="tunesmith",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="From a file of examples to a model that answers like them.",
)
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # of click, or of the copy that newer versions of typer carry

app.command()(training.demo)
for command in (training.check, training.plan, training.train):
    app.command(epilog=SETTINGS)(command)
app.command()(training.resume)
app.command()(following.runs)
app.command()(following.watch)
app.command()(using.chat)
app.command(name="eval")(using.evaluate)
app.command()(using.export)
app.command()(using.serve)
for command in (machine.models, machine.fetch, machine.doctor):
    app.command()(command)


def main() -> None:
    """Runs the command line and ends the process with the contract's exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name that is not UTF-8 becomes an escape, not a traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None and stream.isatty():
            setattr(sys, name, Terminal(stream))
    code = 1
    try:
        code = int(app(standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        error.show()
        code = 2
    except TunesmithError as error:
        code = error.exit_code
        show_error(error)
    except (KeyboardInterrupt, typer.Abort):
        print("\nStopped.", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception:
        traceback.print_exc()
        print("This is a bug of tunesmith; please report it with the lines above.", file=sys.stderr)
    sys.stdout.flush()
    raise SystemExit(code)
