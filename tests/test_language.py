"""What people read is in their language: the translations are whole, and real commands say nothing else."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from string import Formatter
from typing import Any, get_args

import pytest

from conftest import ROOT, tunesmith
from small_runs import FLAGS, settings
from tunesmith import language
from tunesmith.caller import in_python
from tunesmith.errors import DataError
from tunesmith.evaluation import verdict
from tunesmith.language import counted, said
from tunesmith.screen import Screen, padded, phrase
from tunesmith.training.checking import check
from unsaid import unsaid

sys.path.append(str(ROOT / "scripts"))
import write_catalogue

PO = write_catalogue.LOCALE / "zh" / "LC_MESSAGES" / "tunesmith.po"
FOUND = write_catalogue.messages()
WRITTEN = write_catalogue.merged(PO.read_text(encoding="utf-8"), FOUND, "zh")
PAIRS = [
    (one, translated)
    for message in WRITTEN
    if message.id
    for one in (message.id if isinstance(message.id, tuple) else (message.id,))
    for translated in write_catalogue.strings(message)
]
HAN = re.compile(r"[\u4e00-\u9fff]")
SPELT_ALIKE = {
    "{path}: {account}; {verdict}",
    *(
        "logits",
        "python",
        "ok",
        "; ",
        ", ",
        ", no ",
        "{where} ({rows})",
        "a CUDA GPU",
        ", {time}",
        "{run}: {verdict}",
        "{sentence}.",
        "{what_for}: {command}",
    ),
    *(
        "{name}: {reason}",
        " = {value}: {why}",
        "; {more}",
        "{text}. {sentence}",
        "{total}: {parts}",
        "“{text}”{where}",
        "tokens",
        "16 bits",
        "4 bits (model.quantize=nf4)",
        "{kind} ({text})",
    ),
}
"""Messages without a word to translate, or whose word is the same."""
NAMES = re.compile(
    r"`[^`]+`|--[a-z][a-z-]*|\b[A-Z]+_[A-Z_]+\b|\b(?:train|eval|data|model|lora|engine|template)\.[a-z_]+"
)
"""Commands, options, variables and settings, which are typed as they stand."""


def fields(text: str) -> list[tuple[str, str, str | None]]:
    return sorted((name, how or "", turn or "") for _, name, how, turn in Formatter().parse(text) if name is not None)


# --- the catalogue ----------------------------------------------------------------------------------------------------


def test_every_message_is_translated_and_none_is_stale() -> None:
    assert write_catalogue.untranslated(WRITTEN) == []
    text, compiled = write_catalogue.texts(WRITTEN)
    assert PO.read_text(encoding="utf-8") == text, "run: make catalogue"
    assert PO.with_suffix(".mo").read_bytes() == compiled, "run: make catalogue"


def test_a_message_without_a_translation_is_found(tmp_path: Path) -> None:
    planted = 'from x import said\nprint(f"{said(\'A planted one.\')}", said("Outer {inner}.", inner=said("inner")))\n'
    (tmp_path / "module.py").write_text(planted)
    (tmp_path / "page.html.jinja").write_text('<p>{{ said("On a page, {n}.", n=said("within")) }}</p>')
    catalogue = write_catalogue.merged("", write_catalogue.messages(tmp_path), "zh")
    expected = ["A planted one.", "On a page, {n}.", "Outer {inner}.", "inner", "within"]
    assert sorted(write_catalogue.untranslated(catalogue)) == expected
    fuzzy = write_catalogue.merged('#, fuzzy\nmsgid "inner"\nmsgstr "里面"\n', write_catalogue.messages(tmp_path), "zh")
    assert "inner" in write_catalogue.untranslated(fuzzy)


def test_what_is_said_is_written_out_where_it_is_said() -> None:
    """An f-string would be looked up with its values in it, and never be found."""
    for path in write_catalogue.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in write_catalogue.FUNCTIONS or not isinstance(node.args[0], ast.JoinedStr), (
                    f"{path}:{node.lineno}"
                )


def test_what_an_error_says_is_said_in_the_readers_language(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "_TABLE = {1: 'out of a table'}\n_CONSTANT = 'a constant'\n\n\n"
        "def hint(name):\n    return f'what {name} gives'\n\n\n"
        "def refuse(path, why):\n    found, fix = f'{path} found', said('Said: {x}', x='a value of it')\n"
        "    for key, text in _TABLE.items():\n        raise RunError(str(path), found, why, fix)\n"
        "    raise RunError(f'{path}: {why}', hint(path) if path else _CONSTANT, text, '--set lora.r')\n\n\n"
        "refuse('/tmp', 'given by who calls')\n"
    )
    planted = ["out of a table", "a constant", "what { gives", "{ found", "a value of it", "given by who calls"]
    assert sorted(text for _, text in unsaid(tmp_path)) == sorted(planted)
    assert unsaid(write_catalogue.PACKAGE) == []


def test_a_translation_has_the_values_and_names_of_its_message() -> None:
    for message, translated in PAIRS:
        assert {*fields(translated)} == {*fields(message)}, message
        assert sorted(set(NAMES.findall(translated))) == sorted(set(NAMES.findall(message))), message
        assert HAN.search(translated) or message in SPELT_ALIKE, message


def test_a_translation_is_written_as_chinese_is() -> None:
    for message, translated in PAIRS:
        bare = re.sub(r"\{[^}]*\}", "{}", translated).replace("[问, 答]", "")  # as it stands in a file
        assert not re.search(r"[\u4e00-\u9fff][,;:!?()]|[\u4e00-\u9fff]\.(?: |$)", bare), f"full-width signs: {message}"
        assert not re.search(r"[\u4e00-\u9fff][A-Za-z0-9]|[A-Za-z0-9][\u4e00-\u9fff]", bare), f"a space: {message}"
        assert not re.search(r"[。，；：（）、] | [。，；：（）、]", bare), (
            f"no space beside full-width signs: {message}"
        )


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"TUNESMITH_LANG": "zh"}, "zh"),
        ({"TUNESMITH_LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, "zh"),
        ({"TUNESMITH_LANG": "EN", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"TUNESMITH_LANG": "", "LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW.UTF-8"}, "zh"),
        ({"LANG": "zh-Hans"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "de_DE.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "de_DE.UTF-8", "LC_ALL": "zh_CN"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "zhuang"}, "en"),
    ],
)
def test_the_language_is_that_of_the_environment(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TUNESMITH_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language.language() == expected
    assert said("rows") == {"en": "rows", "zh": "行"}[expected]
    assert language.unknown() is None


def test_a_language_that_there_is_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_LANG", "fr")
    assert language.unknown() == "fr"
    ended = tunesmith("models", TUNESMITH_LANG="fr")
    assert ended.code == 2 and "TUNESMITH_LANG\n  found    'fr'\n  expected en or zh" in ended.err, ended.err


@pytest.mark.parametrize(
    ("encoding", "expected"), [("utf-8", "zh"), ("gb18030", "zh"), ("gbk", "zh"), ("ascii", "en"), ("latin-1", "en")]
)
def test_chinese_is_said_where_it_can_be_written(encoding: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_LANG", "zh")
    language.settle(encoding)
    assert language.language() == expected


def test_a_file_for_others_can_be_in_another_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_LANG", "zh")
    with language.speaking("en"):
        assert said("rows") == "rows"
    assert said("rows") == "行"


# --- what is said -----------------------------------------------------------------------------------------------------


def test_english_is_the_message_itself() -> None:
    assert said("{n:,} numbers to train", n=1234) == "1,234 numbers to train"
    assert [counted("{n:,} faulty row", "{n:,} faulty rows", n) for n in (1, 2)] == ["1 faulty row", "2 faulty rows"]
    assert phrase("{done} in {time}: {steps} steps, last loss {loss:.3f}", done=("Done", "green"), steps=3, time="0:01",
                  loss=1.23456).plain == "Done in 0:01: 3 steps, last loss 1.235"  # fmt: skip


def test_labels_and_columns_stay_below_each_other(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TUNESMITH_LANG", "zh")
    assert [padded(text, 8) for text in ("模型", "token", "system 文本")] == ["模型    ", "token   ", "system 文本"]
    screen = Screen(force_terminal=True, width=80, color_system=None)
    screen.explained("one", "two", "three")
    assert capsys.readouterr().out == "  实际     one\n  应为     two\n  改法     three\n"


# --- real commands ----------------------------------------------------------------------------------------------------

WORD = re.compile(r"[A-Za-z]{2,}")
NOT_WORDS = re.compile(
    r"(?<=：)\S*tunesmith .*"  # a command, to the end of its line
    r"|/\S+|[\w.-]+\.(?:jsonl|html|yaml)"  # places
    r"|<\|\w+\|>|\w+_proj"  # tokens and layers
    r"|[a-z]+\.[a-z_]+(?:=\w+)?|--[a-z-]+"  # settings and options
)
SAME_IN_BOTH = {
    "GiB",
    "MiB",
    "token",
    "system",
    "chat",
    "llama",
    "logits",
    "nat",
    "chrF",
    "float",
    "bit",
    "JSON",
    "FILE",
    "run",
}
"""Names, units and terms."""


def leftover(text: str) -> set[str]:
    """English words, beside commands, settings, names, units, and texts of rows and replies, which are in frames."""
    lines = [line for line in text.splitlines() if not re.search("[│╭╰├┌└]", line)]
    return {*WORD.findall(NOT_WORDS.sub("", "\n".join(lines)))} - SAME_IN_BOTH


def test_an_english_line_is_seen() -> None:
    assert leftover("完成：3 steps，用时 0:01\n  接下来   训练：/bin/tunesmith train r.jsonl\n") == {"steps"}


@pytest.fixture(scope="module")
def chinese(tiny_model: Path, talk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What check, plan, train and eval say in Chinese, and the run."""
    folder = tmp_path_factory.mktemp("chinese")
    sets = [part for name, value in FLAGS.items() for part in ("--set", f"{name}={value}")]
    given = [str(talk), "--model", str(tiny_model), *sets, "--set", "train.epochs=1", "--set", "lora.r=2"]
    said = {name: tunesmith(name, *_once(given), cwd=folder, TUNESMITH_LANG="zh") for name in ("check", "plan")}
    said["train"] = tunesmith("train", *_once(given), "--out", "run", cwd=folder, TUNESMITH_LANG="zh")
    said["eval"] = tunesmith("eval", "run", cwd=folder, TUNESMITH_LANG="zh")
    return {"said": said, "run": folder / "run", "given": _once(given), "folder": folder}


