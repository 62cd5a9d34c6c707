"""What runs there are and what has become of them, told by their files alone.

A run holds a lock on its folder while it is at work. The system takes the lock away when the process ends, so on the
same machine one that was killed never shows as running. Another machine does not see the lock; for that one the run's
state.json says who is at work, and every few seconds that it still is.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from tunesmith import commands, hub
from tunesmith.errors import RunError, TunesmithError
from tunesmith.language import said
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.spelling import alike

State = Literal["running", "done", "interrupted", "failed", "gone", "silent"]
FOLDER = Path("runs")
"""Where a run lies that is asked for by its name alone."""

_BEAT_SECONDS = 10
_SILENT_AFTER_SECONDS = 300


@dataclass(frozen=True)
class RunState:
    """What the files of a run say."""

    path: Path
    state: State
    """`gone`: its process ended without a word (killed, or the machine went down). `silent`: it ran on another machine
    and has not been heard of for minutes; whether it is at work can not be known here."""
    model: str
    data: str
    began: str
    """When first begun; ISO 8601, UTC."""
    seconds: float
    """Of work, over all times that it was gone on with."""
    pid: int
    host: str
    step: int
    n_steps: int
    """0 before the first step."""
    loss: float | None
    quiet_seconds: float | None
    """Since the last step was written down."""
    heard_seconds: float | None
    """Since its process last said that it is at work; None where it does not say so any more."""
    reason: str
    """Why it failed, or what is not known of it."""
    exit_code: int
    """What its process ended with, or would have."""

    def as_dict(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


@contextmanager
def occupied(run: RunDir, model: str, data: str) -> Iterator[Callable[..., float]]:
    """Holds a run's folder and keeps its state.json; gives a function that tells more, and returns the seconds of work
    with those from before the run was gone on with: so far, or up to when it was told `work_ended`.

    Raises RunError when another process is at work there.
    """
    require_free(run)
    with rundir.locked(run.path):
        earlier, since, until = _told(run), time.monotonic(), None
        told: dict[str, Any] = {
            "state": "running",
            "model": model,
            "data": data,
            "began": earlier["began"] or _now().isoformat(timespec="seconds"),
            "pid": os.getpid(),
            "host": platform.node(),
            **_where(),
            "n_steps": 0,
            "reason": "",
            "exit_code": 0,
        }
        ended, one_at_a_time = threading.Event(), threading.Lock()

        def tell(*, work_ended: bool = False, **more: Any) -> float:
            nonlocal until
            with one_at_a_time:
                now = time.monotonic()
                until = now if work_ended else until
                seconds = round(earlier["seconds"] + (now if until is None else until) - since, 3)
                told.update(more, heard=_now().isoformat(timespec="seconds"), seconds=seconds)
                try:
                    rundir.write_json(run.state, told)
                except RunError:
                    if told["state"] == "running":
                        raise
                    rundir.write_over(run.state, told)  # a disk that is full still says why a run has ended
            return seconds

        def beat() -> None:
            while not ended.wait(_BEAT_SECONDS):
                with suppress(OSError):  # what is wrong with the disk is said by what has more to write
                    tell()

        tell()
        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
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
        finally:
            ended.set()
            beating.join()
        if told["state"] == "running":
            tell(state="done")


def require_free(run: RunDir) -> str | None:
    """Raises RunError where a process is at work in a run's folder, or may be; says in a sentence what else speaks
    for it, where there is something."""
    told = _told(run)
    state, heard = _state(run, told)
    if state == "running" and not rundir.is_locked(run.path):  # else who wants to lock it is told so
        fix = said(
            "Stop it there. If that machine is gone, wait until it has been silent for {n} minutes, or delete {file}.",
            n=_SILENT_AFTER_SECONDS // 60,
            file=run.state,
        )
        found = said("a process at work in it on {host} ({ago})", host=told.get("host"), ago=_ago(heard))
        raise RunError(str(run.path), found, said("one at a time"), fix)
    if state != "silent":
        return None
    return said("{silence} It is taken for ended.", silence=_silence(told, heard))


def require_finished(run: RunDir) -> None:
    """Raises RunError where there is no adapter, with what has become of the run and how to go on."""
    if run.adapter.is_dir():
        return
    state = state_of(run.path)
    found = {
        "running": said("no adapter/: the run is training, now"),
        "done": said("no adapter/: the run is done, and has lost it since"),
        "interrupted": said("no adapter/: the run was interrupted"),
        "failed": said("no adapter/: the run failed ({reason})", reason=state.reason),
        "gone": said("no adapter/: the run was killed"),
        "silent": said("no adapter/: the run is silent ({reason})", reason=state.reason),
    }[state.state]
    if state.n_steps and state.state != "done":
        found += said(" at step {step:,} of {n:,}", step=state.step, n=state.n_steps)
    what_for, command = said("Go on with it"), "resume"
    if state.state == "running":
        what_for, command = said("Wait for it"), "watch"
    fix = said("{what_for}: {command}", what_for=what_for, command=commands.tunesmith(command, run.path))
    raise RunError(str(run.path), found, said("a finished run"), fix)


# --- which run is meant -----------------------------------------------------------------------------------------------

_TOLD = 5
"""How many runs are named where the one that was asked for is none."""


def find(given: str | os.PathLike[str]) -> Path | None:
    """The folder of the run that is meant by its path, by that of its adapter/, or by its name in `runs/`; None where
    there is none."""
    for path in (Path(given), FOLDER / given):
        run = path.parent if path.name == "adapter" else path
        if _is_run(run):
            return run
    return None


def named(given: str | os.PathLike[str]) -> Path:
    """As `find`; where there is a folder that is no run, that, so that who opens it says what it lacks. Raises RunError
    where there is nothing."""
    if found := find(given):
        return found
    if Path(given).exists():
        return Path(given)
    raise _nothing(given, said("a run"))


def named_or_model(given: str | os.PathLike[str]) -> Path | None:
    """As `find`; None where a model is meant. Raises RunError for a name that is neither: no hub is asked for what is
    looked for in `runs/`, or in another folder with runs."""
    name, folder = os.fspath(given), Path(given).parent
    found = find(given)
    among_runs = folder == FOLDER or (folder != Path() and _names(folder))
    if found or (hub.may_have(name) and not among_runs) or Path(name).expanduser().exists():
        return found
    raise _nothing(given, said("a model (its alias, its folder or a hub's org/name) or a run"), list(hub.aliases()))


def _nothing(given: str | os.PathLike[str], expected: str, others: Sequence[str] = ()) -> RunError:
    """What to say to a name that is nothing's: what is like it, and the newest runs where it was looked for."""
    name = os.fspath(given)
    folders = (FOLDER, Path()) if Path(name).parent == Path() else (Path(name).parent, FOLDER)
    folder, names = next(((folder, names) for folder in folders if (names := _names(folder))), (FOLDER, []))
    near = alike(Path(name).name, [*names, *others])
    meant = (commands.line(folder / one if one in names else one) for one in near)
    fix = said("Did you mean {name}?", name=said(" or ").join(meant)) + " " if near else ""
    if not names:
        fix += said(
            "There is no run in {folder}; one is made by: {command}",
            folder=FOLDER.absolute(),
            command=commands.tunesmith("demo"),
        )
        return RunError(name, said("nothing of that name"), expected, fix)
    told = ", ".join(map(commands.line, names[:_TOLD]))
    told += said(", and {n:,} older ones", n=len(names) - _TOLD) if len(names) > _TOLD else ""
    fix += said(
        "The runs are listed by: {command}",
        command=commands.tunesmith("runs", *([] if folder == FOLDER else [folder])),
    )
    return RunError(
        name,
        said("nothing of that name"),
        said("{expected}; in {folder} there are {told}", expected=expected, folder=folder, told=told),
        fix,
    )


