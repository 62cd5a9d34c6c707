"""A row becomes messages, or one fault."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tunesmith.records.found import RENAME, described, list_of_objects, listed, plain, rename_hint
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

_TALK_FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}


class Problem(Exception):
    """What is wrong with a row: field, found, expected, fix."""

    def __init__(self, field: str, found: str, expected: str, fix: str) -> None:
        self.parts = field, found, expected, fix


def understand(row: Any, columns: Mapping[str, str]) -> list[Message]:
    """The row's messages: roles known and in order, the last a reply; raises Problem."""
    if not isinstance(row, dict):
        raise Problem("row", described(row), "an object with named fields", 'Write {"instruction": …, "output": …}.')
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
        raise Problem(names["instruction"], "no text", "a question or task", "Fill it in or delete the row.")
    messages = _system(row, names["system"])
    name = names["history"]
    history = row.get(name) or []
    if not isinstance(history, list):
        raise Problem(name, described(history), "a list of [question, answer] pairs", "Mend or delete the field.")
    for number, pair in enumerate(history):
        where = f"{name}[{number}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Problem(where, described(pair), "[question, answer]", "Mend the pair.")
        messages.append(Message("user", _filled(pair[0], f"{where}[0]", "a question")))
        messages.append(Message("assistant", _filled(pair[1], f"{where}[1]", "an answer")))
    answer = _filled(row[names["output"]], names["output"], "the answer to learn")
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
            fix = f"{RENAME}, or pass {rename_hint(name, column, [near])}"
            raise Problem(column, f"'{plain(near)}'", f"'{column}'", fix)
        if name in ("instruction", "output"):
            found = listed(row)
            if (talk := list_of_objects(row)) is None:
                hint = rename_hint(name, column, free) or f"--set data.columns.{name}=…"
                raise Problem(column, found, f"'{column}'", f"{RENAME}, or pass {hint}")
            for wanted, keys in _TALK_FIELDS.items():
                if set(keys) <= set(row[talk][0]):
                    fix = f"{RENAME}, or pass --set {shlex.quote(f'data.columns.{wanted}={talk}')}"
                    raise Problem(wanted, found, f"'{wanted}'", fix)
            raise Problem(column, f"a list under '{talk}'", "the rows themselves", f"Write the list of '{talk}' alone.")


@lru_cache(maxsize=256)
def _misspelt(column: str, free: tuple[str, ...]) -> str | None:
    """The one of the `free` names that was meant; kept, since the rows of a file have the same names."""
    return nearest(column, free, cutoff=0.84)


def _from_talk(row: Mapping[str, Any], form: str, names: Mapping[str, str]) -> list[Message]:
    name = names[form]
    role_field, text_field = _TALK_FIELDS[form]
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        fix = f'Write [{{"{role_field}": "user", "{text_field}": …}}, …].'
        raise Problem(name, described(turns), "a list of turns", fix)
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict):
            expected = f"an object with '{role_field}' and '{text_field}'"
            raise Problem(where, described(turn), expected, "Mend the turn.")
        for key in (role_field, text_field):
            if key not in turn:
                raise Problem(where, listed(turn), f"'{key}'", "Rename the key in the file.")
        role = turn[role_field]
        if not isinstance(role, str) or role not in ROLES:
            near = nearest(str(role)[:100].lower(), ROLES)
            expected = "system, user or assistant (human or gpt in ShareGPT)"
            fix = f"Did you mean '{near}'?" if near else "Rename the role, or leave the turn out."
            raise Problem(f"{where}.{role_field}", described(role), expected, fix)
        says = "the answer to learn" if ROLES[role] == "assistant" else f"what the {role} says"
        messages.append(Message(ROLES[role], _filled(turn[text_field], f"{where}.{text_field}", says)))
    _check_order(messages, name)
    beside = _system(row, names["system"])  # ShareGPT keeps the system text beside the talk
    if beside and messages[0].role == "system":
        found = "a system text beside a talk that begins with one"
        raise Problem(names["system"], found, "one system text", "Delete one of the two.")
    return [*beside, *messages]


def _check_order(messages: Sequence[Message], name: str) -> None:
    previous = None
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        if message.role == "system" and previous is not None:
            fix = "Move it to the front or delete it."
            raise Problem(where, "a system turn", "system only as the first turn", fix)
        if message.role == previous:
            found = f"two {message.role} turns in a row"
            raise Problem(where, found, "user and assistant in turn", "Join them or delete one.")
        if message.role == "assistant" and previous in (None, "system"):
            raise Problem(
                where, "a reply that nobody asked for", "a user turn first", "Put the question in front of it."
            )
        previous = message.role
    if previous != "assistant":
        where = f"{name}[{len(messages) - 1}]"
        raise Problem(where, f"a {previous} turn at the end", "a reply at the end", "Add the reply or delete the turn.")


def _system(row: Mapping[str, Any], name: str) -> list[Message]:
    text = _string(row.get(name), name, absent=True)
    return [Message("system", text)] if text.strip() else []


def _filled(value: Any, where: str, expected: str) -> str:
    text = _string(value, where)
    if not text.strip():
        raise Problem(where, "no text", expected, "Fill it in or delete the row.")
    return text


def _string(value: Any, where: str, *, absent: bool = False) -> str:
    """The value, if it is text that UTF-8 can hold; null is an empty text where it may be `absent`."""
    if value is None and absent:
        return ""
    if not isinstance(value, str):
        fix = "Fill it in or delete the row." if value is None else "Put it in quotes, or delete the row."
        raise Problem(where, described(value), "text", fix)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"half a character (\\u{ord(value[error.start]):04x})"
            raise Problem(
                where, found, "whole characters", "The text was cut inside an emoji; write it again."
            ) from None
    if "\x00" in value:
        raise Problem(where, "the character NUL (\\u0000)", "text", "Delete the character.")
    return value
