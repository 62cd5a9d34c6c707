"""A CUDA card that is not there: torch is told of one, and of its kernels the code is written and compiled, not run.

To be imported before torch, in a process of its own, where there is g++.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock


def _load_device() -> ctypes.CDLL:
    """A device that does nothing, for a torch that has not been imported."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch_folder = Path(found.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "no_card.so"
        command = ["g++", "-shared", "-fPIC", "-std=c++20", str(Path(__file__).with_suffix(".cpp")), "-o", str(made)]
        command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True)
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(torch_folder / "lib" / name), ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)


_DEVICE = _load_device()

import torch  # noqa: E402 - after the device, or it makes hooks of its own

_DEVICE.take_the_place_of_cuda()
KIB = 1 << 10


@dataclass(frozen=True)
class Card:
    """What decides how kernels are written for a card, from NVIDIA's CUDA C++ programming guide, "compute
    capabilities"."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int
    """That one kernel can have on a processor."""
    gib: int

    @property
    def arch(self) -> int:
        return self.capability[0] * 10 + self.capability[1]


CARDS = (
    Card("T4", (7, 5), 40, 64 * KIB, 16),
    Card("A100", (8, 0), 108, 163 * KIB, 80),
    Card("RTX 3090", (8, 6), 82, 99 * KIB, 24),
    Card("RTX 4090", (8, 9), 128, 99 * KIB, 24),
    Card("H200", (9, 0), 132, 227 * KIB, 141),
    Card("RTX 5090", (12, 0), 170, 99 * KIB, 32),
)


@contextlib.contextmanager
def told_of(card: Card) -> Iterator[None]:
    """Inside, torch, inductor and Triton find this card, and nothing but it."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.utils as inductor
    import torch._subclasses.fake_tensor as fake
    import torch.utils._triton as triton_of_torch
    import triton
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    has_bf16 = card.capability >= (8, 0)
    properties = SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], total_memory=card.gib << 30,
        multi_processor_count=card.processors, warp_size=32, max_threads_per_block=1024,
        max_threads_per_multi_processor=1536 if card.arch in (86, 89, 120) else 2048,
        regs_per_multiprocessor=1 << 16, shared_memory_per_block=48 * KIB,
        shared_memory_per_block_optin=card.shared_bytes, shared_memory_per_multiprocessor=card.shared_bytes + KIB,
        L2_cache_size=40 << 20, gcnArchName="", uuid="0", clock_rate=1, memory_clock_rate=1, memory_bus_width=384,
        is_integrated=0, is_multi_gpu_board=0,
    )  # fmt: skip

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", card.arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "get_device_capability": lambda *_: card.capability, "get_device_properties": lambda *_: properties,
            "get_device_name": lambda *_: card.name, "is_initialized": lambda: True, "_lazy_init": lambda: None,
            "is_bf16_supported": lambda including_emulation=True: has_bf16 or including_emulation,
            "synchronize": lambda *_: None, "set_device": lambda *_: None, "_exchange_device": lambda _: 0,
            "_maybe_exchange_device": lambda _: 0, "set_rng_state": lambda *_, **__: None,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "manual_seed_all": lambda *_: None,
            "is_current_stream_capturing": lambda: False,
        },
        torch.version: {"cuda": "13.0"},
        torch._C: {
            "_cuda_getCurrentRawStream": lambda _: 0, "_cuda_getDeviceCount": lambda: 1, "_cuda_getDevice": lambda: 0
        },
        fake: {"init_gpu_context": lambda _: None},
        triton_of_torch: {"has_triton": lambda *_: True},
        interfaces.CudaInterface.Worker: {
            "get_device_properties": staticmethod(lambda _=None: properties),
            "current_device": staticmethod(lambda: 0), "set_device": staticmethod(lambda _: None),
        },
        interfaces.CudaInterface: {
            name: staticmethod(answer)
            for name, answer in {
                "current_device": lambda: 0, "device_count": lambda: 1, "is_available": lambda: True,
                "get_compute_capability": lambda _=None: card.arch, "get_raw_stream": lambda _: 0,
                "synchronize": lambda *_: None, "set_device": lambda _: None,
                "is_triton_capable": lambda _=None: True, "raise_if_triton_unavailable": lambda _=None: None,
                "is_bf16_supported": lambda including_emulation=False: has_bf16 or including_emulation,
                "get_device_properties": lambda _=None: properties, "exchange_device": lambda _: 0,
                "maybe_exchange_device": lambda _: 0,
            }.items()
        },
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for holder, replaced in answers.items():
            for name, answer in replaced.items():
                stack.enter_context(mock.patch.object(holder, name, answer, create=True))
        for name in ("cuda", "cuda:0"):
            interfaces.register_interface_for_device(name, interfaces.CudaInterface)
        triton.runtime.driver.set_active(Driver())
        remembered = [getattr(inductor, name, None) for name in dir(inductor)]
        remembered += [getattr(triton_of_torch, name) for name in dir(triton_of_torch)] + [DeviceProperties.create]
        for function in remembered:  # answers of another card
            if callable(clear := getattr(function, "cache_clear", None)):
                clear()
        yield


def taken_by(made: Any) -> dict[str, int]:
    """Of a kernel that Triton has compiled: bytes of shared memory, registers of a thread, and bytes of a thread's
    stack, where registers that are too few spill to."""
    program = Path(importlib.import_module("triton.backends.nvidia").__file__ or "").parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        command = [str(program), "--dump-resource-usage", str(cubin)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert used is not None, said
    return {"shared": made.metadata.shared, "registers": int(used[1]), "stack": int(used[2])}
