"""Rows of a JSON array or of JSONL, each with its line; a key that stands twice in one object is seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tunesmith.errors import DataError
from tunesmith.records.found import list_of_objects, plain, seen
from tunesmith.types import Fault, Origin

# What Python's JSON reader says, and what it means.
_JSON_EXPECTED = {
    "Expecting value": "a value",
    "Expecting property name": "a field name in double quotes",
    "Expecting ':'": "':' behind the field name",
    "Expecting ','": "',' or the end of the object",
    "Unterminated string": "a quote at the end of the text",
    "Invalid \\escape": "a known escape (a backslash itself is \\\\)",
    "Invalid \\uXXXX": "four hexadecimal digits behind \\u",
    "Extra data": "nothing behind the object",
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
            raise _Stopped(start, "fewer levels of brackets") from None
        except ValueError:  # Python's limit on the digits of a whole number
            raise _Stopped(start, "shorter numbers") from None
        return value, end, _first_twice(value) if self._any_twice else None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) == len(pairs):
            return value
        self._any_twice = True
        return _Marked(pairs)


class _Stopped(Exception):
    def __init__(self, at: int, expected: str, found: str | None = None) -> None:
        self.at, self.expected, self.found = at, expected, found


def _stopped(text: str, error: json.JSONDecodeError) -> _Stopped:
    """Where Python's reader stopped, and what should have stood there."""
    at = error.pos
    if error.msg.startswith("Invalid control character"):
        found = {"\n": "a line break", "\r": "a line break", "\t": "a tab"}.get(text[at], f"U+{ord(text[at]):04X}")
        return _Stopped(at, "\\n, \\t or the like", f"{found} inside a text")
    if error.msg.startswith("Illegal trailing comma"):  # Python 3.13 points at the comma, earlier ones behind it
        at = _skip(text, at + 1)
    before = text[:at].rstrip(" \t\r\n") if text[at : at + 1] in ("}", "]") else ""
    if before.endswith(","):
        return _Stopped(at, "no comma in front of it")
    expected = next((meant for said, meant in _JSON_EXPECTED.items() if error.msg.startswith(said)), error.msg)
    return _Stopped(at, expected)


def _first_twice(value: Any) -> tuple[str, str] | None:
    """Key and place of the first object, from the outside in, that holds a key twice."""
    waiting = [("", value)]
    for place, item in waiting:
        if isinstance(item, _Marked):
            return item.twice[0], place
        if isinstance(item, dict):
            waiting += [(f"{place}.{key}".removeprefix("."), inner) for key, inner in item.items()]
        elif isinstance(item, list):
            waiting += [(f"{place}[{i}]", inner) for i, inner in enumerate(item)]
    return None


def json_rows(text: str, path: str) -> Iterator[Parsed]:
    decoder = _Decoder()
    position, line, counted = text.index("[") + 1, 1, 0

    def line_at(where: int) -> int:
        nonlocal line, counted
        line += text.count("\n", counted, where)
        counted = max(counted, where)
        return line

    def stopped(where: int, expected: str, found: str | None = None) -> Parsed:
        origin = Origin(path, line_at(where))
        fix = "Reading stopped here; mend the JSON and check again."
        return Parsed(None, origin, Fault(origin, "row", found or seen(text[where : where + 200]), expected, fix))

    first = True
    while True:
        position = _skip(text, position)
        if text[position : position + 1] == "]":
            break
        if not first:
            if text[position : position + 1] != ",":
                yield stopped(position, "',' or ']' behind an object")
                return
            position = _skip(text, position + 1)
        first = False
        origin = Origin(path, line_at(position))
        try:
            value, position, twice = decoder.read(text, position)
        except _Stopped as stop:
            yield stopped(stop.at, stop.expected, stop.found)
            return
        yield Parsed(value, origin, _twice(origin, twice))
    rest = _skip(text, position + 1)
    if rest < len(text):
        yield stopped(rest, "nothing behind the closing ']'")


def jsonl_rows(lines: Iterable[str], path: str, text: Callable[[], str]) -> Iterator[Parsed]:
    """The rows of lines, which end with \\n; `text` is asked for all of them when the first is no whole object."""
    decoder = _Decoder()
    first, offset = True, 0
    for number, whole in enumerate(lines, 1):
        line = whole.rstrip("\r\n")
        start = _skip(line, 0)
        if start < len(line):
            origin = Origin(path, number)
            try:
                value, end, twice = decoder.read(line, start)
                if (rest := _skip(line, end)) < len(line):
                    raise _Stopped(rest, _JSON_EXPECTED["Extra data"])
            except _Stopped as stop:
                if first:
                    _refuse_spread_object(text(), offset + start, number, path)
                found = stop.found or seen(line[stop.at :], "the end of the line")
                fix = "Each line is one whole JSON object; an array starts with '['."
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
        fix = "Mend the JSON; then put the objects into an array ('[' … ']') or on a line each."
        raise DataError(f"{path}:{line}", stop.found or seen(text[stop.at :]), stop.expected, fix) from None
    if "\n" in text[start:end]:
        name = list_of_objects(value)
        fix = (
            f"Write the list of '{name}' alone." if name else "Put '[' and ']' around, and commas between, the objects."
        )
        raise DataError(f"{path}:{line}", "an object over several lines", "an array, or one object a line", fix)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \n\r\t":
        position += 1
    return position


def _twice(origin: Origin, twice: tuple[str, str] | None) -> Fault | None:
    if twice is None:
        return None
    key, place = (plain(part) for part in twice)
    fix = "Readers keep only one of them; delete or rename the other."
    return Fault(origin, f"{place}.{key}".removeprefix("."), f"'{key}' twice in one object", "each key once", fix)
