"""`make test` leaves cases of a test to `make test-long`, and never all of them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from conftest import COLLECTED


def never_run(collected: Iterable[tuple[str, bool]]) -> set[str]:
    """The tests of which no case is run by `make test`."""
    tests = [(name.partition("[")[0], long) for name, long in collected]
    return {name for name, _ in tests} - {name for name, long in tests if not long}


def test_no_test_is_left_out_as_a_whole(request: pytest.FixtureRequest) -> None:
    assert never_run(request.config.stash[COLLECTED]) == set()


def test_one_that_is_left_out_is_seen() -> None:
    collected = [("a.py::test_x[1]", True), ("a.py::test_x[2]", False), ("b.py::test_x[1]", True)]
    assert never_run(collected) == {"b.py::test_x"}
