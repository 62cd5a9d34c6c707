"""A data file becomes conversations; everything wrong with it is named by line, in one pass.

JSON (an array), JSONL, CSV and Parquet are told apart by what they contain. A row says what it is by its fields:

    {"instruction", "input", "output"}, optionally "system" and "history" ([[question, answer], ...])
    {"messages": [{"role", "content"}, ...]}
    {"conversations": [{"from", "value"}, ...]}                             (ShareGPT)
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tunesmith.errors import DataError
from tunesmith.types import Conversation, Fault, Message, Origin, Role

ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
FIELDS = ("instruction", "input", "output", "system", "history", "messages", "conversations")
"""The names that a row's fields may have, and that `data.columns` maps to the file's own."""

_TALK_FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}
# What other data sets call these fields; only for hints, a file says what it is by our names.
_OTHER_NAMES = {
    "instruction": ("prompt", "question", "query", "user", "problem"),
    "output": ("completion", "response", "answer", "reply", "assistant", "target", "chosen", "solution"),
}
_BOM = b"\xef\xbb\xbf"
_BINARY = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive",
    b"\x89PNG": "a picture",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an Office file",
}
_WIDE = {
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}
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


@dataclass(frozen=True, slots=True)
class Records:
    """A file of rows that can be read as often as need be; made by `open_file`."""

    path: str
    digest: str
    """SHA-256 of the file's bytes, hexadecimal."""
    n_bytes: int
    format: str
    columns: Mapping[str, str]
    system: str | None

    @property
    def unit(self) -> Literal["line", "row"]:
        """What rows are counted in."""
        return "row" if self.format == "parquet" else "line"

    def origin(self, line: int) -> Origin:
        return Origin(self.path, line, self.unit)

    def rows(self, run: int = 1, share: int = 0, of: int = 1) -> Iterator[Conversation | Fault]:
        """For each row what it says, or what is wrong with it (one fault a row).

        Of every `of` runs of `run` rows only the one numbered `share`. Raises DataError where the file as a whole can
        not be read on, or is not what it was when it was opened.
        """
        path = Path(self.path)
        data = _bytes(path)
        if hashlib.sha256(data).hexdigest() != self.digest:
            found = "other bytes than a moment ago"
            raise DataError(self.path, found, "a file that nobody writes to meanwhile", "Start again.")
        for number, (value, origin, fault) in enumerate(_rows(data, path, self.format, self.columns)):
            if number // run % of != share:
                continue
            if fault is not None:
                yield fault
                continue
            try:
                messages = _understand(value, self.columns)
            except _Problem as problem:
                yield Fault(origin, *problem.parts)
                continue
            if self.system is not None and messages[0].role != "system":
                messages = [Message("system", self.system), *messages]
            yield Conversation(tuple(messages), origin)


class Parsed(NamedTuple):
    """A row before it is understood; where there is a fault, `value` is not looked at."""

    value: Any
    origin: Origin
    fault: Fault | None = None


class _Problem(Exception):
    def __init__(self, field: str, found: str, expected: str, fix: str) -> None:
        self.parts = field, found, expected, fix


def open_file(path: str | Path, columns: Mapping[str, str] | None = None, system: str | None = None) -> Records:
    """The file of rows at `path`.

    `columns` maps our field names to the file's; `system` stands in every row that has no system text.
    Raises DataError when the file as a whole can not be read: absent, empty, not UTF-8, of an unknown kind.
    """
    if not str(path):
        raise DataError("data.path", "no data", "a file of examples", "Pass --data FILE.")
    path = Path(path)
    data = _bytes(path)
    records = Records(
        str(path), hashlib.sha256(data).hexdigest(), len(data), _format(data, path), dict(columns or {}), system
    )
    if next(_rows(data, path, records.format, records.columns), None) is None:
        raise DataError(str(path), "no rows", "at least one example", 'Add rows like {"instruction": …, "output": …}.')
    return records


# --- the file ---------------------------------------------------------------------------------------------------------


