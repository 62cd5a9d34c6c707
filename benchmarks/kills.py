"""A training is killed at random moments and goes on; its end is compared with that of one that never was killed.

    python benchmarks/kills.py [--kills 20] [--signals 5]

A random two-layer model, 60 steps, dropout 0.1, a checkpoint at every second step, so that many kills fall into one
being written. Each kill -9 is a run of its own: train, kill, resume, compare bytes. SIGTERM and SIGINT likewise, whose
exit code must be 130. Writes JSON; exits with 1 unless all are equal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import save_tiny_model, start
from small_runs import flags_of, numbers

HERE = Path(__file__).parent
FLAGS = {
    "lora.dropout": 0.1,
    "train.epochs": 6,
    "train.save_every": "2 steps",
    "eval.every": "7 steps",
    "eval.hold_out": 0.1,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signals", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = save_tiny_model(folder / "model")
        data = folder / "rows.jsonl"
        rows = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i % 13 + 1)))} for i in range(44)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["train", *flags_of(model, data, **FLAGS), "--out"]
        whole = folder / "whole"
        finish(start(*command, whole))
        found: list[dict[str, Any]] = []
        kinds = [signal.SIGKILL] * arguments.kills + [signal.SIGTERM, signal.SIGINT] * arguments.signals
        for number, kind in enumerate(kinds):
            run = folder / "run"
            process = start(*command, run)
            metrics = run / "metrics.jsonl"
            after = chance.randrange(1, 58)
            while count_lines(metrics) < after and process.poll() is None:
                time.sleep(0.001)
            time.sleep(chance.random() * 0.05)  # a step with its checkpoint takes about as long
            partial = bool(list(run.glob("checkpoints/.*")))
            process.send_signal(kind)
            process.communicate()
            steps = count_lines(metrics)
            code = process.returncode
            finish(start("resume", run, "--json"))
            same = same_bytes(run, whole) and numbers(run) == numbers(whole)
            right_code = code == (-signal.SIGKILL if kind == signal.SIGKILL else 130)
            same = same and right_code
            found.append(
                {"signal": kind.name, "after_steps": steps, "while_saving": partial, "exit": code, "same": same}
            )
            print(f"{number + 1}/{len(kinds)} {found[-1]}", file=sys.stderr, flush=True)
            shutil.rmtree(run)
    result = {
        "what": "trainings killed at random moments, resumed, and compared with one undisturbed",
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__},
        "steps": 60,
        "same": sum(each["same"] for each in found),
        "of": len(found),
        "kills": found,
    }
    path = arguments.out / f"kills-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['same']} of {result['of']} the same; written to {path}")
    return 0 if result["same"] == result["of"] else 1


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)


def same_bytes(run: Path, other: Path) -> bool:
    name = "adapter/adapter_model.safetensors"
    return (run / name).read_bytes() == (other / name).read_bytes()


if __name__ == "__main__":
    raise SystemExit(main())
