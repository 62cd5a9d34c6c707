"""What reaches a terminal: text that it does not obey, places that are not broken, streams that nobody reads, bytes
that are not text."""

from __future__ import annotations

import ast
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.panel import Panel
from rich.progress import Progress, TextColumn
from rich.table import Table

from conftest import Ended, start, tunesmith
from tunesmith import terminal
from tunesmith.cli import app, display
from tunesmith.cli.console import print_json
from tunesmith.hub import aliases
from tunesmith.screen import Screen, styled
from tunesmith.types import Fault, Origin

PACKAGE = Path(__file__).parent.parent / "src" / "tunesmith"
HOSTILE = "\x1b]52;c;aGk=\x07\x1b]0;owned\x07\x1b[2J\x9b31m\b\r\u202e[red]x[/red][/b][v2]:smile:"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
ANYTHING = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(HOSTILE)), max_size=60)


def shown(draw: Callable[[Screen], object], *, width: int = 80, for_people: bool = True) -> str:
    """What a screen without colours prints, so that every control character in it is a leak."""
    out = io.StringIO()
    draw(Screen(file=out, width=width, force_terminal=True, color_system=None) if for_people else Screen(file=out))
    return out.getvalue()


# --- nothing is obeyed, nothing is markup -----------------------------------------------------------------------------


@given(ANYTHING)
def test_safe_text_has_one_sign_for_each_sign_and_none_that_a_terminal_obeys(text: str) -> None:
    safe = terminal.safe(text)
    assert len(safe) == len(text) and not OBEYED.search(safe)
    assert "\n" not in terminal.in_one_line(text)
    assert OBEYED.search(text) or safe == text


def cell(text: object) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_row(text)  # type: ignore[arg-type]
    return table


PLACES: dict[str, Callable[[Screen, str], object]] = {
    "a line": lambda screen, text: screen.print(text),
    "a line with a style": lambda screen, text: screen.print(text, style="yellow"),
    "a part of a line": lambda screen, text: screen.print(styled("a ", (text, "bold"))),
    "a labelled line": lambda screen, text: screen.labelled("name", text),
    "a cell": lambda screen, text: screen.print(cell(text)),
    "a cell with a style": lambda screen, text: screen.print(cell(styled((text, "bold")))),
    "a title": lambda screen, text: screen.print(Panel("", title=styled(text, one_line=True))),
    "a status": lambda screen, text: screen.print(screen.status(text).renderable),
    "a bar": lambda screen, text: screen.print(bar(screen, text)),
}


def bar(screen: Screen, text: str) -> Progress:
    progress = Progress(TextColumn("{task.description}", markup=False), console=screen)
    progress.add_task(terminal.safe(text))
    return progress


@pytest.mark.parametrize("place", PLACES)
@given(text=ANYTHING)
@settings(max_examples=30)
def test_a_text_of_somebody_else_is_shown_as_it_is(place: str, text: str) -> None:
    text = "".join(text.split())
    assume(cell_len(text))  # there is nothing to be seen of what has no width
    out = shown(lambda screen: PLACES[place](screen, text), width=500)
    assert not OBEYED.search(out)
    assert re.sub(r"[\s⠋]", "", terminal.safe(text)) in re.sub(r"[\s⠋]", "", out)


def test_an_updated_status_is_no_markup() -> None:
    def draw(screen: Screen) -> None:
        with screen.status("") as status:
            status.update("[/b] reads [red]x")
            screen.print(status.renderable)  # as its thread does, which may not come to it

    assert "[/b] reads [red]x" in shown(draw)


