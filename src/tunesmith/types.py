"""The values that travel along the line of data: frozen, checked when made, standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

from tunesmith.language import said

Role = Literal["system", "user", "assistant"]


class ChatMessage(TypedDict):
    """A message as chat templates and the OpenAI API write it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands: the line its object begins in, counted from 1 (the row for Parquet)."""

    path: str
    line: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.unit == "line" else f"{self.path}:row {self.line}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with one row, in four parts: where, what was found, what was expected, what to do."""

    origin: Origin
    field: str
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return said(
            "{place}: {field}: found {found}; expected {expected}. {fix}",
            place=self.origin,
            field=self.field,
            found=self.found,
            expected=self.expected,
            fix=self.fix,
        )


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def as_dict(self) -> ChatMessage:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row of the data, read: roles are known and in order, the last message is a reply."""

    messages: tuple[Message, ...]
    origin: Origin

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1].role != "assistant":
            raise ValueError(f"{self.origin}: a conversation to learn from ends with a reply")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it.

    `token_ids` is the rendered text, tokenised; `replies` are the half-open spans `[start, stop)` of it that
    are learned: each starts where a generation prompt ends and stops behind the reply's stop token.

        token_ids   <|user|> Hi <|end|> <|assistant|> Hello ! <|end|> <|endoftext|>
        replies                                       [4 ----------- 7)
    """

    token_ids: tuple[int, ...]
    replies: tuple[tuple[int, int], ...]
    origin: Origin

    def __post_init__(self) -> None:
        stop_before = 1  # token 0 has nothing before it that could predict it
        for start, stop in self.replies:
            if not stop_before <= start < stop <= len(self.token_ids):
                raise ValueError(f"{self.origin}: reply span [{start}, {stop}) in {len(self.token_ids)} tokens")
            stop_before = stop
        if not self.replies:
            raise ValueError(f"{self.origin}: nothing to learn from")

    @property
    def supervised(self) -> tuple[bool, ...]:
        """One flag per token: is it learned?"""
        flags = [False] * len(self.token_ids)
        for start, stop in self.replies:
            flags[start:stop] = [True] * (stop - start)
        return tuple(flags)

    @property
    def n_supervised(self) -> int:
        """Number of tokens that are learned."""
        return sum(stop - start for start, stop in self.replies)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What the model is given before it writes the last reply."""
        return self.token_ids[: self.replies[-1][0]]
