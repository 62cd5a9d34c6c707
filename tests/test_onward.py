"""What a command says comes next: commands that a shell takes as they stand, whatever the names in them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Ended, finished, start, tunesmith
from small_runs import flags_of, until
from test_docs import GROUP, problem_of_command
from tunesmith import commands, runs
from tunesmith.cli import onward
from tunesmith.export import Export
from tunesmith.training.run import Run

_COMMAND = re.compile(r"^  (?:next)? +[^:\n]+: (.*)$", re.M)


def said(text: str) -> list[str]:
    """The commands with which a command ends."""
    assert "\n  next " in f"\n{text}", text
    return _COMMAND.findall(text[text.rindex("  next ") :])


def problem(command: str) -> str | None:
    """What would be wrong with a command of ours that is pasted."""
    words = shlex.split(command)
    if words[-1] == "--help":
        return None if words[1] in GROUP.commands else "no such command"
    return problem_of_command(words[1:]) if Path(words[0]).name == "tunesmith" else "another program"


# --- commands for a shell ---------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=20))
def test_a_shell_reads_the_words_that_were_written(words: list[str]) -> None:
    line = commands.line("printf", "%s\\0", *words, "end")
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", line)
    ended = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert ended.stdout.decode().split("\0")[:-1] == [*words, "end"]


def test_bytes_that_are_not_text_come_through_too() -> None:
    ended = subprocess.run(
        ["bash", "-c", commands.line("printf", "%s", "a\udcc4'\\b")], capture_output=True, check=True
    )
    assert ended.stdout == b"a\xc4'\\b"


def test_the_program_is_named_as_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = tmp_path / "my env" / "bin" / "tunesmith"
    other = tmp_path / "other" / "tunesmith"
    for script in (beside, other):
        script.parent.mkdir(parents=True)
        script.touch(0o755)
    monkeypatch.setattr("sys.executable", str(beside.with_name("python")))
    monkeypatch.setenv("PATH", str(beside.parent))
    assert commands.tunesmith("runs") == "tunesmith runs"
    monkeypatch.setenv("PATH", str(other.parent))  # another environment's
    assert commands.tunesmith("runs") == f"'{beside}' runs"
    monkeypatch.chdir(tmp_path)
    assert commands.tunesmith("runs") == "'my env/bin/tunesmith' runs"


def test_a_command_whose_extra_is_missing_comes_after_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # which is how an import that fails begins
    (_, serve), (_, train) = onward.after_chat("smollm2")
    install, command = serve.split(" && ")
    assert shlex.split(install)[1:] == ["install", "tunesmith[serve]"] and problem(command) is None
    assert problem(train) is None
    monkeypatch.delitem(sys.modules, "uvicorn")
    assert onward.after_chat("smollm2")[0][1] == command


# --- what each command ends with --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_model: Path, undisturbed: Run, talk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where somebody works: a model, rows and a finished run, all of whose names a shell takes apart."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_model, folder / "my model")
    for name in ("runs", "other runs"):
        shutil.copytree(undisturbed.path, folder / name / "it's mine")
    shutil.copy(talk, folder / "my rows.jsonl")
    return folder


ROWS, MODEL, RUN = "my rows.jsonl", "my model", "runs/it's mine"
ASKED = [
    (("check", ROWS, "-m", MODEL, "--rank", "4"), ["plan", "train"]),
    (("plan", "-d", ROWS, "-m", MODEL, "--set", "template.system=Be brief."), ["train"]),
    (("plan", "-d", ROWS, "-m", MODEL, "--memory", "1MiB"), ["plan"]),
    (("plan", "-d", ROWS, "-m", MODEL, "--table"), ["train"]),
    (("train", ROWS, "-m", MODEL, "--epochs", "1"), ["chat", "eval"]),
    (("train", ROWS, "-m", MODEL, "--epochs", "1", "--set", "eval.hold_out=0"), ["chat", "export"]),
    (("resume", "it's mine"), ["chat", "eval"]),
    (("runs", "other runs"), ["chat", "eval"]),
    (("watch", RUN), ["chat", "eval"]),
    (("models",), ["fetch"]),
    (("fetch", MODEL), ["chat"]),
    (("doctor",), ["demo", "models"]),
]


@pytest.mark.parametrize(("arguments", "next_"), ASKED, ids=[" ".join(arguments) for arguments, _ in ASKED])
def test_a_command_ends_with_what_comes_next(folder: Path, arguments: tuple[str, ...], next_: list[str]) -> None:
    ended = tunesmith(*arguments, cwd=folder)
    assert ended.code == 0, ended.err
    lines = said(ended.out)
    assert [problem(line) for line in lines] == [None] * len(next_), lines
    assert [shlex.split(line)[1] for line in lines] == next_


def test_what_comes_next_has_the_words_that_were_given(folder: Path) -> None:
    ended = tunesmith("check", ROWS, "-m", MODEL, "--rank", "4", "--set", "template.system=Be brief.", cwd=folder)
    given = [ROWS, "--model", MODEL, "--rank", "4", "--set", "template.system=Be brief."]
    assert [shlex.split(line)[2:] for line in said(ended.out)] == [given, given]
    again = tunesmith(*shlex.split(said(ended.out)[0])[1:], "--json", cwd=folder)
    assert again.code == 0 and again.json["fits"] is True, again.err


def test_with_json_nothing_but_json_stands_on_standard_output(folder: Path) -> None:
    for arguments in (("check", ROWS, "-m", MODEL), ("plan", ROWS, "-m", MODEL), ("resume", RUN), ("fetch", MODEL)):
        ended = tunesmith(*arguments, "--json", cwd=folder)
        assert ended.json and ended.out.count("\n") == 1
        assert said(ended.err)


def test_a_training_that_is_stopped_says_how_to_go_on_with_it(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "my run"
    flags = [*flags_of(tiny_model, talk, **{"train.epochs": 5000})[:-1], "--out", "runs/my run"]
    process = start("train", *flags, cwd=tmp_path)
    until(4, run, process)
    process.send_signal(signal.SIGINT)
    ended = finished(process)
    assert ended.code == 130
    (line,) = said(ended.out)
    assert shlex.split(line)[1:] == ["resume", "runs/my run"]
    process = start(*shlex.split(line)[1:], cwd=tmp_path)
    until(8, run, process)
    process.send_signal(signal.SIGINT)
    assert "Went on after step" in finished(process).out


def test_a_training_that_is_stopped_before_its_first_step_says_how_to_go_on(
    tiny_model: Path, talk: Path, tmp_path: Path
) -> None:
    flags = [*flags_of(tiny_model, talk)[:-1], "--out", "runs/my run"]
    process = start("train", *flags, "--set", "train.rehearse=0.5", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs" / "my run" / "manifest.json").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    ended = finished(process)
    assert ended.code == 130
    (line,) = said(ended.out)
    assert shlex.split(line)[1:] == ["resume", "runs/my run"]
    again = tunesmith("train", *flags, cwd=tmp_path)
    assert again.code == 2 and "resume 'runs/my run'" in again.err and "a run that is not finished" in again.err
    resumed = tunesmith(*shlex.split(line)[1:], cwd=tmp_path)
    assert resumed.code == 0, resumed.err


def test_a_run_that_is_not_done_is_gone_on_with_or_followed(tmp_path: Path) -> None:
    ways = {
        state: onward.after_run(tmp_path / "my run", state) for state in ("running", "interrupted", "gone", "failed")
    }
    for state, lines in ways.items():
        ((_, line),) = lines
        assert problem(line) is None
        assert shlex.split(line)[1] == ("watch" if state == "running" else "resume")


@pytest.mark.parametrize("good", [True, False])
def test_after_an_evaluation_it_depends_on_the_verdict(folder: Path, good: bool) -> None:
    lines = [line for _, line in onward.after_eval(folder / RUN, good=good)]
    assert [problem(line) for line in lines] == [None] * len(lines)
    assert shlex.split(lines[0])[1] == ("serve" if good else "chat")


def test_after_an_export_stands_what_takes_it(folder: Path, tmp_path: Path) -> None:
    def lines(to: str) -> list[list[str]]:
        written = Export(tmp_path / "my export", to, ())  # type: ignore[arg-type]
        return [shlex.split(line) for _, line in onward.after_export(folder / RUN, written)]

    (tmp_path / "my export").mkdir()
    (tmp_path / "my export" / "model (tokens as phi-3).gguf").touch()
    path = f"{tmp_path}/my export"
    assert lines("gguf") == [["llama-cli", "-m", f"{path}/model (tokens as phi-3).gguf"]]
    created, ran = lines("ollama")
    assert created == ["ollama", "create", "it-s-mine", "-f", f"{path}/Modelfile"]
    assert ran == ["ollama", "run", "it-s-mine"]
    assert [words[1:] for words in lines("merged")] == [["chat", path], ["serve", path]]
    (asked,) = lines("adapter")
    assert asked[1] == f"{path}/load_and_chat.py" and asked[-1] == "Who are you?"
    assert asked[2:-1] == ["--base", json.loads((folder / RUN / "manifest.json").read_text())["base"]["folder"]]


def test_the_script_of_an_exported_adapter_answers_as_it_is_said(folder: Path) -> None:
    ended = tunesmith("export", RUN, "--to", "adapter", "--out", "my adapter", cwd=folder)
    (line,) = said(ended.out)
    asked = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr


@pytest.mark.parametrize("key", [True, False])
def test_a_server_says_how_it_is_asked(key: bool) -> None:
    ((_, line),) = onward.after_serving("http://127.0.0.1:8000", ["base", "it's mine"], key=key)
    words = shlex.split(line)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's mine"
    assert ("Authorization: Bearer $TUNESMITH_API_KEY" in words) is key


def test_where_there_is_no_run_one_can_be_made(tmp_path: Path) -> None:
    assert runs.all_in(tmp_path) == []
    ended: Ended = tunesmith("runs", cwd=tmp_path)
    assert shlex.split(said(ended.out)[0])[1:] == ["demo"]
