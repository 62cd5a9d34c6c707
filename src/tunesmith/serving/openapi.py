"""The OpenAPI description: FastAPI's, with what it can not see in the code."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tunesmith.serving import wire
from tunesmith.serving.service import Service

EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A piece of the answer as JSON; at the end [DONE]."}},
    "required": ["data"],
}


def refused_with(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What FastAPI is told of answers with these statuses."""
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


def asked_as(body: type[BaseModel]) -> dict[str, Any]:
    """What FastAPI is told of a body that it does not read itself."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def description(app: FastAPI, service: Service) -> dict[str, Any]:
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
        bodies = (wire.ChatRequest, wire.CompletionRequest, wire.PromptRequest)
        of_bodies = models_json_schema(
            [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
        )
        parts["schemas"] |= of_bodies[1]["$defs"]
        for body in bodies:
            parts["schemas"][body.__name__]["properties"]["model"]["enum"] = list(service.models)
        for name in ("HTTPValidationError", "ValidationError"):
            parts["schemas"].pop(name, None)
        if service.key is not None:
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = schema
    return app.openapi_schema
