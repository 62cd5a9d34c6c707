"""The HTTP side: OpenAI's API over a batch, and what the chat page asks for.

Everything that is wrong with a request is answered in OpenAI's form, with a message in four parts.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from tunesmith.chat import MAX_TOKENS, Chat
from tunesmith.errors import TunesmithError
from tunesmith.serving import wire
from tunesmith.serving.batching import Batch, Closed, Event, Full, Reply, Sampling, Written
from tunesmith.serving.gate import Gate, Limits, refusal
from tunesmith.serving.writing import Text, token_bytes, token_text
from tunesmith.types import Message

PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
_BEFORE = 8  # tokens of a text whose continuation they are decoded with
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Served:
    """A model that can be asked for."""

    id: str
    chat: Chat
    base: str
    """The id of what it is without its adapter."""
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class Service:
    """What the application answers from."""

    models: Mapping[str, Served]
    batch: Batch
    key: str | None = None
    loopback: bool = True
    limits: Limits = field(default_factory=Limits)
    closing: bool = False
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path and status."""
    following: int = 0
    """Requests whose replies are being written."""

    def __post_init__(self) -> None:
        self._renderer = ThreadPoolExecutor(1, "render")  # tokenizers do not like to be asked by two at once

    async def rendered(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """The result of work with a tokenizer, done beside the server's own thread."""
        return await asyncio.get_running_loop().run_in_executor(self._renderer, work, *arguments)


class Refused(Exception):
    """Ends a request with this answer."""

    def __init__(self, response: Response) -> None:
        self.response = response


class _Gone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class _Choice:
    """One of the replies that answer a request, as far as it has come."""

    index: int
    reply: Reply
    text: Text
    told: list[Written] = field(default_factory=list)
    """Tokens that make up the text."""
    n_tokens: int = 0
    finish: wire.FinishReason | None = None

    def take(self, event: Event) -> str:
        """What is to be shown because of it."""
        if isinstance(event, Written):
            self.n_tokens += 1
            if event.token_id not in self.reply.stop_ids:
                self.told.append(event)
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
            message = "server: found it closing; expected it open. Ask again when it has been started again."
            raise Refused(refusal(503, message, kind="server_error", code="closing"))
        self.finish = event.reason
        return self.text.end()


def application(service: Service) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="tunesmith",
        version=importlib.metadata.version("tunesmith"),
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        responses=_refusals(400, 401, 403, 405, 500, 503),
    )
    _routes(app, service)
    _handlers(app)
    app.openapi = lambda: _described(app, service)  # type: ignore[method-assign]
    app.add_middleware(
        Gate,
        limits=service.limits,
        key=service.key,
        loopback=service.loopback,
        closing=lambda: service.closing,
        asked_by_body={"/v1/chat/completions", "/v1/completions", "/tunesmith/prompt"},
    )
    app.add_middleware(_Counted, service=service)
    return app


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    said = {
        400: "Something in the request can not be done.",
        401: "The API key is missing or wrong.",
        403: "On this machine without a key: asked by another name, or by a page of elsewhere.",
        404: "No such model.",
        405: "No such method.",
        408: "The body took too long to arrive.",
        413: "The body is too large.",
        415: "The body is not called JSON.",
        429: "As many requests wait as may.",
        500: "A bug.",
        503: "The server is closing.",
    }
    return {status: {"model": wire.Refusal, "description": said[status]} for status in statuses}


_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A piece of the answer as JSON; at the end [DONE]."}},
    "required": ["data"],
}
_ASKED = _refusals(404, 408, 413, 415, 429)


