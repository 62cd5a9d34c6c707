"""One name, one memory, whatever is asked for in between."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.engine.cpu import memory
from tunesmith.engine.cpu.memory import Buffers, Mapped

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


# --- out of a file ----------------------------------------------------------------------------------------------------

NUMBERS = 1 << 20  # 4 MiB


def of_a_file(folder: Path) -> dict[str, Tensor]:
    """Three tensors behind each other that lie in a file's mapping; its name is that of a hub's blob."""
    path = folder / "5d36cbea"
    save_file({name: torch.full((NUMBERS,), value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}, path)
    with safe_open(path, "pt") as opened:
        return {name: opened.get_tensor(name) for name in ("a", "b", "c")}


def resident(tensor: Tensor) -> int:
    """Bytes of the mapping in which a tensor lies that count as this process's memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        first, *others = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside and first == "Rss:":
            return int(others[0]) << 10
    raise AssertionError("not mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what of a file is in memory")
def test_what_has_left_a_file_is_no_longer_in_memory(tmp_path: Path) -> None:
    read = of_a_file(tmp_path)
    assert [float(t.sum()) / NUMBERS for t in read.values()] == [1, 2, 3]
    assert resident(read["b"]) >= 3 * 4 * NUMBERS
    read["c"].mul_(2)  # lies behind b, and in the file it is something else
    parameter, place = nn.Parameter(read["b"], requires_grad=False), torch.empty(NUMBERS, dtype=torch.bfloat16)
    Mapped().move(parameter, place)
    assert parameter.data_ptr() == place.data_ptr() and float(parameter.sum(dtype=torch.float32)) == 2 * NUMBERS
    left = 4 * NUMBERS - 2 * mmap.PAGESIZE
    assert 2 * 4 * NUMBERS <= resident(read["a"]) <= 3 * 4 * NUMBERS + mmap.PAGESIZE - left
    assert bool((read["a"] == 1).all()) and bool((read["c"] == 6).all())


def test_what_has_left_other_memory_leaves_the_rest_alone() -> None:
    together = memory.empty(3, NUMBERS, dtype=torch.float32, device=CPU).fill_(1.5)
    parameter = nn.Parameter(together[1], requires_grad=False)
    mapped = Mapped()
    for place in (torch.empty(NUMBERS), torch.empty(NUMBERS)):
        mapped.move(parameter, place)
    assert bool((parameter == 1.5).all()) and bool((together == 1.5).all())


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        # A card's shared memory is too small for a kernel, which smaller micro-batches do not change.
        (RuntimeError("No valid triton configs. OutOfMemoryError: out of resource: triton_tem_fused_0"), False),
        (RuntimeError("out of resource: shared memory, Required: 153600, Hardware limit: 101376."), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, ran_out: bool) -> None:
    assert memory.ran_out(error) is ran_out
