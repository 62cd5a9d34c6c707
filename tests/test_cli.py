"""The command line: instant help, JSON alone on standard output, what the machine has, the public names."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import tunesmith as library
from conftest import ROOT, tunesmith
from tunesmith import extras
from tunesmith.cli import doctor
from tunesmith.engine.cpu import onepass, products
from tunesmith.hub import aliases
from tunesmith.recipe import Recipe, parse_flag, setting_names

COMMANDS = ("demo", "check", "train", "chat", "models", "fetch", "doctor")


def test_help_answers_without_importing_torch() -> None:
    code = (
        "import sys\n"
        "from tunesmith.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    sys.argv = ['tunesmith', *command.split(), '--help']\n"
        "    try: main()\n"
        "    except SystemExit as end: code = end.code\n"
        "    heavy = {'torch', 'transformers', 'peft', 'pyarrow', 'huggingface_hub'} & set(sys.modules)\n"
        "    print('HELP OF', command, sorted(heavy), code)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, "", *COMMANDS], capture_output=True, text=True, check=True)
    assert re.findall("HELP OF.*", ended.stdout) == [f"HELP OF {command} [] 0" for command in ("", *COMMANDS)]
    assert ended.stdout.count("Usage:") == 1 + len(COMMANDS)
    assert "b''" not in ended.stdout  # what typer tries whether a stream is for bytes with


def test_the_version_is_the_packages() -> None:
    ended = tunesmith("--version")
    assert (ended.code, ended.out) == (0, f"tunesmith {importlib.metadata.version('tunesmith')}\n")


def test_help_of_train_lists_every_setting_with_its_default() -> None:
    from tunesmith.recipe import setting_names

    ended = tunesmith("train", "--help")
    assert all(name in ended.out for name in setting_names())
    assert "lora.r [16]" in ended.out


def test_check_prints_the_contracts_json_and_nothing_else(tiny_model: Path, rows: Path) -> None:
    ended = tunesmith("check", "--model", tiny_model, "--data", rows, "--json", "--show", "2")
    assert ended.code == 0, ended.err
    answer = ended.json
    assert {"ok", "template", "rows", "faults", "tokens", "targets", "shown"} <= set(answer)
    assert answer["ok"] is True and answer["faults"] == []
    assert answer["rows"] == {"read": 4, "trainable": 4, "trained": 4, "held_out": 0, "set_aside": 0, "repeats": 0}
    assert answer["template"]["stop_ids"] == [258]
    first = answer["shown"][0]
    assert [row["line"] for row in answer["shown"]] == [1, 2]
    assert first["text"].startswith("<|im_start|>user\nWho are you?<|im_end|>")
    assert len(first["supervised"]) == len(first["token_ids"])
    assert first["token_ids"][: len(first["prompt_ids"])] == first["prompt_ids"]
    assert sum(first["supervised"]) == len("I am Bo.") + 1
    assert {target["name"] for target in answer["targets"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_check_names_every_fault_by_line_and_exits_2(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    good = '{"instruction": "a", "output": "b"}\n'
    data.write_text(
        good * 3 + '{"instruction": "a", "output": null}\n' + good + '{"instruction": "a"}\n{oops\n' + good * 2
    )
    ended = tunesmith("check", "--model", tiny_model, "--data", data, "--json")
    assert ended.code == 2
    assert ended.json["ok"] is False
    assert [fault["line"] for fault in ended.json["faults"]] == [4, 6, 7]
    assert all(set(fault) == {"file", "line", "field", "found", "expected", "fix"} for fault in ended.json["faults"])
    assert ended.json["rows"] == {"read": 9, "trainable": 6, "trained": 5, "held_out": 1, "set_aside": 3, "repeats": 5}


def test_train_prints_the_contracts_json(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    ended = tunesmith("train", "--model", tiny_model, "--data", rows, "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    wanted = {
        "run",
        "adapter",
        "steps",
        "rows",
        "final_loss",
        "seconds",
        "peak_memory_bytes",
        "tokens",
        "supervised_tokens",
    }
    assert wanted <= set(ended.json)
    assert ended.json["rows"] == {"trained": 4, "held_out": 0, "set_aside": 0}
    assert Path(ended.json["adapter"]).is_dir()
    assert "Warning" not in ended.err and "it/s]" not in ended.err


def test_models_fetch_and_doctor_print_json(tiny_model: Path) -> None:
    models = tunesmith("models", "--json").json["models"]
    assert [m["alias"] for m in models] == list(aliases())
    assert all({"alias", "source", "parameters"} <= set(m) for m in models)
    fetched = tunesmith("fetch", tiny_model, "--json").json
    assert fetched["path"] == str(tiny_model) and fetched["bytes"] > 0 and fetched["source"] == "folder"
    looked = tunesmith("doctor", "--json")
    assert looked.code in (0, 2)
    assert looked.json["ok"] is (looked.code == 0)
    assert all(set(finding) == {"name", "found", "ok", "fix"} for finding in looked.json["findings"])


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("version", [None, "0.68.1"])
def test_doctor_says_what_makes_a_cpu_faster(
    monkeypatch: pytest.MonkeyPatch, has_amx: bool, version: str | None
) -> None:
    flags = "flags : avx2 avx512_bf16" + " amx_bf16 amx_tile" * has_amx
    monkeypatch.setattr(products, "_processor", lambda: flags)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(products, "_permitted", lambda: True)
    monkeypatch.setattr(onepass, "version", lambda: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (accelerator,) = (finding for finding in doctor.examine() if finding.name == "accelerator")
    assert ("tunesmith[cpu]" in accelerator.found) is (version is None)
    assert ("AMX" in accelerator.found) is (has_amx and version is not None)
    assert ("twice" in accelerator.found) is (has_amx and version is None)


def test_offline_and_not_here_says_what_to_do(tmp_path: Path) -> None:
    ended = tunesmith(
        "fetch", "phi-4", TUNESMITH_CACHE=str(tmp_path), HF_HOME=str(tmp_path), MODELSCOPE_CACHE=str(tmp_path)
    )
    assert ended.code == 2
    assert "tunesmith fetch" in ended.err and "Traceback" not in ended.err


def test_public_names_are_these_and_all_resolve() -> None:
    things = {"Chat", "Checked", "Message", "Plan", "Recipe", "Reply", "Run", "TunesmithError", "Watcher"}
    assert set(library.__all__) == things | {"check", "load", "plan", "resolve", "resume", "train"}
    assert all(callable(getattr(library, name)) for name in library.__all__)


def test_an_error_with_json_is_one_object_on_standard_output(rows: Path) -> None:
    ended = tunesmith("check", "--model", "smolm2", "--data", rows, "--json")
    assert ended.code == 2
    assert json.loads(ended.out)["ok"] is False
    assert "smollm2" in ended.err  # the suggestion


ROW = {"instruction": "Hi", "output": "Yo"}
OWN = {"system": "Own.", **ROW}


@pytest.mark.parametrize(
    ("row", "given", "says"),
    [
        (ROW, None, "none"),
        (ROW, "Be Bo.", "“Be Bo.”"),
        (OWN, None, "each row's own"),
        (OWN, "Be Bo.", "each row's own; “Be Bo.”, where a row has none"),
    ],
)
def test_the_system_text_that_the_model_reads_is_told(
    tiny_model: Path, tmp_path: Path, row: dict[str, str], given: str | None, says: str
) -> None:
    """Prevents a system text of one's own that check, report and card report as absent."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({**row, "instruction": f"{i}?"}) + "\n" for i in range(4)))
    recipe, _ = library.resolve(flags={"model.name": str(tiny_model), "data.path": str(data), "template.system": given})
    assert library.check(recipe).system_text == says
    sets = ["--set", f"template.system={given}"] if given else []
    ended = tunesmith("check", "--model", tiny_model, "--data", data, *sets)
    assert re.search(rf"system text +{re.escape(says)}", ended.out), ended.out


