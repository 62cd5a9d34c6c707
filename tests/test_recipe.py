"""Settings: defaults, where a value came from, and what is said about a wrong one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunesmith import recipe
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe, parse_flag, resolve, setting_names, write
from tunesmith.training.run import Run

# The table of the contract. What is chosen by the plan is "auto" here; `none` is None where no text stands.
CONTRACT = {
    "model.revision": None,
    "model.dtype": "auto",
    "model.quantize": "none",
    "data.columns": {},
    "data.rehearse": None,
    "data.max_length": "auto",
    "data.allow_set_aside": False,
    "data.on_repeats": "note",
    "template.name": "auto",
    "template.path": None,
    "template.system": None,
    "lora.r": 16,
    "lora.alpha": 32,
    "lora.dropout": 0.0,
    "lora.targets": "all-linear",
    "lora.variant": "plain",
    "train.epochs": "auto",
    "train.examples_per_step": "auto",
    "train.learning_rate": "auto",
    "train.scheduler": "cosine",
    "train.warmup_ratio": 0.03,
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.seed": 0,
    "train.save_every": "100 steps",
    "train.keep_checkpoints": 3,
    "train.rehearse": "auto",
    "train.report_to": [],
    "engine.tokens_per_micro_batch": "auto",
    "engine.share_prefix": True,
    "engine.attention": "auto",
    "engine.recompute_layers": "auto",
    "engine.self_check": True,
    "eval.hold_out": "auto",
    "eval.every": "1 epoch",
    "eval.keep": "last",
    "eval.patience": 0,
}
WITHOUT_DEFAULT = {"model.name", "data.path"}


def of(**values: Any) -> Recipe:
    """The recipe with some settings given as flags: lora__r=4 is --set lora.r=4."""
    return resolve(None, {name.replace("__", "."): value for name, value in values.items()})[0]


def refused(flags: dict[str, Any] | None = None, path: Path | None = None) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        resolve(path, flags)
    return caught.value


def file(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def flat(values: Recipe) -> dict[str, Any]:
    return {
        f"{section}.{name}": value for section, fields in values.model_dump().items() for name, value in fields.items()
    }


def test_defaults_are_those_of_the_contract() -> None:
    ours = flat(resolve()[0])
    assert {name: value for name, value in ours.items() if name not in WITHOUT_DEFAULT} == CONTRACT


def test_every_setting_has_a_description_that_reads_as_sentences() -> None:
    for section, field in Recipe.model_fields.items():
        for name, setting in field.annotation.model_fields.items():  # type: ignore[union-attr]
            description = setting.description or ""
            assert len(description) > 15 and description.endswith("."), f"{section}.{name}"


def test_a_value_says_whether_it_is_a_default_or_from_the_file_or_a_flag(tmp_path: Path) -> None:
    path = file(tmp_path, "lora:\n  r: 4\n  alpha: 16\ntrain:\n  seed: 7\n")
    values, sources = resolve(path, {"lora.r": 64})
    assert (values.lora.r, values.lora.alpha, values.train.seed, values.train.epochs) == (64, 16, 7, "auto")
    assert (sources["lora.r"], sources["lora.alpha"], sources["train.epochs"]) == ("flag", "file", "default")
    assert list(sources) == setting_names()


def test_a_written_recipe_says_where_each_value_came_from(tmp_path: Path) -> None:
    text = write(*resolve(file(tmp_path, "lora:\n  r: 4\n"), {"train.seed": 1}))
    lines = text.splitlines()
    assert "  r: 4  # file" in lines and "  seed: 1  # flag" in lines and "  epochs: auto  # default" in lines


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
words = st.text(st.characters(codec="utf-8", categories=("L", "N", "Zs", "P", "S")), min_size=1, max_size=12)


@example(system="\xa0", name="1.10", columns={}, targets="all-linear", rate=1e-4, max_length=2, alpha=1)
@example(system="\x85", name="\u2028", columns={}, targets=["\u2029"], rate=1e-4, max_length=2, alpha=1)
@example(system=" a #b\n\nc: d", name="~", columns={}, targets=["no"], rate=1e-5, max_length=2, alpha=0.5)
@settings(max_examples=200, deadline=None)
@given(
    system=texts | st.none(),
    name=texts.filter(bool),
    columns=st.dictionaries(st.sampled_from(["instruction", "output", "messages"]), texts, max_size=3),
    targets=st.just("all-linear") | st.lists(words, min_size=1, max_size=3),
    rate=st.floats(min_value=1e-300, max_value=1),
    max_length=st.just("auto") | st.integers(min_value=2),
    alpha=st.integers(min_value=1) | st.floats(min_value=1e-9, max_value=1e9),
)
def test_what_is_written_is_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
    """Prevents a run's recipe.yaml that trains something else: a system text cut at ' #', a name read as a number."""
    names = {
        "system": "template.system",
        "name": "model.name",
        "columns": "data.columns",
        "targets": "lora.targets",
        "rate": "train.learning_rate",
        "max_length": "data.max_length",
        "alpha": "lora.alpha",
    }
    given_values, sources = resolve(None, {names[name]: value for name, value in values.items()})
    path = file(tmp_path_factory.getbasetemp(), write(given_values, sources), "again.yaml")
    again, sources_again = resolve(path)
    assert again == given_values
    assert set(sources_again.values()) == {"file"}


