"""What a notebook shows of a value: HTML in which everything is escaped, for rows, paths and replies are anybody's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from tunesmith.terminal import safe

_CELL = "text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere"


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
