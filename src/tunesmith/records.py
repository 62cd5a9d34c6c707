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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.errors import DataError
from tunesmith.types import Conversation, Fault, Message, Origin, Role

ROLES: Mapping[str, Role] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
_BINARY = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive",
    b"\x89PNG": "a picture",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an Office file",
}
_TALK_FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}


@dataclass(slots=True)
class Records:
    """What a file holds: its conversations, its faults, and how many rows were read."""

    path: str
    digest: str
    """SHA-256 of the file's bytes, hexadecimal."""
    format: str
    n_rows: int = 0
    conversations: list[Conversation] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


class Parsed(NamedTuple):
    """A row before it is understood; `value` is None where reading it failed and the fault says why."""

    value: Any
    origin: Origin
    faults: tuple[Fault, ...] = ()


class _Problem(Exception):
    def __init__(self, field: str, found: str, expected: str, fix: str) -> None:
        self.parts = field, found, expected, fix


def read(path: str | Path, columns: Mapping[str, str] | None = None, system: str | None = None) -> Records:
    """All conversations and all faults of a file.

    `columns` maps our field names to the file's; `system` stands in every row that has no system text.
    Raises DataError when the file as a whole can not be read: absent, empty, not UTF-8, of an unknown kind.
    """
    path = Path(path)
    data = _bytes(path)
    records = Records(str(path), hashlib.sha256(data).hexdigest(), _format(data, path))
    columns = dict(columns or {})
    for parsed in _rows(data, path, records.format, columns):
        records.n_rows += 1
        faults = list(parsed.faults)
        if parsed.value is not None:
            try:
                messages = _understand(parsed.value, columns)
                if system is not None and messages[0].role != "system":
                    messages = [Message("system", system), *messages]
                _check_order(messages)
            except _Problem as problem:
                faults.append(Fault(parsed.origin, *problem.parts))
            else:
                if not faults:
                    records.conversations.append(Conversation(tuple(messages), parsed.origin))
        records.faults += faults
    if not records.n_rows:
        raise DataError(str(path), "no rows", "at least one example", 'Add rows like {"instruction": …, "output": …}.')
    return records


# --- the file ---------------------------------------------------------------------------------------------------------


def _bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise DataError(str(path), "a folder", "a file", "Name the file inside it.")
        data = path.read_bytes()
    except OSError as error:
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [], 1
        )
        fix = f"Did you mean {path.parent / near[0]}?" if near else "Check the name."
        raise DataError(str(path), f"no readable file ({error.strerror})", "a data file", fix) from None
    if not data.strip():
        raise DataError(str(path), "an empty file", "at least one example", "Check how the file was written.")
    return data


