"""Attention over prefix trees as a walk through the tree, depth first.

The keys and values of the path from the root to where the walk stands lie side by side, in the order of the document. A
tile of queries sees nothing but the end of that path up to itself, so nothing is padded, and of what a tile computes
only the corner behind its first query is hidden. A tile's scores stay in the processor's cache and are formed again on
the way back: nothing is kept from the forward pass, and no memory but the path's grows with the length of a row.

Legend: T tokens, H query heads, K key heads, D head size (of values it may be another); P positions of the longest
path; Q queries of a tile, S positions that it sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from tunesmith.engine.memory import Take
from tunesmith.engine.onepass import array, kernels
from tunesmith.engine.trie import Tree

if TYPE_CHECKING:
    from tunesmith.engine.attention import Style

Given = tuple[Tensor, Tensor, Tensor]
"""Queries (T, H, D), keys and values (T, K, D)."""
_TILE = 2**18  # scores of all heads that are worked on together: 1 MiB, and as much for their gradients
_FEWEST_QUERIES = 16
_MOST_QUERIES = 256  # more waste what is hidden


@dataclass(frozen=True)
class _Visit:
    """A segment on a walk."""

    tokens: slice
    """Those that are seen."""
    position: int
    """Of the first one in its documents."""
    queries: range
    """Those that the walk is for; there may be none."""

    @property
    def positions(self) -> slice:
        return slice(self.position, self.position + self.tokens.stop - self.tokens.start)


class Gather:
    """Who sees whom in a micro-batch, for the walk of some or all of its queries."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self._tree, self._device = tree, device
        self._visits = dict[range, list[_Visit]]()
        self._walks = dict[tuple[Any, ...], Walk]()

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, style: Style) -> Tensor:
        return cast("Tensor", _Differentiable.apply(query_THD, key_TKD, value_TKD, self, style))

    def walk(self, rows: range, given: Given, style: Style, take: Take | None = None) -> Walk:
        """For the queries `rows`, and tensors of the shapes of `given`. `take` gives memory that is kept, and then the
        walk is the same for all layers; None: there is none."""
        window = style.window if style.window is not None and max(self._tree.position) >= style.window else None
        if rows not in self._visits:
            self._visits[rows] = list(_visits(self._tree, rows))
        if take is None:
            return Walk(self._visits[rows], rows, given, window, None)
        which = rows, window, *(tensor.shape for tensor in given)
        if which not in self._walks:
            self._walks[which] = Walk(self._visits[rows], rows, given, window, take)
        return self._walks[which]


def _visits(tree: Tree, rows: range) -> Iterator[_Visit]:
    for segment in tree.segments:
        if segment.start < rows.stop and tree.end[segment.start] > rows.start:
            stop = min(segment.stop, rows.stop)
            queries = range(max(segment.start, rows.start), stop)
            yield _Visit(slice(segment.start, stop), tree.position[segment.start], queries)


