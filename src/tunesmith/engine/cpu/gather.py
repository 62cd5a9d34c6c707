"""Attention over prefix trees as a walk through the tree, depth first.

The keys and values of the path from the root to where the walk stands lie side by side, in the order of the document. A
tile of queries sees nothing but the end of that path up to itself, so nothing is padded, and of what a tile computes
only the corner behind its first query is hidden. A tile's scores stay in the processor's cache and are formed again on
the way back, for which the result and two numbers per query and head are kept (Dao: "FlashAttention-2", arXiv
2307.08691, section 3.1): with the length of a row grows the memory of its path, and where products are split that of
a few rows of scores.

Legend: T tokens, H query heads, K key heads, D head size (of values it may be another); P positions of the longest
path; Q queries of a tile, S positions that it sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from tunesmith.engine.cpu import products
from tunesmith.engine.cpu.memory import Take
from tunesmith.engine.cpu.onepass import array, kernels
from tunesmith.engine.sight import Style
from tunesmith.engine.trie import Tree

Given = tuple[Tensor, Tensor, Tensor]
"""Queries (T, H, D), keys and values (T, K, D)."""


class Looked(NamedTuple):
    """What the backward pass needs of the forward pass, beside what that was given."""

    attended: Tensor
    """(rows, H, D), the result."""
    largest: Tensor
    """(rows · H,) score, in the walk's own order."""
    share: Tensor
    """(rows · H,) of one in the sum of e to the power of all scores less the largest."""


_TILE = 2**18  # scores of all heads that are worked on together: 1 MiB, and as much for their gradients
_FEWEST_QUERIES = 16
_MOST_QUERIES = 256  # more waste what is hidden
ROWS = 64  # heads of queries that are worked on together where products are split


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
        self._walks = dict[tuple[Any, ...], Walk | SplitWalk]()

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, style: Style) -> Tensor:
        return cast("Tensor", _Differentiable.apply(query_THD, key_TKD, value_TKD, self, style))

    def walk(self, rows: range, given: Given, style: Style, take: Take | None = None) -> Walk | SplitWalk:
        """For the queries `rows`, and tensors of the shapes of `given`. `take` gives memory that is kept, and then the
        walk is the same for all layers; None: there is none."""
        window = style.window if style.window is not None and max(self._tree.position) >= style.window else None
        if rows not in self._visits:
            self._visits[rows] = list(_visits(self._tree, rows))
        kind = SplitWalk if _may_split(given, style) else Walk
        if take is None:
            return kind(self._visits[rows], rows, given, window, None)
        which = kind, rows, window, *(tensor.shape for tensor in given)
        if which not in self._walks:
            self._walks[which] = kind(self._visits[rows], rows, given, window, take)
        return self._walks[which]


def _visits(tree: Tree, rows: range) -> Iterator[_Visit]:
    for segment in tree.segments:
        if segment.start < rows.stop and tree.end[segment.start] > rows.start:
            stop = min(segment.stop, rows.stop)
            queries = range(max(segment.start, rows.start), stop)
            yield _Visit(slice(segment.start, stop), tree.position[segment.start], queries)


