"""The folder of a run: what lies where, and how it is written so that a name on disk means that it is whole.

It holds private rows, so whatever the umask says it is its owner's alone, but for adapter/: who is given the path of
that can read it, and can not list what lies beside it.

RUN/recipe.yaml  manifest.json  ledger.jsonl  held_out_rows.jsonl  rehearsal.jsonl  metrics.jsonl  held_out.jsonl
RUN/state.json  report.html
RUN/checkpoints/step-000100/    RUN/adapter/
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith import commands, reading
from tunesmith.errors import RunError, TunesmithError
from tunesmith.language import marked, said
from tunesmith.terminal import what_is_no_text

_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
    errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip


OUTPUT = "output.log"
"""What a detached run says; it is there before the run."""


@dataclass(frozen=True)
class RunDir:
    """The paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def held_out(self) -> Path:
        return self.path / "held_out.jsonl"

    @property
    def held_out_rows(self) -> Path:
        return self.path / "held_out_rows.jsonl"

    @property
    def rehearsal(self) -> Path:
        return self.path / "rehearsal.jsonl"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06}"

    def points(self) -> list[Path]:
        """Its checkpoints, whole or not, by the number of their step."""
        return sorted(filter(step_of, self.checkpoints.glob("step-*")), key=step_of)

    def append(self, path: Path, line: Mapping[str, Any]) -> None:
        """One more line of JSON; readers of the file never see half of it."""
        with writing(self.path), open(path, "a", encoding="utf-8", opener=private) as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def step_of(point: Path) -> int:
    """The step of a checkpoint by its name, which has six digits or more; 0 where it is none."""
    return int(match[1]) if (match := re.fullmatch(r"step-([0-9]+)", point.name)) else 0


def open_to_owner(path: Path) -> None:
    """Makes a run's folder where there is none. Its owner alone can list it; others can pass, to adapter/."""
    path.mkdir(parents=True, exist_ok=True)
    with suppress(PermissionError):  # a disk without modes, or a folder that somebody else made for us
        path.chmod(0o711)


def private(path: str, flags: int) -> int:
    """An opener for `open`: what it makes is its owner's alone."""
    return os.open(path, flags, 0o600)


