"""A tokenizer's chat template and what it does, found out by rendering probes, never by a list of models.

Probed are: does it take a system text, drop it or refuse it; does it write a system text of its own; does a prompt
with its generation prompt begin the finished conversation; which special token does it write behind a reply; which
added tokens does it mark turns with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from tunesmith.errors import TemplateError
from tunesmith.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _REPLIES = "Qzsystem", "Qzquestion", ("Qzyes", "Wzno")
_OTHER_TEMPLATE = "Pass --set template.path=FILE with a template that does."


class Refused(Exception):
    """The template ended with an error of its own; the text says which."""


@dataclass(frozen=True)
class Template:
    """A chat template with its probed properties; made by `probe`."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    text: str = field(repr=False)
    source: str
    """Where it comes from: 'tokenizer', 'alias atom-7b', 'file x.jinja'."""
    stop_ids: tuple[int, ...]
    """Ids that end a reply; the one that the template writes comes first."""
    special_ids: frozenset[int] = field(repr=False)
    """Ids that only the template may write: the tokenizer's special tokens, its own marks of a turn, the stop ids."""
    folds_system: bool
    """The template has no place for a system text; it goes in front of the first user turn."""
    own_system: str | None
    """The system text that the template writes where a conversation has none."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the template's text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def write(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The conversation as text; ends in the generation prompt if asked for.

        Raises Refused where the template refuses the conversation.
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
    except Refused as error:
        raise TemplateError(where, f"an error ({error})", "a rendered question and answer", _OTHER_TEMPLATE) from error
    if _USER not in prompt or any(reply not in turn for reply, turn in zip(_REPLIES, turns, strict=True)):
        raise TemplateError(
            where, "a rendering that loses the question or the answer", "both in the text", _OTHER_TEMPLATE
        )
    if not all(turn.startswith(prompt) for turn in turns):
        raise TemplateError(
            where,
            f"the generation prompt {prompt!r}, which does not begin the conversation {turns[0]!r}",
            "the same text up to the reply",
            "What is trained would not be what is asked. " + _OTHER_TEMPLATE,
        )
    more = list(more_stop_ids)
    special = _special_ids(tokenizer) | set(more)
    stop = _stop_behind_reply(tokenizer, turns, special)
    if stop is None:
        raise TemplateError(
            where,
            f"no special token behind a reply ({turns[0]!r})",
            "an end-of-turn token",
            "The model could never learn to stop. " + _OTHER_TEMPLATE,
        )
    eos = tokenizer.eos_token_id
    own: list[int] = [eos] if isinstance(eos, int) else []
    stop_ids = tuple(dict.fromkeys([stop, *own, *more]))
    special_ids = frozenset(special | _marks(tokenizer, text))
    folds_system, own_system = _system(tokenizer, text, prompt)
    return Template(tokenizer, text, source, stop_ids, special_ids, folds_system, own_system)


def fold(messages: Sequence[Message]) -> list[Message]:
    """The messages with the system text in front of the first user turn, a blank line between.

    >>> fold([Message("system", "Be brief."), Message("user", "Hi")])
    [Message(role='user', content='Be brief.\\n\\nHi')]
    """
    if not messages or messages[0].role != "system":
        return list(messages)
    system, *rest = messages
    first = next((i for i, message in enumerate(rest) if message.role == "user"), None)
    if first is None:
        return list(messages)
    folded = Message("user", f"{system.content}\n\n{rest[first].content}")
    return [*rest[:first], folded, *rest[first + 1 :]]


def _write(tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[Message], generation_prompt: bool) -> str:
    dicts = [{"role": str(message.role), "content": message.content} for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(
            dicts, chat_template=text, tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # a template is a program of somebody else's: it may fail with anything
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise Refused(f"{type(error).__name__}: {first_line}".removesuffix(": ")) from error
    assert isinstance(rendered, str)
    return rendered


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def _marks(tokenizer: PreTrainedTokenizerBase, text: str) -> set[int]:
    """Added tokens around a question: marks of a turn even where nobody called them special.

    Not white space and words (Gemma's line break is an added token), and not those of the generation prompt, which
    may open what a reply goes on with (<think>).
    """
    try:
        question = _write(tokenizer, text, [Message("user", _USER)], False)
    except Refused:
        return set()
    added = tokenizer.added_tokens_decoder
    return {i for i in _ids(tokenizer, question) if i in added and re.search(r"[^\w\s]", added[i].content)}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _stop_behind_reply(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], special: set[int]) -> int | None:
    first, second = (_ids(tokenizer, turn) for turn in turns)
    common = 0  # what both end in stands behind the reply, whatever the reply is
    while common < min(len(first), len(second)) and first[-1 - common] == second[-1 - common]:
        common += 1
    return next((i for i in first[len(first) - common :] if i in special), None)


def _system(tokenizer: PreTrainedTokenizerBase, text: str, prompt: str) -> tuple[bool, str | None]:
    """Is a system text refused or dropped; which one does the template write by itself?"""
    try:
        given = _write(tokenizer, text, [Message("system", _SYSTEM), Message("user", _USER)], True)
    except Refused:
        return True, None
    if _SYSTEM not in given:
        return True, None
    before, there, after = given[: given.index(_USER)].partition(_SYSTEM)
    without = prompt[: prompt.index(_USER)]
    framed = there and after and without.startswith(before) and without.endswith(after)
    if not framed or len(without) <= len(before) + len(after):
        return False, None
    return False, without[len(before) : len(without) - len(after)].strip() or None
