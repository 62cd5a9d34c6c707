"""Whether element-wise parts are computed in one pass (`kernels`) or by torch, operation by operation.

Numba, which compiles the kernels, is an extra: `pip install "tunesmith[cpu]"`.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import torch
from torch import Tensor


def version() -> str | None:
    """Numba's, None where it is not installed; nothing is imported."""
    try:
        return importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return None


def kernels(*given: Tensor) -> Any | None:
    """The module `kernels` where it can work on these tensors: fp32 in the processor's memory, row after row."""
    if all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in given):
        return _kernels()
    return None


def array(tensor: Tensor | None) -> Any:
    """The tensor as kernels take it: the same memory."""
    return None if tensor is None else tensor.numpy()


@functools.cache
def _kernels() -> Any | None:
    try:
        from tunesmith.engine.cpu import kernels
    except ImportError:  # not there, or made for another numpy
        return None
    return kernels
