"""Memory that is kept from step to step, in large pages where the system has them.

Fresh memory costs a page fault per 4 KiB when it is first touched, and a matrix spread over small pages costs the
processor a lookup per page: 6 to 8 % of a step's matrix products (2 AVX2 cores, 2026-11).
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable

import torch
from torch import Tensor

_PAGE = 2 << 20
_MOST_TAKEN = 4096  # shapes; each micro-batch has some hundred of its own
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
                # On a CPU what is not touched is not there, so room to grow is free.
                room = 2 * n if self._device.type == "cpu" else n
                flat = self._flat[name] = empty(room, dtype=self._dtype, device=self._device)
            made = self._taken[which] = flat[:n].view(count, *shape).unbind()
            return made
