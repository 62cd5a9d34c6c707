"""The truth that training is compared with: plain transformers Trainer + peft + DataCollatorForSeq2Seq.

Tests and benchmarks share it. Only which rows make up a step is taken from tunesmith.
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from tunesmith.models import targets
from tunesmith.recipe import Recipe
from tunesmith.training.checking import check, hold_out, locate
from tunesmith.training.steps import Steps

IGNORED = -100


def features(recipe: Recipe) -> list[dict[str, list[int]]]:
    """The recipe's rows in the order of its steps, padded by nobody yet."""
    checked = check(recipe)
    steps = Steps(hold_out(checked)[0], recipe.train.examples_per_step, recipe.train.seed, checked.data.digest)
    rows = [steps.dataset[i] for epoch in range(recipe.train.epochs) for i in steps.order(epoch)]
    return [
        {
            "input_ids": list(document.token_ids),
            "attention_mask": [1] * len(document.token_ids),
            "labels": [
                token if learned else IGNORED
                for token, learned in zip(document.token_ids, document.supervised, strict=True)
            ],
        }
        for row in rows
        for document in row.documents
    ]


def train_plainly(recipe: Recipe, rows_at_once: int | None = None) -> tuple[list[float], PeftModel]:
    """The loss of every step, and the trained model. Rows must fill whole steps (the epochs are laid end to end).

    A step's rows are computed `rows_at_once` (all of them by default) and accumulated.
    """
    rows = features(recipe)
    folder, settings = locate(recipe, weights=True).folder, recipe.train
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = [target.name for target in targets(base, recipe.lora)]
    torch.manual_seed(settings.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora.r,
        lora_alpha=int(recipe.lora.alpha),
        lora_dropout=recipe.lora.dropout,
        target_modules=names,
    )
    model = get_peft_model(base, lora)
    assert isinstance(model, PeftModel)
    losses: list[float] = []

    class Plain(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return range(len(rows))

        def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
            if "grad_norm" in logs:
                losses.append(logs["loss"])

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=rows_at_once or settings.examples_per_step,
            gradient_accumulation_steps=settings.examples_per_step // (rows_at_once or settings.examples_per_step),
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.scheduler,
            warmup_steps=math.ceil(math.ceil(len(rows) / settings.examples_per_step) * settings.warmup_ratio),
            max_grad_norm=settings.max_grad_norm,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=settings.seed,
            dataloader_pin_memory=False,
        )
        # Pads with the tokenizer's pad token, which in SmolLM2 is the stop token: labels are blanked by position.
        collator = DataCollatorForSeq2Seq(check(recipe).renderer.template.tokenizer, padding=True)
        trainer = Plain(model=model, args=arguments, train_dataset=rows, data_collator=collator)  # type: ignore[arg-type]
        trainer.train()
    return losses, model