def _once(given: list[str]) -> list[str]:
    """The last of each setting."""
    sets = {text.partition("=")[0]: text for text in given if "=" in text}
    return [*given[:3], *(part for text in sets.values() for part in ("--set", text))]


@pytest.mark.parametrize("command", ["check", "plan", "train", "eval"])
def test_a_command_says_everything_in_chinese(chinese: dict[str, Any], command: str) -> None:
    ended = chinese["said"][command]
    assert ended.code == 0, ended.err
    assert len(HAN.findall(ended.out)) > 30
    assert leftover(ended.out) == set()
    assert command != "train" or all(name in ended.out for name in ("问题", "训练前", "训练后"))


@pytest.mark.parametrize("command", ["", "train", "chat", "export", "serve", "runs"])
def test_help_is_in_chinese_and_whole(command: str) -> None:
    ended = tunesmith(*command.split(), "--help", TUNESMITH_LANG="zh", COLUMNS="80")
    assert ended.code == 0, ended.err
    assert "用法：" in ended.out and "选项" in ended.out and "显示这段帮助并退出。" in ended.out
    assert not re.search("… *│", ended.out)  # a text that rich has cut
    assert not re.search(r"\b(the|of|and|is|default|Usage|Options|Arguments)\b", ended.out)
    assert command != "train" or "峰值学习率" in re.sub(r"[\s│]", "", ended.out)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train --rnak 2", "改法 是不是想写 --rank？"),
        ("train --learning_rate 1e-4", "改法 请写 --set train.learning_rate=… 或 --lr。"),
        ("train --out", "后面跟一个值"),
        ("doctor --json=1", "不带值"),
        ("chat", "缺少 RUN_OR_MODEL"),
        ("watch a b", "多余的内容：b"),
        ("tarin", "没有这个命令"),
        ("export run --to nothing", "以下之一："),
        ("serve run --port 99999", "至多为 65535"),
    ],
)
def test_wrong_words_are_an_error_like_every_other(line: str, says: str) -> None:
    command, *words = line.split()
    ended = tunesmith(command, "--json", *words, TUNESMITH_LANG="zh")
    assert ended.code == 2 and ended.json["error"]["fix"]
    shown = re.sub(r"\s+", " ", ended.err)
    assert says in shown and all(label in shown for label in ("错误 ", " 实际 ", " 应为 ", " 改法 "))


