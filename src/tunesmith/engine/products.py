"""Products of matrices: by which library, and of which numbers.

torch multiplies with MKL, numpy with OpenBLAS. On an AMD processor OpenBLAS is the faster one where the result is wide
(by a tenth for an MLP's first product, a quarter for the output layer) or an adapter's rank is one side (by half); for
other shapes they are equal. A step of SmolLM2 takes 1 to 6 % less time (Zen 3, one core per lane, 2026-11).
"""

from __future__ import annotations

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

_thread = threading.local()


def multiplies_bfloat16() -> bool:
    """Whether the processor says that it has units of its own for products of bf16 with sums in fp32 (Intel's AMX), and
    torch has the library that uses them."""
    return "amx_bf16" in _processor() and torch.backends.mkldnn.is_available()


@contextmanager
def of_bfloat16() -> Iterator[None]:
    """Inside, oneDNN rounds the factors of products in fp32 to bf16 and forms sums in fp32, in all threads of the
    process. Processors without units for it may compute in fp32 all the same."""
    matmul = cast("Any", torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


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
