"""LoRA in transformers' own layers as one autograd function, through peft's extension point for variants.

peft's own forward copies x to fp32 for every adapter and makes three tensors as large as the layer's output. Here the
low-rank product is added to the base's output in place, in the base's type, and x, dropout's mask and h = x̃Aᵀ are all
that is kept. The base may be quantised: its product stays its own. What is saved on disk is plain peft.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float) -> Tensor:
        rows = x.flatten(0, -2)
        keep = None
        if dropout:
            dropped, keep = torch.native_dropout(rows, dropout, True)
        else:
            dropped = rows
        h = dropped @ a.T.to(x.dtype)
        result.flatten(0, -2).addmm_(h, b.T.to(x.dtype), alpha=scaling)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, keep, h, a, b)
        ctx.scaling, ctx.dropout = scaling, dropout
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, keep, h, a, b = ctx.saved_tensors
        rows, d_out = x.flatten(0, -2), grad.flatten(0, -2)
        d_h = (d_out @ b.to(x.dtype)).mul_(ctx.scaling)
        d_b = (h.T @ d_out).T.mul(ctx.scaling).to(b.dtype)
        scale = 1 / (1 - ctx.dropout)
        dropped = rows if keep is None else (rows * keep).mul_(scale)
        d_a = (d_h.T @ dropped).to(a.dtype)
        d_x = None
        if ctx.needs_input_grad[1]:
            d_x = d_h @ a.to(x.dtype)
            if keep is not None:
                d_x.mul_(keep).mul_(scale)
            d_x = d_x.view_as(x)
        return grad, d_x, d_a, d_b, None, None


class _InPlace:
    """What peft calls a variant: how an adapter is applied, and what it adds to the weights."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        dropout = module.lora_dropout[active_adapter]
        share = dropout.p if isinstance(dropout, nn.Dropout) and module.training else 0.0
        a, b = (cast("Tensor", part[active_adapter].weight) for part in (module.lora_A, module.lora_B))
        return cast("Tensor", _Added.apply(result, x, a, b, module.scaling[active_adapter], share))

    @staticmethod
    def supports_lora_conversion() -> bool:
        return True


def _of_four_bits(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What peft's forward of such a layer gives, but for a copy of the base's result, which is no view here."""
    if layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    return _InPlace.forward(layer, "default", x, layer.base_layer(x))


def install(model: nn.Module) -> int:
    """Lets every plain LoRA adapter of the model be applied in place; returns how many others there are."""
    others = 0
    for layer in _layers(model):
        if _plain(layer):
            layer.lora_variant["default"] = _InPlace
            layer.cast_input_dtype_enabled = False
            if type(layer.base_layer).__name__ == "Linear4bit":
                vars(layer)["forward"] = functools.partial(_of_four_bits, layer)
        else:
            others += 1
    return others


def remove(model: nn.Module) -> None:
    """Gives every adapter back to peft."""
    for layer in _layers(model):
        if layer.lora_variant.get("default") is _InPlace:
            del layer.lora_variant["default"]
            layer.cast_input_dtype_enabled = True
            vars(layer).pop("forward", None)


@contextmanager
def removed(model: nn.Module) -> Iterator[None]:
    """Inside, peft applies the adapters itself."""
    installed = any(layer.lora_variant.get("default") is _InPlace for layer in _layers(model))
    remove(model)
    try:
        yield
    finally:
        if installed:
            install(model)


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _plain(layer: Any) -> bool:
    return (
        list(layer.lora_A) == ["default"]
        and layer.lora_variant.get("default") in (None, _InPlace)
        and not any(layer.lora_bias.values())
        and not getattr(layer, "fan_in_fan_out", False)
        and layer.base_layer.__class__.__name__ in ("Linear", "Linear4bit", "Linear8bitLt")
    )
