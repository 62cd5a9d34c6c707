"""Long work can be left and looked at: detached runs, their list, and what their files say of them."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import start, tunesmith
from small_runs import flags_of, settings, until
from tunesmith import runs
from tunesmith.errors import RunError
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.training.run import Run, train


def states(folder: Path) -> dict[str, str]:
    return {run.path.name: run.state for run in runs.all_in(folder)}


def test_what_became_of_a_run_is_told_by_its_files(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    train(settings(tiny_model, talk, **{"train.epochs": 1}), tmp_path / "done")
    process = start("train", *flags_of(tiny_model, talk, **{"train.epochs": 5000}), "--out", tmp_path / "killed")
    until(2, tmp_path / "killed", process)
    assert states(tmp_path) == {"done": "done", "killed": "running"}
    for command in (["eval"], ["export", "--to", "adapter"], ["chat", "--prompt", "Hi"]):
        ended = tunesmith(command[0], tmp_path / "killed", *command[1:])
        assert ended.code == 2 and "the run is training, now at step" in ended.err and "tunesmith watch" in ended.err
    process.kill()
    process.communicate()
    assert states(tmp_path) == {"done": "done", "killed": "gone"}
    ended = tunesmith("chat", tmp_path / "killed", "--prompt", "Hi")
    assert ended.code == 2 and "the run was killed at step" in ended.err and "tunesmith resume" in ended.err
    gone = runs.state_of(tmp_path / "killed")
    assert (gone.pid, gone.n_steps, gone.exit_code) == (process.pid, 45000, 130) and gone.step >= 2
    assert "killed" in tunesmith("runs", tmp_path).out
    ended = tunesmith("watch", tmp_path / "killed")
    assert ended.code == 130 and "tunesmith resume" in ended.out


# --- which run is meant -----------------------------------------------------------------------------------------------


def make_run(path: Path, age: int = 0) -> Path:
    path.mkdir(parents=True)
    for name in ("manifest.json", "recipe.yaml"):
        (path / name).write_text("{}")
    (path / "adapter").mkdir()
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with eight runs in `runs/` and two elsewhere."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["my run", "lighthouse", "smollm2", "a", "b", "c", "d", "e"]):
        make_run(Path("runs") / name, age)
    for name in ("here", "elsewhere/lightship"):
        make_run(Path(name))
    (tmp_path / "runs" / "damaged" / "checkpoints").mkdir(parents=True)
    os.utime(tmp_path / "runs" / "damaged", (0, 0))
    (tmp_path / "model").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("my run", "runs/my run"), ("runs/my run", "runs/my run"), ("runs/my run/adapter", "runs/my run"),
        ("my run/adapter", "runs/my run"), ("here", "here"), ("elsewhere/lightship", "elsewhere/lightship"),
        ("damaged", "runs/damaged"), ("smollm2", "runs/smollm2"),
    ],
)  # fmt: skip
def test_a_run_is_found_by_its_path_or_by_its_name(work: Path, name: str, meant: str) -> None:
    assert runs.find(name) == runs.named(name) == runs.named_or_model(name) == Path(meant)
    assert runs.find(work / meant) == work / meant


@pytest.mark.parametrize("name", ["phi-4", "hf:org/name", "ms:org/name", "org/name", "model", "./model"])
def test_what_is_no_run_may_be_a_model(work: Path, name: str) -> None:
    assert runs.named_or_model(name) is None and (work / "model").is_dir()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("my-run", "'runs/my run'"), ("runs/my_run", "'runs/my run'"), ("lighthous", "runs/lighthouse"),
        ("elsewhere/lightshop", "elsewhere/lightship"), ("nope", None), ("runs/nope", None), ("./nope", None),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("work")
def test_a_name_that_is_nothing_is_answered_with_those_there_are(name: str, meant: str | None) -> None:
    for find in (runs.named, runs.named_or_model):
        with pytest.raises(RunError) as caught:
            find(name)
        assert caught.value.where == name
        assert ("Did you mean" in caught.value.fix) is (meant is not None)
        assert meant is None or f"Did you mean {meant}" in caught.value.fix
        if not name.startswith("elsewhere"):
            assert "in runs there are 'my run', lighthouse, smollm2, a, b, and 4 older ones" in caught.value.expected
        assert "tunesmith runs" in caught.value.fix


@pytest.mark.usefixtures("work")
def test_a_misspelt_alias_is_known_among_the_runs() -> None:
    with pytest.raises(RunError, match=r"Did you mean (.* or )?phi-4"):
        runs.named_or_model("phi4")


def test_where_there_is_no_run_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=f"There is no run in {tmp_path}/runs"):
        runs.named("nope")


@pytest.mark.parametrize(
    "command",
    ["chat {} --prompt Hi", "eval {}", "export {} --to adapter", "serve {}", "resume {}", "watch {}"],
)
def test_no_hub_is_asked_for_what_is_no_run(work: Path, command: str, planted_proxy: list[str]) -> None:
    for name in ("runs/nope", "nope"):
        words = [name if word == "{}" else word for word in command.split()]
        ended = tunesmith(*words, cwd=work, TUNESMITH_OFFLINE="0")
        assert ended.code == 2 and "found    nothing of that name" in ended.err and "my run" in ended.err, ended.err
    assert planted_proxy == []


def test_a_run_is_opened_by_its_name_alone(undisturbed: Run, tmp_path: Path) -> None:
    shutil.copytree(undisturbed.path, tmp_path / "runs" / "my-run")
    ended = tunesmith("chat", "my-run", "--prompt", "Hi", "--max-tokens", "2", "--json", cwd=tmp_path)
    assert ended.code == 0 and ended.json["token_ids"], ended.err
    assert tunesmith("export", "my-run", "--to", "adapter", cwd=tmp_path).code == 0
    assert (tmp_path / "runs" / "my-run" / "exported").is_dir()
    assert tunesmith("watch", "my-run", "--json", cwd=tmp_path).json["state"] == "done"
    assert tunesmith("resume", "my-run", "--json", cwd=tmp_path).code == 0


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunDir(tmp_path / "run")
    for path in (run.manifest, run.recipe):
        path.write_text("{}")

    def fail() -> None:
        with runs.occupied(run, "model", "data"):
            assert runs.state_of(run.path).state == "running"
            raise RunError("here", "a fault", "none", "Mend it.")

    with pytest.raises(RunError):
        fail()
    state = runs.state_of(run.path)
    assert (state.state, state.exit_code) == ("failed", 2) and "a fault" in state.reason


# --- on another machine -----------------------------------------------------------------------------------------------


def left_by(folder: Path, seconds: float = 0, **where: Any) -> RunDir:
    """A run that says that it is at work, as it was told so many seconds ago from where `where` says."""
    run = RunDir(folder)
    folder.mkdir()
    for path in (run.manifest, run.recipe):
        path.write_text("{}")
    heard = (runs._now() - datetime.timedelta(seconds=seconds)).isoformat(timespec="seconds")
    here = {"pid": 4711, "host": "far-away", **runs._where()}
    rundir.write_json(run.state, {"state": "running", **here, "heard": heard, "n_steps": 9, **where})
    return run


ELSEWHERE = {"machine": "another", "boot": "another", "processes": "pid:[1]"}


@pytest.mark.parametrize(
    ("seconds", "where", "state"),
    [
        (0, {}, "gone"),  # nobody holds the lock
        (0, {"processes": "another container"}, "gone"),  # on a disk of this machine's, where a lock is seen
        (20, {"boot": "before it was started anew"}, "gone"),
        (20, ELSEWHERE, "running"),
        (-3000, ELSEWHERE, "running"),  # its clock goes ahead
        (400, ELSEWHERE, "silent"),
    ],
    ids=str,
)
def test_gone_is_said_only_where_it_is_known(tmp_path: Path, seconds: float, where: dict[str, str], state: str) -> None:
    run = left_by(tmp_path / "run", seconds, **where)
    if not runs._where()["machine"] and "boot" in where and "machine" not in where:
        state = "running"  # it has no name by which it could be known again
    assert runs.state_of(run.path).state == state


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1], ids=["alive", "gone"])
def test_where_a_disk_has_no_locks_a_process_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: int
) -> None:
    monkeypatch.setattr(rundir, "is_locked", lambda path: None)
    run = left_by(tmp_path / "run", pid=pid)
    assert runs.state_of(run.path).state == ("running" if pid == os.getpid() else "gone")
    other = left_by(tmp_path / "other", pid=pid, processes="another container")
    assert runs.state_of(other.path).state == "running"


def test_a_run_that_another_machine_holds_is_not_entered(tmp_path: Path) -> None:
    run = left_by(tmp_path / "run", -3000, **ELSEWHERE)  # its clock goes ahead
    before = run.state.read_bytes()
    ended = tunesmith("resume", run.path, "--json")
    assert ended.code == 2 and "at work in it on far-away (heard of just now)" in " ".join(ended.err.split())
    with pytest.raises(RunError, match="far-away"), runs.occupied(run, "model", "data"):
        pass
    assert run.state.read_bytes() == before
    run.state.unlink()  # what the message says
    with runs.occupied(run, "model", "data"):
        assert runs.state_of(run.path).state == "running"


def test_a_machine_that_is_silent_for_minutes_is_named_and_its_run_taken_over(tmp_path: Path) -> None:
    run = left_by(tmp_path / "run", 400, **ELSEWHERE)
    assert "far-away, which was last heard of 7 minutes ago" in (runs.require_free(run) or "")
    listed = tunesmith("runs", tmp_path, "--json").json["runs"][0]
    assert listed["state"] == "silent" and "can not be seen here" in listed["reason"]
    with runs.occupied(run, "model", "data"):
        pass
    assert runs.state_of(run.path).state == "done"


def test_a_run_says_every_few_seconds_that_it_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_BEAT_SECONDS", 0.1)
    run = left_by(tmp_path / "run")
    with runs.occupied(run, "model", "data"):
        first = json.loads(run.state.read_text())["heard"]
        until = time.monotonic() + 30
        while json.loads(run.state.read_text())["heard"] == first and time.monotonic() < until:
            time.sleep(0.1)
        assert json.loads(run.state.read_text())["heard"] > first
    last = run.state.read_bytes()
    time.sleep(0.3)
    assert run.state.read_bytes() == last


def test_time_of_work_is_added_up_and_the_beginning_stays(tmp_path: Path) -> None:
    run = left_by(tmp_path / "run")
    with runs.occupied(run, "model", "data") as tell:
        tell(work_ended=True, state="interrupted")
    before = json.loads(run.state.read_text())
    run.state.write_text(json.dumps({**before, "began": "2026-01-01T00:00:00+00:00", "seconds": 3600.5}))
    with runs.occupied(run, "model", "data") as tell:
        seconds = tell(work_ended=True)
    state = runs.state_of(run.path)
    assert state.began == "2026-01-01T00:00:00+00:00"
    assert 3600.5 <= state.seconds == seconds  # what is written down afterwards is not counted


@pytest.mark.parametrize("text", ["", "\0" * 200, "[]", '{"state": "asleep"}', '{"state": "running", "pi'])
def test_a_torn_state_is_that_of_a_run_of_which_nothing_is_known(tmp_path: Path, text: str) -> None:
    run = left_by(tmp_path / "run")
    run.state.write_text(text)
    assert runs.state_of(run.path).state == "gone"


def test_a_folder_without_runs_is_an_empty_list(tmp_path: Path) -> None:
    assert tunesmith("runs", tmp_path / "nowhere", "--json").json == {"runs": []}
    assert "No runs" in tunesmith("runs", tmp_path).out


def test_a_detached_run_outlives_the_terminal_and_can_be_watched(
    tiny_model: Path,
    talk: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    arguments = [*flags_of(tiny_model, talk, **{"train.epochs": 200}), "--out", out, "--detach"]
    shell = tunesmith("train", *arguments)
    assert shell.code == 0, shell.err
    told = shell.json
    pid = told["pid"]
    assert os.getsid(pid) == pid  # a session of its own: the terminal's end is not its own
    assert states(tmp_path) == {"run": "running"}
    watching = start("watch", out)
    time.sleep(1)
    os.kill(pid, signal.SIGTERM)
    said, errors = watching.communicate(timeout=120)
    assert watching.returncode == 130, errors
    assert "step" in said and "held-out" in said and "interrupted" in said
    assert states(tmp_path) == {"run": "interrupted"}
    assert "Stopping after this step" in (out / rundir.OUTPUT).read_text()


def test_a_detached_run_that_can_not_begin_says_so_at_once(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    arguments = [*flags_of(tiny_model, talk), "--set", "train.scheduler=nonsense"]
    ended = tunesmith("train", *arguments, "--out", tmp_path / "run", "--detach")
    assert ended.code == 2 and "train.scheduler" in ended.err


PIECES = st.lists(st.sampled_from([b'{"step": 1}\n', b'{"step": 2, "x', b'": 1}\n', b"\n", b"\0\0", b"[2]\n", b"torn"]))


@given(PIECES, st.integers(0, 6))
def test_a_file_that_grows_gives_each_line_once(pieces: list[bytes], rewritten: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, read = Path(folder) / "metrics.jsonl", list[dict[str, Any]]()
        growing = rundir.Growing(path)
        assert growing.new() == [] and rundir.last_line(path) is None
        for number, piece in enumerate(pieces):
            if number == rewritten and path.exists():  # as a run does that goes on
                rundir.write_lines(path, rundir.read_lines(path))
                read.clear()
            with path.open("ab") as file:
                file.write(piece)
            read += growing.new()
            assert read == rundir.read_lines(path)
            assert rundir.last_line(path) == (read[-1] if read else None)


def test_the_last_line_is_found_where_it_is_long_and_where_much_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "notes": ["x" * 200_000]}) + "\n")
    assert (rundir.last_line(path) or {})["step"] == 1
    with path.open("ab") as file:
        file.write(b"\0" * 200_000 + b"torn\n")
    assert (rundir.last_line(path) or {})["step"] == 1


@pytest.mark.parametrize("line", ['{"a": 1}', '{"step": "x", "loss": 1}', '{"step": 3, "loss": null}', '{"step": 2}'])
def test_lines_that_are_none_of_ours_are_read_over(undisturbed: Run, tmp_path: Path, line: str) -> None:
    run = shutil.copytree(undisturbed.path, tmp_path / "run")
    for name in ("metrics.jsonl", "held_out.jsonl"):
        with (run / name).open("a") as file:
            file.write(line + "\n")
    for command in (("watch", run), ("runs", tmp_path)):
        ended = tunesmith(*command)
        assert ended.code == 0, ended.err
        assert "Traceback" not in ended.out + ended.err
