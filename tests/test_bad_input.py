"""What a user can get wrong, through the command line: exit code 2, a message that says where, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import Ended, byte_tokenizer, start, tunesmith
from tunesmith import recipe, runs
from tunesmith.runs import rundir
from tunesmith.training.run import resume, train

GOOD = {"instruction": "Who are you?", "output": "I am Bo."}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # tests run side by side


def environment() -> dict[str, str]:
    """What `tunesmith` of conftest gives its processes."""
    return {**os.environ, "TUNESMITH_OFFLINE": "1", "COLUMNS": "200", **ONE_THREAD}


def jsonl(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, to see that nothing has changed."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def assert_message(ended: Ended, *parts: str | Path, as_json: bool = True) -> None:
    """Exit code 2, no traceback, every part in the message; with --json one JSON object and no more on stdout."""
    assert ended.code == 2, ended.err
    message = ended.err if as_json else ended.out + ended.err
    assert "Traceback" not in message
    for part in parts:
        assert str(part) in message, f"{part!r} is not in\n{message}"
    if as_json and ended.out:
        assert isinstance(json.loads(ended.out), dict)
        assert ended.out.count("\n") == 1


def refused(folder: Path, *arguments: str | Path, says: tuple[str | Path, ...]) -> Ended:
    """Runs a command in `folder`, which must end with a message that has all parts and leave the folder as it was."""
    before = contents(folder)
    ended = tunesmith(*arguments, cwd=folder, **ONE_THREAD)
    assert_message(ended, *says, as_json="--json" in arguments)
    assert contents(folder) == before
    return ended


def save(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


# --- data -------------------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
WRONG_ROWS: dict[str, tuple[Any, str, str]] = {
    "broken JSON": ('{"instruction": "q", "output": }', "row", "a value"),
    "missing field": ({"instruction": "q"}, "output", "only 'instruction'"),
    "misspelt field": ({"instrution": "q", "output": "a"}, "instruction", "Rename it in the file."),
    "number for a text": ({"instruction": "q", "output": 42}, "output", "the number 42"),
    "null answer": ({"instruction": "q", "output": None}, "output", "null"),
    "empty answer": ({"instruction": "q", "output": " "}, "output", "no text"),
    "roles out of order": ({"messages": TURNS + TURNS[1:]}, "messages[2]", "two assistant turns in a row"),
    "no reply at the end": ({"messages": TURNS + TURNS[:1]}, "messages[2]", "a user turn at the end"),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "'bot'"),
    "key twice": ('{"instruction": "q", "output": "a", "output": "b"}', "output", "twice in one object"),
    "half an emoji": ('{"messages": [{"role": "\\ud83d", "content": "x"}]}', "messages[0].role", "'\\ud83d'"),
}


def test_every_kind_of_wrong_row_is_named_by_line_in_one_pass(tiny_model: Path, tmp_path: Path) -> None:
    """Prevents the fault that hides behind another: a person mends the file once, not eleven times."""
    path = save(tmp_path, jsonl(GOOD, *(row for row, _, _ in WRONG_ROWS.values()), GOOD))
    ended = refused(
        tmp_path, "check", "--model", tiny_model, "--data", path, "--json", says=(f"{len(WRONG_ROWS)} faulty",)
    )
    answer = ended.json
    assert answer["rows"] == {"read": 13, "trainable": 2, "trained": 2, "held_out": 0, "set_aside": 11, "repeats": 1}
    for line, (fault, (_, field, says)) in enumerate(zip(answer["faults"], WRONG_ROWS.values(), strict=True), 2):
        assert (fault["file"], fault["line"], fault["field"]) == (str(path), line, field)
        assert says in " ".join((fault["found"], fault["expected"], fault["fix"]))
        assert line > 11 or f"rows.jsonl:{line}" in ended.err  # ten are shown, all are in the JSON


@pytest.mark.parametrize("kind", ["broken JSON", "null answer"])
def test_training_does_not_start_with_a_wrong_row(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    row, field, _ = WRONG_ROWS[kind]
    path = save(tmp_path, jsonl(GOOD, row))
    arguments = ("train", "--model", tiny_model, "--data", path, "--out", tmp_path / "run", "--json")
    ended = refused(tmp_path, *arguments, says=("rows.jsonl:2", "1 of 2 rows faulty", "data.allow_set_aside=true"))
    (fault,) = ended.json["faults"]
    assert (fault["line"], fault["field"]) == (2, field)


def test_one_wrong_line_among_thousands_is_found(tiny_model: Path, tmp_path: Path) -> None:
    path = save(tmp_path, jsonl(*[GOOD] * 2345, '{"instruction": "q"', *[GOOD] * 1000))
    refused(tmp_path, "check", "--model", tiny_model, "--data", path, says=("rows.jsonl:2346", "1 faulty row"))


def test_an_array_that_breaks_off_is_named_by_the_line_where_reading_stopped(tiny_model: Path, tmp_path: Path) -> None:
    text = json.dumps([GOOD] * 40, indent=2)
    path = save(tmp_path, text[: text.index("am Bo", 2000)].encode(), "rows.json")
    line = path.read_text().count("\n") + 1
    refused(
        tmp_path, "check", "--model", tiny_model, "--data", path, says=(f"rows.json:{line}", "Reading stopped here")
    )


IN_GB18030 = '{"instruction": "你是谁", "output": "波"}\n'.encode("gb18030")
MAP_BOTH = "--set data.columns.instruction=question --set data.columns.output=answer"
WRONG_FILES: dict[str, tuple[str, bytes, str, tuple[str, ...]]] = {
    "empty": ("rows.jsonl", b"", "", ("an empty file",)),
    "blank": ("rows.json", b"\n \n", "", ("an empty file",)),
    "no rows": ("rows.json", b"[]", "", ("no rows",)),
    "UTF-16": ("rows.json", json.dumps([GOOD]).encode("utf-16"), "", ("UTF-16LE", "iconv -f UTF-16 -t UTF-8")),
    "GB18030": ("rows.jsonl", jsonl(GOOD) + IN_GB18030, ":2", ("GB18030", "你是谁", "iconv")),
    "NUL bytes": ("rows.jsonl", jsonl(GOOD, GOOD) + b'{"instruction": "\0\0"}\n', ":3", ("a NUL byte",)),
    "another header": ("rows.csv", b"question,answer\nWho?,Bo.\n", ":1", ("instruction and output", MAP_BOTH)),
    "semicolons": ("rows.csv", b"instruction;output\nWho?;Bo.\n", ":1", ("Separate the columns by commas",)),
    "text called Parquet": ("rows.parquet", jsonl(GOOD), "", ("no Parquet", '{"instru')),
    "broken Parquet": ("rows.parquet", b"PAR1" + b"\0" * 99, "", ("damaged Parquet",)),
    "a zip archive": ("rows.json", b"PK\x03\x04", "", ("a zip archive",)),
    "prose": ("rows.jsonl", b"\nOnce upon a time\n", ":2", ("Once upon a time", "'{' (an object a line)")),
    "pretty objects": ("rows.jsonl", json.dumps(GOOD, indent=1).encode(), ":1", ("an object over several lines",)),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_file_that_can_not_be_read_is_refused(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    name, content, line, says = WRONG_FILES[kind]
    path = save(tmp_path, content, name)
    arguments = ("train", "--model", tiny_model, "--data", path, "--out", tmp_path / "run", "--json")
    ended = refused(tmp_path, *arguments, says=(f"{path}{line}", *says))
    assert ended.json["error"]["where"] == f"{path}{line}"


def test_a_file_that_is_not_there_is_refused_with_one_that_is(tiny_model: Path, tmp_path: Path) -> None:
    save(tmp_path, jsonl(GOOD))
    refused(
        tmp_path, "check", "--model", tiny_model, "--data", "row.jsonl", says=("row.jsonl", "Did you mean rows.jsonl?")
    )
    refused(tmp_path, "check", "--model", tiny_model, "--data", ".", "--json", says=("a folder",))
    refused(tmp_path, "check", "--model", tiny_model, "--json", says=("Pass --data FILE.",))


def test_a_file_name_that_is_not_utf8_can_be_reported(tiny_model: Path, tmp_path: Path) -> None:
    """Prevents a traceback from printing the name of a file unpacked from a Chinese Windows archive."""
    try:
        path = save(tmp_path, jsonl(GOOD, {}), os.fsdecode(b"\xca\xfd\xbe\xdd.jsonl"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    ended = refused(tmp_path, "check", "--model", tiny_model, "--data", path, "--json", says=(":2",))
    assert ended.json["faults"][0]["file"] == str(path)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smolm2", ("smolm2", "Did you mean smollm2?")),
        ("hf:nobody/no-such-model", ("hf:nobody/no-such-model", "TUNESMITH_OFFLINE", "tunesmith fetch")),
        ("./nowhere", ("./nowhere", "no such folder")),
        ("rows.jsonl", ("rows.jsonl", "a file", "the folder of a model")),
    ],
)
def test_a_model_that_is_not_here_is_refused(tmp_path: Path, name: str, says: tuple[str, ...]) -> None:
    path = save(tmp_path, jsonl(GOOD))
    refused(tmp_path, "train", "--model", name, "--data", path, "--out", "run", "--json", says=says)


def without(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_bytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 9)


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def no_template(folder: Path) -> None:
    without(folder, "chat_template.jinja")
    byte_tokenizer(None).save_pretrained(folder)


def remote_code(folder: Path) -> None:
    change_config(folder, model_type="secret", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")


BROKEN_MODELS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no tokenizer": (lambda f: without(f, "tokenizer*"), ("model", "no tokenizer files")),
    "no config": (lambda f: without(f, "config.json"), ("model", "no config.json")),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        ("model", "a tokenizer that can not be read"),
    ),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ("model", "config")),
    "no chat template": (no_template, ("model", "a tokenizer without a chat template", "template.path=FILE")),
    "broken template": (lambda f: (f / "chat_template.jinja").write_text("{% for %}"), ("chat template (tokenizer)",)),
    "no weights": (lambda f: without(f, "*.safetensors"), ("model", "no weights (*.safetensors)")),
    "truncated weights": (cut, ("model.safetensors", "bytes", "The file is cut or damaged")),
    "Git LFS pointer": (lfs_pointer, ("model.safetensors", "a Git LFS pointer", "git lfs pull")),
    "other bytes for weights": (other_bytes, ("model.safetensors", "no safetensors")),
    "missing tensors": (drop_a_tensor, ("model", "no weights for 1 part", "model.layers.1.mlp.down_proj.weight")),
    "weights of another shape": (lambda f: change_config(f, intermediate_size=96), ("model", "weights")),
    "a model of remote code": (remote_code, ("model", "Remote code is never run")),
}


@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_a_broken_model_is_refused(model: Path, tmp_path: Path, kind: str) -> None:
    """Prevents random numbers in the place of weights that are not there, and code that came with a model."""
    damage, says = BROKEN_MODELS[kind]
    damage(model)
    path = save(tmp_path, jsonl(GOOD))
    refused(tmp_path, "train", "--model", model, "--data", path, "--out", "run", "--json", says=says)


# --- settings ---------------------------------------------------------------------------------------------------------


LAYERS = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("lora.rank=16", ("--set lora.rank", "the unknown setting 'lora.rank'", "Did you mean lora.r?")),
        ("learning_rate=1e-3", ("Did you mean train.learning_rate?",)),
        ("lora.r=0", ("--set lora.r", "found    0", "at least 1", "Rank of the two factors")),
        ("lora.r=many", ("'many'", "a whole number")),
        ("train.epochs=0", ("train.epochs", "at least 1")),
        ("lora.r", ("--set lora.r", "key=value")),
        ("lora.targets=[q_proj, W_pack]", ("'W_pack', which matches no layer", LAYERS, "k_proj and q_proj and v_proj")),
        ("lora.targets=q_prj", ("'q_prj', which matches no layer", "Did you mean q_proj?")),
        ("train.scheduler=cosin", ("train.scheduler", "'cosin'", "cosine")),
        ("train.report_to=nosuchtracker", ("train.report_to", "nosuchtracker")),
        ("data.max_length=513", ("data.max_length", "513", "at most 512")),
        ("template.name=chatlm", ("template.name", "'chatlm'")),
        ("template.path=nowhere.jinja", ("nowhere.jinja", "a Jinja file")),
        ("model.quantize=nf4", ("model.quantize",)),
        ("model.revision=main", ("the revision main",)),
    ],
)
def test_a_wrong_setting_is_refused(tiny_model: Path, tmp_path: Path, setting: str, says: tuple[str, ...]) -> None:
    path = save(tmp_path, jsonl(GOOD))
    arguments = ("train", "--model", tiny_model, "--data", path, "--out", "run", "--json", "--set", setting)
    refused(tmp_path, *arguments, says=says)


@pytest.mark.parametrize(
    ("setting", "lines", "fix"),
    [("auto", [2], "Shorten the row"), ("100", [2, 3], "Raise data.max_length")],
)
def test_a_row_longer_than_the_model_may_read_is_named_by_line_and_never_cut(
    tiny_model: Path, tmp_path: Path, setting: str, lines: list[int], fix: str
) -> None:
    path = save(tmp_path, jsonl(GOOD, {**GOOD, "output": "x" * 600}, {**GOOD, "instruction": "y" * 400}))
    arguments = ("check", "--model", tiny_model, "--data", path, "--json", "--set", f"data.max_length={setting}")
    answer = refused(tmp_path, *arguments, says=("rows.jsonl:2",)).json
    assert [fault["line"] for fault in answer["faults"]] == lines
    assert all(fix in fault["fix"] and "nothing is ever cut" in fault["fix"] for fault in answer["faults"])
    assert (answer["tokens"]["longest"] > 400) == (setting == "auto")


def test_all_wrong_settings_of_recipe_and_flags_are_named_together(tmp_path: Path) -> None:
    save(tmp_path, b"lora:\n  rank: 8\n  alpha: -1\n", "recipe.yaml")
    says = ("recipe.yaml:2", "recipe.yaml:3", "--set train.epochs", "lora.r?", "lora.alpha", "train.epochs")
    refused(tmp_path, "train", "recipe.yaml", "--set", "train.epochs=0", "--out", "run", says=says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lora:\n  r: [8\n", ("recipe.yaml:3",)),
        ("lora:\n  r: 8\nLora:\n  r: 9\n", ("recipe.yaml:3", "the unknown section 'Lora'", "Did you mean lora?")),
        ("lora:\n  r: 8\nlora:\n  alpha: 9\n", ("recipe.yaml:3", "'lora' twice")),
        ("- lora\n", ("recipe.yaml", "a list at the top")),
        ("template:\n  system: 你好\n".encode("gb18030"), ("recipe.yaml", "not UTF-8")),
        (None, ("recipe.yaml", "No such file")),
    ],
)
def test_a_broken_recipe_is_refused(tmp_path: Path, text: str | bytes | None, says: tuple[str, ...]) -> None:
    if text is not None:
        save(tmp_path, text if isinstance(text, bytes) else text.encode(), "recipe.yaml")
    refused(tmp_path, "train", "recipe.yaml", "--data", "rows.jsonl", "--out", "run", "--json", says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "--modl", "x"), "--modl"),
        (("trian",), "trian"),
        (("check", "--show", "-1"), "--show"),
        (("check", "--show", "all"), "--show"),
        (("chat",), "RUN_OR_MODEL"),
        (("check", "--data"), "--data"),
    ],
)
def test_a_command_that_is_spelt_wrong_is_refused(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    command, *rest = arguments
    error = refused(tmp_path, command, "--json", *rest, says=(says,)).json["error"]
    assert says in error["where"] + error["found"]


def test_an_answer_in_json_needs_a_question(tiny_model: Path, tmp_path: Path) -> None:
    ended = refused(tmp_path, "chat", tiny_model, "--json", says=("standard input", "Write one a line."))
    assert ended.json["error"]["expected"] == "a question a line"


def test_a_folder_that_is_no_run_is_no_chat_partner(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    refused(tmp_path, "chat", tmp_path / "run", "--prompt", "Hi", "--json", says=(tmp_path / "run",))


# --- the run's folder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("full", ("full", "a folder that is not empty")),
        ("full/notes.txt", ("notes.txt", "a file")),
        ("full/notes.txt/run", ("notes.txt, which is a file",)),
        ("full/link", ("link",)),
        ("n" * 300, ("name too long",)),
    ],
)
def test_a_folder_that_can_not_be_written_is_refused(
    tiny_model: Path, tmp_path: Path, out: str, says: tuple[str, ...]
) -> None:
    """Prevents a run that is lost when it is saved, and one that overwrites what somebody keeps there."""
    (tmp_path / "full").mkdir()
    save(tmp_path / "full", b"mine", "notes.txt")
    (tmp_path / "full" / "link").symlink_to("notes.txt")
    path = save(tmp_path, jsonl(GOOD))
    arguments = ("train", "--model", tiny_model, "--data", path, "--out", Path("full", "..", out), "--json")
    refused(tmp_path, *arguments, says=says)


def test_a_folder_of_somebody_else_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("root may write anywhere")
    path = save(tmp_path, jsonl(GOOD))
    arguments = ("train", "--model", tiny_model, "--data", path, "--out", tmp_path / "closed" / "run", "--json")
    refused(tmp_path, *arguments, says=("which can not be written to",))


def assert_whole(run: Path, with_adapter: bool = False) -> None:
    """Every name in a run's folder stands for something whole; there is no half checkpoint and no half line."""
    assert (run / "adapter").exists() == with_adapter
    assert not list(run.rglob("*.partial"))
    for folder in [*run.glob("checkpoints/*"), *run.glob("adapter")]:
        digests = json.loads((folder / "files.json").read_text())
        assert {name for name in digests if rundir.sha256(folder / name) != digests[name]["sha256"]} == set()
        assert any(name.endswith("adapter_model.safetensors") for name in digests)
    for name in ("manifest.json", "recipe.yaml"):
        assert not (run / name).exists() or (run / name).read_text().endswith("\n")
    rundir.read_lines(run / "metrics.jsonl")


