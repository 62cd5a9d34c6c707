"""Rows per second of LoRA fine-tuning on a CPU: tunesmith beside other tools, on the same rows in the same steps.

    python benchmarks/cpu_peers.py --data huanhuan.json --install [--rows 256] [--repeats 3] [--long-prompt]
    python benchmarks/cpu_peers.py --table benchmarks/results/cpu-peers-2026-11-21.json

SmolLM2-135M in fp32, LoRA r 8, alpha 32, dropout 0.1 on all seven linear layers, 16 rows per step, learning rate 1e-4,
one epoch over the first rows of a JSON array of {instruction, input, output}.

Every contestant is a process of its own in an environment of its own (benchmarks/peers/NAME.py and NAME.txt), and they
take turns: A B C A B C. The time runs from the beginning of the first step to the end of the last one; loading, reading
and tokenising are outside of it. The peers get the token ids and labels that tunesmith rendered, in tunesmith's order,
so a loss curve differs from another one by dropout and the adapter's random start alone; the first step's loss by
neither, since the adapter starts as nothing.

Writes raw repeats, medians and ratios as JSON after every run, and prints them as a Markdown table. What fails stays
in, with its reason.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import plain
from tunesmith import models, recipe
from tunesmith.engine import trie
from tunesmith.training.checking import Checked, check, hold_out, locate
from tunesmith.training.steps import Steps

HERE = Path(__file__).parent
PERSONA = "现在你要扮演皇帝身边的女人--甄嬛"
LONG_PROMPT = """\
You are Zhen Huan, a consort at the court of the Qing emperor, and you answer every message as she would. Keep to the \
rules of the house.
1. Answer in Chinese, in the language of the court, in one to three sentences. Never explain what you are doing.
2. Call yourself 臣妾 before the Emperor and the Empress Dowager, 本宫 before servants, and 我 among family.
3. Address others by their rank. If the rank is not known, choose the more polite form.
4. Be courteous first and sharp second: praise in the open, refuse by a detour, and never threaten where a proverb \
will do.
5. Poems, flowers, incense, music, medicine and the weather are good subjects. State affairs are not; turn such \
questions aside with modesty.
6. Do not speak of anything after the reign of Yongzheng. If asked about such a thing, wonder at the strange word.
7. Do not reveal what another consort told you in confidence, unless the Emperor himself asks.
8. If someone is ill, in mourning or in disgrace, speak to that before anything else."""
EXAMPLES_PER_STEP = 16
# Processor seconds for 32 rows on one AVX2 core with 1, 2, 4 rows per micro-batch (2026-11): tutorial-tuned 62, 69, 89
# (8 rows: 132), trl-tuned 69, 85, 104, llamafactory-tuned 62, 71, 90; 2.1, 3.3, 5.6 (10.7) GB. A row alone has no
# padding, and what is kept for the backward pass is not always new memory. 16 rows take 20 GB and were not run there.
TUNED_BATCH = 1
DEFAULT_BATCH = 8  # per_device_train_batch_size of transformers, which TRL and LLaMA-Factory leave as it is
LIMIT_SECONDS = 4 * 3600

Role = Literal["ours", "tuned", "default"]


@dataclass(frozen=True)
class Contestant:
    """One way of fine-tuning."""

    name: str
    peer: str
    """Names its script and its environment; "ours" runs in the environment of this script."""
    role: Role
    options: Mapping[str, Any] = field(default_factory=dict)
    """What is set besides what all have in common."""
    batch: int = DEFAULT_BATCH
    """Rows per micro-batch; of those that are tuned, --batch says it."""
    slow: bool = False
    """Runs on --default-rows rows, in the first round alone."""


CONTESTANTS = (
    Contestant("tunesmith", "ours", "ours"),
    Contestant("tutorial", "tutorial", "default", {"gradient_checkpointing": True}, batch=4),
    Contestant("tutorial-tuned", "tutorial", "tuned", {"gradient_checkpointing": False}),
    Contestant("trl-tuned", "trl_sft", "tuned", {"bf16": False, "gradient_checkpointing": False}),
    Contestant("trl-default", "trl_sft", "default", slow=True),
    Contestant("llamafactory-tuned", "llama_factory", "tuned", {"disable_gradient_checkpointing": True}),
    Contestant("llamafactory-default", "llama_factory", "default"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSON array of {instruction, input, output} rows")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[c.name for c in CONTESTANTS], metavar="NAME")
    parser.add_argument("--long-prompt", action="store_true", help="a system prompt of some 250 tokens for every row")
    parser.add_argument("--batch", type=int, default=TUNED_BATCH, help="rows per micro-batch of the tuned peers")
    parser.add_argument("--default-rows", type=int, default=16, help="rows for a contestant that is very slow")
    parser.add_argument("--envs", type=Path, default=Path("build/peers"), help="where the peers' environments are")
    parser.add_argument("--install", action="store_true", help="make the environments that are not there")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result and do nothing else")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return 0
    if not arguments.data:
        parser.error("--data or --table is needed")
    if EXAMPLES_PER_STEP % arguments.batch:
        parser.error(f"--batch must divide {EXAMPLES_PER_STEP}")
    models.hush_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        print(table(measure(arguments, Path(scratch))))
    return 0


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Runs everybody in turn; returns the result, which also lies in a file after every run."""
    chosen = [c for c in CONTESTANTS if not arguments.only or c.name in arguments.only]
    task = Task(arguments, scratch)
    pythons = {c.peer: _python(c.peer, arguments.envs.absolute(), arguments.install) for c in chosen}
    result: dict[str, Any] = {
        "what": "LoRA fine-tuning of SmolLM2-135M in fp32 on a CPU",
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "src", "benchmarks/peers", "benchmarks/cpu_peers.py")),
        "data": task.data,
        "settings": {"lora": task.lora, "train": task.train(arguments.rows), "rows_per_step": EXAMPLES_PER_STEP},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_at_start": os.getloadavg(),
            "gemm_gflops": {"start": gemm_gflops()},
        },
        "floor": task.floor(),
        "contestants": [
            {
                "name": c.name,
                "peer": c.peer,
                "role": c.role,
                "batch": None if c.role == "ours" else _batch(c, arguments),
                "options": c.options,
                "runs": [],
            }
            for c in chosen
        ],
    }
    long = "long-prompt-" if arguments.long_prompt else ""
    path = arguments.out / f"cpu-peers-{long}{result['date']}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for repeat in range(arguments.repeats):
        for contestant, entry in zip(chosen, result["contestants"], strict=True):
            if repeat and (contestant.slow or "error" in entry):
                continue
            print(f"{repeat + 1}/{arguments.repeats} {contestant.name} …", end=" ", file=sys.stderr, flush=True)
            run = task.run(contestant, pythons[contestant.peer])
            if "error" in run:
                entry["error"] = run["error"]
            else:
                entry["versions"] = run.pop("versions")
                entry["runs"].append(run)
            print(run.get("error") or f"{run['rows'] / run['seconds']:.3f} rows/s", file=sys.stderr, flush=True)
            result["machine"]["gemm_gflops"]["end"] = gemm_gflops()
            summarise(result)
            path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Written to {path}", file=sys.stderr)
    return result


