"""Runs become models at an address: loaded, held to what they were trained with, served until Ctrl-C."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn

from tunesmith import chat as chats
from tunesmith.chat import Chat, Opened
from tunesmith.errors import RecipeError
from tunesmith.language import said
from tunesmith.loopback import is_loopback
from tunesmith.models import hush_libraries
from tunesmith.serving import vllm_command
from tunesmith.serving.app import application
from tunesmith.serving.batching import AT_ONCE, QUEUE_LIMIT, Batch
from tunesmith.serving.connections import HEADERS, Connection, Places, places_and_backlog
from tunesmith.serving.gate import Limits
from tunesmith.serving.reading import Reading
from tunesmith.serving.service import Served, Service

_GRACE_SECONDS = 30.0
_SHORTEST_KEY = 16  # characters
_FREE_SHARE = 0.5  # of the memory that is free after loading, for keys and values


class Serving:
    """A server that holds its address and has its models; `run` answers."""

    def __init__(
        self,
        runs: Sequence[Path | str],
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | None = None,
        tell: Callable[[str], None] = print,
        *,
        at_once: int = AT_ONCE,
        queue_limit: int = QUEUE_LIMIT,
        cache_tokens: int | None = None,
        grace_seconds: float = _GRACE_SECONDS,
        limits: Limits | None = None,
    ) -> None:
        """`at_once` replies are written together; `queue_limit` more may wait for that, and as many requests to be
        read; `cache_tokens` tokens may have keys and values at a time (None: what half of the free memory holds);
        `grace_seconds` are left to what runs when it is told to end.
        """
        if not runs:
            raise RecipeError(
                "serve", said("no run"), said("at least one run's folder"), said("Name the folder that training wrote.")
            )
        key = _checked_key(api_key)
        if not is_loopback(host) and key is None:
            fix = said("Set TUNESMITH_API_KEY (or pass --api-key), or leave --host at 127.0.0.1.")
            raise RecipeError(
                "--host", said("{host} without a key", host=host), said("a key where others can reach it"), fix
            )
        self._tell = tell
        self._socket = _bound(host, port)
        try:
            hush_libraries()
            base, tuned, opened = chats.load_together(runs)
            batch = Batch(base.model, at_once=at_once, queue_limit=queue_limit)
            batch.prove()
            batch.make_room(cache_tokens, _FREE_SHARE)
        except BaseException:
            self._socket.close()
            raise
        models = _named(runs, base, tuned, opened)
        self.service = Service(models, batch, Reading(queue_limit), key, is_loopback(host), limits or Limits())
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        n_places, backlog = places_and_backlog(self.service.limits.connections)
        config = uvicorn.Config(
            application(self.service),
            http=cast("Any", partial(Connection, places=Places(self.service.limits.seconds_to_ask, n_places))),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            headers=list(HEADERS.items()),
            backlog=backlog,
            timeout_graceful_shutdown=5,
        )
        self._server = _Server(config, self.service, grace_seconds, tell)
        self._opened = opened

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Answers until it is told to end; then finishes what runs. `ready` is called when it answers."""

        def answering() -> None:
            self._introduce()
            ready()

        self.service.batch.start()
        self._server.answering = answering
        gc.collect()
        gc.freeze()  # what was loaded stays; going through it now and then would keep everybody waiting
        try:
            self._server.run(sockets=[self._socket])
        finally:
            gc.unfreeze()
            self._socket.close()
            self.service.reading.end()
            self.service.batch.end()

    def stop(self) -> None:
        """As Ctrl-C, from another thread."""
        self._server.handle_exit(signal.SIGTERM, None)

    @property
    def started(self) -> bool:
        return self._server.started

    def _introduce(self) -> None:
        service = self.service
        self._tell(said("{url}  the chat page; the API is at {url}/v1", url=self.url))
        if not service.loopback:
            self._tell(
                said("There is no TLS here: who is on the way reads along. docs/how-to/serve.md puts a proxy in front.")
            )
        for served in service.models.values():
            what = said("({base} with its adapter)", base=served.base) if served.chat.tuned else said("(base)")
            self._tell(f"  {served.id}  {what}")
        if service.batch.reason:
            self._tell(said("Replies are written one after the other: {reason}.", reason=service.batch.reason))
        adapters = [
            (served.id, run.adapter.absolute())
            for served, run in zip((s for s in service.models.values() if s.chat.tuned), self._opened, strict=True)
        ]
        if adapters:
            line, left_out = vllm_command.command(_vllm_base(self._opened[0]), adapters)
            if line:
                self._tell(said("For many users at once, on a GPU:") + f"\n  {line}")
            for reason in left_out:
                self._tell(said("Not by vLLM: {reason}.", reason=reason))


def _checked_key(key: str | None) -> str | None:
    if not key:
        return None
    fix = said("Take another, for instance by: python3 -c 'import secrets; print(secrets.token_urlsafe())'")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise RecipeError(
            said("API key"), said("characters that no header can hold"), said("letters, digits and signs"), fix
        )
    if len(key) < _SHORTEST_KEY:
        raise RecipeError(
            said("API key"),
            said("{n} characters", n=len(key)),
            said("at least {n}, which nobody guesses", n=_SHORTEST_KEY),
            fix,
        )
    return key


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address, before minutes are spent on loading."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        fix = said("Choose another --port, or --host.")
        raise RecipeError(
            "--port",
            said("{host}:{port}, which can not be had ({error})", host=host, port=port, error=error),
            said("a free address"),
            fix,
        ) from None
    return bound


def _named(
    runs: Sequence[Path | str], base: Chat, tuned: Sequence[Chat], opened: Sequence[Opened]
) -> dict[str, Served]:
    """The models by the names they are asked for by: the base first."""
    name = opened[0].recipe.model.name if opened else os.fspath(runs[0])
    base_id = Path(name).resolve().name if Path(name).expanduser().is_dir() else name
    models = {base_id: Served(base_id, base, base_id)}
    for run, chat in zip(opened, tuned, strict=True):
        stem = run.run.path.resolve().name
        number, own = 1, stem
        while own in models:
            number += 1
            own = f"{stem}-{number}"
        models[own] = Served(own, chat, base_id)
    return models


def _vllm_base(run: Opened) -> str:
    """What vLLM finds the base by: its id at Hugging Face, or its folder."""
    source = run.found.source
    return source.removeprefix("hf:") if source.startswith("hf:") else str(run.found.folder.absolute())


class _Server(uvicorn.Server):
    """Ends when what runs is done: the first signal closes the door, a second Ctrl-C ends at once."""

    def __init__(
        self, config: uvicorn.Config, service: Service, grace_seconds: float, tell: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._service, self._grace, self._tell = service, grace_seconds, tell
        self._until: float | None = None
        self.answering: Callable[[], None] = lambda: None
        """Called when the address is listened at."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.answering()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """As uvicorn's, but what ended it is not raised again: this is how it is meant to end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.closing and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        self._service.closing = True

    async def on_tick(self, counter: int) -> bool:
        service = self._service
        if service.closing:
            if self._until is None:
                self._until = time.monotonic() + self._grace
                service.batch.close()
                n = service.following
                finishing = said("Finishing {n} replies. Press Ctrl-C again to end at once.", n=n)
                self._tell(finishing if n else said("Ending …"))
            if time.monotonic() > self._until:
                service.batch.give_up()
                self.should_exit = True
            if not service.following:
                self.should_exit = True
        return await super().on_tick(counter)
