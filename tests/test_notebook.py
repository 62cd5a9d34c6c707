"""The library in a notebook: names on Tab, a training that is watched there, values in a line and as escaped HTML."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypotheses
from hypothesis import strategies as st
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from nbformat import v4

import tunesmith as library
from conftest import ROOT, script
from small_runs import FLAGS, settings
from test_gguf import save_model
from tunesmith.chat import Reply
from tunesmith.markup import text as shown
from tunesmith.training import notebook
from tunesmith.training.checking import Checked
from tunesmith.training.run import Run, Sample
from tunesmith.types import Fault, Origin

# zmq and the kernel's client are third parties' event loops
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning"
)
HOSTILE = "a <b>bold</b> & <script>alert('1')</script> \x1b[31m\nsecond \u202e line \udcff"


def environment() -> dict[str, str]:
    return {**os.environ, "TUNESMITH_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def recipe_cell(model: Path, data: Path, **flags: Any) -> str:
    given = {"model.name": str(model), "data.path": str(data), **FLAGS, **flags}
    return f"import tunesmith\nrecipe, _ = tunesmith.resolve(flags={given!r})"


CELLS = {
    "check": "checked = tunesmith.check(recipe); checked",
    "plan": "tunesmith.plan(checked)",
    "train": "run = tunesmith.train(recipe, 'run', checked=checked)",
    "run": "run",
    "reply": "tunesmith.load(run).reply([{'role': 'user', 'content': 'Count to 3.'}], temperature=0, max_tokens=4)",
    "finished": "same = tunesmith.resume('run')",
    "longer": "longer = tunesmith.resume('run', epochs=3)",
    "with another watcher": "quiet = tunesmith.train(recipe, 'other', watcher=tunesmith.Watcher())",
}


@pytest.fixture(scope="module")
def outputs(tiny_model: Path, talk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What the cells leave in a notebook."""
    first = v4.new_code_cell(recipe_cell(tiny_model, talk))
    cells = {name: v4.new_code_cell(source) for name, source in CELLS.items()}
    whole = v4.new_notebook(cells=[first, *cells.values()])
    folder = tmp_path_factory.mktemp("notebook")
    client = NotebookClient(
        whole, timeout=600, startup_timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment())
    return {name: cell.outputs for name, cell in cells.items()}


def only(outputs: list[Any]) -> tuple[str, str]:
    """Text and HTML of a cell's only output: nothing was printed beside it, no warning and no bar."""
    (output,) = outputs
    return output.data["text/plain"], output.data["text/html"]


def test_a_training_is_one_display_that_stays_as_its_record(outputs: dict[str, list[Any]]) -> None:
    text, html = only(outputs["train"])
    assert re.fullmatch(r"step 18 of 18, loss \d\.\d{3}, held-out loss \d\.\d{3} → \d\.\d{3}, \d+:\d\d", text)
    assert text in html and '<progress value="18" max="18">' in html
    assert html.count("<svg") == 1 and html.count("<circle") == 3  # held out: before, and after each epoch
    assert len(html) < 10_000


def test_a_training_that_goes_on_shows_all_of_it_and_its_notes(outputs: dict[str, list[Any]]) -> None:
    text, html = only(outputs["longer"])
    assert text.startswith("step 27 of 27, ") and text.endswith("\nWent on after step 18.")
    assert html.count("<circle") == 4 and "Went on after step 18." in html
    before = only(outputs["train"])[0].split("held-out loss ")[1].split(" ")[0]
    assert f"held-out loss {before} → " in text
    assert "It can go on for longer: epochs=N." in only(outputs["finished"])[0]


def test_another_watcher_takes_the_displays_place(outputs: dict[str, list[Any]]) -> None:
    assert outputs["with another watcher"] == []


def test_values_are_one_line_and_html(outputs: dict[str, list[Any]]) -> None:
    patterns = {
        "check": r"<Checked \S+/talk\.jsonl: 40 read = 36 to train on \+ 4 to hold out \+ 0 to set aside; ok>",
        "plan": r"<Plan fits: \d+\.\d of \d+\.\d GiB on .+; 18 steps in about \d+:\d\d, \d+:\d\d with answers>",
        "run": r"<Run run: 18 steps, last loss \d\.\d{3}, held-out loss \d\.\d{3} → \d\.\d{3}>",
        "reply": r"<Reply '.*'; \d tokens, stopped by (stop|length)>",
    }
    for name, pattern in patterns.items():
        text, html = only(outputs[name])
        assert re.fullmatch(pattern, text), text
        assert html.startswith("<div>") and html.endswith("</div>")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A kernel's manager and client."""
    manager, client = start_new_kernel(
        startup_timeout=600, kernel_name="python3", env=environment(), cwd=str(tmp_path_factory.mktemp("kernel"))
    )
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_tab_offers_the_public_names_in_a_kernel(kernel: tuple[Any, Any]) -> None:
    _, client = kernel
    client.execute_interactive("import tunesmith", timeout=600)
    matches = client.complete("tunesmith.", 10, reply=True, timeout=600)["content"]["matches"]
    assert {name.removeprefix("tunesmith.") for name in matches} >= {*library.__all__}


