"""Going on: a run that was stopped anywhere ends in the bytes of the run that never was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import SESSION, cases, save_tiny_model, start, tunesmith
from small_runs import Notes, assert_same, flags_of, numbers, settings, until
from tunesmith import recipe
from tunesmith.chat import Opened
from tunesmith.errors import ProofError, RecipeError, RunError
from tunesmith.runs import rundir
from tunesmith.training.run import Run, resume, train
from tunesmith.training.trainer import StepMetrics, Watcher
from warm import Forked

STEPS = 18


class Power(BaseException):
    """Somebody pulled the plug."""


class Killed(Watcher):
    """Ends a training as it is, in the middle of what follows a step."""

    def __init__(self, at_step: int) -> None:
        self._at_step = at_step

    def stepped(self, metrics: StepMetrics, n_steps: int) -> None:
        if metrics.step == self._at_step:
            raise Power


def killed(model: Path, talk: Path, out: Path, at_step: int, **flags: Any) -> Path:
    with pytest.raises(Power):
        train(settings(model, talk, **flags), out, watcher=Killed(at_step))
    return out


@pytest.mark.parametrize("at_step", cases([1, 4, 9, 10, STEPS], [4, STEPS].__contains__))
def test_a_killed_run_ends_in_the_same_bytes(
    tiny_model: Path, talk: Path, undisturbed: Run, tmp_path: Path, at_step: int
) -> None:
    """Before any checkpoint, at and after some, and at the end."""
    out = killed(tiny_model, talk, tmp_path / "run", at_step)
    with (out / "metrics.jsonl").open("a") as file:
        file.write("\0" * 300 + '\n{"step": 999, "lo')  # what a crash leaves, and a line that was being written
    result = resume(out)
    assert_same(out, undisturbed.path)
    assert (result.steps, result.tokens) == (STEPS, undisturbed.tokens)
    assert [s.after for s in result.samples] == [s.after for s in undisturbed.samples]
    assert [s.before for s in result.samples] == [s.before for s in undisturbed.samples]


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_every_variant_goes_on_in_the_same_bytes(tiny_model: Path, talk: Path, tmp_path: Path, variant: str) -> None:
    """A pissa adapter is saved in another form than it is trained in."""
    flags = {"lora.variant": variant, "train.learning_rate": 3e-3, "train.epochs": 1}
    whole = train(settings(tiny_model, talk, **flags), tmp_path / "whole")
    out = killed(tiny_model, talk, tmp_path / "run", 5, **flags)
    resume(out)
    assert_same(out, whole.path)


def test_without_the_random_states_the_bytes_would_differ(
    tiny_model: Path, talk: Path, undisturbed: Run, tmp_path: Path
) -> None:
    """Negative control: the comparison sees another dropout mask."""
    out = killed(tiny_model, talk, tmp_path / "run", 5)
    (point,) = out.glob("checkpoints/*")
    other = max(undisturbed.path.glob("checkpoints/*"))
    shutil.copyfile(other / "rng_state.pth", point / "rng_state.pth")
    digests = json.loads((point / "files.json").read_text())
    digests["rng_state.pth"]["sha256"] = rundir.sha256(point / "rng_state.pth")
    (point / "files.json").write_text(json.dumps(digests))
    resume(out)
    with pytest.raises(AssertionError):
        assert_same(out, undisturbed.path)


@pytest.mark.parametrize("stopped_at", range(1, 7))
def test_a_run_that_ends_between_its_first_files_is_gone_on_with_or_named(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    """The one before the first step is the first of those that can be gone on with."""
    replace, n_written = Path.replace, 0

    def counted(self: Path, target: Path) -> Path:
        nonlocal n_written
        n_written += tmp_path in target.parents
        if n_written == stopped_at:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", counted)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tiny_model, talk, **{"train.epochs": 1}), tmp_path / "run")
    monkeypatch.undo()
    if (tmp_path / "run" / "manifest.json").is_file():
        ended = resume(tmp_path / "run")
        assert (ended.path / "report.html").is_file() and (ended.path / "ledger.jsonl").is_file()
        assert len(rundir.read_lines(ended.path / "held_out_rows.jsonl")) == ended.rows_held_out
    else:
        with pytest.raises(RunError, match="the folder of a run"):
            resume(tmp_path / "run")


def test_a_process_killed_at_any_moment_goes_on_to_the_same_bytes(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    """kill -9, twice in one run, with a checkpoint at every step, so that one of them is often being written."""
    flags = {"train.epochs": 3, "train.save_every": "1 steps"}
    whole = train(settings(tiny_model, talk, **flags), tmp_path / "whole")
    out, command = tmp_path / "run", ["train", *flags_of(tiny_model, talk, **flags)]
    chance = random.Random(0)
    for number in range(2):
        process = start(*command, "--out", out) if number == 0 else start("resume", out, "--json")
        steps = 7 * (number + 1) + chance.randrange(5)
        until(steps, out, process)
        time.sleep(chance.random() / 20)
        process.kill()
        process.communicate()
    ended = tunesmith("resume", out, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["steps"] == 27 and not list(out.rglob("*.partial"))
    assert_same(out, whole.path)


LONGER = {"train.epochs": 12, "train.save_every": "30 steps"}


@pytest.fixture(scope="module")
def longer(tiny_model: Path, talk: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training that is not over before anybody who waits for its second step is heard."""
    return train(settings(tiny_model, talk, **LONGER), tmp_path_factory.mktemp("longer") / "run")


