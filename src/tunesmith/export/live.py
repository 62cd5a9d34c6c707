"""What the live adapter says to some prompts, and what is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.chat import Chat, Reply
from tunesmith.data.template import Refused, Template
from tunesmith.evaluation.general import questions
from tunesmith.language import said
from tunesmith.types import Message, Role

N_PROMPTS = 20
"""General questions whose greedy replies are compared token by token."""

REPLY_TOKENS = 32
AWKWARD = (
    "x = [i**2 for i in range(10)]\n\tprint(x)",
    "1234567 3.14 1/2 ½",
    "I'LL say you're don't — “quoted” …",
    "Straße naïve Ελληνικά русский العربية हिन्दी 한국어",
    "日本語です。《红楼梦》的作者是谁？",
    "👩‍👩‍👧‍👦 🇩🇪 🙂!",
    "a\r\nb\n\n\nc",
    "two  and   three    spaces",
    "  spaces in front",
    "a line break behind\n",
)
"""Messages on which tokenizers part."""


@dataclass(frozen=True)
class Compared:
    """One thing that must hold of what was written."""

    name: str
    value: float
    bound: float
    ok: bool


def at_least(name: str, value: float, bound: float) -> Compared:
    return Compared(name, value, bound, value >= bound)


def at_most(name: str, value: float, bound: float) -> Compared:
    return Compared(name, value, bound, value <= bound)


@dataclass(frozen=True)
class Answers:
    """What the live adapter says to some prompts."""

    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    replies: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]
    """Per prompt, of each token of its reply (tokens, V) fp32, given all before it."""
    template: Template
    messages: tuple[tuple[Message, ...], ...]
    awkward: tuple[tuple[int, ...], ...]
    """The prompts of `AWKWARD`."""
    dtype: torch.dtype
    reply_tokens: int
    """At most, of a reply."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.template.stop_ids

    @classmethod
    def of(cls, chat: Chat, tell: Callable[[str], None] = lambda text: None) -> Answers:
        asked = [Message("user", question.question) for question in questions()[:: 100 // N_PROMPTS]]
        system = [] if chat.system is None else [Message("system", chat.system)]
        template = chat.renderer.template
        replies = list[Reply]()
        for number, message in enumerate(asked, 1):
            tell(said("Asking the live adapter: question {number} of {n} …", number=number, n=len(asked)))
            replies.append(chat.reply([message], temperature=0, max_tokens=REPLY_TOKENS))
        return cls(
            prompts=tuple(reply.prompt_ids for reply in replies),
            texts=tuple(template.write([*system, message], generation_prompt=True) for message in asked),
            replies=tuple(reply.token_ids for reply in replies),
            logits=tuple(logits_of(chat.model, reply.prompt_ids, reply.token_ids) for reply in replies),
            template=template,
            messages=tuple((*system, message) for message in asked),
            awkward=tuple(chat.renderer.prompt_ids([Message("user", text)]) for text in AWKWARD),
            dtype=next(chat.model.parameters()).dtype,
            reply_tokens=REPLY_TOKENS,
        )


def logits_of(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.float().cpu()


_TALKS: tuple[tuple[Role, ...], ...] = (
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
    ("assistant", "user"),
    ("system", "assistant", "user"),
)
_SAID = (
    "Who are you?",
    "我是一座灯塔。",
    'x = {"a": "{{ .System }}"}',
    "Line one\n\nline <two> & \\n",
    "你好 🙂!",
    "So?",
)


def talks(template: Template) -> list[tuple[list[Message], str]]:
    """Conversations that the trained template takes, and what it makes of them up to the next reply."""
    talks = []
    for roles in _TALKS:
        talk = [Message(role, text) for role, text in zip(roles, _SAID, strict=False)]
        try:
            talks.append((talk, template.write(talk, generation_prompt=True)))
        except Refused:
            continue
    return talks
