"""Disks, clocks and folders that misbehave while a run is saved or gone on with: what was complete stays."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import script, tunesmith
from small_runs import assert_same, flags_of, settings
from tunesmith.runs import rundir
from tunesmith.training.run import Run, resume, train


@pytest.mark.parametrize("small_disk", [6000], indirect=True)
def test_a_disk_that_was_full_is_gone_on_with_when_there_is_room(
    tiny_model: Path, talk: Path, undisturbed: Run, small_disk: Path
) -> None:
    """The third checkpoint does not fit; the two before it are whole, and the run ends as if nothing had happened."""
    out, filler = small_disk / "run", small_disk / "filler"
    code = f"""
from pathlib import Path
from small_runs import settings
from tunesmith.training.trainer import Watcher
from tunesmith.training.run import train
class Fills(Watcher):
    def stepped(self, metrics, n_steps):
        if metrics.step == 8:
            with open({str(filler)!r}, "wb", buffering=0) as file:
                try:
                    while file.write(b"0" * 4096):
                        pass
                except OSError:
                    pass
train(settings(Path({str(tiny_model)!r}), Path({str(talk)!r})), Path({str(out)!r}), watcher=Fills())
"""
    ended = script(code)
    assert ended.code == 1 and "RunError" in ended.err and "disk" in ended.err  # a script's own traceback
    assert not list(out.rglob("*.partial"))
    points = sorted(out.glob("checkpoints/*"))
    assert [point.name for point in points] == ["step-000003", "step-000006"]
    assert all(map(rundir.is_whole, points))
    again = tunesmith("resume", out, "--json")
    assert again.code == 2 and "no space left on device" in again.err
    assert all(map(rundir.is_whole, points))
    filler.unlink()
    resume(out)
    assert_same(out, undisturbed.path)


def test_a_disk_that_is_read_only_is_said(undisturbed: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed.path, out)
    shutil.rmtree(out / "adapter")
    bound = shutil.which("mount") and subprocess.run(
        ["mount", "--bind", "-o", "ro", str(out), str(out)], capture_output=True, check=False
    )
    if not bound or bound.returncode:
        pytest.skip("a read-only disk can only be mounted by root, on Linux")
    try:
        if os.access(out, os.W_OK):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(out)], check=True)
        ended = tunesmith("resume", out, "--json")
    finally:
        subprocess.run(["umount", str(out)], check=True)
    assert ended.code == 2 and "read-only file system" in ended.err and "Traceback" not in ended.err
    assert all(map(rundir.is_whole, out.glob("checkpoints/*")))
    resume(out)
    assert_same(out, undisturbed.path)


def test_a_clock_that_goes_backwards_changes_nothing(
    tiny_model: Path, talk: Path, undisturbed: Run, tmp_path: Path
) -> None:
    """Checkpoints are told apart by their step, never by their time; minutes are counted on another clock."""
    out = tmp_path / "run"
    backwards = (
        "import time; from tunesmith import cli; real = time.time; time.time = lambda: 2 * 1.7e9 - real(); cli.main()"
    )
    flags = flags_of(tiny_model, talk)
    ended = script(backwards, "train", *flags, "--out", out)
    assert ended.code == 0, ended.err
    points = sorted(out.glob("checkpoints/*"))
    os.utime(points[0], (4e9, 4e9))
    shutil.rmtree(points[-1])
    shutil.rmtree(out / "adapter")
    (out / "report.html").unlink()
    ended = script(backwards, "resume", out)
    assert ended.code == 0, ended.err
    assert_same(out, undisturbed.path)


def test_a_data_file_that_is_gone_or_another_is_named(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    shutil.copyfile(talk, data)
    train(settings(tiny_model, data, **{"train.epochs": 1}), out)
    data.write_text(talk.read_text() + '{"instruction": "One more.", "output": "Yes."}\n')
    ended = tunesmith("resume", out, "--set", "train.epochs=2", "--json")
    assert ended.code == 2 and "another state of the data" in ended.err
    data.unlink()
    ended = tunesmith("resume", out, "--set", "train.epochs=2", "--json")
    assert ended.code == 2 and str(data) in ended.err
