"""What is watched while training: each guard lets a good run pass and stops a bad one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import largest, save_tiny_model, script, tunesmith
from small_runs import Notes, assert_same, numbers, settings
from tunesmith import models
from tunesmith.engine.cpu.decoder import Decoder
from tunesmith.engine.cpu.layers import Activation
from tunesmith.errors import OutOfMemory, ProofError
from tunesmith.recipe import ModelSettings
from tunesmith.runs import rundir
from tunesmith.training import guards
from tunesmith.training.run import resume, train


def attached(model: Path, seed: int = 0) -> PeftModel:
    from tunesmith.hub import LocalModel

    base = models.load_base(LocalModel(model, "folder", None, None), ModelSettings(name=str(model)))
    return models.attach(base, settings(model, model).lora, seed, "base")


# --- numbers that are not finite --------------------------------------------------------------------------------------


def assert_stopped_at(run: Path, step: int) -> dict[str, Any]:
    """No adapter, the checkpoints before the step whole, nothing written down for it; returns not_finite.json."""
    assert not (run / "adapter").exists()
    assert len(rundir.read_lines(run / "metrics.jsonl")) == step - 1
    assert all(rundir.is_whole(point) for point in run.glob("checkpoints/*"))
    assert not list(run.rglob("*.partial"))
    written = json.loads((run / "not_finite.json").read_text())
    assert len(written["rows"]) == 4 and all(
        row["token_ids"] and "talk.jsonl:" in row["row"] for row in written["rows"]
    )
    return written


@pytest.mark.parametrize("narrowed", [False, True])
def test_an_activation_that_is_not_finite_stops_the_step_and_is_looked_for(
    tiny_model: Path,
    talk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    narrowed: bool,
) -> None:
    """Planted from step 7 on in what the layers written by hand compute; plain layers do not have it."""
    run, forward = tmp_path / "run", Activation.forward
    if narrowed:
        request.getfixturevalue("split")
        tiny_model = rounded_to_bfloat16(tiny_model, tmp_path / "model")

    def broken(self: Activation, gate_up: Tensor, extended: Tensor, keep: Tensor | None, dropped: Tensor) -> None:
        forward(self, gate_up, extended, keep, dropped)
        if len(rundir.read_lines(run / "metrics.jsonl")) == 6:
            extended[0, 0] = math.nan

    monkeypatch.setattr(Activation, "forward", broken)
    with pytest.raises(ProofError) as raised:
        train(settings(tiny_model, talk), run)
    assert raised.value.exit_code == 3 and "step 7" in raised.value.where and "talk.jsonl:" in raised.value.where
    assert "try `resume`" in assert_stopped_at(run, 7)["first"]
    assert [point.name for point in sorted(run.glob("checkpoints/*"))] == ["step-000003", "step-000006"]
    monkeypatch.setattr(Activation, "forward", forward)
    resume(run)
    whole = train(settings(tiny_model, talk), tmp_path / "whole")
    assert numbers(run) == numbers(whole.path)


def rounded_to_bfloat16(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    numbers = {name: weight.bfloat16().float() for name, weight in load_file(model / "model.safetensors").items()}
    save_file(numbers, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_weight_that_is_not_finite_is_named(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    sets = ("--set", "eval.hold_out=0", "--set", "train.examples_per_step=4")
    ended = tunesmith("train", "--model", broken, "--data", talk, "--out", tmp_path / "run", *sets, "--json")
    assert ended.code == 3 and "Traceback" not in ended.err
    assert "model.layers.1.mlp.down_proj.weight holds a weight that is not finite" in ended.err
    assert_stopped_at(tmp_path / "run", 1)
    (state,) = json.loads(tunesmith("runs", tmp_path, "--json").out)["runs"]
    assert (state["state"], state["exit_code"]) == ("failed", 3)


def test_a_learning_rate_without_measure_is_stopped(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = {"train.learning_rate": 1.0, "train.max_grad_norm": 0, "lora.alpha": 1e30, "eval.hold_out": 0}
    with pytest.raises(ProofError) as raised:
        train(settings(tiny_model, talk, **flags), run)
    step = len(rundir.read_lines(run / "metrics.jsonl")) + 1
    assert f"step {step}" in raised.value.where
    assert_stopped_at(run, step)


def test_the_first_place_that_went_wrong_is_found_among_many(tiny_model: Path, talk: Path) -> None:
    """A huge but finite weight in layer 0 overflows there first; layer 1 is not finite either."""
    from tunesmith.training.checking import check

    model = attached(tiny_model)
    documents = [row.documents[0] for row in check(settings(tiny_model, talk)).rows[:2]]
    assert "finite numbers for the same rows" in guards.first_not_finite(model, documents)
    weight = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight
    with torch.no_grad():
        weight.mul_(1e38).mul_(100)
        weight.clamp_(-3e38, 3e38)
    assert "that of model.layers.0.mlp.up_proj for" in guards.first_not_finite(model, documents)


# --- adapters that learn nothing --------------------------------------------------------------------------------------


def test_an_adapter_without_a_gradient_is_named(tiny_model: Path) -> None:
    model = attached(tiny_model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    guards.require_gradients(model)
    name = next(name for name in trained if "layers.1.mlp.up_proj.lora_B" in name)
    trained[name].grad = torch.zeros_like(trained[name])
    with pytest.raises(ProofError, match=r"layers\.1\.mlp\.up_proj"):
        guards.require_gradients(model)
    trained[name].grad = None
    with pytest.raises(ProofError, match="1 adapter matrices"):
        guards.require_gradients(model)


def test_an_adapter_that_stands_still_is_named(tiny_model: Path) -> None:
    model = attached(tiny_model)
    before = guards.signatures(model)
    assert len(before) == 14
    with pytest.raises(ProofError, match="14 adapter matrices still after step 2"):
        guards.require_moved(model, before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter[0, 0] += 1e-7
    guards.require_moved(model, before)


# --- losses that look wrong -------------------------------------------------------------------------------------------


def said(losses: list[float]) -> list[tuple[int, str]]:
    watch = guards.Losses()
    return [(number, text) for number, loss in enumerate(losses, 1) if (text := watch.odd(loss))]


def test_a_loss_that_falls_and_wobbles_is_not_odd() -> None:
    assert said([4 * 0.97**n + 0.4 * (-1) ** n for n in range(100)]) == []


def test_a_loss_that_explodes_is_called_out_once() -> None:
    ((step, text),) = said([2.0] * 20 + [3.0 + 0.5 * n for n in range(30)])
    assert 21 < step < 30 and "learning_rate" in text


def test_a_loss_at_zero_is_called_out_once() -> None:
    ((step, text),) = said([1.0] * 10 + [1e-5] * 60)
    assert 20 < step < 60 and "by heart" in text


# --- memory runs out --------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if no micro-batch of more than 100 tokens had room from step 3 on; holds the sizes that were tried."""
    gradient, sizes = Decoder.gradient, list[int]()

    def limited(self: Decoder, batch: Any, sight: Any, n_supervised: int, **more: Any) -> Tensor:
        sizes.append(len(batch.input_ids))
        result = gradient(self, batch, sight, n_supervised, **more)
        if len(batch.input_ids) > 100 and len(sizes) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return result

    monkeypatch.setattr(Decoder, "gradient", limited)
    return sizes


