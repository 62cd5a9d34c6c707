"""Who sees whom in a micro-batch, as layers ask for it.

Legend: T tokens, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Style:
    """What a layer does to its scores besides the scale."""

    scale: float
    window: int | None = None
    """A query sees this many positions up to its own."""
    softcap: float | None = None
    """Scores become `softcap · tanh(score / softcap)`."""
    sinks: Tensor | None = None
    """(H,) scores of a key without a value that every query sees."""


class Sight(Protocol):
    """Who sees whom in a micro-batch, in the form a backend wants."""

    def attend(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, style: Style) -> Tensor:
        """(T, H, D), differentiable."""
        ...
