"""Ctrl-C, SIGTERM and a closing terminal, while something is at work that should come to a good end first."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While it holds, each of the signals raises KeyboardInterrupt; inside of `gently` the first one only sets `asked`,
    and another Ctrl-C raises.

    Outside of the main thread it does nothing: the caller keeps its own handling. A hang-up that is ignored (nohup)
    stays ignored.
    """

    def __init__(self, note: Callable[[str], None] = lambda text: None) -> None:
        self.asked = False
        self._note = note
        self._gently = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def gently(self) -> Iterator[None]:
        """Inside, what is at work looks at `asked` itself."""
        self._gently = True
        try:
            yield
        finally:
            self._gently = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if not self._gently or (self.asked and number == signal.SIGINT):
            raise KeyboardInterrupt
        if not self.asked:  # a closing terminal may tell twice
            self.asked = True
            self._note("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")


class Terminal:
    """Standard output or error on a terminal. When that closes and nobody is told (a hang-up is ignored, or the job was
    disowned), what is printed goes nowhere from then on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._tried(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            _leave_terminal()
            return None


def _leave_terminal() -> None:
    """What is printed from now on goes nowhere: writing to a terminal that is gone would be an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
