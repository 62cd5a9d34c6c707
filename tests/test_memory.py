"""One name, one memory, whatever is asked for in between."""

from __future__ import annotations

import torch

from tunesmith.engine import memory
from tunesmith.engine.memory import Buffers

CPU = torch.device("cpu")


def test_a_name_has_one_memory() -> None:
    buffers = Buffers(torch.float32, CPU)
    small = buffers.take("x", 3, 5)
    assert small.shape == (3, 5) and small.is_contiguous() and buffers.take("x", 3, 5) is small
    other = buffers.take("x", 5, 2)
    assert other.shape == (5, 2) and other.data_ptr() == small.data_ptr()
    assert buffers.take("y", 3, 5).data_ptr() != small.data_ptr()


def test_what_has_grown_is_not_kept_a_second_time() -> None:
    buffers = Buffers(torch.float32, CPU)
    small, neighbour = buffers.take("x", 3, 5), buffers.take("y", 3, 5)
    large = buffers.take("x", 300, 5)
    again = buffers.take("x", 3, 5)
    assert again is not small and again.data_ptr() == large.data_ptr()
    assert buffers.take("y", 3, 5) is neighbour


def test_several_lie_behind_each_other() -> None:
    first, second, third = Buffers(torch.float64, CPU).take_each("x", 3, 4, 5)
    assert first.shape == (4, 5)
    assert second.data_ptr() - first.data_ptr() == third.data_ptr() - second.data_ptr() == 4 * 5 * 8


def test_shapes_are_not_remembered_for_ever() -> None:
    buffers = Buffers(torch.float32, CPU)
    for n in range(memory._MOST_TAKEN + 10):
        buffers.take("x", 1 + n % (memory._MOST_TAKEN + 5))
    assert len(buffers._taken) <= memory._MOST_TAKEN + 1
