"""A data file becomes conversations; everything wrong with it is named by line, in one pass.

JSON (an array), JSONL, CSV and Parquet are told apart by what they contain. A row says what it is by its fields:

    {"instruction", "input", "output"}, optionally "system" and "history" ([[question, answer], ...])
    {"messages": [{"role", "content"}, ...]}
    {"conversations": [{"from", "value"}, ...]}                             (ShareGPT)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.data.records.files import format_of, opened, rows_of
from tunesmith.data.records.row import FIELDS, Problem, understand
from tunesmith.errors import DataError
from tunesmith.language import said
from tunesmith.types import Conversation, Fault, Message, Origin

__all__ = ["FIELDS", "Records", "open_file"]


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
        digest, written = _looked_through(path)
        if digest != self.digest:
            raise _changed(path)
        try:
            yield from self._understood(path, run, share, of)
        except (ValueError, RuntimeError):  # no bytes that `format_of` has looked through end like this
            if _same(path, written, digest):
                raise
        if not _same(path, written, digest):
            raise _changed(path)

    def _understood(self, path: Path, run: int, share: int, of: int) -> Iterator[Conversation | Fault]:
        for number, (value, origin, fault) in enumerate(rows_of(path, self.format, self.columns)):
            if number // run % of != share:
                continue
            if fault is not None:
                yield fault
                continue
            try:
                messages = understand(value, self.columns)
            except Problem as problem:
                yield Fault(origin, *problem.parts)
                continue
            if self.system is not None and messages[0].role != "system":
                messages = [Message("system", self.system), *messages]
            yield Conversation(tuple(messages), origin)


def open_file(path: str | Path, columns: Mapping[str, str] | None = None, system: str | None = None) -> Records:
    """The file of rows at `path`.

    `columns` maps our field names to the file's; `system` stands in every row that has no system text.
    Raises DataError when the file as a whole can not be read: absent, empty, not UTF-8, of an unknown kind.
    """
    if not str(path):
        raise DataError("data.path", said("no data"), said("a file of examples"), said("Pass --data FILE."))
    path = Path(path)
    kind = format_of(path)
    digest, (n_bytes, _) = _looked_through(path)
    records = Records(str(path), digest, n_bytes, kind, dict(columns or {}), system)
    if next(rows_of(path, records.format, records.columns), None) is None:
        raise DataError(
            str(path),
            said("no rows"),
            said("at least one example"),
            said('Add rows like {{"instruction": …, "output": …}}.'),
        )
    return records


def _looked_through(path: Path) -> tuple[str, tuple[int, int]]:
    """SHA-256 of the file's bytes, and how many they are and when they were written."""
    with opened(path) as file:
        written = _when_written(path)
        return hashlib.file_digest(file, "sha256").hexdigest(), written


def _when_written(path: Path) -> tuple[int, int]:
    seen = path.stat()
    return seen.st_size, seen.st_mtime_ns


def _same(path: Path, written: tuple[int, int], digest: str) -> bool:
    """The file has the bytes that it had; looked through again only if it was written to."""
    try:
        return _when_written(path) == written or _looked_through(path)[0] == digest
    except (OSError, DataError):
        return False


def _changed(path: Path) -> DataError:
    found = said("other bytes than a moment ago")
    return DataError(str(path), found, said("a file that nobody writes to meanwhile"), said("Start again."))
