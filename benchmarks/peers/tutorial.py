"""What the notebooks do: transformers' Trainer, peft, DataCollatorForSeq2Seq; padded rows, logits of every position.

With gradient checkpointing it is their recipe, without it the tuned one.
"""

from __future__ import annotations

import torch
from measure import Stopwatch, read_job, read_rows, training_arguments, write
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments


def main() -> None:
    job = read_job()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, trust_remote_code=False)
    if job["options"]["gradient_checkpointing"]:
        model.enable_input_require_grads()
    torch.manual_seed(job["train"]["seed"])
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **job["lora"]))
    stopwatch = Stopwatch()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(train_sampling_strategy="sequential", **training_arguments(job)),
        train_dataset=read_rows(job),
        data_collator=DataCollatorForSeq2Seq(
            AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False), padding=True
        ),
        callbacks=[stopwatch],
    )
    trainer.train()
    write(job, stopwatch.seen())


if __name__ == "__main__":
    main()
