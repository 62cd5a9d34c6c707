"""What a request gives a model to read: token ids, and the text that they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith import models
from tunesmith.chat import Chat
from tunesmith.data.writing import token_text
from tunesmith.errors import TunesmithError
from tunesmith.serving import wire
from tunesmith.serving.refusals import Refused, parsed, refusal
from tunesmith.serving.service import Served, Service
from tunesmith.types import Message

CHARACTERS_PER_TOKEN = 16
"""As many as a prompt may have for each token that there is room for: three times what texts have, so that a text which
can not fit is refused before it is tokenised, at a second for some 300,000 characters."""


def _conversation(turns: Sequence[wire.ChatTurn]) -> list[Message]:
    return [Message("system" if turn.role == "developer" else turn.role, turn.text) for turn in turns]


def of_chat(service: Service, body: bytes) -> tuple[wire.ChatRequest, Served, tuple[int, ...]]:
    """A request for the next reply to a conversation, who answers it, and the prompt's ids; raises Refused."""
    asked = parsed(body, wire.ChatRequest)
    served = service.served(asked.model)
    return asked, served, _conversation_ids(service, served.chat, asked.messages)


def of_completion(
    service: Service, body: bytes
) -> tuple[wire.CompletionRequest, Served, list[tuple[str, tuple[int, ...]]]]:
    """A request for what follows a text, who answers it, and text and ids of each prompt; raises Refused."""
    asked = parsed(body, wire.CompletionRequest)
    served = service.served(asked.model)
    if asked.echo and asked.logprobs is not None:
        message = "logprobs: found them with echo; expected one of the two. The prompt's are not computed."
        raise Refused(refusal(400, message, param="logprobs"))
    given: Any = asked.prompt
    prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    _check_characters(service, served.chat, [len(text) for text in prompts if isinstance(text, str)], "prompt")
    return asked, served, [_plain_prompt(served.chat, one) for one in prompts]


def shown(service: Service, body: bytes) -> str:
    """A `wire.Prompt` as JSON: what is read for a conversation, token by token; raises Refused."""
    asked = parsed(body, wire.PromptRequest)
    chat = service.served(asked.model).chat
    ids = _conversation_ids(service, chat, asked.messages)
    template = chat.renderer.template
    special = template.special_ids
    tokens = [wire.Token(id=i, text=token_text(template, i), special=i in special) for i in ids]
    return wire.Prompt(text=chat.prompt_text(_conversation(asked.messages)), tokens=tokens).model_dump_json()


def _check_characters(service: Service, chat: Chat, lengths: Sequence[int], param: str) -> None:
    """Raises Refused where a prompt, or all of them, can not be as few tokens as there is room for."""
    for found, tokens in ((max(lengths, default=0), chat.context), (sum(lengths), service.batch.share)):
        if found > (most := CHARACTERS_PER_TOKEN * tokens):
            message = f"{param}: found {found:,} characters; expected at most {most:,}. Shorten it."
            raise Refused(refusal(400, message, param=param, code="context_length_exceeded"))


def _conversation_ids(service: Service, chat: Chat, turns: Sequence[wire.ChatTurn]) -> tuple[int, ...]:
    """What asks for the next reply to a conversation."""
    _check_characters(service, chat, [sum(len(turn.text) for turn in turns)], "messages")
    try:
        return chat.prompt_ids(_conversation(turns))
    except TunesmithError as error:
        code = "context_length_exceeded" if error.found.endswith("tokens") else None
        raise Refused(refusal(400, str(error), param="messages", code=code)) from None


def _plain_prompt(chat: Chat, given: str | list[int]) -> tuple[str, tuple[int, ...]]:
    """Its text and its ids."""
    template = chat.renderer.template
    try:
        ids = chat.renderer.text_ids(given) if isinstance(given, str) else tuple(given)
    except TunesmithError as error:
        raise Refused(refusal(400, str(error), param="prompt")) from None
    if not 0 < len(ids) < chat.context:
        found, expected = f"{len(ids)} tokens", f"at least one and fewer than {chat.context}"
        code = "context_length_exceeded" if ids else None
        message = f"prompt: found {found}; expected {expected}. Shorten it."
        raise Refused(refusal(400, message, param="prompt", code=code))
    if isinstance(given, str):
        return given, ids
    n_words = models.n_words(chat.model)
    if unknown := next((i for i in ids if i >= n_words), None):
        message = f"prompt: found token id {unknown}; expected at most {n_words - 1}. Tokenise for this model."
        raise Refused(refusal(400, message, param="prompt"))
    return str(template.tokenizer.decode(given, clean_up_tokenization_spaces=False)), ids
