"""Work on what somebody else wrote, in a process that a limit can end: a tokenizer built, a file unpacked."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 20.0
MORE_BYTES = 2 << 30


class Ended(Exception):
    """The work did not come to its end; the text says why: "more than 20 seconds", "more than 2,048 MiB"."""


def confined(work: Callable[[], Any], *, seconds: float = SECONDS, more_bytes: int = MORE_BYTES) -> Any:
    """What `work` returns, as JSON holds it, computed by a copy of this process that is ended after `seconds` or when
    it takes `more_bytes` more memory than there is in use.

    Raises Ended for that and for a crash. An exception of the work itself is raised as WorkFailed with its text.
    A system without `fork` (Windows), or where a copy of a process with threads is not safe (macOS), runs the work
    here, without limits.
    """
    if sys.platform != "linux":
        return work()
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: the copy computes with one
        pid = os.fork()
    if not pid:
        os.close(read_end)
        _work_and_exit(work, write_end, seconds, more_bytes)
    os.close(write_end)
    try:
        said = _all_of(read_end, seconds)
    finally:
        os.close(read_end)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if said is None:
        raise Ended(f"more than {seconds:g} seconds")
    if not said:
        number = os.waitstatus_to_exitcode(status)
        raise Ended(f"a crash (signal {-number})" if number < 0 else f"an end without an answer ({number})")
    answer = json.loads(said)
    if "ended" in answer:
        raise Ended(answer["ended"])
    if "failed" in answer:
        raise WorkFailed(answer["failed"])
    return answer["returned"]


class WorkFailed(Exception):
    """The work raised an exception; this is its text."""


def _all_of(descriptor: int, seconds: float) -> bytes | None:
    """What is written until the other end closes; None where that takes longer."""
    until = time.monotonic() + seconds
    parts: list[bytes] = []
    while (left := until - time.monotonic()) > 0:
        if select.select([descriptor], [], [], left)[0]:
            part = os.read(descriptor, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    return None


def _work_and_exit(work: Callable[[], Any], descriptor: int, seconds: float, more_bytes: int) -> None:
    """In the copy: nothing of what the process above set up (handlers, buffers, exit hooks) may run here."""
    import resource

    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        gc.disable()  # what is collected would be copied
        silence = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(silence, number)
        sys.stdout = sys.stderr = os.fdopen(silence, "w")
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_CPU, int(seconds) + 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + more_bytes)
        try:
            answer = {"returned": work()}
        except MemoryError:
            answer = {"ended": f"more than {more_bytes >> 20:,} MiB"}
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            answer = {"failed": first[:500]}
        data = json.dumps(answer).encode()
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os._exit(0)


def _limit(kind: int, bound: int) -> None:
    """Sets a limit of this process; one that is there already and lower stays, for nobody but root may raise it."""
    import resource

    _, most = resource.getrlimit(kind)
    bound = bound if most == resource.RLIM_INFINITY else min(bound, most)
    resource.setrlimit(kind, (bound, bound))
