"""How a step's time grows: with the rows of a step, their length, and the share that they have in common.

    python benchmarks/cost.py [--model smollm2] [--repeats 3] [--out benchmarks/results]
    python benchmarks/cost.py --plot benchmarks/results/cpu-cost-2026-11-21.json

Rows are random tokens of given lengths; half of what a row does not share is learned. Writes a JSON with every repeat,
and beside it an SVG with a plot per question. Each point is the median; time per token must not jump.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith import hub
from tunesmith import models as model
from tunesmith.engine.step import Engine
from tunesmith.engine.trie import lay_out
from tunesmith.recipe import EngineSettings, LoraSettings, ModelSettings
from tunesmith.types import Origin, Rendered

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
LONG_ENOUGH = 40.0  # seconds, after which a point is not repeated
SHARES = (0, 20, 40, 60, 80, 90, 95)  # percent of a row


def documents(n_rows: int, length: int, share_percent: int, vocabulary: int) -> list[Rendered]:
    """Rows of `length` tokens whose first `share_percent` are the same."""
    draw = random.Random(f"{n_rows} {length} {share_percent}")
    shared = [draw.randrange(vocabulary) for _ in range(max(1, length * share_percent // 100))]
    made = []
    for row in range(n_rows):
        own = [draw.randrange(vocabulary) for _ in range(length - len(shared))]
        start = length - max(1, len(own) // 2)
        made.append(Rendered((*shared, *own), ((start, length),), Origin("random", row)))
    return made


def seconds(engine: Engine, step: Sequence[Rendered]) -> float:
    """Of one step."""
    began = time.perf_counter()
    engine.gradient(step, sum(document.n_supervised for document in step))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(engine: Engine, vocabulary: int, repeats: int) -> list[dict[str, Any]]:
    """A point per line of the three questions, with its raw seconds."""
    points = [("rows", n, documents(n, 128, 40, vocabulary)) for n in ROWS]
    points += [("length", n, documents(max(1, 4096 // n), n, 0, vocabulary)) for n in LENGTHS]
    points += [("share", percent, documents(16, 256, percent, vocabulary)) for percent in SHARES]
    results = []
    for question, value, step in points:
        seconds(engine, step[:2])
        raw = [seconds(engine, step)]
        while len(raw) < repeats and sum(raw) < LONG_ENOUGH:
            raw.append(seconds(engine, step))
        tokens = sum(len(document.token_ids) for document in step)
        results.append(
            {
                "question": question,
                "value": value,
                "rows": len(step),
                "tokens": tokens,
                "tree_tokens": len(lay_out(step).token_ids),
                "seconds": raw,
                "milliseconds_per_token": 1000 * statistics.median(raw) / tokens,
            }
        )
        per_token = results[-1]["milliseconds_per_token"]
        print(f"{question:7} {value:5}  {statistics.median(raw):8.3f} s  {per_token:6.3f} ms/token", flush=True)
    return results


def plot(result: dict[str, Any], path: Path) -> None:
    """The three questions side by side."""
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    labels = {"rows": "rows per step", "length": "tokens per row", "share": "shared by all rows (%)"}
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (question, label) in zip(axes, labels.items(), strict=True):
        points = [point for point in result["points"] if point["question"] == question]
        axis.plot([p["value"] for p in points], [p["milliseconds_per_token"] for p in points], marker="o")
        if question != "share":
            axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
        axis.set_ylabel("ms per token of the data")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--plot", type=Path, help="only draw this result again")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads(arguments.plot.read_text()), arguments.plot.with_suffix(".svg"))
        return
    model.hush_libraries()
    base = model.load_base(model.prepared(hub.locate(arguments.model)), ModelSettings())
    tuned = model.attach(base, LoraSettings(), 0, arguments.model).train()
    engine = Engine(tuned, EngineSettings(), print)
    load_before = os.getloadavg()
    result = {
        "what": f"{arguments.model}, LoRA r 8 on all linear layers, dropout 0.1, random tokens",
        "way": engine.way,
        "points": measure(engine, base.config.vocab_size, arguments.repeats),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "tunesmith")},
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": load_before,
        },
        "date": datetime.date.today().isoformat(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    path = arguments.out / f"{kind}-cost-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
