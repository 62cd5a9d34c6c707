"""The sections of what is measured on a card; `run.py` starts one by name, in a process of its own.

What is found is written after each row of a section, so that a section that is ended leaves what it had.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from work import CUDA, DTYPE, attempted, built, config_of, n_tokens, rows_of, timed, wait

from tunesmith import machines, models
from tunesmith.engine import attention, flex, trie
from tunesmith.engine.attention import Style
from tunesmith.engine.batch import pad
from tunesmith.engine.hf import liger
from tunesmith.engine.hf.losses import summed_loss
from tunesmith.engine.step import Engine
from tunesmith.recipe import EngineSettings, LoraSettings, Recipe
from tunesmith.training import planning
from tunesmith.training.planning import Choice
from tunesmith.types import Rendered

Found = dict[str, Any]
SECONDS_AT_MOST = 45
"""That a subprocess of the line gets to do one thing; attention is compiled in the training."""
_SMALL_CARD = 24 << 30


# --- the card ---------------------------------------------------------------------------------------------------------


def machine(found: Found, *, tiny: bool) -> None:
    """Rates of products, copies and launches, and what a context takes before anything is computed."""
    size = 512 if tiny else 8192
    found["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["shared_memory"] = flex.shared_memory(torch.device("cuda"))
        free, whole = torch.cuda.mem_get_info()
        torch.ones(64, 64, device="cuda", dtype=DTYPE) @ torch.ones(64, 64, device="cuda", dtype=DTYPE)
        wait()
        found["memory_bytes"], found["context_bytes"] = whole, whole - free
        found["context_and_cublas_bytes"] = whole - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()

    def rate(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
        a = torch.randn(rows, inner, dtype=dtype, device=models.device())
        b = torch.randn(inner, columns, dtype=dtype, device=models.device())
        took = timed(lambda: [torch.mm(a, b) for _ in range(10)], 5)["median"]
        return 20 * rows * inner * columns / took

    wide = size // 2
    found["flops"] = {
        "square": rate(size, size, size, DTYPE),
        "a layer of 4096": rate(wide, wide, wide, DTYPE),
        "r 16": rate(wide, wide, 16, DTYPE),
        "fp32": rate(wide, wide, wide, torch.float32),
    }
    many = torch.zeros((4 << 20) if tiny else (1 << 30), dtype=torch.uint8, device=models.device())
    other = torch.empty_like(many)
    found["copy_bytes_per_second"] = 2 * len(many) / timed(lambda: other.copy_(many), 5)["median"]
    here = torch.zeros(1 << 20, dtype=torch.uint8)
    found["to_card_seconds_1_mib"] = timed(lambda: here.to(models.device()), 10)["median"]
    one = torch.zeros(1, device=models.device())
    found["launch_seconds"] = timed(lambda: [one.add_(1) for _ in range(1000)], 5)["median"] / 1000


# --- attention --------------------------------------------------------------------------------------------------------

_HEADS = {"SmolLM2": (9, 3, 64), "Qwen3-8B": (32, 8, 128), "Phi-3-mini": (32, 32, 96), "Gemma-2B": (8, 1, 256)}


def given(shape: tuple[int, int, int], tree: trie.Tree, dtype: torch.dtype) -> list[torch.Tensor]:
    heads, keys, size = shape
    n = len(tree.token_ids)
    return [
        torch.randn(n, count, size, dtype=dtype, device=models.device()).requires_grad_()
        for count in (heads, keys, keys)
    ]


def tree_sight(tree: trie.Tree) -> attention.Sight:
    """As the engine has it: flex attention on a card alone."""
    return attention.sight(tree, "flex" if CUDA else "gather", models.device())


def passes(sight: attention.Sight, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients of a pass there and back."""
    out = sight.attend(*tensors, Style(tensors[0].shape[-1] ** -0.5))
    return [out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))]


