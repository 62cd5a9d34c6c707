"""The HTTP side: OpenAI's API over a batch, and what the chat page asks for."""

from __future__ import annotations

import importlib.metadata
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from tunesmith.serving import wire
from tunesmith.serving.answers import CHAT, TEXT, Answer, answered
from tunesmith.serving.asked import Asked
from tunesmith.serving.gate import Gate
from tunesmith.serving.metrics import Counted, metrics_text
from tunesmith.serving.openapi import EVENT, asked_as, description, refused_with
from tunesmith.serving.prompts import of_chat, of_completion, shown
from tunesmith.serving.refusals import answer_errors
from tunesmith.serving.service import Served, Service

PAGE = Path(__file__).parent / "page"
_REFUSED_WITH = refused_with(404, 408, 413, 415, 429)


def application(service: Service) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="tunesmith",
        version=importlib.metadata.version("tunesmith"),
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        responses=refused_with(400, 401, 403, 405, 500, 503),
    )
    _routes(app, service)
    answer_errors(app)
    app.openapi = lambda: description(app, service)  # type: ignore[method-assign]  # as FastAPI's documentation does
    app.add_middleware(
        Gate,
        limits=service.limits,
        key=service.key,
        loopback=service.loopback,
        closing=lambda: service.closing,
        asked_by_body={"/v1/chat/completions", "/v1/completions", "/tunesmith/prompt"},
    )
    app.add_middleware(Counted, service=service)
    return app


def _routes(app: FastAPI, service: Service) -> None:
    @app.get("/", response_class=HTMLResponse)
    async def page() -> FileResponse:
        """The chat page."""
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-store"})

    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/health", responses={503: {"model": wire.Health, "description": "The server is closing."}})
    async def health(response: Response) -> wire.Health:
        """Whether requests are taken."""
        response.status_code = 503 if service.closing else 200
        return wire.Health(status="closing" if service.closing else "ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counts in Prometheus' text format."""
        return PlainTextResponse(metrics_text(service), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> wire.ModelList:
        """What can be asked for."""
        return wire.ModelList(data=[_card(served) for served in service.models.values()])

    @app.get("/v1/models/{model:path}", responses=refused_with(404))
    async def model(model: str) -> wire.ModelCard:
        """One of them."""
        return _card(service.served(model))

    @app.post(
        "/v1/chat/completions",
        response_model=wire.ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": EVENT}}}, **_REFUSED_WITH},
        openapi_extra=asked_as(wire.ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        """The next reply to a conversation."""
        body, served, prompt_ids = await service.reading.read(request, partial(of_chat, service))
        n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        asked = Asked(service, served, request, body, body.max_completion_tokens or body.max_tokens, n_logprobs)
        return await answered(Answer(asked, asked.choices([("", prompt_ids)], strip=True), CHAT))

    @app.post(
        "/v1/completions",
        response_model=wire.Completion,
        responses={200: {"content": {"text/event-stream": {"schema": EVENT}}}, **_REFUSED_WITH},
        openapi_extra=asked_as(wire.CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """What follows a text."""
        body, served, prompts = await service.reading.read(request, partial(of_completion, service))
        asked = Asked(service, served, request, body, body.max_tokens, body.logprobs)
        choices = asked.choices([(text if body.echo else "", ids) for text, ids in prompts], strip=False)
        return await answered(Answer(asked, choices, TEXT))

    @app.post(
        "/tunesmith/prompt",
        response_model=wire.Prompt,
        responses=_REFUSED_WITH,
        openapi_extra=asked_as(wire.PromptRequest),
    )
    async def prompt(request: Request) -> Response:
        """What the model is given for a conversation."""
        written = await service.reading.read(request, partial(shown, service))
        return Response(written, media_type="application/json")

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


def _card(served: Served) -> wire.ModelCard:
    return wire.ModelCard(id=served.id, created=served.created, owned_by="tunesmith")
