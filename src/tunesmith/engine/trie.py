"""The documents of a micro-batch as prefix trees: what they have in common from their first token on stands once.

A tree is laid out depth first, so one integer per token says who sees whom: `end`, the index behind the last token of
its subtree. Query q sees key k exactly when `k <= q < end[k]`.

    documents  [S u a x]  [S u b y z]  [T v c]        S u stand once; x, y z and c are learned
    index       0 1 2  3 4  5 6
    token       S u a  b y  T v                       the last token of a document predicts nothing, so it is left out
    position    0 1 2  2 3  0 1
    end         5 5 3  5 5  7 7
    pairs       2→x  3→y  4→z  6→c

Packing without sharing is the case of no common tokens.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.types import Rendered


@dataclass(frozen=True, slots=True)
class Tree:
    """The layout of one micro-batch."""

    token_ids: tuple[int, ...]
    position: tuple[int, ...]
    """How many tokens stand before it in its documents."""
    end: tuple[int, ...]
    segments: tuple[range, ...]
    """Stretches of the layout without a fork, in its order; together they are all of it."""
    pairs: tuple[tuple[int, int, int], ...]
    """(predict_from, target, count), sorted: the token at that index predicts the target in so many documents."""

    @property
    def n_supervised(self) -> int:
        return sum(count for _, _, count in self.pairs)


def input_length(document: Rendered) -> int:
    """How many of its tokens go through the model: those in front of the last one that is learned."""
    return document.replies[-1][1] - 1


def lay_out(documents: Sequence[Rendered], *, share_prefix: bool = True, whole: bool = False) -> Tree:
    """The documents as trees, every document once; `share_prefix` False gives each one a tree of its own.

    With `whole` tokens that predict nothing learned stay in: a rotary embedding may count them.
    """
    token_ids: list[int] = []
    position: list[int] = []
    parent: list[int] = []
    end: list[int] = []
    pairs: Counter[tuple[int, int]] = Counter()
    path: list[int] = []  # indices of the current document's tokens
    before: tuple[int, ...] = ()
    for document in sorted(documents, key=_inputs) if share_prefix else documents:
        inputs = document.token_ids if whole else _inputs(document)
        depth = _common(before, inputs) if share_prefix else 0
        for index in path[depth:]:
            end[index] = len(token_ids)
        del path[depth:]
        for i in range(depth, len(inputs)):
            parent.append(path[-1] if path else -1)
            path.append(len(token_ids))
            token_ids.append(inputs[i])
            position.append(i)
            end.append(-1)
        for start, stop in document.replies:
            pairs.update((path[i - 1], document.token_ids[i]) for i in range(start, stop))
        before = inputs
    for index in path:
        end[index] = len(token_ids)
    return Tree(
        tuple(token_ids),
        tuple(position),
        tuple(end),
        _segments(parent),
        tuple((*pair, count) for pair, count in sorted(pairs.items())),
    )


def cut(documents: Sequence[Rendered], max_tokens: int, *, share_prefix: bool = True) -> list[list[Rendered]]:
    """The documents in groups whose trees have about the same size: at most `max_tokens` tokens beside those that all
    of the group begin with, which would stand once more in every smaller group.

    Documents that share most come together. One that is longer than that may go alone.
    """
    line = _Line(documents, share_prefix, common_is_free=True)
    fewest = line.groups(max_tokens)
    return fewest if len(fewest) == 1 else line.evened(len(fewest), max_tokens)


def deal(documents: Sequence[Rendered], n: int, *, share_prefix: bool = True) -> list[list[Rendered]]:
    """The documents in `n` groups whose trees have about the same size; some are empty where there are too few."""
    line = _Line(documents, share_prefix, common_is_free=False)
    groups = line.evened(n, sum(map(input_length, documents)))
    return groups + [[] for _ in range(n - len(groups))]


def own_tokens(documents: Sequence[Rendered], *, share_prefix: bool = True) -> int:
    """The tokens of their tree beside those that all of them begin with: what `cut` goes by. Below 2 nothing divides
    them; 0 for one document, and for several that are the same."""
    return _Line(documents, share_prefix, common_is_free=True).smallest_budget()


class _Line:
    """Documents in an order in which neighbours share most."""

    def __init__(self, documents: Sequence[Rendered], share_prefix: bool, *, common_is_free: bool) -> None:
        """`common_is_free`: what all documents of a group begin with does not count."""
        self._common_is_free = common_is_free
        self._documents = sorted(documents, key=_inputs)
        shared = (_common(_inputs(a), _inputs(b)) for a, b in itertools.pairwise(self._documents))
        self._depths = [0, *(shared if share_prefix else itertools.repeat(0, len(documents) - 1))]

    def groups(self, max_tokens: int) -> list[list[Rendered]]:
        """From one end to the other, a group ends where the next document would make it too large."""
        groups: list[list[Rendered]] = []
        size = free = 0
        for document, depth in zip(self._documents, self._depths, strict=False):
            length = input_length(document)
            if groups and size + length - depth - min(free, depth) <= max_tokens:
                groups[-1].append(document)
                size, free = size + length - depth, min(free, depth)
            else:
                groups.append([document])
                size, free = length, length if self._common_is_free else 0
        return groups

    def smallest_budget(self) -> int:
        """The least `max_tokens` that one group keeps."""
        lengths = [input_length(document) for document in self._documents]
        return sum(lengths) - sum(self._depths) - min([lengths[0], *self._depths[1:]])

    def evened(self, n: int, max_tokens: int) -> list[list[Rendered]]:
        """At most `n` groups, none of them a small rest: those of the least budget that allows so few."""
        low, high = 1, max_tokens
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self.groups(middle)) <= n else (middle + 1, high)
        return self.groups(high)


def _inputs(document: Rendered) -> tuple[int, ...]:
    return document.token_ids[: input_length(document)]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _segments(parent: Sequence[int]) -> tuple[range, ...]:
    children = Counter(parent)
    starts = [i for i, p in enumerate(parent) if p == -1 or p != i - 1 or children[p] > 1]
    return tuple(range(start, stop) for start, stop in itertools.pairwise([*starts, len(parent)]))