def compiling(found: Found, *, tiny: bool) -> None:
    """Seconds of the first pass and of the second, and how many graphs fifty lengths make."""
    for name, shape in list(_HEADS.items())[: 1 if tiny else None]:
        for dtype in {DTYPE, torch.float32}:
            tree = trie.lay_out(rows_of(600, 512))

            def both(shape: Any = shape, dtype: Any = dtype, tree: Any = tree) -> Found:
                sight, tensors = tree_sight(tree), given(shape, tree, dtype)
                return timed(lambda: passes(sight, tensors), 2)

            found[f"{name}, {dtype}"] = attempted(both)
            write(found)
    import torch._dynamo.utils as dynamo

    before = dynamo.counters["stats"]["unique_graphs"]
    for n in range(2 if tiny else 50):
        tree = trie.lay_out(rows_of(60 + 37 * n, 512, seed=n))
        passes(tree_sight(tree), given(_HEADS["SmolLM2"], tree, DTYPE))
    found["graphs_of_fifty_lengths"] = dynamo.counters["stats"]["unique_graphs"] - before


def attention_of_trees(found: Found, *, tiny: bool) -> None:
    """Flex attention beside a dense mask: how far apart, and how long; with tiles of a card of 24 GiB, too."""
    for name, shape in list(_HEADS.items())[: 1 if tiny else None]:
        for n in (200,) if tiny else (1000, 4000, 16000):
            tree = trie.lay_out(rows_of(n, 512))

            def beside(shape: Any = shape, tree: Any = tree, n: int = n) -> Found:
                tensors = given(shape, tree, DTYPE)
                sight = tree_sight(tree)
                row: Found = {"tokens": len(tree.token_ids), "flex": timed(lambda: passes(sight, tensors), 3)}
                with mock.patch.object(flex, "shared_memory", return_value=(99 << 10) if CUDA else None):
                    small = tree_sight(tree)
                row["flex, tiles of 99 KiB"] = timed(lambda: passes(small, tensors), 3)
                if n <= 4000:
                    dense = attention.Dense(tree, models.device())
                    row["dense"] = timed(lambda: passes(dense, tensors), 3)
                    right = passes(dense, [t.detach().double().requires_grad_() for t in tensors])
                    for which, of in (("flex", sight), ("flex, tiles of 99 KiB", small), ("dense", dense)):
                        row[which]["off"] = [
                            float((ours.double() - true).norm() / true.norm())
                            for ours, true in zip(passes(of, tensors), right, strict=True)
                        ]
                return row

            found[f"{name}, {n}"] = attempted(beside)
            write(found)


# --- steps ------------------------------------------------------------------------------------------------------------


def ours(model: PeftModel, notes: list[str], **settings: Any) -> Callable[[list[Rendered]], Any]:
    engine = Engine(model, EngineSettings(**{"self_check": False, **settings}), notes.append)
    return lambda rows: engine.gradient(rows, sum(row.n_supervised for row in rows))


