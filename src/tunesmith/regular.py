"""Files that are files: no links, which may lead anywhere, and no pipes or devices, whose reading may never end."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path


def kind(path: Path) -> str:
    """What stands at a path, in words: "a file", "a link" …; what a link leads to is not looked at."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return "nothing"
    return next((words for test, words in _KINDS if test(mode)), "something that is no file")


_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def copy(path: Path, to: Path) -> None:
    """Writes the content of a file to another; raises OSError where it is none, or becomes none meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as source:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no file")
        with to.open("wb") as copied:
            shutil.copyfileobj(source, copied)
