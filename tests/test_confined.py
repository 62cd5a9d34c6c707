"""Work that is ended by a limit, and what it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tunesmith.confined import Ended, WorkFailed, confined

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="work is confined on Linux only")


def test_what_the_work_returns_comes_back() -> None:
    assert confined(lambda: {"ids": [1, 2], "text": "你好"}) == {"ids": [1, 2], "text": "你好"}


def test_more_than_a_pipe_holds_comes_back() -> None:
    assert len(confined(lambda: "x" * 1_000_000)) == 1_000_000


def test_too_much_time_ends_it() -> None:
    with pytest.raises(Ended, match=r"more than 0\.2 seconds"):
        confined(lambda: time.sleep(60), seconds=0.2)


def test_too_much_memory_ends_it_and_is_never_taken_here() -> None:
    with pytest.raises(Ended, match="more than 256 MiB"):
        confined(lambda: len(bytearray(1 << 30)), more_bytes=256 << 20)


def test_a_crash_ends_it() -> None:
    with pytest.raises(Ended, match="a crash"):
        confined(os.abort)


def test_an_exception_keeps_its_text() -> None:
    def fail() -> None:
        raise ValueError("no such thing")

    with pytest.raises(WorkFailed, match="no such thing"):
        confined(fail)


def test_nothing_that_it_prints_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    confined(lambda: print("hello"))
    assert capfd.readouterr().out == ""


LIMITED = """
import os, resource, sys
from tunesmith.confined import Ended, confined
kind, bound = getattr(resource, sys.argv[1]), int(sys.argv[2])
resource.setrlimit(kind, (bound, bound))
if os.getuid() == 0:
    os.setuid(65534)  # root may raise a limit again, a user may not
print(confined(lambda: 1 + 1))
try:
    confined(lambda: len(bytearray(3 << 30)))
except Ended as ended:
    print(ended)
"""


@pytest.mark.parametrize(("kind", "bound"), [("RLIMIT_AS", 1 << 30), ("RLIMIT_CPU", 10)])
def test_where_the_process_is_limited_already_work_is_done_and_ended(kind: str, bound: int) -> None:
    """A limit of a shell (ulimit -v) or of SLURM, lower than the one for the work."""
    command = [sys.executable, "-c", LIMITED, kind, str(bound)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["2", "more than 2,048 MiB"]
