"""What a request gives a model to read: token ids, and the text that they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith import model as models
from tunesmith.chat import Chat
from tunesmith.errors import TunesmithError
from tunesmith.serving import wire
from tunesmith.serving.refusals import Refused, refusal
from tunesmith.types import Message
from tunesmith.writing import token_text


def _conversation(turns: Sequence[wire.ChatTurn]) -> list[Message]:
    return [Message("system" if turn.role == "developer" else turn.role, turn.text) for turn in turns]


def conversation_ids(chat: Chat, turns: Sequence[wire.ChatTurn]) -> tuple[int, ...]:
    """What asks for the next reply to a conversation."""
    try:
        return chat.prompt_ids(_conversation(turns))
    except TunesmithError as error:
        code = "context_length_exceeded" if error.found.endswith("tokens") else None
        raise Refused(refusal(400, str(error), param="messages", code=code)) from None


def text_prompts(chat: Chat, given: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Text and ids of each prompt."""
    several = isinstance(given, list) and not isinstance(given[0], int)
    return [_plain_prompt(chat, one) for one in (given if several else [given])]


def _plain_prompt(chat: Chat, given: str | list[int]) -> tuple[str, tuple[int, ...]]:
    template = chat.renderer.template
    if isinstance(given, str):
        try:
            text, ids = given, chat.renderer.text_ids(given)
        except TunesmithError as error:
            raise Refused(refusal(400, str(error), param="prompt")) from None
    else:
        n_words = models.n_words(chat.model)
        if unknown := next((i for i in given if i >= n_words), None):
            message = f"prompt: found token id {unknown}; expected at most {n_words - 1}. Tokenise for this model."
            raise Refused(refusal(400, message, param="prompt"))
        ids = tuple(given)
        text = str(template.tokenizer.decode(given, clean_up_tokenization_spaces=False))
    if not 0 < len(ids) < chat.context:
        found, expected = f"{len(ids)} tokens", f"at least one and fewer than {chat.context}"
        code = "context_length_exceeded" if ids else None
        message = f"prompt: found {found}; expected {expected}. Shorten it."
        raise Refused(refusal(400, message, param="prompt", code=code))
    return text, ids


def shown(chat: Chat, turns: Sequence[wire.ChatTurn]) -> wire.Prompt:
    """The same, token by token."""
    ids = conversation_ids(chat, turns)
    template = chat.renderer.template
    special = template.special_ids
    tokens = [wire.Token(id=i, text=token_text(template, i), special=i in special) for i in ids]
    return wire.Prompt(text=chat.prompt_text(_conversation(turns)), tokens=tokens)
