"""Peak memory of `tunesmith export --to merged` against the size of the model.

    python benchmarks/merging.py [--only NAME ...]

SmolLM2-135M and random Qwen3 models of 185 and 410 million numbers with its tokenizer, in fp32. A run of two rows is
trained for each; the export, which asks the live adapter, writes, reopens and compares, is a process of its own. What
the interpreter with its libraries takes by itself is measured in the same way and given beside it. Writes JSON and
prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from plans import save_qwen3

HERE = Path(__file__).parent
SMOLLM2 = "SmolLM2-135M"
WIDER = {"Qwen3, 0.2 billion": {}, "Qwen3, 0.4 billion": {"hidden_size": 1536, "num_hidden_layers": 20}}
# The last line of standard output is the peak of the only child.
MEASURED = (
    "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(done.returncode)"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="words that a model's name must hold one of")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    names = [name for name in (SMOLLM2, *WIDER) if not arguments.only or any(word in name for word in arguments.only)]
    found: list[dict[str, Any]] = []
    interpreter = peak_bytes([sys.executable, "-P", "-c", "import tunesmith.cli, tunesmith.export, transformers, peft"])
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            found.append(measure(name, Path(scratch), interpreter))
        print(line(found[-1]), file=sys.stderr, flush=True)
    result = {
        "what": "peak resident set of a merged export against the model's size in fp32",
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__},
        "interpreter_bytes": interpreter,
        "models": found,
    }
    path = arguments.out / f"merging-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("| model | its weights, MiB | peak, MiB | peak / weights | without the interpreter |\n|---|---|---|---|---|")
    print("\n".join(map(line, found)))
    return 0


def line(each: dict[str, Any]) -> str:
    size, peak = each["model_bytes"], each["peak_bytes"]
    own = (peak - each["interpreter_bytes"]) / size
    return f"| {each['name']} | {size / 2**20:,.0f} | {peak / 2**20:,.0f} | {peak / size:.2f} | {own:.2f} |"


def measure(name: str, folder: Path, interpreter: int) -> dict[str, Any]:
    model = "smollm2" if name == SMOLLM2 else str(save_qwen3(folder / "base", **WIDER[name]))
    rows = [{"instruction": f"What is {word}?", "output": f"It is {word}."} for word in ("water", "fire")]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    sets = {"train.epochs": 1, "eval.hold_out": 0, "train.learning_rate": 1e-3}
    flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    tunesmith = [sys.executable, "-P", "-m", "tunesmith"]
    train = [*tunesmith, "train", "--model", model, "--data", str(folder / "rows.json"), "--out", str(folder / "run")]
    subprocess.run([*train, *flags, "--json"], stdout=subprocess.DEVNULL, check=True)
    export = [*tunesmith, "export", str(folder / "run"), "--to", "merged", "--dtype", "float32", "--json"]
    peak = peak_bytes(export)
    written = sum(path.stat().st_size for path in (folder / "run" / "merged").glob("*.safetensors"))
    checks = json.loads((folder / "run" / "merged" / "export.json").read_text(encoding="utf-8"))["checks"]
    return {
        "name": name,
        "model_bytes": written,
        "peak_bytes": peak,
        "interpreter_bytes": interpreter,
        "checks": {check["name"]: check["value"] for check in checks},
    }


def peak_bytes(command: list[str]) -> int:
    """Of the resident set of a process, its mapped files with it."""
    done = subprocess.run([sys.executable, "-P", "-c", MEASURED, *command], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    raise SystemExit(main())
