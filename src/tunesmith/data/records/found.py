"""Words for what was found in a file, with everything escaped that a terminal would obey."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from tunesmith.language import marked, said
from tunesmith.spelling import nearest

# What other data sets call these fields; only for hints, a file says what it is by our names.
_OTHER_NAMES = {
    "instruction": ("prompt", "question", "query", "user", "problem"),
    "output": ("completion", "response", "answer", "reply", "assistant", "target", "chosen", "solution"),
}


def rename_hint(name: str, column: str, free: Iterable[str]) -> str | None:
    """The flag that maps `name` to the most likely of the `free` names, if one is likely."""
    lower = {key.lower(): key for key in free if key}
    near = [key for key in (column.lower(), name, *_OTHER_NAMES.get(name, ())) if key in lower]
    meant = near[0] if near else nearest(column.lower(), lower)
    if not meant:
        return None
    word = f"data.columns.{name}={plain(lower[meant])}"
    # A mark at its end would read as the sentence's.
    return f"--set '{word}'" if shlex.quote(word) == word and word[-1] in ".,:" else f"--set {shlex.quote(word)}"


def rename_or(flag: str) -> str:
    """What to do about a name that all rows have."""
    return said("Rename it in the file, or pass {flag}", flag=flag)


def for_one_row(fix: str) -> str:
    """What to do about a name in a row where others have the right one: a flag would be wrong for those."""
    return said("Rename it in the file.") if fix.startswith(rename_or("--set data.columns.")) else fix


def list_of_objects(row: Any) -> str | None:
    """The name of the first field that holds a list of objects."""
    if not isinstance(row, dict):
        return None
    return next((plain(k[:60]) for k, v in row.items() if isinstance(v, list) and v and isinstance(v[0], dict)), None)


def listed(row: Mapping[str, Any]) -> str:
    names = [quoted(str(key)) for key in islice(row, 8)]
    if not names:
        return said("an empty object")
    return said("only {names}", names=f"{', '.join(names)}{' …' if len(row) > 8 else ''}")


def described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return said("the truth value {value}", value=json.dumps(value))
    if isinstance(value, (int, float)):
        return said("the number {value}", value=str(value)[:60])
    if isinstance(value, str):
        return quoted(value)
    if not isinstance(value, (list, tuple, dict)):  # Parquet knows more types than JSON
        return f"{quoted(str(value))} ({type(value).__name__})"
    kind = said("an object") if isinstance(value, dict) else said("a list")
    if not value:
        return said("{kind} that is empty", kind=kind)
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return said("{kind}, deeply nested", kind=kind)
    return said("{kind} ({text})", kind=kind, text=quoted(text, 40))


def seen(text: str, at_end: str = marked("the end of the file")) -> str:
    """The first line of what was found where reading stopped."""
    text = text[:1000].strip()
    return quoted(text.splitlines()[0].strip(), 40) if text else said(at_end)


def quoted(text: str, at_most: int = 60) -> str:
    return f"'{plain(text[:at_most])}{'…' if len(text) > at_most else ''}'"


def plain(text: str) -> str:
    """The text with everything escaped that a terminal would obey, or that UTF-8 can not hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
