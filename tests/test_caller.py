"""Messages name settings as their reader gives them: the command line reads flags, Python what Python takes."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunesmith as library
from conftest import byte_tokenizer, save_tiny_model, tunesmith
from small_runs import Notes, settings
from test_layers import modules, tree_of
from tunesmith import recipe
from tunesmith.caller import in_python
from tunesmith.data.records.found import plain, rename_hint
from tunesmith.errors import TunesmithError
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.export import export
from tunesmith.machines import Machine
from tunesmith.training import planning
from tunesmith.training.run import Run

_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OF_OTHERS = {
    "training.adapter_files": {"--base"},  # of the script beside an adapter
    "chat": {"--port"},  # of `tunesmith serve`, for which alone runs are loaded together
    "driver": {"--query-gpu", "--format", "--force-reinstall", "--gpus"},  # of nvidia-smi, pip and Docker
    "hub.package": {"--no-deps", "--no-cache-dir", "--only-binary", "--upgrade"},  # pip's
    "machines": {"--card", "--memory"},  # of `tunesmith plan` alone
    "serving.gate": {"--api-key"},
    "serving.server": {"--api-key", "--host", "--port"},
    "serving.vllm_command": {
        "--chat-template", "--enable-lora", "--generation-config", "--lora-modules", "--max-lora-rank", "--max-loras",
    },
    "system": {"--install", "--mem", "--memory"},  # of wsl, SLURM and Docker
    "training.run": {"--use_fsdp"},  # of `accelerate launch`
}  # fmt: skip
"""Options that are none of the library's: no message that it raises names them as something to pass to it."""


def texts(module: str) -> Iterator[str]:
    """Every text of a module that is no docstring, with x for what an f-string fills in."""
    tree = tree_of(module)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (statements | parts):
            yield node.value


@pytest.mark.parametrize("module", [m for m in modules() if m.partition(".")[0] not in ("cli", "caller")])
def test_no_text_of_the_library_names_an_option_that_python_can_not_read(module: str) -> None:
    left = {option for text in texts(module) for option in _OPTION.findall(in_python(text))}
    assert left == OF_OTHERS.get(module, set())


def test_the_check_sees_an_option() -> None:
    assert any("--set data.allow_set_aside=true" in text for text in texts("training.checking"))
    assert _OPTION.findall(in_python("Pass --enlarge, or --set lora.r=4.")) == ["--enlarge"]


def flags_in(text: str) -> dict[str, Any]:
    """What a message says to pass to `resolve`."""
    (given,) = re.findall(r"flags=(\{.*\})", text)
    return ast.literal_eval(given)


@pytest.mark.parametrize(
    "flag",
    [
        "data.allow_set_aside=true", "data.columns.output=true", "data.columns.output=12", "data.max_length=512",
        "lora.alpha=1.5", "lora.variant=pissa", "model.quantize=nf4", "model.name=./a-model", "template.path=a.jinja",
    ],
)  # fmt: skip
def test_what_python_reads_is_the_recipe_of_the_flag(flag: str) -> None:
    name, value = recipe.parse_flag(flag)
    given = flags_in(in_python(f"Pass --set {flag}."))
    assert given == {name: value}
    assert library.resolve(flags=given) == library.resolve(flags={name: value})


_LIKE_OPTIONS = ["--like", "--out", "eval --data x", "--set a=b", "--anyway"]
_COLUMNS = st.text(min_size=1, max_size=20) | st.sampled_from(_LIKE_OPTIONS)


@given(_COLUMNS, st.sampled_from(["", ".", " or so", ", or not"]))
def test_a_hint_for_any_column_is_one_that_resolve_takes(column: str, after: str) -> None:
    hint = rename_hint("output", column, [column])
    assert hint is not None
    given = flags_in(in_python(f"Rename it, or pass {hint}{after}"))
    assert given == {"data.columns.output": plain(column)}


def test_several_flags_become_one_argument() -> None:
    text = "Try --set data.columns.instruction=question --set 'data.columns.output=the answer'"
    assert in_python(text) == "Try flags={'data.columns.instruction': 'question', 'data.columns.output': 'the answer'}"


# --- as they are raised -----------------------------------------------------------------------------------------------


