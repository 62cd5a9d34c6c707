"""Windows gets one sentence; on macOS nothing is imported or named that only Linux has. Both are played on Linux, by
hiding what the other system lacks, so what really happens there is not seen here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conftest import ROOT
from test_layers import modules

# What other people's packages import of the real system comes first.
LIGHT = "filelock jinja2 psutil pydantic rich.console typer yaml"
ALL = f"{LIGHT} accelerate fastapi huggingface_hub numba.extending numpy peft pyarrow torch transformers uvicorn"
PLAY = """
import importlib, importlib.abc, importlib.util, mmap, os, signal, sys

for name in sys.argv[1].split():
    importlib.import_module(name)

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def play(platform, hidden, removed):
    sys.platform = platform
    Hidden.names = hidden
    sys.meta_path.insert(0, Hidden())
    for name in hidden:
        sys.modules.pop(name, None)
    for module, names in removed.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    assert not any(name.startswith("tunesmith") for name in sys.modules)
"""
WINDOWS = """
play("win32", {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp"},
     {signal: ["SIGHUP", "SIGKILL", "SIGALRM"], os: ["fork", "sched_getaffinity", "getuid", "setsid", "sysconf"]})
"""
MACOS = """
linux_only = {
    os: [n for n in dir(os) if n.startswith(("sched_", "memfd_", "MFD_", "posix_fadvise", "POSIX_FADV", "eventfd",
                                             "EFD_", "timerfd_", "TFD_", "pidfd_", "splice", "getrandom", "setns",
                                             "unshare", "O_PATH", "getxattr", "setxattr", "listxattr"))],
    mmap: [n for n in dir(mmap) if n in ("MAP_POPULATE", "MAP_HUGETLB") or n in (
        "MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "MADV_DONTFORK", "MADV_REMOVE", "MADV_DONTDUMP")],
    signal: ["SIGRTMIN", "SIGRTMAX", "SIGPWR", "SIGSTKFLT", "SIGPOLL"],
}
import resource
linux_only[resource] = ["prlimit", "RLIMIT_OFILE", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_RTPRIO"]
play("darwin", {"spwd", "ossaudiodev"}, linux_only)
"""


def played(system: str, code: str, third: str = LIGHT) -> subprocess.CompletedProcess[str]:
    script = PLAY + system + code
    return subprocess.run(
        [sys.executable, "-c", script, third], cwd=ROOT / "tests", capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "entry", ["from tunesmith.cli import main; main()", "import runpy; runpy.run_module('tunesmith')"]
)
def test_on_windows_a_command_says_one_sentence_and_ends_with_2(entry: str) -> None:
    ended = played(WINDOWS, f"sys.argv = ['tunesmith', 'doctor']\n{entry}")
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr and "WSL" in ended.stderr and "Windows" in ended.stderr
    assert ended.stdout == ""


def test_on_windows_the_library_says_so_too() -> None:
    ended = played(WINDOWS, "import tunesmith\ntry: tunesmith.train\nexcept ImportError as error: print(error)")
    assert ended.stdout.startswith("this system: found Windows; expected Linux or macOS. Use WSL"), ended.stderr


def test_the_play_hides_what_windows_lacks() -> None:
    assert "No module named 'fcntl'" in played(WINDOWS, "import tunesmith.runs.rundir").stderr


def test_every_module_is_imported_without_what_only_linux_has() -> None:
    """And what is asked of the system when a command begins. The modules of AMX are imported where a processor has it
    alone: LLVM would end the process."""
    amx = ("engine.cpu.amx_products", "engine.cpu.amx_attention")
    names = [f"tunesmith.{name}" for name in modules() if name not in ("__main__", "__init__", *amx)]
    ended = played(
        MACOS,
        f"for name in {names}: importlib.import_module(name)\n"
        "from pathlib import Path\n"
        "from tunesmith import system, machines, confined\n"
        "from tunesmith.cli import console\n"
        "console.start(False, True)\n"
        "assert system.cores() == os.cpu_count() and system.memory(Path('/nowhere')).free > 0\n"
        "assert machines.this_machine().available_bytes > 0 and confined.confined(lambda: 3) == 3\n"
        "print('all')",
        ALL,
    )
    assert ended.stdout == "all\n", ended.stderr
