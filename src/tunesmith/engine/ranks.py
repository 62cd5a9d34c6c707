"""Several processes that train one model: each computes its share of every step, the sums are those of one process.

Started by `torchrun` or `accelerate launch`. Adapters are small, so their gradients are added up over all processes in
one message per step. Where the base does not fit one device its weights are sharded with FSDP2
(https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html); adapters never are.

What a clock, a disk or a person decides, process 0 decides for all. Before anything is exchanged all say what they have
come to, over gloo, which notices at once when one of them ends; so two that are not at the same point never add up what
does not belong together. What is exchanged is numbers and JSON; whoever can send them is trusted with those alone.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tunesmith import system
from tunesmith.errors import ProofError, RunError, TunesmithError
from tunesmith.language import counted, marked, said

# What launchers set; Trainer must not find it, or it would wrap the model a second time.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_ENDED = marked("the end of a process that failed")
_DECISION = marked("a decision of process 0")
_WORD = marked("a word from each process")
_PASS = marked("a pass through sharded weights")
_GRADIENT = marked("the sum of a gradient")
_LOSS = marked("the sum of a loss")
_KINDS = (_ENDED, _DECISION, _WORD, _PASS, _GRADIENT, _LOSS)
_LONGEST_WAIT = datetime.timedelta(minutes=30)  # for one that is at work, or hangs; one that ended is noticed at once
_LAST_WAIT = datetime.timedelta(seconds=30)  # of one that failed, to say why


class Ranks:
    """The processes of one training."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group
        self.step = 0
        """What is being computed; all must be at the same one when they exchange something."""
        self._over = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def require_same(self, what: dict[str, str]) -> None:
        """Raises ProofError in every process unless all give the same texts; `what` says what they stand for."""
        everywhere = self.gather(what)
        for name in what:
            if differing := [rank for rank, other in enumerate(everywhere) if other[name] != everywhere[0][name]]:
                raise ProofError(
                    said("processes {numbers}", numbers=", ".join(map(str, differing))),
                    said("another {name} than process 0", name=name),
                    said("the same in all processes"),
                    said("Give every host the same files, settings and versions, and start again."),
                )

    def from_main(self, value: Any) -> Any:
        """What process 0 gives, in all of them; JSON."""
        if self.size == 1:
            return value
        return json.loads(self._meet(_DECISION, json.dumps(value) if self.is_main else "")[0])

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by its number, in all of them; JSON."""
        if self.size == 1:
            return [value]
        return [json.loads(text) for text in self._meet(_WORD, json.dumps(value))]

    def any(self, asked: bool) -> bool:
        """Whether one of the processes says yes."""
        return any(self.gather(asked))

    def begin_pass(self) -> None:
        """Comes back when all are about to collect the sharded weights equally often."""
        if self.size > 1:
            self._meet(_PASS)

    def add_up(self, parameters: Sequence[nn.Parameter], *numbers: Tensor) -> list[Tensor]:
        """Makes every gradient the sum over all processes; returns the sums of the scalar `numbers`."""
        if self.size == 1:
            return list(numbers)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        kind = torch.promote_types(gradients[0].dtype, torch.float32) if gradients else torch.float64
        flat = torch.cat([tensor.flatten().to(kind) for tensor in (*gradients, *numbers)])
        self._meet(_GRADIENT if parameters else _LOSS, n_numbers=len(flat))
        with self._heard():
            dist.all_reduce(flat)
        sums = flat.split([tensor.numel() for tensor in (*gradients, *numbers)])
        for parameter, gradient, total in zip(parameters, gradients, sums, strict=False):
            parameter.grad = total.view_as(gradient).to(gradient.dtype)
        return [total.reshape(()) for total in sums[len(gradients) :]]

    def end(self, error: Exception) -> None:
        """Tells the others, who wait for this process, why it fails; once they know that somebody did, they do not
        wait any more."""
        if self.size > 1 and not self._over:
            with suppress(TunesmithError):
                self._meet(_ENDED, str(error) or type(error).__name__, wait=_LAST_WAIT)

    def _meet(
        self, kind: str, text: str = "", n_numbers: int = 0, wait: datetime.timedelta = _LONGEST_WAIT
    ) -> list[str]:
        """What each process says, when all have come here. Raises RunError where one has ended, ProofError where they
        are not at the same point."""
        told = text.encode()
        own = torch.tensor([_KINDS.index(kind), self.step, n_numbers, len(told)])
        tags = [tag.tolist() for tag in self._exchanged(own, wait)]
        padded = torch.zeros(max(tag[3] for tag in tags), dtype=torch.uint8)
        padded[: len(told)] = torch.frombuffer(bytearray(told), dtype=torch.uint8) if told else padded[:0]
        buffers = self._exchanged(padded, wait) if len(padded) else [padded] * self.size
        texts = [bytes(buffer[: tag[3]].tolist()).decode() for tag, buffer in zip(tags, buffers, strict=True)]
        for rank, tag in enumerate(tags):
            if tag[0] == _KINDS.index(_ENDED):
                self._over = True
                raise RunError(
                    said("process {rank} of {size}", rank=rank, size=self.size),
                    said("its end: {reason}", reason=texts[rank]),
                    said("all of them until the end"),
                    said(_GO_ON),
                )
        apart = [
            said("process {rank}: {place}", rank=rank, place=_place(tag))
            for rank, tag in enumerate(tags)
            if tag[:3] != tags[0][:3]
        ]
        if apart:
            self._over = True
            fix = said("Nothing was added up. Please report it. {go_on}", go_on=said(_GO_ON))
            raise ProofError(
                said("the processes of a training"),
                "; ".join(apart),
                said("{place}, as process 0", place=_place(tags[0])),
                fix,
            )
        return texts

    def _exchanged(self, own: Tensor, wait: datetime.timedelta) -> list[Tensor]:
        everywhere = [torch.empty_like(own) for _ in range(self.size)]
        with self._heard():
            work: Any = dist.all_gather(everywhere, own, group=self._group, async_op=True)
            work.wait(wait)
        return everywhere

    @contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._over = True
            raise _no_answer(error) from error


_GO_ON = marked(
    "Once its cause is gone, `resume` goes on from the last checkpoint; start it as the training was started."
)


def _place(tag: Sequence[int]) -> str:
    what = said(_KINDS[tag[0]])
    if tag[2]:
        return said("{what} in step {step} ({n} numbers)", what=what, step=tag[1], n=tag[2])
    return said("{what} in step {step}", what=what, step=tag[1])


def _no_answer(error: Exception) -> RunError:
    return RunError(
        said("process {rank}", rank=os.environ.get("RANK", "?")),
        said("no answer from another process ({reason})", reason=str(error).splitlines()[0]),
        said("all of them until the end"),
        said("The first one that ended says why."),
    )


@contextmanager
def _output_to_errors() -> Iterator[None]:
    """What is written to descriptor 1 meanwhile goes to standard error: the Gloo of torch 2.9 says there that it is
    connected, where somebody may want one JSON object and nothing else."""
    try:
        os.fstat(2)
        kept = os.dup(1)
    except OSError:  # one of them is closed
        yield
        return
    if sys.stdout:
        sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that a launcher started this one with; just this one where there was none.

    When one of them fails, the others raise RunError where they next wait for it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    began, n_threads = not dist.is_initialized(), torch.get_num_threads()
    with _output_to_errors():
        if began:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_LONGEST_WAIT)
        group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    ranks = Ranks(dist.get_rank(), size, group)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(n_threads, _fair_threads()))
    try:
        yield ranks
    except Exception as error:
        ranks.end(error)
        # What sharded weights wait for is not ours; it says by its text alone what it is.
        if isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/" in str(error)):
            raise _no_answer(error) from error
        raise
    finally:
        torch.set_num_threads(n_threads)
        if began:
            dist.destroy_process_group()


def idle_cores() -> str | None:
    """Says that the processes of this host leave cores idle, where they compute on those; torchrun gives each of them
    one thread."""
    fair, used = _fair_threads(), torch.get_num_threads()
    if system.local_processes() == 1 or torch.cuda.is_available() or used >= fair:
        return None
    return counted(
        "Of this host's {cores} cores {processes} processes with {n} thread each leave some idle; start it with "
        "OMP_NUM_THREADS={fair}.",
        "Of this host's {cores} cores {processes} processes with {n} threads each leave some idle; start it with "
        "OMP_NUM_THREADS={fair}.",
        used,
        cores=system.cores(),
        processes=system.local_processes(),
        fair=fair,
    )


def _fair_threads() -> int:
    return max(1, system.cores() // system.local_processes())


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


def shard(model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> None:
    """Spreads the frozen weights of the layers over all processes; they are collected layer by layer when needed.

    The model may lie where there is room for all of it: a layer at a time goes to the device and leaves a share there,
    and in the end what is not of the layers.
    """
    from torch.distributed.fsdp import fully_shard

    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, ignored_params=trained & set(layer.parameters()))
    model.to(device)
