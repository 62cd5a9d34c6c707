"""What a command line says of a training: files without an option, settings with an option of their own, and the names
that other tools have for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import tunesmith
from test_docs import GROUP
from tunesmith import recipe as recipes
from tunesmith.cli.options import SHORT, Given, given, ours, short_help
from tunesmith.errors import RecipeError

KNOWN = [name for parameter in GROUP.commands["train"].params for name in parameter.opts]


def asked(*files: str, data: str | None = None, sets: list[str] | None = None, **short: str) -> Given:
    return given([Path(file) for file in files], None, data, sets, None, **short)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "a b/ROWS.CSV", "rows.parquet"])
def test_a_file_of_rows_needs_no_option(name: str) -> None:
    assert asked(name).recipe == asked(data=name).recipe
    assert asked(name).recipe.data.path == name and asked(name).sources["data.path"] == "flag"


def test_a_recipe_and_rows_stand_side_by_side(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {path: other.jsonl}\nlora: {r: 4}\n")
    for files in ((str(recipe), "rows.jsonl"), ("rows.jsonl", str(recipe))):
        made = asked(*files, epochs="7")
        assert (made.recipe.data.path, made.recipe.lora.r, made.recipe.train.epochs) == ("rows.jsonl", 4, 7)
        assert made.sources["lora.r"] == "file"
    assert asked(str(recipe)).recipe.data.path == "other.jsonl"


@pytest.mark.parametrize(
    ("files", "options"),
    [
        (["a.jsonl"], {"data": "b.jsonl"}),
        (["a.jsonl"], {"data": "a.jsonl"}),
        (["a.jsonl", "b.csv"], {}),
        (["a.jsonl"], {"sets": ["data.path=b.jsonl"]}),
        ([], {"data": "a.jsonl", "sets": ["data.path=b.jsonl"]}),
        ([], {"epochs": "2", "sets": ["train.epochs=3"]}),
        (["a.yaml", "b.yaml"], {}),
    ],
    ids=str,
)
def test_what_is_given_twice_is_an_error(files: list[str], options: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="Leave one of the two out"):
        asked(*files, **options)  # type: ignore[arg-type]


def test_check_plan_and_train_take_rows_and_short_forms_alike(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    short = ("--epochs", "2", "--lr", "1e-3", "--rank", "4", "--batch", "2")
    long = ("train.epochs=2", "train.learning_rate=1e-3", "lora.r=4", "train.examples_per_step=2")
    sets = [word for text in long for word in ("--set", text)]
    for command in ("check", "plan"):
        one = tunesmith(command, rows, "--model", tiny_model, *short, "--json").json
        other = tunesmith(command, "--data", rows, "--model", tiny_model, *sets, "--json").json
        measured = dict.fromkeys(("seconds", "times", "parts", "peak_memory_bytes", "available_bytes"))
        assert one | measured == other | measured
    ended = tunesmith("train", rows, "--model", tiny_model, *short, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    made, _ = recipes.resolve(tmp_path / "run" / "recipe.yaml")
    assert made == asked(str(rows), sets=[*long, f"model.name={tiny_model}"]).recipe


@pytest.mark.parametrize("name", SHORT)
def test_a_short_form_is_described_by_the_recipe(name: str) -> None:
    section, _, field = SHORT[name].partition(".")
    setting = getattr(recipes.Recipe(), section)
    described = type(setting).model_fields[field].description
    assert described is not None and described in short_help(name) and f"--set {SHORT[name]}" in short_help(name)
    for command in ("check", "plan", "train"):
        (option,) = (each for each in GROUP.commands[command].params if f"--{name}" in each.opts)
        assert option.show_default == str(getattr(setting, field))
    with pytest.raises(RecipeError, match=f"{SHORT[name]}.*: found 'x'; expected .*number"):
        asked(**{name: "x"})


# --- the names of other tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", recipes.OTHER_NAMES)
def test_every_name_of_another_tool_is_answered_with_ours(setting: str) -> None:
    for name in recipes.OTHER_NAMES[setting].split():
        for option in (f"--{name}", f"--{name.replace('_', '-')}"):
            if option in KNOWN:
                continue
            fix = ours(option, KNOWN)
            assert fix is not None and (setting in fix if setting.startswith("--") else f"--set {setting}=" in fix)
            for own in re.findall(r"(?<!\S)--[a-z]+", fix):
                assert own in KNOWN


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--learning_rate", "Write --set train.learning_rate=…, or --lr."),
        ("--num_train_epochs", "Write --set train.epochs=…, or --epochs."),
        ("--per_device_train_batch_size", "or --batch. Rows per optimizer step, over all devices; auto"),
        ("--lora_r", "Write --set lora.r=…, or --rank."),
        ("--model_name_or_path", "Write --set model.name=…, or --model."),
        ("--cutoff_len", "Write --set data.max_length=…. "),
        ("--output_dir", "Write --out."),
        ("--lora.dropout", "Write --set lora.dropout=…. "),
    ],
)
def test_another_tools_option_is_an_error_with_ours(option: str, says: str) -> None:
    ended = tunesmith("train", option, "2", "--data", "rows.jsonl")
    assert ended.code == 2 and option in ended.err and "Did you mean" not in ended.err
    assert says in re.sub(r"\s+", " ", ended.err) + " "


@pytest.mark.parametrize("line", ["chat runs/mine --learning_rate 1", "resume runs/mine --lr 1", "train --no_such 1"])
def test_where_there_is_no_such_setting_the_options_are_listed(line: str) -> None:
    words = line.split()
    ended = tunesmith(*words)
    assert ended.code == 2 and "--set" not in ended.err
    fix = ended.err[ended.err.rindex("listed by: ") :].removeprefix("listed by: ").split()
    assert fix[1:] == [words[0], "--help"]


def test_settings_of_somebody_else_s_lie_below_what_is_given(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lora:\n  r: 4\n")
    common = (recipe, "--model", tiny_model, "--data", talk, "--like", "tutorial", "--epochs", "1")
    ended = tunesmith("train", *common, "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    for line in ("r: 4  # file", "epochs: 1  # flag", "learning_rate: 0.0001  # flag", "rehearse: 0.0  # flag"):
        assert f"  {line}\n" in text
    said = tunesmith("check", *common)
    assert "--like tutorial" in said.out.replace("\n", " ")  # what comes next is the same once more
    refused = tunesmith("plan", *common[:-4], "--like", "nobody")
    assert refused.code == 2 and "one of tutorial" in refused.err
