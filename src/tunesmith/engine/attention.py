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
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.engine.trie import Tree

Backend = Literal["reference", "gather", "flex"]
INTERFACE = "tunesmith"
_LONGEST_MASKED = 256  # queries of a masked piece; more waste the half of the scores that nobody sees
_LONGEST_WRITTEN = 320  # keys; beyond, scores are not worth their memory
_WASTE = 1.25  # scores computed per score needed, before another group is opened
_WASTE_FLOOR = 128 * 128  # scores that are cheaper to waste than a group


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
    sight: Sight, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, style: Style, *, keep: bool
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """(T, H, D), and with `keep` its backward pass as a function, for layers whose backward pass is written by hand.

    The function gives the gradients of the three, which must stay as they are until it is called, once.
    """
    if isinstance(sight, Gather):
        gathered = _Gathered(sight.groups(style.window), style)
        return gathered.forward(query_THD, key_TKD, value_TKD, differentiable=keep), gathered.backward
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
        return _plain(query, key, value, self.visible(style.window)[None, None], style)[0].transpose(0, 1)


def _plain(query_nHLD: Tensor, key_nKLD: Tensor, value_nKLD: Tensor, visible: Tensor, style: Style) -> Tensor:
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


@dataclass(frozen=True)
class _Group:
    """Pieces side by side, padded on the right."""

    query: Tensor
    """(n · L,) index of the query; `n_tokens` where there is none."""
    query_or_first: Tensor
    """The same with 0 instead of `n_tokens`."""
    key: Tensor | None
    """(n · keys,) index of the key, 0 where there is none; None: the keys are the queries."""
    n: int
    padded: Tensor | None
    """(n · L, 1, 1) bool, True where there is no query; None: there is one everywhere."""
    visible: Tensor | None
    """(n, 1, L, keys) bool; None: causal."""
    biases: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def collect(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """(n, H, L, D), and twice (n, K, keys, D)."""
        keys = self.query_or_first if self.key is None else self.key
        return [
            tensor.index_select(0, index).unflatten(0, (self.n, -1)).transpose(1, 2)
            for tensor, index in ((query, self.query_or_first), (key, keys), (value, keys))
        ]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """(n or 1, 1, L, keys): 0 where the query sees the key, else -inf."""
        if dtype not in self.biases:
            visible = self.visible
            if visible is None:
                length = len(self.query) // self.n
                visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.query.device).tril_()
            self.biases[dtype] = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
                ~visible, -math.inf
            )
        return self.biases[dtype]