@pytest.mark.parametrize(
    ("page", "headings"),
    [("report.html", ("损失", "学习率", "明细", "评估")), ("eval.html", ("通用问题", "结论怎样得出"))],
)
def test_a_page_is_in_chinese(chinese: dict[str, Any], page: str, headings: tuple[str, ...]) -> None:
    text = (chinese["run"] / page).read_text(encoding="utf-8")
    assert '<html lang="zh">' in text
    assert all(f"<h2>{heading}</h2>" in text for heading in headings)
    assert all(HAN.search(heading) for heading in re.findall(r"<h2>(.*?)</h2>", text))


def test_a_card_and_what_programs_read_stay_as_they_are(chinese: dict[str, Any]) -> None:
    run = chinese["run"]
    assert not HAN.search((run / "adapter" / "README.md").read_text(encoding="utf-8"))
    assert json.loads((run / "eval.json").read_text(encoding="utf-8"))["verdict"] in get_args(verdict.Name)
    assert json.loads((run / "state.json").read_text(encoding="utf-8"))["state"] == "done"


def test_faults_are_in_chinese_and_python_reads_its_own_options(
    rows: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rows.open("a") as file:
        file.write('{"instruction": "Q", "outptu": "A"}\n{"messages": [{"role": "bot", "content": "x"}]}\n{"a": 1,}\n')
    ended = tunesmith("check", rows, "--model", tiny_model, TUNESMITH_LANG="zh")
    assert ended.code == 2 and leftover(ended.out) <= {"output", "outptu", "messages", "role", "bot", "row"} | {
        *("user", "assistant", "ShareGPT", "human", "gpt", "instruction")
    }
    assert "outptu" in ended.out and "在文件里改名" in ended.out
    monkeypatch.setenv("TUNESMITH_LANG", "zh")
    checked = check(settings(tiny_model, rows))
    with pytest.raises(DataError) as raised:
        checked.require_ok()
    assert in_python(str(raised.value)).endswith("flags={'data.allow_set_aside': True}。")


def test_an_answer_for_programs_differs_in_its_sentences_alone(chinese: dict[str, Any]) -> None:
    answers = [
        [
            tunesmith(name, *arguments, "--json", cwd=chinese["folder"], TUNESMITH_LANG=spoken).json
            for spoken in ("en", "zh")
        ]
        for name, arguments in (("check", chinese["given"]), ("runs", [str(chinese["folder"])]), ("models", []))
    ]
    for english, translated in answers:
        assert _without_sentences(english) == _without_sentences(translated)


def _without_sentences(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_sentences(one) for name, one in value.items() if name not in ("note", "why", "quiet_seconds")
        }
    return [_without_sentences(one) for one in value] if isinstance(value, list) else value
