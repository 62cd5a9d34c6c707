"""Rows along a tree, through transformers' own layers: what rows share is computed once."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from torch import Tensor

from tunesmith.engine import attention
from tunesmith.engine.hf import liger, lora
from tunesmith.engine.hf.losses import summed_loss
from tunesmith.engine.packing import DynamicRotaries
from tunesmith.engine.trees import Trees
from tunesmith.engine.way import Kind
from tunesmith.types import Rendered

WITH_LIGER, WITHOUT_LIGER, GATHERED = "tree", "tree without Liger's kernels", "tree with gathered attention"


class Along:
    """See `Way`."""

    kind: Kind = "tree"

    def __init__(self, model: PeftModel, trees: Trees, *, with_liger: bool) -> None:
        self._model, self.layout, self._rotaries = model, trees, DynamicRotaries(model)
        attention.register()
        self.n_by_peft = lora.install(model)
        """Adapters that peft applies, because they are not plain LoRA on a linear layer."""
        if with_liger:
            liger.install(model)
        self.name = GATHERED if trees.backend != "flex" else WITHOUT_LIGER
        if liger.installed(model):
            self.name = WITH_LIGER

    def gradient(
        self, documents: Sequence[Rendered], n_supervised: int, *, weight: int = 1, scale: float = 1
    ) -> Tensor:
        self._rotaries.forget()
        tree, sight = self.layout.of(documents)
        with attention.looking_through(sight, self._model):  # in the backward pass too, which may recompute
            loss = summed_loss(self._model, tree) * weight / n_supervised
            (loss if scale == 1 else loss * scale).backward()
        return loss.detach()

    def loss(self, documents: Sequence[Rendered]) -> Tensor:
        self._rotaries.forget()
        tree, sight = self.layout.of(documents)
        with attention.looking_through(sight, self._model):
            return summed_loss(self._model, tree)

    def forget(self) -> None:
        pass

    def close(self) -> None:
        lora.remove(self._model)
        liger.remove(self._model)
