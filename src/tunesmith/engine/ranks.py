"""Several processes that train one model: each computes its share of every step, the sums are those of one process.

Started by `torchrun … -m tunesmith train …` or `accelerate launch -m tunesmith train …`. Adapters are small, so their
gradients are added up over all processes in one message per step. Where the base does not fit one device its weights
are sharded with FSDP2 (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html); adapters never are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tunesmith.errors import ProofError, RunError

# What launchers set; Trainer must not find it, or it would wrap the model a second time.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class Ranks:
    """The processes of one training."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def require_same(self, what: dict[str, str]) -> None:
        """Raises ProofError in every process unless all give the same texts; `what` says what they stand for."""
        if self.size == 1:
            return
        everywhere: list[Any] = [None] * self.size
        dist.all_gather_object(everywhere, what)
        for name in what:
            if differing := [rank for rank, other in enumerate(everywhere) if other[name] != everywhere[0][name]]:
                raise ProofError(
                    f"processes {', '.join(map(str, differing))}",
                    f"another {name} than process 0",
                    "the same in all processes",
                    "Give every host the same files, settings and versions, and start again.",
                )

    def from_main(self, value: Any) -> Any:
        """What process 0 gives, in all of them."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def add_up(self, parameters: Sequence[nn.Parameter], *numbers: Tensor) -> list[Tensor]:
        """Makes every gradient the sum over all processes; returns the sums of the scalar `numbers`."""
        if self.size == 1:
            return list(numbers)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        kind = torch.promote_types(gradients[0].dtype, torch.float32) if gradients else torch.float64
        flat = torch.cat([tensor.flatten().to(kind) for tensor in (*gradients, *numbers)])
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise RunError(
                f"process {self.rank} of {self.size}",
                f"no answer from another process ({str(error).splitlines()[0]})",
                "all of them until the end",
                "The first one that ended says why.",
            ) from error
        sums = flat.split([tensor.numel() for tensor in (*gradients, *numbers)])
        for parameter, gradient, total in zip(parameters, gradients, sums, strict=False):
            parameter.grad = total.view_as(gradient).to(gradient.dtype)
        return [total.reshape(()) for total in sums[len(gradients) :]]

    def any(self, asked: bool, device: torch.device) -> bool:
        """Whether one of the processes says yes."""
        return self.add_up([], torch.tensor(float(asked), device=device))[0].item() > 0


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that a launcher started this one with; just this one where there was none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        if began:
            dist.destroy_process_group()


@contextmanager
def unseen() -> Iterator[None]:
    """Inside, libraries find no trace of a launcher."""
    names = [name for name in os.environ if name in _LAUNCHER or name.startswith(("ACCELERATE_USE", "FSDP_"))]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


def wants_sharding() -> bool:
    """`accelerate launch --use_fsdp` was asked for."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def shard(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Spreads the frozen weights of the layers over all processes; they are collected layer by layer when needed."""
    from torch.distributed.fsdp import fully_shard

    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, ignored_params=trained & set(layer.parameters()))