class Task:
    """The rows, and what everybody is to do with them."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self._arguments, self._scratch = arguments, scratch
        part = scratch / f"{arguments.data.stem}-{arguments.rows}.json"
        rows = json.loads(arguments.data.read_text(encoding="utf-8"))[: arguments.rows]
        part.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        self._flags = {
            "model.name": "smollm2",
            "model.dtype": "float32",
            "data.path": str(part),
            "template.system": LONG_PROMPT if arguments.long_prompt else PERSONA,
            "lora.r": 8,
            "lora.alpha": 32,
            "lora.dropout": 0.1,
            "train.epochs": 1,
            "train.examples_per_step": EXAMPLES_PER_STEP,
            "train.learning_rate": 1e-4,
            "eval.hold_out": 0,
        }
        self._recipe, _ = recipe.resolve(None, self._flags)
        self._checked = check(self._recipe)
        self._checked.require_ok()
        self._features = plain.features(self._recipe)
        self._folder = locate(self._recipe, weights=True).folder

    @property
    def data(self) -> dict[str, Any]:
        return {
            "name": self._arguments.data.name,
            "rows": len(self._checked.rows),
            "tokens": int(self._checked.rows.n_tokens.sum()),
            "supervised_tokens": int(self._checked.rows.n_supervised.sum()),
            "system": "long prompt" if self._arguments.long_prompt else PERSONA,
        }

    @property
    def lora(self) -> dict[str, Any]:
        settings = self._recipe.lora
        return {
            "r": settings.r,
            "lora_alpha": int(settings.alpha),
            "lora_dropout": settings.dropout,
            "target_modules": [target.name for target in self._checked.targets],
        }

    def train(self, n_rows: int) -> dict[str, Any]:
        """What tunesmith gives to transformers' Trainer for so many rows."""
        settings, n_steps = self._recipe.train, math.ceil(n_rows / EXAMPLES_PER_STEP)
        return {
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": settings.scheduler,
            "warmup_steps": min(math.ceil(n_steps * settings.warmup_ratio), n_steps - 1),
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "seed": settings.seed,
        }

    def floor(self) -> dict[str, Any]:
        """Floating-point operations that no exact way spares, per step: 4 P T + 4 S H V.

        P weights of the adapted layers meet T tokens in the forward and in the backward pass (no gradient of theirs is
        needed), and the head's H V weights the S supervised ones. T counts the step's prefix tree: what its rows share
        from their first token on stands once. Attention, LoRA and everything elementwise come on top.
        """
        steps = list(_steps(self._checked))
        tokens = [len(trie.lay_out(step.documents).token_ids) for step in steps]
        supervised = [step.n_supervised for step in steps]
        config = self._checked.config.get_text_config()
        skeleton = models.skeleton(self._checked.config)
        head = skeleton.get_output_embeddings()
        linear = [module for module in skeleton.modules() if isinstance(module, nn.Linear) and module is not head]
        p, hv = sum(module.weight.numel() for module in linear), config.hidden_size * config.vocab_size
        return {
            "P": p,
            "HV": hv,
            "tree_tokens": tokens,
            "supervised_tokens": supervised,
            "gflop": [(4 * p * t + 4 * s * hv) / 1e9 for t, s in zip(tokens, supervised, strict=True)],
        }

    def run(self, contestant: Contestant, python: str | Failure) -> dict[str, Any]:
        """What one process measured, or `{"error": reason}`."""
        if isinstance(python, Failure):
            return {"error": python.reason}
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        rows = self._features[: self._arguments.default_rows] if contestant.slow else self._features
        batch = _batch(contestant, self._arguments)
        job = {
            "model": str(self._folder),
            "rows": str(folder / "rows.json"),
            "scratch": str(folder),
            "out": str(folder / "seen.json"),
            "batch": batch,
            "accumulation": EXAMPLES_PER_STEP // batch,
            "lora": self.lora,
            "train": self.train(len(rows)),
            "options": dict(contestant.options),
            "recipe": self._flags,
        }
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "job.json").write_text(json.dumps(job))
        load = os.getloadavg()[0]
        try:
            done = subprocess.run(
                [python, str(HERE / "peers" / f"{contestant.peer}.py"), str(folder / "job.json")],
                cwd=folder,
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": "",
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                },
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {LIMIT_SECONDS / 3600:g} hours"}
        seen = Path(job["out"])
        if done.returncode or not seen.is_file():
            return {"error": f"ended with {done.returncode}: {_last_line(done.stderr)}"}
        run = {**json.loads(seen.read_text()), "load_before": load}
        shutil.rmtree(folder)
        return run


