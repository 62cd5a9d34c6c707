"""`--help` in the reader's language: what typer was given in English is looked up when it is shown."""

from __future__ import annotations

import gettext
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from typer.core import TyperCommand, TyperGroup

from tunesmith import language, terminal
from tunesmith.cli.options import SHORT, settings_help, short_help
from tunesmith.language import marked, said, translated

# What typer itself says there; it looks these up in gettext's own domain, when it loads rich.
_BY_TYPER = (
    marked("Arguments"),
    marked("Options"),
    marked("Commands"),
    marked("[default: {}]"),
    marked("[required]"),
    marked("Show this message and exit."),
)


class Command(TyperCommand):
    def get_usage(self, ctx: Any) -> str:
        return usage(super().get_usage(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _translate(self, ctx)
        with _without_marks():
            super().format_help(ctx, formatter)


class Group(TyperGroup):
    def get_usage(self, ctx: Any) -> str:
        return usage(super().get_usage(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _translate(self, ctx)
        for command in self.commands.values():
            command.help = in_readers_language(command.help)
        with _without_marks():
            super().format_help(ctx, formatter)


def usage(line: str) -> str:
    return said("Usage: {usage}", usage=line.partition(": ")[2])


def in_readers_language(text: str | None) -> str:
    return _breakable(translated(" ".join(text.split()))) if text else ""


_MARK = "\x1f"
_WIDE = re.compile(r"（|[\u2e80-\uffef][，。；：、）]*")


def _breakable(text: str) -> str:
    """With marks where a line may end, as many as signs are wide: rich ends lines at white space alone, and where it
    takes that from their end it counts signs for cells, so it would cut Chinese."""
    return _WIDE.sub(lambda found: _MARK + "（" if found[0] == "（" else found[0] + _MARK * len(found[0]), text)


@contextmanager
def _without_marks() -> Iterator[None]:
    without_marks: Any = terminal.Stream(sys.stdout, lambda text: text.replace(_MARK, ""))  # as much of one as is asked
    with redirect_stdout(without_marks):
        yield


def _translate(command: Any, context: Any) -> None:
    """Of a command made for this call alone."""
    language.settle(sys.stdout.encoding)
    if (spoken := language.language()) != "en":
        os.environ["LANGUAGE"] = spoken
        gettext.bindtextdomain("tunesmith", str(language.LOCALE))
        gettext.textdomain("tunesmith")
    command.help = in_readers_language(command.help)
    parameters = command.get_params(context)
    for parameter in parameters:
        shown = (
            _breakable(short_help(parameter.name)) if parameter.name in SHORT else in_readers_language(parameter.help)
        )
        parameter.help = shown
    if {"--data", "--set"} <= {name for parameter in parameters for name in parameter.opts}:
        command.epilog = settings_help()
