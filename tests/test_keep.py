"""Which adapter is kept, and when a training that only gets worse is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import cases
from small_runs import Notes, assert_same, settings
from test_resume import killed
from tunesmith.runs import rundir
from tunesmith.training.run import Run, resume, train
from tunesmith.training.trainer import has_lost_patience

# So fast that the held-out loss falls first and rises then.
WORSE: dict[str, Any] = {
    "train.epochs": 12, "train.learning_rate": 3e-2, "eval.hold_out": 0.3, "train.scheduler": "constant",
    "train.save_every": "1000 steps", "lora.r": 16, "lora.dropout": 0,
}  # fmt: skip


def losses(run: Run | Path) -> dict[int, float]:
    lines = rundir.read_lines(Path(run) / "held_out.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["step"]}


def test_the_best_adapter_is_kept_where_that_is_asked_for(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    last = train(settings(tiny_model, talk, **WORSE), tmp_path / "last")
    notes = Notes()
    best = train(settings(tiny_model, talk, **WORSE, **{"eval.keep": "best"}), tmp_path / "best", watcher=notes)
    measured = losses(best)
    assert measured == losses(last)
    step = min(measured, key=measured.__getitem__)
    assert step < max(measured)  # or nothing is shown
    assert best.held_out_loss and last.held_out_loss
    assert best.held_out_loss[1] == measured[step] < last.held_out_loss[1] == measured[max(measured)]
    weights = "adapter/adapter_model.safetensors"
    kept = (best.path / weights).read_bytes()
    assert kept == (rundir.RunDir(best.path).checkpoint(step) / weights).read_bytes()
    assert kept != (last.path / weights).read_bytes()
    assert any(f"step {step}" in text and "lowest held-out loss" in text for text in notes.texts)


def test_the_best_checkpoint_is_never_thinned_out(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    flags = {**WORSE, "eval.keep": "best", "train.save_every": "1 steps", "train.keep_checkpoints": 1}
    run = train(settings(tiny_model, talk, **flags), tmp_path / "run")
    measured = losses(run)
    points = {rundir.step_of(point) for point in rundir.RunDir(run.path).points()}
    assert points == {min(measured, key=measured.__getitem__), run.steps}


@pytest.mark.parametrize("at_step", cases([9, 40], [9].__contains__))
def test_a_killed_run_keeps_the_same_adapter(tiny_model: Path, talk: Path, tmp_path: Path, at_step: int) -> None:
    flags = {**WORSE, "eval.keep": "best", "eval.patience": 6}
    whole = train(settings(tiny_model, talk, **flags), tmp_path / "whole")
    out = killed(tiny_model, talk, tmp_path / "run", min(at_step, whole.steps - 1), **flags)
    assert resume(out).held_out_loss == whole.held_out_loss
    assert_same(out, whole.path)


def test_patience_ends_a_training_that_only_gets_worse(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    notes = Notes()
    run = train(settings(tiny_model, talk, **WORSE, **{"eval.patience": 2}), tmp_path / "run", watcher=notes)
    measured = list(losses(run).values())
    assert has_lost_patience(measured, 2) and not has_lost_patience(measured[:-1], 2)
    assert not run.interrupted and (run.path / "report.html").is_file()
    assert run.steps < len(measured) * 100 and run.steps == max(losses(run))
    before = (run.path / "metrics.jsonl").read_bytes()
    again = resume(run.path, watcher=notes)
    assert (again.steps, again.interrupted) == (run.steps, False)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    assert any("eval.patience=2" in text for text in notes.texts)


def test_a_run_that_was_killed_when_its_patience_was_lost_only_ends(
    tiny_model: Path, talk: Path, tmp_path: Path
) -> None:
    flags = {**WORSE, "eval.patience": 2}
    whole = train(settings(tiny_model, talk, **flags), tmp_path / "whole")
    out = killed(tiny_model, talk, tmp_path / "run", whole.steps - 1, **flags)
    resume(out)
    for name in ("report.html", "adapter"):  # as if it had been killed behind its last checkpoint
        path = out / name
        path.unlink() if path.is_file() else path.rename(tmp_path / "away")
    resume(out)
    assert_same(out, whole.path)


@pytest.mark.parametrize(
    ("measured", "patience", "lost"),
    [([], 1, False), ([3], 1, False), ([3, 2], 1, False), ([2, 3], 1, True), ([2, 3, 1], 1, False),
     ([2, 3, 3], 2, True), ([2, 3], 2, False), ([2, 3, 3], 0, False), ([2, 2], 1, True)],
)  # fmt: skip
def test_patience_is_lost_after_so_many_measurements(measured: list[float], patience: int, lost: bool) -> None:
    assert has_lost_patience(measured, patience) is lost
