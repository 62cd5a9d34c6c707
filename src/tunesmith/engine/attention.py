"""Attention over prefix trees, from one integer per token: query q sees key k exactly when `k <= q < end[k]`.

Three ways to the same result. `reference`: a dense mask, for tests. `gather`: for each segment its own keys and those
of its ancestors, segments of similar size side by side, plain scaled-dot-product attention; runs anywhere. `flex`:
torch's FlexAttention, compiled once, for CUDA. Sliding windows compare positions in the document, not indices.

transformers asks for attention by name (https://huggingface.co/docs/transformers/attention_interface); after
`register` every model of it that can be packed finds ours under `INTERFACE`.

Legend: T tokens, H query heads, K key heads, D head size; n segments side by side, L tokens of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.engine.memory import Take
from tunesmith.engine.onepass import array, kernels
from tunesmith.engine.trie import Tree

Backend = Literal["reference", "gather", "flex"]
INTERFACE = "tunesmith"
_LONGEST_MASKED = 256  # queries of a masked piece; more waste the half of the scores that nobody sees
LONGEST_WRITTEN = 512  # keys; beyond, scores are not worth their memory
_WASTE = 1.25  # scores computed per score needed, before another group is opened
_WASTE_FLOOR = 64 * 64  # scores that are cheaper to waste than a group


@dataclass(frozen=True)
class Style:
    """What a layer does to its scores besides the scale."""

    scale: float
    window: int | None = None
    """A query sees this many positions up to its own."""
    softcap: float | None = None
    """Scores become `softcap · tanh(score / softcap)`."""
    sinks: Tensor | None = None
    """(H,) scores of a key without a value that every query sees."""


class Sight(Protocol):
    """Who sees whom in a micro-batch, in the form a backend wants."""

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, style: Style) -> Tensor:
        """(T, H, D), differentiable."""
        ...


def sight(tree: Tree, backend: Backend, device: torch.device) -> Sight:
    """The tree's visibility for a backend."""
    return {"reference": Dense, "gather": Gather, "flex": Flex}[backend](tree, device)


def by_hand(
    sight: Sight,
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    style: Style,
    rows: range,
    *,
    keep: bool,
    take: Take | None = None,
    scores: Callable[[int], Tensor] | None = None,
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """(rows, H, D) for consecutive queries, and with `keep` its backward pass as a function, for layers whose backward
    pass is written by hand.

    The function gives the gradients of the queries `rows`, and of all keys and values as far as these queries see
    them. The three must stay as they are until it is called, once. Only `Gather` can leave out queries, or use memory
    that is kept (`take`); then what belongs to queries is good until the next call. `scores` gives memory for so many
    numbers, which the function needs.
    """
    if isinstance(sight, Gather):
        gathered = _Gathered(sight.plan(style.window, rows), style, take, scores)
        return gathered.forward(query_THD, key_TKD, value_TKD, differentiable=keep), gathered.backward
    assert len(rows) == len(query_THD)
    with torch.set_grad_enabled(keep):
        query, key, value = (given.detach().requires_grad_(keep) for given in (query_THD, key_TKD, value_TKD))
        out = sight.attend(query, key, value, style)
    return out.detach(), lambda d_out: torch.autograd.grad(out, (query, key, value), d_out)


# --- reference --------------------------------------------------------------------------------------------------------


class Dense:
    """One mask of all pairs."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self._end = torch.tensor(tree.end, device=device)
        self._position = torch.tensor(tree.position, device=device)

    def visible(self, window: int | None) -> Tensor:
        """(T, T) bool, True where the query (row) sees the key (column)."""
        index = torch.arange(len(self._end), device=self._end.device)
        seen = (index[None] <= index[:, None]) & (index[:, None] < self._end[None])
        if window is not None:
            seen &= self._position[:, None] - self._position[None] < window
        return seen

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, style: Style) -> Tensor:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query_THD, key_TKD, value_TKD))
        return plain(query, key, value, self.visible(style.window)[None, None], style)[0].transpose(0, 1)


def plain(query_nHLD: Tensor, key_nKLD: Tensor, value_nKLD: Tensor, visible: Tensor, style: Style) -> Tensor:
    """Attention written out. `visible` is bool, broadcast over (n, H, queries, keys)."""
    groups = query_nHLD.shape[1] // key_nKLD.shape[1]
    key, value = key_nKLD.repeat_interleave(groups, 1), value_nKLD.repeat_interleave(groups, 1)
    scores = query_nHLD @ key.transpose(2, 3) * style.scale
    if style.softcap is not None:
        scores = style.softcap * torch.tanh(scores / style.softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~visible, -math.inf)
    if style.sinks is not None:
        sinks = style.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1].to(value.dtype) @ value
    return torch.softmax(scores, -1).to(value.dtype) @ value


# --- gather -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Consecutive queries that share their keys up to causality."""

    start: int
    stop: int
    keys: Sequence[int]
    """Indices, in the order of the document; the last ones are the queries themselves."""
    causal: bool
    """Nothing but the causal order hides a key."""


class _Group:
    """Pieces side by side, padded on the right."""

    def __init__(self, query: Tensor, key: Tensor, visible: Tensor | None) -> None:
        self.query, self.key = query, key
        """(n, L) and (n, keys) indices of tokens, -1 where there is none."""
        self.visible = visible
        """(n, 1, L, keys) bool; None: causal."""
        self._biases: dict[torch.dtype, Tensor] = {}
        self._nothings: dict[torch.dtype, Tensor] = {}

    @property
    def area(self) -> tuple[int, int, int]:
        """Pieces, queries and keys of each."""
        return len(self.query), self.query.shape[1], self.key.shape[1]

    def nothing(self, dtype: torch.dtype) -> Tensor:
        """(1, 1, 1), where torch wants something to add to."""
        if dtype not in self._nothings:
            self._nothings[dtype] = torch.zeros(1, 1, 1, dtype=dtype, device=self.query.device)
        return self._nothings[dtype]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """(n or 1, 1, L, keys): 0 where the query sees the key, else -inf."""
        if dtype not in self._biases:
            visible = self.visible
            if visible is None:
                length = self.query.shape[1]
                visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.query.device).tril_()
            self._biases[dtype] = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
                ~visible, -math.inf
            )
        return self._biases[dtype]


