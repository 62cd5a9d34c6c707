"""Rows of a JSON array or of JSONL, each with its line; a key that stands twice in one object is seen.

A part of the file is held at a time, and a row is never longer than ROW_CHARACTERS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from tunesmith.data.records.found import list_of_objects, plain, seen
from tunesmith.errors import DataError
from tunesmith.language import marked, said
from tunesmith.types import Fault, Origin

ROW_CHARACTERS = 16 << 20
"""Of one row; no model reads a thousandth of it."""
_AT_ONCE = 1 << 20

# What Python's JSON reader says, and what it means.
_JSON_EXPECTED = {
    "Expecting value": marked("a value"),
    "Expecting property name": marked("a field name in double quotes"),
    "Expecting ':'": marked("':' after the field name"),
    "Expecting ','": marked("',' or the end of the object"),
    "Unterminated string": marked("a quote at the end of the text"),
    "Invalid \\escape": marked("a known escape (a backslash itself is \\\\)"),
    "Invalid \\uXXXX": marked("four hexadecimal digits after \\u"),
    "Extra data": marked("nothing after the object"),
}


class Parsed(NamedTuple):
    """A row before it is understood; where there is a fault, `value` is not looked at."""

    value: Any
    origin: Origin
    fault: Fault | None = None


class _Marked(dict[str, Any]):
    """An object of the file in which a key stood twice."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.twice = [key for key, _ in pairs if key in seen or seen.add(key)]


class _Decoder:
    """Reads JSON values and sees a key that stands twice in one object, however deep."""

    def __init__(self) -> None:
        self._any_twice = False
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def read(self, text: str, start: int) -> tuple[Any, int, tuple[str, str] | None]:
        """The value at `start`, where it ends, and the first key that stands twice with its place.

        Raises _Stopped where reading had to stop.
        """
        self._any_twice = False
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _stopped(text, error) from None
        except RecursionError:
            raise _Stopped(start, said("fewer levels of brackets"), whole=True) from None
        except ValueError:  # Python's limit on the digits of a whole number
            raise _Stopped(start, said("shorter numbers"), whole=True) from None
        return value, end, _first_twice(value) if self._any_twice else None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) == len(pairs):
            return value
        self._any_twice = True
        return _Marked(pairs)


class _Stopped(Exception):
    """`whole`: more of the file would change nothing."""

    def __init__(self, at: int, expected: str, found: str | None = None, whole: bool = False) -> None:
        self.at, self.expected, self.found, self.whole = at, expected, found, whole


def _stopped(text: str, error: json.JSONDecodeError) -> _Stopped:
    """Where Python's reader stopped, and what should have stood there."""
    at = error.pos
    if error.msg.startswith("Invalid control character"):
        known = {"\n": said("a line break"), "\r": said("a line break"), "\t": said("a tab")}
        found = said("{what} inside a text", what=known.get(text[at], f"U+{ord(text[at]):04X}"))
        return _Stopped(at, said("\\n, \\t or the like"), found)
    if error.msg.startswith("Illegal trailing comma"):  # Python 3.13 points at the comma, earlier ones behind it
        at = _skip(text, at + 1)
    before = text[:at].rstrip(" \t\r\n") if text[at : at + 1] in ("}", "]") else ""
    if before.endswith(","):
        return _Stopped(at, said("no comma in front of it"))
    expected = next((said(meant) for begin, meant in _JSON_EXPECTED.items() if error.msg.startswith(begin)), error.msg)
    return _Stopped(at, expected)


def _first_twice(value: Any) -> tuple[str, str] | None:
    """Key and place of the first object, from the outside in, that holds a key twice."""
    waiting: list[tuple[Any, Any]] = [((), value)]
    for place, item in waiting:
        if isinstance(item, _Marked):
            return item.twice[0], _written(place)
        if isinstance(item, dict):
            waiting += [((place, f".{key[:60]}"), inner) for key, inner in item.items()]
        elif isinstance(item, list):
            waiting += [((place, f"[{i}]"), inner) for i, inner in enumerate(item)]
    return None


def _written(place: Any) -> str:
    """A place that is told as the place above it and one step: `messages[3].content`."""
    steps: list[str] = []
    while place:
        place, step = place
        steps.append(step)
    return "".join(reversed(steps)).removeprefix(".")


