"""TRL's SFTTrainer on rows that are tokenised already; `labels` leave the reply alone to be learned.

The model is given by its path, as TRL's own examples do, so TRL loads it (in fp32). Left at their defaults, SFTConfig
switches on bf16 autocast, on a CPU too, and gradient checkpointing. Neither contestant is padding-free: TRL allows that
for FlashAttention alone, which there is none of for a CPU.
"""

from __future__ import annotations

from datasets import Dataset
from measure import Stopwatch, read_job, read_rows, training_arguments, write
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    job = read_job()
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in read_rows(job)]
    stopwatch = Stopwatch()
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(train_sampling_strategy="sequential", **training_arguments(job)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **job["lora"]),
        callbacks=[stopwatch],
    )
    trainer.train()
    write(job, stopwatch.seen())


if __name__ == "__main__":
    main()
