"""The bytes of a file: what kind it is, its text, its rows. A part is held at a time."""

from __future__ import annotations

import codecs
import csv
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tunesmith import reading
from tunesmith.confined import Ended, WorkFailed, confined
from tunesmith.data.records.found import quoted, rename_hint, seen
from tunesmith.data.records.json_rows import ROW_CHARACTERS, Parsed, json_rows, jsonl_rows, lines_of, too_long_row
from tunesmith.errors import DataError, first_line
from tunesmith.language import marked, said
from tunesmith.spelling import nearest
from tunesmith.types import Fault, Origin

_AT_ONCE = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BINARY = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": marked("a zip archive"),
    b"\x89PNG": marked("a picture"),
    b"%PDF": marked("a PDF"),
    b"\xd0\xcf\x11\xe0": marked("an Office file"),
}
_WIDE = {
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}


def opened(path: Path, mode: str = "rb", **how: Any) -> Any:
    """The file, open; raises DataError where it can not be."""
    try:
        if path.is_dir():
            raise DataError(str(path), said("a folder"), said("a file"), said("Name the file inside it."))
        return os.fdopen(reading.descriptor(path), mode, **how)
    except reading.Unfit as kind:
        found = said("{kind}, which can be read only once", kind=kind)
        raise DataError(str(path), found, said("a file"), said("Write what comes out of it to a file first.")) from None
    except OSError as error:
        near = nearest(path.name, _names_beside(path))
        fix = said("Did you mean {name}?", name=path.parent / near) if near else said("Check the name.")
        raise DataError(
            str(path), said("no readable file ({reason})", reason=reading.reason(error)), said("a data file"), fix
        ) from None


def _names_beside(path: Path) -> list[str]:
    try:
        return [other.name for other in islice(path.parent.iterdir(), 1000)]
    except OSError:
        return []


def format_of(path: Path) -> str:
    """json, jsonl, csv or parquet; raises DataError where the file is empty, none of these, or text but not UTF-8."""
    with opened(path) as file:
        start = file.read(_AT_ONCE)
        while not (text := start.removeprefix(_BOM).lstrip()) and (more := file.read(_AT_ONCE)):
            start = start[:4] + more
        if not text:
            fix = said("Check how the file was written.")
            raise DataError(str(path), said("an empty file"), said("at least one example"), fix)
        kind = _kind(start, text[:1], path)
        if kind != "parquet":
            file.seek(0)
            _require_utf8(file, path)
        else:
            _require_moderate(path)
    return kind


def _kind(data: bytes, first: bytes, path: Path) -> str:
    suffix = path.suffix.lower()
    if data.startswith(b"PAR1"):
        return "parquet"
    if suffix == ".parquet":
        found = said("no Parquet (it begins with {start})", start=repr(data[:8]))
        fix = said("Rename it after what it is, or write it again.")
        raise DataError(str(path), found, said("a Parquet file"), fix)
    for magic, kind in _BINARY.items():
        if data.startswith(magic):
            expected, fix = said("JSON, JSONL, CSV or Parquet"), said("Unpack or export it first.")
            raise DataError(str(path), said(kind), expected, fix)
    if first == b"[" and suffix != ".csv":
        return "json"
    if first == b"{" and suffix != ".csv":
        return "jsonl"
    if suffix in (".json", ".jsonl", ".ndjson"):
        text = _beginning(path)  # an encoding that is not UTF-8 is the better message
        blank = len(text) - len(text.lstrip())
        where = f"{path}:{text.count(chr(10), 0, blank) + 1}"
        expected = said("{opening} (an array) or {brace} (an object a line)", opening="'['", brace="'{'")
        raise DataError(where, seen(text[blank:]), expected, said("See the README for the three forms of a row."))
    return "csv"


_LOOKED_AT = 64 << 20
"""Bytes that are held at once, to say what is wrong with a file."""


def _require_utf8(file: BinaryIO, path: Path) -> None:
    """Raises DataError at the line where the file stops being UTF-8."""
    decoder, lines, before = codecs.getincrementaldecoder("utf-8")(), 0, b""
    while True:
        chunk = file.read(_AT_ONCE)
        try:
            if b"\x00" not in chunk:
                decoder.decode(chunk, final=not chunk)
                if not chunk:
                    return
                lines, before = lines + before.count(b"\n"), chunk
                continue
        except UnicodeDecodeError:
            pass
        if file.tell() <= _LOOKED_AT:
            _beginning(path)
        data = before + chunk
        start = data.find(b"\n") + 1  # where a line begins, and no character is cut
        _text(data[start:], path, lines + data.count(b"\n", 0, start) + 1)
        raise DataError(str(path), said("bytes that are not UTF-8"), "UTF-8", said("Write the file again as UTF-8."))