class _Window:
    """The part of a file that is held; it begins where nothing in front is needed any more."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.text = file.read(_AT_ONCE)
        self._line, self._counted = 1, 0  # the line in which the character numbered `_counted` stands

    def line_at(self, where: int) -> int:
        """The line of a place in the text."""
        if where < self._counted:
            return self._line - self.text.count("\n", where, self._counted)
        self._line += self.text.count("\n", self._counted, where)
        self._counted = where
        return self._line

    def more(self) -> bool:
        """Reads on, at least as much as is held, so that what does not fit yet is not looked at too often."""
        part = self._file.read(max(_AT_ONCE, len(self.text)))
        self.text += part
        return bool(part)

    def drop(self, upto: int) -> int:
        """Lets go of what lies in front of that place; returns where the place is now."""
        if upto < _AT_ONCE:
            return upto
        self._line, self._counted = self.line_at(upto), 0
        self.text = self.text[upto:]
        return 0

    def skip(self, position: int) -> int:
        """The next place without white space."""
        while (position := _skip(self.text, position)) == len(self.text):
            position = self.drop(position)
            if not self.more():
                break
        return position

    def is_at(self, position: int, character: str) -> bool:
        return self.text.startswith(character, position)


def json_rows(file: TextIO, path: str) -> Iterator[Parsed]:
    """The objects of the array in the file; reading stops at the first that can not be read."""
    decoder, window = _Decoder(), _Window(file)

    def stopped(where: int, expected: str, found: str | None = None) -> Parsed:
        origin = Origin(path, window.line_at(where))
        fix = said("Reading stopped here; mend the JSON and check again.")
        found = found or seen(window.text[where : where + 200])
        return Parsed(None, origin, Fault(origin, "row", found, expected, fix))

    position = window.skip(0) + 1
    first = True
    while True:
        position = window.skip(position)
        if window.is_at(position, "]"):
            break
        if not first:
            if not window.is_at(position, ","):
                yield stopped(position, said("',' or ']' after an object"))
                return
            position = window.skip(position + 1)
        first = False
        position = window.drop(position)
        origin = Origin(path, window.line_at(position))
        try:
            value, end, twice = _read_whole(decoder, window, position)
        except _Stopped as stop:
            yield stopped(stop.at, stop.expected, stop.found)
            return
        yield Parsed(value, origin, too_long_row(origin, end - position) or _twice(origin, twice))
        position = end
    rest = window.skip(position + 1)
    if rest < len(window.text):
        yield stopped(rest, said("nothing after the closing ']'"))


def _read_whole(decoder: _Decoder, window: _Window, start: int) -> tuple[Any, int, tuple[str, str] | None]:
    """What `decoder.read` finds at `start`, with as much of the file as it takes."""
    while True:
        stop, found = None, None
        try:
            found = decoder.read(window.text, start)
            if found[1] < len(window.text):  # else it may go on: a number can be cut anywhere
                return found
        except _Stopped as stopped:
            if stopped.whole:
                raise
            stop = stopped
        if len(window.text) - start > ROW_CHARACTERS:
            found = said("a row of more than {n} million characters", n=ROW_CHARACTERS >> 20)
            raise _Stopped(start, _at_most(), found)
        if not window.more():
            if found is None:
                raise stop or _Stopped(start, said("a value"))
            return found


def _at_most() -> str:
    return said("at most {n} million characters a row", n=ROW_CHARACTERS >> 20)


def too_long_row(origin: Origin, length: int) -> Fault | None:
    if length <= ROW_CHARACTERS:
        return None
    found = said("a row of {n:,} characters", n=length)
    return Fault(origin, "row", found, _at_most(), said("Is it one row? Cut it into several, or delete it."))


def lines_of(file: TextIO) -> Iterator[tuple[str, int]]:
    """Each line with its length; of one that is longer than a row may be, the beginning."""
    while line := file.readline(ROW_CHARACTERS):
        length = len(line)
        if length == ROW_CHARACTERS:
            part = line
            while not part.endswith("\n") and (part := file.readline(_AT_ONCE)):
                length += len(part)
        yield line, length


def jsonl_rows(lines: Iterable[tuple[str, int]], path: str, text: Callable[[], str]) -> Iterator[Parsed]:
    """The rows of lines, which end with \\n; `text` is asked for all of them when the first is no whole object."""
    decoder = _Decoder()
    first, offset = True, 0
    for number, (whole, length) in enumerate(lines, 1):
        line = whole.rstrip("\r\n")
        start = _skip(line, 0)
        if start < len(line):
            origin = Origin(path, number)
            if fault := too_long_row(origin, length):
                yield Parsed(None, origin, fault)
                first = False
                continue
            try:
                value, end, twice = decoder.read(line, start)
                if (rest := _skip(line, end)) < len(line):
                    raise _Stopped(rest, said(_JSON_EXPECTED["Extra data"]))
            except _Stopped as stop:
                if first:
                    _refuse_spread_object(text(), offset + start, number, path)
                found = stop.found or seen(line[stop.at :], marked("the end of the line"))
                fix = said("Each line is one whole JSON object; an array starts with '['.")
                yield Parsed(None, origin, Fault(origin, "row", found, stop.expected, fix))
            else:
                yield Parsed(value, origin, _twice(origin, twice))
            first = False
        offset += len(whole)


def _refuse_spread_object(text: str, start: int, line: int, path: str) -> None:
    """Raises DataError when an object over several lines begins at `start`: neither an array nor JSONL."""
    try:
        value, end, _ = _Decoder().read(text, start)
    except _Stopped as stop:
        if text[start + 1 : text.find("\n", start)].strip():
            return  # more than '{' in its line: a line of JSONL that is broken
        line += text.count("\n", start, stop.at)
        fix = said("Mend the JSON; then put the objects into an array ('[' … ']') or on a line each.")
        raise DataError(f"{path}:{line}", stop.found or seen(text[stop.at :]), stop.expected, fix) from None
    if "\n" in text[start:end]:
        name = list_of_objects(value)
        fix = said("Put '[' and ']' around, and commas between, the objects.")
        if name:
            fix = said("Write the list of '{name}' alone.", name=name)
        found, expected = said("an object over several lines"), said("an array, or one object a line")
        raise DataError(f"{path}:{line}", found, expected, fix)


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


_SPACE = re.compile(r"[ \n\r\t]*")


def _twice(origin: Origin, twice: tuple[str, str] | None) -> Fault | None:
    if twice is None:
        return None
    key, place = (plain(part[:200]) for part in twice)
    fix = said("Readers keep only one of them; delete or rename the other.")
    return Fault(
        origin,
        f"{place}.{key}".removeprefix("."),
        said("'{key}' twice in one object", key=key),
        said("each key once"),
        fix,
    )
