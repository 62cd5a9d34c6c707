"""Products of matrices: by which library, and of which numbers.

A number of fp32 is the sum of three of bf16 (24 bits, eight each). Where weights are bf16 numbers, whatever they are
stored as, a product with them is therefore the sum of three products of bf16 with sums in fp32, and nothing is rounded
but sums: it is nearer to the exact one than fp32's own, 2 to 3 times (Henry, Tang, Heinecke: "Leveraging the bfloat16
Artificial Intelligence Datatype For Higher-Precision Computations", arXiv 1904.06376, section II, where both factors
are split). A processor with AMX does the three in half the time of one in fp32.

torch multiplies with MKL, numpy with OpenBLAS. On an AMD processor OpenBLAS is the faster one where the result is wide
(by a tenth for an MLP's first product, a quarter for the output layer) or an adapter's rank is one side (by half); for
other shapes they are equal. A step of SmolLM2 takes 1 to 6 % less time (Zen 3, one core per lane, 2026-11).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112  # cblas.h
_thread = threading.local()


def splits() -> bool:
    """Whether `mm_of_split` is there and worth it: the processor has units of its own for products of bf16 (Intel's
    AMX), and torch's library brings MKL's product of bf16 with sums in fp32."""
    return "amx_bf16" in _processor() and torch.backends.mkl.is_available() and _product_of_bfloat16() is not None


def mm_of_split(parts: Tensor, weight: Tensor, out: Tensor, *, add: bool = False) -> None:
    """x · weight in `out` (T, N, fp32), or added to it, with x (T, K) as the sum of its `parts` (3, T, K), the largest
    first; they and the weight (K, N) are bf16."""
    product = cast("Any", _product_of_bfloat16())
    by_column = weight.stride(1) != 1
    rows, shared = parts.shape[1:]
    for number, part in enumerate(reversed(parts.unbind())):
        product(
            _ROW_MAJOR, _AS_IT_IS, _TRANSPOSED if by_column else _AS_IT_IS, rows, weight.shape[1], shared,
            1.0, part.data_ptr(), part.stride(0), weight.data_ptr(), weight.stride(1 if by_column else 0),
            1.0 if add or number else 0.0, out.data_ptr(), out.stride(0),
        )  # fmt: skip


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


@functools.cache
def _product_of_bfloat16() -> Any | None:
    """MKL's cblas_gemm_bf16bf16f32; torch itself gives results of such products in bf16 only. Python's lock is free
    meanwhile."""
    try:
        product = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    sizes, number, matrix = [ctypes.c_int] * 6, ctypes.c_float, [ctypes.c_void_p, ctypes.c_int]
    product.argtypes, product.restype = [*sizes, number, *matrix, *matrix, number, *matrix], None
    return product


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
