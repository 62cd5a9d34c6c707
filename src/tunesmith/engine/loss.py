"""The loss of a micro-batch, summed, so that a step's sum can be divided once by the step's count.

Only positions that predict a supervised token meet the output layer, in chunks of rows, and the gradient with respect
to them is formed in the same pass: 4·U·H·V operations instead of 6, and one chunk of logits in memory instead of all.

Legend: U predicting positions, N pairs of a position and its target, H width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engine.cpu import products
from tunesmith.engine.cpu.memory import Take
from tunesmith.engine.cpu.products import mm

_CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}  # of fp32 logits
_LEAST_ROWS = 64  # thinner products leave the processor idle
WORDS_AT_ONCE = 2048  # of a vocabulary whose weights are converted, or products with them split


@dataclass(frozen=True)
class Labels:
    """What is learned in a micro-batch. A position may have several targets: a shared prompt has several replies."""

    row: Tensor
    """(N,) int64, which of the U positions predicts the target."""
    target: Tensor
    """(N,) int64 token id."""
    count: Tensor
    """(N,) float32, in how many documents."""
    row_count: Tensor
    """(U,) float32, the counts of a position's targets added up."""
    begins: Sequence[int]
    """The place of each position's first target, and N; numbers, so that no card is asked for them."""

    @classmethod
    def of(cls, row: Tensor, target: Tensor, count: Tensor, n_positions: int) -> Labels:
        """On the CPU, of `row` in ascending order."""
        row_count = torch.zeros(n_positions).index_add_(0, row, count)
        return cls(row, target, count, row_count, torch.searchsorted(row, torch.arange(n_positions + 1)).tolist())

    def to(self, device: torch.device) -> Labels:
        """The same on a device."""
        row, target, count, row_count = (t.to(device) for t in (self.row, self.target, self.count, self.row_count))
        return Labels(row, target, count, row_count, self.begins)

    def part(self, start: int, stop: int) -> Labels:
        """Of the positions from `start` to `stop`."""
        first, last = self.begins[start], self.begins[stop]
        return Labels(
            self.row[first:last] - start,
            self.target[first:last],
            self.count[first:last],
            self.row_count[start:stop],
            [place - first for place in self.begins[start : stop + 1]],
        )


def cross_entropy(logits_UV: Tensor, labels: Labels) -> Tensor:
    """(N,) cross entropy in fp32 (fp64 for such logits) of each target, with a graph."""
    log_probabilities = F.log_softmax(_exact(logits_UV), dim=-1)
    return -log_probabilities[labels.row, labels.target] * labels.count


def summed_cross_entropy(logits_UV: Tensor, labels: Labels) -> Tensor:
    """Cross entropy over all targets; a scalar with a graph."""
    return cross_entropy(logits_UV, labels).sum()