class Walk:
    """Attention of some consecutive queries, and its backward pass. Does not remember what it was given."""

    def __init__(
        self, visits: Sequence[_Visit], rows: range, given: Given, window: int | None, take: Take | None
    ) -> None:
        query, key, value = given
        take = take or (lambda _, *shape: query.new_empty(shape))
        self._rows, self._heads, key_heads = rows, query.shape[1], key.shape[1]
        sizes, longest = (query.shape[2], value.shape[2]), max(visit.positions.stop for visit in visits)
        paths = [take(name, key_heads, longest, size) for name, size in zip(("keys", "values"), sizes, strict=True)]
        d_paths = [take(f"d {n}", key_heads, longest, size) for n, size in zip(("keys", "values"), sizes, strict=True)]
        n_rows = len(rows) * self._heads
        self._queries, self._d_queries = take("queries", n_rows, sizes[0]), take("d queries", n_rows, sizes[0])
        self._attended, self._d_attended = take("attended", n_rows, sizes[1]), take("d attended", n_rows, sizes[1])
        self._queries_in_order = take("queries in order", n_rows, sizes[0])
        self._attended_in_order = take("attended in order", n_rows, sizes[1])
        cuts = [list(_cut(visit, self._heads, window)) for visit in visits]
        largest = max(self._heads * len(tile) * (seen.stop - seen.start) for cut in cuts for tile, seen in cut)
        scores, d_scores = take("scores", largest), take("d scores", largest)
        self._stops = list[tuple[_Visit, _Segment, list[_Tile]]]()
        by_row = (self._queries, self._d_queries, self._attended, self._d_attended)
        for visit, cut in zip(visits, cuts, strict=True):
            tiles = []
            for queries, seen in cut:
                first = (queries.start - rows.start) * self._heads
                behind = first + len(queries) * self._heads
                own = [flat[first:behind].view(key_heads, -1, flat.shape[1]) for flat in by_row]
                shape = *own[0].shape[:2], seen.stop - seen.start
                room = [flat[: math.prod(shape)].view(shape) for flat in (scores, d_scores)]
                tiles.append(_Tile(len(queries), window, *own, *(path[:, seen] for path in (*paths, *d_paths)), *room))
            self._stops.append((visit, _Segment(*(path[:, visit.positions] for path in (*paths, *d_paths))), tiles))
        orders = [_order_of(queries, rows, self._heads) for cut in cuts for queries, _ in cut]
        self._order = torch.cat(orders).to(query.device)
        self._places = self._order.argsort()
        self._sources = dict[int, Tensor]()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, style: Style) -> Tensor:
        """(rows, H, D), good until somebody uses the kept memory again."""
        self._collect(query, self._queries, self._rows.start)
        for visit, segment, tiles in self._stops:
            segment.enter(key[visit.tokens], value[visit.tokens])
            for tile in tiles:
                tile.forward(style)
        return self._in_order(self._attended, self._attended_in_order)

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, style: Style, d_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the queries, of all keys and of all values as far as these queries see them, and `forward`'s
        result again; the first and the last are good until somebody uses the kept memory again."""
        self._collect(query, self._queries, self._rows.start)
        self._collect(d_out, self._d_attended, 0)
        d_key, d_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
        path: list[tuple[_Visit, _Segment]] = []
        for visit, segment, tiles in self._stops:
            self._leave(path, visit.position, d_key, d_value)
            path.append((visit, segment))
            segment.enter(key[visit.tokens], value[visit.tokens])
            segment.d_keys.zero_()
            segment.d_values.zero_()
            for tile in tiles:
                tile.backward(style)
        self._leave(path, 0, d_key, d_value)
        again = self._in_order(self._attended, self._attended_in_order)
        return self._in_order(self._d_queries, self._queries_in_order), d_key, d_value, again

    def _leave(self, path: list[tuple[_Visit, _Segment]], position: int, d_key: Tensor, d_value: Tensor) -> None:
        while path and path[-1][0].position >= position:
            visit, segment = path.pop()
            d_key[visit.tokens] = segment.d_keys.transpose(0, 1)
            d_value[visit.tokens] = segment.d_values.transpose(0, 1)

    def _collect(self, given: Tensor, flat: Tensor, start: int) -> None:
        """Heads of the tensor's tokens from `start` on, tile by tile, in `flat`."""
        given = given[start : start + len(self._rows)]
        heads, size = self._heads, given.shape[2]
        apart, rest = divmod(given.stride(0), size)
        if rest or given.stride()[1:] != (size, 1):
            given, apart = given.contiguous(), heads
        by_head = given.as_strided(((len(given) - 1) * apart + heads, size), (size, 1))
        if apart not in self._sources:
            self._sources[apart] = self._order // heads * apart + self._order % heads
        _rows(by_head, self._sources[apart], flat)

    def _in_order(self, flat: Tensor, out: Tensor) -> Tensor:
        return _rows(flat, self._places, out).view(len(self._rows), self._heads, -1)


class _Segment(NamedTuple):
    """A segment's place in the path."""

    keys: Tensor
    """(K, tokens, D)"""
    values: Tensor
    d_keys: Tensor
    d_values: Tensor

    def enter(self, key_TKD: Tensor, value_TKD: Tensor) -> None:
        self.keys.copy_(key_TKD.transpose(0, 1))
        self.values.copy_(value_TKD.transpose(0, 1))


