"""What is measured on a card: models of published shapes with random weights, rows of random tokens, and clocks."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tunesmith import models
from tunesmith.recipe import LoraSettings
from tunesmith.types import Origin, Rendered

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
SHARED, OWN, REPLY = 40, (10, 60), (20, 120)
"""Tokens of a system prompt that all rows share, a question, an answer; about those of huanhuan.json."""
_QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-1.7B": {
        **_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""From the models' config.json."""
_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip


def config_of(name: str, *, tiny: bool) -> PreTrainedConfig:
    """A model's config; a `tiny` one shows on a CPU that a script runs."""
    return AutoConfig.for_model(**{**SHAPES[name], **(_TINY if tiny else {})})


def built(config: PreTrainedConfig, lora: LoraSettings, *, nf4: bool = False) -> PeftModel:
    """The model with random weights, made on the card, and an adapter that is not the identity."""
    torch.manual_seed(0)
    with models.device():
        base = AutoModelForCausalLM.from_config(config, dtype=DTYPE, trust_remote_code=False).requires_grad_(False)
    if nf4:
        in_four_bits(base)
    tuned = models.attach(base, lora, 0, "random")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return tuned.train()


def in_four_bits(base: torch.nn.Module) -> None:
    """Replaces the linear layers of the decoder by those of bitsandbytes."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # pyright: ignore[reportMissingImports]

    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                sizes = child.in_features, child.out_features, child.bias is not None
                replaced = Linear4bit(*sizes, DTYPE, quant_type="nf4")
                replaced.weight = Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(parent, name, replaced.to(models.device()))


def rows_of(n_tokens: int, vocabulary: int, seed: int = 0) -> list[Rendered]:
    """Rows that are at least so many tokens together, each counted by itself."""
    draw = random.Random(seed)
    shared = random.Random(-1).choices(range(vocabulary), k=SHARED)
    made: list[Rendered] = []
    while sum(len(row.token_ids) for row in made) < n_tokens:
        own, reply = (draw.choices(range(vocabulary), k=draw.randint(*length)) for length in (OWN, REPLY))
        ids = (*shared, *own, *reply)
        made.append(Rendered(ids, ((len(ids) - len(reply), len(ids)),), Origin("random", len(made) + 1)))
    return made


def n_tokens(rows: list[Rendered]) -> int:
    """Tokens of the data, which what is shared counts among once for each row."""
    return sum(len(row.token_ids) for row in rows)


def wait() -> None:
    """Comes back when the card has done all that it was told to."""
    if CUDA:
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], times: int) -> dict[str, Any]:
    """The first time by itself, and so many others; seconds, and the memory that was taken at most."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    for _ in range(times + 1):
        wait()
        began = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - began)
    return {
        "first": seconds[0],
        "seconds": seconds[1:],
        "median": statistics.median(seconds[1:]),
        "peak_bytes": torch.cuda.max_memory_allocated() if CUDA else None,
    }


def attempted(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it gives, or what went wrong: a row that fails stays in."""
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
    finally:
        if CUDA:
            torch.cuda.empty_cache()