def offences(source: str) -> Iterator[str]:
    """Places in a module where a text could be read as markup, or could go past the door."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "rich.markup":
            yield f"{node.lineno}: rich.markup"
        if isinstance(node, ast.Attribute) and node.attr in ("from_markup", "from_ansi"):
            yield f"{node.lineno}: {node.attr}"
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if re.search(r"\[/\]|\[/?(bold|italic|red|green|yellow|cyan|grey\d+)\b", text):
            yield f"{node.lineno}: markup, which is shown as it stands"
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in ("Console", "Status", "Spinner", "Prompt"):
            yield f"{node.lineno}: {name}, which reads markup; use Screen"
        if name == "TextColumn" and "markup" not in given:
            yield f"{node.lineno}: a TextColumn that reads markup"
        if name == "Panel" and any(
            isinstance(given.get(t), ast.Constant | ast.JoinedStr) for t in ("title", "subtitle")
        ):
            yield f"{node.lineno}: a title that is read as markup"
        if (
            isinstance(node.func, ast.Name)
            and name == "Text"
            and node.args
            and not isinstance(node.args[0], ast.Constant)
        ):
            yield f"{node.lineno}: Text, which drops some control characters; use styled"
        if name == "assemble":
            yield f"{node.lineno}: Text.assemble; use styled"
        if name == "write" and ast.unparse(node.func).startswith(("sys.stdout", "sys.stderr", "sys.__std")):
            yield f"{node.lineno}: {ast.unparse(node.func)}"
        if ast.unparse(node.func).startswith(("sys.__std", "os.write(1", "os.write(2")):
            yield f"{node.lineno}: past the door"


# `screen` is the door; the help of `options` is typer's and holds nothing of a user; `writing` has a Text of its own.
DOOR = {"screen.py", "cli/options.py"}


@pytest.mark.parametrize(
    "module",
    sorted(
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if str(path.relative_to(PACKAGE)) not in DOOR and "rich" in path.read_text(encoding="utf-8")
    ),
)
def test_a_module_that_prints_uses_the_door(module: str) -> None:
    assert list(offences((PACKAGE / module).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        'console.print(f"[bold]{name}[/]")',
        "Text.from_markup(name)",
        "console = Console()",
        'Panel(x, title=f"{name}")',
        'TextColumn("{task.description}")',
        "table.add_row(Text(name))",
        "Text.assemble(name)",
        "sys.stdout.write(name)",
        "from rich.markup import escape",
    ],
)
def test_the_check_sees_what_goes_past_the_door(line: str) -> None:
    assert list(offences(line))


# --- on a terminal ----------------------------------------------------------------------------------------------------


def on_terminal(*arguments: str | Path, cwd: Path | None = None, typed: bytes = b"", **environment: str) -> Ended:
    """Runs a command with its output on a terminal; `typed` is a file on standard input."""
    master, slave = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        while True:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:  # nobody holds the other end
                return
            if not piece:
                return
            seen.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    given, writer = os.pipe()
    os.write(writer, typed)
    os.close(writer)
    try:
        environment = {"TERM": "xterm", "NO_COLOR": "1", **environment}
        code = start(*arguments, streams=(given, slave, slave), cwd=cwd, **environment).wait(300)
    finally:
        os.close(slave)
        os.close(given)
        reader.join(10)
        os.close(master)
    return Ended(code, b"".join(seen).decode("utf-8", "replace"), "")


OWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r(?=\n)|\r")
"""What rich itself writes to a terminal: styles and the movements of its cursor. None of it names a clipboard, sets a
title or clears the screen."""


@pytest.fixture(scope="module")
def hostile_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model has learned to answer with what a terminal obeys, in a folder whose name is markup."""
    folder = tmp_path_factory.mktemp("hostile")
    reply = "\x1b]0;x\x07\x9b[/b]"
    row = {"instruction": "Hi", "output": reply}
    (folder / "rows[v2].jsonl").write_text(json.dumps(row) + "\n")
    flags = ["lora.r=32", "lora.dropout=0", "eval.hold_out=0", "train.epochs=60", "train.learning_rate=1e-2"]
    ended = on_terminal(
        *("train", "--model", tiny_model, "--data", "rows[v2].jsonl", "--out", "x[/b][v2]"),
        *(text for flag in flags for text in ("--set", flag)),
        cwd=folder,
        COLUMNS="200",
    )
    assert ended.code == 0, ended.out
    assert "x[/b][v2]/adapter" in ended.out and "rows[v2].jsonl:1" in ended.out
    assert "␛]0;x␇�[/b]" in ended.out  # the row that is shown
    assert not OBEYED.search(OWN.sub("", ended.out))
    return folder / "x[/b][v2]"


