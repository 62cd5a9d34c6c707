"""Values as HTML in which everything is escaped, for rows, paths and replies are anybody's: what a notebook shows, and
the pages of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from tunesmith import language
from tunesmith.terminal import safe

_CELL = "text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere"


def pages() -> Environment:
    """The templates of pages; what is `said` in them is in the reader's language, its values are escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.globals.update(said=_said, language=language.language)
    return environment


def _said(message: str, /, **values: Any) -> Markup:
    return Markup("").join(
        Markup(part) if number % 2 == 0 else part for number, part in enumerate(language.pieces(message, **values))
    )


def block(title: str, *parts: Markup) -> str:
    """What a value is, in a line, and what belongs to it below: the whole of what is shown."""
    return str(Markup("<div><b>{}</b>{}</div>").format(text(title), Markup("").join(parts)))


def paragraph(what: str) -> Markup:
    return Markup('<p style="white-space: pre-wrap; overflow-wrap: anywhere">{}</p>').format(text(what))


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> Markup:
    lines = [_line("th", head)] if head else []
    return Markup("<table>{}</table>").format(Markup("").join([*lines, *(_line("td", row) for row in rows)]))


def _line(cell: str, values: Sequence[object]) -> Markup:
    filled = Markup(f'<{cell} style="{_CELL}">{{}}</{cell}>')
    return Markup("<tr>{}</tr>").format(Markup("").join(filled.format(text(value)) for value in values))


def text(value: object) -> str:
    """The value with a sign for each control character, as something that UTF-8 can hold; not yet escaped."""
    return safe(str(value)).encode(errors="backslashreplace").decode()
