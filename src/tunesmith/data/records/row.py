"""A row becomes messages, or one fault."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tunesmith.data.records.found import described, list_of_objects, listed, plain, rename_hint, rename_or
from tunesmith.language import marked, said
from tunesmith.spelling import nearest
from tunesmith.types import Message, Role

ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
FIELDS = ("instruction", "input", "output", "system", "history", "messages", "conversations")
"""The names that a row's fields may have, and that `data.columns` maps to the file's own."""

_FILL_IN = marked("Fill it in or delete the row.")
_ANSWER = marked("the answer to learn")
_SAYS = {
    "system": marked("what the system says"),
    "user": marked("what the user says"),
    "human": marked("what the human says"),
    "assistant": _ANSWER,
    "gpt": _ANSWER,
}

_TALK_FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}


class Problem(Exception):
    """What is wrong with a row: field, found, expected, fix."""

    def __init__(self, field: str, found: str, expected: str, fix: str) -> None:
        self.parts = field, found, expected, fix


def understand(row: Any, columns: Mapping[str, str]) -> list[Message]:
    """The row's messages: roles known and in order, the last a reply; raises Problem."""
    if not isinstance(row, dict):
        fix = said("Write {row}.", row='{"instruction": …, "output": …}')
        raise Problem("row", described(row), said("an object with named fields"), fix)
    names = {name: columns.get(name, name) for name in FIELDS}
    talks = [name for name in _TALK_FIELDS if names[name] in row]
    filled = [name for name in talks if row[names[name]] is not None]  # Parquet has every column in every row
    if filled or (talks and names["instruction"] not in row):
        return _from_talk(row, (filled or talks)[0], names)
    return _from_instruction(row, names)


def _from_instruction(row: dict[str, Any], names: Mapping[str, str]) -> list[Message]:
    _check_fields(row, names)
    asked = [_string(row.get(names[name]), names[name], absent=name == "input") for name in ("instruction", "input")]
    question = "\n".join(text for text in asked if text.strip())
    if not question:
        raise Problem(names["instruction"], said("no text"), said("a question or task"), said(_FILL_IN))
    messages = _system(row, names["system"])
    name = names["history"]
    history = row.get(name) or []
    if not isinstance(history, list):
        raise Problem(
            name, described(history), said("a list of [question, answer] pairs"), said("Mend or delete the field.")
        )
    for number, pair in enumerate(history):
        where = f"{name}[{number}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Problem(where, described(pair), said("[question, answer]"), said("Mend the pair."))
        messages.append(Message("user", _filled(pair[0], f"{where}[0]", marked("a question"))))
        messages.append(Message("assistant", _filled(pair[1], f"{where}[1]", marked("an answer"))))
    answer = _filled(row[names["output"]], names["output"], _ANSWER)
    return [*messages, Message("user", question), Message("assistant", answer)]


