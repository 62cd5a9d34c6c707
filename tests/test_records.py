"""Data files: every form of a row, and every fault named by its line, in one pass."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import records
from tunesmith.errors import DataError
from tunesmith.types import Conversation, Fault

GOOD = {"instruction": "Who are you?", "output": "I am Bo."}
ASK, REPLY = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Bo."}
HUMAN = {"from": "human", "value": "Who are you?"}


def save(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*rows: Any) -> str:
    """A line per row; a text stands as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


class Read(NamedTuple):
    """A file read to its end."""

    path: str
    format: str
    digest: str
    conversations: list[Conversation]
    faults: list[Fault]

    @property
    def n_rows(self) -> int:
        return len(self.conversations) + len(self.faults)


def contents(path: Path | str, *arguments: Any, **named: Any) -> Read:
    file = records.open_file(path, *arguments, **named)
    rows = list(file.rows())
    conversations = [row for row in rows if isinstance(row, Conversation)]
    return Read(file.path, file.format, file.digest, conversations, [row for row in rows if isinstance(row, Fault)])


def said(found: Read) -> list[list[tuple[str, str]]]:
    return [[(message.role, message.content) for message in talk.messages] for talk in found.conversations]


def read_one(folder: Path, row: Any, **arguments: Any) -> list[tuple[str, str]]:
    """What the single good row of a file says."""
    found = contents(save(folder, jsonl(row)), **arguments)
    assert found.faults == []
    (messages,) = said(found)
    return messages


def fault_of(folder: Path, row: Any, **arguments: Any) -> Fault:
    """The fault of a row that stands in line 2, between two good ones."""
    found = contents(save(folder, jsonl(GOOD, row, GOOD)), **arguments)
    assert (found.n_rows, len(found.conversations)) == (3, 2)
    (fault,) = found.faults
    assert fault.origin.line == 2
    return fault


def refused(path: Path, **arguments: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        contents(path, **arguments)
    return caught.value


# --- what a row says --------------------------------------------------------------------------------------------------


def test_instruction_and_input_are_joined_by_a_newline(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "你好", "output": "Hello"}
    assert read_one(tmp_path, row) == [("user", "Translate.\n你好"), ("assistant", "Hello")]


@pytest.mark.parametrize("more", [{}, {"input": ""}, {"input": None}, {"input": " \n"}])
def test_without_input_the_instruction_stands_alone(tmp_path: Path, more: dict[str, Any]) -> None:
    assert read_one(tmp_path, {**GOOD, **more}) == [("user", "Who are you?"), ("assistant", "I am Bo.")]


def test_an_input_may_stand_for_an_empty_instruction(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"instruction": "", "input": "Hi", "output": "Yo"})[0] == ("user", "Hi")


def test_white_space_inside_texts_is_kept(tmp_path: Path) -> None:
    row = {"instruction": " a \n", "input": "\tb", "output": " c\n\n"}
    assert read_one(tmp_path, row) == [("user", " a \n\n\tb"), ("assistant", " c\n\n")]


def test_history_and_system_come_first(tmp_path: Path) -> None:
    row = {**GOOD, "system": "Be Bo.", "history": [["Hi", "Hello"], ["Well?", "Well."]]}
    assert read_one(tmp_path, row) == [
        ("system", "Be Bo."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Well?"),
        ("assistant", "Well."),
        ("user", "Who are you?"),
        ("assistant", "I am Bo."),
    ]


@pytest.mark.parametrize("more", [{"system": None}, {"system": ""}, {"history": None}, {"history": []}])
def test_empty_history_and_system_are_none(tmp_path: Path, more: dict[str, Any]) -> None:
    assert len(read_one(tmp_path, {**GOOD, **more})) == 2


def test_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "Be Bo."}, ASK, REPLY, ASK, {**REPLY, "content": "Still Bo."}]}
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = read_one(tmp_path, row)
    assert [role for role, _ in messages] == roles
    assert messages[-1] == ("assistant", "Still Bo.")


def test_sharegpt_roles_are_translated(tmp_path: Path) -> None:
    turns = [{"from": role, "value": role} for role in ("system", "human", "gpt", "user", "assistant")]
    assert read_one(tmp_path, {"conversations": turns}) == [
        ("system", "system"),
        ("user", "human"),
        ("assistant", "gpt"),
        ("user", "user"),
        ("assistant", "assistant"),
    ]


