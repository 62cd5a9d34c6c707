"""The known word that was meant by a misspelt one, found in bounded time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 64
_MOST = 1000


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of the `known` words, if one is similar enough.

    difflib takes a time that grows with the product of the lengths, and both may come from somebody's file; a word of
    more than 64 characters is nobody's slip of a finger, and of many names the first thousand are looked at.

    >>> nearest("instrution", ["input", "instruction"])
    'instruction'
    """
    if len(word) > _LONGEST:
        return None
    alike = []
    for name in known:
        shorter, longer = sorted((len(word), len(name)))
        if longer <= _LONGEST and 2 * shorter >= cutoff * (shorter + longer):
            alike.append(name)
            if len(alike) == _MOST:
                break
    return next(iter(difflib.get_close_matches(word, alike, 1, cutoff)), None)
