"""What a training may use: the memory that is free and how fast products are, here or on a card by its name."""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from tunesmith import system
from tunesmith.errors import RecipeError
from tunesmith.language import said

Device = Literal["cpu", "cuda"]
Sixteen = Literal["bfloat16", "float16"]


@dataclass(frozen=True)
class Card:
    """A graphics card as its maker describes it."""

    name: str
    memory_bytes: int
    flops: float
    """Dense products in bf16 with fp32 sums, per second."""
    bytes_per_second: float
    """Read from its memory."""

    @property
    def sixteen_bits(self) -> Sixteen:
        return "float16" if self.name == "T4" else "bfloat16"

    def free_bytes(self, memory_bytes: int | None = None) -> int:
        """What is left of its memory (or of as much as is given) for tensors where nothing else runs on it."""
        checked = 15 / 16 if self.name in _CHECKS_ITS_MEMORY else 1
        return int((memory_bytes or self.memory_bytes) * _THERE * checked) - CONTEXT_BYTES


# What torch's messages about memory say of it (issues of many projects, 2022 to 2026): 23.64 GiB are there of the 24 of
# an RTX 4090, 31.5 of 32, 79.2 of 80; of GDDR memory with check bits 14.7 of 16 (T4) and 44.5 of 48 (L40S). Beyond what
# torch's allocator holds, a process has 0.1 GiB on a T4, 0.45 on an RTX 4090 and 0.5 on an L40S.
_THERE = 0.985
_CHECKS_ITS_MEMORY = frozenset({"T4", "A10", "L4", "L40S"})
CONTEXT_BYTES = 500 << 20

# From the maker's data sheets and architecture papers (NVIDIA Ampere GA102, Ada, Blackwell, A100, H100, H200, L4, A10).
# The 4070 and 4080 by their clocks and 512 operations a cycle for each multiprocessor, as others of their family have;
# the T4 in fp16, since it has no bf16.
CARDS = tuple(
    Card(name, gib << 30, tera * 1e12, giga * 1e9)
    for name, gib, tera, giga in (
        ("RTX 3060", 12, 25.6, 360),
        ("RTX 3090", 24, 71.0, 936),
        ("RTX 4060 Ti", 16, 44.0, 288),
        ("RTX 4070", 12, 58.3, 504),
        ("RTX 4080", 16, 97.5, 717),
        ("RTX 4090", 24, 165.2, 1008),
        ("RTX 5090", 32, 209.5, 1792),
        ("T4", 16, 65.0, 300),
        ("A10", 24, 125.0, 600),
        ("L4", 24, 121.0, 300),
        ("L40S", 48, 362.0, 864),
        ("A100", 80, 312.0, 2039),
        ("H100", 80, 989.4, 3350),
        ("H200", 141, 989.4, 4800),
    )
)


@dataclass(frozen=True)
class Machine:
    """What a training may use."""

    device: Device
    available_bytes: int
    flops: float
    """Of large matrix products, per second."""
    bytes_per_second: float
    """Of weights that are read from memory."""
    name: str
    runtime_bytes: int = 0
    """What interpreter and libraries take of it before they compute."""
    whose: str = system.MACHINE
    """Limit `available_bytes` is."""
    sixteen_bits: Sixteen = "bfloat16"
    """The type of 16 bits that it multiplies in."""

    @property
    def called(self) -> str:
        """Its name in the reader's language."""
        cores = self.name.removesuffix(" cores")
        return said("{n} cores", n=cores) if cores != self.name else self.name


def this_machine(memory_bytes: int | None = None) -> Machine:
    """The GPU where there is one, else the CPU: memory that is free, and the rates of its products and of reading,
    measured in a fraction of a second. `memory_bytes` stands for the free memory where it is given."""
    if torch.cuda.is_available():
        free = free_bytes(torch.device("cuda"))
        name = torch.cuda.get_device_name()
        return Machine("cuda", memory_bytes or free, *_measured("cuda"), name, sixteen_bits=sixteen_bits())
    memory = system.memory()
    # Processes that train together on a host are told their number by what started them, and share what is free.
    available = system.own_bytes() + memory.free // system.local_processes()
    whose = memory.whose
    if memory_bytes:
        available, whose = memory_bytes, system.MACHINE
    runtime = psutil.Process().memory_info().rss
    return Machine("cpu", available, *_measured("cpu"), f"{system.cores()} cores", runtime, whose)


def sixteen_bits() -> Sixteen:
    """The type of 16 bits that this machine's card multiplies in: bf16 from Ampere on, what came before only pretends
    to (NVIDIA's CUDA C++ programming guide, "compute capabilities")."""
    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return system.memory().free


def card(name: str, memory_bytes: int | None = None) -> Machine:
    """A card by name, whole or as people say it (4090). Raises RecipeError for one that is not known."""
    for known in CARDS:
        if _bare(known.name) == _bare(name):
            return machine_of(known, memory_bytes)
    names = ", ".join(known.name for known in CARDS)
    raise RecipeError(
        "--card", repr(name), said("one of {names}", names=names), said("Or say its memory: --memory 24GiB.")
    )


def machine_of(card: Card, memory_bytes: int | None = None) -> Machine:
    """A card that is not here; with another memory where one is given."""
    free = card.free_bytes(memory_bytes)
    return Machine("cuda", free, card.flops, card.bytes_per_second, card.name, sixteen_bits=card.sixteen_bits)


def _bare(name: str) -> str:
    """
    >>> _bare("NVIDIA GeForce RTX 4060-Ti")
    '4060ti'
    """
    return re.sub(r"nvidia|geforce|tesla|rtx|[\s_-]", "", name.lower())


def parse_bytes(text: str) -> int:
    """
    >>> parse_bytes("24GiB") == parse_bytes("24 gib") == 24 << 30
    True
    >>> parse_bytes("1.5GB")
    1500000000
    """
    units = {"gib": 1 << 30, "mib": 1 << 20, "gb": 10**9, "mb": 10**6, "g": 1 << 30, "m": 1 << 20}
    for unit, factor in units.items():
        number = text.strip().lower().removesuffix(unit).strip()
        if text.strip().lower().endswith(unit) and number.replace(".", "", 1).isdigit() and float(number):
            return int(float(number) * factor)
    raise RecipeError("--memory", repr(text), said("a number with a unit"), said("Write for instance --memory 24GiB."))


@functools.cache
def _measured(device: Device) -> tuple[float, float]:
    """Operations and bytes per second: of a square product, and of one with a vector, which has to read it all."""
    dtype, size, n_bytes = torch.float32, 1024, 64 << 20
    if device == "cuda":
        dtype, size, n_bytes = getattr(torch, sixteen_bits()), 8192, 256 << 20
    square = torch.ones(size, size, dtype=dtype, device=device)
    operations = 2 * size**3 / _least_seconds(square, square)
    width = 4096
    large = torch.ones(n_bytes // width // dtype.itemsize, width, dtype=dtype, device=device)
    return operations, n_bytes / _least_seconds(large, torch.ones(width, 1, dtype=dtype, device=device))


def _least_seconds(a: torch.Tensor, b: torch.Tensor, seconds: float = 0.2) -> float:
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the result
        times.append(time.perf_counter() - began)
    return min(times)