def test_sharegpt_may_keep_the_system_text_beside_the_talk(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    assert read_one(tmp_path, {"conversations": turns, "system": "Be Bo."})[0] == ("system", "Be Bo.")


def test_a_system_text_for_all_stands_only_where_a_row_has_none(tmp_path: Path) -> None:
    path = save(tmp_path, jsonl(GOOD, {**GOOD, "system": "Own."}, {"messages": [ASK, REPLY]}))
    found = contents(path, system="For all.")
    assert [messages[0] for messages in said(found)] == [("system", text) for text in ("For all.", "Own.", "For all.")]


def test_other_columns_are_mapped(tmp_path: Path) -> None:
    columns = {"instruction": "q", "input": "context", "output": "a", "system": "persona", "history": "before"}
    row = {"q": "Who?", "context": "Here.", "a": "Bo.", "persona": "Be Bo.", "before": [["x", "y"]], "output": 5}
    assert read_one(tmp_path, row, columns=columns) == [
        ("system", "Be Bo."),
        ("user", "x"),
        ("assistant", "y"),
        ("user", "Who?\nHere."),
        ("assistant", "Bo."),
    ]
    assert read_one(tmp_path, {"talk": [ASK, REPLY]}, columns={"messages": "talk"})[1] == ("assistant", "I am Bo.")


def test_fields_that_nobody_asked_for_are_left_alone(tmp_path: Path) -> None:
    row = {**GOOD, "id": 7, "tags": ["a"], "score": None, "nested": {"deep": [[[]]]}, "task": "x"}
    assert len(read_one(tmp_path, row)) == 2


# --- files ------------------------------------------------------------------------------------------------------------

THREE = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(3)]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (json.dumps(THREE), [1, 1, 1]),
        (json.dumps(THREE, indent=0), [2, 6, 10]),
        (json.dumps(THREE, indent=4), [2, 6, 10]),
        ("[\n" + ",\n".join(json.dumps(row) for row in THREE) + "\n]", [2, 3, 4]),
        ("\n\n [" + "\n, ".join(json.dumps(row) for row in THREE) + "]\n\n", [3, 4, 5]),
        ("[\r\n" + ",\r\n".join(json.dumps(row) for row in THREE) + "\r\n]\r\n", [2, 3, 4]),
    ],
)
def test_a_row_of_an_array_stands_where_its_object_begins(tmp_path: Path, content: str, lines: list[int]) -> None:
    found = contents(save(tmp_path, content, "rows.json"))
    assert found.format == "json"
    assert [talk.origin.line for talk in found.conversations] == lines
    assert [messages[0][1] for messages in said(found)] == ["q0", "q1", "q2"]


def test_blank_lines_of_jsonl_are_counted_but_are_no_rows(tmp_path: Path) -> None:
    path = save(tmp_path, "\n" + jsonl(THREE[0], "", "  \t", THREE[1]) + "\n" + json.dumps(THREE[2]))
    found = contents(path)
    assert found.n_rows == 3 and found.faults == []
    assert [talk.origin.line for talk in found.conversations] == [2, 5, 7]


def test_only_a_newline_ends_a_line_of_jsonl(tmp_path: Path) -> None:
    """Prevents lines that count differently from the editor's: U+2028 and form feeds stand inside texts."""
    text = "a\u2028b\u0085c\x0b"
    path = save(tmp_path, json.dumps({"instruction": text, "output": text}, ensure_ascii=False).replace("\\u000b", " "))
    assert contents(path).conversations[0].messages[0].content == text.replace("\x0b", " ")
    rows = [json.dumps({"instruction": "a\u2028b\u0085c", "output": "x"}, ensure_ascii=False)] * 2
    found = contents(save(tmp_path, "\r\n".join(rows)))
    assert [talk.origin.line for talk in found.conversations] == [1, 2]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt", "rows"])
def test_json_and_jsonl_are_told_apart_by_their_first_character(tmp_path: Path, name: str) -> None:
    assert contents(save(tmp_path, json.dumps(THREE), name)).format == "json"
    assert contents(save(tmp_path, jsonl(*THREE), name)).format == "jsonl"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (json.dumps(THREE), "rows.json"),
        (jsonl(*THREE), "rows.jsonl"),
        ("instruction,output\nq0,a0\nq1,a1\nq2,a2\n", "rows.csv"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path, content: str, name: str) -> None:
    """Prevents 'no column instruction' for every file that Excel or Notepad has saved."""
    found = contents(save(tmp_path, b"\xef\xbb\xbf" + content.encode(), name))
    assert [messages[0][1] for messages in said(found)] == ["q0", "q1", "q2"]


def test_cells_of_csv_may_hold_quotes_commas_and_line_breaks(tmp_path: Path) -> None:
    content = 'instruction,input,output\n"a, ""b""\n\nc",,d\ne,f,g\n\n"h","","i\nj"\nk,,l\n'
    found = contents(save(tmp_path, content, "rows.csv"))
    assert said(found) == [
        [("user", 'a, "b"\n\nc'), ("assistant", "d")],
        [("user", "e\nf"), ("assistant", "g")],
        [("user", "h"), ("assistant", "i\nj")],
        [("user", "k"), ("assistant", "l")],
    ]
    assert [talk.origin.line for talk in found.conversations] == [2, 5, 7, 9]


def test_the_columns_of_csv_may_stand_in_any_order_with_others_between(tmp_path: Path) -> None:
    found = contents(save(tmp_path, "id, output ,instruction\r\n1,a,q\r\n", "rows.csv"))
    assert said(found) == [[("user", "q"), ("assistant", "a")]]


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        ("question,answer", "flags={'data.columns.instruction': 'question', 'data.columns.output': 'answer'}"),
        ("prompt,completion", "flags={'data.columns.instruction': 'prompt', 'data.columns.output': 'completion'}"),
        ("instruction,response", "flags={'data.columns.output': 'response'}"),
        ("Instruction,Output", "flags={'data.columns.instruction': 'Instruction', 'data.columns.output': 'Output'}"),
        ("instrution,ouput", "flags={'data.columns.instruction': 'instrution', 'data.columns.output': 'ouput'}"),
        ("instruction,the answer,output text", "flags={'data.columns.output': 'output text'}"),
        ("instruction;output", "Separate the columns by commas, not by ';'."),
        ("instruction\toutput", "Separate the columns by commas, not by tabs."),
        ("x,y", "flags={'data.columns.output': 'answer'}"),
    ],
)
def test_another_header_is_refused_with_the_flags_that_map_it(tmp_path: Path, header: str, hint: str) -> None:
    path = save(tmp_path, f"{header}\na,b\n", "rows.csv")
    error = refused(path)
    assert error.where == f"{path}:1"
    assert "columns instruction and output" in error.expected
    assert hint in error.fix


