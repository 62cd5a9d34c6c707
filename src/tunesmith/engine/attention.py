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
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.engine.cpu.gather import Gather, Given
from tunesmith.engine.cpu.memory import Take
from tunesmith.engine.flex import Flex
from tunesmith.engine.sight import Sight, Style
from tunesmith.engine.trie import Tree

Backend = Literal["reference", "gather", "flex"]
INTERFACE = "tunesmith"


def sight(tree: Tree, backend: Backend, device: torch.device) -> Sight:
    """The tree's visibility for a backend."""
    return {"reference": Dense, "gather": Gather, "flex": Flex}[backend](tree, device)


def by_hand(
    sight: Sight, given: Given, style: Style, rows: range, *, take: Take | None = None, keep: Take | None = None
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """(rows, H, D) for consecutive queries, and its backward pass as a function, for layers whose backward pass is
    written by hand; `given` are all queries (T, H, D), keys and values (T, K, D).

    The function takes the gradient of the result. It gives those of the queries `rows`, and of all keys and values as
    far as these queries see them, and the result again. What is given must be as it was when it is called. Only
    `Gather` can leave out queries, and uses memory that is kept: `take` gives what is good until the next call, the
    queries' gradient too, and `keep` what is good until the function has been called, the result too.
    """
    if isinstance(sight, Gather):
        walk = sight.walk(rows, given, style, take)
        looked = walk.forward(*given, style, keep)
        return looked.attended, lambda d_out: (*walk.backward(*given, style, looked, d_out), looked.attended)
    assert len(rows) == len(given[0])
    with torch.enable_grad():
        query, key, value = leaves = [tensor.detach().requires_grad_() for tensor in given]
        out = sight.attend(query, key, value, style)
    return out.detach(), lambda d_out: (*torch.autograd.grad(out, leaves, d_out), out.detach())


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
