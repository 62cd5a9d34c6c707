"""Who may ask, and how much: looked at before anything of a request is believed.

A server on this machine without a key answers whoever can reach it, and that includes every web page in a browser on
this machine. So it answers only requests that name this machine (a page of elsewhere that has its own name resolve to
127.0.0.1 does not), that come from no page or from its own (a page of another port of this machine is another's), and
that say they are JSON (which no page can send to another address without asking first, and nobody here says yes).
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.loopback import is_loopback
from tunesmith.serving.refusals import closing, full, refusal

_OPEN_PATHS = ("/", "/health")


def is_open(path: str) -> bool:
    """Whether it is answered without a key: the page and whether the server is there hold nothing."""
    return path in _OPEN_PATHS or path.startswith("/page/")


_AFTER_REFUSAL = 64 << 20  # bytes of a body that is too large which are let go by, so that its sender hears why
_SECONDS_AFTER_REFUSAL = 5.0
_SMALL_BODY = 64 << 10  # bytes; such a body always has room, so that large ones do not keep small ones out


@dataclass(frozen=True)
class Limits:
    """What those who ask may take."""

    connections: int = 1000
    body_bytes: int = 4 << 20
    """Of a single request."""
    bodies_bytes: int = 64 << 20
    """Of all large bodies that are held at a time."""
    seconds_to_ask: float = 30.0
    """For a request to arrive as a whole."""
    seconds_to_take: float = 60.0
    """For a piece of an answer to be taken."""


class Gate:
    """Stands in front of the application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        key: str | None,
        loopback: bool,
        closing: Callable[[], bool],
        asked_by_body: Collection[str],
    ) -> None:
        """`asked_by_body` are the paths whose requests have a body; no other path reads one."""
        self._app, self._limits, self._key, self._asked_by_body = app, limits, key, asked_by_body
        self._only_this_machine, self._closing = loopback and key is None, closing
        self._room = limits.bodies_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = self._refused(scope, headers)
        has_body = scope["method"] == "POST" and scope["path"] in self._asked_by_body
        if answer is None and has_body:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                found = f"found {kind[:80] or 'none'}; expected application/json"
                answer = refusal(415, f"Content-Type: {found}. Send the header Content-Type: application/json.")
        if answer is not None:
            await answer(scope, receive, send)
            return
        if not has_body:
            await self._app(scope, receive, self._patient(send))
            return
        place = _Place()
        try:
            body = await self._body(headers, receive, place)
            if isinstance(body, Response):
                self._free(place)
                await _answer_and_let_pass(body, scope, receive, send)
            elif body is not None:  # else nobody is there any more
                await self._app(scope, _with_body(body, receive), self._patient(send))
        finally:
            self._free(place)

    def _refused(self, scope: Scope, headers: Headers) -> Response | None:
        if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] == "1.0"):
            # Where it ends is told in two ways, and a proxy in front may have believed the other one.
            message = "body: found two ways to tell where it ends; expected one. Send Content-Length alone."
            return refusal(400, message, code="framing", headers={"Connection": "close"})
        if self._only_this_machine:
            host, origin, site = (headers.get(name) for name in ("host", "origin", "sec-fetch-site"))
            host = host or ""
            if not is_loopback(urlsplit(f"//{host}").hostname or "" if _is_plain(host) else ""):
                fix = "Open it by http://127.0.0.1 or http://localhost, or start it with --api-key."
                found = f"Host: found {host[:80]!r}; expected this machine's own name. {fix}"
                return refusal(403, found, kind="permission_error", code="host")
            fix = "Pages of elsewhere are not answered; ask from its own page or from a program."
            if origin is not None and origin.lower() != (own := f"{scope['scheme']}://{host}".lower()):
                found = f"Origin: found {origin[:80]!r}; expected {own[:80]!r}, this server's own page. {fix}"
                return refusal(403, found, kind="permission_error", code="origin")
            if site not in (None, "none", "same-origin") and not _opens_the_page(scope, headers):
                found = f"Sec-Fetch-Site: found {site[:80]!r}; expected 'same-origin' or 'none'. {fix}"
                return refusal(403, found, kind="permission_error", code="origin")
        if self._key is not None and not is_open(scope["path"]):
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self._key}".encode()):
                found = "none" if not given else "another one"
                fix = "Send the header Authorization: Bearer KEY with the key that the server was started with."
                message = f"API key: found {found}; expected the server's. {fix}"
                challenge = {"WWW-Authenticate": "Bearer"}
                return refusal(401, message, kind="authentication_error", code="invalid_api_key", headers=challenge)
        if self._closing() and not is_open(scope["path"]):
            return closing()
        return None

    def _free(self, place: _Place) -> None:
        self._room += place.taken
        place.taken = 0

    async def _body(self, headers: Headers, receive: Receive, place: _Place) -> bytes | Response | None:
        """The body as a whole, or why it is not taken; None when the client has gone."""
        most = self._limits.body_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and len(length) < 20 and int(length) > most:
            return self._too_large(f"{int(length):,} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.seconds_to_ask):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        return self._too_large(f"more than {most:,} bytes")
                    if len(body) > _SMALL_BODY:
                        more = len(body) - place.taken
                        if more > self._room:
                            found = "found as many large ones as there is room for"
                            return full(f"body: {found}; expected fewer. Ask again in a moment.", "bodies_full")
                        place.taken += more
                        self._room -= more
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            found = f"found half of it after {self._limits.seconds_to_ask:g} seconds; expected all of it"
            return refusal(408, f"body: {found}. Send it at once.", headers={"Connection": "close"})

    def _too_large(self, found: str) -> Response:
        message = f"body: found {found}; expected at most {self._limits.body_bytes:,}. Send less at once."
        return refusal(413, message, code="body_too_large", headers={"Connection": "close"})

    def _patient(self, send: Send) -> Send:
        async def patient(message: Message) -> None:
            async with asyncio.timeout(self._limits.seconds_to_take):
                await send(message)

        return patient


@dataclass
class _Place:
    """What a body takes of the room for large ones."""

    taken: int = 0


def _opens_the_page(scope: Scope, headers: Headers) -> bool:
    """Whether somebody follows a link to the chat page, which holds nothing and can not be framed."""
    kind = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return scope["method"] == "GET" and scope["path"] == "/" and kind == ("navigate", "document")


def _is_plain(text: str) -> bool:
    """Whether it can be taken apart as an address."""
    try:
        _ = urlsplit(f"//{text}" if "//" not in text else text).port
    except ValueError:
        return False
    return True


def _with_body(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body first."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


async def _answer_and_let_pass(answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers, and throws away what is still sent for a while: who is sending looks for no answer."""
    start: dict[str, Any] = {"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers}
    await send(start)
    await send({"type": "http.response.body", "body": bytes(answer.body), "more_body": True})
    passed = 0
    try:
        async with asyncio.timeout(_SECONDS_AFTER_REFUSAL):
            while passed < _AFTER_REFUSAL:
                message = await receive()
                passed += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