def test_the_hint_for_another_header_works(tmp_path: Path) -> None:
    from tunesmith.recipe import resolve

    path = save(tmp_path, "question,answer\nWho?,Bo.\n", "rows.csv")
    flags = ast.literal_eval(refused(path).fix.removeprefix("Try flags="))
    columns = resolve(None, flags)[0].data.columns
    assert said(contents(path, columns)) == [[("user", "Who?"), ("assistant", "Bo.")]]


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    assert "twice" in refused(save(tmp_path, "instruction,output,output\na,b,c\n", "rows.csv")).found


def test_faults_of_csv_are_named_by_the_line_where_the_row_begins(tmp_path: Path) -> None:
    content = 'instruction,output\n"a\nb",c\nonly one\nd,\n"e\n\nf",g,h\ni,j\n"k\nl",  \nm,"n"o\np,q\n'
    found = contents(save(tmp_path, content, "rows.csv"))
    assert [talk.origin.line for talk in found.conversations] == [2, 9]
    assert [(fault.origin.line, fault.field) for fault in found.faults] == [
        (4, "row"),
        (5, "output"),
        (6, "row"),
        (10, "output"),
        (12, "row"),
    ]
    assert "1 cells" in found.faults[0].found and "2, as in the header" in found.faults[0].expected
    assert "Reading stopped here" in found.faults[-1].fix
    assert found.n_rows == 7


def test_a_quote_that_never_closes_is_named_where_it_opens(tmp_path: Path) -> None:
    found = contents(save(tmp_path, 'instruction,output\na,b\nc,"d\ne,f\n', "rows.csv"))
    (fault,) = found.faults
    assert fault.origin.line == 3 and len(found.conversations) == 1


def parquet(folder: Path, rows: list[dict[str, Any]], name: str = "rows.parquet", **arguments: Any) -> Path:
    path = folder / name
    pq.write_table(pa.Table.from_pylist(rows), path, **arguments)
    return path


def test_rows_of_parquet_are_counted(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "input": None, "output": None if i in (4, 8) else f"a{i}"} for i in range(9)]
    found = contents(parquet(tmp_path, rows, row_group_size=2))
    assert (found.format, found.n_rows, len(found.conversations)) == ("parquet", 9, 7)
    assert [talk.origin.line for talk in found.conversations] == [1, 2, 3, 4, 6, 7, 8]
    assert [str(fault.origin) for fault in found.faults] == [f"{found.path}:row 5", f"{found.path}:row 9"]
    assert all((fault.field, fault.found) == ("output", "null") for fault in found.faults)


def test_parquet_may_hold_talks(tmp_path: Path) -> None:
    talks = [[("human", "Hi"), ("gpt", "Yo")], [("human", "Who?"), ("gpt", "Bo."), ("human", "Bye"), ("gpt", "Bye.")]]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in talk], "system": None} for talk in talks]
    assert [len(messages) for messages in said(contents(parquet(tmp_path, rows, "data.bin")))] == [2, 4]


def test_a_null_in_a_mapped_column_of_parquet_is_a_null(tmp_path: Path) -> None:
    """Prevents 'no such field' for a field that is there: Parquet has every column in every row."""
    rows = [{"q": "Who?", "answer": "Bo."}, {"q": "Who?", "answer": None}]
    found = contents(parquet(tmp_path, rows), {"instruction": "q", "output": "answer"})
    (fault,) = found.faults
    assert (fault.origin.line, fault.field, fault.found) == (2, "answer", "null")


def test_forms_may_be_mixed_in_a_parquet_file(tmp_path: Path) -> None:
    rows = [
        {"instruction": "q", "output": "a", "messages": None},
        {"instruction": None, "output": None, "messages": [ASK, REPLY]},
    ]
    assert [messages[1][1] for messages in said(contents(parquet(tmp_path, rows)))] == ["a", "I am Bo."]