def _beginning(path: Path) -> str:
    """The file's first 64 MiB as text; raises DataError as `_text` does."""
    with opened(path) as file:
        data: bytes = file.read(_LOOKED_AT)
    if len(data) == _LOOKED_AT:
        data = data[: data.rfind(b"\n") + 1] or data[: data.rfind(b" ") + 1]
    return _text(data, path)


def _text(data: bytes, path: Path, first_line: int = 1) -> str:
    """Bytes of the file as text; raises DataError at the line where they stop being UTF-8, with the encoding they seem
    to have."""
    for bom, name in _WIDE.items():
        if first_line == 1 and data.startswith(bom):
            fix = said("Convert it: {command}", command=_conversion(name[:-2], path))
            raise DataError(str(path), said("{encoding} text", encoding=name), "UTF-8", fix)
    zero = data.find(b"\x00")
    if zero >= 0:
        fix = said("The file is binary, UTF-16 or damaged; write it again as UTF-8.")
        raise DataError(f"{path}:{_line(data, zero, first_line)}", said("a NUL byte"), said("text in UTF-8"), fix)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (len(_BOM) if data.startswith(_BOM) else 0)
    where, start = f"{path}:{_line(data, at, first_line)}", data.rfind(b"\n", 0, at) + 1
    for encoding, name in (("gb18030", "GB18030"), ("cp1252", "Windows-1252")):
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        sample = quoted(data[start : start + 200].decode(encoding, "ignore").strip())
        fix = said("If that is right, convert it: {command}", command=_conversion(name, path))
        found = said("bytes that are not UTF-8 but read as {encoding}: {sample}", encoding=name, sample=sample)
        raise DataError(where, found, "UTF-8", fix)
    found = said("the byte 0x{byte:02x}, which is not UTF-8", byte=data[at])
    raise DataError(where, found, "UTF-8", said("Write the file again as UTF-8."))


def _conversion(encoding: str, path: Path) -> str:
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(f'utf8-{path.name}')}"


def _line(data: bytes, at: int, first: int) -> int:
    return data.count(b"\n", 0, at) + first


def rows_of(path: Path, kind: str, columns: Mapping[str, str]) -> Iterator[Parsed]:
    """The rows of a file that `format_of` has looked through, in order."""
    if kind == "parquet":
        yield from _parquet(path)
    elif kind == "json":
        with opened(path, "r", encoding="utf-8-sig", newline="") as file:
            yield from json_rows(file, str(path))
    elif kind == "jsonl":
        with opened(path, "r", encoding="utf-8-sig", newline="\n") as file:
            yield from jsonl_rows(lines_of(file), str(path), text=partial(_beginning, path))
    else:
        with opened(path, "r", encoding="utf-8-sig", newline="") as file:
            yield from _csv(_short(file), str(path), columns)


def _short(file: TextIO) -> Iterator[str]:
    """The lines of a CSV file; raises csv.Error at one that no row has."""
    for line, length in lines_of(file):
        if length > ROW_CHARACTERS:
            raise csv.Error(said("a line of {n:,} characters", n=length))
        yield line


def _csv(lines: Iterable[str], path: str, columns: Mapping[str, str]) -> Iterator[Parsed]:
    csv.field_size_limit(ROW_CHARACTERS)
    reader = csv.reader(lines, strict=True)
    header = _csv_header(reader, path, columns)
    while True:
        origin = Origin(path, reader.line_num + 1)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fix = said("Reading stopped here; double the quotes inside a quoted cell, and close it.")
            yield Parsed(None, origin, Fault(origin, "row", str(error), "CSV", fix))
            return
        if cells is None:
            return
        if not cells:
            continue
        fault = None
        if len(cells) != len(header):
            fix = said("Quote cells that hold commas or line breaks.")
            fault = Fault(
                origin, "row", said("{n} cells", n=len(cells)), said("{n}, as in the header", n=len(header)), fix
            )
        yield Parsed(dict(zip(header, cells, strict=False)), origin, fault)


_MOST_COLUMNS = 10_000


def _csv_header(reader: Iterator[list[str]], path: str, columns: Mapping[str, str]) -> list[str]:
    """The names in the first line; raises DataError unless instruction and output are among them."""
    where = f"{path}:1"
    try:
        header = [name.strip() for name in next(reader)]
    except csv.Error as error:
        fix = said("Quote cells that hold quotes or commas.")
        raise DataError(where, str(error), said("a CSV header"), fix) from None
    if len(header) > _MOST_COLUMNS:
        fix = said("Is it a table with named columns? Keep those that are needed.")
        found, expected = said("{n:,} columns", n=len(header)), said("at most {n:,}", n=_MOST_COLUMNS)
        raise DataError(where, found, expected, fix)
    found = said("the header {names}", names=quoted(", ".join(header)))
    absent = {name: columns.get(name, name) for name in ("instruction", "output")}
    absent = {name: column for name, column in absent.items() if column not in header}
    if absent:
        hints = [hint for name, column in absent.items() if (hint := rename_hint(name, column, header))]
        if len(header) == 1 and (mark := next((mark for mark in (";", "\t") if mark in header[0]), None)):
            sign = said("tabs") if mark == "\t" else repr(mark)
            fix = said("Separate the columns by commas, not by {sign}.", sign=sign)
        elif hints:
            fix = said("Try {flags}", flags=" ".join(hints))
        else:
            fix = said("Name the columns, for instance --set data.columns.output=answer")
        needed = [columns.get(name, name) for name in ("instruction", "output")]
        expected = said("columns {one} and {other}", one=needed[0], other=needed[1])
        raise DataError(where, found, expected, fix)
    if len(set(header)) < len(header):
        found = said("a column twice in {names}", names=quoted(", ".join(header)))
        raise DataError(where, found, said("each column once"), said("Rename one of them."))
    return header


