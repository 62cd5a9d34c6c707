"""A card that is here and is not used, or not as fast as it could be, is named with the reason and what mends it."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import tunesmith
from tunesmith import driver, machines
from tunesmith.cli import doctor
from tunesmith.engine.hf import compiler
from tunesmith.errors import UnsupportedSystem

CARD = "NVIDIA GeForce RTX 4090"


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which torch sees no card, and the folder of its programs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(driver, "_IN_WSL", tmp_path / "wsl")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (programs := tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return programs


def answering(folder: Path, says: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{says}'\nexit {code}\n")
    program.chmod(0o755)


def on_the_bus(pci: Path, vendor: str, kind: str) -> None:
    device = pci / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")


def test_where_no_card_is_nothing_is_said(tmp_path: Path, no_card: Path) -> None:
    assert driver.unused_card() is None
    answering(no_card, "No devices were found", 6)
    on_the_bus(tmp_path / "pci", "0x8086", "0x030000")  # another maker's
    assert driver.unused_card() is None


@pytest.mark.parametrize(
    ("built_with", "version", "why", "fix"),
    [
        (None, "580.95", "built without CUDA", "--force-reinstall torch"),
        ("13.0", "550.54.14", "550.54.14 is too old for this torch, built with CUDA 13.0", "580 or newer"),
        ("12.8", "470.82", "470.82 is too old", "525 or newer"),
        ("13.0", "580.95", "torch says", "nvidia-smi"),
    ],
)
def test_a_card_that_torch_does_not_see_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, no_card: Path, built_with: str | None, version: str, why: str, fix: str
) -> None:
    def found_nothing() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check.")

    answering(no_card, f"{CARD}, {version}")
    monkeypatch.setattr(torch.version, "cuda", built_with)
    monkeypatch.setattr(torch.cuda, "init", found_nothing)
    unused = driver.unused_card()
    assert unused is not None and unused.name == CARD
    assert why in unused.why and fix in unused.fix and "\n" not in str(unused)


@pytest.mark.parametrize("value", ["", "-1", "7", "GPU-of-another-machine"])
def test_a_card_that_is_hidden_is_said_to_be(monkeypatch: pytest.MonkeyPatch, no_card: Path, value: str) -> None:
    answering(no_card, f"{CARD}, 580.95")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    unused = driver.unused_card()
    assert unused is not None and f"CUDA_VISIBLE_DEVICES={value!r} leaves none" in unused.why


@pytest.mark.parametrize("says", ["", "NVIDIA-SMI has failed because it could not communicate", "a, b, c"])
def test_a_card_without_a_driver_that_answers(tmp_path: Path, no_card: Path, says: str) -> None:
    on_the_bus(tmp_path / "pci", "0x10de", "0x030000")
    answering(no_card, says)
    unused = driver.unused_card()
    assert unused is not None and "no driver" in unused.why and "--gpus all" in unused.fix


@pytest.mark.parametrize(
    ("kinds", "capability", "fix"),
    [
        (["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"], (8, 9), ""),
        (["sm_75", "sm_80", "sm_90a"], (7, 0), "older CUDA"),  # V100 beside CUDA 13
        (["sm_75", "sm_80"], (6, 0), "older CUDA"),  # P100
        (["sm_80", "sm_90"], (12, 0), "newer torch"),  # a card that came after this torch
        (["sm_80", "sm_90", "compute_90"], (12, 0), ""),  # whose driver compiles
    ],
)
def test_a_card_that_torch_has_no_kernels_for_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, kinds: list[str], capability: tuple[int, int], fix: str
) -> None:
    answers: dict[str, Any] = {
        "is_available": True, "get_arch_list": kinds, "get_device_capability": capability, "get_device_name": CARD
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if not fix:
        driver.require_kernels()
        return
    with pytest.raises(UnsupportedSystem, match=rf"compute capability {capability[0]}\.{capability[1]}") as refused:
        driver.require_kernels()
    assert fix in refused.value.fix


GIB = 1 << 30
RECORDED: dict[str, dict[str, Any]] = {
    "T4": {"name": "Tesla T4", "capability": (7, 5), "count": 1, "free": 15_655_829_504, "total": 15_828_320_256},
    "the second of two": {"name": CARD, "capability": (8, 9), "count": 2, "free": 24 * GIB, "total": 25 * GIB},
    "a slice of MIG": {
        "name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "capability": (8, 0), "count": 1,
        "free": 4_996_005_888, "total": 5_100_273_664,
    },
}  # fmt: skip
"""What torch answers on machines with such cards."""


@pytest.mark.parametrize("kind", RECORDED)
def test_a_card_is_taken_for_what_torch_says_it_is(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A slice has its own memory, not its card's, and its own speed, which is measured (here told: no card is here);
    a process has its own card, which `torch.cuda.set_device` has made the current one."""
    told = RECORDED[kind]
    current = told["count"] - 1
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: told["count"],
        "current_device": lambda: current,
        "get_device_name": lambda device=None: told["name"],
        "get_device_capability": lambda device=None: told["capability"],
        "mem_get_info": lambda device=None: (told["free"], told["total"]) if device.index in (None, current) else 1 / 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(machines, "_measured", lambda device: (1e12, 1e11))
    found = machines.this_machine()
    assert (found.device, found.name, found.available_bytes) == ("cuda", told["name"], told["free"])
    assert found.sixteen_bits == ("bfloat16" if told["capability"] >= (8, 0) else "float16")
    assert driver.unused_card() is None


def test_plan_and_train_and_doctor_say_it(
    no_card: Path, tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line, where this torch is too new for a driver of long ago, or knows no CUDA at all."""
    answering(no_card, f"{CARD}, 390.10")
    few = ["--model", tiny_model, "--data", talk, "--epochs", "1", "--set", "train.rehearse=0"]
    for command in (["plan", *few], ["train", *few, "--out", tmp_path / "run"], ["doctor"]):
        ended = tunesmith(*command, cwd=tmp_path)
        said = " ".join((ended.out + ended.err).split())
        assert ended.code == 0 and CARD in said and "not used" in said, command
        assert "390.10 is too old" in said or "built without CUDA" in said, command
    planned = json.loads(tunesmith("plan", *few, "--json", cwd=tmp_path).out)
    assert CARD in planned["unused_card"]


# --- what Triton compiles with ----------------------------------------------------------------------------------------


def test_without_a_c_compiler_it_is_said_what_is_lacking(
    monkeypatch: pytest.MonkeyPatch, no_card: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(no_card))
    assert compiler.lacking() == "no C compiler (gcc, clang)"
    monkeypatch.setenv("CC", "/opt/no/cc")
    assert compiler.lacking() == "no C compiler (/opt/no/cc)"
    answering(no_card, "a compiler")
    (no_card / "nvidia-smi").rename(no_card / "clang")
    monkeypatch.delenv("CC")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert compiler.lacking() == f"no headers of Python {version}" and f"python{version}-dev" in compiler.fix()
    (tmp_path / "Python.h").touch()
    assert compiler.lacking() is None


def test_doctor_says_what_makes_a_card_slower(monkeypatch: pytest.MonkeyPatch, no_card: Path) -> None:
    card = SimpleNamespace(name=CARD, total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(driver, "require_kernels", lambda: None)
    for lack, fix in ((None, ""), ("no C compiler (gcc, clang)", compiler.fix())):
        monkeypatch.setattr(compiler, "lacking", lambda lack=lack: lack)
        found = doctor._accelerator()
        assert found.ok and found.fix == fix and ("slower" in found.found) is bool(fix)