def test_types_that_only_parquet_has_are_no_text(tmp_path: Path) -> None:
    found = contents(parquet(tmp_path, [{"instruction": "q", "output": b"a"}]))
    assert "bytes" in found.faults[0].found


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path, [GOOD] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    assert "damaged Parquet" in refused(path).found


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (None, "null"),
        ("", "no text"),
        (" \n\t\u3000", "no text"),
        (42, "the number 42"),
        (1.5, "the number 1.5"),
        (10**60, "the number 1"),
        (float("nan"), "the number nan"),
        (False, "the truth value false"),
        (["a", "b"], 'a list (\'["a", "b"]\')'),
        ([], "a list that is empty"),
        ({"text": "a"}, 'an object (\'{"text": "a"}\')'),
    ],
)
def test_an_answer_that_is_no_text_is_a_fault(tmp_path: Path, answer: object, found: str) -> None:
    for row, field in (
        ({"instruction": "Who?", "output": answer}, "output"),
        ({"messages": [ASK, {"role": "assistant", "content": answer}]}, "messages[1].content"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": answer}]}, "conversations[1].value"),
        ({**GOOD, "history": [["x", answer]]}, "history[0][1]"),
    ):
        fault = fault_of(tmp_path, row)
        assert fault.field == field
        assert fault.found.startswith(found)
        assert len(fault.found) < 120


@pytest.mark.parametrize("question", [None, "", "  ", 3, ["x"]])
def test_a_question_that_is_no_text_is_a_fault(tmp_path: Path, question: object) -> None:
    assert fault_of(tmp_path, {"instruction": question, "output": "x"}).field == "instruction"
    assert fault_of(tmp_path, {"messages": [{**ASK, "content": question}, REPLY]}).field == "messages[0].content"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"input": 3}, "input"),
        ({"system": ["x"]}, "system"),
        ({"history": "x"}, "history"),
        ({"history": [["x"]]}, "history[0]"),
        ({"history": [["x", "y"], {"q": "a"}]}, "history[1]"),
    ],
)
def test_what_stands_around_the_question_must_be_well_formed(tmp_path: Path, more: dict[str, Any], field: str) -> None:
    assert fault_of(tmp_path, {**GOOD, **more}).field == field


@pytest.mark.parametrize(
    ("row", "field", "found", "flag"),
    [
        ({"instrution": "q", "output": "a"}, "instruction", "instrution", "data.columns.instruction=instrution"),
        ({"instruction": "q", "inputs": "x", "output": "a"}, "input", "inputs", "data.columns.input=inputs"),
        ({"instruction": "q", "ouput": "a"}, "output", "ouput", "data.columns.output=ouput"),
        ({"instruction": "q", "Output": "a"}, "output", "Output", "data.columns.output=Output"),
        ({**GOOD, "histroy": [["a", "b"]]}, "history", "histroy", "data.columns.history=histroy"),
        ({**GOOD, "sytem": "x"}, "system", "sytem", "data.columns.system=sytem"),
        ({"prompt": "q", "completion": "a"}, "instruction", "prompt", "data.columns.instruction=prompt"),
        ({"instruction": "q", "response": "a"}, "output", "response", "data.columns.output=response"),
        ({"message": [ASK, REPLY]}, "messages", "message", "data.columns.messages=message"),
        ({"dialog": [{"from": "human", "value": "x"}]}, "conversations", "dialog", "data.columns.conversations=dialog"),
        ({"output": "a", "more": 1}, "instruction", "only 'output', 'more'", "data.columns.instruction=…"),
    ],
)
def test_a_misspelt_field_is_a_fault_with_the_flag_that_maps_it(
    tmp_path: Path, row: dict[str, Any], field: str, found: str, flag: str
) -> None:
    fault = fault_of(tmp_path, row)
    assert fault.field == field
    assert found in fault.found
    assert f"--set {flag}" in fault.fix


@pytest.mark.parametrize(
    ("row", "field", "found"),
    [
        ({"instruction": "q"}, "output", "only 'instruction'"),
        ({"output": "a"}, "instruction", "only 'output'"),
        ({}, "instruction", "an empty object"),
    ],
)
def test_where_nothing_could_be_renamed_it_is_to_be_written(
    tmp_path: Path, row: dict[str, Any], field: str, found: str
) -> None:
    fault = fault_of(tmp_path, row)
    assert (fault.field, fault.found) == (field, found)
    assert fault.fix == "Write what is missing into the row, or leave the row out."


def test_a_misspelt_input_is_never_dropped_in_silence(tmp_path: Path) -> None:
    """Prevents training on questions without their context: the row would be complete without the misspelt field."""
    assert contents(save(tmp_path, jsonl({**GOOD, "inputs": "x"}))).conversations == []


def test_rows_inside_an_object_are_pointed_at(tmp_path: Path) -> None:
    path = save(tmp_path, json.dumps({"version": 1, "data": [GOOD, GOOD]}), "rows.json")
    (fault,) = contents(path).faults
    assert "'data'" in fault.found and "the rows themselves" in fault.expected
    pretty = save(tmp_path, json.dumps({"version": 1, "data": [GOOD, GOOD]}, indent=2), "pretty.json")
    error = refused(pretty)
    assert error.where == f"{pretty}:1" and "'data'" in error.fix


def test_objects_over_several_lines_are_one_mistake_not_many(tmp_path: Path) -> None:
    path = save(tmp_path, "\n" + "\n".join(json.dumps(row, indent=2) for row in THREE), "rows.json")
    error = refused(path)
    assert (error.where, error.found) == (f"{path}:2", "an object over several lines")
    broken = save(tmp_path, '{\n "instruction": "q",\n "output": a\n}\n', "broken.json")
    assert refused(broken).where == f"{broken}:3"


@pytest.mark.parametrize("row", ["a text", 5, None, True, [], ["a", "b"]])
def test_a_row_that_is_no_object_is_a_fault(tmp_path: Path, row: object) -> None:
    assert fault_of(tmp_path, json.dumps(row)).field == "row"
    found = contents(save(tmp_path, json.dumps([GOOD, row, GOOD], indent=1), "rows.json"))
    assert [(fault.origin.line, fault.field) for fault in found.faults] == [(6, "row")]
    assert len(found.conversations) == 2


S, U, A = {"role": "system", "content": "s"}, ASK, REPLY