_ROWS_AT_ONCE = 64
_MOST_UNPACKED = 400  # times the file's bytes; ten thousand copies of one answer come to 300
_ALWAYS_UNPACKED = 256 << 20


def _require_moderate(path: Path) -> None:
    """Raises DataError for a Parquet file that unpacks to far more than it holds, or can not be read to its end.

    What a page unpacks to is known only when it is unpacked, so that is done first where a limit can end it.
    """
    size = path.stat().st_size
    most = max(_MOST_UNPACKED * size, _ALWAYS_UNPACKED)
    expected = said("a file of rows as they are")
    fix = said("Look at where the file comes from; write the rows as JSONL.")

    def unpacked() -> int:
        total = 0
        with _parquet_file(path) as parquet:
            for batch in _batches(parquet, use_threads=False):
                total += batch.nbytes
                if total > most:
                    break
        return total

    import pyarrow.parquet  # noqa: F401  # here, or the copy of the process would do it for itself

    try:
        total = confined(unpacked, seconds=6 + size // (20 << 20), more_bytes=768 << 20)
    except Ended as ended:
        raise DataError(str(path), said("Parquet that takes {what} to unpack", what=ended), expected, fix) from None
    except WorkFailed as error:
        raise DataError(
            str(path), said("damaged Parquet ({error})", error=error), "Parquet", said("Write it again.")
        ) from None
    if total > most:
        found = said("Parquet of {size:,} bytes that unpacks to more than {most:,} MiB", size=size, most=most >> 20)
        raise DataError(str(path), found, expected, fix)


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with opened(path) as file:
        parquet = pyarrow.parquet.ParquetFile(
            file,
            buffer_size=_AT_ONCE,
            pre_buffer=False,
            thrift_string_size_limit=16 << 20,
            thrift_container_size_limit=1 << 20,
        )
        if (count := parquet.metadata.num_columns) > _MOST_COLUMNS:
            raise ValueError(said("{n:,} columns, where {enough:,} are enough", n=count, enough=_MOST_COLUMNS))
        yield parquet


def _batches(parquet: Any, **how: Any) -> Iterator[Any]:
    """A few rows at a time, each value written out: a type that shares one among many rows hides how much there is."""
    import pyarrow

    plain = pyarrow.schema([(field.name, _written_out(field.type)) for field in parquet.schema_arrow])
    for batch in parquet.iter_batches(_ROWS_AT_ONCE, **how):
        yield batch if batch.schema.equals(plain) else batch.cast(plain)


def _written_out(kind: Any) -> Any:
    """The type with plain ones in the place of those that share values."""
    import pyarrow
    from pyarrow import types

    def of(field: Any) -> Any:
        return field.with_type(_written_out(field.type))

    if types.is_dictionary(kind):
        return _written_out(kind.value_type)
    if types.is_string_view(kind):
        return pyarrow.large_string()
    if types.is_binary_view(kind):
        return pyarrow.large_binary()
    if types.is_struct(kind):
        return pyarrow.struct([of(field) for field in kind])
    if types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return pyarrow.large_list(of(kind.value_field))
    return pyarrow.list_(of(kind.value_field)) if types.is_list(kind) else kind


def _parquet(path: Path) -> Iterator[Parsed]:
    import pyarrow

    row = 0
    try:
        with _parquet_file(path) as parquet:
            for batch in _batches(parquet):
                large = batch.nbytes > ROW_CHARACTERS
                for part in (batch.slice(i, 1) for i in range(len(batch))) if large else (batch,):
                    too_long = large and part.nbytes > ROW_CHARACTERS
                    for value in [None] if too_long else part.to_pylist():
                        row += 1
                        origin = Origin(str(path), row, "row")
                        yield Parsed(value, origin, too_long_row(origin, part.nbytes) if too_long else None)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        where = said("{file}: after row {row}", file=path, row=row) if row else str(path)
        raise DataError(
            where, said("damaged Parquet ({error})", error=first_line(error)), "Parquet", said("Write it again.")
        ) from None
