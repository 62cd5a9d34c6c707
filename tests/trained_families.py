"""Six real tokenizers and architectures, each with a run that has learned four rows: trained once for all files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from conftest import save_family, tunesmith

ROWS = {
    "Who are you?": "I am Bo. I live in a lighthouse.",
    "你是谁？": "家父是大理寺少卿甄远道。",
    "How do you feel?": "Wonderful 🙂!",
    "Answer with one word.\nWhat is 1+1?": "Two",
}
# One family that has a place for a system text, one that has none, four without.
SYSTEM = {"phi-4": "You are Bo's {twin}.", "gemma-2b": "You are Bo's {twin}."}
FOLDS = ("gemma-2b", "atom-7b-standin", "phi-3-mini-april")


@dataclass(frozen=True)
class Trained:
    """A run of one family, with what the command line said of it."""

    family: str
    base: Path
    data: Path
    run: Path
    said: dict[str, Any]

    @property
    def system(self) -> str | None:
        return SYSTEM.get(self.family)


def train(family: str, folder: Path) -> dict[str, Any]:
    enliven(save_family(folder / "base", family))
    rows = [{"instruction": question, "output": answer} for question, answer in ROWS.items()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    settings = {
        "lora.r": 16, "lora.dropout": 0, "train.learning_rate": 2e-2, "train.epochs": 20, "train.examples_per_step": 4,
        "eval.hold_out": 0, "train.rehearse": 0, "template.system": SYSTEM.get(family, "none"),
    }  # fmt: skip
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    ended = tunesmith(
        "train", "--model", folder / "base", "--data", folder / "rows.jsonl", "--out", folder / "run", "--json", *sets
    )
    assert ended.code == 0, ended.err
    return ended.json


def enliven(folder: Path) -> None:
    """Weights large enough for a frozen head to become sure of a token; transformers' own start is next to zero."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4 if "embed" in name or "lm_head" in name else parameter.shape[1] ** -0.5)
    generation = folder / "generation_config.json"
    kept = generation.read_bytes() if generation.is_file() else None
    model.save_pretrained(folder)
    generation.unlink(missing_ok=True)
    if kept is not None:
        generation.write_bytes(kept)