@pytest.mark.parametrize(
    ("turns", "field", "found"),
    [
        ([U, U, A], "messages[1]", "two user turns in a row"),
        ([U, A, A], "messages[2]", "two assistant turns in a row"),
        ([S, S, U, A], "messages[1]", "a system turn"),
        ([U, S, A], "messages[1]", "a system turn"),
        ([U, A, S, U, A], "messages[2]", "a system turn"),
        ([A, U, A], "messages[0]", "a reply that nobody asked for"),
        ([S, A], "messages[1]", "a reply that nobody asked for"),
        ([U, A, U], "messages[2]", "a user turn at the end"),
        ([S], "messages[0]", "a system turn at the end"),
        ([], "messages", "a list that is empty"),
        ({"role": "user"}, "messages", "an object"),
        ("hello", "messages", "'hello'"),
        (None, "messages", "null"),
        ([U, "hello"], "messages[1]", "'hello'"),
        ([U, {"role": "assistant"}], "messages[1]", "only 'role'"),
        ([U, {"content": "x"}], "messages[1]", "only 'content'"),
        ([U, {}], "messages[1]", "an empty object"),
    ],
)
def test_turns_out_of_order_are_a_fault(tmp_path: Path, turns: Any, field: str, found: str) -> None:
    fault = fault_of(tmp_path, {"messages": turns})
    assert (fault.field, fault.found[: len(found)]) == (field, found)


def test_a_system_text_for_all_does_not_shift_the_turns_that_are_named(tmp_path: Path) -> None:
    assert fault_of(tmp_path, {"messages": [U, U, A]}, system="For all.").field == "messages[1]"
    assert fault_of(tmp_path, {"messages": [U, U, A], "system": "Own."}).field == "messages[1]"


def test_two_system_texts_are_a_fault(tmp_path: Path) -> None:
    assert fault_of(tmp_path, {"messages": [S, U, A], "system": "Another."}).field == "system"
    assert fault_of(tmp_path, {"messages": [U, A], "system": 5}).field == "system"


@pytest.mark.parametrize(
    ("role", "hint"),
    [
        ("asistant", "'assistant'"),
        ("User", "'user'"),
        ("ASSISTANT", "'assistant'"),
        ("tool", "leave the turn out"),
        (None, "leave the turn out"),
        (["user"], ""),
    ],
)
def test_an_unknown_role_is_a_fault(tmp_path: Path, role: object, hint: str) -> None:
    fault = fault_of(tmp_path, {"messages": [U, A, {"role": role, "content": "x"}, A]})
    assert fault.field == "messages[2].role"
    assert "system, user or assistant" in fault.expected
    assert hint in fault.fix


@pytest.mark.parametrize(
    ("row", "field", "key"),
    [
        ('{"instruction": "q", "output": "a", "output": "b"}', "output", "output"),
        ('{"instruction": "q", "output": "a", "id": 1, "id": 1}', "id", "id"),
        ('{"messages": [{"role": "user", "content": "q", "role": "user"}]}', "messages[0].role", "role"),
        ('{"instruction": "q", "output": "a", "meta": {"tags": [{"x": 1}, {"x": 1, "x": 2}]}}', "meta.tags[1].x", "x"),
    ],
)
def test_a_key_that_stands_twice_in_one_object_is_a_fault(tmp_path: Path, row: str, field: str, key: str) -> None:
    """Prevents training on whichever of two answers the JSON reader happens to keep."""
    fault = fault_of(tmp_path, row)
    assert (fault.field, fault.found) == (field, f"'{key}' twice in one object")
    found = contents(save(tmp_path, f"[\n{json.dumps(GOOD)},\n{row}\n]", "rows.json"))
    assert [(f.origin.line, f.field) for f in found.faults] == [(3, field)]


@pytest.mark.parametrize(
    ("spelt", "found"),
    [
        ("cut \\ud83d", "half a character (\\ud83d)"),
        ("\\ude00 cut", "half a character (\\ude00)"),
        ("a\\u0000b", "the character NUL"),
    ],
)
def test_texts_that_no_tokenizer_can_take_are_a_fault(tmp_path: Path, spelt: str, found: str) -> None:
    fault = fault_of(tmp_path, json.dumps(GOOD).replace("I am Bo.", spelt))
    assert (fault.field, found in fault.found) == ("output", True)
    assert (
        fault_of(tmp_path, json.dumps({"messages": [ASK, REPLY]}).replace("Who are you?", spelt)).field
        == "messages[0].content"
    )


def test_whole_emoji_and_all_other_characters_are_kept(tmp_path: Path) -> None:
    text = "😀 \\ud83d é 中文 \u200d\ufeff \x07"
    assert read_one(tmp_path, {"instruction": text, "output": "\U0001f9d9‍♂️"})[0][1] == text
    assert read_one(tmp_path, '{"instruction": "\\ud83d\\ude00", "output": "x"}')[0][1] == "😀"


def test_what_is_shown_of_a_row_can_be_printed(tmp_path: Path) -> None:
    """Prevents a fault that breaks its own message: half characters can not be written, escapes move the cursor."""
    row = '{"messages": [{"role": "\\u001b[2J\\ud800", "content": "x"}]}'
    for fault in (fault_of(tmp_path, row), fault_of(tmp_path, '{"\\ud800\\u001b": 1, "\\ud800\\u001b": 2}')):
        assert str(fault).isprintable()
        str(fault).encode()