def test_ctrl_c_in_a_notebook_is_said_and_the_record_is_that_of_the_last_step(
    kernel: tuple[Any, Any], tiny_model: Path, talk: Path
) -> None:
    manager, client = kernel
    client.execute_interactive(recipe_cell(tiny_model, talk, **{"train.epochs": 10_000}), timeout=600)
    asked, texts = client.execute("run = tunesmith.train(recipe, 'run')"), [""]
    for message in messages(client, asked):
        if "data" in message:
            texts.append(message["data"]["text/plain"])
            if "step 3 of" in texts[-1] and "step 3 of" not in texts[-2]:
                manager.interrupt_kernel()
    said = "".join(m.get("text", "") for m in messages(client, client.execute("print(run.interrupted, run.steps)")))
    steps = int(said.removeprefix("True "))
    assert texts[-1].startswith(f"step {steps:,} of 90,000, loss ") and "Stopping after this step" in texts[-1]


def messages(client: Any, asked: str) -> Iterator[dict[str, Any]]:
    """What the kernel says of a cell until it has ended."""
    while True:
        message = client.get_iopub_msg(timeout=600)
        if message["parent_header"].get("msg_id") != asked:
            continue
        yield message["content"]
        if message["content"].get("execution_state") == "idle":
            return


def in_a_process(code: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


def test_names_and_version_are_had_without_torch() -> None:
    code = (
        "import sys, tunesmith\n"
        "assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}\n"
        "assert sorted(dir(tunesmith)) == sorted([*tunesmith.__all__, '__version__'])\n"
        "print(tunesmith.__version__)\n"
        "assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}\n"
    )
    ended = in_a_process(code)
    assert ended.returncode == 0, ended.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+.*\n", ended.stdout)


def test_a_script_hears_nothing_of_the_libraries(talk: Path, tmp_path: Path) -> None:
    """From training to what is served: no line, no warning, no bar."""
    code = recipe_cell(save_model(tmp_path / "model"), talk, **{"train.epochs": 1}) + (
        "\nfrom tunesmith.evaluation.evaluate import evaluate"
        "\nfrom tunesmith.export import export, live"
        "\nlive.N_PROMPTS, live.REPLY_TOKENS = 2, 4"
        "\nrun = tunesmith.train(recipe, 'run')"
        "\ntunesmith.load(run).reply([{'role': 'user', 'content': 'Hi'}], max_tokens=4)"
        "\nevaluate(run.path)"
        "\nfor to in ('adapter', 'merged', 'gguf'): export(run.path, to)"
    )
    ended = in_a_process(code, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_ipython_without_a_kernel_has_no_display() -> None:
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "InteractiveShell.instance()\n"
        "from tunesmith import Watcher\nfrom tunesmith.training import notebook\n"
        "assert type(notebook.watcher()) is Watcher\n"
    )
    ended = script(code)
    assert ended.code == 0, ended.err


# --- what anybody wrote -----------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """The tags of some HTML, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"style"}

    def handle_data(self, data: str) -> None:
        self.text += data


OURS = {"div", "b", "p", "table", "tr", "th", "td"}


def hostile(checked: Checked, text: str) -> list[Checked | Run | Reply]:
    """Values in which everything that somebody else may write is this text."""
    fault = Fault(Origin(text, 1), text, text, text, text)
    data = replace(checked.data, path=text)
    recipe = checked.recipe.model_copy(update={"model": checked.recipe.model.model_copy(update={"name": text})})
    sample = Sample(text, text, text, text)
    return [
        replace(checked, data=data, recipe=recipe, faults=[fault] * 12),
        Run(Path(f"/{text}"), 3, 4, 1, 0, 1.0, (2.0, 1.0), 4.0, 1 << 30, 100, 40, (sample,)),
        Reply(text, (1, 2), (3, 4), "length"),
    ]


@pytest.fixture(scope="module")
def checked(tiny_model: Path, talk: Path) -> Checked:
    return library.check(settings(tiny_model, talk))


@hypotheses(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(st.text(min_size=1))
@example(HOSTILE)
def test_no_text_of_others_is_markup_or_breaks_the_line(checked: Checked, text: str) -> None:
    for value in hostile(checked, text):
        line = repr(value)
        assert line.isprintable() and line.startswith(f"<{type(value).__name__} ")
        html = value._repr_html_()
        html.encode()
        parsed = Parsed(html)
        assert parsed.tags <= OURS
        assert shown(text) in parsed.text


def test_the_parser_sees_markup_that_is_not_escaped() -> None:
    assert not Parsed(f"<p>{HOSTILE}</p>").tags <= OURS


def test_notes_of_a_training_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    display = notebook.Display()
    display.noted(HOSTILE)
    assert shown(HOSTILE) in capsys.readouterr().out  # where no kernel is
    assert Parsed(display._repr_html_()).tags <= OURS
    assert shown(HOSTILE) in Parsed(display._repr_html_()).text
