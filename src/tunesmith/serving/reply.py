"""A reply on its way: how it is drawn, what has been written of it, and what it keeps meanwhile.

Legend: K key heads, D head size, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn."""

    config: GenerationConfig
    """As `chat.Chat.sampling` gives it."""
    max_tokens: int
    seed: int | None = None
    """With it, the same request gives the same reply."""
    n_logprobs: int | None = None
    """How many of the likeliest words are told with every token; None: not even the token's own."""
    presence_penalty: float = 0.0
    """Taken off the logit of every word that was written."""
    frequency_penalty: float = 0.0
    """Taken off as often as it was written."""

    @property
    def greedy(self) -> bool:
        return not self.config.do_sample


@dataclass(frozen=True)
class Written:
    """One token of a reply."""

    token_id: int
    logprob: float | None = None
    """Of the model's own distribution, before temperature and penalties."""
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Ended:
    """Nothing follows."""

    reason: Literal["stop", "length", "cancelled", "failed"]
    problem: str = ""


Event = Written | Ended


@dataclass
class Again:
    """A reply that is computed again by itself, as far as that has come."""

    token_ids: list[int]
    cache: DynamicCache


@dataclass(eq=False)
class Together:
    """The replies to one request."""

    short: bool = True
    """Prompts and replies together are few tokens."""


@dataclass(eq=False)
class Reply:
    """A reply on its way."""

    prompt_ids: tuple[int, ...]
    adapter: str | None
    sampling: Sampling
    stop_ids: frozenset[int]
    emit: Callable[[Event], None]
    """Called by the batch's thread with every token and at the end."""
    number: int = 0
    """Among those that answer one request; with a seed each is drawn differently."""
    cancelled: bool = False
    asked: Together = field(default_factory=Together)
    """Said by the batch."""
    written: list[int] = field(default_factory=list)
    n_read: int = 0
    """Tokens of prompt and reply that have keys and values."""
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """By attention layer: keys and values, (1, K, capacity, D) each."""
    unsettled: Tensor | None = field(default=None, repr=False)
    """(V,) logits of which two were too close; the reply waits until it has been computed again up to here."""
    again: Again | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(random.Random(f"{self.sampling.seed} {self.number}").getrandbits(63))
        self.processors = LogitsProcessorList()

    @property
    def longest(self) -> int:
        """Tokens when it ends at its limit."""
        return len(self.prompt_ids) + self.sampling.max_tokens

    @property
    def reserved(self) -> int:
        """Tokens that room is kept for; one that is computed again has its keys and values twice."""
        return self.longest * (1 if self.again is None else 2)

    @property
    def to_read(self) -> Sequence[int]:
        """Tokens that have no keys and values yet."""
        n_prompt = len(self.prompt_ids)
        return self.prompt_ids[self.n_read :] if self.n_read < n_prompt else self.written[self.n_read - n_prompt :]

    def scores(self, logits: Tensor) -> Tensor:
        """(V,) what the token is chosen by."""
        sampling, scores = self.sampling, logits
        if self.written and (sampling.presence_penalty or sampling.frequency_penalty):
            words, counts = torch.tensor(self.written, device=logits.device).unique(return_counts=True)
            scores = scores.clone()
            scores[words] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if self.processors:
            ids = torch.tensor([[*self.prompt_ids, *self.written]], device=logits.device)
            scores = cast("Tensor", self.processors(cast("Any", ids), cast("Any", scores[None].clone())))[0]
        return scores

    def choose(self, logits: Tensor) -> Written:
        """The next token."""
        if bool(logits.isnan().any()):
            raise ArithmeticError("the model's logits are not numbers")
        scores = self.scores(logits)
        if self.sampling.greedy:
            token = int(scores.argmax())
        else:
            chances = torch.softmax(scores.double(), -1).cpu()
            token = int(torch.multinomial(chances, 1, generator=self.generator))
        return self.told(logits, token)

    def told(self, logits: Tensor, token: int) -> Written:
        """A token with what is to be told of it."""
        if (n := self.sampling.n_logprobs) is None:
            return Written(token)
        logprobs = torch.log_softmax(logits, -1)
        best = torch.topk(logprobs, min(n, len(logprobs)))
        likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Written(token, float(logprobs[token]), tuple(likeliest))
