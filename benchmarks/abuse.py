"""What `tunesmith serve` does under abuse: the longest wait for /health, memory, a small request meanwhile and after.

    python benchmarks/abuse.py [RUN_OR_MODEL] [--repeats 2] [--only NAME]

The server is a process of its own, and so is the one that asks /health every 50 ms, each time by a new connection, and
reads the server's memory. Each abuse goes on for 20 seconds at most, and all of it stays at 127.0.0.1. While it goes on
and after it a small chat request is timed. Writes JSON and prints a table; exits with 1 unless /health was always
answered within a second, every small request within 10, and memory stayed within 1 GiB of idle.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import importlib.metadata
import json
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 20.0  # an abuse goes on for
HEALTH, SMALL, MEMORY = 1.0, 10.0, 1 << 30  # seconds, seconds, bytes above idle
CLOSE = "Connection: close\r\n"


class Server:
    """The server, and what has been seen of it."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, "-P", "-m", "tunesmith", "serve", model, "--port", "0", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        told = json.loads(self.process.stdout.readline())
        self.model = told["models"][0]
        self.port = int(told["url"].rpartition(":")[2])
        self.context = int(self.get("/tunesmith/models")[1][0]["context"])

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def head(self, path: str, more: str) -> bytes:
        host = f"127.0.0.1:{self.port}"
        return f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{more}\r\n".encode()

    def send(self, body: bytes, path: str = "/v1/chat/completions", *, wait: bool = True) -> int:
        """The answer's status; 0 where nobody waits for one or none comes."""
        with contextlib.suppress(OSError), self.connect() as sent:
            sent.sendall(self.head(path, f"{CLOSE}Content-Length: {len(body)}\r\n") + body)
            return _status(sent) if wait else 0
        return 0

    def chat(self, **changed: Any) -> bytes:
        asked = {"model": self.model, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, **changed}
        return json.dumps(asked, ensure_ascii=False).encode()

    def small(self) -> tuple[int, float]:
        """Status and seconds of a small request; 0 where it is not answered within a minute and a half."""
        began, status = time.monotonic(), 0
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
            with contextlib.closing(connection):
                body = self.chat(max_tokens=8)
                connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                status = connection.getresponse().status
        return status, time.monotonic() - began


def _status(sent: socket.socket) -> int:
    first = sent.recv(4096)
    return int(first.split()[1]) if first.startswith(b"HTTP/1.1 ") else 0


def _many(ask: Callable[[int], int], times: int, at_once: int) -> dict[str, int]:
    """How often each status came."""
    with ThreadPoolExecutor(at_once) as clients:
        return {str(status): n for status, n in sorted(Counter(clients.map(ask, range(times))).items())}


# --- the abuses: each ends by itself and says what it was answered ----------------------------------------------------