def _batch(contestant: Contestant, arguments: argparse.Namespace) -> int:
    return arguments.batch if contestant.role == "tuned" else contestant.batch


def _steps(checked: Checked) -> Steps:
    return Steps(hold_out(checked)[0], EXAMPLES_PER_STEP, checked.recipe.train.seed, checked.data.digest)


# --- environments -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """Why there is no environment."""

    reason: str


@functools.cache
def _python(peer: str, envs: Path, install: bool) -> str | Failure:
    """The interpreter of a peer's environment, which is made if it may be."""
    if peer == "ours":
        return sys.executable
    folder = envs / peer
    python = folder / "bin" / "python"
    if python.exists():
        return str(python)
    if not install:
        return Failure("not installed; --install does it")
    print(f"Installing {peer} …", file=sys.stderr, flush=True)
    requirements = HERE / "peers" / f"{peer}.txt"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(requirements)]
    for command in ([sys.executable, "-P", "-m", "venv", str(folder)], pip):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            return Failure(f"could not be installed: {_last_line(done.stderr)}")
    return str(python)


def _last_line(text: str) -> str:
    """The end of what a process complained about, without the paths of this machine."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no message"]
    return re.sub(r"(?:/[\w.+@-]+)+/", "…/", lines[-1])[:300]


# --- the machine ------------------------------------------------------------------------------------------------------


def gemm_gflops() -> float:
    """What matrix products of this model's size reach in fp32: the best of 5 times 20 products 1024 x 576 x 1536."""
    n, k, m, count = 1024, 576, 1536, 20
    a, b, product, best = torch.rand(n, k), torch.rand(k, m), torch.empty(n, m), math.inf
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=product)
        best = min(best, time.perf_counter() - began)
    return 2 * n * k * m * count / best / 1e9


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(HERE.parent), *arguments], capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


