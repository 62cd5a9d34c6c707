"""The server asked by many at once, and by those who leave."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from served import CONTEXT, ENDLESS, SURE, is_idle, metrics, said, serving, streamed, until
from tunesmith.chat import Chat
from tunesmith.serving.server import Serving


def test_64_requests_of_16_clients_are_answered_as_each_alone(
    server: Serving, client: OpenAI, chats: dict[str, Chat]
) -> None:
    questions = [f"Question {i}: " + "why? " * (i % 11) for i in range(64)]
    names = [("bo", "mia", "base")[i % 3] for i in range(64)]
    expected = [
        said([{"role": "user", "content": question}], chats[name], 24)
        for question, name in zip(questions, names, strict=True)
    ]

    def ask(i: int) -> str:
        messages: Any = [{"role": "user", "content": questions[i]}]
        asked: Any = {"model": names[i], "messages": messages, "temperature": 0, "max_tokens": 24}
        if i % 2:
            return "".join(streamed(client, **asked)[0])
        return client.chat.completions.create(**asked).choices[0].message.content or ""

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, range(64)))
    assert answers == expected
    assert len(set(expected)) > 16  # observed 24: a question says more to some than to others
    until(lambda: is_idle(server))


def test_200_connections_at_once_are_all_answered(server: Serving) -> None:
    body = {"model": "bo", "messages": SURE, "temperature": 0}

    async def ask() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as client:
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(200)))

    answers = asyncio.run(ask())
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {"Bo."}
    until(lambda: is_idle(server))


def test_who_hangs_up_frees_the_place_and_harms_nobody(server: Serving, chats: dict[str, Chat]) -> None:
    """Of forty, twelve leave in the middle: six who were being streamed to, six who waited for the whole."""
    expected = said(SURE, chats["mia"])
    written = metrics(server)["tunesmith_written_tokens_total"]
    long = {"model": "base", "messages": ENDLESS, "temperature": 0, "max_tokens": CONTEXT - 100}
    short = {"model": "mia", "messages": SURE, "temperature": 0}

    async def ask(i: int, client: httpx.AsyncClient) -> str | None:
        if i % 10 == 0 or i % 20 == 5:
            async with client.stream("POST", "/v1/chat/completions", json={**long, "stream": True}) as answer:
                lines = answer.aiter_lines()
                for _ in range(6):
                    await anext(lines)
            return None
        if i % 20 in (3, 7, 15):
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/chat/completions", json=long, timeout=1)
            return None
        answer = await client.post("/v1/chat/completions", json=short)
        return answer.json()["choices"][0]["message"]["content"]

    async def all_of_them() -> list[str | None]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as client:
            return await asyncio.gather(*(ask(i, client) for i in range(40)))

    answers = asyncio.run(all_of_them())
    assert answers.count(None) == 12
    assert answers.count(expected) == 28
    until(lambda: is_idle(server))
    assert metrics(server)["tunesmith_written_tokens_total"] - written < 6 * CONTEXT  # they were not written to the end


def test_a_queue_that_is_full_says_so_and_when_to_come_back(runs: dict[str, Path]) -> None:
    long = {"model": "base", "messages": ENDLESS, "temperature": 0, "max_tokens": CONTEXT - 100, "stream": True}
    with (
        serving([runs["base"]], at_once=1, queue_limit=1) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        with client.stream("POST", "/v1/chat/completions", json=long) as first, ExitStack() as others:
            lines = first.iter_lines()  # without a name it would be closed at once, and the connection with it
            assert next(lines)
            until(lambda: metrics(server)["tunesmith_replies_running"] == 1)  # before that it waits itself
            second = others.enter_context(client.stream("POST", "/v1/chat/completions", json=long))
            assert second.status_code == 200  # it waits
            third = client.post("/v1/chat/completions", json={**long, "stream": False})
            assert third.status_code == 429
            assert int(third.headers["retry-after"]) > 0
            assert third.json()["error"]["code"] == "queue_full"
            with (
                pytest.raises(openai.RateLimitError),
                OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as asking,
            ):
                asking.chat.completions.create(model="base", messages=ENDLESS)
        until(lambda: is_idle(server))
