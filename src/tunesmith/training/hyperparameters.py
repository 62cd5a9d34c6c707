"""What `auto` is in the settings that decide how well a model learns and how much it keeps: a page of arithmetic.

* Few rows a step: LoRA learns worse from large batches (Schulman et al. 2025, "LoRA Without Regret",
  https://thinkingmachines.ai/blog/lora), and few rows make few steps as it is.
* As many epochs as make some sixty steps: with fewer the answers are not learned, with more the rest is forgotten.
  Rows that teach a few tokens each, as labels do, want twice as many.
* A learning rate that falls with the model's width, by the power that the same authors give for Llama's family
  (tinker-cookbook, `hyperparam_utils.py`); the constant in front of it was found here, with SmolLM2 (width 576). With
  alpha as it is the best rate hardly depends on the rank.
* A share of rehearsal (`rehearsed`).

What was tried stands in docs/log.md, and can be tried again with `benchmarks/defaults.py`. Other widths than 576 and
more than two hundred rows were not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from tunesmith.data.rows import Rows
from tunesmith.language import counted, said
from tunesmith.recipe import Recipe

RATE, AT_WIDTH, NARROWER = 4e-4, 2000, 0.78
"""A learning rate, the width of model that it is for, and the power by which a narrower model takes a higher one."""
STEPS = 60
"""About so many where an epoch has fewer, as long as no row is seen more than `MOST_EPOCHS` times."""
FEW_TOKENS = 8
"""Of which a row teaches fewer on average, twice the steps are taken."""
LEAST_EPOCHS, MOST_EPOCHS = 2, 10
REHEARSE = 0.3
"""Of the learned tokens."""


@dataclass(frozen=True)
class Chosen:
    """A setting that was left open."""

    setting: str
    value: Any
    why: str


def chosen(recipe: Recipe, config: PreTrainedConfig, training: Rows) -> Iterator[Chosen]:
    """What the recipe leaves open of how it trains, by the model and the rows that are trained on."""
    settings, n_rows = recipe.train, len(training)
    size = settings.examples_per_step
    if size == "auto":
        size = 8 if n_rows < 2000 else 16
        yield Chosen("train.examples_per_step", size, said("for {n:,} rows", n=n_rows))
    if settings.epochs == "auto":
        steps = math.ceil(n_rows / size)
        few = int(training.n_supervised.sum()) < FEW_TOKENS * n_rows
        epochs = min(max(LEAST_EPOCHS, round((2 if few else 1) * STEPS / steps)), MOST_EPOCHS)
        why = counted("{n:,} step an epoch", "{n:,} steps an epoch", steps)
        why += said(", and short answers") if few else ""
        yield Chosen("train.epochs", epochs, why)
    if settings.learning_rate == "auto":
        width = int(config.get_text_config().hidden_size)
        rate = float(f"{RATE * (AT_WIDTH / width) ** NARROWER:.1e}")
        yield Chosen("train.learning_rate", rate, said("for a model of width {width:,}", width=width))
    if settings.rehearse == "auto":
        yield Chosen("train.rehearse", REHEARSE, said("so that nothing is forgotten"))