def _format(data: bytes, path: Path) -> str:
    suffix = path.suffix.lower()
    if data.startswith(b"PAR1"):
        return "parquet"
    if suffix == ".parquet":
        raise DataError(
            str(path),
            f"no Parquet (it begins with {data[:8]!r})",
            "a Parquet file",
            "Rename it after what it is, or write it again.",
        )
    for magic, kind in _BINARY.items():
        if data.startswith(magic):
            raise DataError(str(path), kind, "JSON, JSONL, CSV or Parquet", "Unpack or export it first.")
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[" and suffix != ".csv":
        return "json"
    if start == b"{" and suffix != ".csv":
        return "jsonl"
    if suffix in (".json", ".jsonl", ".ndjson"):
        _text(data, path)  # an encoding that is not UTF-8 is the better message
        raise DataError(
            f"{path}:1",
            _quoted(data[:60].decode("utf-8", "replace").strip()),
            "'[' (an array) or '{' (an object a line)",
            "See the README for the three forms of a row.",
        )
    return "csv"


def _text(data: bytes, path: Path) -> str:
    """The file as text; raises DataError at the line where it stops being UTF-8, with the encoding it seems to have."""
    for bom, name in (
        (b"\xff\xfe\x00\x00", "UTF-32LE"),
        (b"\x00\x00\xfe\xff", "UTF-32BE"),
        (b"\xff\xfe", "UTF-16LE"),
        (b"\xfe\xff", "UTF-16BE"),
    ):
        if data.startswith(bom):
            raise DataError(
                str(path),
                f"{name} text",
                "UTF-8",
                f"Convert it: iconv -f {name[:-2]} -t UTF-8 '{path}' > utf8-{path.name}",
            )
    zero = data.find(b"\x00")
    if zero >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise DataError(
            f"{path}:{line}",
            "a NUL byte",
            "text in UTF-8",
            "The file is binary, UTF-16 or damaged; write it again as UTF-8.",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        start = data.rfind(b"\n", 0, error.start) + 1
        sample = data[start : start + 200]
        for encoding in ("gb18030", "cp1252"):
            try:
                data.decode(encoding)
            except UnicodeDecodeError:
                continue
            name = "GB18030" if encoding == "gb18030" else "Windows-1252"
            raise DataError(
                f"{path}:{line}",
                f"bytes that are not UTF-8 but read as {name}: {_quoted(sample.decode(encoding, 'ignore').strip())}",
                "UTF-8",
                f"If that is right, convert it: iconv -f {name} -t UTF-8 '{path}' > utf8-{path.name}",
            ) from None
        raise DataError(
            f"{path}:{line}",
            f"the byte 0x{data[error.start]:02x}, which is not UTF-8",
            "UTF-8",
            "Write the file again as UTF-8.",
        ) from None


def _rows(data: bytes, path: Path, kind: str, columns: Mapping[str, str]) -> Iterator[Parsed]:
    if kind == "parquet":
        yield from _parquet(path)
        return
    text = _text(data, path)
    yield from {"json": _json, "jsonl": _jsonl, "csv": _csv}[kind](text, str(path), columns)


class _Pairs(dict):
    """An object of the file that remembers which keys stood in it twice."""

    twice: tuple[str, ...] = ()


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    marked, seen = _Pairs(value), set()
    marked.twice = tuple(key for key, _ in pairs if key in seen or seen.add(key))
    return marked


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def _json(text: str, path: str, _columns: Mapping[str, str]) -> Iterator[Parsed]:
    position, line, counted = text.index("[") + 1, 1, 0

    def line_at(where: int) -> int:
        nonlocal line, counted
        line += text.count("\n", counted, where)
        counted = where
        return line

    first = True
    while True:
        position = _skip(text, position)
        if text[position : position + 1] == "]":
            break
        if not first:
            if text[position : position + 1] != ",":
                yield _stopped(path, line_at(position), text[position : position + 40], "',' or ']' behind an object")
                return
            position = _skip(text, position + 1)
        first = False
        origin = Origin(path, line_at(position))
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            where = error.pos if isinstance(error, json.JSONDecodeError) else position
            yield _stopped(path, line_at(max(where, position)), text[where : where + 40], _json_message(error))
            return
        yield _parsed(value, origin)
    rest = _skip(text, position + 1)
    if rest < len(text):
        yield _stopped(path, line_at(rest), text[rest : rest + 40], "nothing behind the closing ']'")


def _jsonl(text: str, path: str, _columns: Mapping[str, str]) -> Iterator[Parsed]:
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        if not line.strip():
            continue
        origin = Origin(path, number)
        try:
            value = _DECODER.decode(line)
        except (json.JSONDecodeError, RecursionError) as error:
            where = error.pos if isinstance(error, json.JSONDecodeError) else 0
            fault = Fault(origin, "row", _quoted(line[where : where + 40].strip()) if line[where:].strip() else "the end of the line",
                          _json_message(error), "Each line is one whole JSON object; an array starts with '['.")  # fmt: skip
            yield Parsed(None, origin, (fault,))
        else:
            yield _parsed(value, origin)


def _csv(text: str, path: str, columns: Mapping[str, str]) -> Iterator[Parsed]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader)
    except csv.Error as error:
        raise DataError(f"{path}:1", str(error), "a CSV header", "Quote fields that hold quotes or commas.") from None
    needed = [columns.get(name, name) for name in ("instruction", "output")]
    if absent := [name for name in needed if name not in header]:
        near = [difflib.get_close_matches(name, header, 1) for name in absent]
        hint = " ".join(
            f"--set data.columns.{name}={match[0]}" for name, match in zip(absent, near, strict=True) if match
        )
        raise DataError(
            f"{path}:1",
            f"the header {_quoted(', '.join(header))}",
            f"columns {' and '.join(needed)}",
            f"Try {hint}." if hint else "Name the columns, for instance --set data.columns.output=answer.",
        )
    if len(set(header)) < len(header):
        raise DataError(
            f"{path}:1", f"a column twice in {_quoted(', '.join(header))}", "each column once", "Rename one of them."
        )
    while True:
        origin = Origin(path, reader.line_num + 1)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Parsed(
                None, origin, (Fault(origin, "row", str(error), "CSV", "Double the quotes inside a quoted field."),)
            )
            return
        if cells is None:
            return
        if not cells:
            continue
        if len(cells) != len(header):
            fault = Fault(
                origin,
                "row",
                f"{len(cells)} cells",
                f"{len(header)}, as in the header",
                "Quote cells that hold commas or line breaks.",
            )
            yield Parsed(None, origin, (fault,))
        else:
            yield Parsed(dict(zip(header, cells, strict=True)), origin)


def _parquet(path: Path) -> Iterator[Parsed]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        row = 0
        for batch in table.iter_batches(batch_size=4096):
            for value in batch.to_pylist():
                row += 1
                yield Parsed(
                    {k: v for k, v in value.items() if v is not None or k in ("instruction", "output", "messages")},
                    Origin(str(path), row, "row"),
                )
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(str(path), f"a damaged Parquet file ({error})", "Parquet", "Write it again.") from None


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t") and position < len(text):
        position += 1
    return position


def _stopped(path: str, line: int, found: str, expected: str) -> Parsed:
    origin = Origin(path, line)
    seen = _quoted(found.splitlines()[0].strip()) if found.strip() else "the end of the file"
    return Parsed(
        None, origin, (Fault(origin, "row", seen, expected, "Reading stopped here; mend the JSON and check again."),)
    )


def _json_message(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "fewer levels of nesting"


def _parsed(value: Any, origin: Origin) -> Parsed:
    if isinstance(value, _Pairs) and value.twice:
        keys = ", ".join(f"'{key}'" for key in value.twice)
        return Parsed(
            None,
            origin,
            (
                Fault(
                    origin,
                    value.twice[0],
                    f"{keys} twice in one object",
                    "each key once",
                    "JSON keeps only the last one; delete or rename the other.",
                ),
            ),
        )
    return Parsed(value, origin)


# --- the row ----------------------------------------------------------------------------------------------------------


def _understand(row: Any, columns: Mapping[str, str]) -> list[Message]:
    if not isinstance(row, dict):
        raise _Problem("row", _described(row), "an object with named fields", 'Write {"instruction": …, "output": …}.')
    for talk in _TALK_FIELDS:
        if columns.get(talk, talk) in row:
            return _from_talk(row, columns.get(talk, talk), *_TALK_FIELDS[talk])
    return _from_instruction(row, columns)


def _from_instruction(row: dict[str, Any], columns: Mapping[str, str]) -> list[Message]:
    names = {name: columns.get(name, name) for name in ("instruction", "input", "output", "system", "history")}
    for name, column in names.items():
        if column not in row:
            free = [key for key in row if key not in names.values()]
            near = difflib.get_close_matches(column, free, n=1, cutoff=0.84)
            if near or name in ("instruction", "output"):
                found = f"'{near[0]}'" if near else f"only {', '.join(repr(key) for key in row) or 'nothing'}"
                raise _Problem(
                    column,
                    found,
                    f"'{column}'",
                    f"Rename it in the file, or pass --set data.columns.{name}={near[0] if near else '…'}",
                )
    question = [
        text for name in ("instruction", "input") if (text := _string(row, names[name], absent=name == "input")).strip()
    ]
    if not question:
        raise _Problem(names["instruction"], "no text", "a question or task", "Fill it in or delete the row.")
    messages: list[Message] = []
    if (system := _string(row, names["system"], absent=True)).strip():
        messages.append(Message("system", system))
    history = row.get(names["history"]) or []
    if not isinstance(history, list):
        raise _Problem(
            names["history"], _described(history), "a list of [question, answer] pairs", "Mend or delete the field."
        )
    for number, pair in enumerate(history, 1):
        if not (
            isinstance(pair, (list, tuple))
            and len(pair) == 2
            and all(isinstance(text, str) and text.strip() for text in pair)
        ):
            raise _Problem(
                names["history"],
                f"{_described(pair)} as pair {number}",
                "[question, answer], both text",
                "Mend the pair.",
            )
        messages += [
            Message("user", _clean(pair[0], names["history"])),
            Message("assistant", _clean(pair[1], names["history"])),
        ]
    messages.append(Message("user", "\n".join(question)))
    messages.append(Message("assistant", _answer(row, names["output"])))
    return messages


def _from_talk(row: dict[str, Any], name: str, role_field: str, text_field: str) -> list[Message]:
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        raise _Problem(
            name, _described(turns), "a list of turns", f'Write [{{"{role_field}": "user", "{text_field}": …}}, …].'
        )
    messages = []
    if isinstance(row.get("system"), str) and row["system"].strip():  # ShareGPT keeps the system text beside the talk
        messages.append(Message("system", _clean(row["system"], "system")))
    for number, turn in enumerate(turns, 1):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise _Problem(
                where, _described(turn), f"an object with '{role_field}' and '{text_field}'", "Mend the turn."
            )
        if isinstance(turn, _Pairs) and turn.twice:
            raise _Problem(
                where, f"'{turn.twice[0]}' twice in one object", "each key once", "Delete or rename one of them."
            )
        for key in (role_field, text_field):
            if key not in turn:
                raise _Problem(
                    where,
                    f"only {', '.join(repr(k) for k in turn) or 'nothing'}",
                    f"'{key}'",
                    "Rename the key in the file.",
                )
        role = turn[role_field]
        if not isinstance(role, str) or role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, 1)
            raise _Problem(f"{where}.{role_field}", _described(role), "system, user or assistant (human or gpt in ShareGPT)",
                           f"Did you mean '{near[0]}'?" if near else "Rename the role, or leave the turn out.")  # fmt: skip
        text = (
            _answer(turn, text_field, where) if ROLES[role] == "assistant" else _string(turn, text_field, where=where)
        )
        if not text.strip():
            raise _Problem(f"{where}.{text_field}", "no text", f"what the {role} says", "Fill it in or delete the row.")
        messages.append(Message(ROLES[role], text))
    return messages


def _check_order(messages: list[Message]) -> None:
    previous = None
    for number, message in enumerate(messages, 1):
        where = f"turn {number}"
        if message.role == "system" and previous is not None:
            raise _Problem(
                where, "a system turn", "system only as the first turn", "Move it to the front or delete it."
            )
        if message.role == previous:
            raise _Problem(
                where, f"two {message.role} turns in a row", "user and assistant in turn", "Join them or delete one."
            )
        if message.role == "assistant" and previous in (None, "system"):
            raise _Problem(
                where, "a reply that nobody asked for", "a user turn first", "Put the question in front of it."
            )
        previous = message.role
    if previous != "assistant":
        raise _Problem(
            f"turn {len(messages)}",
            f"a {previous} turn at the end",
            "a reply at the end",
            "Add the reply or delete the turn.",
        )


def _answer(row: Mapping[str, Any], name: str, where: str = "") -> str:
    text = _string(row, name, where=where)
    if not text.strip():
        raise _Problem(
            f"{where}.{name}" if where else name, "no text", "the answer to learn", "Fill it in or delete the row."
        )
    return text


def _string(row: Mapping[str, Any], name: str, *, absent: bool = False, where: str = "") -> str:
    value = row.get(name)
    if value is None and absent:
        return ""
    if not isinstance(value, str):
        raise _Problem(
            f"{where}.{name}" if where else name, _described(value), "text", "Put it in quotes, or delete the row."
        )
    return _clean(value, name)


def _clean(text: str, name: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _Problem(
                name,
                f"half a character (\\u{ord(text[error.start]):04x})",
                "whole characters",
                "The text was cut inside an emoji; write it again.",
            ) from None
    if "\x00" in text:
        raise _Problem(name, "the character NUL (\\u0000)", "text", "Delete the character.")
    return text


def _described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {json.dumps(value)}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return _quoted(value)
    return f"{'a list' if isinstance(value, (list, tuple)) else 'an object'} ({_quoted(json.dumps(value, ensure_ascii=False, default=str)[:40])})"


def _quoted(text: str) -> str:
    return f"'{text[:60]}…'" if len(text) > 60 else f"'{text}'"
