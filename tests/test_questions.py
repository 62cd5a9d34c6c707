"""Questions a line each, and their answers as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Ended, finished, start
from tunesmith.errors import DataError
from tunesmith.evaluation import questions
from tunesmith.evaluation.questions import Question

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def asked(*lines: str) -> list[Question]:
    return questions.read([line + "\n" for line in lines], "asked.txt")


@given(st.lists(_TEXT, min_size=1), st.sampled_from(["prompt", "question", "instruction"]))
def test_the_same_questions_in_every_form(texts: list[str], name: str) -> None:
    as_text = [json.dumps(text) for text in texts]
    as_object = [json.dumps({name: text, "id": number}) for number, text in enumerate(texts)]
    as_messages = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in texts]
    for lines in (as_text, as_object, as_messages):
        assert [question.messages for question in asked(*lines)] == [[{"role": "user", "content": t}] for t in texts]
    assert [question.id for question in asked(*as_object)] == [*range(len(texts))]


def test_a_plain_line_is_the_question_whatever_is_in_it() -> None:
    lines = ["Who are you?", "", '  "Smile" is what?', "[1, 2]", "一加一？\r"]
    read = asked(*lines)
    assert [question.messages[0]["content"] for question in read] == [
        "Who are you?", '"Smile" is what?', "[1, 2]", "一加一？",
    ]  # fmt: skip
    assert [question.line for question in read] == [1, 3, 4, 5]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"prompt": "Who', "no JSON, though it begins with {"),
        ('{"instruction": "Add", "input": "1, 2"}', "the keys 'instruction', 'input'"),
        ('{"text": "Who are you?"}', "the keys 'text'"),
        ("{}", "no question"),
        ('{"prompt": ""}', "a question without text"),
        ('" "', "a question without text"),
        ('{"prompt": 3}', "a question without text"),
        ('{"messages": "Hi"}', "no list of messages"),
        ("\udcc4\udce3\udcba\udcc3", "bytes that are not UTF-8 (they read as GB18030: 你好)"),
    ],
)
def test_a_line_that_is_no_question_is_named(line: str, found: str) -> None:
    with pytest.raises(DataError) as refused:
        asked("Who are you?", line)
    assert refused.value.where == "asked.txt:2"
    assert found in refused.value.found


@pytest.mark.parametrize("lines", [(), ("", " \t")])
def test_no_question_at_all_is_an_error(lines: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="no question"):
        asked(*lines)


def test_an_own_system_text_comes_before_the_given_one() -> None:
    own, other = asked('{"messages": [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]}', "B")
    assert [turn["content"] for turn in own.talk("C")] == ["A", "B"]
    assert [turn["content"] for turn in other.talk("C")] == ["C", "B"]


def chat(model: Path, *lines: str) -> Ended:
    """What `tunesmith chat --json` makes of these lines on standard input."""
    return finished(start("chat", model, "--temperature", "0", "--json", "--max-tokens", "4", typed="\n".join(lines)))


def test_each_line_is_a_conversation_of_its_own(tiny_model: Path) -> None:
    ended = chat(tiny_model, "Who are you?", "Smile.", '{"prompt": "Who are you?", "id": "c"}')
    assert ended.code == 0, ended.err
    first, second, third = (json.loads(line) for line in ended.out.splitlines())
    assert first | {"line": 3, "id": "c"} == third
    assert second["prompt_ids"] != first["prompt_ids"]
    alone = finished(
        start("chat", tiny_model, "--temperature", "0", "--json", "--max-tokens", "4", "--prompt", "Smile.")
    )
    assert alone.json | {"line": 2} == second


def test_nothing_is_answered_where_a_later_line_can_not_be(tiny_model: Path) -> None:
    ended = chat(tiny_model, "Who are you?", '{"messages": [{"role": "assistant", "content": "Hi"}]}')
    assert ended.code == 2
    assert "standard input:2: conversation" in ended.err
    assert ended.json["error"]["found"] == "no user turn at the end"
