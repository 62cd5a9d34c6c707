"""Attention of several replies in one step: each has keys and values of its own and sees no other.

Legend: T tokens of a step, H query heads, K key heads, L keys, D head size; n tokens of one reply.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.engine.attention import plain
from tunesmith.engine.sight import Style
from tunesmith.serving.reply import Reply

INTERFACE = "tunesmith-replies"
_ROOM = 64  # tokens by which keys and values grow
_local = threading.local()  # `.slices`: the replies of the step with their rows


@contextmanager
def attending(configs: Sequence[Any], slices: Sequence[tuple[Reply, slice]]) -> Iterator[None]:
    """While it holds, models with these configs attend so; `slices` are the replies of the step with their rows."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = INTERFACE
    _local.slices = slices
    try:
        yield
    finally:
        _local.slices = None
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def attend(
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
    """(T, 1, H, D) from queries (T, H, 1, D), keys and values (T, K, 1, D)."""
    style = Style(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    out = query.new_empty(len(query), 1, query.shape[1], value.shape[-1])
    for reply, rows in _local.slices:
        keys, values = _with_kept(module, reply, key[rows], value[rows])
        out[rows, 0] = _seen(query[rows], keys, values, style, reply.n_read)
    return out, None


def _with_kept(module: nn.Module, reply: Reply, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(1, K, L, D) keys and values of all the reply has read, with these (n, K, 1, D) behind."""
    n_before, n_all = reply.n_read, reply.n_read + len(key)
    kept = reply.kept.get(module)
    if kept is None or kept[0].shape[2] < n_all:
        room = min(max(n_all, len(reply.prompt_ids)) + _ROOM, reply.longest)
        larger = tuple(new.new_empty(1, new.shape[1], room, new.shape[3]) for new in (key, value))
        for new, old in zip(larger, kept or (), strict=False):
            new[:, :, :n_before] = old[:, :, :n_before]
        kept = reply.kept[module] = (larger[0], larger[1])
    for place, new in zip(kept, (key, value), strict=True):
        place[0, :, n_before:n_all] = new[:, :, 0].transpose(0, 1)
    return kept[0][:, :, :n_all], kept[1][:, :, :n_all]


def _seen(query: Tensor, keys: Tensor, values: Tensor, style: Style, n_before: int) -> Tensor:
    """(n, H, D) for queries (n, H, 1, D) that stand behind `n_before` others."""
    n, heads, _, size = query.shape
    first = 0 if style.window is None else max(0, n_before - style.window + 1)
    keys, values = keys[:, :, first:], values[:, :, first:]
    simple = style.softcap is None and style.sinks is None
    if n == 1 and simple:  # heads with the same keys are rows of one query
        out = F.scaled_dot_product_attention(query.view(1, keys.shape[1], -1, size), keys, values, scale=style.scale)
        return out.view(1, heads, -1)
    place = torch.arange(first, n_before + n, device=query.device)
    own = place[n_before - first :, None]
    visible = place <= own
    if style.window is not None:
        visible &= own - place < style.window
    query = query[:, :, 0].transpose(0, 1)[None]
    if simple:
        grouped = heads != keys.shape[1]
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=style.scale, enable_gqa=grouped
        )
    else:
        out = plain(query, keys, values, visible, style)
    return out[0].transpose(0, 1)
