"""Commands that a person is told to type, as a shell takes them: names quoted, programs as the shell finds them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from tunesmith.terminal import in_one_line, what_is_no_text


def tunesmith(*words: str | os.PathLike[str]) -> str:
    """This program with these words."""
    return line(_found("tunesmith"), *words)


def pip_install(*requirements: str) -> str:
    """The packages for this Python."""
    return line(_found("pip"), "install", *requirements)


def line(*words: str | os.PathLike[str]) -> str:
    """A command in one line that can be pasted.

    >>> line("tunesmith", "resume", "runs/my run")
    "tunesmith resume 'runs/my run'"
    >>> print(line("cat", "two\\nlines"))
    cat $'two\\x0alines'
    """
    return " ".join(_quoted(os.fspath(word)) for word in words)


def _quoted(word: str) -> str:
    if all(map(_can_be_shown, word)):
        return shlex.quote(word)
    return "$'" + "".join(sign if _can_be_shown(sign) and sign not in "'\\" else _escape(sign) for sign in word) + "'"


def _can_be_shown(sign: str) -> bool:
    """It is text, and a terminal shows it as itself: what it would obey could not be copied from there."""
    return in_one_line(sign) == sign and what_is_no_text(sign) is None


def _escape(sign: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in sign.encode("utf-8", "surrogateescape"))


def _found(program: str) -> str:
    """The program's name; or where the shell finds another one or none under that name, the path of the one beside this
    Python: a virtual environment need not be activated."""
    beside, found = Path(sys.executable).with_name(program), shutil.which(program)
    if not beside.is_file() or (found and os.path.samefile(found, beside)):
        return program
    return near(beside)


def near(path: str | os.PathLike[str]) -> str:
    """The path as one types it here: from the current folder on where it lies below."""
    relative = os.path.relpath(path)
    return os.fspath(path) if relative.startswith("..") else relative
