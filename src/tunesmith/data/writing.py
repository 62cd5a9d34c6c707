"""Token ids become text while they are written: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tokenizers import pre_tokenizers

from tunesmith.data.template import Template


def _bytes_of_letters() -> dict[str, int]:
    """Which byte each of the 256 letters of byte-level tokenizers stands for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    known = {letter: ord(letter) for letter in letters if ord(letter) < 256}  # bytes that print are letters themselves
    others = [letter for letter in letters if letter not in known]
    return known | dict(zip(others, sorted(set(range(256)) - set(known.values())), strict=True))


_LETTERS = _bytes_of_letters()


def token_bytes(template: Template, token_id: int) -> bytes:
    """The UTF-8 that a token stands for, which may be half a character."""
    tokenizer = template.tokenizer
    text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if not isinstance(piece, str):
        return b""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes([int(match[1], 16)])
    if "\ufffd" in text and all(letter in _LETTERS for letter in piece):
        return bytes(_LETTERS[letter] for letter in piece)
    if piece.startswith("▁") and not text.startswith(" "):
        text = " " + text  # a decoder takes the space in front of the first word for one of its own
    return text.encode()


def token_text(template: Template, token_id: int) -> str:
    """The same as text; a half character is shown as `\\xe5`, as OpenAI does."""
    given = token_bytes(template, token_id)
    try:
        return given.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in given)


@dataclass
class Text:
    """What a reader of a reply has been shown. Each token is decoded with the few before it, not with all."""

    template: Template
    stops: Sequence[str] = ()
    """Text that ends the reply and does not belong to it."""
    strip: bool = True
    """Without white space around, as chat shows a reply."""
    before: Sequence[int] = ()
    """Tokens that the reply goes on from, where it is a text's: its first word's space may stand between them."""
    whole: str = ""
    """All of it, once it has ended."""
    stopped: bool = False
    """A stop string was written."""
    _ids: list[int] = field(default_factory=list)
    _certain: str = ""
    """What can not change any more, of the tokens up to `_end`."""
    _begin: int = 0
    """The first of the tokens that the next ones are decoded with: a decoder may look at what stands before."""
    _end: int = 0
    _n_shown: int = 0

    def __post_init__(self) -> None:
        self._ids = list(self.before)
        self._end = len(self._ids)

    @property
    def n_certain(self) -> int:
        """Characters that can not change any more: where the next token's text begins, or the character that it goes
        on with."""
        return len(self._certain)

    def add(self, token_id: int) -> str:
        """What is shown from this token on that was not before; "" while a character or a stop string may go on."""
        if token_id in self.template.stop_ids:
            return ""
        self._ids.append(token_id)
        new = self._new()
        if not new or new.endswith("\ufffd"):  # half of a character
            return ""
        n_known = len(self._certain)
        self._certain += new
        self._begin, self._end = self._end, len(self._ids)
        text = self._before_stop(self._certain, n_known)
        return self._show(text if self.stopped else text[: len(text) - self._held_back(text)])

    def end(self) -> str:
        """What is left to show."""
        text = self._before_stop(self._certain + self._new(), 0)
        self.whole = text.strip() if self.strip else text
        return self._show(text)

    def _new(self) -> str:
        """What the tokens from `_end` on add."""
        known = _decoded(self.template, self._ids[self._begin : self._end])
        text = _decoded(self.template, self._ids[self._begin :])
        if text.startswith(known):
            return text[len(known) :]
        # Where bytes that stand together are decoded as one, half a character takes whole ones before it with it.
        return _decoded(self.template, self._ids[self._end :])

    def _before_stop(self, text: str, known: int) -> str:
        """The text up to the first stop string, of which none is complete in its first `known` characters."""
        longest = max(map(len, self.stops), default=0)
        found = [place for stop in self.stops if (place := text.find(stop, max(0, known - longest))) >= 0]
        self.stopped = bool(found)
        return text[: min(found)] if found else text

    def _held_back(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        lengths = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _show(self, text: str) -> str:
        if self.strip:
            text = text.strip()
        piece, self._n_shown = text[self._n_shown :], max(len(text), self._n_shown)
        return piece


def reply_text(template: Template, token_ids: Iterable[int]) -> str:
    """What a reader has been shown when a reply has ended."""
    text = Text(template)
    for token_id in token_ids:
        text.add(token_id)
    text.end()
    return text.whole


def _decoded(template: Template, token_ids: list[int]) -> str:
    return str(template.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
