"""Attention over prefix trees by torch's FlexAttention, compiled once for all lengths, for a card.

It looks at a mask by blocks of 128 queries and as many keys: those of which no query sees a key are passed over, in
those of which all see all nothing is asked, in the others a function is. Which block is which follows from the tree's
ends, without a look at each pair, which would take as much memory as a dense mask.

A kernel's tiles lie in the shared memory of a processor of the card, 64 to 227 KiB by the kind of card. torch chooses
their size without asking how much there is, so `tiles` chooses it where that would be too much.

Legend: T tokens, H query heads, K key heads, D head size; B blocks of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.engine.batch import sent
from tunesmith.engine.cpu.gather import Gather
from tunesmith.engine.sight import Style
from tunesmith.engine.trie import Tree

BLOCK = 128
"""Tokens of a block of the mask."""
_ROOMY = 160 << 10
"""Bytes of shared memory from which torch's own tiles of 16 bits fit: A100, H100 and larger."""


class Flex:
    """Who sees whom in a micro-batch, as a mask in blocks; one compilation serves all lengths."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self._tree, self._device = tree, device
        of_each = [torch.tensor(numbers, dtype=torch.int32) for numbers in (tree.end, tree.position)]
        self._end, self._position = sent(of_each, device)
        self._shared_bytes = shared_memory(device)
        self._masks: dict[int | None, Any] = {}
        self._softcaps: dict[float, Tensor] = {}

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, style: Style) -> Tensor:
        """(T, H, D), differentiable."""
        from torch.nn.attention.flex_attention import AuxRequest

        options = None
        if self._shared_bytes is not None:
            options = tiles(query_THD.shape[-1], query_THD.dtype, self._shared_bytes)
            if options is None:
                return Gather(self._tree, self._device).attend(query_THD, key_TKD, value_TKD, style)
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query_THD, key_TKD, value_TKD))
        out, aux = _function()(
            query, key, value,
            score_mod=self._capped(style.softcap),
            block_mask=self._mask(style.window),
            scale=style.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        if style.sinks is not None:  # softmax over one more score s scales everything by sigmoid(lse - s)
            out = out * torch.sigmoid(aux.lse - style.sinks[None, :, None])[..., None].to(out.dtype)
        return out[0].transpose(0, 1)

    def _capped(self, softcap: float | None) -> Callable[..., Tensor] | None:
        if softcap is None:
            return None
        if softcap not in self._softcaps:  # a tensor, for a number would be compiled as one that can change
            self._softcaps[softcap] = torch.tensor(softcap, device=self._device)
        cap = self._softcaps[softcap]

        def capped(score: Tensor, *_: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

        return capped

    def _mask(self, window: int | None) -> Any:
        if window not in self._masks:
            self._masks[window] = self._in_blocks(window)
        return self._masks[window]

    def _in_blocks(self, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        end, position, n = self._end, self._position, len(self._end)
        near = n if window is None else window

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < end[k]) & (position[q] - position[k] < near)

        asked, whole = blocks(self._tree, window)
        lists = sent([*_lists(asked), *_lists(whole)], self._device)
        return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(n, n))


def blocks(tree: Tree, window: int | None) -> tuple[Tensor, Tensor]:
    """Two (B, B) bool, queries by keys: blocks in which some query may see some key, and of these, taken out of the
    first, those in which every query sees every key.

    With a window the first has blocks, too, whose positions alone leave it open that one is seen.
    """
    end, position = (_by_blocks(torch.tensor(of_each)) for of_each in (tree.end, tree.position))
    first = torch.arange(len(end)) * BLOCK
    earlier = first[:, None] > first[None]
    some = earlier & (end.amax(1)[None] > first[:, None]) | torch.eye(len(end), dtype=torch.bool)
    whole = earlier & (end.amin(1)[None] >= first[:, None] + BLOCK)  # never of a last block that is not full
    if window is not None:
        some &= position.amin(1)[:, None] - position.amax(1)[None] < window
        whole &= position.amax(1)[:, None] - position.amin(1)[None] < window
    return some & ~whole, whole


def _by_blocks(of_each: Tensor) -> Tensor:
    """(B, BLOCK); the last block's rest is its last token once more."""
    n_blocks = -(-len(of_each) // BLOCK)
    return torch.cat([of_each, of_each[-1:].expand(n_blocks * BLOCK - len(of_each))]).view(n_blocks, BLOCK)


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, B) how many blocks of keys each block of queries has, and (1, 1, B, B) their numbers, these first."""
    counts = mask.sum(1, dtype=torch.int32)
    numbers = torch.argsort(mask.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], numbers[None, None]


def shared_memory(device: torch.device) -> int | None:
    """Bytes that a kernel can have on a processor of this card; None on a CPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else None


def tiles(head_size: int, dtype: torch.dtype, shared_bytes: int) -> dict[str, Any] | None:
    """FlexAttention's `kernel_options` for a card whose kernels have so much shared memory: tiles that fit, and never
    the kernels for decoding, which a tree of less than 128 tokens would get and which know few ratios of heads.

    None where not even the smallest fit: heads of 256 in fp32 on a T4.
    """
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if dtype.itemsize == 2 and (head_size <= 128 or shared_bytes >= _ROOMY):
        return options
    for side in (32, 16):
        # The backward pass has queries, keys, values and the gradient of the result there, and a square of scores.
        if (4 * 2 ** math.ceil(math.log2(head_size)) + side) * side * dtype.itemsize <= shared_bytes:
            break
    else:
        return None
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
    options |= {**dict.fromkeys(names, side), "num_stages": 1, "num_warps": 4}
    if dtype.itemsize == 2 and side == 32:  # its forward pass keeps less there
        options |= {"fwd_BLOCK_M": 64, "fwd_num_stages": 2}
    return options


_GRAPHS = 64
"""Of kinds of calls: types, heads, windows, soft caps, with and without a gradient. Beyond torch's own limit of eight
it would fall back, with no more than a line in a log, to a form that is not fused and keeps all scores."""
_flex: Callable[..., Any] | None = None


def compiled(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """FlexAttention, compiled for whatever comes."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    return torch.compile(flex_attention, dynamic=True, backend=backend)


def _function() -> Callable[..., Any]:
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        # On a CPU there is no backward for the compiled form; written out it is slow but the same.
        _flex = compiled() if torch.cuda.is_available() else flex_attention
    return _flex
