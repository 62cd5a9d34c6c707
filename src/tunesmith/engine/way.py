"""What every way to the gradient of a micro-batch has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from tunesmith.types import Rendered

Kind = Literal["decoder", "tree", "padded"]


class Layout(Protocol):
    """How documents lie beside each other."""

    def cut(self, documents: Sequence[Rendered], max_tokens: int) -> list[list[Rendered]]:
        """Groups of documents that pass through the model together, of at most so many tokens; a longer document is
        a group of its own."""
        ...

    def n_tokens(self, documents: Sequence[Rendered]) -> int:
        """How many tokens of a group pass through the model."""
        ...


class Way(Protocol):
    """One way through one model. The model is in its hands from its making until it is closed."""

    kind: Kind
    name: str
    """The kind, with what computes it where there are several."""

    @property
    def layout(self) -> Layout: ...

    def gradient(
        self, documents: Sequence[Rendered], n_supervised: int, *, weight: int = 1, scale: float = 1
    ) -> Tensor:
        """The group's loss, summed over supervised tokens, times `weight`, divided by `n_supervised`; a scalar. Adds
        its gradient, times `scale`, to the `.grad` of what is trained."""
        ...

    def loss(self, documents: Sequence[Rendered]) -> Tensor:
        """The group's summed loss, a scalar; inside `torch.no_grad()`, without dropout where the model has none."""
        ...

    def forget(self) -> None:
        """Gives memory back that is kept from step to step."""
        ...

    def close(self) -> None:
        """Gives the model back as it was: its weights in the type that they had, every layer by its own code. Nothing
        but `close` may follow."""
        ...