class HeadLoss(torch.autograd.Function):
    """Summed cross entropy of `hidden_UH @ weight_VHᵀ` (soft-capped if asked) with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, hidden_UH: Tensor, weight_VH: Tensor, labels: Labels, softcap: float | None) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        loss, gradient = loss_and_gradient(hidden_UH, weight_VH, labels, softcap, with_gradient=wanted)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None


def loss_and_gradient(
    hidden_UH: Tensor,
    weight_VH: Tensor,
    labels: Labels,
    softcap: float | None = None,
    *,
    with_gradient: bool = True,
    take: Take | None = None,
    split: bool = False,
    at_once: int = 1,
) -> tuple[Tensor, Tensor]:
    """The summed loss, a scalar in fp32 or fp64, and its gradient with respect to `hidden_UH` (empty if not asked).

    `take` gives memory that is kept, of the type of `hidden_UH`, to who calls this often; `at_once` is how many do so
    at the same time, and share the memory for chunks. With `split` the weights are bf16 numbers, and products with them
    are split; that needs `take`.
    """
    loss = torch.zeros((), dtype=torch.promote_types(hidden_UH.dtype, torch.float32), device=hidden_UH.device)
    gradient = torch.empty_like(hidden_UH) if with_gradient else hidden_UH.new_empty(0)
    rows = max(1, chunk_rows(len(hidden_UH), len(weight_VH), hidden_UH.device, at_once))
    space = None if take is None else take("logits", rows * len(weight_VH))
    for start in range(0, len(hidden_UH), rows):
        hidden = hidden_UH[start : start + rows]
        out = None if space is None else space[: len(hidden) * len(weight_VH)].view(len(hidden), -1)
        of_chunk, d_logits = _chunk(
            _exact(_logits(hidden, weight_VH, out, take if split else None)),
            labels.part(start, start + len(hidden)),
            softcap,
            with_gradient=with_gradient,
        )
        loss += of_chunk
        if d_logits is not None:
            d_logits = d_logits.to(hidden.dtype)  # where that is another type, the chunk in fp32 is gone from here on
            _back(d_logits, weight_VH, gradient[start : start + rows], take if split else None)
        del d_logits  # before the next chunk is made
    if with_gradient:
        gradient.mul_(labels.row_count[:, None].to(gradient.dtype))
    return loss, gradient


def _chunk(
    logits: Tensor, labels: Labels, softcap: float | None, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of some positions, and its gradient with respect to their logits, in whose memory it stands; but
    for `row_count`, with which its rows are still to be multiplied."""
    slope = None
    if softcap is not None:
        slope = logits.div_(softcap).tanh_()
        logits = slope * softcap
    probabilities = torch.log_softmax(logits, dim=-1, out=logits)
    loss = -(probabilities[labels.row, labels.target] * labels.count).sum()
    if not with_gradient:
        return loss, None
    # d loss / d logits = row_count · softmax - counts at the targets; row_count is taken out of the product.
    probabilities.exp_()
    shares = labels.count.to(probabilities.dtype) / labels.row_count[labels.row]
    probabilities.index_put_((labels.row, labels.target), -shares, accumulate=True)
    if slope is not None:
        probabilities.mul_(slope.square_().neg_().add_(1))
    return loss, probabilities


def _logits(hidden: Tensor, weight: Tensor, out: Tensor | None, take: Take | None) -> Tensor:
    """`hidden · weightᵀ`, by split products where there is memory for them; weights of another type than `hidden` are
    converted word by word, not all at once."""
    if take is None and weight.dtype == hidden.dtype:
        return mm(hidden, weight.T, out=out)
    out = hidden.new_empty(len(hidden), len(weight)) if out is None else out
    for words, logits in zip(weight.split(WORDS_AT_ONCE), out.split(WORDS_AT_ONCE, 1), strict=True):
        if take is None:
            mm(hidden, words.to(hidden.dtype).T, out=logits)
        else:
            products.mm_of_split(hidden, words.bfloat16().T, logits, take)
    return out


def _back(d_logits: Tensor, weight: Tensor, out: Tensor, take: Take | None) -> None:
    """`d_logits · weight` in `out`."""
    if take is None and weight.dtype == d_logits.dtype:
        mm(d_logits, weight, out=out)
        return
    out.zero_()
    for words, part in zip(weight.split(WORDS_AT_ONCE), d_logits.split(WORDS_AT_ONCE, 1), strict=True):
        if take is None:
            out.addmm_(part, words.to(out.dtype))
        else:
            products.mm_of_split(part, words.bfloat16(), out, take, add=True)


def chunk_rows(n_rows: int, vocabulary: int, device: torch.device, at_once: int = 1) -> int:
    """How many positions meet the output layer at once; chunks are of about equal size."""
    most = max(_LEAST_ROWS, _CHUNK_BYTES[device.type] // (4 * vocabulary * at_once))
    return math.ceil(n_rows / max(1, math.ceil(n_rows / most)))


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
