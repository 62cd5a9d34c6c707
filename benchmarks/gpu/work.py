"""What every contestant on a GPU is given: a model's config, rows of random tokens, and the same adapter."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

STEPS = 6
ROWS = 32
SHARED, OWN, REPLY = 40, (10, 60), (20, 120)  # tokens: a system prompt, a question, an answer, as in huanhuan
LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


def rows_of(step: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and reply of each row of one step: a beginning that all rows share, then each its own."""
    draw = random.Random(step)
    shared = random.Random(0).choices(range(vocabulary), k=SHARED)
    made = []
    for _ in range(ROWS):
        own, reply = (draw.choices(range(vocabulary), k=draw.randint(*length)) for length in (OWN, REPLY))
        made.append((shared + own, reply))
    return made


def read_config(path: Path, *, tiny: bool) -> PreTrainedConfig:
    """The config; `tiny` shrinks it so that a script can be tried without a GPU."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if tiny:
        config.num_hidden_layers, config.vocab_size, config.hidden_size, config.intermediate_size = 1, 512, 64, 128
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
        config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    return config


def figures(seconds: Sequence[float], vocabulary: int) -> dict[str, Any]:
    """Seconds of each step, and tokens of the data per second in the median step after the first; peak memory."""
    tokens = [sum(len(prompt) + len(reply) for prompt, reply in rows_of(n, vocabulary)) for n in range(len(seconds))]
    later = [t / s for t, s in zip(tokens[1:], seconds[1:], strict=True)]
    return {
        "seconds": list(seconds),
        "first_seconds": seconds[0],
        "tokens_per_second": statistics.median(later) if later else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def add(path: Path, result: dict[str, Any]) -> None:
    """Puts one more result into the file, and prints it."""
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.write_text(json.dumps([*results, result], indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "versions"}, indent=1))