def test_an_interrupted_process_ends_with_130_and_goes_on(
    tiny_model: Path, talk: Path, longer: Run, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start("train", *flags_of(tiny_model, talk, **LONGER), "--out", out)
    until(2, out, process)
    process.send_signal(signal.SIGINT)  # SIGTERM: test_runs
    answer, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    told = json.loads(answer)
    assert told["interrupted"] and Path(told["checkpoint"]).name == f"step-{told['steps']:06}"
    assert not (out / "adapter").exists()
    resume(out)
    assert_same(out, longer.path)


def in_terminal(out: Path, flags: list[str], hangup: str) -> Forked:
    """A training in a terminal that closes after its second step."""
    ours, theirs = os.openpty()
    process = start("train", *flags, "--out", out, streams=(theirs,) * 3, program=SESSION, HANGUP=hangup)
    os.close(theirs)
    os.set_blocking(ours, False)  # the training does not wait for what is read

    def read() -> None:
        with suppress(BlockingIOError):
            os.read(ours, 65536)

    until(2, out, process, meanwhile=read)
    os.close(ours)
    return process


@pytest.mark.parametrize(("hangup", "code"), [("SIG_DFL", 130), ("SIG_IGN", 0)])
def test_a_terminal_that_closes_ends_a_training_well_or_not_at_all(
    tiny_model: Path, talk: Path, longer: Run, tmp_path: Path, hangup: str, code: int
) -> None:
    for attempt in range(5):  # a busy machine may close it after the last step
        out = tmp_path / f"run{attempt}"
        process = in_terminal(out, flags_of(tiny_model, talk, **LONGER)[:-1], hangup)
        ended = process.wait(timeout=120)
        if ended == code:
            break
    assert ended == code
    assert list(out.glob("checkpoints/*"))
    resume(out)
    assert_same(out, longer.path)


# --- what is damaged --------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "name"),
    [(cut, "optimizer.pt"), (flip, "trained.safetensors"), (Path.unlink, "adapter/adapter_model.safetensors")],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tiny_model: Path, talk: Path, undisturbed: Run, tmp_path: Path, harm: Callable[[Path], None], name: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed.path, out)  # a run that was killed before the adapter was written
    shutil.rmtree(out / "adapter")
    first, last = sorted(out.glob("checkpoints/*"))
    harm(last / name)
    notes = Notes()
    resume(out, watcher=notes)
    assert any(last.name in text and "damaged" in text for text in notes.texts)
    assert any("step 15" in text for text in notes.texts) and first.name == "step-000015"
    assert_same(out, undisturbed.path)
    assert rundir.is_whole(last)


def test_checkpoints_are_ordered_by_the_number_of_their_step(tmp_path: Path) -> None:
    run = rundir.RunDir(tmp_path)
    for step in (999_998, 1_000_000, 999_999, 7):
        with rundir.commit(run.checkpoint(step)) as folder:
            (folder / "x").write_text("x")
    (run.checkpoints / "step-by-step").mkdir()
    assert [rundir.step_of(point) for point in run.points()] == [7, 999_998, 999_999, 1_000_000]
    assert rundir.newest_whole(run) == (run.checkpoint(1_000_000), [])
    (run.checkpoint(1_000_000) / "x").unlink()
    assert rundir.newest_whole(run) == (run.checkpoint(999_999), [run.checkpoint(1_000_000)])
    rundir.thin_out(run, 2)
    assert [point.name for point in run.points()] == ["step-999999", "step-1000000"]


@pytest.mark.parametrize(
    "torn",
    [
        b"\0" * 40,
        b'{"step": 2, "lo',
        b'{"step": 2, "x": "\xff"}',
        b"[2]",
        b"2",
        b"",
        b'{"step": 2}{"step": 3}',
        b"[" * 9999,
    ],
)
def test_what_a_crash_leaves_in_a_file_of_lines_is_read_over(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn + b'\n\0\0{"step": 4}\n' + torn)
    assert rundir.read_lines(path) == [{"step": 1}, {"step": 4}]


def test_no_whole_checkpoint_at_all_is_exit_3(undisturbed: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed.path, out)
    for point in out.glob("checkpoints/*"):
        cut(point / "optimizer.pt")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ProofError) as raised:
        resume(out)
    assert raised.value.exit_code == 3 and "step-000015" in str(raised.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["manifest.json", "recipe.yaml"])
