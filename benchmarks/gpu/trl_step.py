"""Steps of TRL's SFTTrainer on the same random model and rows as `step.py`, tuned: no recomputation, bf16 weights.

    python benchmarks/gpu/trl_step.py --model phi-3-mini --config CONFIG.json --out results.json [--liger] [--tiny]

Padding-free where FlashAttention is installed, which alone TRL allows it for; else padded batches with SDPA, and the
result says so. `--liger` switches on Liger's kernels. Where the memory runs out the row stays in, with the message.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]
from work import LORA, ROWS, STEPS, add, figures, read_config, rows_of

IGNORED = -100


class Clock(TrainerCallback):
    """Seconds of each step, the device's work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(_now() - self._began)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """The rows are tokens already; TRL asks for a tokenizer all the same, for its padding."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name in the result")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--batch", type=int, default=8, help="rows at once")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    config = read_config(arguments.config, tiny=arguments.tiny)
    cuda = torch.cuda.is_available()
    flash = cuda and importlib.util.find_spec("flash_attn") is not None
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation="flash_attention_2" if flash else "sdpa",
            trust_remote_code=False,
        )
    every = [
        {"input_ids": prompt + reply, "labels": [IGNORED] * len(prompt) + reply}
        for step in range(STEPS)
        for prompt, reply in rows_of(step, config.vocab_size)
    ]
    clock = Clock()
    result: dict[str, Any] = {
        "model": arguments.model,
        "contestant": "trl-liger" if arguments.liger else "trl",
        "tiny": arguments.tiny,
        "padding_free": flash,
        "rows_at_once": arguments.batch,
    }
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=STEPS,
                per_device_train_batch_size=arguments.batch,
                gradient_accumulation_steps=ROWS // arguments.batch,
                train_sampling_strategy="sequential",
                gradient_checkpointing=False,
                bf16=cuda,
                use_cpu=not cuda,
                padding_free=flash,
                use_liger_kernel=arguments.liger,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(every),
            processing_class=_no_tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
            callbacks=[clock],
        )
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            result["failed"] = str(error).splitlines()[0]
    if clock.seconds:
        result.update(figures(clock.seconds, config.vocab_size))
    result["versions"] = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "peft", "trl", "liger_kernel", "flash_attn")
        if importlib.util.find_spec(name) is not None
    }
    add(arguments.out, result)


if __name__ == "__main__":
    main()
