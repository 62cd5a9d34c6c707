"""Replies as they go over the wire: whole, or as events while they are written."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response, StreamingResponse

from tunesmith.data.writing import token_bytes, token_text
from tunesmith.serving import wire
from tunesmith.serving.asked import Asked, Choice
from tunesmith.serving.refusals import Gone, Refused

_Logprobs = wire.ChatLogprobs | wire.CompletionLogprobs


@dataclass(frozen=True)
class Form:
    """What OpenAI's two endpoints write differently of the same replies."""

    id: str
    answer: type[wire.ChatCompletion] | type[wire.Completion]
    chunk: str
    whole: Callable[[str], dict[str, Any]]
    """The text in a whole answer."""
    begin: Callable[[str], dict[str, Any]]
    """What a stream begins with, by what is echoed; empty: with the text itself."""
    piece: Callable[[str], dict[str, Any]]
    """A piece of the text, "" where nothing but the reason to end is told."""
    logprobs: Callable[[Choice, slice], _Logprobs]
    """Of some of the reply's tokens."""


def _finite(logprob: float | None) -> float:
    return max(logprob or 0.0, -9999.0)  # JSON knows no infinity; OpenAI writes this for it


def _chat_logprobs(choice: Choice, part: slice) -> wire.ChatLogprobs:
    template = choice.text.template

    def likely(token_id: int, logprob: float | None) -> dict[str, Any]:
        given = list(token_bytes(template, token_id))
        return {"token": token_text(template, token_id), "logprob": _finite(logprob), "bytes": given}

    content = [
        wire.TokenLogprob(
            **likely(written.token_id, written.logprob),
            top_logprobs=[wire.Likely(**likely(*pair)) for pair in written.likeliest],
        )
        for written in choice.told[part]
    ]
    return wire.ChatLogprobs(content=content)


def _text_logprobs(choice: Choice, part: slice) -> wire.CompletionLogprobs:
    template, told = choice.text.template, choice.told[part]
    return wire.CompletionLogprobs(
        tokens=[token_text(template, written.token_id) for written in told],
        token_logprobs=[_finite(written.logprob) for written in told],
        top_logprobs=[
            {token_text(template, i): _finite(logprob) for i, logprob in written.likeliest} for written in told
        ],
        text_offset=choice.places[part],
    )


CHAT = Form(
    "chatcmpl",
    wire.ChatCompletion,
    "chat.completion.chunk",
    whole=lambda text: {"message": wire.AnswerMessage(content=text)},
    begin=lambda _: {"delta": {"role": "assistant", "content": "", "refusal": None}},
    piece=lambda text: {"delta": {"content": text} if text else {}},
    logprobs=_chat_logprobs,
)
TEXT = Form(
    "cmpl",
    wire.Completion,
    "text_completion",
    whole=lambda text: {"text": text},
    begin=lambda echo: {"text": echo} if echo else {},
    piece=lambda text: {"text": text},
    logprobs=_text_logprobs,
)


@dataclass(frozen=True)
class Answer:
    """Replies in one of the two forms."""

    asked: Asked
    choices: Sequence[Choice]
    form: Form

    def whole(self) -> wire.ChatCompletion | wire.Completion:
        """All of it, when the replies have ended."""
        choices: list[Any] = [  # which the answer's class reads and checks
            {
                "index": choice.index,
                **self.form.whole(choice.echo + choice.text.whole),
                "logprobs": self._logprobs(choice, slice(None)),
                "finish_reason": choice.finish or "length",
            }
            for choice in self.choices
        ]
        return self.form.answer(**self._head, choices=choices, usage=self._usage)

    def written(self) -> str:
        return self.whole().model_dump_json()

    def first(self) -> list[dict[str, Any]]:
        """The chunks in front of all pieces."""
        return [self._chunk(choice, begin) for choice in self.choices if (begin := self.form.begin(choice.echo))]

    def piece(self, choice: Choice, text: str) -> dict[str, Any]:
        """A chunk with a piece of a reply, and the tokens up to it."""
        return self._chunk(choice, self.form.piece(text), choice.untold())

    def last(self, choice: Choice) -> dict[str, Any]:
        """A chunk with the reason to end, and the tokens that show no text."""
        return self._chunk(choice, self.form.piece(""), choice.untold(), choice.finish)

    def used(self) -> dict[str, Any]:
        """A chunk with the numbers of tokens."""
        return {**self._head, "object": self.form.chunk, "choices": [], "usage": self._usage.model_dump()}

    def _chunk(
        self, choice: Choice, piece: dict[str, Any], part: slice = slice(0), finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(choice, part) if choice.told[part] else None
        ends = {"logprobs": logprobs and logprobs.model_dump(), "finish_reason": finish}
        return {**self._head, "object": self.form.chunk, "choices": [{"index": choice.index, **piece, **ends}]}

    @property
    def _head(self) -> dict[str, Any]:
        asked = self.asked
        return {"id": f"{self.form.id}-{asked.id}", "created": asked.created, "model": asked.served.id}

    @property
    def _usage(self) -> wire.Usage:
        read = sum(len(choice.reply.prompt_ids) for choice in self.choices if choice.reply.number == 0)
        written = sum(choice.n_tokens for choice in self.choices)
        return wire.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    def _logprobs(self, choice: Choice, part: slice) -> _Logprobs | None:
        return None if self.asked.n_logprobs is None else self.form.logprobs(choice, part)


async def answered(answer: Answer) -> Response:
    """Has the replies written; what the client is sent of them."""
    asked = answer.asked
    asked.begin(answer.choices)
    if asked.body.stream:
        return _Stream(answer)
    async with aclosing(asked.follow(answer.choices)) as pieces:
        async for _ in pieces:
            pass
    # Beside the server's own thread: with logprobs it may be megabytes.
    return Response(await asyncio.to_thread(answer.written), media_type="application/json")


class _Stream(StreamingResponse):
    """Events as they come. When it ends, however it ends, nothing goes on being written for it."""

    def __init__(self, answer: Answer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(answer), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # a client that was gone before the first event
            for choice in self._answer.choices:
                self._answer.asked.service.batch.cancel(choice.reply)


async def _events(answer: Answer) -> AsyncIterator[str]:
    asked = answer.asked
    no_usage = {"usage": None} if asked.body.tells_usage else {}
    try:
        async with aclosing(asked.follow(answer.choices)) as pieces:
            for chunk in answer.first():
                yield _event({**chunk, **no_usage})
            async for choice, piece in pieces:
                if piece:
                    yield _event({**answer.piece(choice, piece), **no_usage})
                if choice.finish is not None:
                    yield _event({**answer.last(choice), **no_usage})
        if asked.body.tells_usage:
            yield _event(answer.used())
    except Gone:
        return
    except Refused as refused:  # too late for a status
        yield f"data: {bytes(refused.response.body).decode()}\n\n"
    yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
