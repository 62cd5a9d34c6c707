"""What the operating system lets this process have: cores and memory, and whose limit it is.

A control group bounds what all processes in it take together, and lies in others that bound it too. Which ones stands
in /proc/self/cgroup, and where they can be read in /proc/self/mountinfo (cgroups(7), and the kernel's admin-guide,
cgroup-v2.rst and cgroup-v1/memory.rst). SLURM, systemd, Docker and Kubernetes set their limits there; /proc/meminfo
and the number of processors are the whole machine's all the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from tunesmith.errors import UnsupportedSystem
from tunesmith.language import marked, said

try:
    import resource
except ImportError:  # Windows
    resource = None

_ROOT = Path("/")
MACHINE = marked("the machine")


@dataclass(frozen=True)
class Memory:
    """Memory as far as one limit goes. Swap is not counted: a step that works in it takes hours."""

    free: int
    """Bytes that this process may still take."""
    most: int
    """Bytes that the limit leaves to all that it is for."""
    whose: str


@dataclass(frozen=True)
class Cores:
    """Cores as far as one limit goes."""

    count: float
    whose: str


def memory(root: Path = _ROOT) -> Memory:
    """The limit that leaves the least: the machine's, a control group's or this process's own."""
    return min(memories(root), key=lambda each: each.free)


def memories(root: Path = _ROOT) -> Iterator[Memory]:
    """Every limit of this process's memory."""
    machine = psutil.virtual_memory()
    yield Memory(machine.available, machine.total, MACHINE)
    for group, name in _groups(root, "memory"):
        stat = _table(group / "memory.stat")
        # v2: memory.high is no wall, but beyond it a process only waits. v1: the last one counts groups that can not
        # be seen from within a container.
        bounds = [_number(group / file) for file in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        bounds.append(stat.get("hierarchical_memory_limit"))
        if not (known := [bound for bound in bounds if bound is not None]):
            continue
        taken = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        # What files left in memory goes when memory is wanted. In v1 a group's own numbers are without its children's.
        cached = [stat.get(f"total_{key}", stat.get(key, 0)) for key in ("inactive_file", "active_file")]
        cached.append(stat.get("slab_reclaimable", 0))
        yield Memory(max(0, min(known) - max(0, taken - sum(cached))), min(known), name)
    if resource is not None:
        own = psutil.Process().memory_info()
        for kind, taken, whose in (
            ("RLIMIT_AS", own.vms, marked("the limit of addresses (ulimit -v)")),
            ("RLIMIT_DATA", getattr(own, "data", own.rss), marked("the limit of data (ulimit -d)")),
        ):
            bound, _ = resource.getrlimit(getattr(resource, kind))
            if bound != resource.RLIM_INFINITY:
                yield Memory(max(0, bound - taken), bound, whose)


def more_memory(whose: str) -> str:
    """What there is to do where a limit leaves too little, in half a sentence."""
    if "control group" in whose:
        return said(
            "Ask for more memory where this process was started (SLURM: --mem, Docker: --memory, Kubernetes: "
            "resources.limits.memory, systemd: MemoryMax), or end what else runs there"
        )
    return said("Raise {limit}", limit=called(whose)) if "ulimit" in whose else said("Close other programs")


def called(whose: str) -> str:
    """Whose limit it is, in the reader's language."""
    group = whose.removeprefix("the control group ")
    return said("the control group {name}", name=group) if group != whose else said(whose)


def own_bytes() -> int:
    """Memory that this process has taken and no other shares, so that `memory().free` has it no more: without the
    pages of files, which count as free."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def cores(root: Path = _ROOT) -> int:
    """Threads that can be at work at once, one at the least. Half a core more than a whole number is not counted:
    threads beyond the time that a control group has stop all of them until the next tenth of a second."""
    return max(1, int(core_limit(root).count))


def core_limit(root: Path = _ROOT) -> Cores:
    """The limit that leaves the fewest cores."""
    return min(_core_limits(root), key=lambda each: each.count)


def _core_limits(root: Path) -> Iterator[Cores]:
    yield Cores(os.cpu_count() or 1, MACHINE)
    if hasattr(os, "sched_getaffinity"):
        yield Cores(len(os.sched_getaffinity(0)), marked("this process's affinity"))
    for group, name in _groups(root, "cpu"):
        numbers = _words(group / "cpu.max")  # v2: "200000 100000" or "max 100000", microseconds
        if not numbers:
            numbers = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(numbers) == 2 and all(number.isdigit() for number in numbers) and int(numbers[1]):
            yield Cores(int(numbers[0]) / int(numbers[1]), name)


def local_processes() -> int:
    """How many processes train together on this host, as what started them says; what it has is shared out among
    them."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told)) if told.isdigit() else 1


def bound_threads() -> None:
    """Lets libraries that are loaded later start no more threads than there are cores: by themselves they know a
    process's affinity, but not the time that a control group has, and OMP_NUM_THREADS may say any number. 16 threads on
    two cores take 1.4 times the time of the processor that two take (2026-11)."""
    count, asked = max(1, cores() // local_processes()), os.environ.get("OMP_NUM_THREADS", "")
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked.isdigit() and int(asked) > count:
        os.environ["OMP_NUM_THREADS"] = str(count)
    elif not asked and count < known:
        os.environ["OMP_NUM_THREADS"] = str(min(count, psutil.cpu_count(logical=False) or count))


def refuse_windows() -> None:
    """Raises UnsupportedSystem on Windows."""
    if sys.platform == "win32":
        raise UnsupportedSystem(
            said("this system"),
            "Windows",
            said("Linux or macOS"),
            said("Use WSL, which is Linux inside of Windows: run `wsl --install` once, then install tunesmith there."),
        )


# --- control groups ---------------------------------------------------------------------------------------------------


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, str]]:
    """The folder and the name of each control group that this process is in, from its own up to the highest that can
    be seen."""
    mounts = list(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        second = number == "0" and not controllers
        if not second and controller not in controllers.split(","):
            continue
        places = [
            (root / point, _levels(path, top)) for point, top, of in mounts if (not of if second else controller in of)
        ]
        # Where it is mounted several times, the place that shows the group itself.
        places.sort(key=lambda place: not (place[0] / place[1][0][0]).is_dir())
        for point, levels in places[:1]:
            for below, name in levels:
                if (point / below).is_dir():
                    yield point / below, name


def _mounts(root: Path) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Where control groups can be read, which of them is the top there, and of which controllers; none for v2."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        where, how = before.split(" "), after.split(" ")
        if len(where) > 4 and how[0] in ("cgroup", "cgroup2"):
            top, point = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field) for field in where[3:5])
            yield point.lstrip("/"), top, () if how[0] == "cgroup2" else tuple(how[-1].split(","))


def _levels(path: str, top: str) -> list[tuple[PurePosixPath, str]]:
    """Places below a mount's top, from the group up, with their names. A group that lies outside of what is mounted
    (a container that sees its host's path, or a namespace's ..) is looked for at the top itself."""
    group, upper = PurePosixPath(path), PurePosixPath(top)
    below = PurePosixPath()
    if ".." not in (*group.parts, *upper.parts) and group.is_relative_to(upper):
        below = group.relative_to(upper)
    names = [(level, str(upper / level)) for level in (below, *below.parents)]
    return [
        (level, marked("the container's control group") if name == "/" else f"the control group {name}")
        for level, name in names
    ]


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _number(path: Path) -> int | None:
    """None where there is none: "max", or no such file."""
    words = _words(path)
    return int(words[0]) if len(words) == 1 and words[0].isdigit() else None


def _table(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
