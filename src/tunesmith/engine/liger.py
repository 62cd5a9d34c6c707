"""Liger's Triton kernels in transformers' own layers: norms, and the product behind the MLP's activation, in one pass.

They are put into the modules of one model, and can be taken out again. Rotation stays transformers' own, because Liger
replaces that for every model of the process, and the loss is the engine's.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils.import_utils import is_liger_kernel_available

_NOT_THESE = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
_BOUND = ("forward", "extra_repr", "_get_name")


def version() -> str | None:
    """Of the kernels; None where they are not installed or there is nothing to run them on.

    Triton's interpreter (`TRITON_INTERPRET=1`) runs them on a CPU, to see whether they are right.
    """
    runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return importlib.metadata.version("liger_kernel") if runs and is_liger_kernel_available() else None


def install(model: PeftModel) -> int:
    """Lets modules be computed by Liger's kernels, as far as it knows the model; returns how many."""
    if version() is None:
        return 0
    code = vars(sys.modules[type(model.get_base_model()).__module__])
    before = dict(code)
    apply_liger_kernel(model, _NOT_THESE)
    code.update(before)  # it also replaces the classes that later models would be made of
    return len(_changed(model))


def remove(model: nn.Module) -> None:
    """Gives every module its own forward back."""
    for module in _changed(model):
        for name in _BOUND:
            vars(module).pop(name, None)


@contextmanager
def removed(model: PeftModel) -> Iterator[None]:
    """Inside, modules are computed by transformers itself."""
    were_there = installed(model)
    remove(model)
    try:
        yield
    finally:
        if were_there:
            install(model)


def installed(model: nn.Module) -> bool:
    """Some of its modules are computed by Liger's kernels."""
    return bool(_changed(model))


def _changed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _of_liger(vars(module).get("forward"))]


def _of_liger(forward: Any) -> bool:
    return getattr(forward, "__module__", "").startswith("liger_kernel")
