"""Commands as processes of their own that need not import everything anew: they are forked from one that has.

A fresh process spends seven of its eight seconds importing torch, transformers and peft. Here the imports are done once
per test worker; each command is a fork that has read nothing else, runs the command line's `main`, or a script, with
its own arguments, environment, folder, standard output and standard error, and ends with its exit code. What an import
itself does is for a fresh process to show.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from select import select
from types import TracebackType
from typing import IO, NoReturn

# What the command line itself sets before it imports anything.
BEFORE_IMPORTS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "GOMP_SPINCOUNT": "3000",
}

OWN = (
    "cli.demo",
    "cli.display",
    "cli.doctor",
    "cli.talk",
    "engine.cpu.kernels",
    "evaluation.evaluate",
    "export",
    "training.run",
)
OTHERS = (
    *("numpy.ma", "pyarrow.compute", "pydantic.type_adapter", "torch.profiler._cupti_monitor"),
    *("transformers.models.llama.modeling_llama", "typer._adapters"),
)
"""What the commands import when they are called. Not optuna, which a test hides."""
SAMPLE_TOKENS = 8
"""Of the replies before and after a training: with all 96 they are a third of what a small one costs."""

Streams = tuple[int, int, int]


class Forked:
    """A command that was forked: what `subprocess.Popen` offers, as far as tests ask for it."""

    peak_bytes = 0
    """The most memory that it, which has ended, and those that it waited for took; what was imported counts."""

    def __init__(self, address: str, request: dict[str, object], streams: Streams | None, typed: str) -> None:
        self._open = ExitStack()  # until it has been waited for
        self._out, self._err = (self._open.enter_context(_file()) for _ in range(2))
        with _file() as keys, socket.socket(socket.AF_UNIX) as connection:
            keys.write(typed)
            keys.seek(0)
            connection.connect(address)
            given = streams or (keys.fileno(), self._out.fileno(), self._err.fileno())
            socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], given)
            self._answers = self._open.enter_context(connection.makefile())
        self.pid = int(self._answers.readline() or _gone())
        self.returncode: int | None = None
        self._said = ("", "")

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal. Raises TimeoutError."""
        if self.returncode is None:
            if not select([self._answers], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} has not ended after {timeout} seconds")
            self.returncode, self.peak_bytes = map(int, (self._answers.readline() or _gone()).split())
            with self._open:
                self._out.seek(0)
                self._err.seek(0)
                self._said = self._out.read(), self._err.read()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except TimeoutError:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written to standard output and standard error until its end, where they are not the caller's."""
        self.wait(timeout)
        return self._said

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def _gone() -> NoReturn:
    raise RuntimeError("the warm process is gone")


class Warm:
    """A process that has imported everything; `start` forks it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._address = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), self._address], env={**environment, **BEFORE_IMPORTS}
        )
        while not Path(self._address).exists():
            assert self._process.poll() is None, "the warm process could not be started"
            time.sleep(0.05)

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def start(
        self,
        arguments: list[str],
        cwd: Path | None,
        environment: dict[str, str],
        *,
        streams: Streams | None = None,
        typed: str = "",
        program: Path | str | None = None,
    ) -> Forked:
        """A command, or a script of Python, or its text. Its standard input, output and error are these descriptors,
        or what is typed and files."""
        request = {
            "arguments": arguments,
            "cwd": str(cwd or Path.cwd()),
            "environment": environment,
            "code": program if isinstance(program, str) else None,
            "path": str(program) if isinstance(program, Path) else None,
        }
        return Forked(self._address, request, streams, typed)


def serve(address: str) -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from tunesmith import cli
    from tunesmith.training import run as training

    training.SAMPLE_TOKENS = SAMPLE_TOKENS
    for name in (*(f"tunesmith.{own}" for own in OWN), *OTHERS):
        with suppress(ImportError):  # not installed, or not in this version
            importlib.import_module(name)
    if numba := sys.modules.get("numba.core.registry"):  # what it reads where it first compiles
        numba.cpu_target.typing_context.refresh()
        numba.cpu_target.target_context.refresh()
    get_checkpoint_conversion_mapping("llama")  # makes those of all models, once in a process
    gc.freeze()  # no fork looks through what was imported, which would copy its pages

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)  # who sees it can connect
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the commands
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(connection, cli.main)
        connection.close()


def _attend(connection: socket.socket, main: Callable[[], object]) -> NoReturn:
    """Forks the command that a connection asks for, and tells it how that ended."""
    message, descriptors, *_ = socket.recv_fds(connection, 1 << 16, 3)
    while not message.endswith(b"\n") and (more := connection.recv(1 << 16)):
        message += more
    request = json.loads(message)
    pid = os.fork()
    if not pid:
        connection.close()  # the other end must see when the process above is gone
        for descriptor, own in zip(descriptors, (0, 1, 2), strict=True):
            os.dup2(descriptor, own)
            os.close(descriptor)  # a pipe has no other end but the command's own
        # A stream knows from its making whether it can seek, so these are made anew.
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        _enter(request["environment"], request["cwd"])
        _run(request["arguments"], request["path"], request["code"], main)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{pid}\n".encode())
    _, status, used = os.wait4(pid, 0)
    with suppress(BrokenPipeError):  # nobody waited for it
        connection.sendall(f"{os.waitstatus_to_exitcode(status)} {used.ru_maxrss << 10}\n".encode())
    os._exit(0)


def _enter(environment: dict[str, str], folder: str) -> None:
    import torch

    n_threads = environment.get("OMP_NUM_THREADS")
    if n_threads and n_threads != os.environ.get("OMP_NUM_THREADS"):  # torch has read it
        torch.set_num_threads(int(n_threads))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


def _run(arguments: list[str], path: str | None, text: str | None, main: Callable[[], object]) -> NoReturn:
    sys.argv = [path or "tunesmith", *arguments]
    code: object = 1
    try:
        if path:
            runpy.run_path(path, run_name="__main__")
        elif text:
            exec(text, {"__name__": "__main__"})
        else:
            main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # as at the end of a process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