class Walk:
    """Attention of some consecutive queries, and its backward pass. Remembers neither what it was given nor gave."""

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
        self._queries_in_order, self._along = take("queries in order", n_rows, sizes[0]), take("along", n_rows)
        self._exact = torch.promote_types(query.dtype, torch.float32)
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
                on_path = (path[:, seen] for path in (*paths, *d_paths))
                tiles.append(_Tile(slice(first, behind), len(queries), window, *own, *on_path, *room))
            self._stops.append((visit, _Segment(*(path[:, visit.positions] for path in (*paths, *d_paths))), tiles))
        orders = [_order_of(queries, rows, self._heads) for cut in cuts for queries, _ in cut]
        self._order = torch.cat(orders).to(query.device)
        self._places = self._order.argsort()
        self._sources = dict[int, Tensor]()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, style: Style, keep: Take | None = None) -> Looked:
        """`keep` gives memory for what is returned; None: it is new."""
        looked = _memory_for(self._rows, self._heads, value, keep)
        attended, largest, share = looked
        self._collect(query, self._queries, self._rows.start)
        for visit, segment, tiles in self._stops:
            segment.enter(key[visit.tokens], value[visit.tokens])
            for tile in tiles:
                tile.forward(style, largest[tile.rows], share[tile.rows])
        _rows(self._attended, self._places, attended.view(len(self._order), -1), share)
        return looked

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, style: Style, looked: Looked, d_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the queries, of all keys and of all values as far as these queries see them; the first is good
        until somebody uses the kept memory again."""
        self._collect(query, self._queries, self._rows.start)
        self._collect(d_out, self._d_attended, 0)
        self._see_along(looked.attended.view(len(self._order), -1))
        d_key, d_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
        path: list[tuple[_Visit, _Segment]] = []
        for visit, segment, tiles in self._stops:
            self._leave(path, visit.position, d_key, d_value)
            path.append((visit, segment))
            segment.enter(key[visit.tokens], value[visit.tokens])
            segment.d_keys.zero_()
            segment.d_values.zero_()
            for tile in tiles:
                tile.backward(style, *(kept[tile.rows] for kept in (looked.largest, looked.share, self._along)))
        self._leave(path, 0, d_key, d_value)
        d_query = _rows(self._d_queries, self._places, self._queries_in_order)
        return d_query.view(len(self._rows), self._heads, -1), d_key, d_value

    def _see_along(self, attended: Tensor) -> None:
        """The sum over all keys of probability times its gradient, by which a softmax's gradient is less: the same over
        the numbers of the result."""
        compiled = kernels(attended, self._d_attended, self._along)
        if compiled is not None:
            compiled.dots(array(self._d_attended), array(attended), array(self._order), array(self._along))
        else:
            in_order = attended.index_select(0, self._order).to(self._exact)
            self._along = torch.linalg.vecdot(self._d_attended.to(self._exact), in_order)

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


def _memory_for(rows: range, heads: int, value: Tensor, keep: Take | None) -> Looked:
    keep = keep or (lambda _, *shape: value.new_empty(shape))
    n_rows, exact = len(rows) * heads, torch.promote_types(value.dtype, torch.float32)
    attended = keep("attended", len(rows), heads * value.shape[2]).view(len(rows), heads, -1)
    if exact == value.dtype:
        return Looked(attended, *keep("softmax", n_rows, 2).view(2, n_rows))
    return Looked(attended, *value.new_empty(2, n_rows, dtype=exact))


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

    rows: slice
    """Where their heads stand among all, tile by tile."""
    n: int
    """Q"""
    window: int | None
    queries: Tensor
    """(K, H / K · Q, D)"""
    d_queries: Tensor
    attended: Tensor
    """Not yet multiplied by its share."""
    d_attended: Tensor
    keys: Tensor
    """(K, S, D), the end of the path up to the last query"""
    values: Tensor
    d_keys: Tensor
    d_values: Tensor
    scores: Tensor
    """(K, H / K · Q, S)"""
    d_scores: Tensor

    def forward(self, style: Style, largest: Tensor, share: Tensor) -> None:
        """Fills `attended` and what it is given."""
        scores = self._scores(style)
        compiled = _softmax_for(style, scores)
        if compiled is not None:
            by_head = array(scores.view(-1, self.n, self.keys.shape[1]))
            compiled.causal_softmax(by_head, self.window or self.keys.shape[1], array(largest), array(share))
        else:
            scores, _ = self._masked(style, scores)
            torch.amax(scores, -1, out=largest.view(scores.shape[:2]))
            sinks = self._sinks(style, scores)
            if sinks is not None:
                largest.copy_(torch.maximum(largest, sinks))
            scores = scores.sub_(largest.view(*scores.shape[:2], 1)).exp_()
            share.copy_(scores.sum(-1).flatten())
            if sinks is not None:
                share.add_((sinks - largest).exp_())
            share.reciprocal_()
        torch.bmm(_as(self.values.dtype, scores), self.values, out=self.attended)

    def backward(self, style: Style, largest: Tensor, share: Tensor, along: Tensor) -> None:
        """Fills `d_queries`, and adds to the gradients of what is seen."""
        scores = self._scores(style)
        d_scores = torch.bmm(self.d_attended, self.values.mT, out=self.d_scores)
        compiled = _softmax_for(style, scores)
        if compiled is not None:
            by_head = (array(t.view(-1, self.n, self.keys.shape[1])) for t in (scores, d_scores))
            compiled.causal_softmax_backward(
                *by_head, self.window or self.keys.shape[1], *map(array, (largest, share, along))
            )
            probabilities = scores
        else:
            scores, slope = self._masked(style, scores)
            per_row = [t.view(*scores.shape[:2], 1) for t in (largest, share, along)]
            probabilities = scores.sub_(per_row[0]).exp_().mul_(per_row[1])
            d_scores = probabilities * (_as(probabilities.dtype, d_scores) - per_row[2])
            if slope is not None:
                d_scores.mul_(slope)
        d_scores = _as(self.queries.dtype, d_scores)
        self.d_values.baddbmm_(_as(self.values.dtype, probabilities).mT, self.d_attended)
        self.d_keys.baddbmm_(d_scores.mT, self.queries, alpha=style.scale)
        nothing = self.queries.new_zeros(1, 1, 1)
        torch.baddbmm(nothing, d_scores, self.keys, beta=0, alpha=style.scale, out=self.d_queries)

    def _scores(self, style: Style) -> Tensor:
        nothing = self.queries.new_zeros(1, 1, 1)
        return torch.baddbmm(nothing, self.queries, self.keys.mT, beta=0, alpha=style.scale, out=self.scores)

    def _masked(self, style: Style, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """At least fp32, -inf where nothing is seen; and the slope of the soft cap where there is one."""
        scores = _as(torch.promote_types(scores.dtype, torch.float32), scores)
        slope = None
        if style.softcap is not None:
            capped = scores.div_(style.softcap).tanh_()
            slope = 1 - capped.square()
            scores = capped * style.softcap
        scores.view(-1, self.n, self.keys.shape[1]).masked_fill_(self._hidden(), -math.inf)
        return scores, slope

    def _sinks(self, style: Style, scores: Tensor) -> Tensor | None:
        """(H · Q,)"""
        return None if style.sinks is None else style.sinks.to(scores.dtype).repeat_interleave(self.n)

    def _hidden(self) -> Tensor:
        """(Q, S) bool"""
        n_keys, device = self.keys.shape[1], self.keys.device
        query, key = torch.arange(n_keys - self.n, n_keys, device=device), torch.arange(n_keys, device=device)
        before = query[:, None] - key
        return (before < 0) if self.window is None else (before < 0) | (before >= self.window)


class SplitWalk:
    """`Walk` where AMX does the products: both factors of each are the sum of three of bf16."""

    def __init__(
        self, visits: Sequence[_Visit], rows: range, given: Given, window: int | None, take: Take | None
    ) -> None:
        query, key, _ = given
        take = take or (lambda _, *shape: query.new_empty(shape))
        self._visits, self._rows, self._heads = visits, rows, query.shape[1]
        key_heads, size, longest = key.shape[1], key.shape[2], max(visit.positions.stop for visit in visits)
        self._window, self._split = window or longest, cast("Any", products.amx_attention())
        blocks, tiles = math.ceil(longest / 32), size // 16
        across, n = 32 * blocks + 16, ROWS  # rows of scores begin in other lines of a cache each
        self._paths = take("path", 2, key_heads, 32 * blocks, size)
        self._d_paths = take("d path", 2, key_heads, size, across)
        of_path = 2, key_heads, 3 * 256 * tiles * blocks
        self._by_column, self._by_row = (
            take(name, *of_path).view(torch.int32).view(2, key_heads, *shape, 3, 16, 16)
            for name, shape in (("by column", (2 * blocks, size // 32)), ("by row", (tiles, blocks)))
        )
        self._scores, self._d_scores = take("scores", n, across), take("d scores", n, across)
        left, of_scores = (n // 16) * (size // 32), max((n // 16) * blocks, tiles * (n // 32))
        self._left, self._of_scores = (
            take(name, 3 * 256 * count).view(torch.int16) for name, count in (("left", left), ("of scores", of_scores))
        )
        self._nothing = query.new_zeros(size)
        self._found, self._d_queries = take("found", n, size), take("d queries", len(rows), self._heads, size)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, style: Style, keep: Take | None = None) -> Looked:
        """As `Walk.forward`."""
        looked = _memory_for(self._rows, self._heads, value, keep)
        for visit in self._visits:
            self._enter(visit, key, value, backwards=False)
            room = self._left, self._scores, self._of_scores, self._found
            self._split.forward(*self._queries(visit, query, style, looked), *map(array, room), self._split.LAYOUT)
        return looked

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, style: Style, looked: Looked, d_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Walk.backward`."""
        d_key, d_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
        d_out = d_out.detach() if d_out.stride(2) == 1 else d_out.detach().contiguous()
        path: list[_Visit] = []
        for visit in self._visits:
            self._leave(path, visit.position, d_key, d_value)
            path.append(visit)
            self._enter(visit, key, value, backwards=True)
            self._d_paths[..., visit.positions] = 0
            room = self._left, self._scores, self._d_scores, self._of_scores, self._found, self._nothing
            gradients = d_out, self._d_queries, self._d_paths
            given = self._queries(visit, query, style, looked)
            self._split.backward(*given, *map(array, (*gradients, *room)), self._split.LAYOUT)
        self._leave(path, 0, d_key, d_value)
        return self._d_queries, d_key, d_value

    def _enter(self, visit: _Visit, key: Tensor, value: Tensor, *, backwards: bool) -> None:
        tokens, on_path = visit.tokens, (self._paths, self._by_column, self._by_row, self._left)
        arrays = map(array, (key.detach(), value.detach()))
        where = tokens.start, tokens.stop - tokens.start, visit.position
        self._split.enter(*arrays, *where, *map(array, on_path), backwards)

    def _queries(self, visit: _Visit, query: Tensor, style: Style, looked: Looked) -> tuple[Any, ...]:
        queries, position = visit.queries, visit.position + visit.queries.start - visit.tokens.start
        where = queries.start, len(queries), position, np.float32(style.scale), self._window
        attended, *by_head = looked
        by_head = [t.view(-1, self._heads) for t in by_head]
        first = queries.start - self._rows.start
        tiles = map(array, (self._by_column, self._by_row))
        return array(query.detach()), *where, *tiles, array(attended), first, *map(array, by_head)

    def _leave(self, path: list[_Visit], position: int, d_key: Tensor, d_value: Tensor) -> None:
        while path and path[-1].position >= position:
            visit = path.pop()
            where = visit.position, visit.tokens.stop - visit.tokens.start, visit.tokens.start
            self._split.leave(array(self._d_paths), *where, array(d_key), array(d_value))


