"""What leaves this machine says what things are called and not where they lie, and holds what it should, no more."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

import pytest

from conftest import finished, start, tunesmith
from small_runs import settings
from test_gguf import save_model
from tunesmith import places, reading
from tunesmith.errors import ProofError
from tunesmith.evaluation import page as evaluation_page
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.export import FORMS, export
from tunesmith.runs import rundir
from tunesmith.training import adapter_files
from tunesmith.training.run import Run, train

pytestmark = pytest.mark.usefixtures("brief")
SECRET = "zebra-of-nobody-else"


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory, talk: Path) -> Path:
    """The folder of a run of which everything, also what others wrote into the base, lies below a telling name."""
    folder = tmp_path_factory.mktemp(SECRET)
    base = save_model(folder / "base")
    planted = {"name_or_path": str(base), "_name_or_path": str(base), "tokenizer_file": f"{base}/tokenizer.json"}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = base / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **planted}))
    shutil.copyfile(talk, folder / "talk.jsonl")
    template = folder / "own.jinja"
    shutil.copyfile(base / "chat_template.jinja", template)
    flags = {"train.epochs": 1, "template.path": str(template)}
    run = train(settings(base, folder / "talk.jsonl", **flags), folder / "run")
    return run.path


def told(paths: list[Path]) -> list[str]:
    """Those of some files, and of all in some folders, that say where things lie or on whose machine."""
    words = [SECRET, f"{Path.home()}/"]
    if len(platform.node()) > 8:  # a shorter one may stand in any text
        words.append(platform.node())
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [
        f"{file}: {word}" for file in files if file.is_file() for word in words if word.encode() in file.read_bytes()
    ]


@pytest.mark.usefixtures("few_questions")
def test_nothing_that_people_share_says_where_it_was_made(private: Path) -> None:
    evaluation_page.write(rundir.open_run(private), evaluate(private))
    shared = [private / "adapter", private / "report.html", private / "eval.html"]
    shared += [export(private, to).path for to in FORMS if to != "gguf"]  # ollama's holds that file
    assert len(shared) == 6 and all(path.exists() for path in shared)
    assert told(shared) == []
    assert told([private / "manifest.json"])  # which is private, and goes on from there


def test_the_script_beside_an_adapter_of_a_folder_asks_for_its_base(private: Path) -> None:
    adapter = private / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert "`base`, a folder where it was trained" in (adapter / "README.md").read_text()
    asked = finished(start("Hi?", program=adapter / "load_and_chat.py"))
    assert asked.code == 2 and "trained on, base: --base FOLDER" in asked.err, asked.err
    given = ("--base", private.parent / "base", "Hi?")
    assert finished(start(*given, program=adapter / "load_and_chat.py")).code == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hf:org/name", "hf:org/name"),
        ("models/mine", "models/mine"),
        ("/a/b c/mine", "mine"),
        ("/a/b/rows.jsonl:3", "rows.jsonl:3"),
        ("~/mine", "mine"),
        ("/", "/"),
    ],
)
def test_of_an_absolute_path_the_last_name_is_shown(text: str, shown: str) -> None:
    assert places.named(text) == shown
    assert places.without(f"see {text}!", [text]) == (f"see {shown}!" if text != "~/mine" else "see ~/mine!")


# --- what is copied ---------------------------------------------------------------------------------------------------


@pytest.fixture
def finished_run(undisturbed: Run, tmp_path: Path) -> Path:
    """A finished run that may be written into."""
    return Path(shutil.copytree(undisturbed.path, tmp_path / "run"))


def test_an_adapter_has_files_of_known_names_only(undisturbed: Run) -> None:
    assert {path.name for path in undisturbed.adapter.iterdir()} <= adapter_files.known_names()


def test_what_others_laid_beside_an_adapter_stays_there_and_is_named(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (finished_run / "adapter" / "notes.txt").symlink_to(tmp_path / "secret")
    (finished_run / "adapter" / "more").mkdir()
    for to in ("adapter", "merged"):
        written = export(finished_run, to)
        assert {path.name for path in written.path.iterdir()} & {"notes.txt", "more"} == set()
        assert written.notes == ("Not copied, for no part of an adapter is called so: more, notes.txt.",)


@pytest.mark.parametrize("kind", ["a link", "a pipe", "a folder", "a socket"])
@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "adapter_model.safetensors", "files.json"])
def test_a_part_of_an_adapter_that_is_no_file_is_refused_by_name(finished_run: Path, name: str, kind: str) -> None:
    part = finished_run / "adapter" / name
    elsewhere = part.rename(finished_run / name)
    if kind == "a link":
        part.symlink_to(elsewhere)
    elif kind == "a pipe":
        os.mkfifo(part)
    elif kind == "a folder":
        part.mkdir()
    else:
        os.mknod(part, 0o140600)
    for to in ("adapter", "merged"):
        with pytest.raises(ProofError, match=f"{name}: found {kind}; expected a file"):
            export(finished_run, to)
    assert not (finished_run / "exported").exists() and not (finished_run / "merged").exists()


def test_what_becomes_a_link_meanwhile_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "link").symlink_to("secret")
    with pytest.raises(OSError, match="link"):
        reading.copy(tmp_path / "link", tmp_path / "copied")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(reading.Unfit, match="a pipe"):
        reading.copy(tmp_path / "pipe", tmp_path / "copied")
    assert not (tmp_path / "copied").exists() and reading.kind(Path(os.devnull)) == "a device"


def test_the_command_says_which_part_is_a_link(finished_run: Path, tmp_path: Path) -> None:
    part = finished_run / "adapter" / "README.md"
    part.unlink()
    part.symlink_to(tmp_path)
    ended = tunesmith("export", finished_run, "--to", "adapter")
    assert ended.code == 3 and "README.md" in ended.err and "found    a link" in ended.err, ended.err
