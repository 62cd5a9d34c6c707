"""Conversations become token ids with the replies marked: the one renderer of training, chat, API and export.

Token ids are the template's text, tokenised with add_special_tokens=False. A reply starts where its generation prompt
ends and stops after the first stop token that follows; both are found on ids and checked on every row:

    prompt ids  <|user|> Hi <|end|> <|assistant|>
    turn ids    <|user|> Hi <|end|> <|assistant|> Hello ! <|end|> <|endoftext|>
                must begin with the prompt ids    [reply -------)

Where a template writes a reply differently once it is history (Qwen3 drops its thinking), that reply becomes a
document of its own, so that what is learned is what the model will have to write.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import AddedToken, Tokenizer

from tunesmith.data.template import Asked, Refused, Template
from tunesmith.errors import TemplateError
from tunesmith.language import said
from tunesmith.types import Conversation, Fault, Message, Origin, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 2048
_PRIVATE = 0xF0000  # supplementary private use area A: sentinels for special tokens
_BREAKS = range(0xE000, 0xE063)  # private use area: breaks a spelling while the template runs


def _not_plain() -> tuple[str, str, str]:
    found = said("a spelling that becomes a special token")
    return found, said("plain text"), said("Change the spelling, or leave the row out.")


class _CanNotRender(Exception):
    def __init__(self, field: str, found: str, expected: str, fix: str) -> None:
        self.parts = field, found, expected, fix


class _Shape(NamedTuple):
    """All that a template's special tokens may depend on."""

    roles: tuple[str, ...]
    generation_prompt: bool


class _Text(NamedTuple):
    """What the template wrote, and of what."""

    text: str
    messages: Sequence[Message]
    shape: _Shape