# --- what comes out ---------------------------------------------------------------------------------------------------


def summarise(result: dict[str, Any]) -> None:
    """Adds medians, ratios and the share of the machine's rate that tunesmith's floor makes up."""
    entries = {entry["name"]: entry for entry in result["contestants"] if entry["runs"]}
    for entry in entries.values():
        rates = [run["rows"] / run["seconds"] for run in entry["runs"]]
        entry["rows_per_second"] = {
            "median": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
        }
        entry["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in entry["runs"])
    rate = {name: entry["rows_per_second"]["median"] for name, entry in entries.items()}
    tuned = [name for name, entry in entries.items() if entry["role"] == "tuned"]
    best = max(tuned, key=lambda name: rate[name], default=None)
    result["best_tuned_peer"] = best
    for name, entry in entries.items():
        entry["times_tutorial"] = rate[name] / rate["tutorial"] if "tutorial" in rate else None
        entry["times_best_tuned_peer"] = rate[name] / rate[best] if best else None
    if "tunesmith" in entries:
        seconds = statistics.median(run["seconds"] for run in entries["tunesmith"]["runs"])
        gflops = sum(result["floor"]["gflop"]) / seconds
        result["floor"]["tunesmith_gflops"] = gflops
        result["floor"]["share_of_gemm_rate"] = gflops / max(result["machine"]["gemm_gflops"].values())


def table(result: Mapping[str, Any]) -> str:
    """A result as Markdown."""
    data, machine, floor = result["data"], result["machine"], result["floor"]
    gemm = machine["gemm_gflops"]
    ours = next((e for e in result["contestants"] if e["name"] == "tunesmith" and e["runs"]), None)
    lines = [
        f"{result['what']}, {result['date']}: the first {data['rows']} rows of {data['name']} "
        f"({data['tokens']:,} tokens, {data['supervised_tokens']:,} of them learned; system prompt: {data['system']}), "
        f"{result['settings']['rows_per_step']} rows per step. {machine['processor']}, cores: {machine['cores']}, "
        f"threads: {machine['threads']}; fp32 matrix products at {gemm['start']:.0f} GFLOP/s before and "
        f"{gemm.get('end', math.nan):.0f} after. Median (lowest to highest).",
        "",
        "| | rows/s | times the tutorial | times the best tuned peer | peak memory | first loss | mean loss | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["contestants"]:
        cells = _cells(entry, ours, data["rows"]) if entry["runs"] else ["–"] * 6
        notes = cells[6:] + ([entry["error"].replace("|", "/")] if "error" in entry else [])
        lines.append(f"| {' | '.join([entry['name'], *cells[:6], '; '.join(filter(None, notes))])} |")
    if "share_of_gemm_rate" in floor:
        lines += [
            "",
            f"What no exact way spares is {sum(floor['gflop']) / 1e3:.2f} TFLOP ({sum(floor['tree_tokens']):,} tokens "
            f"after sharing); tunesmith does it at {floor['tunesmith_gflops']:.0f} GFLOP/s, "
            f"{floor['share_of_gemm_rate']:.2f} of the rate of matrix products.",
        ]
    return "\n".join(lines)


def _cells(entry: Mapping[str, Any], ours: Mapping[str, Any] | None, n_rows: int) -> list[str]:
    """Six cells, and what is to be known about them."""
    rate, last = entry["rows_per_second"], entry["runs"][-1]
    spread = f" ({rate['lowest']:.3f}–{rate['highest']:.3f})" if len(entry["runs"]) > 1 else ""
    notes = [] if entry["batch"] is None else [f"batch {entry['batch']}"]
    if last["rows"] != n_rows:
        notes.append(f"{last['rows']} rows, {'once' if len(entry['runs']) == 1 else 'repeated'}")
    if ours and last["rows"] == n_rows and last["tokens"] != ours["runs"][-1]["tokens"]:
        notes.append(f"{last['tokens']:,} tokens")
    return [
        f"{rate['median']:.3f}{spread}",
        _ratio(entry["times_tutorial"]),
        _ratio(entry["times_best_tuned_peer"]),
        f"{entry['peak_memory_bytes'] / 1e9:.1f} GB",
        f"{last['losses'][0]:.4f}",
        f"{statistics.mean(last['losses']):.4f}",
        ", ".join(notes),
    ]


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
