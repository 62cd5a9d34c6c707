"""The bytes of a file: what kind it is, its text, its rows. A part is held at a time, but for a JSON array."""

from __future__ import annotations

import codecs
import csv
import difflib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.records.found import first_line, quoted, rename_hint, seen
from tunesmith.records.json_rows import Parsed, json_rows, jsonl_rows
from tunesmith.types import Fault, Origin

_AT_ONCE = 1 << 20
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


def opened(path: Path, mode: str = "rb", **how: Any) -> Any:
    """The file, open; raises DataError where it can not be."""
    try:
        if path.is_dir():
            raise DataError(str(path), "a folder", "a file", "Name the file inside it.")
        if path.exists() and not path.is_file():
            found = "a pipe or a device, which can be read only once"
            raise DataError(str(path), found, "a file", "Write what comes out of it to a file first.")
        return path.open(mode, **how)
    except OSError as error:
        near = difflib.get_close_matches(path.name, _names_beside(path), 1)
        fix = f"Did you mean {path.parent / near[0]}?" if near else "Check the name."
        raise DataError(str(path), f"no readable file ({error.strerror})", "a data file", fix) from None


def _names_beside(path: Path) -> list[str]:
    try:
        return [other.name for other in path.parent.iterdir()]
    except OSError:
        return []


def format_of(path: Path) -> str:
    """json, jsonl, csv or parquet; raises DataError where the file is empty, none of these, or text but not UTF-8."""
    with opened(path) as file:
        start = file.read(_AT_ONCE)
        while not (text := start.removeprefix(_BOM).lstrip()) and (more := file.read(_AT_ONCE)):
            start = start[:4] + more
        if not text:
            raise DataError(str(path), "an empty file", "at least one example", "Check how the file was written.")
        kind = _kind(start, text[:1], path)
        if kind != "parquet":
            file.seek(0)
            _require_utf8(iter(partial(file.read, _AT_ONCE), b""), path)
    return kind


def _kind(data: bytes, first: bytes, path: Path) -> str:
    suffix = path.suffix.lower()
    if data.startswith(b"PAR1"):
        return "parquet"
    if suffix == ".parquet":
        found = f"no Parquet (it begins with {data[:8]!r})"
        raise DataError(str(path), found, "a Parquet file", "Rename it after what it is, or write it again.")
    for magic, kind in _BINARY.items():
        if data.startswith(magic):
            raise DataError(str(path), kind, "JSON, JSONL, CSV or Parquet", "Unpack or export it first.")
    if first == b"[" and suffix != ".csv":
        return "json"
    if first == b"{" and suffix != ".csv":
        return "jsonl"
    if suffix in (".json", ".jsonl", ".ndjson"):
        text = _text(path)  # an encoding that is not UTF-8 is the better message
        blank = len(text) - len(text.lstrip())
        where = f"{path}:{text.count(chr(10), 0, blank) + 1}"
        expected = "'[' (an array) or '{' (an object a line)"
        raise DataError(where, seen(text[blank:]), expected, "See the README for the three forms of a row.")
    return "csv"


def _require_utf8(chunks: Iterable[bytes], path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for chunk in chunks:
            if b"\x00" in chunk:
                break
            decoder.decode(chunk)
        else:
            decoder.decode(b"", final=True)
            return
    except UnicodeDecodeError:
        pass
    _text(path)


def _text(path: Path) -> str:
    """The file as text; raises DataError at the line where it stops being UTF-8, with the encoding it seems to have."""
    with opened(path) as file:
        data: bytes = file.read()
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
        sample = quoted(data[start : start + 200].decode(encoding, "ignore").strip())
        fix = f"If that is right, convert it: {_conversion(name, path)}"
        raise DataError(where, f"bytes that are not UTF-8 but read as {name}: {sample}", "UTF-8", fix)
    raise DataError(where, f"the byte 0x{data[at]:02x}, which is not UTF-8", "UTF-8", "Write the file again as UTF-8.")


def _conversion(encoding: str, path: Path) -> str:
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(f'utf8-{path.name}')}"


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def rows_of(path: Path, kind: str, columns: Mapping[str, str]) -> Iterator[Parsed]:
    """The rows of a file that `format_of` has looked through, in order."""
    if kind == "parquet":
        yield from _parquet(path)
    elif kind == "json":
        yield from json_rows(_text(path), str(path))
    elif kind == "jsonl":
        with opened(path, "r", encoding="utf-8-sig", newline="\n") as lines:
            yield from jsonl_rows(lines, str(path), text=partial(_text, path))
    else:
        with opened(path, "r", encoding="utf-8-sig", newline="") as lines:
            yield from _csv(lines, str(path), columns)


def _csv(lines: Iterable[str], path: str, columns: Mapping[str, str]) -> Iterator[Parsed]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, strict=True)
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
    found = f"the header {quoted(', '.join(header))}"
    absent = {name: columns.get(name, name) for name in ("instruction", "output")}
    absent = {name: column for name, column in absent.items() if column not in header}
    if absent:
        hints = [hint for name, column in absent.items() if (hint := rename_hint(name, column, header))]
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
            where, f"a column twice in {quoted(', '.join(header))}", "each column once", "Rename one of them."
        )
    return header


def _parquet(path: Path) -> Iterator[Parsed]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with opened(path) as file:
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=_AT_ONCE, pre_buffer=False)
            for batch in parquet.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    row += 1
                    yield Parsed(value, Origin(str(path), row, "row"))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        where = f"{path}: behind row {row}" if row else str(path)
        raise DataError(where, f"damaged Parquet ({first_line(error)})", "Parquet", "Write it again.") from None
