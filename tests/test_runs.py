"""Long work can be left and looked at: detached runs, their list, and what their files say of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import tunesmith
from small_runs import flags_of, settings, start, until
from tunesmith import rundir, runs
from tunesmith.errors import RunError
from tunesmith.rundir import RunDir
from tunesmith.training import train


def states(folder: Path) -> dict[str, str]:
    return {run.path.name: run.state for run in runs.all_in(folder)}


def test_what_became_of_a_run_is_told_by_its_files(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    train(settings(tiny_model, talk, **{"train.epochs": 1}), tmp_path / "done")
    process = start("train", *flags_of(tiny_model, talk, **{"train.epochs": 5000}), "--out", tmp_path / "killed")
    until(2, tmp_path / "killed", process)
    assert states(tmp_path) == {"done": "done", "killed": "running"}
    process.kill()
    process.communicate()
    assert states(tmp_path) == {"done": "done", "killed": "gone"}
    gone = runs.state_of(tmp_path / "killed")
    assert (gone.pid, gone.n_steps, gone.exit_code) == (process.pid, 45000, 130) and gone.step >= 2
    assert "killed" in tunesmith("runs", tmp_path).out
    ended = tunesmith("watch", tmp_path / "killed")
    assert ended.code == 130 and "tunesmith resume" in ended.out


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


def test_a_folder_without_runs_is_an_empty_list(tmp_path: Path) -> None:
    assert tunesmith("runs", tmp_path / "nowhere", "--json").json == {"runs": []}
    assert "No runs" in tunesmith("runs", tmp_path).out


def test_a_detached_run_outlives_the_terminal_and_can_be_watched(
    tiny_model: Path,
    talk: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    arguments = ["train", *flags_of(tiny_model, talk, **{"train.epochs": 200}), "--out", str(out), "--detach"]
    shell = subprocess.run(
        [sys.executable, "-P", "-m", "tunesmith", *arguments],
        capture_output=True, text=True, start_new_session=True, env={**os.environ, "TUNESMITH_OFFLINE": "1"},
        check=False, timeout=120,
    )  # fmt: skip
    assert shell.returncode == 0, shell.stderr
    told = json.loads(shell.stdout)
    pid = told["pid"]
    assert os.getsid(pid) == pid  # a session of its own: the terminal's end is not its own
    assert states(tmp_path) == {"run": "running"}
    watching = start("watch", out)
    time.sleep(4)
    os.kill(pid, signal.SIGTERM)
    said, errors = watching.communicate(timeout=120)
    assert watching.returncode == 130, errors
    assert "step" in said and "interrupted" in said
    assert states(tmp_path) == {"run": "interrupted"}
    assert "Stopping after this step" in (out / rundir.OUTPUT).read_text()


def test_a_detached_run_that_can_not_begin_says_so_at_once(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    arguments = [*flags_of(tiny_model, talk), "--set", "train.scheduler=nonsense"]
    ended = tunesmith("train", *arguments, "--out", tmp_path / "run", "--detach")
    assert ended.code == 2 and "train.scheduler" in ended.err
