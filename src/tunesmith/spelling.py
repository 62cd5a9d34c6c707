"""The known words that were meant by a misspelt one, found in bounded time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 64
_MOST = 1000


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of the `known` words, if one is similar enough.

    >>> nearest("instrution", ["input", "instruction"])
    'instruction'
    """
    return next(iter(alike(word, known, cutoff, 1)), None)


def alike(word: str, known: Iterable[str], cutoff: float = 0.6, at_most: int = 3) -> list[str]:
    """Those of the `known` words that are similar enough, the most similar first.

    difflib takes a time that grows with the product of the lengths, and both may come from somebody's file; a word of
    more than 64 characters is nobody's slip of a finger, and of many names the first thousand are looked at.
    """
    if len(word) > _LONGEST:
        return []
    candidates = []
    for name in known:
        shorter, longer = sorted((len(word), len(name)))
        if longer <= _LONGEST and 2 * shorter >= cutoff * (shorter + longer):
            candidates.append(name)
            if len(candidates) == _MOST:
                break
    return difflib.get_close_matches(word, candidates, at_most, cutoff)