def _routes(app: FastAPI, service: Service) -> None:
    @app.get("/", response_class=HTMLResponse)
    async def page() -> FileResponse:
        """The chat page."""
        return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/health", responses={503: {"model": wire.Health, "description": "The server is closing."}})
    async def health() -> wire.Health:
        """Whether requests are taken."""
        if service.closing:
            return JSONResponse({"status": "closing"}, 503)  # type: ignore[return-value]
        return wire.Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counts in Prometheus' text format."""
        return PlainTextResponse(_metrics(service), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> wire.ModelList:
        """What can be asked for."""
        return wire.ModelList(data=[_card(served) for served in service.models.values()])

    @app.get("/v1/models/{model:path}", responses=_refusals(404))
    async def model(model: str) -> wire.ModelCard:
        """One of them."""
        return _card(_served(service, model))

    @app.post(
        "/v1/chat/completions",
        response_model=wire.ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": _EVENT}}}, **_ASKED},
    )
    async def chat_completions(body: wire.ChatRequest, request: Request) -> Response:
        """The next reply to a conversation."""
        served = _served(service, body.model)
        prompt_ids = await service.rendered(_prompt, served.chat, body.messages)
        n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        asked = _Asked(service, served, request, body, body.max_completion_tokens or body.max_tokens, n_logprobs)
        choices = asked.choices([prompt_ids], strip=True)
        answer = _ChatAnswer(asked, choices)
        return await _answered(asked, answer)

    @app.post(
        "/v1/completions",
        response_model=wire.Completion,
        responses={200: {"content": {"text/event-stream": {"schema": _EVENT}}}, **_ASKED},
    )
    async def completions(body: wire.CompletionRequest, request: Request) -> Response:
        """What follows a text."""
        served = _served(service, body.model)
        if body.echo and body.logprobs is not None:
            message = "logprobs: found them with echo; expected one of the two. The prompt's are not computed."
            raise Refused(refusal(400, message, param="logprobs"))
        prompts = await service.rendered(_prompts, served.chat, body.prompt)
        asked = _Asked(service, served, request, body, body.max_tokens, body.logprobs)
        choices = asked.choices([ids for _, ids in prompts], strip=False)
        echoes = [text if body.echo else "" for text, _ in prompts for _ in range(body.n or 1)]
        return await _answered(asked, _CompletionAnswer(asked, choices, echoes))

    @app.post("/tunesmith/prompt", responses=_ASKED)
    async def prompt(body: wire.PromptRequest) -> wire.Prompt:
        """What the model is given for a conversation."""
        chat = _served(service, body.model).chat
        return await service.rendered(_rendered, chat, body.messages)

    @app.get("/tunesmith/models")
    async def described() -> list[wire.Described]:
        """The models with what the chat page wants to know."""
        return [
            wire.Described(
                id=served.id,
                tuned=served.chat.tuned,
                base=served.base,
                system=served.chat.system,
                context=served.chat.context,
                template=served.chat.renderer.template.source,
            )
            for served in service.models.values()
        ]


def _served(service: Service, name: str) -> Served:
    if name not in service.models:
        expected = f"expected one of {', '.join(service.models)}"
        message = f"model: found {name[:200]!r}; {expected}. Ask /v1/models."
        raise Refused(refusal(404, message, param="model", code="model_not_found"))
    return service.models[name]


def _card(served: Served) -> wire.ModelCard:
    return wire.ModelCard(id=served.id, created=served.created, owned_by="tunesmith")


# --- prompts ----------------------------------------------------------------------------------------------------------


def _conversation(turns: Sequence[wire.ChatTurn]) -> list[Message]:
    return [Message("system" if turn.role == "developer" else turn.role, turn.text) for turn in turns]


def _prompt(chat: Chat, turns: Sequence[wire.ChatTurn]) -> tuple[int, ...]:
    try:
        return chat.prompt_ids(_conversation(turns))
    except TunesmithError as error:
        code = "context_length_exceeded" if error.found.endswith("tokens") else None
        raise Refused(refusal(400, str(error), param="messages", code=code)) from None


def _prompts(chat: Chat, given: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Text and ids of each prompt."""
    several = isinstance(given, list) and not isinstance(given[0], int)
    return [_plain_prompt(chat, one) for one in (given if several else [given])]


def _plain_prompt(chat: Chat, given: str | list[int]) -> tuple[str, tuple[int, ...]]:
    template = chat.renderer.template
    if isinstance(given, str):
        try:
            text, ids = given, chat.renderer.text_ids(given)
        except TunesmithError as error:
            raise Refused(refusal(400, str(error), param="prompt")) from None
    else:
        n_words = int(chat.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]
        if unknown := next((i for i in given if i >= n_words), None):
            message = f"prompt: found token id {unknown}; expected at most {n_words - 1}. Tokenise for this model."
            raise Refused(refusal(400, message, param="prompt"))
        ids = tuple(given)
        text = str(template.tokenizer.decode(given, clean_up_tokenization_spaces=False))
    if not 0 < len(ids) < chat.context:
        found, expected = f"{len(ids)} tokens", f"at least one and fewer than {chat.context}"
        code = "context_length_exceeded" if ids else None
        message = f"prompt: found {found}; expected {expected}. Shorten it."
        raise Refused(refusal(400, message, param="prompt", code=code))
    return text, ids


def _rendered(chat: Chat, turns: Sequence[wire.ChatTurn]) -> wire.Prompt:
    ids = _prompt(chat, turns)
    template = chat.renderer.template
    special = template.special_ids
    tokens = [wire.Token(id=i, text=token_text(template, i), special=i in special) for i in ids]
    return wire.Prompt(text=chat.prompt_text(_conversation(turns)), tokens=tokens)


# --- replies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
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

    def choices(self, prompts: Sequence[tuple[int, ...]], *, strip: bool) -> list[_Choice]:
        """The replies that are asked for, waiting to be begun."""
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
        for prompt in prompts:
            most = min(self.max_tokens or MAX_TOKENS, chat.context - len(prompt))
            if len(prompt) + most > batch.budget:
                found = f"{len(prompt)} tokens of prompt and {most} of reply"
                message = f"max_tokens: found {found}; expected at most {batch.budget} together. Ask for fewer."
                raise Refused(refusal(400, message, param="max_tokens", code="context_length_exceeded"))
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
                choices.append(_Choice(index, reply, Text(template, body.stops, strip, before)))
        return choices

    def _emit(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended, and nobody listens
                loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        return emit

    def begin(self, choices: Sequence[_Choice]) -> None:
        try:
            self.service.batch.submit([choice.reply for choice in choices])
        except Full:
            message = "queue: found it full; expected room. Ask again in a few seconds."
            headers = {"Retry-After": "5"}
            raise Refused(refusal(429, message, kind="rate_limit_error", code="queue_full", headers=headers)) from None
        except Closed:
            message = "server: found it closing; expected it open. Ask again when it has been started again."
            raise Refused(refusal(503, message, kind="server_error", code="closing")) from None

    async def follow(self, choices: Sequence[_Choice]) -> AsyncGenerator[tuple[_Choice, str]]:
        """Every piece as it comes; begun replies are given up when nobody follows any more.

        Raises _Gone when the client has gone, Refused when a reply failed.
        """
        watcher = asyncio.create_task(self._watch())
        self.service.following += 1
        try:
            while any(choice.finish is None for choice in choices):
                item = await self.events.get()
                if item is None:
                    raise _Gone
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

    def usage(self, choices: Sequence[_Choice]) -> wire.Usage:
        read = sum(len(choice.reply.prompt_ids) for choice in choices if choice.reply.number == 0)
        written = sum(choice.n_tokens for choice in choices)
        return wire.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


class _ChatAnswer:
    """Replies as chat completions."""

    def __init__(self, asked: _Asked, choices: Sequence[_Choice]) -> None:
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

    def piece(self, choice: _Choice, text: str) -> dict[str, Any]:
        told, self._n_told[choice.index] = choice.told[self._n_told[choice.index] :], len(choice.told)
        return self._chunk(choice.index, {"content": text}, logprobs=self._logprobs(told))

    def last(self, choice: _Choice) -> dict[str, Any]:
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


class _CompletionAnswer:
    """Replies as completions of a text."""

    def __init__(self, asked: _Asked, choices: Sequence[_Choice], echoes: Sequence[str]) -> None:
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

    def piece(self, choice: _Choice, text: str) -> dict[str, Any]:
        told, self._n_told[choice.index] = choice.told[self._n_told[choice.index] :], len(choice.told)
        return self._chunk(choice.index, text, logprobs=self._logprobs(choice.index, told))

    def last(self, choice: _Choice) -> dict[str, Any]:
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


async def _answered(asked: _Asked, answer: _ChatAnswer | _CompletionAnswer) -> Response:
    asked.begin(answer.choices)
    if asked.body.stream:
        return _Stream(asked, answer)
    try:
        async with aclosing(asked.follow(answer.choices)) as pieces:
            async for _ in pieces:
                pass
    except _Gone:
        return Response(status_code=499)  # nobody reads it
    return Response(answer.whole().model_dump_json(), media_type="application/json")


class _Stream(StreamingResponse):
    """Events as they come. When it ends, however it ends, nothing goes on being written for it."""

    def __init__(self, asked: _Asked, answer: _ChatAnswer | _CompletionAnswer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(asked, answer), media_type="text/event-stream", headers=headers)
        self._batch, self._replies = asked.service.batch, [choice.reply for choice in answer.choices]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # a client that was gone before the first event
            for reply in self._replies:
                self._batch.cancel(reply)


async def _events(asked: _Asked, answer: _ChatAnswer | _CompletionAnswer) -> AsyncIterator[str]:
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
    except _Gone:
        return
    except Refused as refused:  # too late for a status
        yield f"data: {bytes(refused.response.body).decode()}\n\n"
    yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


# --- errors -----------------------------------------------------------------------------------------------------------


def _handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = _said(error.errors())
        return refusal(400, message, param=param)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI could not read the body
            return refusal(400, "body: found bytes that are no JSON; expected one JSON object. Mend the body.")
        expected = {404: "one of /openapi.json", 405: f"{(error.headers or {}).get('Allow', 'another')}"}
        asked = f"{request.method} {request.url.path}"[:200]
        message = f"request: found {asked}; expected {expected.get(error.status_code, error.detail)}. Ask that."
        return refusal(error.status_code, message, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        message = (
            f"server: found a bug ({type(error).__name__}); expected none. Please report it with the server's log."
        )
        return refusal(500, message, kind="server_error", code="bug")


def _said(problems: Sequence[Any]) -> tuple[str, str | None]:
    """What pydantic found wrong, in four parts, and where."""
    first = problems[0]
    if first["type"] == "json_invalid":
        where = f"body, character {first['loc'][-1]}"
        reason = first.get("ctx", {}).get("error", "")
        return f"{where}: found no JSON ({reason}); expected one JSON object. Mend the body.", None
    # The members of a union are named in the place; only fields and numbers are the user's.
    place = [part for part in first["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
    kinds = ("str", "int", "list")
    param = ".".join(str(part) for part in place if part not in kinds) or None
    same = [problem for problem in problems if problem["loc"][: len(place)] == first["loc"][: len(place)]]
    expected = " or ".join(dict.fromkeys(_lower(problem["msg"]) for problem in same))
    found = "nothing" if first["type"] == "missing" else _short(first.get("input"))
    named = [part for part in place if part in wire.NOT_DONE]
    fix = wire.NOT_DONE[named[-1]] + " Leave it out." if named else "Mend it."
    return f"{param or 'body'}: found {found}; expected: {expected}. {fix}", param


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "…"


# --- what is counted, and the description -----------------------------------------------------------------------------


class _Counted:
    """Counts answers by path and status."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self._service.answers[path, message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counted)


def _metrics(service: Service) -> str:
    batch = service.batch
    gauges = {
        "tunesmith_replies_running": (batch.running, "Replies that are being written."),
        "tunesmith_replies_waiting": (batch.waiting, "Replies that wait for room."),
        "tunesmith_requests_followed": (service.following, "Requests whose replies are being written or wait."),
        "tunesmith_tokens_reserved": (batch.reserved, "Tokens of prompts and replies that room is kept for."),
        "tunesmith_tokens_budget": (batch.budget, "Tokens that there is room for."),
    }
    counters = {
        "tunesmith_prompt_tokens_total": (batch.n_prompt, "Tokens of prompts that were read."),
        "tunesmith_written_tokens_total": (batch.n_written, "Tokens of replies that were written."),
        "tunesmith_settled_tokens_total": (batch.settled, "Tokens that were computed again alone, as two were close."),
    }
    lines = []
    for kind, table in (("gauge", gauges), ("counter", counters)):
        for name, (value, text) in table.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
    lines += ["# HELP tunesmith_answers_total Answers by path and status.", "# TYPE tunesmith_answers_total counter"]
    for (path, status), count in sorted(service.answers.items()):
        lines.append(f'tunesmith_answers_total{{path="{path}",status="{status}"}} {count}')
    return "\n".join(lines) + "\n"


def _described(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI description: FastAPI's, without its own form of a wrong request, which is answered with 400."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                for status, response in operation["responses"].items():
                    if status[0] in "45":  # FastAPI says of errors what it says of the page
                        response["content"] = {"application/json": next(iter(response["content"].values()))}
                if service.key is not None and path not in ("/", "/health"):
                    operation["security"] = [{"key": []}]
                for parameter in operation.get("parameters", ()):
                    parameter["schema"]["enum"] = list(service.models)
        parts = schema["components"]
        for name in ("ChatRequest", "CompletionRequest", "PromptRequest"):
            parts["schemas"][name]["properties"]["model"]["enum"] = list(service.models)
        for name in ("HTTPValidationError", "ValidationError"):
            parts["schemas"].pop(name, None)
        if service.key is not None:
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = schema
    return app.openapi_schema