def test_a_deleted_manifest_or_recipe_comes_back_from_a_checkpoint(
    tiny_model: Path, talk: Path, undisturbed: Run, tmp_path: Path, name: str
) -> None:
    out = killed(tiny_model, talk, tmp_path / "run", 5)
    before = (out / name).read_bytes()
    (out / name).unlink()
    resume(out)
    assert (out / name).read_bytes() == before
    assert_same(out, undisturbed.path)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"manifest\.json"):
        resume(tmp_path)


def test_a_deleted_line_of_the_metrics_is_noticed(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    out = killed(tiny_model, talk, tmp_path / "run", 5)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ProofError, match="one for each step"):
        resume(out)


# --- what has changed -------------------------------------------------------------------------------------------------


def change_data(model: Path, data: Path, run: Path) -> None:
    data.write_text(data.read_text().replace("Count to 7.", "Count to seven."))


def change_recipe(model: Path, data: Path, run: Path) -> None:
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("alpha: 32", "alpha: 16"))


def change_template(model: Path, data: Path, run: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>\n", "<|im_end|>"))


def change_weights(model: Path, data: Path, run: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_data, "the data"),
        (change_recipe, "lora.alpha was 32 and is 16"),
        (change_template, "the chat template"),
        (change_weights, "the base's weights"),
    ],
)
def test_what_has_changed_is_named_and_refused(
    talk: Path, tmp_path: Path, change: Callable[[Path, Path, Path], None], named: str
) -> None:
    model, data = save_tiny_model(tmp_path / "model"), tmp_path / "talk.jsonl"
    shutil.copyfile(talk, data)
    out = killed(model, data, tmp_path / "run", 5)
    change(model, data, out)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError) as raised:
        resume(out)
    assert raised.value.exit_code == 2 and named in raised.value.found
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("command", ["chat", "eval", "serve", "export"])
def test_a_run_whose_base_has_other_weights_is_refused(
    tiny_model: Path, talk: Path, undisturbed: Run, tmp_path: Path, command: str
) -> None:
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_model, model)
    shutil.copytree(undisturbed.path, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["base"]["folder"] = str(model)
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert Opened.of(out).found.folder == model
    change_weights(model, talk, out)
    more = {"chat": ["--prompt", "Hi"], "export": ["--to", "adapter"], "serve": ["--port", "0"]}
    ended = tunesmith(command, out, *more.get(command, []))
    assert ended.code == 3 and "other weights than at training (model.safetensors)" in " ".join(ended.err.split())


def test_a_run_is_found_from_another_folder(
    tiny_model: Path, talk: Path, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(talk.parent)
    out = killed(Path(os.path.relpath(tiny_model)), Path(talk.name), tmp_path / "run", 5)
    monkeypatch.chdir(tmp_path)
    resume("run")
    assert_same(out, undisturbed.path)


def test_a_finished_run_stays_as_it_is(undisturbed: Run) -> None:
    before = {path: path.read_bytes() for path in undisturbed.path.rglob("*") if path.is_file()}
    result = resume(undisturbed.path)
    assert (result.steps, result.final_loss) == (undisturbed.steps, undisturbed.final_loss)
    assert result.seconds == undisturbed.seconds
    after = {path: path.read_bytes() for path in undisturbed.path.rglob("*") if path.is_file()}
    assert before == after


def test_a_run_can_be_made_longer_but_nothing_else(undisturbed: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed.path, out)
    with pytest.raises(RecipeError, match="shorter"):
        resume(out, epochs=1)
    result = resume(out, epochs=3)
    assert result.steps == 27 and [line["step"] for line in rundir.read_lines(out / "metrics.jsonl")] == [*range(1, 28)]
    assert numbers(out)[:STEPS] == numbers(undisturbed.path)[:STEPS]
    assert recipe.resolve(out / "recipe.yaml")[0].train.epochs == 3
    ended = tunesmith("resume", out, "--set", "lora.r=4", "--json")
    assert ended.code == 2 and "train.epochs alone" in ended.err


def test_two_at_once_in_one_run_are_one_too_many(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start("train", *flags_of(tiny_model, talk, **{"train.epochs": 5000}), "--out", out)
    until(1, out, process)
    ended = tunesmith("resume", out, "--json")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert ended.code == 2 and "another process at work in it" in ended.err
    assert process.returncode == 130


def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    with rundir.locked(tmp_path):
        assert rundir.is_locked(tmp_path)
        with pytest.raises(RunError, match="another process"), rundir.locked(tmp_path):
            pass
    assert not rundir.is_locked(tmp_path)


def test_a_watcher_that_has_had_enough_stops_a_run_with_a_checkpoint_to_go_on_from(
    tiny_model: Path, talk: Path, undisturbed: Run, tmp_path: Path
) -> None:
    class Enough(Watcher):
        steps = 0

        def stepped(self, metrics: StepMetrics, n_steps: int) -> None:
            self.steps = metrics.step

        def enough(self) -> bool:
            return self.steps == 5

    stopped = train(settings(tiny_model, talk), tmp_path / "run", watcher=Enough())
    assert (stopped.interrupted, stopped.steps, stopped.checkpoint) == (
        True,
        5,
        tmp_path / "run/checkpoints/step-000005",
    )
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed.path)
