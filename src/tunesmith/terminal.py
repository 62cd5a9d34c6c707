"""Text at the border to a terminal: what of it may be printed, streams that nobody reads, bytes that are not text."""

from __future__ import annotations

import codecs
import errno
import io
import os
import stat
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tunesmith.language import said

# One sign for one sign, so that styles and widths stay where they are.
SIGNS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    # The second half of the control characters, what turns the direction of writing, and line ends of Unicode.
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029), 0xFFFD),
}
"""What a terminal would obey instead of showing it, and the sign that is shown for it."""

_IN_ONE_LINE = {**SIGNS, ord("\n"): 0x240A, ord("\t"): 0x2409}
_PLAINER = dict(zip("▁▂▃▄▅▆▇█✓✗›×⏎–�", "_.-~=+*#+x>x|-?", strict=True)) | {
    "…": "...",
    "→": "->",
    "≤": "<=",
    "≠": "!=",
    "⟦": "[[",
    "⟧": "]]",
}


ERRORS = "plainer"
"""The error handler that writes what an encoding lacks in ASCII: arrows, bars, and other scripts as escapes."""


def safe(text: str) -> str:
    """The text with a visible sign for each control character, so that a terminal obeys none of it.

    >>> safe("\\x1b]0;owned\\x07")
    '␛]0;owned␇'
    """
    return text.translate(SIGNS)


def in_one_line(text: str) -> str:
    """As `safe`, and line ends and tabs are signs too."""
    return text.translate(_IN_ONE_LINE)


# --- streams ----------------------------------------------------------------------------------------------------------


class Stream:
    """Standard output or error.

    Nothing that befalls it ends the work: where nobody reads it any more (the other end of a pipe has gone, the
    terminal was closed) or it can not be written, what is printed goes nowhere from then on. `failed` says why, unless
    that is how pipes end.
    """

    def __init__(self, stream: TextIO, guard: Callable[[str], str] = lambda text: text) -> None:
        self._stream, self._guard = stream, guard
        self.gone = False
        self.failed: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._tried(lambda: self._stream.write(self._guard(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def guarded(self) -> Stream:
        """The same stream for what is text and nothing else: on a terminal it shows control characters as signs."""
        return Stream(self, safe) if self._stream.isatty() else self  # type: ignore[arg-type]

    @property
    def as_it_is(self) -> Stream:
        """The stream for what has styles, which are control characters."""
        return self._stream if isinstance(self._stream, Stream) else self

    def _tried(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            if error.errno == errno.EIO:
                leave_terminal()
            else:
                self.gone = True
                self.failed = None if error.errno == errno.EPIPE else error
                _to_nowhere(self._stream.fileno())


def open_streams() -> None:
    """Makes the three standard streams of this process such that printing never fails: a closed one leads nowhere, a
    sign that the encoding lacks is written in ASCII, bytes that are no text are read as half characters."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            _to_nowhere(number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)


def guard_streams() -> None:
    """From now on what anybody prints to a terminal is text: `print`, a traceback, a library."""
    sys.stdout, sys.stderr = (s.guarded() if isinstance(s, Stream) else s for s in (sys.stdout, sys.stderr))


def nobody_reads() -> bool:
    """Whether the reader of standard output has gone."""
    return isinstance(sys.stdout, Stream) and sys.stdout.as_it_is.gone


def not_written() -> str | None:
    """Why what was printed on standard output is not where it should be; None where it is, or nobody wanted it."""
    failed = sys.stdout.as_it_is.failed if isinstance(sys.stdout, Stream) else None
    return None if failed is None else failed.strerror or str(failed)


def leave_terminal() -> None:
    """What is printed from now on goes nowhere: writing to a terminal that is gone would be an error."""
    for descriptor in (0, 1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            _to_nowhere(descriptor)


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _plainer(error: UnicodeError) -> tuple[str, int]:
    """An error handler for encodings without our signs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(sign: str) -> str:
    code = ord(sign)
    if 0x2400 <= code <= 0x2421:  # the picture of a control character
        return f"\\x{0x7F if code == 0x2421 else code - 0x2400:02x}"
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return _PLAINER.get(sign) or sign.encode("ascii", "backslashreplace").decode()


codecs.register_error(ERRORS, _plainer)


# --- bytes that are not text ------------------------------------------------------------------------------------------


def what_is_no_text(text: str) -> str | None:
    """The bytes in a text from the command line or standard input that could not be decoded, in words, with the
    encoding that they seem to have; None where all of it is text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.end]
    else:
        return None
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return said("half a character ({code})", code=ascii(half))
    for encoding, name in (("gb18030", "GB18030"), ("cp1252", "Windows-1252")):
        try:
            read = data.decode(encoding)
            return said("bytes that are not UTF-8 (they read as {encoding}: {text})", encoding=name, text=read)
        except UnicodeDecodeError:
            continue
    return said("bytes that are not UTF-8 ({bytes})", bytes=half.encode("utf-8", "surrogateescape").hex(" "))
