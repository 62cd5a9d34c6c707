"""A trained chat template in the language of Ollama's, and the Modelfile around it.

What a template writes between the texts of a conversation is found by rendering conversations whose texts are marks:

    <s><|user|>Qz0<|end|><|assistant|>Qz1<|end|><|user|>Qz2<|end|><|assistant|>
    head       Qz0 to reply           Qz1 to question   Qz2 to write

If the same stands at the same places however long the conversation is, a loop over the messages says it all; else
Ollama's language, which knows no more than that, can not express the template.
https://github.com/ollama/ollama/blob/main/docs/template.md, docs/modelfile.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith import models
from tunesmith.chat import Chat
from tunesmith.data.template import Refused, Template
from tunesmith.errors import ModelError
from tunesmith.export import gguf_file, go_template
from tunesmith.export.live import Compared, at_least, talks
from tunesmith.language import marked, said
from tunesmith.types import Message, Role

_WHERE = "export --to ollama"
_GGUF = marked("Export it --to gguf: llama.cpp's own server uses the trained template itself.")
_MOST_CONTEXT = 8192
"""Tokens for which Ollama sets memory aside, where the model could read more."""


@dataclass(frozen=True)
class _Between:
    """What a template writes between texts."""

    head: str
    """Before the first question, where there is no system text."""
    system_head: str
    system_tail: str
    """Around a system text, up to the first question."""
    to_reply: str
    to_question: str
    to_write: str
    """Behind the last question: the generation prompt."""
    opening: tuple[str, str, str] | None
    """head, system_head and system_tail before a reply that comes first; None where the template refuses that."""


def template_of(template: Template) -> str:
    """The trained template in Go's language, over `.Messages` and `.System`.

    Raises ModelError where it writes something that such a template can not.
    """
    between = _between(template)
    lines = ['{{- $first := true }}{{ $last := "" }}{{ $system := .System }}', "{{- range .Messages }}"]
    if template.folds_system:
        head = _text(between.head)
        system = f'{{{{ if $system }}}}{{{{ $system }}}}{_text(between.system_tail)}{{{{ $system = "" }}}}{{{{ end }}}}'
        opening = "" if between.opening is None else _text(between.opening[0])
    else:
        head = _either(between.head, between.system_head, between.system_tail)
        system = ""
        opening = "" if between.opening is None else _either(*between.opening)
    lines += [
        '{{- if eq .Role "user" }}',
        f"{{{{- if $first }}}}{head}{{{{ else }}}}{_text(between.to_question)}{{{{ end }}}}{system}{{{{ .Content }}}}",
        "{{- $first = false }}{{ $last = .Role }}",
        '{{- else if eq .Role "assistant" }}',
    ]
    if between.opening is None:
        lines.append(
            f"{{{{- if not $first }}}}{_text(between.to_reply)}{{{{ .Content }}}}{{{{ $last = .Role }}}}{{{{ end }}}}"
        )
    else:
        lines += [
            f"{{{{- if $first }}}}{opening}{{{{ else }}}}{_text(between.to_reply)}{{{{ end }}}}{{{{ .Content }}}}",
            "{{- $first = false }}{{ $last = .Role }}",
        ]
    lines += ["{{- end }}", "{{- end }}", f'{{{{- if ne $last "assistant" }}}}{_text(between.to_write)}{{{{ end }}}}']
    return "\n".join(lines)


def _text(text: str) -> str:
    """A text as it stands, whatever it holds."""
    return f"{{{{ {go_template.quoted(text)} }}}}" if text else ""


def _either(head: str, system_head: str, system_tail: str) -> str:
    return (
        f"{{{{ if $system }}}}{_text(system_head)}{{{{ $system }}}}{_text(system_tail)}"
        f"{{{{ else }}}}{_text(head)}{{{{ end }}}}"
    )


def _between(template: Template) -> _Between:
    roles: list[Role] = ["user", "assistant", "user", "assistant", "user"]
    head, *rest = _apart(template, roles)
    to_reply, to_question, *later = rest
    to_write = rest[-1]
    with_system = _apart(template, ["system", *roles])
    short, short_with_system = _apart(template, ["user"]), _apart(template, ["system", "user"])
    if (
        later != [to_reply, to_question, to_write]
        or with_system[2:] != rest
        or short != [head, to_write]
        or short_with_system != [*with_system[:2], to_write]
    ):
        found = said("a chat template that writes a turn otherwise when other turns stand around it")
        raise ModelError(_WHERE, found, said("one that writes each turn alike"), said(_GGUF))
    return _Between(head, with_system[0], with_system[1], to_reply, to_question, to_write, _opening(template, rest))


def _opening(template: Template, rest: Sequence[str]) -> tuple[str, str, str] | None:
    """What stands before a reply that comes first; None where the template has no such conversation."""
    to_question, to_write = rest[1], rest[-1]
    try:
        alone = _apart(template, ["assistant", "user"])
        if template.folds_system:
            return (alone[0], "", "") if alone[1:] == [to_question, to_write] else None
        head, tail, *others = _apart(template, ["system", "assistant", "user"])
    except ModelError:
        return None
    return (alone[0], head, tail) if alone[1:] == others == [to_question, to_write] else None


def _apart(template: Template, roles: Sequence[Role]) -> list[str]:
    """What the template writes before, between and behind the texts of a conversation."""
    messages = [Message(role, f"Qz{number}") for number, role in enumerate(roles)]
    try:
        text = template.write(messages, generation_prompt=True)
    except Refused as error:
        raise ModelError(
            _WHERE,
            said("a chat template that refuses {names} ({error})", names=", ".join(roles), error=error),
            said("a prompt"),
            said(_GGUF),
        ) from None
    parts = re.split("|".join(message.content for message in messages), text)
    if re.findall(r"Qz\d", text) != [message.content for message in messages]:
        raise ModelError(
            _WHERE, said("a chat template that changes texts or their order"), said("each text once"), said(_GGUF)
        )
    return parts


def prompt(template: str, messages: Sequence[Message]) -> str:
    """What Ollama gives the model to write the next reply: system texts apart, neighbours of one role joined
    (template/template.go, `collate`)."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message.role:
            joined[-1]["Content"] += f"\n\n{message.content}"
        else:
            joined.append({"Role": message.role, "Content": message.content})
    return go_template.render(template, {"System": system, "Messages": joined, "Response": ""})


