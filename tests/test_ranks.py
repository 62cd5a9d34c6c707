"""Several processes train like one, and none is left behind when one ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from conftest import ROOT, largest, start, tunesmith
from tunesmith import machines, models
from tunesmith.engine import ranks
from tunesmith.hub import locate
from tunesmith.recipe import ModelSettings
from tunesmith.runs import rundir
from tunesmith.training.trainer import on_one_device
from warm import Forked

SETTINGS = (
    "train.examples_per_step=8", "train.epochs=2", "train.learning_rate=3e-3", "train.rehearse=0", "lora.dropout=0",
    "lora.r=8", "eval.hold_out=0.05",
)  # fmt: skip


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("data") / "sums.jsonl")


def write_sums(path: Path) -> Path:
    """80 rows of different lengths; the last step of an epoch is whole."""
    rows = [{"instruction": f"What is {i}?", "input": "", "output": f"{i % 11}" + "!" * (i % 5)} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(model: Path, data: Path, out: Path, *settings: str) -> list[str]:
    flags = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return ["train", "--model", str(model), "--data", str(data), "--out", str(out), *flags]


FAST_CLOCK = Path(__file__).with_name("fast_clock.py")


def processes(
    commands: Sequence[Sequence[str]], logs: Path, program: Path | None = None, **environment: str
) -> list[Forked]:
    """One process per command line, joined as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, command in enumerate(commands):
        env = {
            "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "WORLD_SIZE": str(len(commands)), "RANK": str(rank), "LOCAL_RANK": str(rank), **environment,
        }  # fmt: skip
        with (logs / f"{rank}.log").open("wb") as log, open(os.devnull) as nothing:
            streams = (nothing.fileno(), log.fileno(), log.fileno())
            started.append(start(*command, streams=streams, program=program, **env))
    return started


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in rundir.read_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tiny_model: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert tunesmith(*arguments(tiny_model, sums, out)).code == 0
    return out


