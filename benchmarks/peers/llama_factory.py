"""LLaMA-Factory through the function that its command line calls, on rows that are tokenised already.

Its own template for this model writes the same text, but learns the line break behind the reply too; token ids
(`tokenized_path`) make the task the same. The number type is its own choice: fp32, since the weights are and no mixed
precision is asked for. It pads to a multiple of eight, and has other versions of transformers and peft beside it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from datasets import Dataset
from measure import Stopwatch, read_job, read_rows, training_arguments, write


def main() -> None:
    job = read_job()
    folder = Path(job["scratch"]) / "rows"
    Dataset.from_list(read_rows(job)).save_to_disk(folder)
    # LLaMA-Factory imports torchaudio before it knows whether there is any sound; see llama_factory.txt.
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
    from llamafactory.train.tuner import run_exp

    stopwatch = Stopwatch()
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job["model"],
        "finetuning_type": "lora",
        "lora_rank": job["lora"]["r"],
        "lora_alpha": job["lora"]["lora_alpha"],
        "lora_dropout": job["lora"]["lora_dropout"],
        "lora_target": ",".join(job["lora"]["target_modules"]),
        "template": "smollm2",
        "dataset": "rows",  # must be named; what lies in tokenized_path is read instead
        "tokenized_path": str(folder),
        "disable_shuffling": True,
        **training_arguments(job),
        "output_dir": str(Path(job["scratch"]) / "out"),
    }
    run_exp(arguments, callbacks=[stopwatch])
    write(job, stopwatch.seen())


if __name__ == "__main__":
    main()