@settings(max_examples=200, deadline=None)
@given(texts)
def test_a_text_on_the_command_line_is_taken_as_it_stands(text: str) -> None:
    """Prevents a system text that loses what follows ' #', and a branch 1.10 that becomes 1.1."""
    name, value = parse_flag(f"template.system={text}")
    if text[:1] not in ("'", '"'):
        assert (name, value) == ("template.system", text)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=2E-4", 2e-4),
        ("train.learning_rate=.5e-3", 5e-4),
        ("lora.r=16", 16),
        ("lora.targets=q_proj", "q_proj"),
        ("lora.targets=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("data.allow_set_aside=true", True),
        ("data.columns={output: answer}", {"output": "answer"}),
        ("data.columns.output=007", "007"),
        ("data.path=my file, no. 1.json", "my file, no. 1.json"),
        ("model.revision=1.10", "1.10"),
        ("model.revision=12e45", "12e45"),
        ("model.revision=2024-13-45", "2024-13-45"),
        ("lora.r=2024-13-45", "2024-13-45"),
        ("template.system=You are #1: be brief", "You are #1: be brief"),
        ("template.system='It''s quoted'", "It's quoted"),
        ("template.system=a=b", "a=b"),
    ],
)
def test_a_flag_is_read(flag: str, value: object) -> None:
    assert parse_flag(flag) == (flag.partition("=")[0], value)


@pytest.mark.parametrize("flag", ["lora.r", "=8", "", " = "])
def test_a_flag_without_key_and_value_is_refused(flag: str) -> None:
    with pytest.raises(RecipeError, match="key=value"):
        parse_flag(flag)


def test_numbers_as_people_write_them_are_numbers(tmp_path: Path) -> None:
    path = file(tmp_path, "train:\n  learning_rate: 1e-3\n  weight_decay: 1.5E-2\nlora:\n  alpha: 64\n")
    values = resolve(path)[0]
    assert (values.train.learning_rate, values.train.weight_decay, values.lora.alpha) == (1e-3, 0.015, 64)


def test_lists_may_be_written_with_commas() -> None:
    assert of(lora__targets="q_proj, v_proj").lora.targets == ["q_proj", "v_proj"]
    assert of(lora__targets=["q_proj"]).lora.targets == ["q_proj"]
    assert of(lora__targets="all-linear").lora.targets == "all-linear"
    assert of(train__report_to="tensorboard,wandb").train.report_to == ["tensorboard", "wandb"]


def test_columns_can_be_given_one_by_one_and_add_to_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, "data:\n  columns: {instruction: question, output: reply}\n")
    values, sources = resolve(path, {"data.columns.output": "answer", "data.columns.input": "context"})
    assert values.data.columns == {"instruction": "question", "output": "answer", "input": "context"}
    assert sources["data.columns"] == "flag"


