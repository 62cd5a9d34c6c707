"""Rows of a micro-batch as a tree of tensors on a device, with who sees whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.engine import attention, batch, trie
from tunesmith.engine.sight import Sight
from tunesmith.types import Rendered


@dataclass(frozen=True)
class Trees:
    """How trees are laid out for a model. See `Layout`."""

    device: torch.device
    backend: attention.Backend
    share_prefix: bool
    longest_together: int
    """See `packing.longest_together`."""

    def of(self, documents: Sequence[Rendered]) -> tuple[batch.Batch, Sight]:
        """The tensors of a tree, and its visibility."""
        whole = len(documents[0].token_ids) > self.longest_together
        tree = trie.lay_out(documents, share_prefix=self.share_prefix, whole=whole)
        return batch.of_tree(tree).to(self.device), attention.sight(tree, self.backend, self.device)

    def cut(self, documents: Sequence[Rendered], max_tokens: int) -> list[list[Rendered]]:
        """Groups of documents whose trees have at most so many tokens."""
        return trie.cut(documents, max_tokens, share_prefix=self.share_prefix)

    def n_tokens(self, documents: Sequence[Rendered]) -> int:
        """The tokens of their tree."""
        return trie.own_tokens(documents, share_prefix=self.share_prefix)
