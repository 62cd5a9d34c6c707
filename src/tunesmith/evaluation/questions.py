"""Questions that are asked one by one, each in a conversation of its own: a line each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.errors import DataError, TemplateError
from tunesmith.language import said
from tunesmith.terminal import what_is_no_text
from tunesmith.types import ChatMessage

if TYPE_CHECKING:
    from tunesmith.chat import Reply

_MOST_CHARACTERS = 16 << 20
_NAMES = ("prompt", "question", "instruction")


@dataclass(frozen=True)
class Question:
    """A conversation of which the next reply is wanted."""

    where: str
    """FILE:LINE."""
    messages: Sequence[ChatMessage]
    line: int | None = None
    """Counted from 1."""
    id: Any = None
    """What its object had as `id`, of any type that JSON has."""

    def talk(self, system: str | None) -> list[ChatMessage]:
        """Its messages, after this system text where they have none of their own."""
        has_own = bool(self.messages) and self.messages[0].get("role") == "system"
        return [*([] if system is None or has_own else [ChatMessage(role="system", content=system)]), *self.messages]

    @contextmanager
    def named(self) -> Iterator[None]:
        """What is wrong with the conversation is said of this line."""
        try:
            yield
        except (DataError, TemplateError) as error:
            raise type(error)(f"{self.where}: {error.where}", error.found, error.expected, error.fix) from None

    def answered(self, reply: Reply) -> dict[str, Any]:
        """The reply as JSON, with line and id of its question."""
        line = {} if self.line is None else {"line": self.line}
        named = {} if self.id is None else {"id": self.id}
        return {
            **line,
            **named,
            "reply": reply.text,
            "prompt_ids": reply.prompt_ids,
            "token_ids": reply.token_ids,
            "stopped_by": reply.stopped_by,
        }


def read(lines: Iterable[str], where: str) -> list[Question]:
    """The questions of lines that hold one; blank lines hold none.

    A line is the question itself, that text as JSON, or an object with `prompt` (or `question`, `instruction`) or
    `messages`, and `id` if wanted. Raises DataError, with `where` and the line, for the first that is none of these,
    and where there is none at all.
    """
    if questions := list(_questions(lines, where)):
        return questions
    raise DataError(where, said("no question"), said("a question a line"), said("Write one a line."))


def _questions(lines: Iterable[str], where: str) -> Iterator[Question]:
    room = _MOST_CHARACTERS
    for number, line in enumerate(lines, 1):
        room -= len(line)
        if room < 0:
            found = said("more than {n:,} characters", n=_MOST_CHARACTERS)
            raise DataError(f"{where}:{number}", found, said("fewer"), said("Ask in several goes."))
        text = line.strip("\ufeff \t\r\n")
        if half := what_is_no_text(text):
            fix = said("Convert it: {command}", command="iconv -f GB18030 -t UTF-8")
            raise DataError(f"{where}:{number}", half, said("text in UTF-8"), fix)
        if text:
            messages, named = _read(text, f"{where}:{number}")
            yield Question(f"{where}:{number}", messages, number, named)


def _read(text: str, where: str) -> tuple[Sequence[ChatMessage], Any]:
    value: Any = text
    if text[0] in '{"':
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            if text[0] == "{":
                raise _none_in(where, said("no JSON, though it begins with {{")) from None
    if isinstance(value, str):
        return [_user(value, where)], None
    return _of_object(value, where)


def _of_object(value: dict[str, Any], where: str) -> tuple[Sequence[ChatMessage], Any]:
    keys = [key for key in value if key != "id"]
    if len(keys) != 1 or keys[0] not in (*_NAMES, "messages"):
        names = ", ".join(map(repr, keys))
        raise _none_in(where, said("the keys {names}", names=names) if keys else said("no question"))
    (key,) = keys
    if key != "messages":
        return [_user(value[key], where)], value.get("id")
    turns = value[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _none_in(where, said("no list of messages"))
    return turns, value.get("id")


def _user(text: Any, where: str) -> ChatMessage:
    if not isinstance(text, str) or not text.strip():
        raise _none_in(where, said("a question without text"))
    return {"role": "user", "content": text}


def _none_in(where: str, found: str) -> DataError:
    forms = said("a text, {prompt} or {messages}", prompt='{"prompt": "…"}', messages='{"messages": […]}')
    return DataError(where, found, forms, said("Write it as one of these, in one line."))