def test_a_terminal_obeys_nothing_that_a_model_writes(hostile_run: Path) -> None:
    once = on_terminal("chat", hostile_run, "--prompt", "Hi", "--temperature", "0")
    assert once.code == 0 and "␛]0;x␇�[/b]" in once.out
    assert not OBEYED.search(OWN.sub("", once.out))
    talk = on_terminal("chat", hostile_run, "--temperature", "0", typed=b"Hi\n/save no[/b]such/\x1b[2Jfolder\n")
    assert talk.code == 0 and "␛]0;x␇�[/b]" in talk.out and "no[/b]such/" in talk.out
    assert not OBEYED.search(OWN.sub("", talk.out))


def test_what_is_no_terminal_gets_the_reply_as_it_is_written(hostile_run: Path) -> None:
    ended = tunesmith("chat", hostile_run, "--prompt", "Hi", "--temperature", "0")
    assert ended.out == "\x1b]0;x\x07\x9b[/b]\n"
    ended = on_terminal("chat", hostile_run, "--prompt", "Hi", "--temperature", "0", "--json")
    answer = ended.out[ended.out.index("{") :].splitlines()[0]  # between what moves
    assert json.loads(answer)["reply"] == "\x1b]0;x\x07\x9b[/b]", ended.out
    assert not OBEYED.search(OWN.sub("", ended.out))


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "--data", HOSTILE, "--model", "tiny"),
        ("check", "--model", HOSTILE, "--data", "rows.jsonl"),
        ("check", f"--{HOSTILE}"),
        (HOSTILE,),
        ("chat", HOSTILE, "--prompt", "Hi"),
        ("runs", HOSTILE),
        ("watch", HOSTILE),
        ("plan", "--card", HOSTILE, "--model", "tiny", "--data", "rows.jsonl"),
        ("train", HOSTILE),
        ("check", "--set", f"{HOSTILE}=1"),
        ("check", "--set", f"lora.r={HOSTILE}"),
        ("check", "--show", HOSTILE),
    ],
    ids=lambda arguments: " ".join(a if a != HOSTILE else "…" for a in arguments),
)
def test_an_argument_is_shown_and_not_obeyed(rows: Path, arguments: tuple[str, ...]) -> None:
    ended = on_terminal(*arguments, cwd=rows.parent)
    assert ended.code in (0, 2), ended.out
    assert not OBEYED.search(OWN.sub("", ended.out))
    assert "\x1b]" not in ended.out and "\x1b[2J" not in ended.out


def test_a_talk_and_an_answer_end_with_what_comes_next(hostile_run: Path) -> None:
    """Where a person reads them: a program that asks once more and once more is told nothing."""
    once = on_terminal("chat", hostile_run, "--prompt", "Hi", "--temperature", "0", "--max-tokens", "1", COLUMNS="400")
    talk = on_terminal("chat", hostile_run, typed=b"/quit\n", COLUMNS="400")
    for ended in (once, talk):
        lines = [line.partition(": ")[2].strip() for line in OWN.sub("", ended.out).splitlines()[-2:]]
        assert [shlex.split(line)[1:3] for line in lines] == [["serve", str(hostile_run)], ["export", str(hostile_run)]]
    assert tunesmith("chat", hostile_run, "--prompt", "Hi", "--max-tokens", "1").err == ""