@pytest.mark.parametrize("depth", [985, 988, 990, 992, 2000, 100_000])
def test_brackets_nested_too_deep_are_a_fault(tmp_path: Path, depth: int) -> None:
    nest = "[" * depth + "]" * depth
    assert fault_of(tmp_path, f'{{"instruction": "q", "output": {nest}}}').field in ("row", "output")
    path = save(tmp_path, f'[\n{json.dumps(GOOD)},\n{{"instruction": "q", "output": {nest}}}]', "rows.json")
    (fault,) = contents(path).faults
    assert fault.origin.line == 3


def test_a_number_too_long_for_python_is_a_fault(tmp_path: Path) -> None:
    assert fault_of(tmp_path, f'{{"instruction": "q", "output": {"9" * 5000}}}').expected == "shorter numbers"


ROW = '{"instruction": "q", "output": "a"}'


@pytest.mark.parametrize(
    ("content", "line", "found", "expected"),
    [
        (f"[\n{ROW},\n{ROW},\n]\n", 4, "']'", "no comma in front of it"),
        (f'[\n{ROW},\n{{"instruction": "q",\n "output": "a",\n}}\n]\n', 5, "'}'", "no comma in front of it"),
        (f"[\n{ROW}\n{ROW}\n]\n", 3, "'{\"instruction", "',' or ']' after an object"),
        (f"[\n{ROW},\n{ROW},\n\n", 5, "the end of the file", "a value"),
        (f"[\n{ROW},\n{ROW}\n", 4, "the end of the file", "',' or ']' after an object"),
        (f'[\n{ROW},\n{{"instruction": "q", "out', 3, "'\"out'", "a quote at the end of the text"),
        (f'[\n{ROW},\n{{"instruction": "q",\n"output":\n', 5, "the end of the file", "a value"),
        (f'[\n{ROW},\n{{"instruction": "q", "output": "a\nb"}}\n]', 3, "a line break inside a text", "\\n"),
        (f'[\n{ROW},\n{{"instruction": "q\t"}}\n]', 3, "a tab inside a text", "\\t"),
        (f'[\n{ROW},\n{{"instruction": "q"\n "output": "a"}}\n]', 4, '\'"output": "a"}\'', "',' or the end"),
        (f"[\n{ROW},\n{{'instruction': 'q'}}\n]", 3, "''instruction': 'q'}'", "a field name in double quotes"),
        (f'[\n{ROW},\n{{"instruction": "C:\\dir", "output": "a"}}]', 3, "'\\dir", "a known escape"),
        (f'[\n{ROW},\n{{"instruction": undefined}}]', 3, "'undefined}]'", "a value"),
        (f"[\n{ROW}\n]\n\n[{ROW}]\n", 5, "'[{\"instruction", "nothing after the closing ']'"),
        (f"[\n{ROW}\n]\n]", 4, "']'", "nothing after the closing ']'"),
    ],
)
def test_broken_json_is_named_by_the_line_where_reading_stopped(
    tmp_path: Path, content: str, line: int, found: str, expected: str
) -> None:
    read = contents(save(tmp_path, content, "rows.json"))
    (fault,) = read.faults
    assert fault.origin.line == line
    assert fault.found.startswith(found)
    assert expected in fault.expected
    assert "Reading stopped here" in fault.fix


def test_rows_before_broken_json_are_read(tmp_path: Path) -> None:
    found = contents(save(tmp_path, f"[\n{ROW},\n{{}},\n{ROW},\n{ROW}}}\n{ROW}]", "rows.json"))
    assert [talk.origin.line for talk in found.conversations] == [2, 4, 5]
    assert [fault.origin.line for fault in found.faults] == [3, 5]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{broken", "a field name in double quotes"),
        (f"{ROW},", "nothing after the object"),
        (f"{ROW} {ROW}", "nothing after the object"),
        (ROW[:-1], "',' or the end of the object"),
        (ROW[:-3], "a quote at the end of the text"),
        ('{"instruction": "q", "output": }', "a value"),
        ('{"instruction": "q", "output": "a",}', "no comma in front of it"),
        ("}", "a value"),
        ("None", "a value"),
    ],
)
def test_a_broken_line_of_jsonl_is_a_fault_of_that_line_alone(tmp_path: Path, row: str, expected: str) -> None:
    fault = fault_of(tmp_path, row)
    assert fault.field == "row" and fault.expected == expected
    if row.startswith("{"):
        first = contents(save(tmp_path, jsonl(row, GOOD)))
        assert [fault.origin.line for fault in first.faults] == [1] and len(first.conversations) == 1


