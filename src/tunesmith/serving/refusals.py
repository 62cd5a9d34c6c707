"""What is wrong with a request, in OpenAI's form and with a message in four parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tunesmith.serving import wire

MAX_BRACKETS = 1 << 17
"""In a body, those in texts too. Parsing holds up everybody else, and a million empty objects take half a second."""
_Body = TypeVar("_Body", bound=BaseModel)


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


def full(message: str, code: str) -> Response:
    """The answer where there is room in a moment."""
    return refusal(429, message, kind="rate_limit_error", code=code, headers={"Retry-After": "5"})


class Gone(Exception):
    """Nobody waits for the answer any more."""


class Refused(Exception):
    """Ends a request with this answer."""

    def __init__(self, response: Response) -> None:
        self.response = response


def answer_errors(app: FastAPI) -> None:
    """The application answers everything that goes wrong in this form."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
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


def parsed(body: bytes, kind: type[_Body]) -> _Body:
    """A body as what it should be; raises Refused."""
    where, reason = "body", "bytes that are no JSON"
    if (brackets := body.count(b"[") + body.count(b"{")) > MAX_BRACKETS:
        message = f"body: found {brackets:,} lists and objects; expected at most {MAX_BRACKETS:,}. Send less at once."
        raise Refused(refusal(413, message, code="body_too_large"))
    try:
        return kind.model_validate(json.loads(body))
    except ValidationError as error:
        message, param = _said(error.errors(include_url=False))
        raise Refused(refusal(400, message, param=param)) from None
    except json.JSONDecodeError as error:
        where, reason = f"body, character {error.pos}", f"no JSON ({error.msg})"
    except (ValueError, RecursionError):  # not UTF-8; a number of thousands of digits; a list in a list without end
        pass
    raise Refused(refusal(400, f"{where}: found {reason}; expected one JSON object. Mend the body."))


def _said(problems: Sequence[Any]) -> tuple[str, str | None]:
    """What pydantic found wrong, in four parts, and where."""
    first = problems[0]
    # The members of a union are named in the place; only fields and numbers are the user's.
    place = [part for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
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
    text = ""
    for piece in [ascii(value[:80])] if isinstance(value, str) else json.JSONEncoder(default=str).iterencode(value):
        text += piece  # of a long list no more than is shown
        if len(text) > 80:
            return text[:77] + "…"
    return text
