"""Work that is ended by a limit, and what it leaves."""

from __future__ import annotations

import os
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
