"""What this machine has and lacks for training, each with the one line that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from tunesmith import commands, hub, system
from tunesmith.engine import onepass, products


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `fix` is empty where nothing needs doing."""

    name: str
    found: str
    ok: bool
    fix: str = ""

    def as_dict(self) -> dict[str, str | bool]:
        return asdict(self)


def examine() -> list[Finding]:
    """Everything looked at; `ok` is false only for what keeps the demo from running."""
    return list(_findings())


def _findings() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding(
        "python",
        f"{version} at {sys.prefix}",
        sys.version_info >= (3, 11),
        "" if sys.version_info >= (3, 11) else "Install Python 3.11 or newer.",
    )
    yield Finding(
        "libraries",
        ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft")),
        True,
    )
    yield _extras()
    yield _accelerator()
    yield _memory()
    yield _cores()
    cache = hub.cache_dir()
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    yield Finding(
        "model cache",
        f"{cache}, {_gib(free)} free",
        writable and free > 2**30,
        "" if writable and free > 2**30 else "Set TUNESMITH_CACHE to a folder on a disk with more room.",
    )
    offline = os.environ.get("TUNESMITH_OFFLINE") == "1"
    yield Finding(
        "network",
        "forbidden by TUNESMITH_OFFLINE=1" if offline else "used by fetch and hub ids only",
        True,
        "" if not offline else "Unset TUNESMITH_OFFLINE to fetch models.",
    )
    here = Path(hub.cache_dir() / "models" / "smollm2").is_dir()
    yield Finding(
        "demo model", "here" if here else "not here yet", True, "" if here else commands.tunesmith("fetch", "smollm2")
    )


EXTRAS = {
    "cpu": "faster on a CPU",
    "gpu": "bases of 4 bits and Liger's kernels",
    "eval": "BLEU, chrF and a judge in `eval`",
    "export": "`export --to gguf`, compared with llama.cpp",
    "serve": "`serve`",
    "tune": "`tune`",
}
"""What can be installed beside tunesmith, and what for."""


def _extras() -> Finding:
    """What is installed of that which is only needed for some things."""
    here, lacking = list[str](), dict[str, str]()
    for extra, needed_for in EXTRAS.items():
        if extra == "gpu" and not torch.cuda.is_available():
            continue
        absent = [name for name in _packages_of(extra) if not _is_installed(name)]
        if absent:
            lacking[extra] = needed_for
        else:
            here.append(extra)
    fix = commands.pip_install(f"tunesmith[{','.join(lacking)}]")
    fix = f"For {'; '.join(lacking.values())}: {fix}" if lacking else ""
    return Finding("extras", ", ".join(here) or "none", True, fix)


def _packages_of(extra: str) -> list[str]:
    """By the metadata of the installed tunesmith, as pyproject.toml has them."""
    lines = importlib.metadata.requires("tunesmith") or []
    return [
        re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0] for line in lines if re.search(rf"extra == .{extra}\b", line)
    ]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _memory() -> Finding:
    memory = system.memory()
    fix = ""
    if memory.free <= 3 * 2**30:
        fix = f"{system.more_memory(memory.whose)}; the demo needs about 3 GiB."
    found = f"{_gib(memory.free)} of {_gib(memory.most)} free"
    if memory.whose != system.MACHINE:
        found += f", by {memory.whose} (the machine has {_gib(psutil.virtual_memory().total)})"
    return Finding("memory", found, not fix, fix)


def _cores() -> Finding:
    limit, n_threads = system.core_limit(), torch.get_num_threads()
    found = f"{system.cores()} of {os.cpu_count()}"
    if limit.whose != system.MACHINE:
        found += f", by {limit.whose}" + ("" if float(limit.count).is_integer() else f", which has {limit.count:g}")
    fix = ""
    if n_threads > system.cores():  # the command line sees to it; a program that imports tunesmith may not have
        fix = f"Call torch.set_num_threads({system.cores()}): more threads than cores only wait for each other."
    return Finding("cores", f"{found}; {n_threads} thread" + "s" * (n_threads != 1), True, fix)


def _accelerator() -> Finding:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        bits = (
            "bitsandbytes for 4-bit bases is here"
            if importlib.util.find_spec("bitsandbytes")
            else f"4-bit bases need: {commands.pip_install('tunesmith[gpu]')}"
        )
        return Finding("accelerator", f"{properties.name}, {_gib(properties.total_memory)}; {bits}", True)
    built = torch.version.cuda is not None
    found = "none; training runs on the CPU" + (" (this torch is built for CUDA but sees no GPU)" if built else "")
    if onepass.version() is None:
        faster = (
            "about twice as fast for weights published in bfloat16" if products.has_units() else "about a tenth faster"
        )
        found += f"; {faster} with: {commands.pip_install('tunesmith[cpu]')}"
    elif products.are_split():
        found += ", whose AMX is used for attention, and for weights published in bfloat16"
    has_driver = shutil.which("nvidia-smi") is not None
    return Finding(
        "accelerator",
        found,
        True,
        "Install a CUDA build of torch: there is an NVIDIA driver." if has_driver and not built else "",
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
