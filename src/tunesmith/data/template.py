"""A tokenizer's chat template and what it does, found out by rendering probes, never by a list of models.

Probed are: does it take a system text, drop it or refuse it; does it write a system text of its own; does a prompt
with its generation prompt begin the finished conversation; which special token does it write after a reply; which
added tokens does it mark turns with.

A template is a program of somebody else's, so it runs in a copy of this process that a limit ends.
"""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunesmith.confined import Confined, Ended, WorkFailed, memory_limit, tried
from tunesmith.errors import TemplateError
from tunesmith.language import marked, said
from tunesmith.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _REPLIES = "Qzsystem", "Qzquestion", ("Qzyes", "Wzno")
_OTHER_TEMPLATE = marked("Pass --set template.path=FILE with a template that does.")


RENDER_SECONDS, _RENDER_BYTES = 2, 512 << 20
"""What one conversation may take. Templates in use take a thousandth of it."""
Asked = tuple[Sequence[Message], bool]
"""A conversation, and whether the generation prompt is wanted at its end."""


class Refused(Exception):
    """The template ended with an error of its own; the text says which."""


class Writer:
    """Writes conversations by a template's text, with a tokenizer's special tokens at hand."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.text = text
        self._variables = {
            name: [*map(str, value)] if isinstance(value, list | tuple) else str(value)
            for name, value in tokenizer.special_tokens_map.items()
        }
        self._stays = False

    def stay(self) -> None:
        """Writes in this process from now on, which has been started to be ended: SIGPROF ends it when a conversation
        takes too long, and what takes too much memory raises TemplateError."""
        self._stays = True

    def write(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The conversation as text; raises Refused where the template refuses it."""
        (written,) = self.write_all([(messages, generation_prompt)])
        if isinstance(written, Refused):
            raise written
        return written

    def write_all(self, asked: Sequence[Asked]) -> list[str | Refused]:
        """Each conversation as text, or why the template refuses it.

        Raises TemplateError where the template takes more time or memory than any that is meant well.
        """
        requests = [([message.as_dict() for message in messages], end) for messages, end in asked]
        template = {"text": self.text, "variables": self._variables}
        if self._stays:
            _rendered(template)
            answers = self._here(requests)
        else:
            answers = iter(_COPY.ask([template, *requests])[1:])
        written: list[str | Refused] = []
        for answer in answers:
            if isinstance(answer, Ended):
                raise too_much(str(answer)) from answer
            written.append(Refused(str(answer)) if isinstance(answer, WorkFailed) else answer)
        return written

    def _here(self, requests: Sequence[Any]) -> Iterator[Any]:
        for start in range(0, len(requests), 64):
            with memory_limit(_RENDER_BYTES):
                for request in requests[start : start + 64]:
                    signal.setitimer(signal.ITIMER_PROF, RENDER_SECONDS)
                    try:
                        yield tried(_rendered, request, _RENDER_BYTES)
                    finally:
                        signal.setitimer(signal.ITIMER_PROF, 0)


_template: dict[str, Any] = {}
"""Of the process that renders: the template that was given last."""


def _rendered(request: Any) -> str | None:
    """A conversation as text by the template that was given last; None for one that is given."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if isinstance(request, dict):
        _template.update(request)
        return None
    messages, generation_prompt = request
    (text,), _ = render_jinja_template(
        [messages],
        chat_template=_template["text"],
        add_generation_prompt=generation_prompt,
        **_template["variables"],
    )
    return text


_COPY = Confined(_rendered, seconds=RENDER_SECONDS, more_bytes=_RENDER_BYTES)
"""One for all templates of this process."""


def too_much(what: str) -> TemplateError:
    """The error of a template that takes more than any that is meant well."""
    return TemplateError(
        said("chat template"),
        said("{what} for one conversation", what=what),
        said("a text at once"),
        said(_OTHER_TEMPLATE),
    )


_SOURCES = {"tokenizer": marked("tokenizer"), "alias": marked("alias"), "file": marked("file")}


@dataclass(frozen=True)
class Template:
    """A chat template with its probed properties; made by `probe`."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    writer: Writer = field(repr=False, compare=False)
    source: str
    """Where it comes from: 'tokenizer', 'alias atom-7b', 'file x.jinja'."""
    stop_ids: tuple[int, ...]
    """Ids that end a reply; the one that the template writes comes first."""
    special_ids: frozenset[int] = field(repr=False)
    """Ids that only the template may write: the tokenizer's special tokens, its own marks of a turn, the stop ids."""
    reply_ids: frozenset[int] = field(repr=False)
    """Ids that the template and a reply may write, and nobody else: marks of thinking, of a tool's call."""
    folds_system: bool
    """The template has no place for a system text; it goes in front of the first user turn."""
    own_system: str | None
    """The system text that the template writes where a conversation has none."""
    plain_marks: str | None
    """What comes before a reply where that is plain text, which anybody can type; None where a token marks a turn."""

    @property
    def text(self) -> str:
        return self.writer.text

    @cached_property
    def described(self) -> str:
        """Where it comes from, in the reader's language."""
        kind, blank, name = self.source.partition(" ")
        return said(_SOURCES[kind]) + blank + name

    @property
    def digest(self) -> str:
        """SHA-256 of the template's text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def write(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The conversation as text; ends in the generation prompt if asked for.

        Raises Refused where the template refuses the conversation.
        """
        return self.writer.write(self._folded(messages), generation_prompt=generation_prompt)

    def write_all(self, asked: Sequence[Asked]) -> list[str | Refused]:
        """As `write`, of several conversations at once; a Refused in the place of a text."""
        return self.writer.write_all([(self._folded(messages), end) for messages, end in asked])

    def _folded(self, messages: Sequence[Message]) -> Sequence[Message]:
        return fold(messages) if self.folds_system else messages


