"""What a model's layers allow: rows that share one row of tokens, and rows that lie side by side."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D  # a linear layer in spite of its name

from tunesmith.language import said

_RECURRENT = ("mamba", "conv", "recurrent", "linear_attention", "rwkv", "lstm", "linearattention", "lightning")


def without_adapter(model: nn.Module) -> Any:
    """The language model, without an adapter around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def not_packable(model: nn.Module) -> str | None:
    """Why documents in one row would see each other; None where they would not."""
    causal = without_adapter(model)
    config = causal.config.get_text_config()
    if causal.config.is_encoder_decoder:
        return said("the model has an encoder")
    modules = {type(module).__name__ for module in causal.modules() if not isinstance(module, Conv1D)}
    kinds = [*(getattr(config, "layer_types", None) or ()), *sorted(modules)]
    if recurrent := [kind for kind in kinds if any(word in kind.lower() for word in _RECURRENT)]:
        return said("the model has layers that are not attention ({kind})", kind=recurrent[0])
    if "chunked_attention" in kinds or getattr(config, "index_topk", None):
        return said("the model chooses the tokens it attends to by their place in the row")
    if not causal._supports_attention_backend:
        return said("{model} does not use transformers' attention interface", model=type(causal).__name__)
    if getattr(config, "attention_dropout", 0):
        return said("the model drops attention")
    return None


def longest_together(model: nn.Module) -> int:
    """The longest row that may lie beside others and lose what stands behind its last learned token: beyond, a rotary
    embedding counts the tokens. None may where an indexer picks the best keys of a row (DeepSeek 3.2)."""
    config = without_adapter(model).config.get_text_config()
    if getattr(config, "index_topk", None):
        return 0
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = list(parameters.values()) if any(isinstance(v, dict) for v in parameters.values()) else [parameters]
    limits = [2**62]
    for kind in kinds:
        if isinstance(kind, dict) and kind.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
        elif isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            limits.append(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(limits)


class DynamicRotaries:
    """A model's dynamic rotary embeddings, which keep the frequencies of the longest row so far."""

    def __init__(self, model: nn.Module) -> None:
        self._all: list[Any] = [module for module in model.modules() if getattr(module, "rope_type", None) == "dynamic"]

    def forget(self) -> None:
        """Makes them depend on nothing but the next row."""
        for module in self._all:
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.to(module.inv_freq)