def _bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise DataError(str(path), "a folder", "a file", "Name the file inside it.")
        data = path.read_bytes()
    except OSError as error:
        near = difflib.get_close_matches(path.name, _names_beside(path), 1)
        fix = f"Did you mean {path.parent / near[0]}?" if near else "Check the name."
        raise DataError(str(path), f"no readable file ({error.strerror})", "a data file", fix) from None
    if not data.removeprefix(_BOM).strip():
        raise DataError(str(path), "an empty file", "at least one example", "Check how the file was written.")
    return data


def _names_beside(path: Path) -> list[str]:
    try:
        return [other.name for other in path.parent.iterdir()]
    except OSError:
        return []


def _format(data: bytes, path: Path) -> str:
    suffix = path.suffix.lower()
    if data.startswith(b"PAR1"):
        return "parquet"
    if suffix == ".parquet":
        found = f"no Parquet (it begins with {data[:8]!r})"
        raise DataError(str(path), found, "a Parquet file", "Rename it after what it is, or write it again.")
    for magic, kind in _BINARY.items():
        if data.startswith(magic):
            raise DataError(str(path), kind, "JSON, JSONL, CSV or Parquet", "Unpack or export it first.")
    start = data.removeprefix(_BOM).lstrip()[:1]
    if start == b"[" and suffix != ".csv":
        return "json"
    if start == b"{" and suffix != ".csv":
        return "jsonl"
    if suffix in (".json", ".jsonl", ".ndjson"):
        text = _text(data, path)  # an encoding that is not UTF-8 is the better message
        blank = len(text) - len(text.lstrip())
        where = f"{path}:{text.count(chr(10), 0, blank) + 1}"
        expected = "'[' (an array) or '{' (an object a line)"
        raise DataError(where, _seen(text[blank:]), expected, "See the README for the three forms of a row.")
    return "csv"


def _text(data: bytes, path: Path) -> str:
    """The file as text; raises DataError at the line where it stops being UTF-8, with the encoding it seems to have."""
    for bom, name in _WIDE.items():
        if data.startswith(bom):
            raise DataError(str(path), f"{name} text", "UTF-8", f"Convert it: {_conversion(name[:-2], path)}")
    zero = data.find(b"\x00")
    if zero >= 0:
        fix = "The file is binary, UTF-16 or damaged; write it again as UTF-8."
        raise DataError(f"{path}:{_line(data, zero)}", "a NUL byte", "text in UTF-8", fix)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (len(_BOM) if data.startswith(_BOM) else 0)
    where, start = f"{path}:{_line(data, at)}", data.rfind(b"\n", 0, at) + 1
    for encoding, name in (("gb18030", "GB18030"), ("cp1252", "Windows-1252")):
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        sample = _quoted(data[start : start + 200].decode(encoding, "ignore").strip())
        fix = f"If that is right, convert it: {_conversion(name, path)}"
        raise DataError(where, f"bytes that are not UTF-8 but read as {name}: {sample}", "UTF-8", fix)
    raise DataError(where, f"the byte 0x{data[at]:02x}, which is not UTF-8", "UTF-8", "Write the file again as UTF-8.")


def _conversion(encoding: str, path: Path) -> str:
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(f'utf8-{path.name}')}"


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def _rows(data: bytes, path: Path, kind: str, columns: Mapping[str, str]) -> Iterator[Parsed]:
    if kind == "parquet":
        yield from _parquet(data, str(path))
    elif kind == "csv":
        yield from _csv(_text(data, path), str(path), columns)
    else:
        yield from (_json if kind == "json" else _jsonl)(_text(data, path), str(path))


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


def _json(text: str, path: str) -> Iterator[Parsed]:
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
        return Parsed(None, origin, Fault(origin, "row", found or _seen(text[where : where + 200]), expected, fix))

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