def trims(template: Template) -> bool:
    """Whether the trained template takes white space from around a text, which Ollama's can not."""
    kept = template.write([Message("user", " Qz0 ")], generation_prompt=True)
    return " Qz0 " not in kept


# --- the Modelfile ----------------------------------------------------------------------------------------------------


def modelfile(
    file_name: str,
    template: str,
    system: str | None,
    stops: Sequence[str],
    generation: Mapping[str, Any],
    context: int,
) -> str:
    """The text of a Modelfile. `generation` is a generation config's dictionary, `context` the model's, in tokens."""
    if system is not None and not _can_hold(system):
        template = f"{{{{- if not .System }}}}{{{{ $system = {go_template.quoted(system)} }}}}{{{{ end }}}}".join(
            template.partition("\n")[::2]
        )
        system = None
    lines = [f"FROM ./{file_name}", f'TEMPLATE """{template}"""']
    if system is not None:
        lines.append(f'SYSTEM """{system}"""')
    parameters = [("stop", f'"{stop}"') for stop in stops]
    parameters += [(name, str(value)) for name, value in _sampling(generation).items()]
    parameters.append(("num_ctx", str(min(context, _MOST_CONTEXT))))
    lines += [f"PARAMETER {name} {value}" for name, value in parameters]
    return "\n".join(lines) + "\n"


def _can_hold(text: str) -> bool:
    """Whether a Modelfile can hold a text: it drops what can not be seen, and ends a text in three quotes at the first
    line that ends in three (parser/parser.go)."""
    seen = all(letter.isprintable() or letter in "\n\t" for letter in text)
    return seen and not any(line.rstrip().endswith('"""') for line in text.split("\n"))


def _sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """As tunesmith's chat samples; what is not said here, Ollama would choose by itself."""
    penalty = {"repeat_penalty": generation.get("repetition_penalty") or 1.0}
    if not generation.get("do_sample"):
        return {"temperature": 0, **penalty}
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    chosen = {name: generation.get(name) for name in defaults}
    return {name: defaults[name] if value is None else value for name, value in chosen.items()} | penalty


@dataclass(frozen=True)
class Modelfile:
    """What Ollama is told, and the template in it."""

    text: str
    template: str
    """In Go's language."""


def modelfile_of(chat: Chat) -> Modelfile:
    """That of a run. Raises ModelError for a template that can not be said in Ollama's language."""
    template = chat.renderer.template
    written = template_of(template)
    stops = [template.tokenizer.convert_ids_to_tokens(stop) for stop in template.stop_ids]
    generation, context = chat.generation.to_dict(), models.context_length(chat.model.config)
    if (limit := gguf_file.alike_up_to(chat.model.config)) is not None:
        context = min(context, limit[0])
    return Modelfile(
        modelfile("model.gguf", written, chat.system, [str(stop) for stop in stops], generation, context),
        written,
    )


def talks_alike(written: str, template: Template, notes: list[str]) -> list[Compared]:
    """Conversations by the template for Ollama and by the trained one, as token ids."""
    known = talks(template)
    tokenizer = template.tokenizer
    same = sum(
        tokenizer(prompt(written, talk), add_special_tokens=False)["input_ids"]
        == tokenizer(text, add_special_tokens=False)["input_ids"]
        for talk, text in known
    )
    if trims(template):
        notes.append(said("White space around a message, which the trained template takes away, stays in Ollama."))
    return [at_least(marked("Ollama: same token ids of conversations"), same / len(known), 1)]
