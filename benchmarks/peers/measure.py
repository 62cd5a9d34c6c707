"""What every contestant does alike: it reads its job, times its steps and writes what it saw.

A peer's script is started by `cpu_peers.py`, in the peer's own environment, with the path of a job (JSON) alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

IGNORED = -100
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "trl", "llamafactory", "tunesmith")

Job = dict[str, Any]


def read_job() -> Job:
    """The job that the command line names."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def read_rows(job: Job) -> list[dict[str, list[int]]]:
    """The rows as `input_ids`, `attention_mask` and `labels`, in the order in which they are trained on."""
    return json.loads(Path(job["rows"]).read_text(encoding="utf-8"))


def training_arguments(job: Job) -> dict[str, Any]:
    """Arguments that TrainingArguments and all that is made from it understand, the contestant's own ones last."""
    return {
        "output_dir": job["scratch"],
        "num_train_epochs": 1,
        "per_device_train_batch_size": job["batch"],
        "gradient_accumulation_steps": job["accumulation"],
        **job["train"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **job["options"],
    }


class Stopwatch(TrainerCallback):
    """From the beginning of the first step to the end of the last one; counts what is trained on, notes the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.step_seconds: list[float] = []
        self.counts: dict[str, int] = {}
        self._began = self._ended = self._step_began = 0.0
        self._cpu_began = self._cpu_ended = 0.0
        self._peak_bytes = 0

    def on_train_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
        rows = list(train_dataloader.dataset)
        self.counts = {
            "rows": len(rows),
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "supervised_tokens": sum(label != IGNORED for row in rows for label in row["labels"]),
        }

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._step_began = time.monotonic()
        if not self.step_seconds:
            self._began, self._cpu_began = self._step_began, time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._ended, self._cpu_ended = time.monotonic(), time.process_time()
        self.step_seconds.append(self._ended - self._step_began)
        self._peak_bytes = peak_memory_bytes()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "grad_norm" in logs:
            self.losses.append(float(logs["loss"]))
            self.grad_norms.append(float(logs["grad_norm"]))

    def seen(self) -> dict[str, Any]:
        """What was measured, for `write`."""
        return {
            **self.counts,
            "steps": len(self.step_seconds),
            "seconds": self._ended - self._began,
            "cpu_seconds": self._cpu_ended - self._cpu_began,
            "peak_memory_bytes": self._peak_bytes,
            "losses": self.losses,
            "grad_norms": self.grad_norms,
            "step_seconds": self.step_seconds,
        }


def peak_memory_bytes() -> int:
    """The most memory that the process had so far (resident set)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def write(job: Job, seen: dict[str, Any]) -> None:
    """Hands the measurements back, with the versions of what ran."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    seen = {**seen, "threads": torch.get_num_threads(), "versions": versions}
    Path(job["out"]).write_text(json.dumps(seen), encoding="utf-8")
