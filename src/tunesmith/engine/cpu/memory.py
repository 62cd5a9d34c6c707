"""Memory that is kept from step to step, in large pages where the system has them.

Fresh memory costs a page fault per 4 KiB when it is first touched, and a matrix spread over small pages costs the
processor a lookup per page: 6 to 8 % of a step's matrix products (2 AVX2 cores, 2026-11).
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2 << 20
_MOST_TAKEN = 4096  # shapes; each micro-batch has some hundred of its own
# What is raised where memory runs out; `ran_out` tells it from the other meanings of these.
RAISED = (MemoryError, OSError, RuntimeError)
# What torch's allocators say on a CPU, and a card's libraries of what they need; torch's own on CUDA has an exception
# of its own.
_NOT_ENOUGH = (
    "can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED",
)  # fmt: skip
_SMALL = 1 << 20  # bytes below which a page of its own is waste

Take = Callable[..., Tensor]
"""`Buffers.take`"""


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with arbitrary content; on Linux in 2 MiB pages if it is large."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < _SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, n_bytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return torch.empty(*shape, dtype=dtype, device=device)
    flat = torch.frombuffer(pages, dtype=dtype)  # keeps the mapping alive
    first = -flat.data_ptr() % _PAGE // dtype.itemsize
    return flat[first : first + math.prod(shape)].view(shape)


class Pieces:
    """Tensors behind each other in a few large pieces of memory: apart, each would leave some of its last page unused,
    116 MiB for the weights of SmolLM2. They stay as long as one of them does."""

    BYTES = 64 << 20
    _ALIGNED = 64

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rest: dict[torch.dtype, Tensor] = {}

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor with arbitrary content."""
        n = math.prod(shape)
        step = self._ALIGNED // dtype.itemsize
        reserved = -(-n // step) * step
        rest = self._rest.get(dtype)
        if rest is None or len(rest) < reserved:
            rest = empty(max(reserved, self.BYTES // dtype.itemsize), dtype=dtype, device=self._device)
        self._rest[dtype] = rest[reserved:]
        return rest[:n].view(shape)


class Mapped:
    """Weights on their way out of the files that they were read from.

    A file that is mapped goes as a whole: until the last tensor has left, every page of it that was read counts as this
    process's memory. Pages that a tensor left are handed back at once, so that what is copied does not stand there
    twice.
    """

    _LEFT = 64 << 20  # bytes of other memory after which the C library is asked for what it keeps

    def __init__(self) -> None:
        self._files = list(_files_mapped())
        self._left = 0

    def move(self, parameter: Tensor, place: Tensor) -> None:
        """Copies a parameter to a place, perhaps of another type, and lets it stand there."""
        before = parameter.data
        parameter.data = place.copy_(before)
        n_bytes = before.numel() * before.element_size()
        first, end = before.data_ptr(), before.data_ptr() + n_bytes
        if before.is_contiguous() and any(start <= first and end <= stop for start, stop in self._files):
            first += -first % mmap.PAGESIZE  # whole pages: the others are a neighbour's, too
            if (whole := (end - first) // mmap.PAGESIZE * mmap.PAGESIZE) > 0:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), mmap.MADV_DONTNEED)
            return
        del before
        self._left += n_bytes
        if self._left >= self._LEFT:
            self._left = 0
            give_back()


def _files_mapped() -> Iterator[tuple[int, int]]:
    """First address and end of whatever is mapped of files, where the system says so."""
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            addresses, _, _, _, inode = line.split(maxsplit=5)[:5]
            if inode != "0":
                start, _, end = addresses.partition("-")
                yield int(start, 16), int(end, 16)


def give_back() -> None:
    """Lets the system have what the C library keeps of freed memory: after a computation of another kind than those to
    come, 200 MiB for SmolLM2."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def ran_out(error: BaseException) -> bool:
    """Whether the error says that there was not enough memory, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NOT_ENOUGH)


class Buffers:
    """Tensors by name, for one thread or several. Asking again for a name gives the same memory, whatever the shape."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._flat: dict[str, Tensor] = {}
        self._taken: dict[tuple[str | int, ...], tuple[Tensor, ...]] = {}
        self._lock = threading.Lock()

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor; its content is that of the name's last use. The same one when asked for again."""
        return self._take(name, 1, shape)[0]

    def take_each(self, name: str, count: int, *shape: int) -> tuple[Tensor, ...]:
        """`count` tensors behind each other: apart, each would leave some of its last page unused."""
        return self._take(name, count, shape)

    def _take(self, name: str, count: int, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        which = name, count, *shape
        known = self._taken.get(which)
        if known is not None:
            return known
        n = count * math.prod(shape)
        with self._lock:
            if len(self._taken) > _MOST_TAKEN:
                self._taken.clear()
            flat = self._flat.get(name)
            if flat is None or flat.numel() < n:
                self._flat.pop(name, None)  # before the new one is made
                self._taken = {other: tensors for other, tensors in self._taken.items() if other[0] != name}
                flat = self._flat[name] = self._roomy(n)
            made = self._taken[which] = flat[:n].view(count, *shape).unbind()
            return made

    def _roomy(self, n: int) -> Tensor:
        """Memory for n numbers; on a CPU with room to grow, which is free as long as it is not touched."""
        if self._device.type == "cpu":
            try:
                return empty(2 * n, dtype=self._dtype, device=self._device)
            except RAISED as error:
                if not ran_out(error):  # of addresses, which may be limited too
                    raise
        return empty(n, dtype=self._dtype, device=self._device)
