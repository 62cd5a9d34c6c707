"""A file of very many rows: rows rendered a second, memory while rendering and while training, and how soon a second
run takes its first step.

    python benchmarks/large_data.py --data huanhuan.json [--rows 1000000] [--steps 4]

The rows of the file are written again and again, numbered in their instruction so that no two are the same. `check` is
run on them with an empty cache, then `train` twice, each stopped by SIGTERM after some steps; all are processes of
their own. SmolLM2-135M in fp32, steps of 16 rows. Memory is that of the process and of those it started, looked at
twenty times a second: `own` is what only they hold (it can not be given back without being written somewhere), `mapped`
what they see of files. Seconds are told until all is ready, which the loss on the held-out rows is measured behind, and
until the first step began and was done. Writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from tunesmith import hub, models
from tunesmith.runs import rundir

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = models.prepared(hub.locate("smollm2")).folder
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = folder / "rows.jsonl"
        write_rows(json.loads(arguments.data.read_text(encoding="utf-8")), arguments.rows, data)
        environment = {**os.environ, "TUNESMITH_CACHE": str(folder / "cache"), "TUNESMITH_OFFLINE": "1"}
        given = ["--model", str(model), "--data", str(data), "--set", "model.dtype=float32", "--json"]
        result = {
            "what": "a large file: rendering, and training on it",
            "date": datetime.date.today().isoformat(),
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__},
            "rows": arguments.rows,
            "file_bytes": data.stat().st_size,
            "check": watched(["check", *given], environment),
        }
        result["check"]["rows_per_second"] = arguments.rows / result["check"]["seconds"]
        kept = [path for path in (folder / "cache" / "rendered").rglob("*") if path.is_file()]
        result["rendered_bytes"] = sum(path.stat().st_size for path in kept)
        # A check that finds everything rendered: what reading and looking for repeats takes.
        result["check_again"] = watched(["check", *given], environment)
        for name in ("train", "train_again"):
            run = folder / name
            result[name] = watched(["train", *given, "--out", str(run)], environment, run, arguments.steps)
    (arguments.out / f"large-data-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def write_rows(rows: list[dict[str, str]], count: int, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            file.write(json.dumps({**row, "instruction": f"{number}. {row['instruction']}"}, ensure_ascii=False) + "\n")


def watched(command: list[str], environment: dict[str, str], run: Path | None = None, steps: int = 0) -> dict[str, Any]:
    """Seconds and peak memory of a command; with `run` it is stopped after so many steps."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tunesmith", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    of_process = psutil.Process(process.pid)
    seen: dict[str, Any] = {"peak_own_bytes": 0, "peak_mapped_bytes": 0}
    lines: list[dict[str, Any]] = []
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            own = mapped = 0
            for each in (of_process, *of_process.children(recursive=True)):
                memory = each.memory_info()
                own, mapped = own + memory.rss - memory.shared, mapped + memory.shared
            seen["peak_own_bytes"] = max(seen["peak_own_bytes"], own)
            seen["peak_mapped_bytes"] = max(seen["peak_mapped_bytes"], mapped)
        if run is not None and "ready_after" not in seen and n_steps(run):
            seen["ready_after"] = time.monotonic() - began
        if run is not None and len(lines) < steps:
            before, lines = len(lines), rundir.read_lines(run / "metrics.jsonl")
            if lines and not before:
                seen["first_step_done_after"] = time.monotonic() - began
                seen["first_step_began_after"] = seen["first_step_done_after"] - lines[0]["seconds"]
            if len(lines) >= steps:
                process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    seen["seconds"] = time.monotonic() - began
    seen["exit_code"] = process.returncode
    if process.returncode != (130 if run is not None else 0):
        print(process.stderr.read() if process.stderr else "", file=sys.stderr)
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    if run is not None:
        seen["step_seconds"] = [line["seconds"] for line in lines]
    return seen


def n_steps(run: Path) -> int:
    """What a run has told of itself: 0 until its model is ready."""
    state = run / "state.json"
    return json.loads(state.read_text(encoding="utf-8"))["n_steps"] if state.exists() else 0


if __name__ == "__main__":
    raise SystemExit(main())