class _Plan:
    """The groups of some consecutive queries: where they find what they need, and where what they compute belongs.

    What is collected for all groups lies in one tensor (rows, D), group behind group. All of it depends on the number
    of heads only, so it is worked out for the first layer.
    """

    def __init__(self, groups: Sequence[_Group], rows: range, n_tokens: int) -> None:
        self.groups, self.rows, self._n_tokens = groups, rows, n_tokens
        self._orders: dict[int, Tensor] = {}
        self._bags: dict[int, tuple[Tensor, Tensor]] = {}
        self._sources: dict[tuple[bool, int, int, int], Tensor] = {}
        self._paddings: dict[int, Tensor] = {}
        self._parts: dict[tuple[int, tuple[int, ...], bool], tuple[Tensor, list[Tensor]]] = {}

    def collect(self, tensor_THD: Tensor, take: Take, name: str, *, of_keys: bool, first: int = 0) -> Tensor:
        """(rows, D): what the tensor, which begins with token `first`, has for the queries or the keys; anything where
        there is none."""
        _, heads, size = tensor_THD.shape
        if tensor_THD.stride()[1:] != (size, 1) or tensor_THD.stride(0) % size:
            tensor_THD = tensor_THD.contiguous()
        apart = tensor_THD.stride(0) // size
        which = of_keys, first, heads, apart
        if which not in self._sources:
            tokens = [(token - first).clamp_min(0) for token in self._tokens(of_keys)]
            self._sources[which] = torch.cat([_head_rows(token, heads, apart).flatten() for token in tokens])
        source = self._sources[which]
        by_head = tensor_THD.as_strided(((len(tensor_THD) - 1) * apart + heads, size), (size, 1))
        return _rows(by_head, source, take(name, len(source), size))

    def parts(self, flat: Tensor, heads: int, folds: tuple[int, ...], *, of_keys: bool, kept: bool) -> list[Tensor]:
        """Views of the groups' rows: (n, heads, L or keys, D); with a fold (n · fold, what stands by one key head, D).
        Where `flat` is kept its views are kept as well."""
        which = id(flat), folds, of_keys
        known = self._parts.get(which)
        if known is not None:
            return known[1]
        tokens = self._tokens(of_keys)
        parts = [
            part.view(len(token) * fold, -1, flat.shape[1]) if fold else part.view(len(token), heads, -1, flat.shape[1])
            for token, fold, part in zip(tokens, folds, flat.split([heads * t.numel() for t in tokens]), strict=True)
        ]
        if kept:
            self._parts[which] = flat, parts
        return parts

    def clear_padding(self, flat: Tensor, heads: int) -> None:
        """Zeros where there is no query."""
        if heads not in self._paddings:
            self._paddings[heads] = (self._places(self._tokens(of_keys=False), heads) < 0).nonzero().flatten()
        if len(self._paddings[heads]):
            flat.index_fill_(0, self._paddings[heads], 0)

    def size(self, heads: int, *, of_keys: bool) -> int:
        return heads * sum(token.numel() for token in self._tokens(of_keys))

    def in_order(self, flat: Tensor, heads: int, take: Take, name: str) -> Tensor:
        """(rows, heads, D): of every query what its group has for it."""
        if heads not in self._orders:
            places = self._places([token - self.rows.start for token in self._tokens(of_keys=False)], heads)
            self._orders[heads] = places.argsort()[len(places) - len(self.rows) * heads :]
        order = self._orders[heads]
        found = _rows(flat, order, take(name, len(order), flat.shape[1]))
        return found.view(len(self.rows), heads, -1)

    def summed(self, flat: Tensor, heads: int) -> Tensor:
        """(T, heads, D): of every key the sum of what the groups have for it."""
        if heads not in self._bags:
            places = self._places(self._tokens(of_keys=True), heads)
            order = places.argsort(stable=True)
            every = torch.arange(self._n_tokens * heads, device=flat.device)
            first = torch.searchsorted(places[order], every)
            n_absent = int((places < 0).sum())
            self._bags[heads] = order[n_absent:], first - n_absent
        bags = self._bags[heads]
        return F.embedding_bag(bags[0], flat, bags[1], mode="sum").view(self._n_tokens, heads, -1)

    def _tokens(self, of_keys: bool) -> list[Tensor]:
        return [group.key if of_keys else group.query for group in self.groups]

    @staticmethod
    def _places(tokens: Sequence[Tensor], heads: int) -> Tensor:
        """Of every row of the groups, one behind the other, the row among all tokens' heads; negative for padding."""
        return torch.cat([torch.where(t[:, None] < 0, -1, _head_rows(t, heads, heads)).flatten() for t in tokens])


