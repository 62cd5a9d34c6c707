"""The one door to the terminal for what has styles: no text is read as markup, obeyed, or broken inside of a word."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from tunesmith.language import pieces, said
from tunesmith.terminal import Stream, in_one_line, safe

_PAGE = 100
_FOR_A_FILE = 10_000  # no table is folded
# What stays together when a line is wrapped: what stands in backquotes, a command from its name on, else a word; in
# Chinese, which has no spaces between words, what stands between marks: a name or a path may hold any other sign.
_MARKS = "，。；：、！？）"
_SIGN = rf"[^\s{_MARKS}]"
_NAMES = r"tunesmith|pip|python[\d.]*|iconv|torchrun|accelerate|uv|git|ollama|kill|vllm|curl|llama-cli"
_PROGRAMS = rf"(?:{_SIGN}*/)?(?:{_NAMES}) "
_WORD = re.compile(rf"(?:`[^`\n]*`{_SIGN}*[{_MARKS}]*|(?:{_PROGRAMS}|--[a-z]).*|{_SIGN}*[{_MARKS}]+|\S+)\s*")


class Screen(Console):
    """Rich's console as everything here uses it.

    A string is text and never markup; styles come from `Text.assemble`. A control character in a text is shown as a
    sign. Where a person looks, lines are wrapped between words, never inside of one nor of a command; elsewhere one
    line is one line and no table is folded, whatever COLUMNS says.
    """

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        if "file" not in options:
            stream = sys.stderr if stderr else sys.stdout
            options["file"] = stream.as_it_is if isinstance(stream, Stream) else stream
        super().__init__(markup=False, highlight=False, emoji=False, **options)
        self.for_people = options.get("force_terminal") or options["file"].isatty()
        if not self.for_people:
            given = os.environ.get("COLUMNS", "")
            self._page = int(given) if given.isdecimal() and int(given) else _PAGE
            self.width = _FOR_A_FILE

    def print(self, *objects: Any, **options: Any) -> None:
        if not objects or not all(isinstance(thing, str | Text) for thing in objects):
            if not self.for_people and any(_fills_its_width(thing) for thing in objects):
                options.setdefault("width", self._page)
        else:
            if self.for_people and not options.get("soft_wrap"):
                whole = Text(options.get("sep", " ")).join(map(self._text, objects))
                objects = (Text("\n").join(_wrapped(whole, self.width)),)
            options["soft_wrap"] = True
        super().print(*objects, **options)

    @property
    def has_colour(self) -> bool:
        """Styles can be told apart by their colour: on a terminal that shows any, unless NO_COLOR is set."""
        return self.color_system is not None and not self.no_color

    def labelled(self, label: str, text: str | Text, width: int = 8) -> None:
        """A line of a list: what it is, and beside it the text, wrapped there."""
        head = styled((f"  {padded(label, width)} ", "grey62"))
        if not self.for_people:
            self.print(Text.assemble(head, self._text(text)))
            return
        for line in _wrapped(self._text(text), max(self.width - head.cell_len, 16)):
            self.print(Text.assemble(head, line), soft_wrap=True)
            head = Text(" " * head.cell_len)

    def explained(self, found: str, expected: str, fix: str) -> None:
        """What an error or a fault says of its place."""
        for label, text in ((said("found"), found), (said("expected"), expected), (said("fix"), fix)):
            self.labelled(label, text)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """As rich's, for text that may hold anything."""
        if not self.encoding.startswith("utf"):
            options.setdefault("spinner", "line")
        return _Status(_plainly(status), console=self, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        if isinstance(renderable, Text):
            renderable = _safe(renderable)
        return iter(super().render(renderable, options))

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(safe(text), **options)

    def _text(self, text: str | Text) -> Text:
        return _safe(text) if isinstance(text, Text) else Text(safe(text))


class _Status(Status):
    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        super().update(None if status is None else _plainly(status), **options)
        self._live.refresh()  # what is said is shown, however soon something else is


def styled(*parts: str | tuple[str, str] | Text, one_line: bool = False) -> Text:
    """Parts with their styles as one text; with `one_line`, line ends are shown as signs."""
    shown = in_one_line if one_line else safe
    pairs = (part if isinstance(part, Text | tuple) else (part, "") for part in parts)
    return Text.assemble(*(pair if isinstance(pair, Text) else (shown(pair[0]), pair[1]) for pair in pairs))


def phrase(message: str, /, *, one_line: bool = False, **values: Any) -> Text:
    """A message in the reader's language; its values may have styles, as the parts of `styled` do."""
    whole = pieces(message, **values)
    return styled(*(part if isinstance(part, Text | tuple) else str(part) for part in whole), one_line=one_line)


def padded(text: str, width: int) -> str:
    """The text with spaces after it, so that it takes so many cells; a Chinese character takes two."""
    return text + " " * (width - cell_len(text))


def _plainly(status: RenderableType) -> RenderableType:
    return Text(safe(status)) if isinstance(status, str) else status


def _safe(text: Text) -> Text:
    plain = safe(text.plain)
    if plain == text.plain:
        return text
    copy = text.copy()
    copy.plain = plain  # of the same length, so the styles stay
    return copy


def _fills_its_width(thing: object) -> bool:
    return not isinstance(thing, str | Text) and not (isinstance(thing, Table) and not thing.expand)


def _wrapped(text: Text, width: int) -> Iterator[Text]:
    """The lines of a text, wrapped where words end; what is longer than a line is left to the terminal, which does not
    put a line end into what is copied."""
    for line in text.split("\n", allow_blank=True):
        plain, breaks, start = line.plain, list[int](), 0
        for word in _WORD.finditer(plain):
            end = word.start() + len(word[0].rstrip())
            if plain[start : word.start()].strip() and cell_len(plain[start:end]) > width:
                start = word.start()
                breaks.append(start)
        for part in line.divide(breaks):
            if breaks:
                part.rstrip()
            yield part
