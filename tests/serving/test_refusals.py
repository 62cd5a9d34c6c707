"""What the server refuses: wrong requests, and those of whom it does not answer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from served import CONTEXT, SURE, chat_with, is_idle, serving
from tunesmith.errors import RecipeError
from tunesmith.serving import wire
from tunesmith.serving.server import Serving, _checked_key

KEY = "s3cret-of-16-letters"


def message(**changed: Any) -> dict[str, Any]:
    return chat_with(messages=[{"role": "user", "content": "Hi", **changed}])


WRONG: dict[str, tuple[Any, int, str | None]] = {
    "no JSON": (b'{"model": "bo", ', 400, None),
    "nothing": (b"", 400, None),
    "a list": (b"[]", 400, None),
    "half a byte order mark": (b"\xff\xfe", 400, None),
    "nested without end": (b"[" * 100_000, 400, None),
    "a number of 5000 digits": (b'{"model": "bo", "messages": [], "seed": ' + b"1" * 5000 + b"}", 400, None),
    "not a number": (b'{"model": "bo", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, None),
    "no model": ({"messages": SURE}, 400, "model"),
    "a model that is a number": (chat_with(model=3), 400, "model"),
    "an unknown model": (chat_with(model="nobody"), 404, "model"),
    "no messages": ({"model": "bo"}, 400, "messages"),
    "no message": (chat_with(messages=[]), 400, "messages"),
    "messages that are text": (chat_with(messages="Hi"), 400, "messages"),
    "too many messages": (chat_with(messages=SURE * (wire.MAX_MESSAGES + 1)), 400, "messages"),
    "a message that is text": (chat_with(messages=["Hi"]), 400, "messages.0"),
    "an unknown role": (message(role="robot"), 400, "messages.0.role"),
    "a tool's message": (message(role="tool", tool_call_id="1"), 400, "messages.0.role"),
    "content that is a number": (message(content=3), 400, "messages.0.content"),
    "content that is missing": (chat_with(messages=[{"role": "user"}]), 400, "messages.0.content"),
    "an image": (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), 400, "messages.0.content"),
    "half a character": (b'{"model": "bo", "messages": [{"role": "user", "content": "\\ud83d"}]}', 400, None),
    "half a character in a role": (b'{"model": "bo", "messages": [{"role": "\\ud83d", "content": ""}]}', 400, None),
    "half a character for a model": (
        b'{"model": "\\udfff", "messages": [{"role": "user", "content": "x"}]}',
        404,
        None,
    ),
    "an assistant at the end": (chat_with(messages=[*SURE, {"role": "assistant", "content": "x"}]), 400, "messages"),
    "too long a prompt": (message(content="x" * CONTEXT), 400, "messages"),
    "no tokens at all": (chat_with(max_tokens=0), 400, "max_tokens"),
    "half a token": (chat_with(max_tokens=1.5), 400, "max_tokens"),
    "tokens as text": (chat_with(max_tokens="10"), 400, "max_tokens"),
    "a temperature below zero": (chat_with(temperature=-1), 400, "temperature"),
    "a temperature that is true": (chat_with(temperature=True), 400, "temperature"),
    "no share of the words": (chat_with(top_p=0), 400, "top_p"),
    "no reply": (chat_with(n=0), 400, "n"),
    "too many replies": (chat_with(n=17), 400, "n"),
    "too many likely words": (chat_with(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    "a stop string without letters": (chat_with(stop=""), 400, "stop"),
    "too many stop strings": (chat_with(stop=["a"] * 17), 400, "stop"),
    "a stream that is a word": (chat_with(stream="yes"), 400, "stream"),
    "a tool": (chat_with(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
    "a function": (chat_with(functions=[{"name": "f"}]), 400, "functions"),
    "a form": (chat_with(response_format={"type": "json_schema", "json_schema": {}}), 400, "response_format.type"),
    "a biased word": (chat_with(logit_bias={"33": 100}), 400, "logit_bias"),
    "sound": (chat_with(modalities=["text", "audio"], audio={"voice": "x"}), 400, "modalities.1"),
    "a penalty too large": (chat_with(presence_penalty=3), 400, "presence_penalty"),
}
WRONG_COMPLETIONS: dict[str, tuple[Any, int, str | None]] = {
    "no prompt": ({"model": "bo"}, 400, "prompt"),
    "an empty prompt": ({"model": "bo", "prompt": ""}, 400, "prompt"),
    "no prompts": ({"model": "bo", "prompt": []}, 400, "prompt"),
    "a mixed prompt": ({"model": "bo", "prompt": ["x", 3]}, 400, None),
    "an unknown word": ({"model": "bo", "prompt": [3, 259]}, 400, "prompt"),
    "a word below zero": ({"model": "bo", "prompt": [-1]}, 400, None),
    "too long a prompt": ({"model": "bo", "prompt": [5] * CONTEXT}, 400, "prompt"),
    "too many replies in all": ({"model": "bo", "prompt": ["x"] * 9, "n": 2}, 400, "n"),
    "a suffix": ({"model": "bo", "prompt": "x", "suffix": "y"}, 400, "suffix"),
    "the best of several": ({"model": "bo", "prompt": "x", "best_of": 3}, 400, "best_of"),
    "logprobs of the prompt": ({"model": "bo", "prompt": "x", "echo": True, "logprobs": 1}, 400, "logprobs"),
}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        *(pytest.param("/v1/chat/completions", *case, id=name) for name, case in WRONG.items()),
        *(pytest.param("/v1/completions", *case, id=f"{name} (text)") for name, case in WRONG_COMPLETIONS.items()),
    ],
)
def test_what_is_wrong_is_said(path: str, body: Any, status: int, param: str | None, server: Serving) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    said = re.fullmatch(r"(.+?): found (.+); expected:? (.+)", error["message"], re.S)
    assert said is not None, error["message"]
    where, found, expected = said.groups()
    assert where and found and expected.endswith(".")
    assert is_idle(server)


def test_fields_that_ask_for_nothing_are_let_be(server: Serving) -> None:
    asked = chat_with(
        user="me", store=False, metadata={"a": "b"}, tools=[], tool_choice="none", response_format={"type": "text"},
        logit_bias={}, parallel_tool_calls=True, stop=None, n=None, seed=2**70, future={"x": [1]},
    )  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked)
    assert answer.json()["choices"][0]["message"]["content"] == "Bo."


@pytest.mark.parametrize("path", ["/v1/nothing", "/etc/passwd", "/../../etc/passwd", "/v1/chat/completions/%00"])
def test_other_paths_are_not_there(path: str, server: Serving) -> None:
    answer = httpx.get(server.url + path)
    assert answer.status_code == 404
    assert "expected one of /openapi.json" in answer.json()["error"]["message"]


def test_other_methods_are_refused(server: Serving) -> None:
    answer = httpx.get(f"{server.url}/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "error" in answer.json()


def in_chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 65536):
        yield b" " * 65536


@pytest.mark.parametrize("length_is_told", [True, False])
def test_ten_megabytes_are_refused(length_is_told: bool, server: Serving) -> None:
    size = 10 << 20
    content: Any = b" " * size if length_is_told else in_chunks(size)
    url, headers = f"{server.url}/v1/chat/completions", {"content-type": "application/json"}
    answer = httpx.post(url, content=content, headers=headers, timeout=60)
    assert answer.status_code == 413
    assert "expected at most 4,194,304" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_must_be_called_json(kind: str, server: Serving) -> None:
    """A page of elsewhere can send these without asking."""
    body, headers = json.dumps(chat_with()), {"content-type": kind}
    assert httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers).status_code == 415


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("host", "evil.example", 403),
        ("host", "127.0.0.1.evil.example:8000", 403),
        ("host", "evil.example:8000@127.0.0.1", 200),  # names 127.0.0.1
        ("host", "127.0.0.1@evil.example", 403),
        ("host", "[::1", 403),
        ("host", "", 403),
        ("host", "localhost:8000", 200),
        ("host", "[::1]:8000", 200),
        ("origin", "https://evil.example", 403),
        ("origin", "null", 403),
        ("origin", "http://localhost:3000", 403),  # a page of this machine, but not the server's own
        ("origin", "http://127.0.0.1", 403),
        ("origin", "http://127.0.0.1:PORT", 200),
        ("origin", "http://localhost:PORT", 403),  # the server was asked by another name
        ("origin", "https://127.0.0.1:PORT", 403),
        ("origin", "http://127.0.0.1:PORT/", 403),  # no browser writes it so
        ("sec-fetch-site", "cross-site", 403),
        ("sec-fetch-site", "same-site", 403),
        ("sec-fetch-site", "anything", 403),
        ("sec-fetch-site", "same-origin", 200),
        ("sec-fetch-site", "none", 200),
    ],
)
def test_without_a_key_only_this_machine_is_answered(header: str, value: str, status: int, server: Serving) -> None:
    value = value.replace("PORT", server.url.rpartition(":")[2])
    answer = httpx.get(f"{server.url}/v1/models", headers={header: value})
    assert answer.status_code == status, answer.text
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_link_elsewhere_opens_the_page_and_nothing_else(server: Serving) -> None:
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert httpx.get(server.url, headers=followed).status_code == 200
    assert httpx.get(server.url, headers={**followed, "sec-fetch-dest": "iframe"}).status_code == 403
    assert httpx.get(f"{server.url}/v1/models", headers=followed).status_code == 403


def test_a_key_is_needed_where_there_is_one(runs: dict[str, Path]) -> None:
    with serving([runs["base"]], api_key=KEY) as server:
        for key in (None, "Bearer", "Bearer wrong", f"Bearer {KEY}s", f"Bearer {KEY[:-1]}", KEY, f"Bearer {KEY[:-1]}é"):
            headers: dict[bytes, bytes] = {} if key is None else {b"authorization": key.encode()}
            answer = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert answer.status_code == 401, key
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/openapi.json", "/tunesmith/models"):
            assert httpx.get(server.url + path).status_code == 401
        assert httpx.post(f"{server.url}/v1/chat/completions", json=chat_with()).status_code == 401
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        assert httpx.get(server.url).status_code == 200
        with OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            assert [model.id for model in client.models.list()] == ["base"]
        with pytest.raises(openai.AuthenticationError), OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            client.models.list()
        assert httpx.get(f"{server.url}/health", headers={"host": "elsewhere.example"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
@pytest.mark.parametrize("key", [None, ""])
def test_another_address_needs_a_key(host: str, key: str | None, runs: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match="without a key"):
        Serving([runs["base"]], host, 0, key)


@pytest.mark.parametrize(
    "key", ["sixteen letters and spaces", "ключ из шестнадцати", "a\nb", "s3cret", "fifteen-letters"]
)
def test_a_key_that_no_header_holds_or_that_is_short_is_refused(key: str, runs: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match="API key") as caught:
        Serving([runs["base"]], api_key=key, port=0)
    line = re.search(r"python3 -c '(.+)'", str(caught.value))
    assert line is not None
    made = subprocess.run([sys.executable, "-c", line.group(1)], capture_output=True, text=True, check=True)
    assert _checked_key(made.stdout.strip()) == made.stdout.strip()  # what the message says makes a key that is taken


def test_an_address_in_use_is_told_before_anything_is_loaded(server: Serving) -> None:
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(RecipeError, match="can not be had"):
        Serving([Path("there-is-no-such-run")], port=port)
