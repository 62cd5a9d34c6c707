"""What the application answers from: the models, the batch that writes their replies, and the server's state."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunesmith.chat import Chat
from tunesmith.serving.batching import Batch
from tunesmith.serving.gate import Limits
from tunesmith.serving.reading import Reading
from tunesmith.serving.refusals import Refused, refusal


@dataclass(frozen=True)
class Served:
    """A model that can be asked for."""

    id: str
    chat: Chat
    base: str
    """The id of what it is without its adapter."""
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class Service:
    """What the application answers from."""

    models: Mapping[str, Served]
    batch: Batch
    reading: Reading
    key: str | None = None
    loopback: bool = True
    limits: Limits = field(default_factory=Limits)
    closing: bool = False
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path and status."""
    following: int = 0
    """Requests whose replies are being written."""

    def served(self, name: str) -> Served:
        """The model of that name; raises Refused."""
        if name not in self.models:
            expected = f"expected one of {', '.join(self.models)}"
            message = f"model: found {name[:200]!r}; {expected}. Ask /v1/models."
            raise Refused(refusal(404, message, param="model", code="model_not_found"))
        return self.models[name]
