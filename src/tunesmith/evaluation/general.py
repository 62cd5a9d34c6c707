"""A hundred short questions that have nothing to do with anybody's data: what a model knew before a training should
still be there after it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tunesmith.language import marked, said

TOKENS = 48
"""The longest reply that is asked for."""

_FILE = Path(__file__).parent / "general.jsonl"


@dataclass(frozen=True)
class General:
    """A question, and words one of which a right answer holds."""

    question: str
    answers: tuple[str, ...]
    language: str = "en"
    others: tuple[str, ...] = ()
    """What the question offers beside the right answer."""

    def right(self, reply: str) -> bool:
        """Whether the first sentence says one of the answers: before what else the question offers, not as the later
        of two alternatives ("goodbye or hello"), and not taken back ("a star, but it is also a planet").

        Later sentences do not count, for a small model talks on, and what it mentions there answers nothing.
        """
        first = _first_sentence(reply.strip().removeprefix(self.question))
        at = _place(first, self.answers)
        if at is None or _OR.search(first, 0, at) or _TAKEN_BACK.search(first, at):
            return False
        other = _place(first, self.others)
        return other is None or at < other


@cache
def questions() -> tuple[General, ...]:
    """The hundred general questions."""
    items = [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]
    return tuple(
        General(item["question"], tuple(item["answers"]), item["language"], tuple(item.get("others", ())))
        for item in items
    )


@dataclass(frozen=True)
class Kept:
    """What became of the questions in one language."""

    language: str
    asked: int
    base: int
    """Answered rightly by the base."""
    tuned: int
    lost: int
    """Answered rightly by the base alone."""
    gained: int

    @property
    def called(self) -> str:
        """The language, in the reader's."""
        return said(_LANGUAGES[self.language])


_LANGUAGES = {"en": marked("English"), "zh": marked("Chinese")}


def kept(base: Sequence[bool], tuned: Sequence[bool]) -> tuple[Kept, ...]:
    """By language, from whether each of the questions is answered rightly."""
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for question, before, after in zip(questions(), base, tuned, strict=True):
        pairs.setdefault(question.language, []).append((before, after))
    return tuple(
        Kept(
            language,
            len(some),
            sum(before for before, _ in some),
            sum(after for _, after in some),
            some.count((True, False)),
            some.count((False, True)),
        )
        for language, some in pairs.items()
    )


def holds(reply: str, words: Sequence[str]) -> bool:
    """Whether one of the words stands in the reply; in capitals where it is written in capitals."""
    return _place(reply, words) is not None


def _place(text: str, words: Sequence[str]) -> int | None:
    """Where the first of the words stands that are in the text."""
    found = (re.search(_pattern(word), text, 0 if word.isupper() else re.IGNORECASE) for word in words)
    return min((match.start() for match in found if match is not None), default=None)


def _pattern(word: str) -> str:
    start = r"(?<![A-Za-z0-9])" if word[0].isascii() else ""
    end = r"(?![A-Za-z0-9])" if word[-1].isascii() else ""
    return start + re.escape(word) + end


def _first_sentence(text: str) -> str:
    """With what stands before it, where that is an exclamation of fewer than four words ("Ha! Small what?")."""
    for end in _SENTENCE_END.finditer(text):
        if len(_WORD.findall(text, 0, end.start())) >= _SENTENCE_WORDS:
            return text[: end.start()]
    return text


_SENTENCE_WORDS = 4
# A point after a capital alone or with one more letter ends no sentence: J. R. R., Mt., St.
_SENTENCE_END = re.compile(r"(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<=[.!?])[\"'”’)]*\s+|(?<=[。！？])|\n+")
_WORD = re.compile(r"[\u4e00-\u9fff]|\w+")
_OR = re.compile(r"\bor\b|或|还是", re.IGNORECASE)
_TAKEN_BACK = re.compile(r"\bbut\b.*\balso\b|但.*也", re.IGNORECASE)