def steps(name: str) -> Callable[..., None]:
    """Steps of one model by length, Liger's kernels, dropout and recomputation, and what a step's time goes to."""

    def measure(found: Found, *, tiny: bool) -> None:
        config = config_of(name, tiny=tiny)
        most = 600 if tiny else 16384
        settings: dict[str, Found] = {
            "as it is": {},
            "2048 tokens": {"tokens": most // 8},
            "without Liger": {"liger": False},
            "dropout 0.1": {"dropout": 0.1},
            "recomputed": {"recompute_layers": "all"},
        }
        for which, asked in settings.items():

            def of(asked: Found = asked, which: str = which) -> Found:
                lora = LoraSettings(dropout=asked.get("dropout", 0.0))
                model, rows, notes = built(config, lora), rows_of(asked.get("tokens", most), config.vocab_size), []
                with contextlib.nullcontext() if asked.get("liger", True) else without_liger():
                    step = ours(model, notes, recompute_layers=asked.get("recompute_layers", "none"))
                    took = timed(lambda: step(rows), 3)
                took |= figures(config, lora, rows, took, asked.get("recompute_layers") == "all")
                took["notes"] = notes
                if which == "as it is":
                    took["profile"] = profiled(lambda: step(rows))
                return took

            found[which] = attempted(of)
            write(found)
        found["self-check"] = attempted(lambda: checked(config))

    return measure


@contextlib.contextmanager
def without_liger() -> Iterator[None]:
    with mock.patch.object(liger, "version", return_value=None):
        yield


def figures(config: Any, lora: LoraSettings, rows: list[Rendered], took: Found, recomputed: bool) -> Found:
    """Tokens a second, the share of the card's rate that the floor of operations reaches, and what was planned."""
    recipe = Recipe(lora=lora)
    shape = planning.shape(config, recipe, models.targets(models.skeleton(config), lora), Path("nowhere"))
    load = planning.load_of(rows, share_prefix=True)
    floor = 4 * shape.linear * load.tokens + 4 * load.predicting * shape.width * shape.vocabulary
    choice = Choice(load.tokens, shape.layers if recomputed else 0, DTYPE.itemsize)
    parts = planning.parts_of_graph(shape, load, choice, 0, "cuda" if CUDA else "cpu")
    optimizer = parts.optimizer  # there is none here
    return {
        "tokens": load.tokens,
        "data_tokens_per_second": n_tokens(rows) / took["median"],
        "floor_flops_per_second": floor / took["median"],
        "planned_bytes": parts.total - optimizer,
    }


def profiled(step: Callable[[], Any]) -> Found:
    """Of one step: seconds, kernels, and those that take longest; where the card waits, the two sums differ."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if CUDA else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        wait()
        began = time.perf_counter()
        step()
        wait()
        seconds = time.perf_counter() - began
    each = [event for event in profile.key_averages() if not CUDA or event.device_type.name == "CUDA"]
    spent = sorted(each, key=lambda event: event.self_device_time_total if CUDA else event.self_cpu_time_total)[::-1]
    return {
        "seconds": seconds,
        "on_the_card": sum(event.self_device_time_total for event in each) / 1e6 if CUDA else None,
        "kernels": sum(event.count for event in each),
        "longest": [
            [event.key[:80], event.count, (event.self_device_time_total if CUDA else event.self_cpu_time_total) / 1e6]
            for event in spent[:15]
        ],
    }


def checked(config: Any) -> Found:
    """What the engine's comparison with plain transformers and peft says, and how long it takes."""
    notes: list[str] = []
    step, rows = ours(built(config, LoraSettings()), notes, self_check=True), rows_of(400, config.vocab_size)
    return {**timed(lambda: step(rows), 1), "notes": notes}


# --- a card of 24 GiB -------------------------------------------------------------------------------------------------


def four_bits(found: Found, *, tiny: bool) -> None:
    """Steps of Qwen3-8B with its weights in 4 bits, and the engine's comparison."""
    config = config_of("Qwen3-8B", tiny=tiny)

    def of() -> Found:
        lora, notes = LoraSettings(), list[str]()
        model, rows = built(config, lora, nf4=True), rows_of(600 if tiny else 8192, config.vocab_size)
        step = ours(model, notes, self_check=True, recompute_layers="all")
        return {**timed(lambda: step(rows), 3), "notes": notes}

    found["Qwen3-8B"] = attempted(of)


def small_card(found: Found, *, tiny: bool) -> None:
    """What the plan chooses for Qwen3-8B on a card of 24 GiB, in as much memory."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from conftest import save_tiny_model
    from tunesmith.recipe import resolve
    from tunesmith.training.checking import check

    name = "Qwen3-8B"
    folder = save_tiny_model(Path(os.environ["TUNESMITH_CACHE"]) / "small")
    config = config_of(name, tiny=tiny)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    data = folder.parent / "rows.jsonl"
    text = "".join(
        json.dumps({"instruction": f"What is {n}? " * (1 + n % 9), "output": f"It is {n}. " * (1 + n % 30)}) + "\n"
        for n in range(400)
    )
    data.write_text(text, encoding="utf-8")
    for quantize in ("none", "nf4"):

        def of(quantize: str = quantize) -> Found:
            flags = {"model.name": str(folder), "data.path": str(data), "model.quantize": quantize}
            rows = check(resolve(None, {**flags, "train.rehearse": 0})[0])
            card = replace(machines.card("4090"), available_bytes=_SMALL_CARD)
            made = planning.plan(rows, card)
            row: Found = {"fits": made.fits, "planned": asdict(made.parts), "chosen": made.chosen}
            if CUDA:
                torch.cuda.set_per_process_memory_fraction(_SMALL_CARD / torch.cuda.mem_get_info()[1])
            chosen = made.chosen
            layers, n = chosen["engine.recompute_layers"], chosen["engine.tokens_per_micro_batch"]
            notes, many = list[str](), rows_of(n, config.vocab_size)
            step = ours(
                built(config, LoraSettings(), nf4=quantize == "nf4"), notes,
                recompute_layers=layers, tokens_per_micro_batch=n,
            )  # fmt: skip
            return {**row, **timed(lambda: step(many), 2), "notes": notes}

        found[f"{name}, {quantize}"] = attempted(of)
        write(found)


# --- others -----------------------------------------------------------------------------------------------------------


def peers(found: Found, *, tiny: bool) -> None:
    """Steps of plain transformers and peft on the same rows, padded, with and without Liger's kernels; and TRL's."""
    for name in ("Qwen3-0.6B", "Qwen3-8B")[: 1 if tiny else None]:
        config = config_of(name, tiny=tiny)
        rows = rows_of(600 if tiny else 16384, config.vocab_size)

        def plain(with_liger: bool, recomputed: bool, config: Any = config, rows: Any = rows) -> Found:
            model = built(config, LoraSettings())
            if with_liger and liger.install(model) == 0:
                return {"failed": "no Liger kernels here"}
            if recomputed:
                model.get_base_model().activation_checkpointing_enable()
            n = sum(row.n_supervised for row in rows)
            ordered = sorted(rows, key=lambda row: len(row.token_ids), reverse=True)

            def step() -> None:
                for start in range(0, len(ordered), 16):
                    (summed_loss(model, pad(ordered[start : start + 16], models.device())) / n).backward()

            took = timed(step, 3)
            return {**took, "data_tokens_per_second": n_tokens(rows) / took["median"]}

        for which, how in {"plain": (False, False), "plain, recomputed": (False, True), "Liger": (True, False)}.items():
            found[f"{name}, {which}"] = attempted(lambda how=how: plain(*how))
            write(found)
        found[f"{name}, TRL"] = attempted(lambda config=config, rows=rows: trl(config, rows))
        write(found)


def trl(config: Any, rows: list[Rendered]) -> Found:
    """TRL's SFTTrainer, padded where FlashAttention is not here, which alone it packs rows with."""
    import importlib.util

    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    flash = CUDA and importlib.util.find_spec("flash_attn") is not None
    seconds: list[float] = []

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait()
            seconds.append(time.perf_counter() - self.began)

    with models.device():
        kind = {"attn_implementation": "flash_attention_2"} if flash else {}
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, trust_remote_code=False, **kind)
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")
    every = []
    for row in rows:
        ((start, _),) = row.replies
        every.append({"input_ids": list(row.token_ids), "labels": [-100] * start + list(row.token_ids[start:])})
    n = len(every) // 16 * 16
    settings = SFTConfig(
        output_dir=os.environ["TUNESMITH_CACHE"], max_steps=4, per_device_train_batch_size=16,
        gradient_accumulation_steps=n // 16, gradient_checkpointing=False, bf16=CUDA, use_cpu=not CUDA,
        padding_free=flash, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(every[:n]), processing_class=tokenizer,
        peft_config=lora, callbacks=[Clock()],
    ).train()  # fmt: skip
    median = sorted(seconds[1:])[len(seconds[1:]) // 2]
    return {"seconds": seconds, "padding_free": flash, "data_tokens_per_second": n_tokens(rows[:n]) / median}


# --- the line ---------------------------------------------------------------------------------------------------------


def line(found: Found, *, tiny: bool) -> None:
    """With a tiny model: check, plan, train, killed and resumed, chat, eval, export, serve."""
    del tiny
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from conftest import save_tiny_model

    folder = Path(os.environ["TUNESMITH_CACHE"]) / "line"
    model = save_tiny_model(folder / "model")
    data, run = folder / "rows.jsonl", folder / "run"
    rows = [{"instruction": f"What is {n}?", "output": f"It is {n}."} for n in range(80)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    few = ["--model", str(model), "--data", str(data), "--set", "train.rehearse=0", "--set", "train.save_every=2 steps"]

    def tunesmith(*command: str, said: str = "") -> Found:
        began = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "tunesmith", *command], input=said, text=True, capture_output=True,
            timeout=SECONDS_AT_MOST, errors="replace",
        )  # fmt: skip
        row: Found = {"exit": ran.returncode, "seconds": time.monotonic() - began}
        return row if ran.returncode == 0 else {**row, "failed": ran.stderr[-800:]}

    for command in (["doctor"], ["check", *few], ["plan", *few]):
        found[command[0]] = attempted(lambda command=command: tunesmith(*command))
        write(found)
    with (folder / "train.log").open("wb") as log:
        command = [sys.executable, "-P", "-m", "tunesmith", "train", *few, "--epochs", "6", "--out", str(run)]
        training = subprocess.Popen(command, stdout=log, stderr=log)
        until(lambda: any(run.glob("checkpoints/*")) or training.poll() is not None)
        training.send_signal(signal.SIGKILL)
        training.wait()
    found["killed after a checkpoint"] = any(run.glob("checkpoints/*"))
    if not found["killed after a checkpoint"]:
        found["failed"] = (folder / "train.log").read_text(errors="replace")[-800:]
    for name, command, said in (
        ("resume", ["resume", str(run)], ""),
        ("chat", ["chat", str(run)], "What is 7?\n"),
        ("eval", ["eval", str(run)], ""),
        ("export", ["export", str(run), "--to", "merged", "--out", str(folder / "merged")], ""),
    ):
        found[name] = attempted(lambda command=command, said=said: tunesmith(*command, said=said))
        write(found)
    found["serve"] = attempted(lambda: served(run))


def served(run: Path) -> Found:
    """One answer by HTTP."""
    port = 8765
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "tunesmith", "serve", str(run), "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:

        def answers() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                return True
            return server.poll() is not None

        until(answers)
        body = {"model": run.name, "messages": [{"role": "user", "content": "What is 7?"}], "max_tokens": 16}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        began = time.monotonic()
        with urllib.request.urlopen(request, timeout=SECONDS_AT_MOST) as answer:
            said = json.load(answer)
        return {"seconds": time.monotonic() - began, "answered": bool(said["choices"])}
    finally:
        server.terminate()
        server.wait()


def until(there: Callable[[], bool], seconds: float = SECONDS_AT_MOST) -> None:
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        time.sleep(0.05)


# ----------------------------------------------------------------------------------------------------------------------

_NAMED: dict[str, Callable[..., None]] = {
    "machine": machine,
    "compiling": compiling,
    "attention": attention_of_trees,
    "4 bits": four_bits,
    "24 GiB": small_card,
    "peers": peers,
    "the line": line,
}
_OUT: list[Path] = []


def write(found: Found) -> None:
    """Leaves what there is so far."""
    _OUT[0].write_text(json.dumps(found, indent=1), encoding="utf-8")


def main() -> None:
    name, out, *flags = sys.argv[1:]
    _OUT.append(Path(out))
    models.hush_libraries()
    found: Found = {}
    section = _NAMED.get(name) or steps(name)
    try:
        section(found, tiny="--tiny" in flags)
    finally:
        write(found)


if __name__ == "__main__":
    main()
