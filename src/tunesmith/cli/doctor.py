"""What this machine has and lacks for training, each with the one line that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from tunesmith import commands, driver, extras, hub, system
from tunesmith.engine.cpu import onepass, products
from tunesmith.engine.hf import compiler
from tunesmith.errors import UnsupportedSystem
from tunesmith.language import counted, marked, said


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
        marked("python"),
        said("{version} at {folder}", version=version, folder=sys.prefix),
        sys.version_info >= (3, 11),
        "" if sys.version_info >= (3, 11) else said("Install Python 3.11 or newer."),
    )
    yield Finding(
        marked("libraries"),
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
        marked("model cache"),
        said("{folder}, {memory} free", folder=cache, memory=_gib(free)),
        writable and free > 2**30,
        "" if writable and free > 2**30 else said("Set TUNESMITH_CACHE to a folder on a disk with more room."),
    )
    offline = os.environ.get("TUNESMITH_OFFLINE") == "1"
    yield Finding(
        marked("network"),
        said("forbidden by TUNESMITH_OFFLINE=1") if offline else said("used by fetch and hub ids only"),
        True,
        "" if not offline else said("Unset TUNESMITH_OFFLINE to fetch models."),
    )
    here = Path(hub.cache_dir() / "models" / "smollm2").is_dir()
    yield Finding(
        marked("demo model"),
        said("here") if here else said("not here yet"),
        True,
        "" if here else commands.tunesmith("fetch", "smollm2"),
    )


def _extras() -> Finding:
    """What is installed of that which is only needed for some things."""
    here, lacking = list[str](), dict[str, str]()
    for extra, needed_for in extras.PURPOSES.items():
        if extra == "gpu" and not torch.cuda.is_available():
            continue
        if extras.missing(extra):
            lacking[extra] = needed_for
        else:
            here.append(extra)
    fix = commands.pip_install(f"tunesmith[{','.join(lacking)}]")
    if lacking:
        fix = said("For {uses}: {command}", uses=said("; ").join(map(said, lacking.values())), command=fix)
    return Finding(marked("extras"), ", ".join(here) or said("none"), True, fix if lacking else "")


def _memory() -> Finding:
    memory = system.memory()
    fix = ""
    if memory.free <= 3 * 2**30:
        fix = said("{how}; the demo needs about 3 GiB.", how=system.more_memory(memory.whose))
    found = said("{free} of {all} free", free=_gib(memory.free), all=_gib(memory.most))
    if memory.whose != system.MACHINE:
        whole = _gib(psutil.virtual_memory().total)
        found += said(", by {whose} (the machine has {memory})", whose=system.called(memory.whose), memory=whole)
    return Finding(marked("memory"), found, not fix, fix)


def _cores() -> Finding:
    limit, n_threads = system.core_limit(), torch.get_num_threads()
    found = said("{n} of {all}", n=system.cores(), all=os.cpu_count())
    if limit.whose != system.MACHINE:
        found += said(", by {whose}", whose=system.called(limit.whose))
        found += "" if float(limit.count).is_integer() else said(", which has {count:g}", count=limit.count)
    fix = ""
    if n_threads > system.cores():  # the command line sees to it; a program that imports tunesmith may not have
        fix = said(
            "Call torch.set_num_threads({n}): more threads than cores only wait for each other.", n=system.cores()
        )
    found = counted("{found}; {n} thread", "{found}; {n} threads", n_threads, found=found)
    return Finding(marked("cores"), found, True, fix)


def _accelerator() -> Finding:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        try:
            driver.require_kernels()
        except UnsupportedSystem as error:
            return Finding(marked("accelerator"), f"{properties.name}, {error.found}", False, error.fix)
        bits = (
            said("bitsandbytes for 4-bit bases is here")
            if importlib.util.find_spec("bitsandbytes")
            else said("4-bit bases need: {command}", command=commands.pip_install("tunesmith[gpu]"))
        )
        found, fix = f"{properties.name}, {_gib(properties.total_memory)}; {bits}", ""
        if (lack := compiler.lacking()) is not None:
            found += said("; slower, for Triton finds {lack}", lack=lack)
            fix = compiler.fix()
        return Finding(marked("accelerator"), found, True, fix)
    if (unused := driver.unused_card()) is not None:
        found = said("{card}, which is not used: {why}", card=unused.name, why=unused.why)
        return Finding(marked("accelerator"), found, True, unused.fix)
    found = said("none; training runs on the CPU")
    if onepass.version() is None:
        faster = said("about a tenth faster")
        if products.has_units():
            faster = said("about twice as fast for weights published in bfloat16")
        found += said("; {faster} with: {command}", faster=faster, command=commands.pip_install("tunesmith[cpu]"))
    elif products.are_split():
        found += said(", whose AMX is used for attention, and for weights published in bfloat16")
    return Finding(marked("accelerator"), found, True)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
