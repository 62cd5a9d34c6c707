"""What the application answers from: the models, the batch that writes their replies, and the server's state."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tunesmith.chat import Chat
from tunesmith.serving.batching import Batch
from tunesmith.serving.gate import Limits

_Result = TypeVar("_Result")


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
    key: str | None = None
    loopback: bool = True
    limits: Limits = field(default_factory=Limits)
    closing: bool = False
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path and status."""
    following: int = 0
    """Requests whose replies are being written."""

    def __post_init__(self) -> None:
        self._renderer = ThreadPoolExecutor(1, "render")  # tokenizers do not like to be asked by two at once

    async def rendered(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """The result of work with a tokenizer, done beside the server's own thread."""
        return await asyncio.get_running_loop().run_in_executor(self._renderer, work, *arguments)
