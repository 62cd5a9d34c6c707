"""A request for replies, and how far each of them has come."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fastapi import Request

from tunesmith.chat import MAX_TOKENS
from tunesmith.data.writing import Text
from tunesmith.serving import wire
from tunesmith.serving.batching import Closed, Full
from tunesmith.serving.refusals import Gone, Refused, closing, full, refusal
from tunesmith.serving.reply import Event, Reply, Sampling, Written
from tunesmith.serving.service import Served, Service

MAX_TOLD = 1 << 18
"""Logarithmic probabilities in one answer; each takes a kilobyte while it is put together."""
_BEFORE = 8  # tokens of a text whose continuation they are decoded with


@dataclass(eq=False)
class Choice:
    """One of the replies that answer a request, as far as it has come."""

    index: int
    reply: Reply
    text: Text
    echo: str = ""
    """What is given in front of the text."""
    told: list[Written] = field(default_factory=list)
    """Tokens that make up the text."""
    places: list[int] = field(default_factory=list)
    """Where in the text, in characters, each of them begins; half a character, where the whole one does."""
    n_tokens: int = 0
    finish: wire.FinishReason | None = None
    _n_streamed: int = 0

    def take(self, event: Event) -> str:
        """What is to be shown because of it."""
        if isinstance(event, Written):
            self.n_tokens += 1
            if event.token_id not in self.reply.stop_ids:
                self.told.append(event)
                self.places.append(self.text.n_certain)
            piece = self.text.add(event.token_id)
            if self.text.stopped:
                self.finish = "stop"
                piece += self.text.end()
            return piece
        if event.reason == "failed":
            fix = "Ask again; if it stays so, see the server's log."
            message = f"reply: found a failure ({event.problem}); expected a token. {fix}"
            raise Refused(refusal(500, message, kind="server_error", code="failed"))
        if event.reason == "cancelled":
            raise Refused(closing())
        self.finish = event.reason
        return self.text.end()

    def untold(self) -> slice:
        """Which of the text's tokens this was not asked for before."""
        untold, self._n_streamed = slice(self._n_streamed, len(self.told)), len(self.told)
        return untold


@dataclass(frozen=True)
class Asked:
    """A request for replies."""

    service: Service
    served: Served
    request: Request
    body: wire.ChatRequest | wire.CompletionRequest
    max_tokens: int | None
    n_logprobs: int | None
    events: asyncio.Queue[tuple[int, Event] | None] = field(default_factory=asyncio.Queue)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def choices(self, prompts: Sequence[tuple[str, tuple[int, ...]]], *, strip: bool) -> list[Choice]:
        """The replies that are asked for, waiting to be begun; a prompt is its ids and what is echoed of it."""
        body, chat, batch = self.body, self.served.chat, self.service.batch
        if len(prompts) * (body.n or 1) > wire.MAX_CHOICES:
            found = f"{len(prompts)} prompts with {body.n} replies each"
            message = f"n: found {found}; expected at most {wire.MAX_CHOICES} replies. Ask in several requests."
            raise Refused(refusal(400, message, param="n"))
        config = chat.sampling(body.temperature)
        if config.do_sample and body.top_p is not None:
            config.top_p = body.top_p
        template, loop = chat.renderer.template, asyncio.get_running_loop()
        choices = []
        longest = [min(self.max_tokens or MAX_TOKENS, chat.context - len(prompt)) for _, prompt in prompts]
        n_read, n_written = sum(len(prompt) for _, prompt in prompts) * (body.n or 1), sum(longest) * (body.n or 1)
        if n_read + n_written > batch.share:
            found = f"{n_read} tokens of prompts and {n_written} of replies"
            message = f"max_tokens: found {found}; expected at most {batch.share} together. Ask for fewer."
            raise Refused(refusal(400, message, param="max_tokens", code="context_length_exceeded"))
        if (told := n_written * (1 + (self.n_logprobs or 0))) > MAX_TOLD and self.n_logprobs is not None:
            message = f"logprobs: found {told} to be told; expected at most {MAX_TOLD}. Ask for fewer tokens or words."
            raise Refused(refusal(400, message, param="logprobs"))
        for (echo, prompt), most in zip(prompts, longest, strict=True):
            sampling = Sampling(
                config,
                most,
                body.seed,
                self.n_logprobs,
                body.presence_penalty or 0.0,
                body.frequency_penalty or 0.0,
            )
            for number in range(body.n or 1):
                index = len(choices)
                emit = self._emit(loop, index)
                stop_ids = frozenset(template.stop_ids)
                reply = Reply(prompt, chat.adapter, sampling, stop_ids, emit, number)
                before = () if strip else prompt[-_BEFORE:]
                choices.append(Choice(index, reply, Text(template, body.stops, strip, before), echo))
        return choices

    def _emit(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended, and nobody listens
                loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        return emit

    def begin(self, choices: Sequence[Choice]) -> None:
        """They wait for room in the batch; raises Refused where there is no more waiting."""
        try:
            self.service.batch.submit([choice.reply for choice in choices])
        except Full:
            message = "queue: found it full; expected room. Ask again in a few seconds."
            raise Refused(full(message, "queue_full")) from None
        except Closed:
            raise Refused(closing()) from None

    async def follow(self, choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, str]]:
        """Every piece as it comes; begun replies are given up when nobody follows any more.

        Raises Gone when the client has gone, Refused when a reply failed.
        """
        watcher = asyncio.create_task(self._watch())
        self.service.following += 1
        try:
            while any(choice.finish is None for choice in choices):
                item = await self.events.get()
                if item is None:
                    raise Gone
                choice = choices[item[0]]
                if choice.finish is None:
                    piece = choice.take(item[1])
                    if choice.finish is not None:
                        self.service.batch.cancel(choice.reply)
                    yield choice, piece
        finally:
            self.service.following -= 1
            watcher.cancel()
            for choice in choices:
                self.service.batch.cancel(choice.reply)

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.events.put_nowait(None)