def _may_split(given: Given, style: Style) -> bool:
    _, key, value = given
    if style.softcap is not None or style.sinks is not None or key.shape[2] % 32 or key.shape != value.shape:
        return False
    fits = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.stride(2) == 1 for t in given)
    return fits and products.amx_attention() is not None


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


def space(rows: int, heads: int, key_heads: int, size: int, longest: int, *, split: bool) -> int:
    """Numbers of memory that a `Walk` of these queries takes at most, or a `SplitWalk`."""
    if not split:
        return rows * heads * (5 * size + 1) + 4 * key_heads * size * longest + 2 * most_scores(heads, longest)
    blocks, tiles = math.ceil(longest / 32), size // 16
    across = 32 * blocks + 16
    path = 2 * key_heads * size * (32 * blocks + across)
    of_path = 2 * 2 * key_heads * 3 * 256 * tiles * blocks
    of_rows = 3 * 256 * (ROWS // 16 * tiles // 2 + max(ROWS // 16 * blocks, ROWS // 32 * tiles))
    return rows * heads * size + path + of_path + 2 * ROWS * across + of_rows + ROWS * size


def _order_of(queries: range, rows: range, heads: int) -> Tensor:
    """(H · Q): of a tile's rows, the place among all heads of `rows`."""
    token = torch.arange(queries.start - rows.start, queries.stop - rows.start)
    return (token * heads + torch.arange(heads)[:, None]).flatten()


def _rows(given: Tensor, which: Tensor, out: Tensor, factor: Tensor | None = None) -> Tensor:
    """The rows `which` (n,) of `given`, in `out`, each times its factor."""
    compiled = kernels(given, out)
    if compiled is not None:
        compiled.rows(array(given), array(which), array(out), array(factor))
        return out
    torch.index_select(given, 0, which, out=out)
    return out if factor is None else out.mul_(factor.index_select(0, which)[:, None])


def _softmax_for(style: Style, scores: Tensor) -> Any | None:
    return kernels(scores) if style.softcap is None and style.sinks is None else None


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class _Differentiable(torch.autograd.Function):
    """A walk of all queries where autograd is at work."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sight: Gather, style: Style) -> Tensor:
        given = query, key, value
        looked = sight.walk(range(len(query)), given, style).forward(*given, style)
        ctx.save_for_backward(*given, *looked)
        ctx.sight, ctx.style = sight, style
        return looked.attended

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *given, attended, largest, share = ctx.saved_tensors
        walk = ctx.sight.walk(range(len(given[0])), tuple(given), ctx.style)
        return *walk.backward(*given, ctx.style, Looked(attended, largest, share), grad_out), None, None
