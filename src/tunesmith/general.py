"""A hundred short questions that have nothing to do with anybody's data: what a model knew before a training should
still be there after it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TOKENS = 48
"""The longest reply that is asked for."""

_FILE = Path(__file__).parent / "general.jsonl"


@dataclass(frozen=True)
class General:
    """A question, and words one of which a right answer holds."""

    question: str
    answers: tuple[str, ...]

    def right(self, reply: str) -> bool:
        return any(_holds(reply, answer) for answer in self.answers)


@cache
def questions() -> tuple[General, ...]:
    """The hundred general questions."""
    items = [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]
    return tuple(General(item["question"], tuple(item["answers"])) for item in items)


def _holds(reply: str, answer: str) -> bool:
    """Whether the answer stands in the reply as a word; in capitals where it is written in capitals."""
    flags = 0 if answer.isupper() else re.IGNORECASE
    start = r"(?<![A-Za-z0-9])" if answer[0].isascii() else ""
    end = r"(?![A-Za-z0-9])" if answer[-1].isascii() else ""
    return re.search(start + re.escape(answer) + end, reply, flags) is not None