@pytest.mark.parametrize("word", ["none", "None", "null", None])
def test_none_is_nothing(word: str | None, tmp_path: Path) -> None:
    values = of(template__system=word, template__path=word, model__revision=word, train__report_to=word)
    assert (values.template.system, values.template.path, values.model.revision) == (None, None, None)
    assert values.train.report_to == []
    path = file(tmp_path, f"template:\n  system: {word or '~'}\ntrain:\n  report_to: {word or '~'}\n")
    assert resolve(path)[0] == resolve()[0]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lr", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("lora.rank", "lora.r"),
        ("rank", "lora.r"),
        ("lora_alpha", "lora.alpha"),
        ("lora.lora_alpha", "lora.alpha"),
        ("lora.target_modules", "lora.targets"),
        ("target-modules", "lora.targets"),
        ("batch_size", "train.examples_per_step"),
        ("train.per_device_train_batch_size", "train.examples_per_step"),
        ("gradient_accumulation_steps", "train.examples_per_step"),
        ("num_train_epochs", "train.epochs"),
        ("epochs", "train.epochs"),
        ("max_seq_length", "data.max_length"),
        ("cutoff_len", "data.max_length"),
        ("lr_scheduler_type", "train.scheduler"),
        ("warmup_steps", "train.warmup_ratio"),
        ("save_steps", "train.save_every"),
        ("model_name_or_path", "model.name"),
        ("dataset", "data.path"),
        ("load_in_4bit", "model.quantize"),
        ("gradient_checkpointing", "engine.recompute_layers"),
        ("system_prompt", "template.system"),
        ("val_size", "eval.hold_out"),
        ("output_dir", "`out`"),
        ("train.epocs", "train.epochs"),
        ("lora.targts", "lora.targets"),
        ("model", "model.name"),
        ("hold_out", "eval.hold_out"),
        ("lora.epochs", "train.epochs"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_right_one(name: str, wanted: str) -> None:
    error = refused({name: 1})
    assert error.where == f"flags['{name}']"
    assert f"'{name}'" in error.found
    assert error.fix == f"Did you mean {wanted}?"


def test_hints_lead_to_settings_that_exist() -> None:
    assert {name for name in recipe.OTHER_NAMES if not name.startswith("--")} <= set(setting_names())
    others = [name for names in recipe.OTHER_NAMES.values() for name in names.split()]
    assert len(others) == len(set(others))
    assert not {f"{section}.{name}" for section in Recipe.model_fields for name in others} & set(setting_names())


def test_an_unknown_setting_like_no_other_lists_them_all() -> None:
    assert all(name in refused({"zzz.qqq": 1}).fix for name in setting_names())


@pytest.mark.parametrize(
    ("name", "value", "found", "expected"),
    [
        ("lora.r", 0, "0", "at least 1"),
        ("lora.r", 1.5, "1.5", "a whole number"),
        ("lora.r", "eight", "'eight'", "a whole number"),
        ("lora.r", True, "true", "something else than a truth value"),
        ("lora.alpha", -1, "-1", "more than 0"),
        ("lora.dropout", 1, "1", "less than 1"),
        ("lora.dropout", float("nan"), "nan", "a finite number"),
        ("lora.variant", "loha", "'loha'", "'plain', 'rslora', 'dora' or 'pissa'"),
        ("lora.targets", "", "[]", "at least one name"),
        ("lora.targets", 5, "5", "'all-linear', or a list"),
        ("train.learning_rate", 5, "5", "at most 1"),
        ("train.learning_rate", None, "null", "a number"),
        ("train.seed", -1, "-1", "at least 0"),
        ("train.save_every", "often", "'often'", "something like '100 steps'"),
        ("train.save_every", "0 steps", "'0 steps'", "something like '100 steps'"),
        ("eval.every", 5, "5", "text (put it in quotes)"),
        ("eval.hold_out", 1, "1", "less than 1"),
        ("data.max_length", 1, "1", "at least 2, or 'auto'"),
        ("data.max_length", "long", "'long'", "a whole number, or 'auto'"),
        ("data.allow_set_aside", "perhaps", "'perhaps'", "true or false"),
        ("data.columns", "answer", "'answer'", "names with columns"),
        ("data.columns.ouput", "answer", "{'ouput': 'answer'}", "(output?)"),
        ("model.name", "", "''", "at least 1 character"),
        ("model.dtype", "fp16", "'fp16'", "'float16'"),
    ],
)
def test_an_impossible_value_is_refused_and_the_setting_explained(
    name: str, value: object, found: str, expected: str
) -> None:
    error = refused({name: value})
    setting = "data.columns" if name.startswith("data.columns") else name
    assert error.where.startswith("flags['") and setting in error.where
    assert found in error.found
    assert expected in error.expected
    section, field = setting.split(".")
    assert type(getattr(resolve()[0], section)).model_fields[field].description in error.fix


def test_several_problems_are_named_together(tmp_path: Path) -> None:
    path = file(tmp_path, "lora:\n  rank: 8\n  alpha: -1\n\nnonsense:\n  a: 1\ntrain:\n  epochs: 0\n")
    error = refused({"train.lr": 1, "lora.dropout": 2}, path)
    message = str(error)
    for part in (f"{path}:2", f"{path}:3", f"{path}:5", f"{path}:8", "flags['train.lr']", "flags['lora.dropout']"):
        assert part in error.where
    for part in ("'lora.rank'", "lora.alpha = -1", "'nonsense'", "train.epochs = 0", "'train.lr'", "lora.dropout = 2"):
        assert part in error.found
    assert "Did you mean lora.r?" in message and "Did you mean train.learning_rate?" in message
    assert "lora.alpha more than 0" in error.expected and "train.epochs at least 1" in error.expected


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("lora:\n  r: 8\n  r: 16\n", 3, "'r' twice"),
        ("lora:\n  r: 8\ntrain:\n  seed: 1\nlora:\n  alpha: 3\n", 5, "'lora' twice"),
        ("lora:\n\tr: 8\n", 2, "\\t"),
        ("lora:\n  r: 8\n   alpha: 3\n", 3, "mapping values"),
        ("lora:\n  targets: [q_proj,\n", 3, "stream end"),
        ("lora:\n  r: 8\n\x07\n", 3, "U+0007"),
        ("lora: {r: 8}\n---\nlora: {r: 9}\n", 2, "another document"),
        ("lora:\n  ? [a, b]\n  : 1\n", 2, "unhashable key"),
        ("lora: 5\n", 1, "5"),
        ("lora:\n  - r\n", 1, "['r']"),
        ("# ours\n\nlora:\n  r: 0\n", 4, "0"),
        ("lora:\n  a: !!python/object/apply:os.system [ls]\n", 2, "tag"),
        ("model:\n  revision: 1.10\n", 2, "1.1"),
    ],
)
def test_a_broken_recipe_is_named_by_line(tmp_path: Path, text: str, line: int, found: str) -> None:
    path = file(tmp_path, text)
    error = refused(path=path)
    assert error.where.startswith(f"{path}:{line}")
    assert found in error.found