def test_a_training_says_what_it_does_before_its_first_step_and_after_its_last(
    tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    ended = on_terminal("train", rows, "-m", tiny_model, "--epochs", "1", "--out", tmp_path / "run", COLUMNS="200")
    assert ended.code == 0, ended.out
    told = (
        f"Opening {rows}", "Looking for", "Reading and rendering every row", "Laying out the steps",
        "Loading the model, and asking it", "Before the first step", "The adapter, its answers and the report",
        "Talk with it",
    )  # fmt: skip
    places = [ended.out.find(text) for text in told]
    assert -1 not in places and places == sorted(places), list(zip(told, places, strict=True))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("check", "rows.jsonl"), "Loading torch and transformers"),
        (("plan", "rows.jsonl"), "Laying out its steps"),
        (("doctor",), "Loading torch and transformers"),
        (("fetch",), "Reading its files"),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else "",
)
def test_a_command_says_what_it_is_about(tiny_model: Path, rows: Path, arguments: tuple[str, ...], told: str) -> None:
    model = {"fetch": (tiny_model,), "doctor": ()}.get(arguments[0], ("-m", tiny_model))
    ended = on_terminal(*arguments, *model, cwd=rows.parent)
    assert ended.code == 0 and told in ended.out
    assert told not in tunesmith(*arguments, *model, cwd=rows.parent).out


@pytest.mark.parametrize("columns", ["60", "80", "100", "300"])
def test_the_list_of_models_shows_every_id_whole(columns: str) -> None:
    ended = on_terminal("models", COLUMNS=columns)
    shown = OWN.sub("", ended.out)
    assert "…" not in shown
    for alias in aliases().values():
        assert re.search(rf"\s{re.escape(alias.sources[0])}\s", shown) and alias.name in shown
    assert all(len(line) <= max(int(columns), 50) for line in shown.splitlines())
    (line,) = (line for line in tunesmith("models").out.splitlines() if line.startswith("  smollm2 "))
    assert aliases()["smollm2"].note in line


def test_a_template_that_refuses_with_control_characters_is_not_obeyed(tmp_path: Path, rows: Path) -> None:
    from conftest import CHATML, byte_tokenizer, save_tiny_model

    model = save_tiny_model(tmp_path / "model[red]")
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no \\x1b]0;x\\x07 [/b]') }}{% endif %}"
    byte_tokenizer(refusing.encode().decode("unicode_escape") + CHATML).save_pretrained(model)
    ended = on_terminal("check", "--model", model, "--data", rows)
    assert "model[red]" in re.sub(r"\s", "", ended.out)
    assert not OBEYED.search(OWN.sub("", ended.out))


# --- places are whole -------------------------------------------------------------------------------------------------

NAMES = st.text(st.sampled_from("abcdefghijk rows-_.[]()\t\x1b中文件名数据é"), min_size=1, max_size=90)
WORDS = st.text(st.sampled_from("abcdef ,;'\"[]中文数据 \n\x1b"), max_size=200)
COMMANDS = st.sampled_from(
    [
        "--set data.columns.output=answer --set data.columns.instruction=question",
        "tunesmith check --model smollm2 --data 'my rows.jsonl'",
        "iconv -f GB18030 -t UTF-8 'my rows.jsonl' > 'utf8-my rows.jsonl'",
        "pip install 'tunesmith[export]'",
    ]
)
FAULTS = st.builds(
    lambda name, line, unit, field, found, expected, fix, command: Fault(
        Origin(f"{name}.jsonl", line, unit), field, found, expected, f"{fix} or run: {command}"
    ),
    NAMES, st.integers(1, 10**9), st.sampled_from(["line", "row"]), NAMES, WORDS, WORDS, WORDS, COMMANDS,
)  # fmt: skip


