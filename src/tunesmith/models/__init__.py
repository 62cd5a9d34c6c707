"""Base models, tokenizers and adapters: the thin layer over transformers and peft.

Remote code is never run. Weights come from safetensors; GGUF and `.bin` are converted to safetensors once.
"""

from __future__ import annotations

from tunesmith.models.adaptable import Target, targets
from tunesmith.models.adapter import Cancelled, attach, load_adapter, save_adapter, switched, take_type_of_base
from tunesmith.models.base import (
    card_dtype,
    context_length,
    decoder_layers,
    device,
    generation_config,
    load_base,
    load_config,
    n_words,
    published_in_bfloat16,
    skeleton,
)
from tunesmith.models.conversion import needs_preparing, prepared
from tunesmith.models.quiet import hush_libraries, quietly
from tunesmith.models.tokenizer import load_tokenizer, open_renderer, save_tokenizer

__all__ = [
    "Cancelled",
    "Target",
    "attach",
    "card_dtype",
    "context_length",
    "decoder_layers",
    "device",
    "generation_config",
    "hush_libraries",
    "load_adapter",
    "load_base",
    "load_config",
    "load_tokenizer",
    "n_words",
    "needs_preparing",
    "open_renderer",
    "prepared",
    "published_in_bfloat16",
    "quietly",
    "save_adapter",
    "save_tokenizer",
    "skeleton",
    "switched",
    "take_type_of_base",
    "targets",
]