class Gather:
    """Keys collected per piece; scores nobody needs are at most about a quarter."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self._tree, self._device = tree, device
        self._groups: dict[int | None, list[_Group]] = {}

    def groups(self, window: int | None) -> list[_Group]:
        if window is not None and max(self._tree.position) < window:
            window = None
        if window not in self._groups:
            pieces = sorted(_pieces(self._tree, window), key=lambda piece: (piece.causal, _area(piece)), reverse=True)
            self._groups[window] = [self._group(some, window) for some in _side_by_side(pieces)]
        return self._groups[window]

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, style: Style) -> Tensor:
        return _Differentiable.apply(query_THD, key_TKD, value_TKD, self.groups(style.window), style)  # type: ignore[return-value]

    def _group(self, pieces: Sequence[_Piece], window: int | None) -> _Group:
        n_tokens, position = len(self._tree.token_ids), torch.tensor(self._tree.position)
        length = max(piece.stop - piece.start for piece in pieces)
        query = torch.full((len(pieces), length), n_tokens)
        for row, piece in enumerate(pieces):
            query[row, : piece.stop - piece.start] = torch.arange(piece.start, piece.stop)
        absent = query == n_tokens
        key = visible = None
        if not pieces[0].causal:
            n_keys = torch.tensor([len(piece.keys) for piece in pieces])
            key = torch.zeros(len(pieces), int(n_keys.max()), dtype=torch.int64)
            for row, piece in enumerate(pieces):
                key[row, : len(piece.keys)] = torch.tensor(piece.keys)
            # The keys of a piece lie on one path, so their order in the layout is that of the document.
            visible = (key[:, None] <= query[:, :, None]) & (torch.arange(key.shape[1]) < n_keys[:, None])[:, None]
            if window is not None:
                distance = position[query.masked_fill(absent, 0)][:, :, None] - position[key][:, None]
                visible &= distance < window
            visible |= absent[:, :, None]  # a row without any key is not a number
            visible = visible[:, None].to(self._device)
            key = key.flatten().to(self._device)
        return _Group(
            query.flatten().to(self._device),
            query.masked_fill(absent, 0).flatten().to(self._device),
            key,
            len(pieces),
            absent.view(-1, 1, 1).to(self._device) if bool(absent.any()) else None,
            visible,
        )


class _Gathered:
    """Attention group by group. Collecting and putting back is written by hand: the gradient of indexing adds row by
    row, and most rows occur once. What was collected is collected again for the backward pass. What lies between is
    `_Written` for short keys and for styles that nothing else knows, else torch's own."""

    def __init__(self, groups: list[_Group], style: Style) -> None:
        self._groups, self._style = groups, style
        self._cores: list[_Written | _Fused] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, differentiable: bool) -> Tensor:
        """(T, H, D). The three must stay as they are until `backward`."""
        self._given = query, key, value
        out = query.new_empty(len(query) + 1, query.shape[1], value.shape[2])  # the last row is for padding
        for group in self._groups:
            collected = group.collect(query, key, value)
            style = self._style
            written = style.softcap is not None or style.sinks is not None or collected[1].shape[2] <= _LONGEST_WRITTEN
            core = _Written(group, style) if written else _Fused(group, style)
            out.index_copy_(0, group.query, core.forward(*collected, differentiable=differentiable))
            self._cores.append(core)
        return out[:-1]

    def backward(self, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; to be called once."""
        query, key, value = self._given
        d_query = d_out.new_empty(len(query) + 1, *query.shape[1:])
        d_key, d_value = d_out.new_zeros(key.shape), d_out.new_zeros(value.shape)
        for group, core in zip(self._groups, self._cores, strict=True):
            d_result = d_out.index_select(0, group.query_or_first)
            if group.padded is not None:
                d_result.masked_fill_(group.padded, 0)
            d_result = d_result.unflatten(0, (group.n, -1)).transpose(1, 2)
            q, k, v = core.backward(d_result, lambda group=group: group.collect(query, key, value))
            keys = group.query_or_first if group.key is None else group.key
            d_query.index_copy_(0, group.query, q)
            d_key.index_add_(0, keys, k)
            d_value.index_add_(0, keys, v)
        return d_query[:-1], d_key, d_value


class _Differentiable(torch.autograd.Function):
    """`_Gathered` where autograd is at work."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: list[_Group], style: Style) -> Tensor:
        ctx.gathered = _Gathered(groups, style)
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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, differentiable: bool) -> Tensor:
        """(n · L, H, D) of (n, H, L, D) queries and (n, K, keys, D) keys and values."""
        n, heads, length, _ = query.shape
        key_heads, style = key.shape[1], self._style
        self._shape = n, key_heads, heads // key_heads, length
        folded = query.reshape(n * key_heads, -1, query.shape[3])
        key, value = key.reshape(n * key_heads, -1, key.shape[3]), value.reshape(n * key_heads, -1, value.shape[3])
        scores = torch.baddbmm(folded.new_empty(1, 1, 1), folded, key.mT, beta=0, alpha=style.scale)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        self._slope = None
        if style.softcap is not None:
            capped = scores.div_(style.softcap).tanh_()
            self._slope = 1 - capped.square()
            scores = capped * style.softcap
        scores.view(*self._shape, -1).add_(self._group.bias(scores.dtype)[:, :, None])
        if style.sinks is None:
            probabilities = torch.softmax(scores, -1, out=scores)
        else:
            sinks = style.sinks.to(scores.dtype).view(1, key_heads, -1, 1, 1).expand(*self._shape, 1)
            joined = torch.cat([scores, sinks.reshape(*scores.shape[:2], 1)], -1)
            probabilities = torch.softmax(joined, -1)[..., :-1].contiguous()
        out = torch.bmm(probabilities.to(value.dtype), value)
        if differentiable:
            self._probabilities = probabilities
        return self._unfold(out)

    def backward(self, d_out: Tensor, again: Callable[[], list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the collected queries, keys and values, (n · L, heads, D) each; `again` collects them."""
        probabilities = self._probabilities
        del self._probabilities
        n, key_heads = self._shape[:2]
        query, key, value = (tensor.reshape(n * key_heads, -1, tensor.shape[3]) for tensor in again())
        d_out = d_out.reshape(n * key_heads, -1, d_out.shape[3])
        d_value = torch.bmm(probabilities.to(d_out.dtype).mT, d_out)
        d_probabilities = torch.bmm(d_out, value.mT).to(probabilities.dtype)
        d_scores = torch.ops.aten._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
        if self._slope is not None:
            d_scores.mul_(self._slope)
        d_scores = d_scores.mul_(self._style.scale).to(query.dtype)
        d_query, d_key = torch.bmm(d_scores, key), torch.bmm(d_scores.mT, query)
        d_key, d_value = (
            gradient.view(n, key_heads, -1, gradient.shape[2]).transpose(1, 2).flatten(0, 1)
            for gradient in (d_key, d_value)
        )
        return self._unfold(d_query), d_key, d_value

    def _unfold(self, folded: Tensor) -> Tensor:
        n, key_heads, repeats, length = self._shape
        return (
            folded.view(n, key_heads, repeats, length, -1)
            .permute(0, 3, 1, 2, 4)
            .reshape(n * length, key_heads * repeats, -1)
        )


class _Fused:
    """torch's scaled-dot-product attention under a small graph of its own; its memory grows with the length only."""

    def __init__(self, group: _Group, style: Style) -> None:
        self._group, self._style = group, style

    def forward(self, *collected: Tensor, differentiable: bool) -> Tensor:
        """(n · L, H, D) of (n, H, L, D) queries and (n, K, keys, D) keys and values."""
        with torch.set_grad_enabled(differentiable):
            self._leaves = [tensor.requires_grad_(differentiable) for tensor in collected]
            causal = self._group.visible is None
            bias = None if causal else self._group.bias(collected[0].dtype)
            self._out = F.scaled_dot_product_attention(
                *self._leaves, attn_mask=bias, is_causal=causal, scale=self._style.scale, enable_gqa=True
            )
        return self._out.detach().transpose(1, 2).flatten(0, 1)

    def backward(self, d_out: Tensor, again: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Gradients of the collected queries, keys and values, (n · L, heads, D) each; they are still there."""
        gradients = torch.autograd.grad(self._out, self._leaves, d_out)
        return [gradient.transpose(1, 2).flatten(0, 1) for gradient in gradients]


def _pieces(tree: Tree, window: int | None) -> Iterator[_Piece]:
    paths: list[list[int]] = []  # per segment, the indices up to its end
    for segment in tree.segments:
        above = [] if segment.parent is None else paths[segment.parent]
        path = [*above, *range(segment.start, segment.stop)]
        paths.append(path)
        if not above and window is None:
            yield _Piece(segment.start, segment.stop, path, causal=True)
            continue
        for start in range(segment.start, segment.stop, _LONGEST_MASKED):
            stop = min(start + _LONGEST_MASKED, segment.stop)
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