def _rows(given: Tensor, which: Tensor, out: Tensor) -> Tensor:
    """The rows `which` (n,) of `given`, in `out`."""
    compiled = kernels(given, out)
    if compiled is None:
        return torch.index_select(given, 0, which, out=out)
    compiled.rows(array(given), array(which), array(out))
    return out


def _head_rows(token: Tensor, heads: int, apart: int) -> Tensor:
    """(n, heads, L): where the heads of (n, L) tokens lie if a token begins every `apart` rows."""
    return token[:, None] * apart + torch.arange(heads, device=token.device)[:, None]


class Gather:
    """Keys collected per piece; scores nobody needs are at most about a quarter."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self._tree, self._device = tree, device
        self._plans: dict[tuple[int | None, range], _Plan] = {}

    def plan(self, window: int | None, rows: range) -> _Plan:
        if window is not None and max(self._tree.position) < window:
            window = None
        if (window, rows) not in self._plans:
            found = _pieces(self._tree, window, rows)
            pieces = sorted(found, key=lambda piece: (piece.causal, _area(piece)), reverse=True)
            groups = [self._group(some, window) for some in _side_by_side(pieces)]
            self._plans[window, rows] = _Plan(groups, rows, len(self._tree.token_ids))
        return self._plans[window, rows]

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, style: Style) -> Tensor:
        plan = self.plan(style.window, range(len(query_THD)))
        return cast("Tensor", _Differentiable.apply(query_THD, key_TKD, value_TKD, plan, style))

    def _group(self, pieces: Sequence[_Piece], window: int | None) -> _Group:
        query = torch.full((len(pieces), max(piece.stop - piece.start for piece in pieces)), -1)
        for row, piece in enumerate(pieces):
            query[row, : piece.stop - piece.start] = torch.arange(piece.start, piece.stop)
        if pieces[0].causal:
            query = query.to(self._device)
            return _Group(query, query, None)
        key = torch.full((len(pieces), max(len(piece.keys) for piece in pieces)), -1)
        for row, piece in enumerate(pieces):
            key[row, : len(piece.keys)] = torch.tensor(piece.keys)
        # The keys of a piece lie on one path, so their order in the layout is that of the document.
        visible = (key[:, None] <= query[:, :, None]) & (key[:, None] >= 0)
        if window is not None:
            position = torch.tensor(self._tree.position)
            visible &= position[query][:, :, None] - position[key][:, None] < window
        visible |= (query < 0)[:, :, None]  # a row without any key is not a number
        return _Group(*(tensor.to(self._device) for tensor in (query, key, visible[:, None])))


class _Gathered:
    """Attention group by group. Collecting and putting back is written by hand, head by head, so that nothing is copied
    twice. What was collected is collected again for the backward pass. What lies between is `_Written` for short keys
    and for styles that nothing else knows, else torch's own.

    `take` gives memory that is kept; None: there is none.
    """

    def __init__(
        self, plan: _Plan, style: Style, take: Take | None = None, scores: Callable[[int], Tensor] | None = None
    ) -> None:
        self._plan, self._style, self._take, self._scores = plan, style, take, scores
        always = style.softcap is not None or style.sinks is not None
        self._written = [always or group.key.shape[1] <= LONGEST_WRITTEN for group in plan.groups]
        kinds = [_Written if written else _Fused for written in self._written]
        self._cores = [kind(group, style) for kind, group in zip(kinds, plan.groups, strict=True)]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, differentiable: bool) -> Tensor:
        """(rows, H, D), good until somebody uses the kept memory again. The three must stay as they are until
        `backward`."""
        self._given = query, key, value
        plan, take, heads = self._plan, self._memory(), query.shape[1]
        out = take("attended", plan.size(heads, of_keys=False), value.shape[2])
        parts = zip(*self._collected(), self._parts(out, of_keys=False), strict=True)
        spaces = self._spaces(heads)
        for core, space, (*collected, part) in zip(self._cores, spaces, parts, strict=True):
            core.forward(*collected, out=part, space=space, differentiable=differentiable)
        return plan.in_order(out, heads, take, "attended in order")

    def backward(self, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the rows' queries, good as long as `forward`'s result, and of all keys and values; to be called
        once."""
        plan, (query, key, value), take = self._plan, self._given, self._memory()
        heads, key_heads = query.shape[1], key.shape[1]
        d_collected = plan.collect(d_out, take, "d attended", of_keys=False, first=plan.rows.start)
        plan.clear_padding(d_collected, heads)
        n_queries, n_keys = plan.size(heads, of_keys=False), plan.size(key_heads, of_keys=True)
        d_query = take("d queries", n_queries, query.shape[2])
        d_key, d_value = take("d keys", n_keys, key.shape[2]), take("d values", n_keys, value.shape[2])
        parts = [self._parts(tensor, of_keys=False) for tensor in (d_collected, d_query)]
        parts += [self._parts(tensor, of_keys=True) for tensor in (d_key, d_value)]
        for core, *collected, d_part, to_query, to_key, to_value in zip(
            self._cores, *self._collected(), *parts, strict=True
        ):
            core.backward(d_part, collected, (to_query, to_key, to_value))
        return (
            plan.in_order(d_query, heads, take, "attended in order"),
            plan.summed(d_key, key_heads),
            plan.summed(d_value, key_heads),
        )

    def _spaces(self, heads: int) -> Sequence[Tensor | None]:
        """Memory for each group's scores, where they are written out and there is any."""
        groups = self._plan.groups
        if self._scores is None:
            return [None] * len(groups)
        sizes = [heads * math.prod(g.area) if written else 0 for g, written in zip(groups, self._written, strict=True)]
        return self._scores(sum(sizes)).split(sizes)

    def _collected(self) -> list[list[Tensor]]:
        """Of every group the queries, keys and values."""
        plan, take, (query, key, value) = self._plan, self._memory(), self._given
        return [
            self._parts(plan.collect(query, take, "queries", of_keys=False), of_keys=False),
            self._parts(plan.collect(key, take, "keys", of_keys=True), of_keys=True),
            self._parts(plan.collect(value, take, "values", of_keys=True), of_keys=True),
        ]

    def _parts(self, flat: Tensor, *, of_keys: bool) -> list[Tensor]:
        query, key, _ = self._given
        folds = tuple(key.shape[1] if written else 0 for written in self._written)
        heads = key.shape[1] if of_keys else query.shape[1]
        return self._plan.parts(flat, heads, folds, of_keys=of_keys, kept=self._take is not None)

    def _memory(self) -> Take:
        return self._take or (lambda _, *shape: self._given[0].new_empty(shape))


