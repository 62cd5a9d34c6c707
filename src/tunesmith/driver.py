"""NVIDIA cards of this machine as their driver names them, and why torch computes on none of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith import commands
from tunesmith.errors import UnsupportedSystem
from tunesmith.language import said

LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""The oldest driver for each major version of CUDA that torch is built with (CUDA Toolkit release notes, "CUDA
Toolkit and corresponding driver versions", minor version compatibility)."""
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_IN_WSL = Path("/usr/lib/wsl/lib/nvidia-smi")


@dataclass(frozen=True)
class Unused:
    """A card that is here and that torch does not compute on."""

    name: str
    why: str
    fix: str

    def __str__(self) -> str:
        return said(
            "{card} is not used, all is computed on the CPU: {why}. {fix}", card=self.name, why=self.why, fix=self.fix
        )


def unused_card() -> Unused | None:
    """The card that is here while torch sees none, with the reason and what mends it; None where torch sees one, or
    none is here. Asks the driver's nvidia-smi, for at most ten seconds."""
    if torch.cuda.is_available():
        return None
    program = shutil.which("nvidia-smi") or (str(_IN_WSL) if _IN_WSL.is_file() else None)
    answer = _asked(program) if program else None
    if answer is None:
        if not _on_the_bus():
            return None
        return Unused(
            said("An NVIDIA card"),
            said("no driver of NVIDIA's answers"),
            said("Install the driver, {least} or newer; start a container with --gpus all.", least=_least_driver()),
        )
    name, version = answer
    built_with = torch.version.cuda
    if built_with is None:
        why = said("this torch is built without CUDA")
        return Unused(name, why, said("Install torch from PyPI: {command}", command=_reinstall()))
    if int(version.split(".")[0]) < _least_driver():
        return Unused(
            name,
            said(
                "its driver {version} is too old for this torch, built with CUDA {cuda}",
                version=version,
                cuda=built_with,
            ),
            said(
                "Install driver {least} or newer, or a torch for CUDA 12 (https://pytorch.org).", least=_least_driver()
            ),
        )
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        why = said("CUDA_VISIBLE_DEVICES={value} leaves none", value=repr(visible))
        return Unused(name, why, said("Unset it, or name a card that nvidia-smi -L lists."))
    try:
        torch.cuda.init()
        why = said("torch finds no device")
    except (RuntimeError, AssertionError) as error:
        why = said("torch says: {error}", error=str(error).strip().splitlines()[0].rstrip("."))
    return Unused(name, why, said("See if nvidia-smi names an error, and restart the machine."))


def require_kernels() -> None:
    """Raises UnsupportedSystem for a card whose kind this torch has no kernels for, as V100 and P100 with CUDA 13."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return
    kinds = [kind.partition("_") for kind in torch.cuda.get_arch_list()]
    own = torch.cuda.get_device_capability()
    native = {divmod(int(number.rstrip("af")), 10) for of, _, number in kinds if of == "sm"}
    to_compile = {divmod(int(number.rstrip("af")), 10) for of, _, number in kinds if of == "compute"}
    if any(major == own[0] and minor <= own[1] for major, minor in native) or any(one <= own for one in to_compile):
        return
    older = said(
        "Install a torch for an older CUDA (https://pytorch.org); CUDA_VISIBLE_DEVICES='' computes on the CPU."
    )
    newer = said("Install a newer torch; CUDA_VISIBLE_DEVICES='' computes on the CPU.")
    raise UnsupportedSystem(
        torch.cuda.get_device_name(),
        said("compute capability {major}.{minor}", major=own[0], minor=own[1]),
        said("one that this torch has kernels for ({kinds})", kinds=", ".join(f"{a}.{b}" for a, b in sorted(native))),
        newer if own > max(native, default=own) else older,
    )


def _asked(program: str) -> tuple[str, str] | None:
    """Name of the first card and version of the driver."""
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=10, check=True)
        name, version = ran.stdout.splitlines()[0].rsplit(",", 1)
        int(version.split(".")[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return name.strip(), version.strip()


def _on_the_bus() -> bool:
    for device in _PCI.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith(_DISPLAY):
            return True
    return False


def _least_driver() -> int:
    built_with = torch.version.cuda or "13"
    return LEAST_DRIVER.get(int(built_with.split(".")[0]), max(LEAST_DRIVER.values()))


def _reinstall() -> str:
    return commands.pip_install("--force-reinstall", "torch")
