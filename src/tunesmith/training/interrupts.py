"""Ctrl-C, SIGTERM and a closing terminal, while something is at work that should come to a good end first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from tunesmith.language import said
from tunesmith.terminal import leave_terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_times = 0


def times() -> int:
    """How often one of the signals has come while `Interrupts` held: an interrupt that is raised where Python drops
    exceptions, as in a finalizer, is counted all the same."""
    return _times


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
        global _times
        _times += 1
        if number == signal.SIGHUP:
            leave_terminal()
        if not self._gently or (self.asked and number == signal.SIGINT):
            raise KeyboardInterrupt
        if not self.asked:  # a closing terminal may tell twice
            self.asked = True
            self._note(said("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once."))
