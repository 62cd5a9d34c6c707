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


def of_tree(tree: Tree, device: torch.device) -> Batch:
    """The tensors of a tree on a device."""
    where, target, count = (torch.tensor(column) for column in zip(*tree.pairs, strict=True))
    predict_from, row = torch.unique_consecutive(where, return_inverse=True)
    row_count = torch.zeros(len(predict_from)).index_add_(0, row, count.float())
    labels = Labels(*(tensor.to(device) for tensor in (row, target, count.float(), row_count)))
    ids, positions = torch.tensor(tree.token_ids), torch.tensor(tree.position)
    return Batch(ids.to(device), positions.to(device), predict_from.to(device), labels)


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
    ones = torch.ones(len(targets))
    labels = Labels(torch.arange(len(targets)), torch.tensor(targets), ones, ones)
    labels = Labels(*(tensor.to(device) for tensor in vars(labels).values()))
    return Padded(input_ids.to(device), attention_mask.to(device), predict_from.to(device), labels)