def _check_fields(row: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises Problem when instruction or output is absent, or when another field's name is misspelt."""
    free = [str(key) for key in row if key not in names.values()]
    for name in ("instruction", "input", "output", "system", "history"):
        column = names[name]
        if column in row:
            continue
        near = _misspelt(column, tuple(free))
        if near:
            fix = rename_or(str(rename_hint(name, column, [near])))
            raise Problem(column, f"'{plain(near)}'", f"'{column}'", fix)
        if name in ("instruction", "output"):
            found = listed(row)
            if (talk := list_of_objects(row)) is None:
                fix = said("Write what is missing into the row, or leave the row out.")
                if free:
                    fix = rename_or(rename_hint(name, column, free) or f"--set data.columns.{name}=…")
                raise Problem(column, found, f"'{column}'", fix)
            for wanted, keys in _TALK_FIELDS.items():
                if set(keys) <= set(row[talk][0]):
                    fix = rename_or(f"--set {shlex.quote(f'data.columns.{wanted}={talk}')}")
                    raise Problem(wanted, found, f"'{wanted}'", fix)
            found, fix = said("a list under '{name}'", name=talk), said("Write the list of '{name}' alone.", name=talk)
            raise Problem(column, found, said("the rows themselves"), fix)


@lru_cache(maxsize=256)
def _misspelt(column: str, free: tuple[str, ...]) -> str | None:
    """The one of the `free` names that was meant; kept, since the rows of a file have the same names."""
    return nearest(column, free, cutoff=0.84)


def _from_talk(row: Mapping[str, Any], form: str, names: Mapping[str, str]) -> list[Message]:
    name = names[form]
    role_field, text_field = _TALK_FIELDS[form]
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        fix = said("Write {row}.", row=f'[{{"{role_field}": "user", "{text_field}": …}}, …]')
        raise Problem(name, described(turns), said("a list of turns"), fix)
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict):
            expected = said("an object with '{role}' and '{text}'", role=role_field, text=text_field)
            raise Problem(where, described(turn), expected, said("Mend the turn."))
        for key in (role_field, text_field):
            if key not in turn:
                raise Problem(where, listed(turn), f"'{key}'", said("Rename the key in the file."))
        role = turn[role_field]
        if not isinstance(role, str) or role not in ROLES:
            near = nearest(str(role)[:100].lower(), ROLES)
            expected = said("system, user or assistant (human or gpt in ShareGPT)")
            fix = said("Did you mean '{name}'?", name=near) if near else said("Rename the role, or leave the turn out.")
            raise Problem(f"{where}.{role_field}", described(role), expected, fix)
        messages.append(Message(ROLES[role], _filled(turn[text_field], f"{where}.{text_field}", _SAYS[role])))
    _check_order(messages, name)
    beside = _system(row, names["system"])  # ShareGPT keeps the system text beside the talk
    if beside and messages[0].role == "system":
        found = said("a system text beside a talk that begins with one")
        raise Problem(names["system"], found, said("one system text"), said("Delete one of the two."))
    return [*beside, *messages]


def _check_order(messages: Sequence[Message], name: str) -> None:
    previous = None
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        if message.role == "system" and previous is not None:
            fix = said("Move it to the front or delete it.")
            raise Problem(where, said("a system turn"), said("system only as the first turn"), fix)
        if message.role == previous:
            found = said("two {role} turns in a row", role=message.role)
            raise Problem(where, found, said("user and assistant in turn"), said("Join them or delete one."))
        if message.role == "assistant" and previous in (None, "system"):
            found, fix = said("a reply that nobody asked for"), said("Put the question in front of it.")
            raise Problem(where, found, said("a user turn first"), fix)
        previous = message.role
    if previous != "assistant":
        where = f"{name}[{len(messages) - 1}]"
        found, fix = said("a {role} turn at the end", role=previous), said("Add the reply or delete the turn.")
        raise Problem(where, found, said("a reply at the end"), fix)


def _system(row: Mapping[str, Any], name: str) -> list[Message]:
    text = _string(row.get(name), name, absent=True)
    return [Message("system", text)] if text.strip() else []


def _filled(value: Any, where: str, expected: str) -> str:
    text = _string(value, where)
    if not text.strip():
        raise Problem(where, said("no text"), said(expected), said(_FILL_IN))
    return text


def _string(value: Any, where: str, *, absent: bool = False) -> str:
    """The value, if it is text that UTF-8 can hold; null is an empty text where it may be `absent`."""
    if value is None and absent:
        return ""
    if not isinstance(value, str):
        fix = said(_FILL_IN) if value is None else said("Put it in quotes, or delete the row.")
        raise Problem(where, described(value), said("text"), fix)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = said("half a character ({code})", code=f"\\u{ord(value[error.start]):04x}")
            fix = said("The text was cut inside an emoji; write it again.")
            raise Problem(where, found, said("whole characters"), fix) from None
    if "\x00" in value:
        raise Problem(where, said("the character NUL (\\u0000)"), said("text"), said("Delete the character."))
    return value