def probe(tokenizer: PreTrainedTokenizerBase, text: str, source: str, more_stop_ids: Iterable[int] = ()) -> Template:
    """The template with its properties.

    `more_stop_ids` are those of the model's generation config and of its alias. Raises TemplateError when nothing can
    be learned with this template: it does not parse, refuses a plain question, loses texts, or ends replies with no
    special token.
    """
    where = said("chat template ({source})", source=source)
    writer = Writer(tokenizer, text)
    user, replies = Message("user", _USER), [Message("assistant", reply) for reply in _REPLIES]
    try:
        prompt = writer.write([user], generation_prompt=True)
        turns = [writer.write([user, reply]) for reply in replies]
    except Refused as error:
        raise TemplateError(
            where,
            said("an error ({error})", error=error),
            said("a rendered question and answer"),
            said(_OTHER_TEMPLATE),
        ) from error
    except TemplateError as error:
        raise TemplateError(where, error.found, error.expected, error.fix) from error
    if _USER not in prompt or any(reply not in turn for reply, turn in zip(_REPLIES, turns, strict=True)):
        raise TemplateError(
            where,
            said("a rendering that loses the question or the answer"),
            said("both in the text"),
            said(_OTHER_TEMPLATE),
        )
    if not all(turn.startswith(prompt) for turn in turns):
        raise TemplateError(
            where,
            said(
                "the generation prompt {prompt!r}, which does not begin the conversation {turn!r}",
                prompt=prompt,
                turn=turns[0],
            ),
            said("the same text up to the reply"),
            said("What is trained would not be what is asked. {fix}", fix=said(_OTHER_TEMPLATE)),
        )
    more = list(more_stop_ids)
    special = _special_ids(tokenizer) | set(more)
    stop = _stop_after_reply(tokenizer, turns, special)
    if stop is None:
        raise TemplateError(
            where,
            said("no special token after a reply ({turn!r})", turn=turns[0]),
            said("an end-of-turn token"),
            said("The model could never learn to stop. {fix}", fix=said(_OTHER_TEMPLATE)),
        )
    eos = tokenizer.eos_token_id
    own: list[int] = [eos] if isinstance(eos, int) else []
    stop_ids = tuple(dict.fromkeys([stop, *own, *more]))
    marks, openers = _marks(tokenizer, writer)
    special_ids = frozenset(special | marks)
    folds_system, own_system = _system(writer, prompt)
    return Template(
        tokenizer,
        writer,
        source,
        stop_ids,
        special_ids,
        frozenset(openers - special_ids),
        folds_system,
        own_system,
        _plain_marks(tokenizer, prompt),
    )


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


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def _marks(tokenizer: PreTrainedTokenizerBase, writer: Writer) -> tuple[set[int], set[int]]:
    """Added tokens that the template writes, whether or not somebody called them special: those that mark turns, and
    those that a reply may write as well.

    A reply goes on with what its own generation prompt opens (<think>), and may open what the template's text names and
    no plain turn holds (<tool_call>). Not taken are white space and words (Gemma's line break is an added token).
    """
    added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if re.search(r"[^\w\s]", t.content)}
    system, user, reply = Message("system", _SYSTEM), Message("user", _USER), Message("assistant", _REPLIES[0])
    talks = [[user], [system, user], [user, reply, user], [system, user, reply, user, reply]]
    written = writer.write_all([(talk, end) for end in (False, True) for talk in talks])
    in_turns, at_end = (
        {i for text in texts if isinstance(text, str) for i in _ids(tokenizer, text) if i in added}
        for texts in (written[: len(talks)], written[len(talks) :])
    )
    thinking = {i for i in in_turns | at_end if _THINKING.search(added[i])}
    own = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    named = {i for i, content in added.items() if content in writer.text or content in own}
    marks = in_turns - thinking
    return marks, (at_end | named | thinking) - marks


_THINKING = re.compile("think|thought|reason", re.IGNORECASE)
"""Some templates write an empty thought into every turn of the past."""


def _plain_marks(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str | None:
    """What comes between a question and its reply, where nothing of it is a token that text can not spell: the end and
    the beginning of a text come between any two, and only words say whose turn it is."""
    header = prompt[prompt.index(_USER) + len(_USER) :]
    begins = tokenizer("")["input_ids"]
    anywhere: list[Any] = [*begins, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    added = tokenizer.added_tokens_decoder
    marks = [i for i in _ids(tokenizer, header) if i in added and re.search(r"[^\w\s]", added[i].content)]
    return header if all(i in anywhere for i in marks) else None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _stop_after_reply(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], special: set[int]) -> int | None:
    first, second = (_ids(tokenizer, turn) for turn in turns)
    common = 0  # what both end in comes after the reply, whatever the reply is
    while common < min(len(first), len(second)) and first[-1 - common] == second[-1 - common]:
        common += 1
    return next((i for i in first[len(first) - common :] if i in special), None)


def _system(writer: Writer, prompt: str) -> tuple[bool, str | None]:
    """Is a system text refused or dropped; which one does the template write by itself?"""
    try:
        given = writer.write([Message("system", _SYSTEM), Message("user", _USER)], generation_prompt=True)
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
