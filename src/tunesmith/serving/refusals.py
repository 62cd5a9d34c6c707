"""What is wrong with a request, in OpenAI's form and with a message in four parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tunesmith.serving import wire


def refusal(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as OpenAI's clients read it."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    # Escaped, so that half characters of a request may stand in it.
    return Response(json.dumps({"error": error}), status, dict(headers or {}), "application/json")


def closing() -> Response:
    """The answer of a server that begins nothing new and gives up what takes too long."""
    message = "server: found it closing; expected it open. Ask again when it has been started again."
    return refusal(503, message, kind="server_error", code="closing", headers={"Retry-After": "10"})


class Refused(Exception):
    """Ends a request with this answer."""

    def __init__(self, response: Response) -> None:
        self.response = response


def answer_errors(app: FastAPI) -> None:
    """The application answers everything that goes wrong in this form."""

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
