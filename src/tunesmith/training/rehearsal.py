"""Some six hundred general prompts, to rehearse with: a model answers them before a training, in its own words, and
these answers are trained along with the data, so that it does not forget what it knew. No prompt is like one of the
questions of `general`, which measure what was forgotten, or asks for what they ask."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tunesmith import reading
from tunesmith.errors import DataError
from tunesmith.language import said

_FILE = Path(__file__).parent / "rehearsal.jsonl"
_MOST_BYTES = 16 << 20
_KEYS = ("prompt", "instruction", "question")


def prompts(file: str | None = None) -> tuple[str, ...]:
    """The shipped prompts, two English ones to a Chinese one, the first N as mixed as the whole, whatever N is; or
    those of somebody's own file: a prompt a line, or JSONL with a text or an object that has `prompt`.

    Raises DataError for a file that can not be read or holds none.
    """
    return _shipped() if file is None else _own(file)


@cache
def _shipped() -> tuple[str, ...]:
    return tuple(json.loads(line)["prompt"] for line in _FILE.read_text(encoding="utf-8").splitlines())


def _own(file: str) -> tuple[str, ...]:
    fix = said(
        "Name a text file with a prompt a line (data.rehearse), or leave it out: then shipped prompts are taken."
    )
    try:
        text = reading.content(Path(file), _MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = said("not UTF-8") if isinstance(error, UnicodeDecodeError) else reading.reason(error)
        raise DataError(
            file, said("no readable prompts ({reason})", reason=reason), said("a file of prompts in UTF-8"), fix
        ) from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(file, said("no prompt"), said("a prompt a line"), fix)
    if Path(file).suffix.lower() not in (".jsonl", ".ndjson"):
        return tuple(line for _, line in lines)
    return tuple(_of_json(file, number, line) for number, line in lines)


def _of_json(file: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        value = next((value[key] for key in _KEYS if key in value), None)
    if not isinstance(value, str) or not value.strip():
        found, fix = said("no prompt"), said('Write {{"prompt": "…"}}, or the text alone in quotes.')
        raise DataError(f"{file}:{number}", found, said("a text, or an object with `prompt`"), fix)
    return value
