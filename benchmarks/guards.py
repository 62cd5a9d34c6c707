"""What guards and digests cost: seconds spent inside of them beside the seconds of the steps they watch.

    python benchmarks/guards.py --data huanhuan.json [--rows 96]

SmolLM2-135M in fp32, one epoch of the first rows in steps of 16, a checkpoint at every third step. Every function that
a run would do without if nobody watched is timed from outside: the state kept for doing a step again, the looks at
gradients and adapters, the loss that looks wrong, finite numbers before saving, digests and bringing files to disk.
Writes JSON and prints the ratio (steps + guards) / steps.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from tunesmith import recipe
from tunesmith.engine import step
from tunesmith.models import hush_libraries
from tunesmith.runs import rundir
from tunesmith.training import guards
from tunesmith.training.run import train
from tunesmith.training.trainer import StepTrainer

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    hush_libraries()
    seconds: dict[str, float] = defaultdict(float)
    for owner, name in (
        (step, "_random_state"),
        (step, "_copy"),
        (guards, "require_gradients"),
        (guards, "signatures"),
        (guards, "require_moved"),
        (guards.Losses, "odd"),
        (rundir, "sha256"),
        (rundir, "_sync"),
    ):
        time_calls(owner, name, seconds)
    saving: dict[str, float] = defaultdict(float)
    time_calls(StepTrainer, "save_point", saving)
    with tempfile.TemporaryDirectory() as scratch:
        rows = json.loads(arguments.data.read_text(encoding="utf-8"))[: arguments.rows]
        data = Path(scratch) / "rows.json"
        data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        flags = {
            "model.name": "smollm2",
            "model.dtype": "float32",
            "data.path": str(data),
            "train.epochs": 1,
            "train.save_every": "3 steps",
            "eval.hold_out": 0,
        }
        run = train(recipe.resolve(None, flags)[0], Path(scratch) / "run")
        lines = rundir.read_lines(run.path / "metrics.jsonl")
    of_steps = sum(line["seconds"] for line in lines)
    result = {
        "what": "seconds inside of guards and digests beside those of the steps",
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__},
        "steps": len(lines),
        "step_seconds": of_steps,
        "guard_seconds": dict(seconds),
        "checkpoint_seconds": saving["save_point"],
        "ratio": (of_steps + sum(seconds.values())) / of_steps,
    }
    (arguments.out / f"guards-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


def time_calls(owner: Any, name: str, seconds: dict[str, float]) -> None:
    """Adds up the seconds of all calls."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            seconds[name] += time.perf_counter() - began

    setattr(owner, name, timed)


if __name__ == "__main__":
    raise SystemExit(main())
