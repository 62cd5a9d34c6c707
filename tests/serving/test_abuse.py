"""The server goes on answering, whatever it is sent: limits come before work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from pydantic import BaseModel, ValidationError

from served import CONTEXT, ENDLESS, SURE, chat_with, connected, metrics, serving, until
from tunesmith.serving import wire
from tunesmith.serving.gate import Limits
from tunesmith.serving.prompts import CHARACTERS_PER_TOKEN
from tunesmith.serving.reading import Reading
from tunesmith.serving.refusals import MAX_BRACKETS, Gone
from tunesmith.serving.server import Serving

BODY = 4 << 20
MODEL = b'{"model": "bo", '


def head(server: Serving, *headers: str, path: str = "/v1/chat/completions", method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {server.url[7:]}", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode()


def post(server: Serving, body: bytes, path: str = "/v1/chat/completions") -> httpx.Response:
    return httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}, timeout=60)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the connection is closed."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def answers_others(server: Serving) -> bool:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=chat_with(model="base", max_tokens=2), timeout=60)
    return answer.status_code == 200 and httpx.get(f"{server.url}/health").status_code == 200


# --- what is read of a body -------------------------------------------------------------------------------------------


def lists_in(schema: Any, definitions: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every list in a request, by the fields on the way to it."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    for other in schema.get("anyOf", ()):
        yield from lists_in(other, definitions, path)
    if schema.get("type") == "array":
        yield path, schema
        yield from lists_in(schema["items"], definitions, (*path, "0"))
    for name, field in schema.get("properties", {}).items():
        yield from lists_in(field, definitions, (*path, name))


LISTS = [
    pytest.param(kind, path, schema, id=f"{kind.__name__} {'.'.join(path)}")
    for kind in (wire.ChatRequest, wire.CompletionRequest, wire.PromptRequest)
    for path, schema in lists_in(kind.model_json_schema(), kind.model_json_schema()["$defs"])
]


@pytest.mark.parametrize(("kind", "path", "schema"), LISTS)
def test_every_list_is_bounded_and_its_first_wrong_item_ends_the_reading(
    kind: type[BaseModel], path: tuple[str, ...], schema: Any
) -> None:
    assert schema["maxItems"] <= wire.MAX_IDS
    wrong: Any = [None] * 1000
    for name in reversed(path):
        wrong = [wrong] if name == "0" else {name: wrong}
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(wrong)
    assert caught.value.error_count() < 20  # one for each member of a union, and for each field that is missing


ZEROS = b"[" + b"0," * (BODY // 2 - 200) + b"0]"
HUGE: dict[str, tuple[str, bytes, int]] = {
    "a million zeros for content": (
        "chat/completions", MODEL + b'"messages": [{"role": "user", "content": %s}]}' % ZEROS, 400,
    ),
    "a million zeros for a prompt": ("completions", MODEL + b'"prompt": %s}' % ZEROS, 400),
    "a million zeros for one of the prompts": ("completions", MODEL + b'"prompt": [[1], %s]}' % ZEROS, 400),
    "a million stops": ("completions", MODEL + b'"prompt": "x", "stop": %s}' % ZEROS, 400),
    "a million in a field that is let be": ("completions", MODEL + b'"prompt": [], "x": %s}' % ZEROS, 400),
    "a million lists": ("completions", MODEL + b'"x": [%s[]]}' % (b"[]," * (BODY // 3 - 100)), 413),
    "a million objects": ("chat/completions", MODEL + b'"x": [%s{}]}' % (b"{}," * (BODY // 3 - 100)), 413),
    "a list in a list, deep": ("chat/completions", b"[" * (MAX_BRACKETS // 2), 400),
    "a list in a list, deeper": ("chat/completions", b"[" * BODY, 413),
    "a number of millions of digits": ("completions", MODEL + b'"seed": %s}' % (b"9" * (BODY - 100)), 400),
    "a number that is too large": ("completions", MODEL + b'"prompt": "x", "temperature": 1e999999}', 400),
    "megabytes of text": (
        "chat/completions", MODEL + b'"messages": [{"role": "user", "content": "%s"}]}' % (b"word " * 800_000), 400,
    ),
    "megabytes of a prompt": ("completions", MODEL + b'"prompt": "%s"}' % (b"word " * 800_000), 400),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_a_body_of_four_megabytes_is_answered_in_one_sentence(name: str, server: Serving) -> None:
    path, body, status = HUGE[name]
    answer = post(server, body, f"/v1/{path}")
    assert answer.status_code == status
    assert len(answer.json()["error"]["message"]) < 500
    assert answers_others(server)


def test_characters_are_counted_before_tokens_are_made(server: Serving) -> None:
    most = CHARACTERS_PER_TOKEN * CONTEXT
    for length, said in ((most, "tokens; expected"), (most + 1, "characters; expected")):
        halves = [{"role": "user", "content": "x" * (length // 2)}, {"role": "assistant", "content": ""}]
        rest = {"role": "user", "content": "y" * (length - length // 2)}
        for path, asked in (
            ("/v1/chat/completions", {"messages": [*halves, rest]}),
            ("/tunesmith/prompt", {"messages": [*halves, rest]}),
            ("/v1/completions", {"prompt": ["x", "x" * length]}),
        ):
            error = post(server, json.dumps({"model": "bo", **asked}).encode(), path).json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert said in error["message"]


def test_one_request_has_a_share_of_the_room(runs: dict[str, Path]) -> None:
    """The prompt counts for every reply, and so do tokens that only might be written."""
    with serving([runs["base"]], cache_tokens=4000) as server:
        assert server.service.batch.share == 3000
        url = f"{server.url}/v1/completions"
        asked = {"model": "base", "prompt": [5] * 150, "temperature": 0}
        for n, max_tokens, status in [(16, 37, 200), (16, 38, 400), (4, 601, 400), (1, 2851, 400)]:
            answer = httpx.post(url, json={**asked, "n": n, "max_tokens": max_tokens}, timeout=60)
            assert answer.status_code == status, (n, max_tokens)
            if answer.status_code == 400:
                assert answer.json()["error"]["code"] == "context_length_exceeded"
                assert "expected at most 3000 together" in answer.json()["error"]["message"]


# --- who waits to be read ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_is_read(server: Serving) -> Iterator[None]:
    """Whoever comes waits."""
    held = threading.Event()
    server.service.reading._thread.submit(held.wait)
    try:
        yield
    finally:
        held.set()


def test_who_hangs_up_before_being_read_is_not_read(runs: dict[str, Path]) -> None:
    body = json.dumps(chat_with(model="base", messages=[{"role": "user", "content": "x" * 60_000}])).encode()
    with serving([runs["base"]]) as server, ThreadPoolExecutor(1) as other:
        with nothing_is_read(server):
            callers = [connected(server) for _ in range(150)]
            for caller in callers:
                caller.sendall(head(server, f"Content-Length: {len(body)}") + body)
            until(lambda: server.service.reading.waiting == 149)  # one has its turn
            small = other.submit(answers_others, server)
            until(lambda: server.service.reading.waiting == 150)
            for caller in callers:
                caller.close()
            until(lambda: server.service.reading.waiting == 1)
        assert small.result()
        assert metrics(server)['tunesmith_answers_total{path="/v1/chat/completions",status="499"}'] == 150


def test_the_smallest_is_read_first_and_who_has_gone_is_left_out() -> None:
    held, read = threading.Event(), list[int]()

    def work(body: bytes) -> int:
        held.wait(60)
        read.append(len(body))
        return len(body)

    async def caller(reading: Reading, size: int, gone: asyncio.Event) -> int:
        sent = [{"type": "http.request", "body": b"x" * size, "more_body": False}]

        async def receive() -> Any:
            if not sent:
                await gone.wait()
            return sent.pop() if sent else {"type": "http.disconnect"}

        return await reading.read(Request({"type": "http"}, receive), work)

    async def crowd() -> list[Any]:
        reading, stays, leaves = Reading(9), asyncio.Event(), asyncio.Event()
        coming = [(500, leaves), (4000, stays), (7, leaves), (3000, stays), (10, stays), (10, leaves), (4000, leaves)]
        asked = []
        for size, gone in coming:
            asked.append(asyncio.ensure_future(caller(reading, size, gone)))
            await asyncio.sleep(0.01)
        assert reading.waiting == 6
        leaves.set()
        await asyncio.sleep(0.1)
        assert reading.waiting == 3
        held.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert await caller(reading, 1, stays) == 1  # and it goes on
        reading.end()
        return answers

    answers = asyncio.run(crowd())
    assert [type(answer) if isinstance(answer, Gone) else answer for answer in answers] == [
        Gone, 4000, Gone, 3000, 10, Gone, Gone,
    ]  # fmt: skip
    assert read == [500, 10, 3000, 4000, 1]  # the first had its turn when it left


def test_when_too_many_wait_to_be_read_the_next_is_told_to_come_back(runs: dict[str, Path]) -> None:
    body = json.dumps(chat_with(model="base")).encode()
    with serving([runs["base"]], queue_limit=3) as server:
        with nothing_is_read(server), contextlib.ExitStack() as stack:
            for _ in range(4):
                caller = stack.enter_context(connected(server))
                caller.sendall(head(server, f"Content-Length: {len(body)}", path="/tunesmith/prompt") + body)
            until(lambda: server.service.reading.waiting == 3)
            full = post(server, body)
            assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
            assert int(full.headers["retry-after"]) > 0
            assert httpx.get(f"{server.url}/health").status_code == 200
        assert answers_others(server)


def test_large_bodies_share_their_room_and_small_ones_always_have_some(runs: dict[str, Path]) -> None:
    limits = Limits(bodies_bytes=300_000)
    body = json.dumps(chat_with(model="base", x="y" * 200_000)).encode()
    with serving([runs["base"]], limits=limits) as server:
        with connected(server) as slow:
            slow.sendall(head(server, f"Content-Length: {len(body)}") + body[:-1])
            until(lambda: post(server, body).status_code == 429)  # when what was sent has come
            full = post(server, body)
            assert (full.json()["error"]["code"], full.headers["retry-after"]) == ("bodies_full", "5")
            assert answers_others(server)
            slow.sendall(body[-1:])
            assert slow.recv(1024).startswith(b"HTTP/1.1 200")
        until(lambda: post(server, body).status_code == 200)


# --- connections ------------------------------------------------------------------------------------------------------


def test_connections_that_ask_nothing_give_way_to_new_ones(runs: dict[str, Path]) -> None:
    """Whoever is being answered keeps the place, also beside three times as many as there are places for."""
    body = json.dumps(chat_with(model="base", messages=ENDLESS, max_tokens=CONTEXT - 100, stream=True)).encode()
    with serving([runs["base"]], limits=Limits(connections=20)) as server, contextlib.ExitStack() as stack:
        answered = stack.enter_context(connected(server))
        answered.sendall(head(server, f"Content-Length: {len(body)}") + body)
        assert answered.recv(1024).startswith(b"HTTP/1.1 200")
        begun = (b"", b"POST / HTTP", head(server, "Content-Length: 9") + b"{")
        idle = [stack.enter_context(connected(server)) for _ in range(60)]
        for number, connection in enumerate(idle):
            with contextlib.suppress(ConnectionError):
                connection.sendall(begun[number % 3])
        for _ in range(5):
            assert answers_others(server)
        assert all(all_of(connection) == b"" for connection in idle[:35])  # the longest idle ones are closed
        assert answered.recv(1024)  # and the reply goes on
        answered.close()


def test_an_address_with_many_connections_takes_no_place_from_one_with_few(runs: dict[str, Path]) -> None:
    with serving([runs["base"]], limits=Limits(connections=20)) as server, contextlib.ExitStack() as stack:
        port = int(server.url.rpartition(":")[2])
        try:
            few = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 60, ("127.0.0.2", 0)))
                for _ in range(5)
            ]
        except OSError as error:
            pytest.skip(f"no second address of this machine: {error}")
        many = [stack.enter_context(connected(server)) for _ in range(60)]
        assert all_of(many[0]) == b""
        for connection in few:  # they have been idle for longest
            connection.sendall(head(server, "Connection: close", path="/health", method="GET"))
            assert all_of(connection).startswith(b"HTTP/1.1 200")


def test_a_server_that_is_full_of_those_it_answers_takes_no_more(runs: dict[str, Path]) -> None:
    body = json.dumps(chat_with(model="base", messages=ENDLESS, max_tokens=CONTEXT - 100, stream=True)).encode()
    with serving([runs["base"]], limits=Limits(connections=4)) as server, contextlib.ExitStack() as stack:
        asking = [stack.enter_context(connected(server)) for _ in range(4)]
        for connection in asking:
            connection.sendall(head(server, f"Content-Length: {len(body)}") + body)
            assert connection.recv(1024).startswith(b"HTTP/1.1 200")
        with connected(server) as late:
            assert all_of(late) == b""
        asking[0].close()
        until(lambda: _reached(server))
        for connection in asking:
            connection.close()


def _reached(server: Serving) -> bool:
    try:
        return httpx.get(f"{server.url}/health").status_code == 200
    except httpx.TransportError:
        return False


# --- what is no request -----------------------------------------------------------------------------------------------


def test_a_body_whose_end_is_told_in_two_ways_ends_the_connection(server: Serving) -> None:
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    chunked = b"2\r\n{}\r\n0\r\n\r\n"
    for sent in (
        head(server, "Content-Length: 5", "Transfer-Encoding: chunked") + chunked,
        head(server, "Transfer-Encoding: chunked", f"Content-Length: {len(chunked)}") + chunked,
        head(server, "Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0") + chunked,
        head(server, "Transfer-Encoding: chunked", "Content-Length: 0", path="/health", method="GET") + chunked,
    ):
        with connected(server) as connection:
            connection.sendall(sent + smuggled)
            came = all_of(connection)
        assert came.startswith(b"HTTP/1.1 400")
        assert came.count(b"HTTP/1.1") == 1
        assert b'"code": "framing"' in came


NO_HTTP: dict[str, tuple[bytes, int]] = {
    "thousands of headers": (b"A: b\r\n" * 20_000, 431),
    "one header of a megabyte": (b"A: " + b"b" * (1 << 20), 431),
    "a header without a colon": (b"what\r\n\r\n", 400),
    "two lengths": (b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "a length below zero": (b"Content-Length: -1\r\n\r\n", 400),
    "an unknown encoding": (b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "a chunk that is none": (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "a TLS handshake": (b"", 400),
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_answered_in_the_same_form(name: str, server: Serving) -> None:
    sent, status = NO_HTTP[name]
    begin = head(server)[:-2] if sent else b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    with connected(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(begin + (sent or b"\r\n\r\n"))
        came = all_of(connection)
    first, _, body = came.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 %d" % status)
    assert b"nosniff" in first
    assert ": found " in json.loads(body)["error"]["message"]
    assert answers_others(server)


def test_every_answer_says_that_it_is_what_it_says(runs: dict[str, Path]) -> None:
    """No browser guesses at its type, and no page may frame it or take scripts into it."""
    with serving([runs["base"]], limits=Limits(seconds_to_ask=2)) as server:
        asked = chat_with(model="base", max_tokens=3)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answers = {
                "the page": client.get("/"),
                "its script": client.get("/page/chat.js"),
                "health": client.get("/health"),
                "metrics": client.get("/metrics"),
                "models": client.get("/v1/models"),
                "the description": client.get("/openapi.json"),
                "a reply": client.post("/v1/chat/completions", json=asked),
                "a stream": client.post("/v1/chat/completions", json={**asked, "stream": True}),
                "wrong": client.post("/v1/chat/completions", json={}),
                "no path": client.get("/nothing"),
                "no script": client.get("/page/nothing"),
                "no method": client.put("/v1/models"),
                "no JSON": client.post("/v1/chat/completions", content=b"x"),
                "too large": client.post("/v1/chat/completions", json={"x": "y" * BODY}),
                "another's page": client.get("/v1/models", headers={"origin": "http://localhost:1"}),
            }
        statuses = {name: answer.status_code for name, answer in answers.items()}
        assert sorted(set(statuses.values())) == [200, 400, 403, 404, 405, 413, 415]
        for name, answer in answers.items():
            assert answer.headers["x-content-type-options"] == "nosniff", name
            assert "default-src 'none'" in answer.headers["content-security-policy"], name
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"], name
        with connected(server) as half:
            half.sendall(head(server, "Content-Length: 9") + b"{")
            late = all_of(half)
        assert late.startswith(b"HTTP/1.1 408") and b"nosniff" in late


def test_an_answer_tells_so_many_probabilities_at_most(server: Serving) -> None:
    asked = chat_with(messages=SURE, logprobs=True, top_logprobs=20, n=16, max_tokens=800)
    answer = post(server, json.dumps(asked).encode())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")