class _Differentiable(torch.autograd.Function):
    """`_Gathered` where autograd is at work."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: _Plan, style: Style) -> Tensor:
        ctx.gathered = _Gathered(plan, style)
        ctx.save_for_backward(query, key, value)  # only so that autograd sees when somebody changes them meanwhile
        return ctx.gathered.forward(query, key, value, differentiable=any(ctx.needs_input_grad[:3]))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _ = ctx.saved_tensors
        return *ctx.gathered.backward(grad_out), None, None


class _Written:
    """Scores, softmax and sums written out. Query heads with the same key head lie behind each other, so a key is
    collected once; on short keys a third faster than torch's fused attention (2 AVX2 cores, 2026-11)."""

    def __init__(self, group: _Group, style: Style) -> None:
        self._group, self._style = group, style

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, out: Tensor, space: Tensor | None, differentiable: bool
    ) -> None:
        """Fills `out` (n · K, H / K · L, D) from queries of that shape and (n · K, keys, D) keys and values."""
        style = self._style
        room = None if space is None else space.view(len(query), query.shape[1], key.shape[1])
        scores = torch.baddbmm(self._group.nothing(query.dtype), query, key.mT, beta=0, alpha=style.scale, out=room)
        scores = _as(torch.promote_types(scores.dtype, torch.float32), scores)
        self._slope = None
        if style.softcap is not None:
            capped = scores.div_(style.softcap).tanh_()
            self._slope = 1 - capped.square()
            scores = capped * style.softcap
        bias = self._group.bias(scores.dtype)
        n, length = self._group.query.shape
        by_head = (n, -1, length, scores.shape[2])
        compiled = kernels(scores, bias) if style.sinks is None else None
        if compiled is not None:
            compiled.softmax(array(scores.view(by_head)), array(bias))
            probabilities = scores
        elif style.sinks is None:
            scores.view(by_head).add_(bias)
            probabilities = torch.softmax(scores, -1, out=scores)
        else:
            scores.view(by_head).add_(bias)
            sinks = style.sinks.to(scores.dtype)[None, :, None, None].expand(n, -1, length, 1)
            joined = torch.cat([scores.view(by_head), sinks], -1)
            probabilities = torch.softmax(joined, -1)[..., :-1].reshape(scores.shape)
        torch.bmm(_as(value.dtype, probabilities), value, out=out)
        if differentiable:
            self._probabilities = probabilities

    def backward(self, d_out: Tensor, collected: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Fills the gradients of the queries, keys and values, which are collected again."""
        probabilities = self._probabilities
        del self._probabilities
        (query, key, value), (d_query, d_key, d_value) = collected, out
        torch.bmm(_as(d_out.dtype, probabilities).mT, d_out, out=d_value)
        d_probabilities = _as(probabilities.dtype, torch.bmm(d_out, value.mT))
        compiled = kernels(d_probabilities, probabilities)
        if compiled is not None:
            d_scores = d_probabilities
            compiled.softmax_backward(array(d_scores.flatten(0, 1)), array(probabilities.flatten(0, 1)))
        else:
            d_scores = torch.ops.aten._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
        if self._slope is not None:
            d_scores.mul_(self._slope)
        d_scores, nothing = _as(query.dtype, d_scores), self._group.nothing(query.dtype)
        scale = self._style.scale
        torch.baddbmm(nothing, d_scores, key, beta=0, alpha=scale, out=d_query)
        torch.baddbmm(nothing, d_scores.mT, query, beta=0, alpha=scale, out=d_key)


class _Fused:
    """torch's scaled-dot-product attention under a small graph of its own; its memory grows with the length only."""

    def __init__(self, group: _Group, style: Style) -> None:
        self._group, self._style = group, style

    def forward(self, *collected: Tensor, out: Tensor, space: Tensor | None, differentiable: bool) -> None:
        """Fills `out` (n, H, L, D) from queries of that shape and (n, K, keys, D) keys and values."""
        with torch.set_grad_enabled(differentiable):
            self._leaves = [tensor.clone().requires_grad_(differentiable) for tensor in collected]
            causal = self._group.visible is None
            bias = None if causal else self._group.bias(collected[0].dtype)
            self._out = F.scaled_dot_product_attention(
                *self._leaves, attn_mask=bias, is_causal=causal, scale=self._style.scale, enable_gqa=True
            )
        out.copy_(self._out.detach())

    def backward(self, d_out: Tensor, _: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Fills the gradients of the queries, keys and values, of which the forward pass kept copies."""
        for place, gradient in zip(out, torch.autograd.grad(self._out, self._leaves, d_out), strict=True):
            place.copy_(gradient)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _pieces(tree: Tree, window: int | None, rows: range) -> Iterator[_Piece]:
    """Of the queries `rows`."""
    paths: list[list[int]] = []  # per segment, the indices up to its end
    for segment in tree.segments:
        above = [] if segment.parent is None else paths[segment.parent]
        path = [*above, *range(segment.start, segment.stop)]
        paths.append(path)
        first_query, behind = max(segment.start, rows.start), min(segment.stop, rows.stop)
        if not above and window is None and first_query == segment.start and behind > first_query:
            yield _Piece(first_query, behind, path[: behind - first_query], causal=True)
            continue
        for start in range(first_query, behind, _LONGEST_MASKED):
            stop = min(start + _LONGEST_MASKED, behind)
            last = len(above) + stop - segment.start
            first = 0 if window is None else max(0, last - (stop - start) - window + 1)
            yield _Piece(start, stop, path[first:last], causal=False)


def _area(piece: _Piece) -> tuple[int, int]:
    return piece.stop - piece.start, len(piece.keys)


def _side_by_side(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Sorted pieces in groups in which not much is padding."""
    some: list[_Piece] = []
    needed = longest = 0
    for piece in pieces:
        queries, keys = _area(piece)
        padded = (len(some) + 1) * _area(some[0])[0] * max(longest, keys) if some else 0
        waste = padded - needed - queries * keys
        if some and (
            piece.causal != some[0].causal or (padded > _WASTE * (needed + queries * keys) and waste > _WASTE_FLOOR)
        ):
            yield some
            some, needed, longest = [], 0, 0
        some.append(piece)
        needed += queries * keys
        longest = max(longest, keys)
    yield some


# --- flex -------------------------------------------------------------------------------------------------------------


class Flex:
    """FlexAttention with a block mask; one compilation serves all lengths."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self._end = torch.tensor(tree.end, device=device)
        self._position = torch.tensor(tree.position, device=device)
        self._masks: dict[int | None, Any] = {}

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, style: Style) -> Tensor:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query_THD, key_TKD, value_TKD))
        softcap = style.softcap or 0.0

        def capped(score: Tensor, *_: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

        from torch.nn.attention.flex_attention import AuxRequest

        out, aux = _compiled_flex()(
            query, key, value,
            score_mod=capped if softcap else None,
            block_mask=self._mask(style.window),
            scale=style.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        if style.sinks is not None:  # softmax over one more score s scales everything by sigmoid(lse - s)
            out = out * torch.sigmoid(aux.lse - style.sinks[None, :, None])[..., None].to(out.dtype)
        return out[0].transpose(0, 1)

    def _mask(self, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        end, position, n = self._end, self._position, len(self._end)
        near = window or n
        if window not in self._masks:

            def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return (k <= q) & (q < end[k]) & (position[q] - position[k] < near)

            self._masks[window] = create_block_mask(visible, None, None, n, n, device=str(end.device))
        return self._masks[window]


_flex: Callable[..., Any] | None = None


def _compiled_flex() -> Callable[..., Any]:
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        # On a CPU there is no backward for the compiled form; written out it is slow but the same.
        _flex = torch.compile(flex_attention, dynamic=True) if torch.cuda.is_available() else flex_attention
    return _flex


# --- transformers -----------------------------------------------------------------------------------------------------

_current: Sight | None = None  # not a context variable: CUDA's backward pass, which may recompute, has its own thread


@contextmanager
def looking_through(sight: Sight, model: nn.Module) -> Iterator[None]:
    """Inside, the model sees along this tree, in forward and backward passes alike; outside, as it always did."""
    global _current
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [
        (config, config._attn_implementation) for config in configs.values() if hasattr(config, "_attn_implementation")
    ]
    for config, _ in before:
        config._attn_implementation = INTERFACE
    _current = sight
    try:
        yield
    finally:
        _current = None
        for config, implementation in before:
            config._attn_implementation = implementation


def register() -> None:
    """Makes `INTERFACE` known to transformers, which then makes no mask of its own for it."""
    AttentionInterface.register(INTERFACE, _attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert _current is not None, "only inside looking_through"
    style = Style(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    out = _current.attend(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), style)
    return out[None], None
