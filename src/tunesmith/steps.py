"""The rows of each optimizer step: a pure function of seed, epoch and data digest."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Sampler

from tunesmith.rows import Row
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
    """Which rows each step of an epoch holds: a function of seed, epoch and data digest alone."""

    def __init__(self, n_rows: int, size: int, seed: int, digest: str) -> None:
        self._n_rows, self._size, self._seed, self._digest = n_rows, size, seed, digest
        self._epoch = 0

    def __len__(self) -> int:
        return math.ceil(self._n_rows / self._size)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = int(epoch)

    def of(self, epoch: int) -> list[int]:
        order = list(range(self._n_rows))
        random.Random(f"{self._seed}:{epoch}:{self._digest}").shuffle(order)
        return order

    def __iter__(self) -> Iterator[list[int]]:
        order = self.of(self._epoch)
        for start in range(0, len(order), self._size):
            yield order[start : start + self._size]


class Steps(DataLoader[Any]):
    """Yields the steps of an epoch; Trainer can begin in the middle of one."""

    def __init__(self, rows: Sequence[Row], examples_per_step: int, seed: int, digest: str) -> None:
        self._order = _Order(len(rows), examples_per_step, seed, digest)
        # A generator of its own, or every epoch would take a number of the one that draws dropout's masks.
        super().__init__(cast("Any", rows), batch_sampler=self._order, collate_fn=_step_of, generator=torch.Generator())

    def set_epoch(self, epoch: int) -> None:
        self._order.set_epoch(epoch)

    def order(self, epoch: int) -> list[int]:
        """Indices of the rows in the order of an epoch."""
        return self._order.of(epoch)


def _step_of(rows: Sequence[Row]) -> Step:
    return Step(tuple(document for row in rows for document in row.documents))
