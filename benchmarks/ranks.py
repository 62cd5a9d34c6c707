"""Two processes beside one, on a CPU over gloo: how far their losses are apart, also where the clock of one of them
runs 200 times as fast, and how soon one ends when the other is killed.

    python benchmarks/ranks.py

The tiny random model of the tests, 80 rows, 20 steps; once with adapters added up, once with the base sharded by FSDP2.
With a fast clock 200 steps that are measured and saved every minute of process 0. The second process is killed after
step 3. Writes JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import save_tiny_model, tunesmith
from test_ranks import FAST_CLOCK, arguments, losses, processes, write_sums
from tunesmith.runs import rundir

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, data = save_tiny_model(folder / "model"), write_sums(folder / "sums.jsonl")
        assert tunesmith(*arguments(model, data, folder / "alone")).code == 0
        alone = losses(folder / "alone")
        apart = {}
        for name, sharded in (("added up", False), ("FSDP2", True)):
            run = folder / name.replace(" ", "-")
            command = arguments(model, data, run, "engine.tokens_per_micro_batch=100")
            codes = [p.wait(1800) for p in processes([command] * 2, folder, ACCELERATE_USE_FSDP=str(sharded))]
            assert codes == [0, 0], (folder / "0.log").read_text()
            apart[name] = float(np.max([abs(a - b) for a, b in zip(losses(run), alone, strict=True)]))
        result = {
            "what": "two processes beside one: how far losses are apart; seconds until both end if one is killed",
            "date": datetime.date.today().isoformat(),
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__},
            "steps": len(alone),
            "largest_loss": max(alone),
            "largest_difference": apart,
            "clock_200_times_as_fast": {
                f"in process {fast}": with_fast_clock(model, data, folder, fast) for fast in (1, 0)
            },
            "seconds_after_kill": seconds_after_kill(model, data, folder),
        }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"ranks-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


def with_fast_clock(model: Path, data: Path, folder: Path, fast: int) -> dict[str, Any]:
    """Against one process without it."""
    settings = ("train.epochs=20", "eval.every=1 minutes", "train.save_every=1 minutes")
    plain, run = folder / "plain", folder / f"fast-{fast}"
    if not plain.exists():
        assert tunesmith(*arguments(model, data, plain, *settings)).code == 0
    command = arguments(model, data, run, *settings)
    started = processes([command] * 2, folder, FAST_CLOCK, FAST_RANK=str(fast), FAST="200")
    codes = [process.wait(1800) for process in started]
    ours, expected = losses(run), losses(plain)
    return {
        "exit_codes": codes,
        "steps": [len(ours), len(expected)],
        "measured_after": [line["step"] for line in rundir.read_lines(run / "held_out.jsonl")],
        "largest_difference": float(np.max([abs(a - b) for a, b in zip(ours, expected, strict=False)])),
        "said": [(folder / f"{rank}.log").read_text()[-400:] for rank, code in enumerate(codes) if code],
    }


def seconds_after_kill(model: Path, data: Path, folder: Path) -> float:
    run = folder / "killed"
    first, second = processes([arguments(model, data, run, "train.epochs=4000")] * 2, folder)
    while not (run / "metrics.jsonl").is_file() or len(losses(run)) <= 3:
        assert first.poll() is None, (folder / "0.log").read_text()
        time.sleep(0.1)
    second.send_signal(signal.SIGKILL)
    second.wait()
    began = time.monotonic()
    first.wait(300)
    return time.monotonic() - began


if __name__ == "__main__":
    raise SystemExit(main())
