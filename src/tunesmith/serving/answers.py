"""Replies as they go over the wire: whole, or as events while they are written."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response, StreamingResponse

from tunesmith.serving import wire
from tunesmith.serving.asked import Asked, Choice, Gone
from tunesmith.serving.batching import Written
from tunesmith.serving.refusals import Refused
from tunesmith.serving.writing import token_bytes, token_text


class ChatAnswer:
    """Replies as chat completions."""

    def __init__(self, asked: Asked, choices: Sequence[Choice]) -> None:
        self.asked, self.choices = asked, choices
        self._id = f"chatcmpl-{asked.id}"
        self._n_told = [0] * len(choices)

    def whole(self) -> wire.ChatCompletion:
        found = [
            wire.ChatChoice(
                index=choice.index,
                message=wire.AnswerMessage(content=choice.text.whole),
                logprobs=self._logprobs(choice.told),
                finish_reason=choice.finish or "length",
            )
            for choice in self.choices
        ]
        return wire.ChatCompletion(
            id=self._id,
            created=self.asked.created,
            model=self.asked.served.id,
            choices=found,
            usage=self.asked.usage(self.choices),
        )

    def first(self) -> list[dict[str, Any]]:
        return [
            self._chunk(choice.index, {"role": "assistant", "content": "", "refusal": None}) for choice in self.choices
        ]

    def piece(self, choice: Choice, text: str) -> dict[str, Any]:
        told, self._n_told[choice.index] = choice.told[self._n_told[choice.index] :], len(choice.told)
        return self._chunk(choice.index, {"content": text}, logprobs=self._logprobs(told))

    def last(self, choice: Choice) -> dict[str, Any]:
        untold = choice.told[self._n_told[choice.index] :]  # of tokens that show no text
        return self._chunk(choice.index, {}, choice.finish, self._logprobs(untold) if untold else None)

    def used(self) -> dict[str, Any]:
        return {**self._chunk(0, {}), "choices": [], "usage": self.asked.usage(self.choices).model_dump()}

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> Any:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if logprobs is not None:
            choice["logprobs"] = logprobs.model_dump()
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self.asked.created,
            "model": self.asked.served.id,
            "choices": [choice],
        }

    def _logprobs(self, told: Sequence[Written]) -> wire.ChatLogprobs | None:
        if self.asked.n_logprobs is None:
            return None
        content = [
            wire.TokenLogprob(
                **self._likely(written.token_id, written.logprob or 0.0),
                top_logprobs=[wire.Likely(**self._likely(*pair)) for pair in written.likeliest],
            )
            for written in told
        ]
        return wire.ChatLogprobs(content=content)

    def _likely(self, token_id: int, logprob: float) -> dict[str, Any]:
        template = self.asked.served.chat.renderer.template
        text, given = token_text(template, token_id), token_bytes(template, token_id)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(given)}


class CompletionAnswer:
    """Replies as completions of a text."""

    def __init__(self, asked: Asked, choices: Sequence[Choice], echoes: Sequence[str]) -> None:
        self.asked, self.choices, self._echoes = asked, choices, echoes
        self._id = f"cmpl-{asked.id}"
        self._n_told = [0] * len(choices)
        self._offset = [0] * len(choices)

    def whole(self) -> wire.Completion:
        found = [
            wire.CompletionChoice(
                index=choice.index,
                text=self._echoes[choice.index] + choice.text.whole,
                logprobs=self._logprobs(choice.index, choice.told),
                finish_reason=choice.finish or "length",
            )
            for choice in self.choices
        ]
        return wire.Completion(
            id=self._id,
            created=self.asked.created,
            model=self.asked.served.id,
            choices=found,
            usage=self.asked.usage(self.choices),
        )

    def first(self) -> list[dict[str, Any]]:
        return [self._chunk(index, echo) for index, echo in enumerate(self._echoes) if echo]

    def piece(self, choice: Choice, text: str) -> dict[str, Any]:
        told, self._n_told[choice.index] = choice.told[self._n_told[choice.index] :], len(choice.told)
        return self._chunk(choice.index, text, logprobs=self._logprobs(choice.index, told))

    def last(self, choice: Choice) -> dict[str, Any]:
        untold = choice.told[self._n_told[choice.index] :]  # of tokens that show no text
        return self._chunk(choice.index, "", choice.finish, self._logprobs(choice.index, untold) if untold else None)

    def used(self) -> dict[str, Any]:
        return {**self._chunk(0, ""), "choices": [], "usage": self.asked.usage(self.choices).model_dump()}

    def _chunk(self, index: int, text: str, finish: str | None = None, logprobs: Any = None) -> Any:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        if logprobs is not None:
            choice["logprobs"] = logprobs.model_dump()
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self.asked.created,
            "model": self.asked.served.id,
            "choices": [choice],
        }

    def _logprobs(self, index: int, told: Sequence[Written]) -> wire.CompletionLogprobs | None:
        if self.asked.n_logprobs is None:
            return None
        template = self.asked.served.chat.renderer.template
        tokens, offsets = [token_text(template, written.token_id) for written in told], []
        for token in tokens:
            offsets.append(self._offset[index])
            self._offset[index] += len(token)
        return wire.CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[max(written.logprob or 0.0, -9999.0) for written in told],
            top_logprobs=[
                {token_text(template, i): max(logprob, -9999.0) for i, logprob in written.likeliest} for written in told
            ],
            text_offset=offsets,
        )


async def answered(asked: Asked, answer: ChatAnswer | CompletionAnswer) -> Response:
    """Has the replies written; what the client is sent of them."""
    asked.begin(answer.choices)
    if asked.body.stream:
        return _Stream(asked, answer)
    try:
        async with aclosing(asked.follow(answer.choices)) as pieces:
            async for _ in pieces:
                pass
    except Gone:
        return Response(status_code=499)  # nobody reads it
    return Response(answer.whole().model_dump_json(), media_type="application/json")


class _Stream(StreamingResponse):
    """Events as they come. When it ends, however it ends, nothing goes on being written for it."""

    def __init__(self, asked: Asked, answer: ChatAnswer | CompletionAnswer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(asked, answer), media_type="text/event-stream", headers=headers)
        self._batch, self._replies = asked.service.batch, [choice.reply for choice in answer.choices]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # a client that was gone before the first event
            for reply in self._replies:
                self._batch.cancel(reply)


async def _events(asked: Asked, answer: ChatAnswer | CompletionAnswer) -> AsyncIterator[str]:
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