@pytest.mark.parametrize(
    ("others", "fix"),
    [
        ([ROW] * 3, "Rename it in the file."),
        ([], "Rename it in the file, or pass flags={'data.columns.output': 'outptu'}"),
    ],
)
def test_a_flag_for_the_whole_file_is_named_where_no_row_is_right_without_it(
    tiny_model: Path, tmp_path: Path, others: list[dict[str, str]], fix: str
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [*({**row, "instruction": f"{i}?"} for i, row in enumerate(others)), {"instruction": "q", "outptu": "a"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe, _ = library.resolve(flags={"model.name": str(tiny_model), "data.path": str(data)})
    assert [fault.fix for fault in library.check(recipe).faults] == [fix]


def test_help_shows_every_default_as_it_is_set() -> None:
    """Prevents [false] for 0 and [true] for 1, which Python takes for the same."""
    text = tunesmith("train", "--help", COLUMNS="4000").out
    for name in setting_names():
        section, _, field = name.partition(".")
        default = getattr(getattr(Recipe(), section), field)
        shown = re.search(rf"{re.escape(name)} \[(.*?)\]", text)
        assert shown, name
        if default not in ("", None, {}, []):
            assert parse_flag(f"{name}={shown[1]}")[1] == default and (shown[1] in ("true", "false")) is (
                type(default) is bool
            )


def test_doctor_knows_every_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.PURPOSES) == set(project["optional-dependencies"]) - {"all", "benchmarks", "dev"}
    lines = ['no-such-package[more]>=1; extra == "eval"', 'torch>=2; extra == "serve"', "torch>=2"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: lines)
    (found,) = (finding for finding in doctor.examine() if finding.name == "extras")
    assert "serve" in found.found and "eval" not in found.found
    assert "tunesmith[eval]" in found.fix and "serve" not in found.fix
