"""Steps of a full-size model with random weights, built on the device from its config: tunesmith beside plain
transformers + peft.

    python benchmarks/gpu/step.py --model phi-3-mini --config CONFIG.json --out results.json [--nf4] [--tiny]

A run first compares gradients (tree against padded, in the device's type), then times: median of the steps after the
first, the first by itself, tokens of the data per second, peak memory of the allocator, and the share of the device's
measured rate of bf16 products that the floor 4PT + 4SHV reaches. Contestants that run out of memory stay in.
`--tiny` shrinks the model so that the script can be tried without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedConfig
from work import ROWS, STEPS, add, figures, read_config, rows_of

from tunesmith import model as models
from tunesmith.engine import liger
from tunesmith.engine.batch import pad
from tunesmith.engine.step import Engine, summed_loss
from tunesmith.engine.trie import lay_out
from tunesmith.recipe import EngineSettings, LoraSettings
from tunesmith.types import Origin, Rendered


def documents(step: int, vocabulary: int) -> list[Rendered]:
    """Rows of one step."""
    return [
        Rendered((*prompt, *reply), ((len(prompt), len(prompt) + len(reply)),), Origin("random", number))
        for number, (prompt, reply) in enumerate(rows_of(step, vocabulary))
    ]


def built(config: PreTrainedConfig, dtype: torch.dtype, nf4: bool) -> PeftModel:
    """The model with random weights and an adapter that is not the identity."""
    torch.manual_seed(0)
    with torch.device(models.device()):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    base.requires_grad_(False)
    if nf4:
        quantised(base)
    tuned = models.attach(base, LoraSettings(dropout=0.0), 0, "random")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return tuned.train()


def quantised(base: torch.nn.Module) -> None:
    """Replaces the linear layers of the decoder by 4-bit ones."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # pyright: ignore[reportMissingImports]

    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                replaced = Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, torch.bfloat16, quant_type="nf4"
                )
                replaced.weight = Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(parent, name, replaced.to(models.device()))


def plain_step(model: PeftModel, rows: Sequence[Rendered]) -> None:
    """Padded rows, four at a time, longest with longest; all logits of predicting positions at once."""
    n = sum(row.n_supervised for row in rows)
    ordered = sorted(rows, key=lambda row: len(row.token_ids), reverse=True)
    for start in range(0, len(ordered), 4):
        (summed_loss(model, pad(ordered[start : start + 4], models.device())) / n).backward()


def timed(step: Callable[[Sequence[Rendered]], Any], model: PeftModel, vocabulary: int) -> dict[str, Any]:
    """What the steps took; what went wrong where the memory ran out."""
    device, seconds, failed = models.device(), [], {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        for number in range(STEPS):
            rows = documents(number, vocabulary)
            began = time.perf_counter()
            step(rows)
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as error:
        failed = {"failed": str(error).splitlines()[0]}
    return {**(figures(seconds, vocabulary) if seconds else {"seconds": []}), **failed}


def gradient(step: Callable[[Sequence[Rendered]], Any], model: PeftModel, rows: Sequence[Rendered]) -> torch.Tensor:
    model.zero_grad()
    step(rows)
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of 4096 x 4096 matrices; the best of five."""
    size = 4096 if torch.cuda.is_available() else 512
    a, b = (torch.randn(size, size, dtype=dtype, device=models.device()) for _ in range(2))
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = max(best, 20 * size**3 / (time.perf_counter() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="name in the result")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    models.hush_libraries()
    config = read_config(arguments.config, tiny=arguments.tiny)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    notes: list[str] = []
    model = built(config, dtype, arguments.nf4)
    engine = Engine(model, EngineSettings(self_check=False), notes.append)

    def ours(rows: Sequence[Rendered]) -> None:
        engine.gradient(rows, sum(row.n_supervised for row in rows))

    few = documents(99, config.vocab_size)[:4]
    expected = gradient(lambda rows: plain_step(model, rows), model, few)
    difference = float((gradient(ours, model, few) - expected).norm() / expected.norm())
    rate = product_rate(dtype)
    result: dict[str, Any] = {
        "model": arguments.model, "contestant": "ours and plain", "nf4": arguments.nf4, "tiny": arguments.tiny,
        "way": engine.way, "liger": liger.version(models.device()), "notes": notes, "gradient_difference": difference,
        "product_rate": rate, "rows_per_step": ROWS, "ours": timed(ours, model, config.vocab_size),
    }  # fmt: skip
    rows = documents(1, config.vocab_size)
    frozen = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "lora_" not in n)
    head = config.hidden_size * config.vocab_size
    floor = 4 * frozen * len(lay_out(rows).token_ids) + 4 * head * sum(row.n_supervised for row in rows)
    if not arguments.nf4 and result["ours"].get("tokens_per_second"):
        result["share_of_product_rate"] = floor / statistics.median(result["ours"]["seconds"][1:]) / rate
    result["plain"] = timed(lambda rows: plain_step(model, rows), model, config.vocab_size)
    model.get_base_model().activation_checkpointing_enable()
    result["plain_recomputed"] = timed(lambda rows: plain_step(model, rows), model, config.vocab_size)
    result["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft", "tunesmith")}
    add(arguments.out, result)


if __name__ == "__main__":
    main()