def free_name(parent: Path, stem: str) -> Path:
    """`parent/stem`, or with the first number behind it that is free."""
    number = 1
    while (path := parent / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return path


def check_target(path: Path) -> None:
    """Raises RunError unless a new folder can be made at `path`; writes nothing."""
    if found := what_is_no_text(str(path)):  # the library that writes tokenizers opens no such path
        raise RunError(str(path), found, said("a name in UTF-8"), said("Choose another --out."))
    with writing(path):
        if path.exists() and (not path.is_dir() or any(file.name != OUTPUT for file in path.iterdir())):
            found, fix = said("a file"), said("Choose another --out.")
            if path.is_dir():
                found = said("a folder that is not empty")
            if RunDir(path).manifest.is_file() and not RunDir(path).report.is_file():
                go_on = commands.tunesmith("resume", path)
                found = said("a run that is not finished")
                fix = said("Choose another --out, or go on with it: {command}", command=go_on)
            raise RunError(str(path), found, said("a new or empty folder"), fix)
        parent = next(p for p in [path, *path.absolute().parents] if p.exists())
        if not parent.is_dir():
            found = said("{path}, which is a file", path=parent)
            raise RunError(str(path), found, said("a folder to write into"), said("Choose another --out."))
        if not os.access(parent, os.W_OK | os.X_OK):
            found = said("{path}, which can not be written to", path=parent)
            raise RunError(str(path), found, said("a folder of yours"), said("Choose another --out."))


def create(path: Path, needed_bytes: int = 0) -> RunDir:
    """A new run folder; raises RunError when it can not be made or `needed_bytes` do not fit on its disk."""
    check_target(path)
    require_space(path, needed_bytes)
    with writing(path):
        open_to_owner(path)
    return RunDir(path)


def require_space(path: Path, needed_bytes: int) -> None:
    """Raises RunError when `needed_bytes` do not fit on the folder's disk, with what stands there already."""
    existing = next(p for p in [path, *path.absolute().parents] if p.exists())
    there = sum(file.stat().st_size for _, file in _files(path)) if path.exists() else 0
    free = shutil.disk_usage(existing).free
    if free + there < needed_bytes:
        raise RunError(
            str(path),
            said("{size} free on the disk", size=_megabytes(free)),
            said("{size} for adapter and checkpoints", size=_megabytes(needed_bytes - there)),
            said("Free some space, keep fewer of them (train.keep_checkpoints), or choose another --out."),
        )


def open_run(path: Path) -> RunDir:
    """The folder of a finished or interrupted run; raises RunError when it is none, or somebody else's."""
    run = RunDir(path)
    if not run.manifest.is_file() or not run.recipe.is_file():
        listing = commands.tunesmith("runs", path.absolute().parent)
        fix = said("The runs of a folder are listed by: {command}", command=listing)
        raise RunError(str(path), said("no manifest.json and recipe.yaml"), said("the folder of a run"), fix)
    if not all(os.access(file, os.R_OK) for file in (run.path, run.manifest, run.recipe)):
        fix = said("Ask its owner for an export, or use adapter/ alone: load_and_chat.py in it shows how.")
        raise RunError(str(path), said("a run that only its owner can read"), said("a run of yours"), fix)
    return run


def read_manifest(run: RunDir) -> dict[str, Any]:
    """What a run began with; raises RunError where the file does not say it."""
    again = commands.tunesmith("resume", run.path)
    fix = said("Delete it; that of the newest checkpoint is taken then by: {command}", command=again)
    try:
        manifest = reading.json_object(run.manifest, _MANIFEST_BYTES)
        parts = [manifest[name] for name in ("recipe", "sources", "plan", "data", "base", "template", "code")]
        if all(isinstance(part, dict) for part in parts) and Path(manifest["base"]["folder"]).is_absolute():
            return manifest
        found = said("no manifest of a run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = said("no manifest of a run ({error})", error=error)
    raise RunError(str(run.manifest), found, said("the file that the run began with"), fix)


_MANIFEST_BYTES = 64 << 20  # with the name of every file of weights


def newest_whole(run: RunDir) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that is as it was written (None: there is none), and the damaged ones after it."""
    damaged: list[Path] = []
    for point in reversed(run.points()):
        if is_whole(point):
            return point, damaged
        damaged.append(point)
    return None, damaged


def mend(run: RunDir, point: Path | None) -> None:
    """Takes a recipe or manifest that is gone from a checkpoint."""
    if point is not None:
        for path in (run.recipe, run.manifest):
            if not path.is_file():
                write_text(path, (point / path.name).read_text(encoding="utf-8"))


_LOCK_ATTEMPTS = 5  # who looks whether a folder is locked holds it for a moment
# What a disk says that has no locks; on NFS a folder's lock holds on this host alone.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the folder for this process; the system lets go of it when the process ends, however it ends. A disk
    without locks can not do that, and nothing is held there.

    Raises RunError when another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _LOCK_ATTEMPTS - 1:
                    fix = said("Watch it with: {command}", command=commands.tunesmith("watch", path))
                    found = said("another process at work in it")
                    raise RunError(str(path), found, said("one at a time"), fix) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                break
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool | None:
    """Whether a process of this machine, this one or another, holds the folder; None where the disk has no locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    finally:
        os.close(descriptor)


_FREE_SOME = marked("What was complete is still there; free some space or choose another --out.")


@contextmanager
def commit(
    final: Path, fix: str = _FREE_SOME, readers: Literal["as usual", "all", "owner"] = "as usual"
) -> Iterator[Path]:
    """A folder to write into; it takes the name `final` only when everything in it is whole and on disk.

    `files.json` with the size and SHA-256 of every file is added. On an exception nothing is left; `fix` is what to
    do where the disk is at fault. Who can read it: those whom the umask lets, or all, or its owner alone.
    """
    partial = final.with_name(f".{final.name}.partial")
    with writing(final, fix):
        shutil.rmtree(partial, ignore_errors=True)
        if readers == "owner":
            final.parent.mkdir(0o700, parents=True, exist_ok=True)
        partial.mkdir(parents=True)
        mode = {"all": 0o755, "owner": 0o700}.get(readers, partial.stat().st_mode & 0o777)
        try:
            yield partial
            digests = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in _files(partial)}
            (partial / "files.json").write_text(json.dumps(digests, indent=1) + "\n")
            for _, path in _files(partial):
                sync(path)
            sync(partial)
            with suppress(PermissionError):  # a disk without modes
                for path in (partial, *partial.rglob("*")):
                    path.chmod(mode if path.is_dir() else mode & 0o666)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def is_whole(folder: Path) -> bool:
    """Whether a committed folder holds the files it was committed with, byte for byte; names that lead out of it are
    nobody's commit."""
    try:
        digests = reading.json_object(folder / "files.json", _LIST_BYTES)
        return all(
            reading.is_beside(name)
            and (folder / name).stat().st_size == entry["bytes"]
            and sha256(folder / name) == entry["sha256"]
            for name, entry in digests.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


_LIST_BYTES = 4 << 20


@contextmanager
def writing(where: Path, fix: str = _FREE_SOME) -> Iterator[None]:
    """Turns the errors of a full or closed disk into RunError, so that a user reads what happened; `fix` is marked."""
    try:
        yield
    except Exception as error:
        reason = None if isinstance(error, TunesmithError) else _disk_problem(error)
        if reason is None:
            raise
        raise RunError(str(where), reason, said("a disk that can be written to"), said(fix)) from error


def _disk_problem(error: Exception) -> str | None:
    """What is wrong with the disk, in words; None when the error is about something else."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if match := re.search(r"\(os error (\d+)\)", text):  # safetensors, from Rust
        number = int(match[1])
    if number in _DISK_ERRORS:
        return os.strerror(number).lower()
    if "PytorchStreamWriter" in text or "inline_container" in text:  # torch.save does not say which error it was
        return said("a file that could not be written to its end (is the disk full?)")
    return None


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there as a whole or not at all."""
    _write(path, [text])


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, as a whole or not at all."""
    _write(path, [json.dumps(value, indent=2, ensure_ascii=False) + "\n"])


def write_over(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object into the room that a file has already, for a disk that has no other. Raises RunError."""
    with writing(path), path.open("r+", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
        file.truncate()


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Leaves only some of the lines of a .jsonl file; it need not exist."""
    if path.is_file():
        write_lines(path, filter(wanted, read_lines(path)))


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines, as a whole or not at all."""
    _write(path, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _write(path: Path, parts: Iterable[str]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            # A file name that is not UTF-8 holds half characters; in JSON their escape means the same.
            with open(partial, "w", encoding="utf-8", errors="backslashreplace", opener=private) as file:
                file.writelines(parts)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file of a run. Left out is what a crash leaves: an unfinished last line, NUL bytes, and
    lines that are torn in other ways."""
    return _lines(path.read_bytes()) if path.is_file() else []


def last_line(path: Path) -> dict[str, Any] | None:
    """The last of the lines that `read_lines` gives, which is found without reading the others."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            lines = _lines(file.read())
    except OSError:
        return None
    return (lines or read_lines(path) or [None])[-1]


class Growing:
    """A .jsonl file of a run to which another process goes on writing."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._inode = path, 0, 0

    def new(self) -> list[dict[str, Any]]:
        """The lines since this was last asked; all of them where the file was written anew since then."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._at:
                    self._at, self._inode = 0, status.st_ino
                file.seek(self._at)
                written = file.read()
        except OSError:
            return []
        whole = written[: written.rfind(b"\n") + 1]
        self._at += len(whole)
        return _lines(whole)


_LAST_BYTES = 1 << 16


def _lines(written: bytes) -> list[dict[str, Any]]:
    lines = []
    for text in written.split(b"\n")[:-1]:
        with suppress(ValueError, RecursionError):
            line = json.loads(text.strip(b"\0"))
            lines += [line] if isinstance(line, dict) else []
    return lines


def thin_out(run: RunDir, keep: int, best: int | None = None) -> None:
    """Deletes the oldest checkpoints but `keep`, and never that of step `best`."""
    for old in run.points()[:-keep]:
        if step_of(old) != best:
            shutil.rmtree(old)


def weights_of(folder: Path) -> dict[str, dict[str, str | int]]:
    """What says whether the weight files of a model are the same: the size of each, and the SHA-256 of its first and
    last MiB. Hashing all of them would take longer than reading them."""
    return {path.name: _ends(path) for path in sorted(folder.glob("*.safetensors"))}


def _ends(path: Path) -> dict[str, str | int]:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read())
    return {"bytes": size, "sha256_of_ends": digest.hexdigest()}


_END_BYTES = 1 << 20


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return reading.sha256(path)


def _files(folder: Path) -> list[tuple[str, Path]]:
    return sorted((str(path.relative_to(folder)), path) for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Brings a file or a folder's names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
