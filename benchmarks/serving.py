"""Tokens per second of `tunesmith serve`: sixteen clients at once against one after the other, answers held to chat's.

    python benchmarks/serving.py RUN [--requests 64] [--clients 16] [--tokens 48] [--repeats 3]

The server is a process of its own; the clients are OpenAI's. Requests are general questions, every third of them to the
base. At temperature 0 every answer must be the one that `chat.Chat.reply` gives by itself. Writes JSON and prints a
table.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from openai import OpenAI

from tunesmith import chat
from tunesmith.evaluation.general import questions
from tunesmith.models import hush_libraries

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    hush_libraries()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "tunesmith", "serve", str(arguments.run), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        result = measured(told["url"], told["models"], arguments)
        server.send_signal(signal.SIGTERM)
    texts = [one.question for one in questions()]
    result["equal"] = equal(arguments, texts, result.pop("answers"))
    result = {
        "what": "tokens per second of serve",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "uvicorn")},
        "requests": arguments.requests,
        "clients": arguments.clients,
        "tokens": arguments.tokens,
        **result,
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = arguments.out / f"{device}-serving-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| clients | tokens per second |\n|---|---|")
    print(f"| 1 | {result['one_by_one']:.1f} |\n| {arguments.clients} | {result['together']:.1f} |")
    print(f"\nratio {result['ratio']:.2f}; equal to chat's: {result['equal']} / {arguments.requests}")
    return 0 if result["equal"] == arguments.requests or device == "cuda" else 1


def measured(url: str, models: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Both ways, turn about, with every repeat."""
    base, run = models
    texts = [one.question for one in questions()]
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600)

    def ask(number: int) -> tuple[str, int]:
        messages: Any = [{"role": "user", "content": texts[number % len(texts)]}]
        answer = client.chat.completions.create(
            model=base if number % 3 == 2 else run, messages=messages, temperature=0, max_tokens=arguments.tokens
        )
        assert answer.usage is not None
        return answer.choices[0].message.content or "", answer.usage.completion_tokens

    rates: dict[str, list[float]] = {"one_by_one": [], "together": []}
    answers: list[list[str]] = []
    ask(0)
    for _ in range(arguments.repeats):
        for name, clients in (("one_by_one", 1), ("together", arguments.clients)):
            began = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                found = list(pool.map(ask, range(arguments.requests)))
            rates[name].append(sum(n for _, n in found) / (time.perf_counter() - began))
            answers.append([text for text, _ in found])
            print(name, f"{rates[name][-1]:.2f} tokens per second", flush=True)
    assert all(some == answers[0] for some in answers) or torch.cuda.is_available()
    alone, together = (statistics.median(rates[name]) for name in rates)
    return {
        "one_by_one": alone,
        "together": together,
        "ratio": together / alone,
        "repeats": rates,
        "settled": settled(url),
        "answers": answers[-1],
    }


def settled(url: str) -> int:
    """Tokens that were computed again since two words were too close."""
    (line,) = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith("tunesmith_settled")]
    return int(line.split()[1])


def equal(arguments: argparse.Namespace, texts: list[str], answers: list[str]) -> int:
    """How many answers are those of chat, one by one."""
    base, (tuned,), _ = chat.load_together([arguments.run])
    alone = [
        (base if number % 3 == 2 else tuned)
        .reply([{"role": "user", "content": texts[number % len(texts)]}], temperature=0, max_tokens=arguments.tokens)
        .text
        for number in range(arguments.requests)
    ]
    return sum(a == b for a, b in zip(alone, answers, strict=True))


def machine() -> dict[str, Any]:
    card = {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform(), **card}


if __name__ == "__main__":
    raise SystemExit(main())