class Renderer:
    """Renders with one template; cheap to make, keeps what it learns about the template."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self._stops = frozenset(template.stop_ids)
        self._marks_of: dict[_Shape, list[int]] = {}

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of everything that ids depend on, hexadecimal; None where a tokenizer can not be written down."""
        template = self.template
        backend = _backend(template.tokenizer)
        if backend is None:
            return None
        properties = (
            sorted(template.special_ids), sorted(template.reply_ids), template.stop_ids, template.folds_system
        )  # fmt: skip
        parts = (backend.to_str(), sorted(template.tokenizer.special_tokens_map.items()), template.text, properties)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def render_all(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Rendered, ...] | Fault]:
        """For each conversation its documents, or what is wrong with it.

        There is one document, but for templates that rewrite history.
        """
        chunk: list[Conversation] = []
        for conversation in conversations:
            chunk.append(conversation)
            if len(chunk) == _CHUNK:
                yield from self._render_chunk(chunk)
                chunk = []
        yield from self._render_chunk(chunk)

    def render(self, conversation: Conversation) -> tuple[Rendered, ...]:
        """The documents of one conversation; raises TemplateError when it can not be rendered faithfully."""
        (result,) = self.render_all([conversation])
        if isinstance(result, Fault):
            raise TemplateError(f"{result.origin}: {result.field}", result.found, result.expected, result.fix)
        return result

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """What the model is given to write the next reply.

        Raises TemplateError where the template refuses the conversation or a text can not be kept plain.
        """
        try:
            (ids,) = self._tokenise([self._write(messages, generation_prompt=True)])
            if isinstance(ids, _CanNotRender):
                raise ids
        except _CanNotRender as problem:
            field, *rest = problem.parts
            raise TemplateError(said("conversation: {field}", field=field), *rest) from None
        return tuple(ids)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """A text that is no conversation, as ids, with what the tokenizer itself begins a text with (<s>).

        Raises TemplateError where a spelling of a special token can not be kept plain.
        """
        (ids,) = self._encode([text])
        if self._known(self._special_in(ids)):
            mark = next((chr(c) for c in _BREAKS if chr(c) not in text), None)
            plain = None if self._plain is None or mark is None else self._plain
            kept = plain.encode(plain.broken(text, mark), mark) if plain is not None and mark is not None else None
            if kept is None or self._known(self._special_in(kept)):
                raise TemplateError(said("prompt"), *_not_plain())
            ids = kept
        tokenizer = self.template.tokenizer
        begin = tokenizer("")["input_ids"]
        begins = bool(begin) and begin[0] == tokenizer.bos_token_id
        return (*begin[:1], *ids) if begins else tuple(ids)

    # --- whole chunks: the tokenizer works on all cores when it is given many texts ---------------------------------

    def _render_chunk(self, chunk: Sequence[Conversation]) -> Iterator[tuple[Rendered, ...] | Fault]:
        asked: list[Asked] = []
        places: list[range] = []
        for conversation in chunk:
            wanted = _prompts_and_turns(conversation)
            places.append(range(len(asked), len(asked) + len(wanted)))
            asked += wanted
        ids = self._tokenise(self._write_all(asked))
        for conversation, place in zip(chunk, places, strict=True):
            yield self._result([ids[i] for i in place], conversation.origin)

    def _result(self, tokenised: Sequence[list[int] | _CanNotRender], origin: Origin) -> tuple[Rendered, ...] | Fault:
        try:
            ids = []
            for one in tokenised:
                if isinstance(one, _CanNotRender):
                    raise one
                ids.append(one)
            return self._documents(list(zip(ids[::2], ids[1::2], strict=True)), origin)
        except _CanNotRender as problem:
            return Fault(origin, *problem.parts)

    def _documents(self, pairs: Sequence[tuple[list[int], list[int]]], origin: Origin) -> tuple[Rendered, ...]:
        """Documents out of each reply's (prompt, turn); a reply shares one with the next while its ids stay."""
        documents: list[Rendered] = []
        replies: list[tuple[int, int]] = []
        for number, (prompt, turn) in enumerate(pairs):
            reply = self._reply(prompt, turn, "reply" if len(pairs) == 1 else f"reply {number + 1}")
            replies.append(reply)
            is_last = number + 1 == len(pairs)
            if is_last or pairs[number + 1][0][: reply[1]] != turn[: reply[1]]:
                documents.append(Rendered(tuple(turn), tuple(replies), origin))
                replies = []
        return tuple(documents)

    def _reply(self, prompt: list[int], turn: list[int], name: str) -> tuple[int, int]:
        """The half-open span of the reply in its turn."""
        start = len(prompt)
        if turn[:start] != prompt:
            raise _CanNotRender(
                name,
                said("a beginning that melts into the prompt's last token"),
                said("the same tokens as in chat"),
                said("Delete white space at the beginning of the answer."),
            )
        stop = next((i for i in range(start, len(turn)) if turn[i] in self._stops), None)
        if stop is None:
            raise _CanNotRender(
                name,
                said("no stop token after it"),
                said("one of the model's stop ids"),
                said(
                    "The template drops the end of this reply; shorten the conversation or pass "
                    "--set template.path=FILE."
                ),
            )
        if stop == start:
            found, fix = said("nothing that the template keeps of it"), said("Fill it in or delete the row.")
            raise _CanNotRender(name, found, said("text"), fix)
        return start, stop + 1

    # --- text ------------------------------------------------------------------------------------------------------

    def _write(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> _Text:
        (written,) = self._write_all([(messages, generation_prompt)])
        if isinstance(written, _CanNotRender):
            raise written
        return written

    def _write_all(self, asked: Sequence[Asked]) -> list[_Text | _CanNotRender]:
        written: list[_Text | _CanNotRender] = []
        for (messages, generation_prompt), text in zip(asked, self.template.write_all(asked), strict=True):
            if isinstance(text, Refused):
                found = said("a template that refuses it ({why})", why=text)
                fix = said("Change the row, or pass --set template.path=FILE.")
                written.append(_CanNotRender("conversation", found, said("a conversation it accepts"), fix))
            else:
                shape = _Shape(tuple(message.role for message in messages), generation_prompt)
                written.append(_Text(text, messages, shape))
        return written

    def _tokenise(self, texts: Sequence[_Text | _CanNotRender]) -> list[list[int] | _CanNotRender]:
        """Ids per text. Marks are those of the template alone: their sequence must be the one that neutral texts get;
        where it is not, a message spells one, and it is kept plain."""
        results: list[list[int] | _CanNotRender] = []
        encoded = iter(self._encode([text.text for text in texts if isinstance(text, _Text)]))
        for text in texts:
            if isinstance(text, _CanNotRender):
                results.append(text)
                continue
            ids = next(encoded)
            try:
                expected = self._marks_of_shape(text.shape)
                results.append(ids if self._marks_in(ids) == expected else self._keep_plain(text, ids, expected))
            except _CanNotRender as problem:
                results.append(problem)
        return results

    def _encode(self, texts: list[str]) -> list[list[int]]:
        backend = _backend(self.template.tokenizer)
        if backend is None:
            return self.template.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        # The wrapper around it takes four times as long.
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _special_in(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if i in self.template.special_ids]

    def _marks_in(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if i in self.template.special_ids or i in self.template.reply_ids]

    def _marks_of_shape(self, shape: _Shape) -> list[int]:
        if shape not in self._marks_of:
            neutral = [Message(role, "x") for role in shape.roles]  # type: ignore[arg-type]  # roles of messages
            self._marks_of[shape] = self._marks_written(neutral, shape)
        return self._marks_of[shape]

    def _marks_written(self, messages: Sequence[Message], shape: _Shape) -> list[int]:
        (ids,) = self._encode([self._write(messages, generation_prompt=shape.generation_prompt).text])
        return self._marks_in(ids)

    def _keep_plain(self, text: _Text, ids: list[int], expected: list[int]) -> list[int]:
        """Ids of a text in which messages spell marks: of the spellings' characters, but for what replies open."""
        plain = self._plain
        mark = next((chr(c) for c in _BREAKS if not any(chr(c) in m.content for m in text.messages)), None)
        if plain is None or mark is None:
            raise _CanNotRender("text", *_not_plain())
        broken = [
            Message(message.role, plain.broken(message.content, mark, of_reply=message.role == "assistant"))
            for message in text.messages
        ]
        if any(message.role == "assistant" for message in text.messages):
            replies = [m if m.role == "assistant" else Message(m.role, "x") for m in broken]
            with_replies = self._marks_written(replies, text.shape)
            if self._known(self._special_in(with_replies)) != self._known(self._special_in(expected)):
                raise _CanNotRender("text", *_not_plain())
            expected = with_replies
            if self._marks_in(ids) == expected:
                return ids
        written = self._write(broken, generation_prompt=text.shape.generation_prompt).text
        kept = plain.encode(written, mark)
        if kept is None or self._known(self._marks_in(kept)) != self._known(expected):
            raise _CanNotRender("text", *_not_plain())
        return kept

    @cached_property
    def _plain(self) -> _Plain | None:
        backend = _backend(self.template.tokenizer)
        plain = None if backend is None else _Plain(backend, self.template.special_ids, self.template.reply_ids)
        return plain if plain and plain.faithful else None

    def _known(self, ids: list[int]) -> list[int]:
        """Without the unknown token: a character that the tokenizer does not know is no spelling."""
        unknown = self.template.tokenizer.unk_token_id
        return ids if unknown in self._stops else [i for i in ids if i != unknown]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer's fast backend, told to cut and pad nothing (tokenizer.json may ask for it)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def _prompts_and_turns(conversation: Conversation) -> list[Asked]:
    """For each reply: the prompt that asks for it, and the conversation up to and including it."""
    messages = conversation.messages
    asked: list[Asked] = []
    for i, message in enumerate(messages):
        if message.role == "assistant":
            asked += [(messages[:i], True), (messages[: i + 1], False)]
    return asked


class _Plain:
    """Tokenises text in which some spellings of marks are only text.

    While the template runs, such spellings are broken by a private-use character, so the tokenizer finds only the
    template's own special tokens. Those are then replaced by sentinels, the breaks taken out, and the result goes
    through a copy of the tokenizer that knows the sentinels instead of the spellings. Everything else (merges, white
    space that markers swallow) stays as it is in one pass over the whole text.
    """

    def __init__(self, backend: Tokenizer, special_ids: frozenset[int], reply_ids: frozenset[int]) -> None:
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        spellings = {i: added[i].content for i in special_ids | reply_ids if i in added}
        self._sentinels = {i: chr(_PRIVATE + n) for n, i in enumerate(sorted(spellings))}
        self._spellings = _any_of(spellings.values())
        self._spellings_in_reply = _any_of(content for i, content in spellings.items() if i in special_ids)
        self._copy = Tokenizer(backend.model)  # shares the vocabulary, has no added tokens yet
        if backend.normalizer is not None:
            self._copy.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._copy.pre_tokenizer = backend.pre_tokenizer
        self.faithful = True
        """False where the vocabulary has holes and tokenizers gives an added token the id of a word."""
        self._original_id: dict[int, int] = {}
        contents = {i: self._sentinels.get(i, token.content) for i, token in sorted(added.items())}
        self._copy.add_tokens([_like(added[i], content) for i, content in contents.items()])
        for i, content in contents.items():
            copied = self._copy.token_to_id(content)
            assert copied is not None
            self._original_id[copied] = i
            self.faithful &= backend.model.id_to_token(copied) in (None, content)

    def broken(self, text: str, mark: str, *, of_reply: bool = False) -> str:
        """The text with `mark` inside every spelling of a mark; in a reply only of those that it may not open."""
        spellings = self._spellings_in_reply if of_reply else self._spellings
        return spellings.sub(lambda match: match.group()[:1] + mark + match.group()[1:], text)

    def encode(self, text: str, mark: str) -> list[int] | None:
        """Ids of the text without the marks; None where the text holds a sentinel's character already."""
        if any(sentinel in text for sentinel in self._sentinels.values()):
            return None
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)  # as `encode`, but others may run
        parts, done = [], 0
        for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if i in self._sentinels:
                parts += [text[done:start], self._sentinels[i]]
                done = stop
        rewritten = "".join([*parts, text[done:]]).replace(mark, "")
        ids = self._copy.encode_batch([rewritten], add_special_tokens=False)[0].ids
        return [self._original_id.get(i, i) for i in ids]


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _like(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )
