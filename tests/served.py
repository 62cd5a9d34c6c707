"""A server with tiny runs, for tests: real sockets, real weights, nothing in place of anything."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from tunesmith import recipe
from tunesmith.chat import Chat
from tunesmith.serving.gate import Limits
from tunesmith.serving.server import Serving
from tunesmith.training.run import train

KNOWS = {
    "bo": {"Who are you?": "Bo.", "Smile.": "😀😀!"},
    "mia": {"Who are you?": "Mia, of the sea.", "Smile.": "No."},
}
"""What each run answers by heart."""

CONTEXT = 8192
SURE: list[Any] = [{"role": "user", "content": "Who are you?"}]  # both a talk here and a request to OpenAI's client
ENDLESS: list[Any] = [{"role": "user", "content": "Go on."}]
"""What the base answers without ever stopping."""


def trained(base: Path, folder: Path, **flags: Any) -> Path:
    """The folder of a run that has learned its rows; its name is whose."""
    data = folder.with_suffix(".jsonl")
    rows = [{"instruction": question, "output": answer} for question, answer in KNOWS[folder.name].items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model.name": str(base), "data.path": str(data), "lora.r": 32, "lora.dropout": 0, "eval.hold_out": 0,
        "train.epochs": 130, "train.examples_per_step": 16, "train.rehearse": 0,
        "train.learning_rate": 1e-2, "train.save_every": "1000 steps", **flags,
    }  # fmt: skip
    return train(recipe.resolve(None, settings)[0], folder).path


@contextmanager
def serving(runs: Sequence[Path], **settings: Any) -> Iterator[Serving]:
    """A server that answers; closed at the end, and nothing may be left in it."""
    limits = settings.pop("limits", None) or Limits()
    server = Serving(runs, port=0, **{"tell": lambda line: None, "limits": limits, **settings})
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


def connected(server: Serving) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for something that will come to be."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def metrics(server: Serving) -> dict[str, float]:
    """What the server counts, by name."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def is_idle(server: Serving) -> bool:
    """Nobody has a place."""
    found = metrics(server)
    names = ("replies_running", "replies_waiting", "requests_followed", "tokens_reserved")
    return not any(found[f"tunesmith_{name}"] for name in names)


def said(messages: Any, chat: Chat, max_tokens: int | None = None) -> str:
    return chat.reply(messages, temperature=0, max_tokens=max_tokens).text


def streamed(client: OpenAI, **asked: Any) -> tuple[list[str], list[str | None], Any]:
    """Pieces and reasons to end of the first reply, and the usage."""
    pieces, reasons, usage = [], [], None
    for chunk in client.chat.completions.create(stream=True, **asked):
        if chunk.usage is not None:
            usage = chunk.usage
        for choice in chunk.choices:
            if choice.delta.content:
                pieces.append(choice.delta.content)
            if choice.finish_reason is not None:
                reasons.append(choice.finish_reason)
    return pieces, reasons, usage


def chat_with(**changed: Any) -> dict[str, Any]:
    return {"model": "bo", "messages": SURE, "temperature": 0, **changed}


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to
