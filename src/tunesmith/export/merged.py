"""Weights that plain transformers opens: written, opened again, compared."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith import model_files, models, places, reading
from tunesmith.export import merging
from tunesmith.export.live import Answers, Compared, at_least, at_most, logits_of
from tunesmith.export.merging import Merged
from tunesmith.language import marked, said
from tunesmith.models import pretrained
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.training import adapter_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Bounds:
    """What weights rounded to a type may differ by; the logits of a small model span about 30."""

    logit: float
    same_token: float
    same_reply: float


_COARSENESS = (torch.float32, torch.float16, torch.bfloat16)
_BOUNDS = {
    torch.float32: _Bounds(1e-3, 0.99, 0.9),
    torch.float16: _Bounds(0.25, 0.97, 0.6),
    torch.bfloat16: _Bounds(2.0, 0.9, 0.2),
}


@models.quietly()
def write_merged(
    merged: Merged, run: RunDir, folder: Path, dtype: torch.dtype | None, live: Answers, tell: Callable[[str], None]
) -> list[Compared]:
    kept = dtype or merged.dtype
    merging.write(merged, folder, dtype)
    config = places.stripped(model_files.settings(merged.base / "config.json"))
    config.pop("torch_dtype", None)
    rundir.write_json(folder / "config.json", {**config, "dtype": str(kept).removeprefix("torch.")})
    for path in run.adapter.iterdir():
        if path.name in adapter_files.known_names(merged=True):
            reading.copy(path, folder / path.name)
    card = (run.adapter / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(_merged_card(card), encoding="utf-8")
    tell(said("Opening them with plain transformers …"))
    tokenizer = pretrained.tokenizer(folder)
    model: Any = pretrained.causal_lm(folder, dtype=live.dtype)
    model.to(models.device()).eval()
    generation = pretrained.generation(
        folder, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=live.reply_tokens
    )
    same_prompts = sum(
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) == ids
        for text, ids in zip(live.texts, live.prompts, strict=True)
    )
    largest, same_tokens, n_tokens, same_replies = 0.0, 0, 0, 0
    asked = zip(live.prompts, live.replies, live.logits, strict=True)
    for number, (prompt, reply, expected) in enumerate(asked, 1):
        tell(said("Asking plain transformers: question {number} of {n} …", number=number, n=len(live.prompts)))
        logits = logits_of(model, prompt, reply)
        apart = (logits - expected).abs().max()
        largest = float(np.maximum(largest, float(apart)))  # NaN if one is; Python's max passes over it
        same_tokens += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        n_tokens += len(reply)
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)
        same_replies += tuple(written[0, len(prompt) :].tolist()) == reply
    bounds = _BOUNDS[max(kept, live.dtype, key=_COARSENESS.index)]  # what is computed in bfloat16 differs by as much
    n = len(live.prompts)
    return [
        at_least(marked("same token ids of prompts"), same_prompts / n, 1),
        at_least(marked("same stop ids"), float(sorted(generation.eos_token_id) == sorted(live.stop_ids)), 1),
        at_most(marked("largest difference of a logit"), largest, bounds.logit),
        at_least(marked("same most likely tokens"), same_tokens / n_tokens, bounds.same_token),
        at_least(marked("same greedy replies"), same_replies / n, bounds.same_reply),
    ]


def _merged_card(card: str) -> str:
    """The adapter's card for weights that hold it."""
    card = re.sub(r"    python load_and_chat\.py .*\n\n", "", card)
    return (
        card.replace("library_name: peft", "library_name: transformers")
        .replace("# Adapter for", "# Merged from an adapter for")
        .replace("A LoRA adapter in peft's format, trained", "A base with a LoRA adapter added to its weights, trained")
    )
