"""Where models are kept, and whether there is room for them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tunesmith import reading
from tunesmith.errors import ModelError
from tunesmith.language import said


def cache_dir() -> Path:
    """Where tunesmith itself keeps things: TUNESMITH_CACHE, else ~/.cache/tunesmith (XDG_CACHE_HOME honoured)."""
    if own := os.environ.get("TUNESMITH_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "tunesmith"


def size(path: str | Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def bytes_to_come(folder: Path | None, files: Mapping[str, int | None]) -> int:
    """Bytes of `files` that are not in the folder yet; ModelScope's client keeps the part that has arrived."""
    absent = {name: n or 0 for name, n in files.items() if folder is None or size(folder / name) != n}
    arrived = 0 if folder is None else sum(size(folder / f"{name}.incomplete") or 0 for name in absent)
    return sum(absent.values()) - arrived


def require_room(folder: Path, n_bytes: int) -> None:
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path.cwd())
    free = shutil.disk_usage(there).free
    if n_bytes > free:
        raise _no_room(folder, said("{memory} free", memory=_gib(free)), _gib(n_bytes))


def _no_room(folder: Path, found: str, expected: str) -> ModelError:
    fix = said("Make room, or choose another disk: TUNESMITH_CACHE, HF_HOME or MODELSCOPE_CACHE.")
    return ModelError(str(folder), found, expected, fix)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full or closed disk, wherever in a chain of errors it hides, into ModelError."""
    try:
        yield
    except Exception as error:
        for cause in _causes(error):
            if not isinstance(cause, OSError):
                continue
            if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _no_room(
                    folder, said("a full disk ({reason})", reason=reading.reason(cause)), said("room for the model")
                ) from error
            # Without a file name it is a socket that was refused.
            if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR) and cause.filename:
                fix = said("Change its permissions, or choose another: TUNESMITH_CACHE, HF_HOME or MODELSCOPE_CACHE.")
                where, found = str(cause.filename), reading.reason(cause)
                raise ModelError(where, found, said("a place that can be written"), fix) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, and what it gathers (ModelScope's errors of single files)."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        failed = getattr(current, "failed_files", {}).values()
        waiting += [e for e in (current.__cause__, current.__context__, *failed) if isinstance(e, BaseException)]


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"
