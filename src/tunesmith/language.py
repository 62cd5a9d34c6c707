"""The language that the reader has: what people read in a terminal, a report or a notebook is said in it.

Messages stand in the code in English, and are looked up when they are said; names of settings, keys and fixed words of
JSON are no messages. The translations are in locale/, written by `make catalogue`.
"""

from __future__ import annotations

import gettext
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal

VARIABLE = "TUNESMITH_LANG"
LOCALE = Path(__file__).parent / "locale"
_LANGUAGE = re.compile(r"(en|zh)(?:[-_.@].*)?", re.IGNORECASE)

Language = Literal["en", "zh"]
_spoken: ContextVar[Language | None] = ContextVar("spoken", default=None)


def language() -> Language:
    """The reader's: by TUNESMITH_LANG, else by the locale; English where neither is known."""
    if (spoken := _spoken.get()) is not None:
        return spoken
    if (named := _named(os.environ.get(VARIABLE, ""))) is not None:
        return named
    places = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return _named(next(filter(None, places), "")) or "en"


def unknown() -> str | None:
    """What TUNESMITH_LANG names, where that is no language that there is."""
    given = os.environ.get(VARIABLE, "")
    return given if given and _named(given) is None else None


def settle(encoding: str) -> None:
    """From now on, in the processes that this one starts too, English, where what is printed in this encoding could
    not hold the reader's language: Chinese in ASCII would be escapes that nobody reads."""
    try:
        said("rows").encode(encoding)
    except UnicodeEncodeError:
        os.environ[VARIABLE] = "en"


@contextmanager
def speaking(of: Language) -> Iterator[None]:
    """Inside, everything is said in this language: in a file that is not for the reader alone."""
    token = _spoken.set(of)
    try:
        yield
    finally:
        _spoken.reset(token)


def said(message: str, /, **values: Any) -> str:
    """The message in the reader's language, with its values."""
    return _translations(language()).gettext(message).format(**values)


def translated(text: str, /) -> str:
    """A text that has no values in the reader's language: braces in it are braces."""
    return _translations(language()).gettext(text)


def counted(one: str, several: str, n: int, /, **values: Any) -> str:
    """As `said`, in the form that the number asks for; the number is the value `n` as well."""
    return _translations(language()).ngettext(one, several, n).format(n=n, **values)


def marked(message: str, /) -> str:
    """The message as it stands: it is looked up where `said` is given it."""
    return message


def pieces(message: str, /, **values: Any) -> Iterator[Any]:
    """As `said`, one piece after the other: its texts, and its values as they are, or as text where they have a
    format."""
    for text, name, how, _ in Formatter().parse(_translations(language()).gettext(message)):
        yield text
        if name is not None:
            yield format(values[name], how) if how else values[name]


def _named(text: str) -> Language | None:
    found = _LANGUAGE.fullmatch(text)
    return None if found is None else "zh" if found[1].lower() == "zh" else "en"


@cache
def _translations(of: Language) -> gettext.NullTranslations:
    if of == "en":
        return gettext.NullTranslations()
    with (LOCALE / of / "LC_MESSAGES" / "tunesmith.mo").open("rb") as file:
        return gettext.GNUTranslations(file)