@pytest.mark.parametrize("small_disk", [400], indirect=True)
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tiny_model: Path, rows: Path, small_disk: Path
) -> None:
    arguments = ("train", "--model", tiny_model, "--data", rows, "--out", small_disk / "run", "--json")
    refused(small_disk, *arguments, says=(small_disk / "run", "free on the disk"))


@pytest.mark.parametrize("small_disk", [8000], indirect=True)
@pytest.mark.parametrize("save_every", ["1 steps", "1000000 steps"])
def test_a_disk_that_fills_up_during_training_leaves_nothing_half_written(
    tiny_model: Path, rows: Path, small_disk: Path, save_every: str
) -> None:
    """Prevents the checkpoint that has its name and half its bytes, and a traceback after hours of training."""
    run = small_disk / "run"
    sets = (f"train.save_every={save_every}", "train.epochs=100000", "eval.hold_out=0.25", "eval.every=1 steps")
    arguments = ["--model", str(tiny_model), "--data", str(rows), "--out", str(run), "--json"]
    arguments += [part for text in sets for part in ("--set", text)]
    process = start("train", *arguments, **ONE_THREAD)
    until = time.monotonic() + 200
    while len(rundir.read_lines(run / "metrics.jsonl")) < 5 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        try:
            while process.poll() is None and time.monotonic() < until:
                filler.write(b"0" * 4096)
        except OSError:
            pass
    out, err = process.communicate(timeout=200)
    assert_message(Ended(process.wait(), out, err), run, "a disk that can be written to")
    assert "no space left on device" in err or "is the disk full?" in err  # torch does not say why it could not write
    assert_whole(run)
    assert len(rundir.read_lines(run / "metrics.jsonl")) >= 5
    became = runs.state_of(run)
    assert became.state == "failed" and "a disk that can be written to" in became.reason  # said on the full disk


