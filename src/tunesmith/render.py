"""Conversations become token ids with the replies marked: the one renderer of training, chat, API and export.

Token ids are the template's text, tokenised with add_special_tokens=False. A reply starts where its generation prompt
ends and stops behind the first stop token after that; both are found on ids and checked on every row:

    prompt ids  <|user|> Hi <|end|> <|assistant|>
    turn ids    <|user|> Hi <|end|> <|assistant|> Hello ! <|end|> <|endoftext|>
                must begin with the prompt ids    [reply -------)

Where a template writes a reply differently once it is history (Qwen3 drops its thinking), that reply becomes a
document of its own, so that what is learned is what the model will have to write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import jinja2
from tokenizers import AddedToken, Tokenizer

from tunesmith.errors import TemplateError
from tunesmith.template import Template
from tunesmith.types import Conversation, Fault, Message, Origin, Rendered, Role

_CHUNK = 2048
_PRIVATE = 0xF0000  # supplementary private use area A: sentinels for special tokens
_BREAK = 0xE000  # private use area: breaks a spelling while the template runs


class _CanNotRender(Exception):
    def __init__(self, field: str, found: str, expected: str, fix: str) -> None:
        self.parts = field, found, expected, fix


class _Text(NamedTuple):
    """Text to tokenise; `plain` says that some of it spells special tokens that must stay plain text."""

    text: str
    key: tuple[tuple[Role, ...], bool]
    messages: Sequence[Message]


class Renderer:
    """Renders with one template; cheap to make, keeps what it learns about the template."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self._stops = frozenset(template.stop_ids)
        self._special_sequences: dict[tuple[tuple[Role, ...], bool], list[int]] = {}

    def render_all(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Rendered, ...] | Fault]:
        """For each conversation its documents (one, but for templates that rewrite history), or what is wrong with it."""
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
        """What the model is given to write the next reply; raises TemplateError where the template refuses."""
        try:
            (ids,) = self._tokenise([self._write(messages, generation_prompt=True)])
            if isinstance(ids, _CanNotRender):
                raise ids
        except _CanNotRender as problem:
            field, *rest = problem.parts
            raise TemplateError(f"conversation: {field}", *rest) from None
        return tuple(ids)

    # --- whole chunks: the tokenizer works on all cores when it is given many texts ---------------------------------

    def _render_chunk(self, chunk: Sequence[Conversation]) -> Iterator[tuple[Rendered, ...] | Fault]:
        texts: list[_Text] = []
        spans: list[range | _CanNotRender] = []
        for conversation in chunk:
            start = len(texts)
            try:
                texts += self._prompts_and_turns(conversation)
                spans.append(range(start, len(texts)))
            except _CanNotRender as problem:
                del texts[start:]
                spans.append(problem)
        ids = self._tokenise(texts)
        for conversation, span in zip(chunk, spans, strict=True):
            try:
                if isinstance(span, _CanNotRender):
                    raise span
                yield self._documents([ids[i] for i in span], conversation.origin)
            except _CanNotRender as problem:
                yield Fault(conversation.origin, *problem.parts)

    def _prompts_and_turns(self, conversation: Conversation) -> list[_Text]:
        """For each reply: the prompt that asks for it, and the conversation up to and including it."""
        messages = conversation.messages
        texts = []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self._write(messages[:i], generation_prompt=True)
                turn = self._write(messages[: i + 1])
                texts += [prompt, turn]
        return texts

    def _documents(self, ids: Sequence[list[int] | _CanNotRender], origin: Origin) -> tuple[Rendered, ...]:
        documents: list[Rendered] = []
        replies: list[tuple[int, int]] = []
        for problem in ids:
            if isinstance(problem, _CanNotRender):
                raise problem
        pairs = [(ids[i], ids[i + 1]) for i in range(0, len(ids), 2)]
        for number, (prompt, turn) in enumerate(pairs):
            start = len(prompt)
            if turn[:start] != prompt:
                raise _CanNotRender(
                    "reply" if len(pairs) == 1 else f"reply {number + 1}",
                    "a beginning that melts into the prompt's last token",
                    "the same tokens as in chat",
                    "Delete white space at the beginning of the answer.",
                )
            stop = next((i for i in range(start, len(turn)) if turn[i] in self._stops), None)
            if stop is None:
                raise _CanNotRender("reply", "no stop token behind it", "one of the model's stop ids", "The template drops the end of this reply; shorten the conversation or pass --set template.path=FILE.")
            if stop == start:
                raise _CanNotRender("reply", "nothing that the template keeps of it", "text", "Fill it in or delete the row.")
            replies.append((start, stop + 1))
            following = pairs[number + 1] if number + 1 < len(pairs) else None
            if following is None or following[0][: stop + 1] != turn[: stop + 1]:
                documents.append(Rendered(tuple(turn), tuple(replies), origin))
                replies = []
        return tuple(documents)

    # --- text ------------------------------------------------------------------------------------------------------

    def _write(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> _Text:
        key = (tuple(message.role for message in messages), generation_prompt)
        try:
            return _Text(self.template.write(messages, generation_prompt=generation_prompt), key, messages)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _CanNotRender("conversation", f"a template that refuses it ({error})", "a conversation it accepts", "Change the row, or pass --set template.path=FILE.") from None

    def _tokenise(self, texts: Sequence[_Text]) -> list[list[int] | _CanNotRender]:
        """Ids per text. Special tokens are those of the template alone: their sequence must be the one that neutral
        texts get; where it is not, a message spells one, and the text goes through `_Plain`."""
        special = self.template.special_ids
        results: list[list[int] | _CanNotRender] = list(self._encode([text.text for text in texts]))
        for i, text in enumerate(texts):
            ids = results[i]
            assert isinstance(ids, list)
            if [t for t in ids if t in special] != self._special_sequence(text.key):
                try:
                    results[i] = self._keep_plain(text)
                except _CanNotRender as problem:
                    results[i] = problem
        return results

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        backend = getattr(self.template.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # the wrapper around it takes four times as long
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return self.template.tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def _special_sequence(self, key: tuple[tuple[Role, ...], bool]) -> list[int]:
        if key not in self._special_sequences:
            roles, generation_prompt = key
            neutral = [Message(role, "x") for role in roles]
            (ids,) = self._encode([self.template.write(neutral, generation_prompt=generation_prompt)])
            self._special_sequences[key] = [i for i in ids if i in self.template.special_ids]
        return self._special_sequences[key]

    def _keep_plain(self, text: _Text) -> list[int]:
        roles, generation_prompt = text.key
        unfaithful = _CanNotRender(
            "text", "a spelling that becomes a special token", "plain text", "Change the spelling, or leave the row out."
        )
        if self._plain is None:
            raise unfaithful
        mark = next((chr(c) for c in range(_BREAK, _BREAK + 99) if not any(chr(c) in m.content for m in text.messages)), None)
        if mark is None:
            raise unfaithful
        broken = [Message(m.role, self._plain.broken(m.content, mark)) for m in text.messages]
        written = self._write(broken, generation_prompt=generation_prompt).text
        ids = self._plain.encode(written, mark)
        if ids is None or [i for i in ids if i in self.template.special_ids] != self._special_sequence(text.key):
            raise unfaithful
        return ids

    @cached_property
    def _plain(self) -> _Plain | None:
        backend = getattr(self.template.tokenizer, "backend_tokenizer", None)
        return _Plain(backend, self.template.special_ids) if isinstance(backend, Tokenizer) else None


class _Plain:
    """Tokenises text in which some spellings of special tokens are only text.

    While the template runs, such spellings are broken by a private-use character, so the tokenizer finds only the
    template's own special tokens. Those are then replaced by sentinels, the breaks taken out, and the result goes
    through a copy of the tokenizer that knows the sentinels instead of the spellings. Everything else (merges, white
    space that markers swallow) stays as it is in one pass over the whole text.
    """

    def __init__(self, backend: Tokenizer, special_ids: frozenset[int]) -> None:
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._special = {i: added[i].content for i in special_ids if i in added}
        self._sentinels = {i: chr(_PRIVATE + n) for n, i in enumerate(sorted(self._special))}
        longest_first = sorted(self._special.values(), key=len, reverse=True)
        self._spellings = re.compile("|".join(re.escape(content) for content in longest_first))
        state = json.loads(backend.to_str())
        state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self._copy = Tokenizer.from_str(json.dumps(state))
        original: dict[str, int] = {}
        for i, token in sorted(added.items()):
            content = self._sentinels.get(i, token.content)
            original[content] = i
            self._copy.add_tokens(
                [AddedToken(content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized, special=False)]
            )
        self._original_id = {self._copy.token_to_id(content): i for content, i in original.items()}

    def broken(self, text: str, mark: str) -> str:
        """The text with `mark` inside every spelling of a special token."""
        return self._spellings.sub(lambda match: match.group()[:1] + mark + match.group()[1:], text)

    def encode(self, text: str, mark: str) -> list[int] | None:
        """Ids of the text without the marks; None where the text holds a sentinel's character already."""
        if any(_PRIVATE <= ord(c) < _PRIVATE + len(self._sentinels) for c in text):
            return None
        encoding = self._backend.encode(text, add_special_tokens=False)
        parts, done = [], 0
        for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if i in self._sentinels:
                parts += [text[done:start], self._sentinels[i]]
                done = stop
        rewritten = "".join([*parts, text[done:]]).replace(mark, "")
        ids = self._copy.encode(rewritten, add_special_tokens=False).ids
        return [self._original_id.get(i, i) for i in ids]