def million_zeros(server: Server) -> Any:
    """Three bodies of 4 MiB: content, prompt and prompts that are millions of numbers."""
    zeros = b"[" + b"0," * ((4 << 20) // 2 - 200) + b"0]"
    model = json.dumps(server.model).encode()
    chat = b'{"model": %s, "messages": [{"role": "user", "content": %s}]}' % (model, zeros)
    text, texts = (b'{"model": %s, "prompt": %s}' % (model, ids) for ids in (zeros, b"[" + zeros + b"]"))
    return [server.send(chat), server.send(text, "/v1/completions"), server.send(texts, "/v1/completions")]


def objects_without_end(server: Server) -> Any:
    """Twenty bodies of 4 MiB of empty objects, five at a time."""
    body = b'{"model": %s, "x": [%s{}]}' % (json.dumps(server.model).encode(), b"{}," * ((4 << 20) // 3 - 100))
    return _many(lambda _: server.send(body), 20, 5)


def megabytes_of_text(server: Server) -> Any:
    """4 MiB of words, and of letters that are several tokens each."""
    texts = ["word " * ((4 << 20) // 5 - 100), "\u9f98" * ((4 << 20) // 3 - 100)]
    return [server.send(server.chat(messages=[{"role": "user", "content": text}])) for text in texts]


def longest_text(server: Server) -> Any:
    """Twenty of the longest texts that are tokenised, four at a time."""
    body = server.chat(messages=[{"role": "user", "content": "\u9f98" * (16 * server.context)}])
    return _many(lambda _: server.send(body), 20, 4)


def hung_up(server: Server) -> Any:
    """150 clients who send the longest text and hang up, and 150 with 4 MiB."""
    longest = server.chat(messages=[{"role": "user", "content": "\u9f98" * (16 * server.context)}])
    largest = server.chat(messages=[{"role": "user", "content": "word " * ((4 << 20) // 5 - 100)}])
    return _many(lambda i: server.send((longest, largest)[i % 2], wait=False), 300, 50)


def large_requests(server: Server) -> Any:
    """Four requests for four replies each to the longest prompt, and who asks for 16 of them."""
    content = "word " * (server.context - 700)
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 512, "temperature": 1}
    return _many(lambda i: server.send(server.chat(**asked, n=(4, 4, 4, 4, 16)[i], seed=i)), 5, 5)


def idle_connections(server: Server) -> Any:
    """3,000 connections: a third silent, a third in the middle of a head, a third in the middle of a body."""
    begun = (b"", b"POST / HTTP/1.1\r\nX", server.head("/v1/completions", "Content-Length: 100000\r\n") + b"{")
    with contextlib.ExitStack() as held:
        refused = 0
        for number in range(3000):
            try:
                held.enter_context(connection := server.connect())
                connection.sendall(begun[number % 3])
            except OSError:
                refused += 1
        time.sleep(5)
    return {"refused": refused}


def slow_bodies(server: Server) -> Any:
    """100 connections that have each sent half of 4 MiB and go on no more."""
    begun = server.head("/v1/chat/completions", f"Content-Length: {4 << 20}\r\n") + b" " * (2 << 20)

    def begin(_: int) -> int:
        with contextlib.suppress(OSError), server.connect() as connection:
            connection.sendall(begun)
            connection.settimeout(5)
            return _status(connection)
        return 0

    return _many(begin, 100, 100)


def strange_requests(server: Server) -> Any:
    """Deep JSON, huge numbers, thousands of headers, two lengths."""
    deep = server.send(b"[" * (2 << 20))
    huge = server.send(b'{"model": "x", "seed": ' + b"9" * (2 << 20) + b"}")
    answers = [deep, huge]
    two_ways = server.head("/v1/completions", "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n") + b"0\r\n\r\n"
    for sent in (server.head("/v1/completions", "A: b\r\n" * 100_000), two_ways):
        status = 0
        with contextlib.suppress(OSError), server.connect() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(sent)
            status = _status(connection)
        answers.append(status)
    return answers


ABUSES = (
    million_zeros, objects_without_end, megabytes_of_text, longest_text, hung_up, large_requests, idle_connections,
    slow_bodies, strange_requests,
)  # fmt: skip


# --- what is seen meanwhile -------------------------------------------------------------------------------------------


def watch(port: int, pid: int) -> None:
    """Asks /health every 50 ms until standard input ends, and prints when, how long it took and the server's memory."""
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    while not ended.wait(0.05):
        began, ok = time.time(), False
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                ok = connection.getresponse().status == 200
        print(json.dumps([began, time.time() - began, ok, resident(pid)]), flush=True)


def resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@contextlib.contextmanager
def watched(server: Server) -> Iterator[list[list[Any]]]:
    """What has been seen of the server when it ends."""
    command = [sys.executable, __file__, "--watch", f"{server.port}", f"{server.process.pid}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        seen: list[list[Any]] = []
        assert watcher.stdout is not None and watcher.stdin is not None
        reader = threading.Thread(target=lambda: seen.extend(map(json.loads, watcher.stdout or ())))
        reader.start()
        time.sleep(1)
        try:
            yield seen
        finally:
            watcher.stdin.close()
            reader.join()


def measured(server: Server, abuse: Callable[[Server], Any]) -> dict[str, Any]:
    before = resident(server.process.pid)
    with watched(server) as seen, ThreadPoolExecutor(1) as other:
        began = time.time()
        going_on = other.submit(abuse, server)
        time.sleep(0.5)
        meanwhile = server.small()
        answers = going_on.result()
        seconds = time.time() - began
        after = server.small()
        time.sleep(1)
    free = {"status": after[0], "seconds": round(after[1], 3)}
    return {
        "abuse": abuse.__name__,
        "answers": answers,
        "seconds": round(seconds, 2),
        "health": {
            "asked": len(seen),
            "longest_seconds": round(max(took for _, took, _, _ in seen), 3),
            "failed": sum(not ok for *_, ok, _ in seen),
        },
        "small_request": {"meanwhile": {"status": meanwhile[0], "seconds": round(meanwhile[1], 3)}, "after": free},
        "memory_bytes": {
            "before": before,
            "peak": max(memory for *_, memory in seen),
            "after": resident(server.process.pid),
        },
    }


def held(found: dict[str, Any], idle: int) -> bool:
    """Whether the server went on answering."""
    health, small = found["health"], found["small_request"]
    return (
        health["longest_seconds"] < HEALTH
        and not health["failed"]
        and all(one["status"] == 200 and one["seconds"] < SMALL for one in small.values())
        and found["memory_bytes"]["peak"] - idle < MEMORY
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--watch", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if arguments.watch:
        watch(*arguments.watch)
        return 0
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192) if most > 0 else 8192, most))
    server = Server(arguments.model)
    try:
        server.small()  # the first one is slower
        idle = resident(server.process.pid)
        found = []
        for abuse in ABUSES:
            for repeat in range(arguments.repeats if arguments.only in abuse.__name__ else 0):
                found.append({**measured(server, abuse), "repeat": repeat})
                found[-1]["held"] = held(found[-1], idle)
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    finally:
        server.process.send_signal(signal.SIGTERM)
        try:
            _, errors = server.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            server.process.kill()
            errors = "killed"
    tracebacks = errors.count("Traceback")
    if tracebacks:
        print(errors, file=sys.stderr)
    result = {
        "what": "serve under abuse: longest /health, memory of the server, a small request meanwhile and after",
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "tokenizers", "fastapi", "pydantic", "uvicorn")
        },
        "model": arguments.model,
        "context": server.context,
        "idle_memory_bytes": idle,
        "repeats": arguments.repeats,
        "tracebacks": tracebacks,
        "found": found,
    }
    path = arguments.out / f"abuse-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| abuse | longest /health, s | small request meanwhile, s | after, s | peak above idle, MiB |")
    print("|---|---|---|---|---|")
    for one in found:
        small = one["small_request"]
        times = [f"{small[when]['seconds']:.2f} ({small[when]['status']})" for when in ("meanwhile", "after")]
        above = (one["memory_bytes"]["peak"] - idle) / 2**20
        print(f"| {one['abuse']} | {one['health']['longest_seconds']:.2f} | {times[0]} | {times[1]} | {above:.0f} |")
    print(f"\n{sum(one['held'] for one in found)} of {len(found)} held; tracebacks: {tracebacks}; written to {path}")
    return 0 if all(one["held"] for one in found) and not tracebacks else 1


if __name__ == "__main__":
    raise SystemExit(main())