def _jsonl(text: str, path: str) -> Iterator[Parsed]:
    decoder = _Decoder()
    first, offset = True, 0
    for number, whole in enumerate(io.StringIO(text, newline="\n"), 1):
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
                    _refuse_spread_object(text, offset + start, number, path)
                found = stop.found or _seen(line[stop.at :], "the end of the line")
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
        raise DataError(f"{path}:{line}", stop.found or _seen(text[stop.at :]), stop.expected, fix) from None
    if "\n" in text[start:end]:
        name = _list_of_objects(value)
        fix = (
            f"Write the list of '{name}' alone." if name else "Put '[' and ']' around, and commas between, the objects."
        )
        raise DataError(f"{path}:{line}", "an object over several lines", "an array, or one object a line", fix)


def _csv(text: str, path: str, columns: Mapping[str, str]) -> Iterator[Parsed]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = _csv_header(reader, path, columns)
    while True:
        origin = Origin(path, reader.line_num + 1)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fix = "Reading stopped here; double the quotes inside a quoted cell, and close it."
            yield Parsed(None, origin, Fault(origin, "row", str(error), "CSV", fix))
            return
        if cells is None:
            return
        if not cells:
            continue
        fault = None
        if len(cells) != len(header):
            fix = "Quote cells that hold commas or line breaks."
            fault = Fault(origin, "row", f"{len(cells)} cells", f"{len(header)}, as in the header", fix)
        yield Parsed(dict(zip(header, cells, strict=False)), origin, fault)


def _csv_header(reader: Iterator[list[str]], path: str, columns: Mapping[str, str]) -> list[str]:
    """The names in the first line; raises DataError unless instruction and output are among them."""
    where = f"{path}:1"
    try:
        header = [name.strip() for name in next(reader)]
    except csv.Error as error:
        raise DataError(where, str(error), "a CSV header", "Quote cells that hold quotes or commas.") from None
    found = f"the header {_quoted(', '.join(header))}"
    absent = {name: columns.get(name, name) for name in ("instruction", "output")}
    absent = {name: column for name, column in absent.items() if column not in header}
    if absent:
        hints = [hint for name, column in absent.items() if (hint := _rename_hint(name, column, header))]
        if len(header) == 1 and (mark := next((mark for mark in (";", "\t") if mark in header[0]), None)):
            fix = f"Separate the columns by commas, not by {'tabs' if mark == chr(9) else repr(mark)}."
        elif hints:
            fix = f"Try {' '.join(hints)}"
        else:
            fix = "Name the columns, for instance --set data.columns.output=answer"
        needed = [columns.get(name, name) for name in ("instruction", "output")]
        raise DataError(where, found, f"columns {' and '.join(needed)}", fix)
    if len(set(header)) < len(header):
        raise DataError(
            where, f"a column twice in {_quoted(', '.join(header))}", "each column once", "Rename one of them."
        )
    return header


def _parquet(data: bytes, path: str) -> Iterator[Parsed]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).iter_batches(batch_size=4096):
            for value in batch.to_pylist():
                row += 1
                yield Parsed(value, Origin(path, row, "row"))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        where = f"{path}: behind row {row}" if row else path
        raise DataError(where, f"damaged Parquet ({_first_line(error)})", "Parquet", "Write it again.") from None


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \n\r\t":
        position += 1
    return position


def _twice(origin: Origin, twice: tuple[str, str] | None) -> Fault | None:
    if twice is None:
        return None
    key, place = (_plain(part) for part in twice)
    fix = "Readers keep only one of them; delete or rename the other."
    return Fault(origin, f"{place}.{key}".removeprefix("."), f"'{key}' twice in one object", "each key once", fix)


# --- the row ----------------------------------------------------------------------------------------------------------


def _understand(row: Any, columns: Mapping[str, str]) -> list[Message]:
    """The row's messages: roles known and in order, the last a reply; raises _Problem."""
    if not isinstance(row, dict):
        raise _Problem("row", _described(row), "an object with named fields", 'Write {"instruction": …, "output": …}.')
    names = {name: columns.get(name, name) for name in FIELDS}
    talks = [name for name in _TALK_FIELDS if names[name] in row]
    filled = [name for name in talks if row[names[name]] is not None]  # Parquet has every column in every row
    if filled or (talks and names["instruction"] not in row):
        return _from_talk(row, (filled or talks)[0], names)
    return _from_instruction(row, names)


