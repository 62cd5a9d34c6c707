"""Two processes beside one, on a CPU over gloo: how far their losses are apart, and how soon one ends when the other is
killed.

    python benchmarks/ranks.py

The tiny random model of the tests, 80 rows, 20 steps; once with adapters added up, once with the base sharded by FSDP2.
The second process is killed behind step 3. Writes JSON.
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

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import save_tiny_model, tunesmith
from test_ranks import arguments, losses, processes, write_sums

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
            codes = [p.wait(240) for p in processes([command] * 2, folder, ACCELERATE_USE_FSDP=str(sharded))]
            assert codes == [0, 0], (folder / "0.log").read_text()
            apart[name] = float(np.max([abs(a - b) for a, b in zip(losses(run), alone, strict=True)]))
        result = {
            "what": "two processes beside one: how far losses are apart; seconds until both end if one is killed",
            "date": datetime.date.today().isoformat(),
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__},
            "steps": len(alone),
            "largest_loss": max(alone),
            "largest_difference": apart,
            "seconds_after_kill": seconds_after_kill(model, data, folder),
        }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"ranks-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


def seconds_after_kill(model: Path, data: Path, folder: Path) -> float:
    run = folder / "killed"
    first, second = processes([arguments(model, data, run, "train.epochs=4000")] * 2, folder)
    while not (run / "metrics.jsonl").is_file() or len(losses(run)) <= 3:
        assert first.poll() is None, (folder / "0.log").read_text()
        time.sleep(0.1)
    second.send_signal(signal.SIGKILL)
    second.wait()
    began = time.monotonic()
    first.wait(60)
    return time.monotonic() - began


if __name__ == "__main__":
    raise SystemExit(main())
