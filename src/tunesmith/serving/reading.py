"""Requests are read (parsed, checked, rendered, tokenised) one after the other, beside the server's own thread.

The smallest goes first, so a large one keeps nobody waiting but those who come while it is being read. Who waits when
as many wait as may is told to come back; who hangs up is not read.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, TypeVar

from fastapi import Request

from tunesmith.serving.refusals import Gone, Refused, full

_Result = TypeVar("_Result")


class Reading:
    """Whose turn it is; used by the server's own thread alone."""

    def __init__(self, queue_limit: int) -> None:
        self._queue_limit = queue_limit
        self._thread = ThreadPoolExecutor(1, "read")  # tokenizers do not like to be asked by two at once
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        """By size, then by when they came."""
        self._numbers = count()
        self._busy = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def end(self) -> None:
        """Nothing is read any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def read(self, request: Request, work: Callable[[bytes], _Result]) -> _Result:
        """What `work` makes of the request's body.

        Raises what it raises, Refused when too many wait already, and Gone when the client has gone.
        """
        body = await request.body()
        return await _unless_gone(request, self._in_turn(body, work))

    async def _in_turn(self, body: bytes, work: Callable[[bytes], _Result]) -> _Result:
        loop = asyncio.get_running_loop()
        if self._busy:
            if len(self._waiting) >= self._queue_limit:
                message = "queue: found as many requests to be read as may wait; expected fewer. Ask again in a moment."
                raise Refused(full(message, "queue_full"))
            mine = (len(body), next(self._numbers), loop.create_future())
            heapq.heappush(self._waiting, mine)
            try:
                await mine[-1]
            except asyncio.CancelledError:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                    heapq.heapify(self._waiting)
                elif not mine[-1].cancelled():  # its turn came as the client went
                    self._next()
                raise
        self._busy = True
        read = loop.run_in_executor(self._thread, work, body)
        read.add_done_callback(self._ended)
        return await asyncio.shield(read)  # what is being read is read to the end, whoever waits for it

    def _ended(self, read: asyncio.Future[Any]) -> None:
        if not read.cancelled():
            read.exception()  # nobody may be there to ask for it
        self._next()

    def _next(self) -> None:
        self._busy = False
        while self._waiting and not self._busy:
            turn = heapq.heappop(self._waiting)[-1]
            if not turn.done():  # else its client has just gone
                turn.set_result(None)
                self._busy = True


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
