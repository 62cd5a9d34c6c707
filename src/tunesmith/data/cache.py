"""Rows of large files are rendered once, by all cores, and mapped from the disk from then on.

A core is a process of its own (`python -m tunesmith.data.cache`) that reads the file and renders every n-th batch of
it: reading is a small part of the work, and so nothing is sent between processes but the number of rows done.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from filelock import FileLock

from tunesmith import hub, language, system, types
from tunesmith.data import records, render, rows, template
from tunesmith.data.records import Records
from tunesmith.data.render import Renderer
from tunesmith.errors import DataError, RunError, TemplateError
from tunesmith.language import marked, said
from tunesmith.runs import rundir

LARGE = 8 * 2**20
"""Bytes of a file from which on its rows are kept; below, starting a process takes longer than rendering."""
_DAYS_KEPT = 30
# Of a process: what it takes before it works, and per byte of the pickled renderer, which is for the most part the
# tokenizer; what rows take while they are rendered, and per byte of a file that is read as a whole. Measured
# (2026-11): 78 MiB with a tokenizer of 32,000 tokens (1.3 MiB), 113 with one of 100,000 (3.0), 513 with Gemma's (25.8),
# and at work 35 to 90 more; 2 to 3 per byte of a JSON array, and 5 where it has letters
# of four bytes.
_PROCESS_BYTES, _PER_PICKLED, _AT_WORK_BYTES, _PER_READ = 60 << 20, 18, 128 << 20, 5
_SHARE_OF_MEMORY = 0.75
_FIX = marked("Free some space there, or name another place with TUNESMITH_CACHE.")


_TOO_MUCH_MEMORY = 3  # the exit code of a process whose template took it


class _Task(NamedTuple):
    """What the processes are told."""

    records: Records
    renderer: bytes
    """Pickled."""
    of: int
    folder: Path


def rendered(data: Records, renderer: Renderer, on_rows: Callable[[int], None] = lambda count: None) -> pa.Table:
    """What became of every row of the file (`rows.SCHEMA`), from the disk if it is there already.

    `on_rows` is told how many rows have been rendered so far. Raises DataError where the file as a whole can not be
    read on, RunError where the disk of `hub.cache_dir` is full or a process was killed.
    """
    if data.n_bytes < LARGE or renderer.digest is None:
        return pa.Table.from_batches(rows.render(data, renderer), rows.SCHEMA)
    kept = hub.cache_dir() / "rendered"
    folder = kept / _name(data, renderer.digest)
    with rundir.writing(kept, _FIX):
        kept.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # of several processes that train together one renders
        if not rundir.is_whole(folder):  # what a disk has damaged since would be trained on
            _forget_old(kept)
            with rundir.commit(folder, _FIX, "owner") as partial:
                _render_into(partial, data, renderer, on_rows)
        os.utime(folder)
        return _mapped(folder)


def _name(data: Records, renderer_digest: str) -> str:
    """Of everything that the rows depend on."""
    modules = [Path(str(module.__file__)) for module in (render, rows, template, types)]
    code = [path.read_bytes() for path in (*modules, *sorted(Path(str(records.__file__)).parent.glob("*.py")))]
    packages = ("jinja2", "pyarrow", "tokenizers", "transformers")
    versions = [importlib.metadata.version(name) for name in packages]
    given = (data.digest, data.format, sorted(data.columns.items()), data.system, renderer_digest)
    depends_on = (*given, versions, code, language.language())  # what is wrong with a row is said in it
    return hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]


def _render_into(folder: Path, data: Records, renderer: Renderer, on_rows: Callable[[int], None]) -> None:
    # What this process can import, the others can; the tokenizer's own threads would only be in each other's way.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "TOKENIZERS_PARALLELISM": "0",
    }
    workers: list[subprocess.Popen[bytes]] = []
    with tempfile.NamedTemporaryFile(suffix=".pickle") as task:
        pickled = pickle.dumps(renderer)
        count = _count(data, len(pickled), system.memory().free, system.cores())
        pickle.dump(_Task(data, pickled, count, folder), task)
        task.flush()
        command = [sys.executable, "-P", "-m", "tunesmith.data.cache", task.name]
        heard, told = os.pipe()
        try:
            with os.fdopen(told, "wb"):
                for number in range(count):
                    workers.append(
                        subprocess.Popen([*command, str(number)], stdout=told, env=environment, start_new_session=True)
                    )
            with os.fdopen(heard) as lines:
                done = 0
                for line in lines:
                    done += int(line)
                    on_rows(done)
            codes = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    if -signal.SIGPROF in codes:
        raise template.too_much(f"more than {template.RENDER_SECONDS} seconds")
    if _TOO_MUCH_MEMORY in codes:
        raise template.too_much("more memory than there is")
    if any(codes):
        for _ in data.rows():  # raises what is wrong with the file as a whole, if that was it
            pass
        found = said("a process that ended with {code} while it rendered rows", code=next(filter(None, codes)))
        fix = said("Look at the messages above; is memory short, or the disk of {folder} full?", folder=folder.parent)
        raise RunError(data.path, found, said("every row rendered"), fix)


def _count(data: Records, pickled_bytes: int, free_bytes: int, n_cores: int) -> int:
    """How many processes render: no more than there are cores, than there is work for, or than memory holds."""
    each = _PROCESS_BYTES + _PER_PICKLED * pickled_bytes + _AT_WORK_BYTES
    if data.format == "json":  # an array is read as a whole, by every one of them
        each += _PER_READ * data.n_bytes
    return max(1, min(n_cores, data.n_bytes // LARGE, int(free_bytes * _SHARE_OF_MEMORY) // each))


def _work(task: _Task, number: int) -> None:
    renderer: Renderer = pickle.loads(task.renderer)
    renderer.template.writer.stay()
    counts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not a count
    with pa.OSFile(str(task.folder / f"{number:04}.arrow"), "wb") as file, pa.ipc.new_file(file, rows.SCHEMA) as writer:
        for batch in rows.render(task.records, renderer, number, task.of):
            writer.write_batch(batch)
            print(batch.num_rows, file=counts, flush=True)


def _mapped(folder: Path) -> pa.Table:
    parts = [pa.ipc.open_file(pa.memory_map(str(path))) for path in sorted(folder.glob("*.arrow"))]
    total = sum(part.num_record_batches for part in parts)
    batches = [parts[i % len(parts)].get_batch(i // len(parts)) for i in range(total)]
    return pa.Table.from_batches(batches, rows.SCHEMA)


def _forget_old(kept: Path) -> None:
    for folder in kept.iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _DAYS_KEPT * 86400:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    try:
        _work(pickle.loads(Path(sys.argv[1]).read_bytes()), int(sys.argv[2]))
    except DataError:  # the one who started this finds it again and says so
        sys.exit(2)
    except TemplateError:
        sys.exit(_TOO_MUCH_MEMORY)
