"""The rows of a step become tensors: a tree, or, for models that can not be packed, rows padded side by side.

Legend: T tokens, B rows, U predicting positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.engine.loss import Labels
from tunesmith.engine.trie import Tree, input_length
from tunesmith.types import Rendered


@dataclass(frozen=True)
class Batch:
    """A tree as the model takes it."""

    input_ids: Tensor
    """(T,) int64"""
    position_ids: Tensor
    """(T,) int64"""
    predict_from: Tensor
    """(U,) int64, ascending: the tokens that predict something learned."""
    labels: Labels

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        labels = self.labels
        ids, positions, predict_from, row, target = sent(
            [self.input_ids, self.position_ids, self.predict_from, labels.row, labels.target], device
        )
        count, row_count = sent([labels.count, labels.row_count], device)
        return Batch(ids, positions, predict_from, Labels(row, target, count, row_count, labels.begins))


def sent(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Tensors of one type on a device, by one copy: a card is told of each by itself."""
    if all(tensor.device == device for tensor in tensors):
        return tensors
    parts = torch.cat([tensor.flatten() for tensor in tensors]).to(device).split([t.numel() for t in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def of_tree(tree: Tree) -> Batch:
    """The tensors of a tree, on the CPU."""
    where, target, count = (torch.tensor(column) for column in zip(*tree.pairs, strict=True))
    predict_from, row = torch.unique_consecutive(where, return_inverse=True)
    labels = Labels.of(row, target, count.float(), len(predict_from))
    return Batch(torch.tensor(tree.token_ids), torch.tensor(tree.position), predict_from, labels)


@dataclass(frozen=True)
class Padded:
    """Rows side by side, padded on the right."""

    input_ids: Tensor
    """(B, T) int64; what stands in the padding is masked, so its id is 0 and no pad token is needed."""
    attention_mask: Tensor
    """(B, T) int64, 1 where a token stands."""
    predict_from: Tensor
    """(B, T) bool, U times True."""
    labels: Labels


def pad(documents: Sequence[Rendered], device: torch.device, *, whole: bool = False) -> Padded:
    """The documents side by side. What stands from the last learned token on changes nothing and is left out, unless
    `whole` is asked for: a rotary embedding may count it."""
    lengths = [len(document.token_ids) if whole else input_length(document) for document in documents]
    size = (len(documents), max(lengths))
    input_ids, attention_mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    predict_from = torch.zeros(size, dtype=torch.bool)
    targets: list[int] = []
    for row, (document, length) in enumerate(zip(documents, lengths, strict=True)):
        input_ids[row, :length] = torch.tensor(document.token_ids[:length])
        attention_mask[row, :length] = 1
        for start, stop in document.replies:
            predict_from[row, start - 1 : stop - 1] = True
            targets += document.token_ids[start:stop]
    n = len(targets)
    labels = Labels.of(torch.arange(n), torch.tensor(targets), torch.ones(n), n).to(device)
    return Padded(input_ids.to(device), attention_mask.to(device), predict_from.to(device), labels)
