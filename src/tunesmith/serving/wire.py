"""Requests and answers as OpenAI's clients write and read them (https://platform.openai.com/docs/api-reference).

Fields that are not known here are let be, for clients send many that ask for nothing. A field that asks for something
that is not done here takes only the values that ask for nothing, and anything else is refused. The first wrong item of
a list ends its reading: an error for each of a million items would take gigabytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_MESSAGES = 1024
MAX_PARTS = 1024
MAX_IDS = 1 << 20
MAX_CHOICES = 16
MAX_STOPS = 16
NOT_DONE = {
    "tools": "Functions are not called here.",
    "functions": "Functions are not called here.",
    "tool_calls": "Functions are not called here.",
    "function_call": "Functions are not called here.",
    "response_format": "Replies are text; ask for JSON in the prompt.",
    "logit_bias": "Single words can not be made likelier here.",
    "modalities": "Replies are text.",
    "audio": "Replies are text.",
    "prediction": "Nothing is predicted here.",
    "web_search_options": "Nothing is looked up here.",
    "suffix": "Text is only written at the end.",
    "best_of": "Ask for n replies and choose.",
}
"""Fields that ask for what is not done, and what to do instead."""


def _whole(text: str) -> str:
    """JSON can spell half a character, which no text holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("half_character", "whole characters, not half a surrogate pair") from error
    return text


_Text = Annotated[str, AfterValidator(_whole)]
_Nothing = Annotated[list[Any], Field(max_length=0)]
_NoEntries = Annotated[dict[str, Any], Field(max_length=0)]
_Stop = Annotated[_Text, Field(min_length=1, max_length=256)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]
_Several = Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(_Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: _Text


class ChatTurn(_Request):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    tool_calls: _Nothing | None = None
    function_call: None = None
    audio: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Request):
    include_usage: bool | None = Field(default=None, description="End the stream with the numbers of tokens.")


class TextFormat(_Request):
    type: Literal["text"]


class _Drawn(_Request):
    """What a reply's drawing depends on, and where it ends."""

    model: str = Field(description="One of /v1/models.")
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1, description="Longest reply in tokens.")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0 is greedy; default: as the model's generation config says."
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Draw from the likeliest words that make up this share."
    )
    seed: int | None = Field(default=None, description="The same request with the same seed has the same reply.")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Replies to give.")
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        default=None, description="Texts that end the reply; they do not belong to it."
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    stream: bool | None = Field(default=None, description="Answer with server-sent events, piece by piece.")
    stream_options: StreamOptions | None = None
    logit_bias: _NoEntries | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def tells_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(_Drawn):
    """POST /v1/chat/completions"""

    messages: list[ChatTurn] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1, description="As max_tokens.")
    logprobs: bool | None = Field(default=None, description="Tell every token's logarithmic probability.")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="And those of the likeliest words.")
    tools: _Nothing | None = None
    functions: _Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=MAX_CHOICES, fail_fast=True)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None


class CompletionRequest(_Drawn):
    """POST /v1/completions"""

    prompt: _Text | Annotated[list[_Text], _Several] | _Ids | Annotated[list[_Ids], _Several] = Field(
        description="Text, token ids, or several of them. Special tokens are given as ids; in a text, they are text."
    )
    echo: bool | None = Field(default=None, description="Give the prompt in front of the text.")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="So many likeliest words with every token.")
    suffix: None = None
    best_of: Literal[1] | None = None


class PromptRequest(_Request):
    """POST /tunesmith/prompt"""

    model: str = Field(description="One of /v1/models.")
    messages: list[ChatTurn] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)


# --- answers ----------------------------------------------------------------------------------------------------------


class Problem(BaseModel):
    """What is wrong: where, what was found, what was expected, what to do."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Refusal(BaseModel):
    """The answer to a request that can not be done."""

    error: Problem


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Likely(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Token(BaseModel):
    id: int
    text: str
    special: bool


class Prompt(BaseModel):
    """A rendered prompt: its text and its tokens."""

    text: str
    tokens: list[Token]


class Described(BaseModel):
    """A model as the chat page wants to know it."""

    id: str
    tuned: bool
    base: str
    """The id of the model that it is without its adapter."""
    system: str | None
    """Goes in front of a conversation that has no system text of its own."""
    context: int
    """How many tokens it can read, prompt and reply together."""
    template: str
    """Where its chat template comes from."""


class Health(BaseModel):
    status: Literal["ok", "closing"]
