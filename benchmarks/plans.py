"""Peak memory as the plan says it beside what a training took, on a CPU.

    python benchmarks/plans.py --data huanhuan.json [--only NAME ...]

SmolLM2-135M and a random Qwen3 of 200 million numbers with its tokenizer; short and long rows, sharing on and off,
recomputation on and off, small micro-batches, weights of 16 bits. Every row is a process of its own: `tunesmith train`
on a few steps, which plans first and measures its resident set in the end. Writes JSON and prints a table; with --only
some are measured again, in the file of the same day.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tunesmith import hub
from tunesmith.models import prepared

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Setting:
    """One training."""

    name: str
    model: str
    rows: str
    sets: dict[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting("SmolLM2, short rows", "smollm2", "short"),
    Setting("SmolLM2, short rows, no sharing", "smollm2", "short", {"engine.share_prefix": False}),
    Setting("SmolLM2, short rows, all recomputed", "smollm2", "short", {"engine.recompute_layers": "all"}),
    Setting("SmolLM2, short rows, 256 tokens at once", "smollm2", "short", {"engine.tokens_per_micro_batch": 256}),
    Setting("SmolLM2, long rows", "smollm2", "long"),
    Setting("SmolLM2, long rows, all recomputed", "smollm2", "long", {"engine.recompute_layers": "all"}),
    Setting("SmolLM2, long rows, 4096 tokens at once", "smollm2", "long", {"engine.tokens_per_micro_batch": 4096}),
    Setting("SmolLM2, short rows, r 64, no dropout", "smollm2", "short", {"lora.r": 64, "lora.dropout": 0}),
    Setting("SmolLM2, short rows, bfloat16", "smollm2", "short", {"model.dtype": "bfloat16"}),
    Setting("Qwen3, short rows", "qwen3", "short"),
    Setting("Qwen3, long rows", "qwen3", "long"),
    Setting("Qwen3, long rows, half recomputed", "qwen3", "long", {"engine.recompute_layers": 6}),
    Setting("Qwen3, long rows, no sharing", "qwen3", "long", {"engine.share_prefix": False}),
)
SYSTEM = "现在你要扮演皇帝身边的女人--甄嬛"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON array of {instruction, input, output} rows")
    parser.add_argument("--only", nargs="+", help="words that a setting's name must hold one of")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = {"short": folder / "short.json", "long": folder / "long.json"}
        write_rows(arguments.data, **rows)
        models = {"smollm2": "smollm2"}
        chosen = [s for s in SETTINGS if not arguments.only or any(word in s.name for word in arguments.only)]
        if any(setting.model == "qwen3" for setting in chosen):
            models["qwen3"] = str(save_qwen3(folder / "qwen3"))
        for number, setting in enumerate(chosen):
            found.append(measure(setting, models[setting.model], rows[setting.rows], folder / str(number)))
            print(line(found[-1]), file=sys.stderr, flush=True)
    result = {
        "what": "peak resident set of a training as planned and as measured",
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__},
        "settings": found,
        "worst": max(abs(each["planned"] / each["measured"] - 1) for each in found),
    }
    path = arguments.out / f"plans-{result['date']}.json"
    if arguments.only and path.exists():
        again = {each["name"]: each for each in found}
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        result["settings"] = found = [again.get(each["name"], each) for each in before]
        result["worst"] = max(abs(each["planned"] / each["measured"] - 1) for each in found)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("| setting | planned, MiB | measured, MiB | planned / measured |\n|---|---|---|---|")
    print("\n".join(map(line, found)))
    print(f"worst: {result['worst']:.1%}")
    return 0


def line(each: dict[str, Any]) -> str:
    ratio = each["planned"] / each["measured"]
    return f"| {each['name']} | {each['planned'] / 2**20:,.0f} | {each['measured'] / 2**20:,.0f} | {ratio:.3f} |"


def measure(setting: Setting, model: str, data: Path, out: Path) -> dict[str, Any]:
    sets = {
        "model.dtype": "float32",
        "template.system": SYSTEM,
        "train.epochs": 1,
        "eval.hold_out": 0,
        "engine.tokens_per_micro_batch": 1024,
        "engine.recompute_layers": "none",
        **setting.sets,
    }
    flags = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    command = [
        sys.executable,
        "-P",
        "-m",
        "tunesmith",
        "train",
        "--model",
        model,
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    done = subprocess.run([*command, *flags, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    plan = json.loads((out / "manifest.json").read_text())["plan"]
    told = json.loads(done.stdout)
    return {
        "name": setting.name,
        "sets": sets,
        "planned": plan["peak_memory_bytes"],
        "measured": told["peak_memory_bytes"],
        "parts": plan["parts"],
        "planned_seconds": plan["seconds"],
        "measured_seconds": told["seconds"],
    }


def write_rows(data: Path, short: Path, long: Path) -> None:
    """32 rows as they are, and 8 that each join fifteen replies."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    chance = random.Random(0)
    short.write_text(json.dumps(rows[:32], ensure_ascii=False), encoding="utf-8")
    joined = [{**rows[n], "output": " ".join(row["output"] for row in chance.sample(rows, 15))} for n in range(8)]
    long.write_text(json.dumps(joined, ensure_ascii=False), encoding="utf-8")


def save_qwen3(folder: Path, **other: int) -> Path:
    """A random Qwen3 with SmolLM2's tokenizer; `other` are settings of its config."""
    base = prepared(hub.locate("smollm2")).folder
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        **other,
    }
    config = AutoConfig.for_model(
        "qwen3", vocab_size=49152, max_position_embeddings=4096, tie_word_embeddings=True, **sizes
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