def _faulty(folder: Path) -> Path:
    data = folder / "rows.jsonl"
    rows = [{"instruction": "Hi?", "output": "Hi."}] * 3 + [{"instruction": "Hi?"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def _of_another_header(model: Path, folder: Path) -> None:
    data = folder / "rows.csv"
    data.write_text("question,answer\na,b\n")
    library.check(settings(model, data))


def _without_template(model: Path, folder: Path) -> None:
    other = save_tiny_model(folder / "other")
    (other / "chat_template.jinja").unlink()
    byte_tokenizer(None).save_pretrained(other)
    library.check(settings(other, _faulty(folder)))


def _too_small(model: Path, folder: Path) -> None:
    checked = library.check(settings(model, _faulty(folder)))
    raise planning.plan(checked, Machine("cpu", 1 << 20, 1e9, 1e9, "a small one")).too_large()


def _without_held_out(model: Path, folder: Path) -> None:
    flags = {"eval.hold_out": 0, "train.epochs": 1, "data.allow_set_aside": True}
    evaluate(library.train(settings(model, _faulty(folder), **flags), folder / "run").path)


RAISED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "an unknown setting": (lambda m, f: library.resolve(flags={"lora.rnak": 1}), "flags['lora.rnak']: found"),
    "which there are": (lambda m, f: library.resolve(flags={"zzz.q": 1}), "that `tunesmith.Recipe()` shows"),
    "an impossible value": (lambda m, f: library.resolve(flags={"lora.r": 0}), "flags['lora.r']: found 0"),
    "another's name of an argument": (lambda m, f: library.resolve(flags={"output_dir": "x"}), "Did you mean `out`?"),
    "no data": (
        lambda m, f: library.check(library.resolve(flags={"model.name": str(m)})[0]),
        "flags={'data.path': 'FILE'}",
    ),
    "data as a recipe": (lambda m, f: library.resolve(_faulty(f)), "flags={'data.path': '"),
    "no recipe": (lambda m, f: library.resolve(f / "none.yaml"), "leave it out and use flags."),
    "faulty rows": (lambda m, f: library.train(settings(m, _faulty(f)), f / "run"), "{'data.allow_set_aside': True}"),
    "another header": (_of_another_header, "{'data.columns.instruction': 'question', 'data.columns.output': 'answer'}"),
    "no template": (
        _without_template,
        "flags={'template.path': 'FILE.jinja'} or, of those that",
    ),
    "a folder with files": (lambda m, f: library.train(settings(m, _faulty(f)), m), "Choose another `out`."),
    "too little memory": (_too_small, "anyway=True"),
    "nothing to evaluate on": (_without_held_out, "evaluate(data=FILE)"),
}


@pytest.mark.parametrize("case", RAISED)
def test_what_python_meets_names_no_option(case: str, tiny_model: Path, tmp_path: Path) -> None:
    act, says = RAISED[case]
    with pytest.raises(TunesmithError) as raised:
        act(tiny_model, tmp_path)
    error = raised.value
    assert says in str(error)
    assert [_OPTION.findall(part) for part in (str(error), error.where, error.expected, error.fix)] == [[]] * 4


def test_the_types_of_an_export_are_an_argument(undisturbed: Run) -> None:
    with pytest.raises(TunesmithError, match=r"^`dtype`: found 'float8'"):
        export(undisturbed.path, "merged", dtype="float8")


def test_a_fault_reads_the_same_from_both_and_says_how_to_mend_it_to_each(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"instruction": "Hi?", "answer": "Hi."}) + "\n")
    (fault,) = library.check(settings(tiny_model, data)).faults
    assert str(fault).endswith("or pass flags={'data.columns.output': 'answer'}")
    mended = library.check(settings(tiny_model, data, **flags_in(fault.fix)))
    assert mended.ok and len(mended.rows) == 1
    ended = tunesmith("check", "--model", tiny_model, "--data", data)
    assert "or pass --set data.columns.output=answer" in ended.out and "flags" not in ended.out


def test_faulty_rows_are_gone_on_without_as_it_is_said_to_each(tiny_model: Path, tmp_path: Path) -> None:
    data = _faulty(tmp_path)
    with pytest.raises(TunesmithError) as raised:
        library.train(settings(tiny_model, data), tmp_path / "run")
    run = library.train(settings(tiny_model, data, **flags_in(raised.value.fix)), tmp_path / "run")
    assert run.rows_set_aside == 1
    ended = tunesmith("train", "--model", tiny_model, "--data", data, "--out", tmp_path / "other")
    assert ended.code == 2 and "go on without them: --set data.allow_set_aside=true." in ended.err, ended.err


def test_a_run_that_is_done_says_to_each_how_it_goes_on(undisturbed: Run) -> None:
    notes = Notes()
    library.resume(undisturbed.path, watcher=notes)
    assert notes.texts[-1] == "This run is done. It can go on for longer: epochs=N."
    ended = tunesmith("resume", undisturbed.path)
    assert "--set train.epochs=N" in ended.out, ended.out + ended.err
