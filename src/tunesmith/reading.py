"""A file that somebody else wrote: opened without waiting, read no further than is reasonable."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from tunesmith.language import marked, said

MIB = 1 << 20
DEPTH = 64
"""Levels of brackets in a JSON file of settings; a config of a model that sees and hears has five."""


class Unfit(ValueError):
    """The file is not what it should be; the text says what it is: "a pipe", "200 MiB of text"."""


_REASONS = {
    errno.ENOENT: marked("No such file or directory"),
    errno.EACCES: marked("Permission denied"),
    errno.ENOTDIR: marked("Not a directory"),
    errno.ENAMETOOLONG: marked("File name too long"),
    errno.ENOSPC: marked("No space left on device"),
    errno.EROFS: marked("Read-only file system"),
}


def reason(error: Exception) -> str:
    """Why a file can not be read or written, as the system says it."""
    if isinstance(error, OSError) and error.strerror:
        return said(_REASONS[error.errno]) if error.errno in _REASONS else error.strerror
    return str(error)


def descriptor(path: Path, *, follow: bool = True) -> int:
    """The file, open for reading; links are followed unless it is said: a hub's cache is made of them.

    Raises Unfit for what is no regular file (a pipe would wait for somebody to write, a device may never end),
    OSError where there is none.
    """
    found = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    kind = os.fstat(found).st_mode
    if not stat.S_ISREG(kind):
        os.close(found)
        raise Unfit(_kind(kind))
    return found


def unusual(path: Path) -> str | None:
    """What the path leads to, in words, where that is neither a file nor a folder; nothing is opened."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return said("a link that leads round in a circle") if error.errno == errno.ELOOP else None
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else _kind(mode)


def kind(path: Path) -> str:
    """What stands at a path, in words: "a file", "a link" …; what a link leads to is not looked at."""
    try:
        return _kind(path.lstat().st_mode)
    except OSError:
        return said("nothing")


def _kind(mode: int) -> str:
    for is_kind, words in (
        (stat.S_ISREG, said("a file")),
        (stat.S_ISLNK, said("a link")),
        (stat.S_ISDIR, said("a folder")),
        (stat.S_ISFIFO, said("a pipe")),
        (stat.S_ISSOCK, said("a socket")),
    ):
        if is_kind(mode):
            return words
    return said("a device")


def copy(path: Path, to: Path) -> None:
    """Writes the content of a file to another; raises what `descriptor` does, also for a link."""
    with open(descriptor(path, follow=False), "rb") as source, to.open("wb") as copied:
        shutil.copyfileobj(source, copied)


def content(path: Path, at_most: int) -> bytes:
    """The file's bytes; raises Unfit where there are more than `at_most`, OSError where it can not be read."""
    with os.fdopen(descriptor(path), "rb") as file:
        data = file.read(min(at_most, os.fstat(file.fileno()).st_size) + 1)  # room is taken for all that is asked for
    if len(data) > at_most:
        size = os.stat(path).st_size
        raise Unfit(said("{size:,.1f} MiB, where {enough:,.1f} are enough", size=size / MIB, enough=at_most / MIB))
    return data


def json_object(path: Path, at_most: int) -> dict[str, Any]:
    """The file's JSON object; raises Unfit where it is none, too large or too deep, OSError as `content` does."""
    try:
        value = json.loads(content(path, at_most).decode("utf-8"))
    except RecursionError:
        raise Unfit(said("very deep nesting")) from None
    except Unfit:
        raise
    except ValueError as error:  # UnicodeDecodeError too
        raise Unfit(said("no JSON ({error})", error=str(error)[:200])) from None
    if not isinstance(value, dict):
        raise Unfit(said("a JSON {kind}", kind=type(value).__name__))
    level: list[Any] = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, dict | list)]
        if not level:
            return value
    raise Unfit(said("more than {n} levels of nesting", n=DEPTH))


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, hexadecimal; raises what `descriptor` does."""
    with os.fdopen(descriptor(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_beside(name: object) -> bool:
    """Whether a name that a manifest gives is a file's below the manifest's own folder: no absolute path, no `..`."""
    return (
        isinstance(name, str)
        and 0 < len(name) < 512
        and "\x00" not in name
        and not name.startswith("/")
        and ".." not in name.split("/")
    )
