"""Work on what somebody else wrote, in a copy of this process that a limit can end: a template rendered, a tokenizer
built, a file unpacked.

Limits are of processor time, so that a busy machine ends nothing that is right, and of memory beyond what is in use.
Where there is no copy with limits (other systems than Linux), the work is done here, without them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import struct
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

from tunesmith.language import said

SECONDS = 8
MORE_BYTES = 1 << 30
_ANSWER_BYTES = 64 << 20
_PATIENCE = 4  # times as long by the clock as by the processor's time, on a machine that others use too
_LENGTH = struct.Struct("<Q")


class Ended(Exception):
    """The work did not come to its end; the text says why: "more than 8 seconds", "more than 1,024 MiB"."""


class WorkFailed(Exception):
    """The work raised an exception; this is its kind and the first line of its text."""


def confined(work: Callable[[], Any], *, seconds: int = SECONDS, more_bytes: int = MORE_BYTES) -> Any:
    """What `work` returns, as JSON holds it; raises Ended where a limit ended it, WorkFailed where it failed."""
    (answer,) = Confined(lambda _: work(), seconds=seconds, more_bytes=more_bytes).ask([None])
    if isinstance(answer, Exception):
        raise answer
    return answer


class Confined:
    """Answers requests, as JSON holds them, by `work` in a copy of this process.

    The copy is made at the first request and ends with this object; one that a limit ended is made anew.
    """

    def __init__(self, work: Callable[[Any], Any], *, seconds: int = SECONDS, more_bytes: int = MORE_BYTES) -> None:
        self._work, self._seconds, self._more_bytes = work, seconds, more_bytes
        self._copies: list[_Copy] = []  # one at most
        self._lock = threading.Lock()
        weakref.finalize(self, _end_all, self._copies)  # at the end of this process at the latest

    def ask(self, requests: Sequence[Any]) -> list[Any]:
        """The answers in order; in the place of one there is a WorkFailed, or an Ended where a limit ended the work."""
        if sys.platform != "linux":
            return [tried(self._work, request, self._more_bytes) for request in requests]
        answers: list[Any] = []
        with self._lock:
            while len(answers) < len(requests):
                if not self._copies or not self._copies[0].is_ours:
                    self._copies[:] = [_Copy(self._work, self._seconds, self._more_bytes)]
                try:
                    for answer in self._copies[0].ask(requests[len(answers) :]):
                        answers.append(answer)
                except Ended as ended:
                    answers.append(ended)
                    _end_all(self._copies)
        return answers


class _Copy:
    """The process and the two pipes to it."""

    def __init__(self, work: Callable[[Any], Any], seconds: int, more_bytes: int) -> None:
        self._seconds, self._more_bytes, self._owner = seconds, more_bytes, os.getpid()
        asked, self._ask = os.pipe()
        self._answer, answered = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: the copy computes with one
            self._pid = os.fork()
        if not self._pid:
            _serve(work, asked, answered, seconds, more_bytes)
        os.close(asked)
        os.close(answered)
        os.set_blocking(self._ask, False)

    @property
    def is_ours(self) -> bool:
        """A copy of this process has the pipes too, and must not use them."""
        return os.getpid() == self._owner

    def ask(self, requests: Sequence[Any]) -> Iterator[Any]:
        """Raises Ended where the process was ended by its limits or by itself."""
        waiting = bytearray()
        for request in requests:
            text = json.dumps(request).encode()
            waiting += _LENGTH.pack(len(text)) + text
        for _ in requests:
            head = self._read(_LENGTH.size, waiting)
            (length,) = _LENGTH.unpack(head)
            if length > _ANSWER_BYTES:
                raise Ended(said("more than {n} MiB of result", n=_ANSWER_BYTES >> 20))
            answer = json.loads(bytes(self._read(length, waiting)))
            if "failed" in answer:
                yield WorkFailed(answer["failed"])
            elif "ended" in answer:
                raise Ended(answer["ended"])
            else:
                yield answer["returned"]

    def _read(self, count: int, waiting: bytearray) -> bytearray:
        """The next bytes of the answers, while what waits is written."""
        read, until = bytearray(), monotonic() + self._seconds * _PATIENCE
        while len(read) < count:
            left = until - monotonic()
            readable, writable, _ = select.select([self._answer], [self._ask] if waiting else [], [], max(left, 0))
            if writable:
                with contextlib.suppress(BrokenPipeError):  # it has ended; what it said before can still be read
                    del waiting[: os.write(self._ask, waiting[: 1 << 16])]
            if readable:
                part = os.read(self._answer, min(count - len(read), 1 << 20))
                if not part:
                    raise Ended(self._why())
                read += part
            elif not writable and left <= 0:
                raise Ended(said("more than {n} seconds", n=self._seconds))
        return read

    def _why(self) -> str:
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGXCPU:
            return said("more than {n} seconds", n=self._seconds)
        return (
            said("a crash (signal {n})", n=-code) if code < 0 else said("an end without an answer ({code})", code=code)
        )

    def end(self) -> None:
        os.close(self._ask)
        os.close(self._answer)
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)


def _end_all(copies: list[_Copy]) -> None:
    for copy in copies:
        if copy.is_ours:
            copy.end()
    copies.clear()


@contextlib.contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """While it holds, this process raises MemoryError where it would take `more_bytes` more than it has now."""
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + more_bytes
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def tried(work: Callable[[Any], Any], request: Any, more_bytes: int) -> Any:
    """What the work returns, a WorkFailed where it fails, an Ended where it takes all memory or crashes."""
    try:
        return work(request)
    except MemoryError:
        return Ended(said("more than {n:,} MiB", n=more_bytes >> 20))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:500]
        return WorkFailed(f"{type(error).__name__}: {first}".removesuffix(": "))
    except BaseException as error:  # what Rust calls a panic
        return Ended(said("a crash ({error})", error=type(error).__name__))


def _serve(work: Callable[[Any], Any], asked: int, answered: int, seconds: int, more_bytes: int) -> NoReturn:
    """In the copy: nothing that the process above set up (handlers, buffers, exit hooks) runs here, and none of its
    files is held open: a lock or an address would outlive it."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        gc.disable()  # what is collected would be copied first
        silence = os.open(os.devnull, os.O_RDWR)
        sys.stdout = sys.stderr = os.fdopen(silence, "w")
        for number in (0, 1, 2):
            os.dup2(silence, number)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in (asked, answered, silence):
                with contextlib.suppress(OSError):
                    os.close(int(name))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]  # a shell's or SLURM's, which nobody but root may raise
        with memory_limit(more_bytes), os.fdopen(asked, "rb") as requests, os.fdopen(answered, "wb") as answers:
            while head := requests.read(_LENGTH.size):
                request = json.loads(requests.read(_LENGTH.unpack(head)[0]))
                used = resource.getrusage(resource.RUSAGE_SELF)
                until = int(used.ru_utime + used.ru_stime) + seconds + 1
                bound = until if most == resource.RLIM_INFINITY else min(until, most)
                resource.setrlimit(resource.RLIMIT_CPU, (bound, most))
                answer = tried(work, request, more_bytes)
                if isinstance(answer, Exception):
                    answer = {"ended" if isinstance(answer, Ended) else "failed": str(answer)}
                else:
                    answer = {"returned": answer}
                text = json.dumps(answer).encode()
                answers.write(_LENGTH.pack(len(text)) + text)
                answers.flush()
    finally:
        os._exit(0)
