"""An end of the time that holds, whatever is being computed."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN_SECONDS = 2


class TimeIsUp(KeyboardInterrupt):
    """Ends a training as a second Ctrl-C does."""


class Alarm:
    """While it is on, `TimeIsUp` is raised in the main thread when the time is up, whatever is being computed.

    `ends`: when that is, in seconds of `time.monotonic`; infinite for never.
    """

    def __init__(self, ends: float) -> None:
        self._ends, self._n_held, self._rang = ends, 0, False
        self._previous: Any = None

    def __enter__(self) -> None:
        if self._ends < math.inf and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGALRM, self._ring)
            # Again and again: Python drops what is raised in a finalizer.
            signal.setitimer(signal.ITIMER_REAL, max(self._ends - time.monotonic(), 0.001), _AGAIN_SECONDS)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._previous)
            self._previous, self._rang = None, False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside it waits: what is being written is written to its end."""
        self._n_held += 1
        try:
            yield
        finally:
            self._n_held -= 1
        if self._rang and not self._n_held:
            self._rang = False
            raise TimeIsUp

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if not self._n_held:
            raise TimeIsUp
        self._rang = True
