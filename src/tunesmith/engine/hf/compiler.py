"""The C compiler that Triton needs before it runs its first kernel on a card.

Triton writes a small module in C that starts its kernels, and compiles it with what CC names, gcc or clang, against
Python's headers (https://github.com/triton-lang/triton/blob/v3.7.0/python/triton/runtime/build.py).
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from tunesmith.language import said


def lacking() -> str | None:
    """What keeps Triton from compiling on this machine; None where nothing is known to. Looked for on Linux alone:
    Triton for Windows brings a compiler of its own."""
    if not sys.platform.startswith("linux"):
        return None
    wanted = [name] if (name := os.environ.get("CC")) else ["gcc", "clang"]
    if not any(map(shutil.which, wanted)):
        return said("no C compiler ({names})", names=", ".join(wanted))
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return said("no headers of Python {version}", version=f"{sys.version_info.major}.{sys.version_info.minor}")
    return None


def fix() -> str:
    """What mends it."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return said(
        "Install what is missing, on Debian and Ubuntu with: {command}", command=f"apt install gcc python{version}-dev"
    )