def _from_instruction(row: dict[str, Any], names: Mapping[str, str]) -> list[Message]:
    _check_fields(row, names)
    asked = [_string(row.get(names[name]), names[name], absent=name == "input") for name in ("instruction", "input")]
    question = "\n".join(text for text in asked if text.strip())
    if not question:
        raise _Problem(names["instruction"], "no text", "a question or task", "Fill it in or delete the row.")
    messages = _system(row, names["system"])
    name = names["history"]
    history = row.get(name) or []
    if not isinstance(history, list):
        raise _Problem(name, _described(history), "a list of [question, answer] pairs", "Mend or delete the field.")
    for number, pair in enumerate(history):
        where = f"{name}[{number}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise _Problem(where, _described(pair), "[question, answer]", "Mend the pair.")
        messages.append(Message("user", _filled(pair[0], f"{where}[0]", "a question")))
        messages.append(Message("assistant", _filled(pair[1], f"{where}[1]", "an answer")))
    answer = _filled(row[names["output"]], names["output"], "the answer to learn")
    return [*messages, Message("user", question), Message("assistant", answer)]


def _check_fields(row: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises _Problem when instruction or output is absent, or when another field's name is misspelt."""
    free = [str(key) for key in row if key not in names.values()]
    for name in ("instruction", "input", "output", "system", "history"):
        column = names[name]
        if column in row:
            continue
        near = _misspelt(column, tuple(free))
        if near:
            fix = f"Rename it in the file, or pass {_rename_hint(name, column, near)}"
            raise _Problem(column, f"'{_plain(near[0])}'", f"'{column}'", fix)
        if name in ("instruction", "output"):
            found = _listed(row)
            if (talk := _list_of_objects(row)) is None:
                hint = _rename_hint(name, column, free) or f"--set data.columns.{name}=…"
                raise _Problem(column, found, f"'{column}'", f"Rename it in the file, or pass {hint}")
            for wanted, keys in _TALK_FIELDS.items():
                if set(keys) <= set(row[talk][0]):
                    fix = f"Rename it in the file, or pass --set data.columns.{wanted}={talk}"
                    raise _Problem(wanted, found, f"'{wanted}'", fix)
            raise _Problem(
                column, f"a list under '{talk}'", "the rows themselves", f"Write the list of '{talk}' alone."
            )


@cache
def _misspelt(column: str, free: tuple[str, ...]) -> list[str]:
    """The one of the `free` names that was meant; cached, since the rows of a file have the same names."""
    return difflib.get_close_matches(column, free, n=1, cutoff=0.84)


def _from_talk(row: Mapping[str, Any], form: str, names: Mapping[str, str]) -> list[Message]:
    name = names[form]
    role_field, text_field = _TALK_FIELDS[form]
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        fix = f'Write [{{"{role_field}": "user", "{text_field}": …}}, …].'
        raise _Problem(name, _described(turns), "a list of turns", fix)
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict):
            expected = f"an object with '{role_field}' and '{text_field}'"
            raise _Problem(where, _described(turn), expected, "Mend the turn.")
        for key in (role_field, text_field):
            if key not in turn:
                raise _Problem(where, _listed(turn), f"'{key}'", "Rename the key in the file.")
        role = turn[role_field]
        if not isinstance(role, str) or role not in ROLES:
            near = difflib.get_close_matches(str(role).lower(), ROLES, 1)
            expected = "system, user or assistant (human or gpt in ShareGPT)"
            fix = f"Did you mean '{near[0]}'?" if near else "Rename the role, or leave the turn out."
            raise _Problem(f"{where}.{role_field}", _described(role), expected, fix)
        says = "the answer to learn" if ROLES[role] == "assistant" else f"what the {role} says"
        messages.append(Message(ROLES[role], _filled(turn[text_field], f"{where}.{text_field}", says)))
    _check_order(messages, name)
    beside = _system(row, names["system"])  # ShareGPT keeps the system text beside the talk
    if beside and messages[0].role == "system":
        found = "a system text beside a talk that begins with one"
        raise _Problem(names["system"], found, "one system text", "Delete one of the two.")
    return [*beside, *messages]


