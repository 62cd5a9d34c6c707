"""Step losses of tunesmith beside those of plain Trainer + peft + DataCollatorForSeq2Seq, same rows per step.

    python benchmarks/parity.py --data huanhuan.json [--rows 500] [--out benchmarks/results]

Writes a JSON with both curves and their largest difference; exits 1 when that is not below 1e-3.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from plain import train_plainly
from tunesmith import recipe
from tunesmith.models import hush_libraries
from tunesmith.runs import rundir
from tunesmith.training.run import train

BOUND = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    hush_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / f"{arguments.data.stem}-{arguments.rows}.json"
        rows = json.loads(arguments.data.read_text(encoding="utf-8"))[: arguments.rows]
        part.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        flags = {
            "model.name": arguments.model,
            "data.path": str(part),
            "train.epochs": 1,
            "lora.dropout": 0.0,
            "eval.hold_out": 0,
        }
        settings, sources = recipe.resolve(None, flags)
        run = train(settings, Path(scratch) / "run", sources=sources)
        if run.interrupted:
            return 130
        ours = [line["loss"] for line in rundir.read_lines(run.path / "metrics.jsonl")]
        plain, _ = train_plainly(settings, rows_at_once=4)  # sixteen take 20 GB
    worst = float(np.max([abs(a - b) for a, b in zip(ours, plain, strict=True)]))
    result = {
        "what": f"{arguments.model}, {arguments.rows} rows of {arguments.data.name}, 1 epoch, dropout 0, fp32",
        "rows_per_step": settings.train.examples_per_step,
        "largest_difference": worst,
        "bound": BOUND,
        "ours": ours,
        "plain": plain,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "tunesmith")},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "date": datetime.date.today().isoformat(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"cpu-parity-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(ours)} steps, largest difference {worst:.2e} (bound {BOUND:g}); {path}")
    return 0 if worst < BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
