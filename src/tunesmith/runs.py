"""What runs there are and what has become of them, told by their files alone.

A run holds a lock on its folder while it is at work. The system takes the lock away when the process ends, so one that
was killed never shows as running.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith import rundir
from tunesmith.errors import RunError, TunesmithError
from tunesmith.rundir import RunDir

State = Literal["running", "done", "interrupted", "failed", "gone"]


@dataclass(frozen=True)
class RunState:
    """What the files of a run say."""

    path: Path
    state: State
    """`gone`: its process ended without a word (killed, or the machine went down)."""
    model: str
    data: str
    began: str
    """ISO 8601, UTC."""
    pid: int
    host: str
    step: int
    n_steps: int
    """0 before the first step."""
    loss: float | None
    quiet_seconds: float | None
    """Since the last step was written down."""
    reason: str
    """Why it failed."""
    exit_code: int
    """What its process ended with, or would have."""

    def as_dict(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


@contextmanager
def occupied(run: RunDir, model: str, data: str) -> Iterator[Callable[..., None]]:
    """Holds a run's folder and keeps its state.json; gives a function that tells more.

    Raises RunError when another process is at work there.
    """
    with rundir.locked(run.path):
        told: dict[str, Any] = {
            "state": "running",
            "model": model,
            "data": data,
            "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "pid": os.getpid(),
            "host": platform.node(),
            "n_steps": 0,
            "reason": "",
            "exit_code": 0,
        }

        def tell(**more: Any) -> None:
            told.update(more)
            rundir.write_json(run.state, told)

        tell()
        try:
            yield tell
        except BaseException as error:
            with suppress(RunError):  # the disk may be what failed
                if isinstance(error, KeyboardInterrupt):
                    tell(state="interrupted", exit_code=130)
                else:
                    code = error.exit_code if isinstance(error, TunesmithError) else 1
                    tell(state="failed", reason=str(error) or type(error).__name__, exit_code=code)
            raise
        if told["state"] == "running":
            tell(state="done")


def state_of(path: Path) -> RunState:
    """What has become of a run. Raises RunError where the folder is none."""
    run = rundir.open_run(path)
    told: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        told = json.loads(run.state.read_text(encoding="utf-8"))
    state: State = told.get("state", "gone")
    if rundir.is_locked(path):
        state = "running"
    elif state == "running":
        state = "gone"
    lines = rundir.read_lines(run.metrics)
    quiet = time.time() - run.metrics.stat().st_mtime if lines else None
    codes = {"running": 0, "done": 0, "interrupted": 130, "failed": told.get("exit_code", 1), "gone": 130}
    return RunState(
        path,
        state,
        told.get("model", ""),
        told.get("data", ""),
        told.get("began", ""),
        told.get("pid", 0),
        told.get("host", ""),
        step=lines[-1]["step"] if lines else 0,
        n_steps=told.get("n_steps", 0),
        loss=lines[-1]["loss"] if lines else None,
        quiet_seconds=quiet,
        reason=told.get("reason", ""),
        exit_code=codes[state],
    )


def all_in(folder: Path) -> list[RunState]:
    """The runs of a folder, and the folder itself where it is one; the newest last."""
    found: list[RunState] = []
    for path in [folder, *sorted(folder.iterdir())] if folder.is_dir() else []:
        with suppress(RunError):
            found.append(state_of(path))
    return sorted(found, key=lambda run: run.began)


def follow(path: Path, every_seconds: float = 0.3) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """New lines of a run's metrics (one or more at a time) with the number of its steps, until it ends."""
    seen = 0
    while True:
        state = state_of(path)
        lines = rundir.read_lines(RunDir(path).metrics)
        if len(lines) > seen:
            yield lines[seen:], state.n_steps
            seen = len(lines)
        if state.state != "running":
            return
        time.sleep(every_seconds)


def start_detached(arguments: Sequence[str], path: Path) -> subprocess.Popen[bytes]:
    """Starts this program anew in a session of its own, what it says going to output.log in the run's folder `path`;
    returns when it has taken the folder over.

    Raises Ended when it ends before.
    """
    with rundir.writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with (path / rundir.OUTPUT).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    while process.poll() is None:
        with suppress(RunError):
            state = state_of(path)
            if state.pid == process.pid and (state.n_steps or state.state != "running"):
                break
        time.sleep(0.1)
    if process.poll():
        said = (path / rundir.OUTPUT).read_text(encoding="utf-8", errors="replace")
        raise Ended(process.returncode, said)
    return process


class Ended(Exception):
    """A process ended as it began; `code` is its exit code, `said` what it said."""

    def __init__(self, code: int, said: str) -> None:
        self.code, self.said = code, said
        super().__init__(said)