def _check_order(messages: Sequence[Message], name: str) -> None:
    previous = None
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        if message.role == "system" and previous is not None:
            fix = "Move it to the front or delete it."
            raise _Problem(where, "a system turn", "system only as the first turn", fix)
        if message.role == previous:
            found = f"two {message.role} turns in a row"
            raise _Problem(where, found, "user and assistant in turn", "Join them or delete one.")
        if message.role == "assistant" and previous in (None, "system"):
            raise _Problem(
                where, "a reply that nobody asked for", "a user turn first", "Put the question in front of it."
            )
        previous = message.role
    if previous != "assistant":
        where = f"{name}[{len(messages) - 1}]"
        raise _Problem(
            where, f"a {previous} turn at the end", "a reply at the end", "Add the reply or delete the turn."
        )


def _system(row: Mapping[str, Any], name: str) -> list[Message]:
    text = _string(row.get(name), name, absent=True)
    return [Message("system", text)] if text.strip() else []


def _filled(value: Any, where: str, expected: str) -> str:
    text = _string(value, where)
    if not text.strip():
        raise _Problem(where, "no text", expected, "Fill it in or delete the row.")
    return text


def _string(value: Any, where: str, *, absent: bool = False) -> str:
    """The value, if it is text that UTF-8 can hold; null is an empty text where it may be `absent`."""
    if value is None and absent:
        return ""
    if not isinstance(value, str):
        fix = "Fill it in or delete the row." if value is None else "Put it in quotes, or delete the row."
        raise _Problem(where, _described(value), "text", fix)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"half a character (\\u{ord(value[error.start]):04x})"
            raise _Problem(
                where, found, "whole characters", "The text was cut inside an emoji; write it again."
            ) from None
    if "\x00" in value:
        raise _Problem(where, "the character NUL (\\u0000)", "text", "Delete the character.")
    return value


# --- words for what was found -----------------------------------------------------------------------------------------


def _rename_hint(name: str, column: str, free: Iterable[str]) -> str | None:
    """The flag that maps `name` to the most likely of the `free` names, if one is likely."""
    lower = {key.lower(): key for key in free if key}
    near = [key for key in (column.lower(), *_OTHER_NAMES.get(name, ())) if key in lower]
    near = near or difflib.get_close_matches(column.lower(), lower, 1)
    return f"--set {shlex.quote(f'data.columns.{name}={_plain(lower[near[0]])}')}" if near else None


def _list_of_objects(row: Any) -> str | None:
    """The name of the first field that holds a list of objects."""
    if not isinstance(row, dict):
        return None
    return next((_plain(k) for k, v in row.items() if isinstance(v, list) and v and isinstance(v[0], dict)), None)


def _listed(row: Mapping[str, Any]) -> str:
    names = [f"'{_plain(str(key))}'" for key in row]
    return f"only {', '.join(names[:8])}{' …' if len(names) > 8 else ''}" if names else "an empty object"


def _described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {json.dumps(value)}"
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:60]}"
    if isinstance(value, str):
        return _quoted(value)
    if not isinstance(value, (list, tuple, dict)):  # Parquet knows more types than JSON
        return f"{_quoted(str(value))} ({type(value).__name__})"
    kind = "an object" if isinstance(value, dict) else "a list"
    if not value:
        return f"{kind} that is empty"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return f"{kind}, deeply nested"
    return f"{kind} ({_quoted(text, 40)})"


def _seen(text: str, at_end: str = "the end of the file") -> str:
    """The first line of what was found where reading stopped."""
    return _quoted(text.strip().splitlines()[0].strip(), 40) if text.strip() else at_end


def _quoted(text: str, at_most: int = 60) -> str:
    return f"'{_plain(text[:at_most])}{'…' if len(text) > at_most else ''}'"


def _plain(text: str) -> str:
    """The text with everything escaped that a terminal would obey, or that UTF-8 can not hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
