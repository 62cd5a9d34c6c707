"""Rows along a tree, through the layers that are written by hand."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from torch import Tensor

from tunesmith.engine.cpu.decoder import Decoder
from tunesmith.engine.packing import DynamicRotaries
from tunesmith.engine.trees import Trees
from tunesmith.engine.way import Kind
from tunesmith.types import Rendered


class ByHand:
    """See `Way`. Raises NotCovered for a model that is not written by hand, and leaves it as it was."""

    kind: Kind = "decoder"
    name = "decoder"

    def __init__(self, model: PeftModel, trees: Trees, recomputed: int) -> None:
        self._model, self.layout, self._rotaries = model, trees, DynamicRotaries(model)
        self.decoder = Decoder(model, recomputed=recomputed)

    def gradient(
        self, documents: Sequence[Rendered], n_supervised: int, *, weight: int = 1, scale: float = 1
    ) -> Tensor:
        assert weight == scale == 1  # those are for shards and for fp16, which are on cards
        self._rotaries.forget()
        return self.decoder.gradient(*self.layout.of(documents), n_supervised, dropout=self._model.training)

    def loss(self, documents: Sequence[Rendered]) -> Tensor:
        self._rotaries.forget()
        return self.decoder.loss(*self.layout.of(documents))

    def forget(self) -> None:
        self.decoder.forget()

    def close(self) -> None:
        self.decoder.leave()