@pytest.mark.parametrize("sharded", [False, True], ids=["adapters added up", "base sharded with FSDP2"])
def test_two_processes_train_like_one(tiny_model: Path, sums: Path, alone: Path, tmp_path: Path, sharded: bool) -> None:
    out = tmp_path / "run"
    command = arguments(tiny_model, sums, out, "engine.tokens_per_micro_batch=100")
    for process in processes([command] * 2, tmp_path, ACCELERATE_USE_FSDP=str(sharded)):
        assert process.wait(240) == 0, (tmp_path / "0.log").read_text()
    assert len(losses(out)) == 20
    worst = largest(abs(a - b) for a, b in zip(losses(out), losses(alone), strict=True))
    assert worst < 1e-5  # observed 4.8e-7, of losses around 4
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (out, alone))
    assert largest((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5
    assert largest(tensor.abs().max().item() for tensor in theirs.values()) > 0.01


def test_a_base_that_no_process_has_as_a_whole_answers_before_the_training(
    tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    """What it says to the general prompts that are rehearsed is what it says as one."""
    few = ("train.rehearse=0.1", "train.epochs=1", "data.rehearse=" + str(tmp_path / "prompts.txt"))
    (tmp_path / "prompts.txt").write_text("What is a lighthouse?\nName two seas.\n")
    for process in processes(
        [arguments(tiny_model, sums, tmp_path / "run", *few)] * 2, tmp_path, ACCELERATE_USE_FSDP="true"
    ):
        assert process.wait(240) == 0, (tmp_path / "0.log").read_text()
    assert tunesmith(*arguments(tiny_model, sums, tmp_path / "alone", *few)).code == 0
    sharded, alone = (rundir.read_lines(tmp_path / name / "rehearsal.jsonl") for name in ("run", "alone"))
    assert sharded == alone and alone
    assert largest(abs(a - b) for a, b in zip(losses(tmp_path / "run"), losses(tmp_path / "alone"), strict=True)) < 1e-5


def test_where_the_base_is_sharded_no_process_takes_it_to_its_device_as_a_whole(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "device", lambda: torch.device("meta"))
    whole = models.load_base(locate(str(tiny_model)), ModelSettings(dtype="float32"), torch.device("cpu"))
    assert {parameter.device.type for parameter in whole.parameters()} == {"cpu"}


def test_4_bits_and_sharding_are_refused_together(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    ended = tunesmith(*arguments(tiny_model, sums, tmp_path / "run", "model.quantize=nf4"), ACCELERATE_USE_FSDP="true")
    assert ended.code == 2 and "--use_fsdp" in ended.err


def test_two_processes_go_on_like_one(tiny_model: Path, sums: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for process in processes([arguments(tiny_model, sums, out, "train.save_every=7 steps")] * 2, tmp_path):
        assert process.wait(240) == 0, (tmp_path / "0.log").read_text()
    for folder in (out / "adapter", *sorted(out.glob("checkpoints/*"))[1:]):  # as if killed after step 7
        shutil.rmtree(folder)
    for process in processes([["resume", str(out)]] * 2, tmp_path):
        assert process.wait(240) == 0, (tmp_path / "0.log").read_text()
    assert len(losses(out)) == 20
    assert largest(abs(a - b) for a, b in zip(losses(out), losses(alone), strict=True)) < 1e-5
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_each_process_has_its_own_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By recorded calls, of the second of two processes on a host with two cards."""
    taken = [0]
    answers: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 2, "current_device": lambda: taken[-1],
        "set_device": lambda device: taken.append(device if isinstance(device, int) else device.index),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    for name, answer in {"is_initialized": True, "get_rank": 1, "new_group": None}.items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, answer=answer, **__: answer)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with ranks.joined(), ranks.unseen():
        own = models.device()
        given = TrainingArguments(output_dir=str(tmp_path), report_to="none")
        on_one_device(given, own)
        assert own == given.device == torch.device("cuda", 1)
        assert (torch.cuda.current_device(), given.n_gpu) == (1, 1)


def test_a_launcher_is_joined(tiny_model: Path, sums: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    env = {**os.environ, "TUNESMITH_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "--no-python", str(Path(sys.executable).with_name("tunesmith")), *arguments(tiny_model, sums, out), "--json",
    ]  # fmt: skip
    for name in ("typing", "json", "yaml", "torch"):  # as the docs say, what lies in the folder at hand is not run
        (tmp_path / f"{name}.py").write_text("raise SystemExit(99)")
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["steps"] == 20  # one object, of the first process
    assert largest(abs(a - b) for a, b in zip(losses(out), losses(alone), strict=True)) < 1e-5


def test_processes_with_different_data_all_end_with_one_message(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(sums.read_text().replace("What is 7?", "What is 8?"))
    commands = [arguments(tiny_model, data, tmp_path / "run") for data in (sums, other)]
    for rank, process in enumerate(processes(commands, tmp_path)):
        assert process.wait(60) == 3
        text = (tmp_path / f"{rank}.log").read_text()
        assert "another data than process 0" in " ".join(text.split())
        assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_a_clock_that_runs_otherwise_in_one_process_parts_nobody(
    tiny_model: Path, sums: Path, alone: Path, tmp_path: Path
) -> None:
    """Process 0 alone is asked for the time; benchmarks/ranks.py lets its own run fast as well."""
    out = tmp_path / "run"
    command = arguments(tiny_model, sums, out, "eval.every=1 minutes", "train.save_every=1 minutes")
    for process in processes([command] * 2, tmp_path, FAST_CLOCK, FAST_RANK="1", FAST="1000000"):
        assert process.wait(240) == 0, (tmp_path / "0.log").read_text()
    assert largest(abs(a - b) for a, b in zip(losses(out), losses(alone), strict=True)) < 1e-5
    measured = [line["step"] for line in rundir.read_lines(out / "held_out.jsonl")]
    assert measured == [0, 20]
    assert [point.name for point in rundir.RunDir(out).points()][-1] == "step-000020"


MEETINGS = '''
import json, os
import torch
import torch.distributed as dist
from tunesmith.engine import ranks

MEETINGS = {
    "other kinds": lambda r: r.add_up([], torch.zeros(())) if r.rank else r.gather(1),
    "other steps": lambda r: (setattr(r, "step", r.rank + 3), r.gather(1)),
    "other sizes": lambda r: r.add_up([], *[torch.zeros(())] * (r.rank + 1)),
    "one fails": lambda r: r.from_main(1 // (1 - r.rank)),
    "all is well": lambda r: [r.from_main(r.rank), r.gather({"rank": r.rank}), r.any(r.rank == 1)],
    "the self-check": lambda r: self_check(r),
    "one is gone": lambda r: os._exit(5) if r.rank else r.begin_pass(),
}


def self_check(r):
    """Of which process 1 alone finds a fault."""
    import pytest
    from test_self_check import FEW, checking, family, n_supervised, wrong_rotation

    with pytest.MonkeyPatch.context() as patch:
        if r.rank == 1:
            wrong_rotation(patch)
        made = checking(family("Llama"), [])
        made._ranks = r
        made.gradient(FEW, n_supervised(FEW))
    return [made.way, os.listdir(os.path.join(os.environ["TUNESMITH_CACHE"], "self_checks"))]


os.makedirs(os.path.join(os.environ["TUNESMITH_CACHE"], "self_checks"), exist_ok=True)
dist.init_process_group("gloo")
for name, meeting in MEETINGS.items():
    try:
        with ranks.joined() as r:
            said = meeting(r)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([name, said]), flush=True)
'''


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What comes of meetings of two processes, in each of them, by the meeting's name."""
    folder = tmp_path_factory.mktemp("met")
    (folder / "meetings.py").write_text(MEETINGS)
    started = processes([[]] * 2, folder, folder / "meetings.py", TUNESMITH_CACHE=str(folder))
    codes = [process.wait(600) for process in started]
    assert codes == [0, 5], (folder / "0.log").read_text()
    lines = [(folder / f"{rank}.log").read_text().splitlines() for rank in range(2)]
    return [dict(json.loads(line) for line in each if line.startswith('["')) for each in lines]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("other kinds", "process 1: the sum of a loss in step 0 (1 numbers)"),
        ("other steps", "process 1: a word from each process in step 4"),
        ("other sizes", "process 1: the sum of a loss in step 0 (2 numbers)"),
    ],
)
def test_processes_that_are_not_at_the_same_point_all_get_one_message(
    met: list[dict[str, Any]], name: str, found: str
) -> None:
    first, second = (each[name] for each in met)
    assert first == second and first.startswith("ProofError") and f"found {found}; expected" in first


def test_a_process_that_fails_says_why_to_those_that_wait_for_it(met: list[dict[str, Any]]) -> None:
    assert met[0]["one fails"].startswith("RunError: process 1 of 2: found its end: integer division")
    assert met[1]["one fails"].startswith("ZeroDivisionError")


def test_a_process_that_is_gone_ends_those_that_wait_for_it(met: list[dict[str, Any]]) -> None:
    assert "no answer from another process" in met[0]["one is gone"] and "one is gone" not in met[1]


def test_process_0_decides_and_each_has_a_word(met: list[dict[str, Any]]) -> None:
    assert met[0]["all is well"] == met[1]["all is well"] == [0, [{"rank": 0}, {"rank": 1}], True]


def test_what_the_self_check_of_one_process_finds_all_take(met: list[dict[str, Any]]) -> None:
    """And none remembers it, which was right for it or was not."""
    assert met[0]["the self-check"] == met[1]["the self-check"] == ["tree", []]


def test_what_a_host_has_is_shared_out_among_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machines.this_machine()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = machines.this_machine()
    if shared.device == "cpu":  # other programs come and go meanwhile
        assert shared.available_bytes - shared.runtime_bytes < (whole.available_bytes - whole.runtime_bytes) / 2


@pytest.mark.parametrize(("n_cores", "n_threads", "said"), [(16, 1, "OMP_NUM_THREADS=4"), (16, 4, None), (3, 1, None)])
def test_cores_that_processes_leave_idle_are_named(
    monkeypatch: pytest.MonkeyPatch, n_cores: int, n_threads: int, said: str | None
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(ranks.system, "cores", lambda: n_cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said in (ranks.idle_cores() or "") if said else ranks.idle_cores() is None


def test_nothing_that_python_would_run_goes_from_process_to_process() -> None:
    """No pickles: numbers and JSON."""
    for path in (ROOT / "src").rglob("*.py"):
        assert not re.search(r"(gather|broadcast|scatter|send|recv)_object|\brpc\b", path.read_text("utf-8")), path


def test_a_killed_process_ends_the_others_within_a_minute(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = processes([arguments(tiny_model, sums, out, "train.epochs=4000")] * 2, tmp_path)
    for _ in range(600):
        if (out / "metrics.jsonl").is_file() and len(losses(out)) > 3:
            break
        time.sleep(0.2)
    second.send_signal(signal.SIGKILL)
    second.wait()
    began = time.monotonic()
    assert first.wait(60) == 2
    assert time.monotonic() - began < 60  # observed 0.6 s
    text = (tmp_path / "0.log").read_text()
    assert "no answer from another process" in " ".join(text.split())
    assert "Traceback" not in text


def test_sharding_spreads_the_base_and_not_the_adapter(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "shard.py"
    script.write_text(
        """
import sys
from torch.distributed.tensor import DTensor
from tunesmith import hub
from tunesmith import models as model
from tunesmith.engine import ranks
from tunesmith.recipe import LoraSettings, ModelSettings
base = model.load_base(hub.locate(sys.argv[1]), ModelSettings())
tuned = model.attach(base, LoraSettings(), 0, "x")
with ranks.joined():
    ranks.shard(tuned, model.decoder_layers(base), model.device())
    for name, parameter in tuned.named_parameters():
        if ".layers." in name:
            assert isinstance(parameter, DTensor) != ("lora_" in name), name
            if isinstance(parameter, DTensor):
                assert parameter.to_local().numel() < parameter.numel(), name
print("ok")
"""
    )
    started = processes([[str(tiny_model)]] * 2, tmp_path, script)
    assert [process.wait(120) for process in started] == [0, 0], (tmp_path / "0.log").read_text()


def test_dealing_gives_every_row_to_one_process() -> None:
    from tunesmith.engine.trie import deal, input_length, lay_out
    from tunesmith.types import Origin, Rendered

    documents = [
        Rendered((1, 2, 3, *range(10 + n, 10 + n + n % 17 + 2)), ((3, n % 17 + 5),), Origin("x", n)) for n in range(40)
    ]
    for n in (1, 2, 3, 7):
        groups = deal(documents, n)
        assert len(groups) == n
        assert sorted(d.origin.line for group in groups for d in group) == list(range(40))
        sizes = [len(lay_out(group).token_ids) for group in groups]
        assert max(sizes) - min(sizes) <= max(map(input_length, documents))
    assert [len(group) for group in deal(documents[:2], 4)].count(0) == 2
    assert torch.distributed.is_available()