def _is_run(path: Path) -> bool:
    """There is what a run leaves, if not all of it: `resume` mends one that has lost its manifest."""
    return any((path / name).exists() for name in ("manifest.json", "checkpoints"))


def _names(folder: Path) -> list[str]:
    """The names of a folder's runs, the newest first."""
    try:
        began = {path.name: path.stat().st_mtime for path in folder.iterdir() if _is_run(path)}
    except OSError:
        return []
    return sorted(began, key=began.__getitem__, reverse=True)


def check_resumable(path: Path) -> None:
    """Raises RunError for a folder without a run, or one in which a process is at work."""
    run = RunDir(path)
    if not run.checkpoints.is_dir():
        rundir.open_run(path)
    require_free(run)
    with rundir.locked(path):
        pass


def state_of(path: Path) -> RunState:
    """What has become of a run. Raises RunError where the folder is none."""
    run = rundir.open_run(path)
    told = _told(run)
    state, heard = _state(run, told)
    last = rundir.last_line(run.metrics)
    last = last if last and _holds(last, ("step", "loss")) else None
    quiet = time.time() - run.metrics.stat().st_mtime if last else None
    codes = {"running": 0, "done": 0, "failed": told.get("exit_code", 1)}
    return RunState(
        path,
        state,
        told["model"],
        told["data"],
        told["began"],
        told["seconds"],
        told["pid"],
        told["host"],
        step=last["step"] if last else 0,
        n_steps=told["n_steps"],
        loss=last["loss"] if last else None,
        quiet_seconds=quiet,
        heard_seconds=heard,
        reason=_silence(told, heard) if state == "silent" else told["reason"],
        exit_code=codes.get(state, 130),
    )


