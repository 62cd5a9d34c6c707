"""Work that is ended by a limit, and what it leaves."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tunesmith.confined import Confined, Ended, WorkFailed, confined

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="work is confined on Linux only")


def test_what_the_work_returns_comes_back() -> None:
    assert confined(lambda: {"ids": [1, 2], "text": "你好"}) == {"ids": [1, 2], "text": "你好"}


def test_more_than_a_pipe_holds_goes_and_comes_back() -> None:
    texts = [letter * 300_000 for letter in "abcdefgh"]
    assert Confined(lambda text: text).ask(texts) == texts


def test_half_characters_go_and_come_back() -> None:
    assert Confined(lambda text: text).ask(["\ud800"]) == ["\ud800"]


def spin(_: Any = None) -> None:
    while True:
        pass


def test_too_much_time_ends_it() -> None:
    with pytest.raises(Ended, match="more than 1 seconds"):
        confined(spin, seconds=1)


def test_waiting_for_too_long_ends_it() -> None:
    with pytest.raises(Ended, match="more than 1 seconds"):
        confined(lambda: time.sleep(60), seconds=1)


def test_too_much_memory_ends_it_and_is_never_taken_here() -> None:
    with pytest.raises(Ended, match="more than 256 MiB"):
        confined(lambda: len(bytearray(1 << 30)), more_bytes=256 << 20)


def test_a_result_that_is_too_large_ends_it() -> None:
    with pytest.raises(Ended, match="64 MiB of result"):
        confined(lambda: "x" * (65 << 20))


def test_a_crash_ends_it() -> None:
    with pytest.raises(Ended, match="a crash"):
        confined(lambda: os.kill(os.getpid(), 9))


def test_an_exception_keeps_its_kind_and_text() -> None:
    def fail() -> None:
        raise ValueError("no such thing\nand more")

    with pytest.raises(WorkFailed, match=r"^ValueError: no such thing$"):
        confined(fail)


def test_what_follows_one_that_was_ended_is_answered() -> None:
    def work(request: str) -> str:
        if request == "die":
            os._exit(3)
        if request == "fail":
            raise KeyError(request)
        return request * 2

    answers = Confined(work).ask(["a", "die", "b", "fail", "c"])
    assert [answers[i] for i in (0, 2, 4)] == ["aa", "bb", "cc"]
    assert isinstance(answers[1], Ended) and isinstance(answers[3], WorkFailed)


def test_nothing_that_it_prints_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    confined(lambda: print("hello"))
    assert capfd.readouterr().out == ""


def test_a_lock_of_the_process_is_not_held_by_the_copy(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    worker = Confined(lambda text: text)
    worker.ask(["a"])
    os.close(descriptor)
    again = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody holds it
    os.close(again)


def test_the_copy_is_gone_with_its_object() -> None:
    worker = Confined(lambda _: os.getpid())
    (pid,) = worker.ask([None])
    del worker
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


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
    assert ended.stdout.splitlines() == ["2", "more than 1,024 MiB"]
