"""How a server begins and ends, and what it names its models."""

from __future__ import annotations

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from conftest import start, tunesmith
from served import CONTEXT, ENDLESS, SURE, chat_with, connected, copied, metrics, said, serving, until
from tunesmith import chat
from tunesmith.chat import Chat
from tunesmith.serving.gate import Limits
from tunesmith.serving.server import Serving


def test_the_models_are_told_to_the_page(server: Serving) -> None:
    told = httpx.get(f"{server.url}/tunesmith/models").json()
    assert [(one["id"], one["tuned"], one["base"]) for one in told] == [
        ("base", False, "base"), ("bo", True, "base"), ("mia", True, "base"),
    ]  # fmt: skip
    assert {(one["system"], one["context"], one["template"]) for one in told} == {(None, CONTEXT, "tokenizer")}


def test_a_runs_system_text_goes_in_front_as_in_chat(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "bo"
    shutil.copytree(runs["bo"], copy)
    text = (copy / "recipe.yaml").read_text()
    assert "system: null" in text
    (copy / "recipe.yaml").write_text(text.replace("system: null", "system: Be brief."))
    with serving([copy]) as server:
        asked = {"model": "bo", "messages": SURE}
        assert "Be brief." in httpx.post(f"{server.url}/tunesmith/prompt", json=asked).json()["text"]
        base = httpx.post(f"{server.url}/tunesmith/prompt", json={**asked, "model": "base"}).json()
        assert "Be brief." not in base["text"]
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={**asked, "temperature": 0, "max_tokens": 8})
        assert answer.json()["choices"][0]["message"]["content"] == said(SURE, chat.load(copy), 8)


def test_runs_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    again = copied(runs["bo"], tmp_path / "elsewhere" / "bo")
    base = copied(runs["mia"], tmp_path / "elsewhere" / "base")
    with serving([runs["bo"], again, base]) as server:
        assert list(server.service.models) == ["base", "bo", "bo-2", "base-2"]
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=chat_with(model="base-2"))
        assert answer.json()["choices"][0]["message"]["content"] == "Mia, of the sea."


def test_who_sends_too_slowly_is_cut_off(runs: dict[str, Path]) -> None:
    with serving([runs["base"]], limits=Limits(seconds_to_ask=0.5)) as server:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.url[7:]}\r\nContent-Type: application/json\r\n"
        with connected(server) as silent, connected(server) as half_a_head, connected(server) as half_a_body:
            half_a_head.sendall(head.encode())
            half_a_body.sendall(f'{head}Content-Length: 1000\r\n\r\n{{"model"'.encode())
            assert silent.recv(1024) == b""
            assert half_a_head.recv(1024) == b""
            assert half_a_body.recv(1024).startswith(b"HTTP/1.1 408")
        with httpx.Client(base_url=server.url, timeout=60) as patient:  # an answer may take longer than a question
            body = {"model": "base", "messages": ENDLESS, "max_tokens": 600, "temperature": 0}
            assert patient.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 600


def test_a_server_told_to_end_finishes_what_runs(runs: dict[str, Path], chats: dict[str, Chat]) -> None:
    body = {"model": "base", "messages": ENDLESS, "max_tokens": 400, "temperature": 0, "stream": True}
    with (
        serving([runs["base"]]) as server,
        httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        read = [next(lines)]
        server.stop()
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "closing")
        assert refused.headers["x-content-type-options"] == "nosniff"
        read += list(lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in read if line and not line.endswith("[DONE]")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == said(ENDLESS, chats["base"], 400)


def test_what_does_not_end_in_time_is_given_up(runs: dict[str, Path]) -> None:
    body = {"model": "base", "messages": ENDLESS, "max_tokens": CONTEXT - 100, "temperature": 0}
    with serving([runs["base"]], grace_seconds=0) as server, ThreadPoolExecutor(1) as other:
        answer = other.submit(httpx.post, f"{server.url}/v1/chat/completions", json=body, timeout=60)
        until(lambda: metrics(server)["tunesmith_replies_running"] == 1)
        server.stop()
        assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (503, "closing")


def test_signals_to_the_process(runs: dict[str, Path]) -> None:
    """The command line: SIGTERM lets it finish; Ctrl-C after that ends it at once, and it ends well."""
    ours, theirs = os.pipe()
    process = start("serve", runs["base"], "--port", "0", "--json", streams=(0, theirs, 2))
    os.close(theirs)
    with os.fdopen(ours) as said:
        try:
            told = json.loads(said.readline())
            assert told["models"] == ["base"]
            url = told["url"]
            assert httpx.get(f"{url}/health").status_code == 200  # it answers when it has said where
            body = {"model": "base", "messages": ENDLESS, "max_tokens": CONTEXT - 100, "temperature": 0, "stream": True}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: {")
                process.send_signal(signal.SIGTERM)
                until(lambda: httpx.get(f"{url}/health").status_code == 503)
                assert process.poll() is None
                assert next(lines) == "" and next(lines).startswith("data: {")  # it goes on
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_key_in_the_command_line_is_warned_of(server: Serving, runs: dict[str, Path]) -> None:
    """Said before anything is loaded; here the address can not be had."""
    key, port = "a-key-of-16-letters", server.url.rpartition(":")[2]
    argument = tunesmith("serve", runs["bo"], "--port", port, "--api-key", key)
    variable = tunesmith("serve", runs["bo"], "--port", port, TUNESMITH_API_KEY=key)
    for ended in (argument, variable):
        assert ended.code == 2 and "can not be had" in ended.err
        assert key not in ended.out + ended.err
    assert "list of processes; set TUNESMITH_API_KEY" in " ".join((argument.out + argument.err).split())
    assert "list of processes" not in variable.out + variable.err


def test_a_way_without_tls_is_told_when_others_can_reach_it(runs: dict[str, Path]) -> None:
    for host, expected in (("127.0.0.1", False), ("0.0.0.0", True)):
        told: list[str] = []
        with serving([runs["base"]], host=host, api_key="a-key-of-16-letters", tell=told.append):
            assert any("no TLS" in line and "docs/how-to/serve.md" in line for line in told) is expected