def _told(run: RunDir) -> dict[str, Any]:
    """What state.json says; that of a run of which nothing is known where it is torn, or not there."""
    nothing = {"state": "gone", "model": "", "data": "", "began": "", "seconds": 0.0, "pid": 0, "host": ""}
    nothing |= {"n_steps": 0, "reason": ""}
    with suppress(OSError, ValueError, RecursionError):
        told = json.loads(run.state.read_text(encoding="utf-8"))
        if isinstance(told, dict) and told.get("state") in get_args(State):
            like = {n: value for n, value in told.items() if isinstance(value, type(nothing.get(n, value)))}
            return {**nothing, **like}
    return nothing


def _state(run: RunDir, told: Mapping[str, Any]) -> tuple[State, float | None]:
    """What a run's process does, as far as it can be known here, and the seconds since it was last heard of."""
    if held := rundir.is_locked(run.path):
        return "running", None
    if told["state"] != "running":
        return told["state"], None
    here, heard = _where(), None
    with suppress(KeyError, ValueError, TypeError):
        heard = (_now() - datetime.datetime.fromisoformat(told["heard"])).total_seconds()
    if heard is None or told.get("boot") == here["boot"]:  # without a word when, it is of an older version
        same = heard is None or told.get("processes") == here["processes"]
        if held is False and (same or _is_local(run.path)):
            return "gone", heard
        if same:
            return "running" if psutil.pid_exists(told["pid"]) else "gone", heard
    elif here["machine"] and told.get("machine") == here["machine"]:
        return "gone", heard  # the machine was started anew since then
    return "silent" if heard is not None and heard > _SILENT_AFTER_SECONDS else "running", heard


def _where() -> dict[str, str]:
    """Where this process is: the machine, its start, and the numbers among which that of this process is one; "" for
    what the system does not say."""
    name, machine = platform.node(), _text("/etc/machine-id")
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return {
        # Nobody is to be recognised by it (machine-id(5)).
        "machine": hashlib.sha256(f"tunesmith {machine} {name}".encode()).hexdigest()[:16] if machine else "",
        "boot": _text("/proc/sys/kernel/random/boot_id") or name,
        "processes": space,
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _is_local(path: Path) -> bool:
    """Whether a lock in this folder is seen in every container of the machine: other disks may be mounted in each."""
    kinds = {disk.mountpoint: disk.fstype for disk in psutil.disk_partitions(all=True)}
    at = next(str(parent) for parent in (path.resolve() / "x").parents if str(parent) in kinds or parent.name == "")
    return kinds.get(at) in ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _ago(seconds: float | None) -> str:
    if seconds is None or seconds < 0:
        return said("heard of just now")
    if seconds < 120:
        return said("heard of {n} s ago", n=round(seconds))
    return said("last heard of {n} minutes ago", n=round(seconds / 60))


def _silence(told: Mapping[str, Any], seconds: float | None) -> str:
    return said(
        "It was at work on {host}, which was {ago}; whether it still is can not be seen here.",
        host=told["host"],
        ago=_ago(seconds),
    )


def all_in(folder: Path) -> list[RunState]:
    """The runs of a folder, and the folder itself where it is one; the newest last."""
    found: list[RunState] = []
    for path in [folder, *sorted(folder.iterdir())] if folder.is_dir() else []:
        with suppress(RunError):
            found.append(state_of(path))
    return sorted(found, key=lambda run: run.began)


@dataclass(frozen=True)
class News:
    """What a run has written down since it was last looked at."""

    metrics: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    n_steps: int


_NUMBERS = (
    (
        *("step", "epoch", "loss", "learning_rate", "grad_norm", "supervised_tokens", "tokens", "seconds"),
        "peak_memory_bytes",
    ),
    ("step", "loss"),
)
"""Of a line of metrics.jsonl and of held_out.jsonl; a line without them is not one of ours, and is read over."""


def _holds(line: Mapping[str, Any], numbers: Sequence[str]) -> bool:
    return all(isinstance(line.get(name), int | float) for name in numbers)


def follow(path: Path, every_seconds: float = 0.3) -> Iterator[News]:
    """What is new in a run, each step once, until it ends."""
    files = [rundir.Growing(file) for file in (RunDir(path).metrics, RunDir(path).held_out)]
    seen = [-1, -1]  # steps are written again by a run that has gone on from an earlier one
    while True:
        state = state_of(path)
        new = [
            [line for line in file.new() if _holds(line, numbers) and line["step"] > step]
            for file, numbers, step in zip(files, _NUMBERS, seen, strict=True)
        ]
        seen = [lines[-1]["step"] if lines else step for lines, step in zip(new, seen, strict=True)]
        if any(new):
            yield News(new[0], new[1], state.n_steps)
        if state.state != "running":
            return
        time.sleep(every_seconds)


def start_detached(arguments: Sequence[str], path: Path) -> subprocess.Popen[bytes]:
    """Starts this program anew in a session of its own, what it says going to output.log in the run's folder `path`;
    returns when it has taken the folder over.

    Raises Ended when it ends before.
    """
    with rundir.writing(path):
        rundir.open_to_owner(path)
        with open(path / rundir.OUTPUT, "ab", opener=rundir.private) as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tunesmith", *arguments],
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
