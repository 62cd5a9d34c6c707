"""What the plan chooses for models on cards of some sizes, beside what a step of that very setting takes.

    python benchmarks/cards.py --models FOLDER --data FILE [--sizes 8 12 16 24]

FOLDER has a folder for each model, with config and tokenizer. No card is needed: the engine's step is taken on tensors
without numbers (tests/step_on_card.py), of as many tokens as are planned for. Weights of 4 bits need bitsandbytes here.
Writes JSON and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunesmith.engine.hf import liger
from tunesmith.recipe import resolve
from tunesmith.training import planning
from tunesmith.training.checking import check

HERE = Path(__file__).parent
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--names", nargs="+", help="folders in it; else all")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 12, 16, 24])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    found = []
    for folder in sorted(path.parent for path in arguments.models.glob("*/config.json")):
        if arguments.names and folder.name not in arguments.names:
            continue
        flags = {
            "model.name": str(folder), "data.path": str(arguments.data), "data.allow_set_aside": True,
            "train.examples_per_step": 512,  # so that every micro-batch is as large as it may be
        }  # fmt: skip
        rows = check(resolve(None, flags)[0])
        for gib, made in planning.fitting(rows, arguments.sizes):
            found.append(
                {"model": folder.name, "gib": gib, **beside(folder, made, liger.computes(rows.config, "cuda"))}
            )
            print(line(found[-1]), flush=True)
    result = {"what": "plans for cards beside a step without one", "date": str(datetime.date.today()), "rows": found}
    path = arguments.out / f"plans-for-cards-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


def beside(folder: Path, made: planning.Plan, with_liger: bool) -> dict[str, Any]:
    """The plan, and the bytes of a step of its setting, weights and optimizer included."""
    chosen, parts = made.chosen, made.parts
    row: dict[str, Any] = {
        "fits": made.fits, "planned": made.peak_memory_bytes, "free": made.machine.available_bytes,
        "parts": asdict(parts), "nf4": chosen.get("model.quantize") == "nf4",
        "tokens": chosen["engine.tokens_per_micro_batch"], "recomputed": chosen["engine.recompute_layers"],
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    asked = {"config": config, "tokens": row["tokens"], "recomputed": row["recomputed"], "nf4": row["nf4"]}
    step = ran({**asked, "liger": with_liger})
    if "failed" in step:
        return {**row, **step}
    others = parts.optimizer + parts.runtime
    return {**row, "step": step["held"] + step["peak"] + others, "off": step["planned"] / step["peak"] - 1}


def ran(asked: dict[str, Any]) -> dict[str, Any]:
    script = HERE.parent / "tests" / "step_on_card.py"
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(asked)], capture_output=True, text=True, cwd=cache, check=False
        )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def line(row: dict[str, Any]) -> str:
    step = f"{row['step'] / GIB:.1f}, {row['off']:+.1%}" if "step" in row else row["failed"]
    how = f"{row['tokens']} tokens, {row['recomputed']} layers again" + (", 4 bits" if row["nf4"] else "")
    free, planned = row["free"] / GIB, row["planned"] / GIB
    return f"| {row['model']} | {row['gib']} | {free:.1f} | {planned:.1f} | {row['fits']} | {how} | {step} |"


if __name__ == "__main__":
    main()
