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
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils.import_utils import is_liger_kernel_available

from tunesmith.engine.hf import compiler

# Those that the tests compare. For others Liger may change more than can be changed back.
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text")
_NOT_THESE = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
_BOUND = ("forward", "extra_repr", "_get_name")


def version(device: torch.device) -> str | None:
    """Of the kernels; None where they are not installed or the device can not run them.

    Triton's interpreter (`TRITON_INTERPRET=1`) runs them on a CPU, to see whether they are right.
    """
    on_card = device.type == "cuda" and compiler.lacking() is None
    runs = on_card or os.environ.get("TRITON_INTERPRET") == "1"
    return importlib.metadata.version("liger_kernel") if runs and is_liger_kernel_available() else None


def computes(config: PreTrainedConfig, device_type: str) -> bool:
    """Whether norms and MLPs of a model of this config are computed by them on such a device, as far as this
    environment tells."""
    return version(torch.device(device_type)) is not None and config.get_text_config().model_type in _FAMILIES


def install(model: PeftModel) -> int:
    """Lets norms and MLPs of a model whose family is known be computed by Liger's kernels; returns how many."""
    base = cast("PreTrainedModel", model.get_base_model())
    if base.config.model_type not in _FAMILIES or version(base.device) is None:
        return 0
    code = vars(sys.modules[type(base).__module__])
    before = dict(code)
    try:
        apply_liger_kernel(model, _NOT_THESE)
    finally:
        code.update(before)  # it also replaces the classes that later models would be made of
    changed = _changed(model)
    for module in changed:  # or short norms of many rows would take another kernel than the few that are checked
        if hasattr(module, "row_mode"):
            module.row_mode = True
    return len(changed)


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


def _changed(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _of_liger(vars(module).get("forward"))]


def _of_liger(forward: Any) -> bool:
    return getattr(forward, "__module__", "").startswith("liger_kernel")
