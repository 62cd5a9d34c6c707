"""Commands as processes of their own that need not import everything anew: they are forked from one that has.

A fresh process spends seven of its eight seconds importing torch, transformers and peft. Here the imports are done once
per test worker; each command is a fork that has read nothing else, runs the command line's `main` with its own
arguments, environment, folder, standard output and standard error, and ends with its exit code.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

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


class Warm:
    """A process that has imported everything; `run` forks it."""

    peak_bytes = 0
    """The most memory that the last command took, and the processes that it waited for; what was imported counts."""

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

    def run(
        self, arguments: list[str], cwd: Path | None, environment: dict[str, str], timeout: float, typed: str = ""
    ) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command to whose standard input something is typed."""
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as keys,
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        ):
            keys.write(typed)
            keys.seek(0)
            streams = (keys.fileno(), out.fileno(), err.fileno())
            code = self.run_with(streams, arguments, cwd, environment, timeout)
            out.seek(0)
            err.seek(0)
            return code, out.read(), err.read()

    def run_with(
        self,
        streams: tuple[int, int, int],
        arguments: list[str],
        cwd: Path | None,
        environment: dict[str, str],
        timeout: float,
    ) -> int:
        """Exit code of a command with these descriptors for standard input, output and error."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(self._address)
            request = json.dumps({"arguments": arguments, "cwd": str(cwd or Path.cwd()), "environment": environment})
            socket.send_fds(connection, [request.encode() + b"\n"], streams)
            answers = connection.makefile()
            pid = int(answers.readline() or self._died())
            try:
                code, self.peak_bytes = map(int, (answers.readline() or self._died()).split())
                return code
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise

    def _died(self) -> NoReturn:
        raise RuntimeError(f"the warm process {self._process.pid} is gone: {self._process.poll()}")


def serve(address: str) -> None:
    from tunesmith import cli

    for name in ("demo", "display", "doctor", "talk"):  # what the commands import when they are called
        importlib.import_module(f"tunesmith.{name}")

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)  # who sees it can connect
    while True:
        connection, _ = listener.accept()
        message, descriptors, *_ = socket.recv_fds(connection, 1 << 16, 3)
        while not message.endswith(b"\n") and (more := connection.recv(1 << 16)):
            message += more
        request = json.loads(message)
        pid = os.fork()
        if not pid:
            listener.close()
            connection.close()  # the other end must see when the process above is gone
            for descriptor, own in zip(descriptors, (0, 1, 2), strict=True):
                os.dup2(descriptor, own)
                os.close(descriptor)  # a pipe has no other end but the command's own
            # A stream knows from its making whether it can seek, so these are made anew.
            sys.stdin = os.fdopen(0, closefd=False)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.environ.clear()
            os.environ.update(request["environment"])
            os.chdir(request["cwd"])
            sys.argv = ["tunesmith", *request["arguments"]]
            code: object = 1
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code
            finally:
                atexit._run_exitfuncs()  # as at the end of a process
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(f"{pid}\n".encode())
        _, status, used = os.wait4(pid, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)} {used.ru_maxrss << 10}\n".encode())
        connection.close()


if __name__ == "__main__":
    serve(sys.argv[1])
