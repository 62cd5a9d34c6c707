"""Rows side by side with padding, through transformers' own layers and peft's adapters: the truth, for every model."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from torch import Tensor

from tunesmith.engine import batch, trie
from tunesmith.engine.hf.losses import summed_loss
from tunesmith.engine.packing import DynamicRotaries, longest_together
from tunesmith.engine.way import Kind
from tunesmith.types import Rendered


class SideBySide:
    """See `Layout`; padding counts."""

    def cut(self, documents: Sequence[Rendered], max_tokens: int) -> list[list[Rendered]]:
        """Longest with longest."""
        groups: list[list[Rendered]] = []
        for document in sorted(documents, key=trie.input_length, reverse=True):
            if groups and trie.input_length(groups[-1][0]) * (len(groups[-1]) + 1) <= max_tokens:
                groups[-1].append(document)
            else:
                groups.append([document])
        return groups

    def n_tokens(self, documents: Sequence[Rendered]) -> int:
        return sum(map(trie.input_length, documents))


class Padded:
    """See `Way`."""

    kind: Kind = "padded"
    name = "padded"

    def __init__(self, model: PeftModel) -> None:
        self._model, self._rotaries, self.layout = model, DynamicRotaries(model), SideBySide()
        self._device = next(model.parameters()).device
        self._longest_together = longest_together(model)

    def gradient(
        self, documents: Sequence[Rendered], n_supervised: int, *, weight: int = 1, scale: float = 1
    ) -> Tensor:
        loss = self.loss(documents) * weight / n_supervised
        (loss if scale == 1 else loss * scale).backward()
        return loss.detach()

    def loss(self, documents: Sequence[Rendered]) -> Tensor:
        self._rotaries.forget()
        whole = len(documents[0].token_ids) > self._longest_together
        return summed_loss(self._model, batch.pad(documents, self._device, whole=whole))

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass
