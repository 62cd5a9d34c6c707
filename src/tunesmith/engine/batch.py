"""The rows of a step become padded micro-batches.

Legend: B rows, T tokens of the longest row, N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.types import Rendered


@dataclass(frozen=True)
class Batch:
    """A micro-batch as the model takes it."""

    input_ids: Tensor
    """(B, T) int64, padded on the right."""
    attention_mask: Tensor
    """(B, T) int64, 1 where a token stands."""
    predict_from: Tensor
    """(B, T) bool, N times True: the positions whose next token is learned."""
    targets: Tensor
    """(N,) int64, the learned tokens in the order of `predict_from`."""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def pad(documents: Sequence[Rendered]) -> Batch:
    """The documents side by side. Behind the last learned token nothing changes the loss, so it is left out.

    What stands in the padding has no effect (it is masked), so its id is 0 and no pad token is needed.
    """
    lengths = [_useful(document) for document in documents]
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
    return Batch(input_ids, attention_mask, predict_from, torch.tensor(targets))


def cut(documents: Sequence[Rendered], max_tokens: int) -> list[list[Rendered]]:
    """The documents in groups of at most `max_tokens` tokens with padding, longest with longest.

    A document longer than that goes alone.
    """
    groups: list[list[Rendered]] = []
    for document in sorted(documents, key=_useful, reverse=True):
        if groups and _useful(groups[-1][0]) * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(document)
        else:
            groups.append([document])
    return groups


def _useful(document: Rendered) -> int:
    return document.replies[-1][1]
