"""General prompts with the base's own answers, which are learned beside the rows, so that they are not forgotten.

What a network learns anew overwrites what it knew; old examples seen again keep it, and where there are none the
network's own answers do (A. Robins, "Catastrophic forgetting, rehearsal and pseudorehearsal", 1995). The answers are
those that the base gives greedily, token by token as it wrote them, cut where they are long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.data.render import Renderer
from tunesmith.data.rows import Row
from tunesmith.types import Conversation, Message, Origin, Rendered

ANSWER_TOKENS = 64
LEAST_PROMPTS = 48
"""Where an epoch takes fewer, the next one takes others, until there are so many."""


def per_epoch(share: float, n_learned: int) -> int:
    """How many prompts make up this share of the tokens that an epoch learns, `n_learned` of which are the data's."""
    return math.ceil(share / (1 - share) * n_learned / ANSWER_TOKENS)


def n_prompts(per_epoch: int, epochs: int) -> int:
    """How many different prompts the base answers for all epochs together: what one takes, since to answer twice as
    many would cost twice the time, and `LEAST_PROMPTS` where one takes fewer."""
    return min(per_epoch * epochs, max(per_epoch, LEAST_PROMPTS))


def unanswered(renderer: Renderer, prompts: Sequence[str], system: str | None) -> list[Row]:
    """Rows as long as those with answers are at most; no weights are needed, and none of their answers is true."""
    before = [Message("system", system)] if system else []
    ids = [renderer.prompt_ids([*before, Message("user", prompt)]) for prompt in prompts]
    return [
        _row(number, prompt, "…", prompt_ids, prompt_ids[-1:] * ANSWER_TOKENS)
        for number, (prompt, prompt_ids) in enumerate(zip(prompts, ids, strict=True), 1)
    ]


def rows_of(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of which the answers are learned, from the lines of a run's rehearsal.jsonl."""
    return [
        _row(number, line["prompt"], line["answer"], tuple(line["prompt_ids"]), tuple(line["answer_ids"]))
        for number, line in enumerate(lines, 1)
    ]


def _row(number: int, prompt: str, answer: str, prompt_ids: tuple[int, ...], answer_ids: tuple[int, ...]) -> Row:
    origin = Origin("rehearsal.jsonl", number)
    span = len(prompt_ids), len(prompt_ids) + len(answer_ids)
    talk = Conversation((Message("user", prompt), Message("assistant", answer)), origin)
    return Row(talk, (Rendered(prompt_ids + answer_ids, (span,), origin),))