def test_memory_that_runs_out_shrinks_the_micro_batch_and_redoes_the_step(
    tiny_model: Path,
    talk: Path,
    tmp_path: Path,
    little_memory: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = {"lora.dropout": 0.0, "engine.share_prefix": False}
    notes = Notes()
    short = train(settings(tiny_model, talk, **flags), tmp_path / "short", watcher=notes)
    assert max(little_memory[-20:]) <= 100 < max(little_memory[:8])
    (note,) = [text for text in notes.texts if "Memory ran out" in text]
    lines = rundir.read_lines(short.path / "metrics.jsonl")
    assert [line["notes"] for line in lines if "notes" in line] == [[note]]
    assert note in (short.path / "report.html").read_text()
    monkeypatch.undo()
    whole = train(settings(tiny_model, talk, **flags), tmp_path / "whole")
    losses = [[line["loss"] for line in rundir.read_lines(r.path / "metrics.jsonl")] for r in (short, whole)]
    assert (
        largest(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
    )  # observed 1.0e-5 after 18 steps of rate 1e-2


def test_a_run_goes_on_with_what_it_found_out_about_memory(
    tiny_model: Path, talk: Path, tmp_path: Path, little_memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is not short any more, sums are still made of the same parts, and the adapter is the same."""
    undisturbed = train(settings(tiny_model, talk, **{"engine.share_prefix": False}), tmp_path / "undisturbed")
    killed = shutil.copytree(undisturbed.path, tmp_path / "killed")
    last = sorted((killed / "checkpoints").iterdir())[-1]
    assert json.loads((last / "engine.json").read_text())["tokens_at_most"] < 100
    for folder in (last, killed / "adapter"):
        shutil.rmtree(folder)
    (killed / "report.html").unlink()
    monkeypatch.undo()
    resume(killed)
    assert_same(killed, undisturbed.path)


def test_a_row_that_alone_is_too_much_is_named(
    tiny_model: Path,
    talk: Path,
    tmp_path: Path,
    little_memory: list[int],
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(talk.read_text() + json.dumps({"instruction": "Count.", "output": "1 2 3 " * 40}) + "\n")
    with pytest.raises(OutOfMemory, match=r"long\.jsonl:41") as raised:
        train(settings(tiny_model, data, **{"eval.hold_out": 0}), tmp_path / "run")
    assert raised.value.exit_code == 2 and "tokens" in raised.value.found


def test_rows_that_are_the_same_and_too_much_are_named(
    tiny_model: Path, talk: Path, tmp_path: Path, little_memory: list[int]
) -> None:
    """Nothing divides them: they stand on one path of the tree."""
    data, row = tmp_path / "long.jsonl", json.dumps({"instruction": "Count.", "output": "1 2 3 " * 40})
    data.write_text(talk.read_text() + f"{row}\n" * 4)
    flags = {"eval.hold_out": 0, "train.examples_per_step": 44, "train.epochs": 6}
    with pytest.raises(OutOfMemory, match=r"long\.jsonl:4[1-4]"):
        train(settings(tiny_model, data, **flags), tmp_path / "run")


def test_a_real_limit_of_memory_shrinks_the_micro_batch(tmp_path: Path) -> None:
    """A limit of the system for this process's data, set before the first step: 7,200 tokens at once do not fit."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    model, data = save_tiny_model(tmp_path / "model", **sizes), tmp_path / "rows.jsonl"
    row = {"instruction": "Say it.", "output": "again and " * 45}
    data.write_text("".join(json.dumps({**row, "instruction": f"Say it {i}."}) + "\n" for i in range(32)))
    flags = {"lora.dropout": 0.0, "eval.hold_out": 0, "train.epochs": 1, "train.examples_per_step": 16}
    flags["engine.tokens_per_micro_batch"] = 100_000
    train(settings(model, data, **flags), tmp_path / "whole")
    code = f"""
import resource
from pathlib import Path
from small_runs import settings
from tunesmith.runs import rundir
from tunesmith.training.trainer import Watcher
from tunesmith.training.run import train
class Limits(Watcher):
    def began(self, n_steps, run):
        used = int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmData"))) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (200 << 20), -1))
    def noted(self, text): print(text)
recipe = settings(Path({str(model)!r}), Path({str(data)!r}), **{flags!r})
train(recipe, Path({str(tmp_path)!r}) / "short", watcher=Limits())
"""
    ended = script(code, OMP_NUM_THREADS="1")  # OpenBLAS, short of room for a second thread, ends the process
    assert ended.code == 0, ended.err
    assert "Memory ran out" in ended.out
    lines = [rundir.read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "short")]
    assert largest(abs(a["loss"] - b["loss"]) for a, b in zip(*lines, strict=True)) < 1e-4