def test_all_faults_of_a_file_are_named_in_one_pass(tmp_path: Path) -> None:
    """Prevents mending a file one fault at a time."""
    kinds: list[tuple[Any, str | None]] = [
        (GOOD, None),
        ({"instruction": "q", "output": None}, "output"),
        ({"instruction": "q", "output": ""}, "output"),
        ({"instruction": "q", "ouput": "a"}, "output"),
        ({"instruction": "", "output": "a"}, "instruction"),
        (GOOD, None),
        ({"messages": [U, U, A]}, "messages[1]"),
        ({"messages": [U, A, U]}, "messages[2]"),
        ({"messages": [{"role": "bot", "content": "x"}, A]}, "messages[0].role"),
        ("5", "row"),
        ('{"instruction": "q", "instruction": "r", "output": "a"}', "instruction"),
        ('{"instruction": "\\ud83d", "output": "a"}', "instruction"),
        ('{"instruction": "\\u0000", "output": "a"}', "instruction"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": 5}]}, "conversations[1].value"),
        (GOOD, None),
    ]
    wanted = [(line, field) for line, (_, field) in enumerate(kinds, 1) if field]
    found = contents(save(tmp_path, jsonl(*(row for row, _ in kinds), "{broken", GOOD)))
    assert [(fault.origin.line, fault.field) for fault in found.faults] == [*wanted, (16, "row")]
    assert (found.n_rows, len(found.conversations)) == (17, 4)
    for fault in found.faults:
        assert fault.origin.path == found.path
        assert fault.found and fault.expected and fault.fix
    array = "[\n" + ",\n".join(row if isinstance(row, str) else json.dumps(row) for row, _ in kinds) + "\n]"
    found = contents(save(tmp_path, array, "rows.json"))
    assert [(fault.origin.line, fault.field) for fault in found.faults] == [(line + 1, field) for line, field in wanted]


def test_one_bad_line_among_thousands_is_found(tmp_path: Path) -> None:
    found = contents(save(tmp_path, jsonl(*[GOOD] * 4711, "{", *[GOOD] * 3000)))
    assert [fault.origin.line for fault in found.faults] == [4712]
    assert (found.n_rows, len(found.faults)) == (7712, 1)


# --- files that are no data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name", "found"),
    [
        (b"", "rows.json", "an empty file"),
        (b" \n\n", "rows.jsonl", "an empty file"),
        (b"\xef\xbb\xbf", "rows.csv", "an empty file"),
        (b"[]", "rows.json", "no rows"),
        (b"instruction,output\n", "rows.csv", "no rows"),
        (b"hello", "rows.json", "'hello'"),
        (b"5", "rows.jsonl", "'5'"),
        (b"[1]", "rows.parquet", "no Parquet"),
        (b"\x1f\x8b\x08rest", "rows.json", "gzip"),
        (b"PK\x03\x04rest", "rows.csv", "a zip archive"),
        (b"PAR1 and no more", "rows.parquet", "damaged Parquet"),
        ("[]".encode("utf-16"), "rows.json", "UTF-16LE text"),
        ('{"a": 1}'.encode("utf-32"), "rows.jsonl", "UTF-32LE text"),
        ('{"a": 1}'.encode("utf-16-be"), "rows.jsonl", "a NUL byte"),
        ('{"a": 1}'.encode("utf-16-le"), "rows.jsonl", "a NUL byte"),
    ],
)
def test_a_file_that_is_no_data_is_refused(tmp_path: Path, content: bytes, name: str, found: str) -> None:
    path = save(tmp_path, content, name)
    error = refused(path)
    assert error.where.startswith(str(path))
    assert found in error.found


def test_bytes_that_are_not_utf8_are_named_by_line_with_the_encoding_they_seem_to_have(tmp_path: Path) -> None:
    rows = [json.dumps({"instruction": text, "output": "ok"}, ensure_ascii=False) for text in ("plain", "你是谁？")]
    path = save(tmp_path, "\n".join(rows).encode("gb18030"), "my rows.jsonl")
    error = refused(path)
    assert error.where == f"{path}:2"
    assert "GB18030" in error.found and "你是谁" in error.found
    assert f"iconv -f GB18030 -t UTF-8 '{path}' > 'utf8-my rows.jsonl'" in error.fix
    latin = save(tmp_path, b"\xef\xbb\xbf" + '["plain",\n"caf\xe9 "]'.encode("latin-1"), "latin.json")
    assert refused(latin).where == f"{latin}:2"
    assert "Windows-1252" in refused(latin).found
    neither = save(tmp_path, b'{"a": 1}\n{"\x81\x20": 1}', "neither.jsonl")
    assert refused(neither).where == f"{neither}:2" and "0x81" in refused(neither).found


def test_a_nul_byte_is_named_by_line(tmp_path: Path) -> None:
    path = save(tmp_path, (jsonl(GOOD) + jsonl(GOOD)).encode().replace(b"Bo", b"B\x00", 2)[:-2])
    assert refused(path).where == f"{path}:1"


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_rows_are_read_without_holding_the_file(tmp_path: Path, form: str) -> None:
    """Neither by Python nor by Arrow, whose own memory is not Python's."""
    rows = [{"instruction": f"{n} " + "x" * 2000, "output": "y" * 2000} for n in range(16_000)]
    path = tmp_path / f"rows.{form}"
    if form == "jsonl":
        path.write_text(jsonl(*rows))
    elif form == "csv":
        path.write_text("instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    records.open_file(path)  # imports what it takes
    by_arrow = []
    tracemalloc.start()
    try:
        for _ in records.open_file(path).rows():
            by_arrow.append(pa.total_allocated_bytes())
        peak = tracemalloc.get_traced_memory()[1] + max(by_arrow)
    finally:
        tracemalloc.stop()
    assert len(by_arrow) == 16_000
    assert path.stat().st_size > 64_000_000 > 4 * peak  # observed 4.2 MB, and 9.1 of Parquet


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, form: str) -> None:
    line = json.dumps(GOOD) if form == "jsonl" else "one,two"
    path = save(tmp_path, ("" if form == "jsonl" else "instruction,output\n") + f"{line}\n" * 3000, f"rows.{form}")
    rows = records.open_file(path).rows()
    assert isinstance(next(rows), Conversation)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="other bytes than a moment ago"):
        list(rows)


