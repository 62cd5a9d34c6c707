"""The rows of each optimizer step: a pure function of seed, epoch and data digest.

General prompts that are rehearsed go round and round: every epoch takes the next ones and deals them out evenly among
its steps, beside the rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import ConcatDataset, DataLoader, Sampler

from tunesmith.data.rows import Row
from tunesmith.types import Rendered


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step, as documents."""

    documents: tuple[Rendered, ...]

    @property
    def n_tokens(self) -> int:
        return sum(len(document.token_ids) for document in self.documents)

    @property
    def n_supervised(self) -> int:
        return sum(document.n_supervised for document in self.documents)


class _Order(Sampler[list[int]]):
    """Which rows each step of an epoch holds: a function of seed, epoch and data digest alone.

    Rehearsed ones are numbered behind the others.
    """

    def __init__(self, n_rows: int, size: int, seed: int, digest: str, rehearsed: int, per_epoch: int) -> None:
        self._n_rows, self._size, self._seed, self._digest = n_rows, size, seed, digest
        self._rehearsed, self._per_epoch = rehearsed, per_epoch
        self._epoch = 0

    def __len__(self) -> int:
        return math.ceil(self._n_rows / self._size)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = int(epoch)

    def of(self, epoch: int) -> list[int]:
        order = list(range(self._n_rows))
        random.Random(f"{self._seed}:{epoch}:{self._digest}").shuffle(order)
        return order

    def rehearsed(self, epoch: int, number: int) -> list[int]:
        """Of the step of an epoch, counted from 0; their own numbers."""
        before = epoch * self._per_epoch
        first, last = (before + n * self._per_epoch // len(self) for n in (number, number + 1))
        return [turn % self._rehearsed for turn in range(first, last)]

    def __iter__(self) -> Iterator[list[int]]:
        order = self.of(self._epoch)
        for number in range(len(self)):
            rows = order[number * self._size : (number + 1) * self._size]
            yield rows + [self._n_rows + other for other in self.rehearsed(self._epoch, number)]


class Steps(DataLoader[Any]):
    """Yields the steps of an epoch; Trainer can begin in the middle of one."""

    def __init__(
        self,
        rows: Sequence[Row],
        examples_per_step: int,
        seed: int,
        digest: str,
        rehearsed: Sequence[Row] = (),
        rehearsed_per_epoch: int = 0,
    ) -> None:
        self._order = _Order(len(rows), examples_per_step, seed, digest, len(rehearsed), rehearsed_per_epoch)
        both: Any = ConcatDataset([cast("Any", part) for part in (rows, rehearsed) if part])
        # A generator of its own, or every epoch would take a number of the one that draws dropout's masks.
        super().__init__(both, batch_sampler=self._order, collate_fn=_step_of, generator=torch.Generator())

    def set_epoch(self, epoch: int) -> None:
        self._order.set_epoch(epoch)

    def order(self, epoch: int) -> list[int]:
        """Indices of the rows in the order of an epoch."""
        return self._order.of(epoch)

    def rehearsed(self, epoch: int, number: int) -> list[int]:
        """Indices of the rehearsed rows of a step of an epoch, counted from 0."""
        return self._order.rehearsed(epoch, number)


def _step_of(rows: Sequence[Row]) -> Step:
    return Step(tuple(document for row in rows for document in row.documents))
