"""A document's tokens as text that a person can read: for the coloured preview and the report."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.data.render import Renderer
from tunesmith.types import Rendered


@dataclass(frozen=True, slots=True)
class Token:
    """One token, or several that only together make a whole character."""

    text: str
    supervised: bool


def tokens(renderer: Renderer, document: Rendered, at_most: int = 1000) -> list[Token]:
    """The first tokens of a document with their text; joined, the texts are the document's text."""
    decode = renderer.template.tokenizer.decode
    shown: list[Token] = []
    supervised = document.supervised
    start, written = 0, ""
    n_shown = min(len(document.token_ids), at_most)
    for stop in range(1, n_shown + 1):
        text = str(decode(list(document.token_ids[:stop]), clean_up_tokenization_spaces=False))
        is_last = stop == n_shown or supervised[stop] != supervised[start]
        if text.endswith("\ufffd") and not is_last:
            continue  # the character's other bytes are still to come
        shown.append(Token(text[len(written) :], supervised[start]))
        start, written = stop, text
    return shown