def replaced(path: Path) -> None:
    """By something that can not be read as its name says."""
    other = path.with_name("other")
    other.write_bytes(b"\xff" * 10)
    other.replace(path)


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("happens", [Path.unlink, replaced, lambda path: path.write_bytes(b"")])
def test_a_file_that_goes_between_two_looks_is_refused(
    tmp_path: Path, form: str, happens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist([GOOD]), path)
    else:
        path.write_text({"json": json.dumps([GOOD]), "jsonl": jsonl(GOOD), "csv": "instruction,output\na,b\n"}[form])
    file = records.open_file(path)
    looked_through = records._looked_through

    def then(path: Path) -> Any:
        found = looked_through(path)
        monkeypatch.setattr(records, "_looked_through", looked_through)
        happens(path)
        return found

    monkeypatch.setattr(records, "_looked_through", then)
    with pytest.raises(DataError):
        list(file.rows())


def test_a_file_that_is_only_touched_is_the_same(tmp_path: Path) -> None:
    path = save(tmp_path, jsonl(*[GOOD] * 3))
    rows = records.open_file(path).rows()
    next(rows)
    os.utime(path, (1, 1))
    assert len(list(rows)) == 2


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "rows.jsonl")
    assert "only once" in refused(path).found


def test_a_file_that_is_not_there_is_refused_with_one_that_is(tmp_path: Path) -> None:
    path = save(tmp_path, jsonl(GOOD))
    assert f"Did you mean {path}?" in refused(tmp_path / "row.jsonl").fix
    assert refused(tmp_path / "nowhere" / "x.jsonl").fix == "Check the name."
    assert refused(tmp_path).found == "a folder"


# --- any conversation in any form -------------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
filled = text.filter(lambda value: bool(value.strip()))
instructed = st.fixed_dictionaries({"instruction": filled, "output": filled}, optional={"input": text, "system": text})
talks = st.lists(st.tuples(filled, filled), min_size=1, max_size=3)
faulty = st.sampled_from([{"instruction": "q", "output": ""}, {"instruction": " ", "output": "a"}])


def as_messages(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What a row says, put together in another way than the reader's."""
    if "instruction" not in row:
        turns = row["messages"] if "messages" in row else row["conversations"]
        names = {"human": "user", "gpt": "assistant"}
        return [(names.get(role, role), value) for role, value in (tuple(turn.values()) for turn in turns)]
    question = row["instruction"] + ("\n" + row["input"] if row.get("input", "").strip() else "")
    system = [("system", row["system"])] if row.get("system", "").strip() else []
    past = [turn for q, a in row.get("history") or [] for turn in (("user", q), ("assistant", a))]
    return [*system, *past, ("user", question), ("assistant", row["output"])]


def turns(talk: list[tuple[str, str]], keys: tuple[str, str], roles: tuple[str, str]) -> list[dict[str, str]]:
    return [dict(zip(keys, turn, strict=True)) for pair in talk for turn in zip(roles, pair, strict=True)]


with_messages = talks.map(lambda talk: {"messages": turns(talk, ("role", "content"), ("user", "assistant"))})
any_row = (
    instructed
    | st.builds(lambda row, talk: {**row, "history": [list(pair) for pair in talk]}, instructed, talks)
    | with_messages
    | talks.map(lambda talk: {"conversations": turns(talk, ("from", "value"), ("human", "gpt"))})
)


def written(rows: list[dict[str, Any]], form: str, folder: Path) -> Path:
    if form == "jsonl":
        return save(folder, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "rows.jsonl")
    if form == "csv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, ["instruction", "input", "output", "system"], restval="", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        return save(folder, buffer.getvalue(), "rows.csv")
    if form == "parquet":
        return parquet(folder, rows)
    indent = {"json": None, "json-0": 0, "json-2": 2}[form]
    return save(folder, json.dumps(rows, ensure_ascii=False, indent=indent), "rows.json")


def check_read(rows: list[dict[str, Any]], form: str, folder: Path) -> None:
    good = [row for row in rows if row.get("output") != "" and row.get("instruction") != " "]
    found = contents(written(rows, form, folder))
    assert said(found) == [as_messages(row) for row in good]
    assert found.n_rows == len(rows)
    lines = [talk.origin.line for talk in found.conversations]
    numbers = [number for number, row in enumerate(rows, 1) if row in good]
    assert lines == (numbers if form in ("jsonl", "parquet") else sorted(lines))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(any_row | faulty, min_size=1, max_size=6))
@pytest.mark.parametrize("form", ["json", "json-0", "json-2", "jsonl"])
def test_any_conversation_is_read_as_it_was_written_as_json(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], form: str
) -> None:
    check_read(rows, form, tmp_path_factory.getbasetemp())


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(instructed | faulty, min_size=1, max_size=6))
def test_any_instruction_is_read_as_it_was_written_as_csv(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    check_read(rows, "csv", tmp_path_factory.getbasetemp())


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(instructed | faulty, min_size=1, max_size=6) | st.lists(with_messages, min_size=1, max_size=4))
def test_any_conversation_is_read_as_it_was_written_as_parquet(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    columns = {key for row in rows for key in row}
    check_read([{key: row.get(key, "") for key in columns} for row in rows], "parquet", tmp_path_factory.getbasetemp())
