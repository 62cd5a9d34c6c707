"""Does `eval` tell a good training from two bad ones? SmolLM2 on the shipped persona, measured on the same rows.

    python benchmarks/verdicts.py [--keep FOLDER]

Three trainings with settings as they are by default: as the rows are; with the answers dealt out anew among the
questions; and on a quarter of the rows for forty epochs. Each is measured on 40 rows that none of them was given.
Writes JSON and prints the verdicts as a Markdown table. With --keep the trainings stay in a folder, and those that are
there are not done again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from tunesmith import recipe
from tunesmith.cli import demo
from tunesmith.evaluation.evaluate import Evaluation, evaluate
from tunesmith.models import hush_libraries
from tunesmith.training.run import train

HERE = Path(__file__).parent
N_TEST = 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    hush_libraries()
    chance = random.Random(0)
    text = (demo.PERSONA / "hester.en.jsonl").read_text(encoding="utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if "output" in row]
    chance.shuffle(rows)
    test, rows = rows[:N_TEST], rows[N_TEST:]
    answers = [row["output"] for row in rows]
    chance.shuffle(answers)
    dealt = [{**row, "output": answer} for row, answer in zip(rows, answers, strict=True)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        held_out = write(folder / "test.jsonl", test)
        for name, data, epochs in (
            ("as the rows are", rows, 2),
            ("answers dealt out anew", dealt, 2),
            ("a quarter of the rows, forty epochs", rows[: len(rows) // 4], 40),
        ):
            path = write(folder / f"{len(found)}.jsonl", data)
            flags = {"model.name": "smollm2", "data.path": str(path), "train.epochs": epochs, "eval.hold_out": 0}
            settings, sources = recipe.resolve(None, flags)
            run = folder / f"run-{len(found)}"
            if not (run / "adapter").is_dir():
                train(settings, run, sources=sources)
            found[name] = {"rows": len(data), "epochs": epochs, **figures(evaluate(run, held_out))}
            print(name, json.dumps(found[name]), flush=True)
    result = {
        "what": "the verdict on three trainings",
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__},
        "test_rows": N_TEST,
        "trainings": found,
    }
    (arguments.out / f"verdicts-{result['date']}.json").write_text(
        json.dumps(result, indent=1) + "\n", encoding="utf-8"
    )
    print("| training | loss | listening | likeness | copied | general | verdict |\n|---|---|---|---|---|---|---|")
    for name, one in found.items():
        pairs = [
            f"{one['base'][key]:{form}} → {one['tuned'][key]:{form}}"
            for key, form in (
                ("loss", ".2f"),
                ("listening", ".2f"),
                ("likeness", ".2f"),
                ("copied", ".0%"),
                ("general", ""),
            )
        ]
        print(f"| {name} | {' | '.join(pairs)} | {one['sentence']} |")
    return 0


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def figures(evaluation: Evaluation) -> dict[str, Any]:
    fields = evaluation.as_dict()
    return {key: fields[key] for key in ("base", "tuned", "change_interval", "short", "kept", "verdict", "sentence")}


if __name__ == "__main__":
    raise SystemExit(main())