class _Tile(NamedTuple):
    """Some queries of a segment, with those that share a key head behind each other."""

    n: int
    """Q"""
    window: int | None
    queries: Tensor
    """(K, H / K · Q, D)"""
    d_queries: Tensor
    attended: Tensor
    d_attended: Tensor
    keys: Tensor
    """(K, S, D), the end of the path up to the last query"""
    values: Tensor
    d_keys: Tensor
    d_values: Tensor
    scores: Tensor
    """(K, H / K · Q, S)"""
    d_scores: Tensor

    def forward(self, style: Style) -> tuple[Tensor, Tensor | None]:
        """Fills `attended`; returns what `_probabilities` does."""
        probabilities, slope = self._probabilities(style)
        torch.bmm(_as(self.values.dtype, probabilities), self.values, out=self.attended)
        return probabilities, slope

    def backward(self, style: Style) -> None:
        """Fills `attended` and `d_queries`, and adds to the gradients of what is seen."""
        probabilities, slope = self.forward(style)
        d_scores = torch.bmm(self.d_attended, self.values.mT, out=self.d_scores)
        compiled = kernels(probabilities, d_scores)
        if compiled is not None:
            compiled.softmax_backward(array(d_scores.flatten(0, 1)), array(probabilities.flatten(0, 1)))
        else:
            d_probabilities = _as(probabilities.dtype, d_scores)
            d_scores = torch.ops.aten._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
        if slope is not None:
            d_scores.mul_(slope)
        d_scores = _as(self.queries.dtype, d_scores)
        self.d_values.baddbmm_(_as(self.values.dtype, probabilities).mT, self.d_attended)
        self.d_keys.baddbmm_(d_scores.mT, self.queries, alpha=style.scale)
        nothing = self.queries.new_zeros(1, 1, 1)
        torch.baddbmm(nothing, d_scores, self.keys, beta=0, alpha=style.scale, out=self.d_queries)

    def _probabilities(self, style: Style) -> tuple[Tensor, Tensor | None]:
        """(K, H / K · Q, S), at least fp32; and the slope of the soft cap where there is one."""
        nothing = self.queries.new_zeros(1, 1, 1)
        scores = torch.baddbmm(nothing, self.queries, self.keys.mT, beta=0, alpha=style.scale, out=self.scores)
        n_keys = self.keys.shape[1]
        compiled = kernels(scores) if style.softcap is None and style.sinks is None else None
        if compiled is not None:
            compiled.causal_softmax(array(scores.view(-1, self.n, n_keys)), self.window or n_keys)
            return scores, None
        scores = _as(torch.promote_types(scores.dtype, torch.float32), scores)
        slope = None
        if style.softcap is not None:
            capped = scores.div_(style.softcap).tanh_()
            slope = 1 - capped.square()
            scores = capped * style.softcap
        by_head = scores.view(-1, self.n, n_keys).masked_fill_(self._hidden(), -math.inf)
        if style.sinks is None:
            return torch.softmax(scores, -1), slope
        sinks = style.sinks.to(scores.dtype)[:, None, None].expand(-1, self.n, 1)
        return torch.softmax(torch.cat([by_head, sinks], -1), -1)[..., :-1].reshape(scores.shape), slope

    def _hidden(self) -> Tensor:
        """(Q, S) bool"""
        n_keys, device = self.keys.shape[1], self.keys.device
        query, key = torch.arange(n_keys - self.n, n_keys, device=device), torch.arange(n_keys, device=device)
        before = query[:, None] - key
        return (before < 0) if self.window is None else (before < 0) | (before >= self.window)


def _cut(visit: _Visit, heads: int, window: int | None) -> Iterator[tuple[range, slice]]:
    """Tiles' queries, and the positions of the keys that they see up to causality."""
    first = visit.queries.start
    while first < visit.queries.stop:
        position = visit.position + first - visit.tokens.start
        low = 0 if window is None else max(0, position - window + 1)
        before = (position - low) / 2
        fit = math.sqrt(before**2 + _TILE / heads) - before  # n · (2 · before + n) = _TILE / H
        most = min(max(int(fit), _FEWEST_QUERIES), _MOST_QUERIES)
        rest = visit.queries.stop - first
        n = math.ceil(rest / math.ceil(rest / most))
        yield range(first, first + n), slice(low, position + n)
        first += n


def most_scores(heads: int, longest: int) -> int:
    """How many a tile has in the longest documents."""
    return heads * longest * min(max(math.ceil(_TILE / (heads * longest)), _FEWEST_QUERIES), _MOST_QUERIES)


def _order_of(queries: range, rows: range, heads: int) -> Tensor:
    """(H · Q): of a tile's rows, the place among all heads of `rows`."""
    token = torch.arange(queries.start - rows.start, queries.stop - rows.start)
    return (token * heads + torch.arange(heads)[:, None]).flatten()


def _rows(given: Tensor, which: Tensor, out: Tensor) -> Tensor:
    """The rows `which` (n,) of `given`, in `out`."""
    compiled = kernels(given, out)
    if compiled is None:
        return torch.index_select(given, 0, which, out=out)
    compiled.rows(array(given), array(which), array(out))
    return out


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class _Differentiable(torch.autograd.Function):
    """A walk of all queries where autograd is at work."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sight: Gather, style: Style) -> Tensor:
        given = query, key, value
        ctx.save_for_backward(*given)
        ctx.sight, ctx.style = sight, style
        return sight.walk(range(len(query)), given, style).forward(*given, style)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given, style = ctx.saved_tensors, ctx.style
        walk = ctx.sight.walk(range(len(given[0])), given, style)
        return *walk.backward(*given, style, grad_out)[:3], None, None
