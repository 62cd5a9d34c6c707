"""What can be said of a reply by counting: likeness to a reference, repetition, and what it has word for word from
elsewhere. Numbers between 0 and 1."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sacrebleu

SHORT_WORDS = 5
"""A reference of at most so many words is compared exactly as well."""

_COPIED_WORDS = 8  # a run so long is hardly met by chance
_REPEATED_WORDS = 4
# A word, or one sign of a script that does not part its words.
_WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0e7f]|\w+")

Run = tuple[str, ...]


def words(text: str) -> list[str]:
    """Words in small letters; of scripts without spaces, signs."""
    return _WORD.findall(text.lower())


def likeness(reply: str, reference: str) -> float:
    """chrF (Popović 2015, https://aclanthology.org/W15-3049), of character sixgrams, as sacrebleu computes it."""
    return sacrebleu.sentence_chrf(reply, [reference]).score / 100


def same(reply: str, reference: str) -> bool:
    """Whether both are the same words."""
    return words(reply) == words(reference)


def repetition(reply: str) -> float:
    """The share of a reply's runs of four words that stand earlier in it already."""
    runs = list(_runs(words(reply), _REPEATED_WORDS))
    return sum(count - 1 for count in Counter(runs).values()) / len(runs) if runs else 0.0


def long_runs(texts: Iterable[str]) -> frozenset[Run]:
    """All runs of eight words of some texts."""
    return frozenset(itertools.chain.from_iterable(_runs(words(text), _COPIED_WORDS) for text in texts))


def copied(reply: str, reference: str, known: frozenset[Run]) -> float | None:
    """The share of a reply's runs of eight words that are in `known`; without those of the reference, which are right
    whoever else says them. None for a reply that is too short to have one."""
    runs = set(_runs(words(reply), _COPIED_WORDS)) - set(_runs(words(reference), _COPIED_WORDS))
    return len(runs & known) / len(runs) if runs else None


def interval(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """The bounds between which the mean of `values`, weighted, lies in 95 of 100 cases, had other rows been drawn:
    percentile bootstrap over rows (Efron 1979), 2,000 draws with one seed."""
    value = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(value) if weights is None else np.asarray(weights, dtype=np.float64)
    chance = np.random.default_rng(0)
    means = np.empty(2000)
    for number in range(len(means)):
        drawn = chance.integers(len(value), size=len(value))
        means[number] = (value[drawn] * weight[drawn]).sum() / weight[drawn].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _runs(of: Sequence[str], length: int) -> Iterator[Run]:
    return zip(*(of[start:] for start in range(length)), strict=False)