@pytest.mark.parametrize(
    ("text", "found"),
    [("- lora\n", "a list"), ("lora\n", "one value"), ("[" * 3000, "nesting"), ("lora:\n  r: 2024-13-45\n", "month")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, found: str) -> None:
    assert found in refused(path=file(tmp_path, text)).found


def test_a_recipe_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(path=tmp_path / "absent.yaml").found
    assert "a folder" in refused(path=tmp_path).found
    (tmp_path / "gbk.yaml").write_bytes("template:\n  system: 你好\n".encode("gb18030"))
    assert "not UTF-8" in refused(path=tmp_path / "gbk.yaml").found


def test_data_in_the_place_of_a_recipe_is_recognised(tmp_path: Path) -> None:
    path = file(tmp_path, '{"instruction": "a", "output": "b"}\n', "my rows.jsonl")
    assert refused(path=path).fix == f"Pass it as flags={{'data.path': '{path}'}}"


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "lora:\ntrain:\n", "\ufefflora:\n  r: 16\n"])
def test_an_empty_recipe_is_all_defaults(tmp_path: Path, text: str) -> None:
    assert resolve(file(tmp_path, text))[0] == resolve()[0]


def test_a_recipe_can_not_be_changed_once_it_is_made() -> None:
    with pytest.raises(ValueError, match="frozen"):
        resolve()[0].lora.r = 4  # type: ignore[misc]


def test_files_that_a_recipe_names_are_found_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a recipe that can only be trained from the one folder."""
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "recipe.yaml").write_text("data: {path: rows.jsonl}\nmodel: {name: smollm2}\n")
    (folder / "rows.jsonl").touch()
    monkeypatch.chdir(elsewhere)
    found, sources = recipe.resolve(Path("..", "mine", "recipe.yaml"))
    assert Path(found.data.path).samefile(folder / "rows.jsonl") and sources["data.path"] == "file"
    assert found.model.name == "smollm2"
    assert recipe.resolve(folder / "recipe.yaml", as_written=True)[0].data.path == "rows.jsonl"
    Path("rows.jsonl").touch()
    assert recipe.resolve(folder / "recipe.yaml")[0].data.path == "rows.jsonl"  # the one at hand comes first
    flagged, _ = recipe.resolve(folder / "recipe.yaml", {"data.path": "other.jsonl"})
    assert flagged.data.path == "other.jsonl"


def test_a_runs_own_recipe_is_trained_from_any_folder(
    undisturbed: Run, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its names are those from where it was started, which its manifest holds in full."""
    run = shutil.copytree(undisturbed.path, tmp_path / "run")
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace(str(talk), talk.name))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["data"]["path"] = talk.name
    (run / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(run)
    assert recipe.resolve("recipe.yaml")[0].data.path == str(talk)


def test_what_does_not_go_together_is_refused_by_name() -> None:
    """Prevents an error of peft's after the base has been read."""
    with pytest.raises(RecipeError, match=r"lora\.variant.*pissa with weights of 4 bits.*model\.quantize"):
        recipe.resolve(None, {"lora.variant": "pissa", "model.quantize": "nf4"})
    assert recipe.resolve(None, {"lora.variant": "dora", "model.quantize": "nf4"})
