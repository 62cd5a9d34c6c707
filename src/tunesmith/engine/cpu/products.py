"""Products of matrices: by which library, and of which numbers.

A number of fp32 is the sum of three of bf16 (24 bits, eight each). Where weights are bf16 numbers, whatever they are
stored as, a product with them is therefore the sum of three products of bf16 with sums in fp32, and nothing is rounded
but sums: it is nearer to the exact one than fp32's own (Henry, Tang, Heinecke: "Leveraging the bfloat16 Artificial
Intelligence Datatype For Higher-Precision Computations", arXiv 1904.06376, section II, where both factors are split).
A processor with AMX does the three in a third of the time of one in fp32 (`amx`).

torch multiplies with MKL, numpy with OpenBLAS. On an AMD processor OpenBLAS is the faster one where the result is wide
(by a tenth for an MLP's first product, a quarter for the output layer) or an adapter's rank is one side (by half); for
other shapes they are equal. A step of SmolLM2 takes 1 to 6 % less time (Zen 3, one core per lane, 2026-11).
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from tunesmith.engine.cpu import onepass
from tunesmith.engine.cpu.memory import Take

# Multiplications: 4 ms of AMX. Beside torch's threads, which wait actively, another one takes up to 2 ms to start; half
# as many make a product slower, 2**31 for each nearly twice as fast (two Intel cores, 2026-11).
_WORTH_A_THREAD = 2**30
ROWS_AT_ONCE, SHARED_AT_ONCE = 128, 1024  # of a factor that is split: 768 KiB, which a core's second cache holds
_PERMISSION = 158, 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), on x86-64
_thread = threading.local()


def has_units() -> bool:
    """Whether the processor has units of its own for products of bf16 (Intel's AMX), and Linux lets this process use
    them. oneDNN's variable ONEDNN_MAX_CPU_ISA, by which torch is kept from newer instructions, holds here too."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return (most in ("", "ALL", "DEFAULT") or "AMX" in most) and "amx_bf16" in _processor() and _permitted()


def are_split() -> bool:
    """Whether products with weights that are bf16 numbers are split on this processor, as far as can be said before
    anything is compiled."""
    return has_units() and onepass.version() is not None


def splits(weight: Tensor) -> bool:
    """Whether `mm_of_split` is there for this weight, once it is stored as bf16."""
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and _amx() is not None


def mm_of_split(x: Tensor, weight: Tensor, out: Tensor, take: Take, *, add: bool = False) -> None:
    """x · weight in `out` (T, N), or added to it; x (T, K) and `out` are fp32, the weight (K, N) is bf16, and K is at
    least 1. Rows of each may lie apart, or columns of the weight. `take` gives memory that is kept; Python's lock is
    free meanwhile. As many threads work on a large product as torch has in this one."""
    assert x.stride(1) == out.stride(1) == 1 in weight.stride()
    (rows, shared), columns = x.shape, weight.shape[1]
    width = 16 * _tiles(math.ceil(columns / min(worth(rows, shared, columns), torch.get_num_threads())))
    parts = zip(weight.split(width, 1), out.split(width, 1), strict=True)
    calls = [_call(x, *part, take, number, add=add) for number, part in enumerate(parts)]
    if len(calls) == 1:
        calls[0]()
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        wait(running := [pool.submit(call) for call in calls])
    for call in running:
        call.result()


def worth(rows: int, shared: int, columns: int) -> int:
    """Threads at most that gain from dividing a product (rows, shared) · (shared, columns)."""
    return max(1, rows * shared * columns // _WORTH_A_THREAD)


def _call(x: Tensor, weight: Tensor, out: Tensor, take: Take, number: int, *, add: bool) -> Callable[[], None]:
    """For one thread."""
    found = cast("Any", _amx())
    of_parts, of_packed = rooms(len(x), x.shape[1], weight.shape[1])
    parts, packed = take(f"parts {number}", math.prod(of_parts) // 2), take(f"packed {number}", math.prod(of_packed))
    by_column = weight.stride(1) != 1
    bits = (weight.T if by_column else weight).view(torch.int16)
    return functools.partial(
        found.product, x.numpy(), bits.numpy(), by_column, out.numpy(), add,
        parts.view(torch.int16).view(of_parts).numpy(), packed.view(torch.int32).view(of_packed).numpy(), found.LAYOUT,
    )  # fmt: skip


def rooms(rows: int, shared: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what a thread works in: some rows as three numbers of 16 bits, and the weight in other order, two of
    them in each number of 32."""
    of_parts = _tiles(min(rows, ROWS_AT_ONCE)), math.ceil(min(shared, SHARED_AT_ONCE) / 32), 3, 16, 32
    return of_parts, (_tiles(columns), math.ceil(shared / 32), 16, 16)


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a · b; by OpenBLAS in a thread that `alone` was called in."""
    if not getattr(_thread, "alone", False):
        return torch.mm(a, b, out=out)
    if out is None:
        out = a.new_empty(len(a), b.shape[1])
    np.matmul(a.numpy(), b.numpy(), out=out.numpy())
    return out


def add_mm(a: Tensor, b: Tensor, total: Tensor) -> None:
    """total += a · b"""
    if getattr(_thread, "alone", False):
        total.add_(mm(a, b))
    else:
        total.addmm_(a, b)


def alone() -> None:
    """This thread multiplies by itself, and beside others that do so: always inside of `one_thread_each`."""
    _thread.alone = _openblas() is not None


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Inside, OpenBLAS starts no threads of its own."""
    openblas = _openblas()
    if openblas is None:
        yield
        return
    with openblas.limit(limits=1):
        yield


def _tiles(n: int) -> int:
    """Of 16 rows or columns, in pairs."""
    return max(1, math.ceil(n / 32)) * 2


@functools.cache
def _amx() -> Any | None:
    """`amx_products`, where there is AMX and the compiler knows it."""
    if not are_split():
        return None
    try:
        from numba.core.registry import cpu_target

        *_, features = cast("Any", cpu_target).target_context.codegen().magic_tuple()
        if "+amx-bf16" not in features:  # LLVM would end the process
            return None
        from tunesmith.engine.cpu import amx_products
    except ImportError:  # not there, or made for another numpy
        return None
    return amx_products


@functools.cache
def amx_attention() -> Any | None:
    """The module, where there is AMX."""
    if _amx() is None:
        return None
    from tunesmith.engine.cpu import amx_attention

    return amx_attention


def _permitted() -> bool:
    """Asks Linux to let this process use tiles; threads that it has already may use them too."""
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return bool(call(*_PERMISSION) == 0)


@functools.cache
def _openblas() -> ThreadpoolController | None:
    """numpy's, where it is worth the detour. What decides is the machine, never a clock: the same run has the same
    bytes."""
    if not torch.backends.mkl.is_available() or "AuthenticAMD" not in _processor():
        return None
    found = ThreadpoolController().select(internal_api="openblas")
    return found if found.lib_controllers else None


@functools.cache
def _processor() -> str:
    """What Linux says of it; "" elsewhere."""
    cpu = Path("/proc/cpuinfo")
    return cpu.read_text(encoding="utf-8") if cpu.exists() else ""
