"""Who has a connection: as many as there are places for, and none that waits for ever."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tunesmith.serving.refusals import refusal

_BACKLOG = 2048  # connections that may wait to be taken
_ROUNDS = 3  # of the loop, in which a connection that has just been taken is read from
_OTHER_FILES = 256  # that this process may have open
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
"""Stand on every answer."""
_MESSAGES: Mapping[int, str] = {
    431: "request: found more headers than are read; expected at most 16 KiB. Send fewer.",
    501: "request: found a transfer encoding that is not known here; expected none or chunked. Send it plainly.",
}


class Places:
    """The connections there are. When all places are taken, a new one is given the place of another that has waited
    longest without having sent a whole request, of the address that has the most connections."""

    def __init__(self, seconds_to_ask: float, most: int) -> None:
        self.seconds_to_ask, self._most = seconds_to_ask, most
        self._all: dict[str, dict[Connection, None]] = {}
        """By address, the newest last."""
        self._idle: dict[str, dict[Connection, None]] = {}
        """By address, the longest idle first."""
        self._making_room = False

    def enter(self, connection: Connection) -> None:
        self._all.setdefault(connection.address, {})[connection] = None
        if not self._making_room and sum(map(len, self._all.values())) > self._most:
            self._making_room = True
            self._make_room(_ROUNDS, connection.loop)

    def _make_room(self, rounds: int, loop: asyncio.AbstractEventLoop) -> None:
        """After some rounds of the loop: of many that are taken at once, those that ask have been read by then."""
        if rounds:
            loop.call_soon(self._make_room, rounds - 1, loop)
            return
        self._making_room = False
        while sum(map(len, self._all.values())) > self._most:
            crowded = sorted(self._all, key=lambda address: len(self._all[address]), reverse=True)
            idle = (next(iter(self._idle[address])) for address in crowded if self._idle.get(address))
            given_up = next(idle, next(reversed(self._all[crowded[0]])))
            self.leave(given_up)
            given_up.transport.abort()

    def leave(self, connection: Connection) -> None:
        for places in (self._all, self._idle):
            own = places.get(connection.address, {})
            own.pop(connection, None)
            if not own:
                places.pop(connection.address, None)

    def note(self, connection: Connection) -> None:
        """Whether a whole request of it is being answered has changed."""
        if connection not in self._all.get(connection.address, ()):
            return
        if connection.asking:
            self._idle.get(connection.address, {}).pop(connection, None)
        else:
            self._idle.setdefault(connection.address, {}).setdefault(connection)


class Connection(H11Protocol):
    """A connection that is closed when no request begins on it in time; uvicorn waits for ever for a first one."""

    def __init__(self, *, places: Places, **given: Any) -> None:
        super().__init__(**given)
        self._places = places
        self.address = ""

    @property
    def asking(self) -> bool:
        """It has sent a whole request that is not yet answered."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._places.enter(self)
        self._places.note(self)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._places.note(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._places.note(self)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._places.leave(self)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """As the application answers, where uvicorn writes a line of text; called while h11's error is handled."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        said = _MESSAGES.get(status, "request: found bytes that are no HTTP; expected HTTP/1.1. Mend the client.")
        answer = refusal(status, said, headers={**HEADERS, "Connection": "close"})
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is on its way already
            response = h11.Response(status_code=status, headers=answer.raw_headers)
            for event in (response, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait(self) -> None:
        self.loop.call_later(self._places.seconds_to_ask, self._close_if_idle, self.cycle)

    def _close_if_idle(self, last: Any) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()


def places_and_backlog(places: int) -> tuple[int, int]:
    """How many connections there are places for and how many may wait for one, by the files this process may open.

    Raises that limit as far as it needs and may.
    """
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return places, _BACKLOG
    # Who waits is taken before those are closed whose places they get.
    wanted = places + (_ROUNDS + 1) * _BACKLOG + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        share = min(1.0, max(32, soft - _OTHER_FILES) / (wanted - _OTHER_FILES))
        return int(places * share), max(8, int(_BACKLOG * share))
    return places, _BACKLOG
