"""Threads that share one micro-batch: each computes some of its tokens, and waits for another where it needs its own.

Two cores on one product wait for each other at the end of every operation, and whatever is too small to be divided
runs on one of them. A lane runs all operations of its tokens by itself. Tokens see only earlier ones, so on the way up
a lane needs nothing of those behind it, and on the way down nothing of those before it: one that is ahead stays ahead,
and what slows one of them down for a moment costs nothing. What each of the two brought: docs/explanation/speed.md.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

from tunesmith.engine.cpu import products

Result = TypeVar("Result")
# For fewer, the packing of weights that every lane does for itself costs more than waiting. Split products are packed
# in less time, and have no threads of their own to wait for: seen with two lanes, and more take memory, too.
_LEAST_TOKENS, _LEAST_TOKENS_OF_TWO_SPLIT = 128, 64


class Lanes:
    """Some threads, with an equal number of torch's threads each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._told: set[tuple[int, Hashable]] = set()
        self._news = threading.Condition()
        self._failed = False
        self._pool = ThreadPoolExecutor(count, "lane") if count > 1 else None
        if self._pool is not None:
            n_threads = torch.get_num_threads()
            started = threading.Barrier(count)

            def begin(_: int) -> None:
                torch.get_num_threads()  # a thread's first look takes the process's number over, and would do so later
                torch.set_num_threads(max(1, n_threads // count))
                if n_threads <= count:
                    products.alone()
                started.wait()

            list(self._pool.map(begin, range(count)))
            torch.set_num_threads(n_threads)

    def tell(self, number: int, what: Hashable) -> None:
        """Lets the others know that lane `number` has got so far."""
        with self._news:
            self._told.add((number, what))
            self._news.notify_all()

    def hear(self, numbers: Iterable[int], what: Hashable) -> None:
        """Returns when each of the lanes has told so; raises threading.BrokenBarrierError when one of them failed."""
        awaited = {(number, what) for number in numbers}
        with self._news:
            self._news.wait_for(lambda: self._failed or awaited <= self._told)
            if self._failed:
                raise threading.BrokenBarrierError

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """What `work` returns for each lane's number. What it raises in one of them ends all."""
        self._told.clear()
        self._failed = False
        if self._pool is None:
            return [work(0)]

        def guarded(number: int) -> Result:
            try:
                return work(number)
            except BaseException:
                self._fail()
                raise

        with products.one_thread_each():
            futures = [self._pool.submit(guarded, number) for number in range(self.count)]
            try:
                wait(futures)
            except BaseException:  # Ctrl-C
                self._fail()
                wait(futures)
                raise
        for error in [future.exception() for future in futures]:
            if error is not None and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]

    def _fail(self) -> None:
        with self._news:
            self._failed = True
            self._news.notify_all()


def count_for(n_tokens: int) -> int:
    """How many lanes share a micro-batch of so many tokens: a divisor of the number of torch's threads."""
    n_threads = torch.get_num_threads()
    least_of_two = _LEAST_TOKENS_OF_TWO_SPLIT if products.are_split() else _LEAST_TOKENS
    least = {1: 0, 2: least_of_two}
    return max(n for n in range(1, n_threads + 1) if n_threads % n == 0 and n * least.get(n, _LEAST_TOKENS) <= n_tokens)


def shares(costs: Tensor, count: int) -> Sequence[range]:
    """Consecutive tokens for each lane, one at the least, so that their costs (T,) add up to about the same."""
    total = costs.double().cumsum(0)
    wanted = total[-1] * torch.arange(1, count) / count
    bounds = [0]
    for lane, behind in enumerate((torch.searchsorted(total, wanted) + 1).tolist(), 1):
        bounds.append(min(max(behind, bounds[-1] + 1), len(costs) - count + lane))
    return [range(start, stop) for start, stop in itertools.pairwise([*bounds, len(costs)])]