SMALL = ("--set", "lora.r=1", "--set", "lora.targets=k_proj")


def limited(kib: int, *arguments: str | Path) -> Ended:
    """A command whose process can write no file larger than that."""
    code = (
        f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({kib << 10}, {kib << 10}))\n"
        "from tunesmith import cli\ncli.main()"
    )
    (out, into_out), (err, into_err) = os.pipe(), os.pipe()  # which have no length
    started = start(*arguments, streams=(0, into_out, into_err), program=code, **ONE_THREAD)
    os.close(into_out)
    os.close(into_err)
    with os.fdopen(out) as said, os.fdopen(err) as told:
        return Ended(started.wait(300), said.read(), told.read())


@pytest.mark.parametrize(
    ("kib", "settings", "where"),
    [
        (1, SMALL, "recipe.yaml"),  # 1.1 KB, written by Python
        (
            100,
            ("--set", "train.save_every=1 steps"),
            "checkpoints/step-000001",
        ),  # optimizer.pt 140 KB, written by torch
    ],
)
def test_a_file_that_can_not_grow_leaves_nothing_half_written(
    tiny_model: Path, rows: Path, tmp_path: Path, kib: int, settings: tuple[str, ...], where: str
) -> None:
    """Prevents a traceback: torch, safetensors and Python each have their own error for a failed write."""
    run = tmp_path / "run"
    flags = ("--json", "--set", "train.epochs=2", "--set", "eval.hold_out=0", *settings)
    ended = limited(kib, "train", "--model", tiny_model, "--data", rows, "--out", run, *flags)
    assert_message(ended, run / where, "a disk that can be written to")
    assert_whole(run, with_adapter=where == "report.html")
    assert not (run / where).exists()


@pytest.mark.parametrize(
    ("kib", "settings", "where"),
    [
        (8, {"lora.r": 1, "lora.targets": "k_proj"}, "report.html"),  # 10 KB
        (40, {}, "adapter"),  # adapter_model.safetensors 69 KB, written by safetensors
    ],
)
def test_an_adapter_that_can_not_be_written_to_its_end_is_not_there(
    tiny_model: Path, rows: Path, tmp_path: Path, kib: int, settings: dict[str, Any], where: str
) -> None:
    """After the last checkpoint; going on is what is left to do when there is room."""
    flags = {"model.name": str(tiny_model), "data.path": str(rows), "train.epochs": 2, "eval.hold_out": 0, **settings}
    run = train(recipe.resolve(None, flags)[0], tmp_path / "run").path
    shutil.rmtree(run / "adapter")
    (run / "report.html").unlink()
    ended = limited(kib, "resume", run, "--json")
    assert_message(ended, run / where, "a disk that can be written to")
    assert_whole(run, with_adapter=where == "report.html")
    assert not (run / where).exists()
    resume(run)
    assert_whole(run, with_adapter=True)