@given(st.integers(20, 250), st.lists(FAULTS, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_place_and_a_command_are_never_broken_over_lines(width: int, faults: list[Fault]) -> None:
    out = shown(lambda screen: display.show_faults(screen, faults), width=width)
    assert not OBEYED.search(out)
    for fault in faults:
        assert terminal.in_one_line(str(fault.origin)) in out
        assert fault.fix.rpartition("run: ")[2] in out


@given(st.lists(FAULTS, min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_one_fault_is_one_line_where_nobody_looks(faults: list[Fault]) -> None:
    out = shown(lambda screen: display.show_faults(screen, faults), for_people=False)
    assert out.split("\n")[2:-1] == [terminal.in_one_line(str(fault)) for fault in faults]


@pytest.mark.parametrize("columns", ["20", "80", "nonsense"])
def test_a_command_breaks_no_line_for_a_file(tiny_model: Path, tmp_path: Path, columns: str) -> None:
    data = tmp_path / "one-bad-line-in-a-file-with-a-long-name.jsonl"
    data.write_text('{"instruction": "q", "output": "a"}\n{"instruction": "q"}\n')
    ended = tunesmith("check", "--model", tiny_model, "--data", data, COLUMNS=columns)
    (line,) = (line for line in ended.out.splitlines() if f"{data}:2" in line)
    assert line.startswith(f"{data}:2: output: found ") and "; expected 'output'. " in line
    assert f"  model         {tiny_model}  (llama)" in ended.out.splitlines()
    ended = tunesmith("train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", COLUMNS=columns)
    assert any(line.startswith(f"{data}:2: output: found ") for line in ended.err.splitlines())


@pytest.mark.parametrize("width", [40, 80, 140])
def test_a_person_gets_lines_that_fit_the_terminal(width: int) -> None:
    fault = Fault(Origin("rows.jsonl", 3), "messages[2].role", "'bot'", ", ".join(["system"] * 40), "Rename it.")
    out = shown(lambda screen: display.show_faults(screen, [fault]), width=width)
    assert all(len(line) <= width for line in out.splitlines())
    assert "\nrows.jsonl:3  messages[2].role\n" in out


@pytest.mark.parametrize("looked_at", [True, False])
def test_what_is_learned_is_between_signs_where_there_is_no_colour(
    looked_at: bool, tiny_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"instruction": "Who?", "output": "Bo."}) + "\n")
    check = ("check", "--model", tiny_model, "--data", data)
    out = (on_terminal(*check, NO_COLOR="1") if looked_at else tunesmith(*check)).out
    assert re.findall("⟦[^⟧]*⟧", out) == ["⟦ and ⟧", "⟦Bo.<|im_end|>⟧"]
    coloured = on_terminal(*check, NO_COLOR="")
    assert "⟦" not in coloured.out and "Green" in coloured.out


# --- nobody reads -----------------------------------------------------------------------------------------------------


def into_closed_pipes(
    *arguments: str | Path, out: bool = True, err: bool = False, cwd: Path | None = None
) -> tuple[int, str]:
    """The exit code of a command whose output nobody reads, and what it says on the stream that somebody does."""
    kept, pipe = os.pipe(), os.pipe()
    os.close(pipe[0])
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        streams = (nothing, pipe[1] if out else kept[1], pipe[1] if err else kept[1])
        code = start(*arguments, streams=streams, cwd=cwd).wait(300)
        os.close(kept[1])
        with os.fdopen(kept[0], encoding="utf-8") as said:
            return code, said.read()
    finally:
        os.close(nothing)
        os.close(pipe[1])


@pytest.mark.parametrize(
    "arguments", [("models",), ("models", "--json"), ("--help",), ("train", "--help"), ("doctor",)]
)
def test_a_reader_that_has_gone_ends_a_command_quietly(arguments: tuple[str, ...]) -> None:
    assert into_closed_pipes(*arguments) == (0, "")


def test_check_ends_as_it_would_when_its_reader_has_gone(tiny_model: Path, rows: Path) -> None:
    assert into_closed_pipes("check", "--model", tiny_model, "--data", rows) == (0, "")
    rows.write_text('{"instruction": "q"}\n')
    assert into_closed_pipes("check", "--model", tiny_model, "--data", rows) == (2, "")
    assert into_closed_pipes("check", "--model", tiny_model, "--data", "nowhere", err=True) == (2, "")


def test_a_training_is_finished_though_nobody_reads_what_it_says(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    arguments = ("--model", tiny_model, "--data", rows, "--set", "train.epochs=1", "--out", tmp_path / "run")
    assert into_closed_pipes("train", *arguments, err=True) == (0, "")
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_reply_that_nobody_reads_is_not_written_to_its_end(hostile_run: Path) -> None:
    arguments = ("--prompt", "Hi", "--base", "--max-tokens", "400")
    assert into_closed_pipes("chat", hostile_run, *arguments) == (0, "")


@pytest.mark.parametrize("closing", ["1>&-", "2>&-", "0<&- 1>&- 2>&-", "| head -c 1; exit ${PIPESTATUS[0]}"])
def test_streams_that_are_closed_end_nothing(tmp_path: Path, closing: str) -> None:
    command = f"{sys.executable} -m tunesmith models {closing}"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert ended.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_an_answer_that_can_not_be_written_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "tunesmith", "models", "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert ended.returncode == 2
    assert "No space left on device" in ended.stderr and "Traceback" not in ended.stderr


# --- bytes that are not text ------------------------------------------------------------------------------------------

GBK = os.fsdecode("你好".encode("gb18030"))


@pytest.mark.parametrize(
    ("bytes_", "says"),
    [
        ("你好".encode("gb18030"), "(they read as GB18030: 你好)"),
        ("café".encode("cp1252"), "(they read as Windows-1252: café)"),
        (b"\x81", "bytes that are not UTF-8 (81)"),
        ("你好".encode(), None),
    ],
)
def test_bytes_that_are_not_text_are_named_by_what_they_seem_to_be(bytes_: bytes, says: str | None) -> None:
    found = terminal.what_is_no_text(bytes_.decode("utf-8", "surrogateescape"))
    assert found is None if says is None else says in (found or "")


@given(st.binary(max_size=40))
def test_text_is_told_from_what_is_none(data: bytes) -> None:
    found = terminal.what_is_no_text(data.decode("utf-8", "surrogateescape"))
    try:
        data.decode()
    except UnicodeDecodeError:
        assert found is not None
    else:
        assert found is None


@pytest.mark.parametrize(
    "option",
    [
        ("chat", "tiny", "--prompt", GBK),
        ("chat", "tiny", "--system", GBK),
        ("check", "--set", f"template.system={GBK}"),
        ("plan", "--card", GBK),
        ("fetch", "tiny", "--revision", GBK),
        ("export", "run", "--to", "merged", "--dtype", GBK),
        ("eval", "run", "--tasks", GBK),
    ],
    ids=" ".join,
)
def test_an_option_that_is_no_text_is_refused_in_one_sentence(option: tuple[str, ...], tmp_path: Path) -> None:
    ended = tunesmith(*option, cwd=tmp_path)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "found    bytes that are not UTF-8 (they read as GB18030:" in ended.err and "你好" in ended.err
    assert ended.err.startswith("Error  --")


FREE = ("model", "data", "run_or_model", "runs")


def test_every_option_that_is_text_is_looked_at() -> None:
    """Those without a callback name files."""
    for command in app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            kind, *infos = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            if {str, list[str]} & {kind, *get_args(kind)} and name not in FREE:
                (info,) = infos
                assert info.callback is not None, f"{command.callback.__name__} --{name}"


def test_a_talk_says_what_is_no_text_and_goes_on(hostile_run: Path) -> None:
    typed = b"\xc4\xe3\xba\xc3\n/system \xc4\xe3\nHi\n"
    ended = on_terminal("chat", hostile_run, "--temperature", "0", typed=typed)
    assert ended.code == 0 and "Traceback" not in ended.out
    first, second, answer = (ended.out.index(text) for text in ("GB18030: 你好", "GB18030: /system 你", "␛]0;x"))
    assert first < second < answer


def test_a_file_whose_name_is_no_text_is_trained_on(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    try:
        data = rows.rename(tmp_path / os.fsdecode(b"\xca\xfd\xbe\xdd.jsonl"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    arguments = ("--model", tiny_model, "--data", data, "--set", "train.epochs=1", "--out")
    ended = tunesmith("train", *arguments, tmp_path / os.fsdecode(b"run-\xc4\xe3\xba\xc3"))
    assert ended.code == 2 and r"run-\xc4\xe3\xba\xc3" in ended.err and "GB18030" in ended.err
    ended = on_terminal("train", *arguments, tmp_path / "run", COLUMNS="300")
    assert ended.code == 0, ended.out
    assert r"\xca\xfd\xbe\xdd.jsonl:1" in ended.out
    ended = tunesmith("runs", tmp_path)
    assert ended.code == 0 and r"\xca\xfd\xbe\xdd.jsonl" in ended.out


# --- libraries keep their notes to themselves -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which transformers has something to say: an activation of old, a rope parameter it does not know."""
    from conftest import save_tiny_model

    folder = save_tiny_model(tmp_path_factory.mktemp("noted") / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    config["rope_scaling"] = {"type": "linear", "factor": 2.0, "strange": 1}
    path.write_text(json.dumps(config))
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))
    return folder


_NOTES = """
import sys, tunesmith, transformers
recipe, _ = tunesmith.resolve(flags={"model.name": sys.argv[1], "data.path": sys.argv[2]})
assert tunesmith.check(recipe).ok
tunesmith.load(sys.argv[1])
print("--- ours", file=sys.stderr)
assert transformers.logging.get_verbosity() == transformers.logging.WARNING
assert transformers.logging.is_progress_bar_enabled()
transformers.AutoConfig.from_pretrained(sys.argv[1])
"""


def test_the_library_says_nothing_of_its_own_and_leaves_transformers_as_it_was(noted: Path, rows: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _NOTES, str(noted), str(rows)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    ours, _, theirs = ended.stderr.partition("--- ours\n")
    assert ours == ""
    assert "rope" in theirs  # there was something to say


def test_a_command_prints_its_own_lines_alone(noted: Path, rows: Path) -> None:
    environment = {**os.environ, "TUNESMITH_OFFLINE": "1"}
    check = [sys.executable, "-P", "-m", "tunesmith", "check", "--model", str(noted), "--data", str(rows)]
    ended = subprocess.run(check, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and ended.stderr == ""
    chat = tunesmith("chat", noted, "--prompt", "Hi", "--max-tokens", "1")
    assert chat.code == 0 and chat.err == ""


# --- other encodings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1", "utf-8"])
def test_every_sign_of_ours_has_a_plainer_one(encoding: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors=terminal.ERRORS)
    out.write("▁▂▃▄▅▆▇█ … → ≤ ≠ × ✓ ✗ › ⏎ – ⟦ ⟧ � 你好 😀 \udcc4 " + terminal.safe("\x1b\x7f"))
    out.flush()
    text = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    if encoding == "ascii":
        assert text == r"_.-~=+*# ... -> <= != x + x > | - [[ ]] ? \u4f60\u597d \U0001f600 \xc4 \x1b\x7f"


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_json_is_json_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors=terminal.ERRORS)
    monkeypatch.setattr(sys, "stdout", out)
    value = {"text": "你好 😀 \x9b \u202e é \x7f", "file": os.fsdecode(b"\xc4.jsonl")}
    print_json(value)
    written = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert json.loads(written) == value
    assert not OBEYED.search(written.rstrip("\n"))


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "gbk"}, {"LC_ALL": "C"}])
def test_a_terminal_without_utf8_is_written_to(tmp_path: Path, environment: dict[str, str]) -> None:
    for arguments in (["models"], ["--help"], ["check", "--model", "nowhere…→✓", "--data", "你好"]):
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "tunesmith", *arguments],
            env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, check=False,
        )  # fmt: skip
        assert ended.returncode == (2 if arguments[0] == "check" else 0), ended.stderr
        assert b"Traceback" not in ended.stderr
        if environment.get("PYTHONIOENCODING") == "ascii":
            assert (ended.stdout + ended.stderr).isascii()
