"""A tokenizer's chat template and what it does, found out by rendering probes, never by a list of models.

Probed are: does it take a system text, drop it or refuse it; does it write a system text of its own; does a prompt
with its generation prompt begin the finished conversation; which special token does it write behind a reply.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import jinja2

from tunesmith.errors import TemplateError
from tunesmith.types import ChatMessage, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _REPLIES = "Qzsystem", "Qzquestion", ("Qzyes", "Wzno")


@dataclass(frozen=True)
class Template:
    """A chat template with its probed properties; made by `probe`."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    text: str = field(repr=False)
    source: str
    """Where it comes from: 'tokenizer', 'alias atom-7b', 'file x.jinja'."""
    stop_ids: tuple[int, ...]
    """Ids that end a reply; the one that the template writes comes first."""
    folds_system: bool
    """The template has no place for a system text; it goes in front of the first user turn."""
    own_system: str | None
    """The system text that the template writes where a conversation has none."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the template's text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that only the template may write: what the tokenizer calls special, and the stop ids."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset([i for i, token in added.items() if token.special]) | {*self.tokenizer.all_special_ids, *self.stop_ids}

    def write(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The conversation as text; ends in the generation prompt if asked for.

        Raises jinja2.TemplateError where the template refuses the conversation.
        """
        return _write(self.tokenizer, self.text, fold(messages) if self.folds_system else messages, generation_prompt)


def probe(tokenizer: PreTrainedTokenizerBase, text: str, source: str, more_stop_ids: Iterable[int] = ()) -> Template:
    """The template with its properties.

    `more_stop_ids` are those of the model's generation config and of its alias. Raises TemplateError when nothing can
    be learned with this template: it does not parse, refuses a plain question, loses texts, or ends replies with no
    special token.
    """
    where = f"chat template ({source})"
    user, replies = Message("user", _USER), [Message("assistant", reply) for reply in _REPLIES]
    try:
        prompt = _write(tokenizer, text, [user], True)
        turns = [_write(tokenizer, text, [user, reply], False) for reply in replies]
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise TemplateError(where, f"an error ({error})", "a rendered question and answer", "Pass --set template.path=FILE with a template that works.") from None
    if _USER not in prompt or any(reply not in turn for reply, turn in zip(_REPLIES, turns, strict=True)):
        raise TemplateError(where, "a rendering that loses the question or the answer", "both in the text", "Pass --set template.path=FILE with a template that works.")
    if not all(turn.startswith(prompt) for turn in turns):
        raise TemplateError(where, f"the generation prompt {prompt!r}, which does not begin the conversation {turns[0]!r}", "the same text up to the reply", "What is trained would not be what is asked; pass --set template.path=FILE.")
    stop = _stop_behind_reply(tokenizer, turns)
    if stop is None:
        raise TemplateError(where, f"no special token behind a reply ({turns[0]!r})", "an end-of-turn token", "The model could never learn to stop; pass --set template.path=FILE with a template that writes one.")
    eos = tokenizer.eos_token_id
    stop_ids = dict.fromkeys([stop, *([eos] if isinstance(eos, int) else []), *more_stop_ids])
    folds, own = _system(tokenizer, text, prompt)
    return Template(tokenizer, text, source, tuple(stop_ids), folds, own)


def fold(messages: Sequence[Message]) -> list[Message]:
    """The messages with the system text in front of the first user turn, a blank line between."""
    if len(messages) < 2 or messages[0].role != "system":
        return list(messages)
    system, first, *rest = messages
    return [Message(first.role, f"{system.content}\n\n{first.content}"), *rest]


def _write(tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[Message], generation_prompt: bool) -> str:
    dicts: list[ChatMessage] = [message.as_dict() for message in messages]
    rendered = tokenizer.apply_chat_template(
        dicts,  # type: ignore[arg-type]  # a TypedDict is a dict
        chat_template=text, tokenize=False, add_generation_prompt=generation_prompt,
    )  # fmt: skip
    assert isinstance(rendered, str)
    return rendered


def _stop_behind_reply(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> int | None:
    first, second = (tokenizer(turn, add_special_tokens=False)["input_ids"] for turn in turns)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    common = 0  # what both end in stands behind the reply, whatever the reply is
    while common < min(len(first), len(second)) and first[-1 - common] == second[-1 - common]:
        common += 1
    return next((i for i in first[len(first) - common :] if i in special), None)


def _system(tokenizer: PreTrainedTokenizerBase, text: str, prompt: str) -> tuple[bool, str | None]:
    """Is the system text refused or dropped; which one does the template write by itself?"""
    try:
        given = _write(tokenizer, text, [Message("system", _SYSTEM), Message("user", _USER)], True)
    except (jinja2.TemplateError, TypeError, ValueError):
        return True, None
    if _SYSTEM not in given:
        return True, None
    before, after = given[: given.index(_USER)].split(_SYSTEM, 1) if _SYSTEM in given[: given.index(_USER)] else ("", "")
    without = prompt[: prompt.index(_USER)]
    if after and without.startswith(before) and without.endswith(after) and len(without) > len(before) + len(after):
        return False, without[len(before) : len(without) - len(after)].strip() or None
    return False, None
